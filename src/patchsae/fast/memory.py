"""Memory for batches, used again: getting fresh pages from the operating system takes longer than filling them."""

import weakref
from collections import deque

import numpy as np
import torch

#: Batches whose memory is kept for others.
SPARE = 8


class BatchMemory:
    """``memory(n, row_bytes)`` is uint8 ``[n, row_bytes]``, where it can be in memory that no tensor refers to now."""

    def __init__(self):
        self.spare = deque(maxlen=SPARE)

    def __call__(self, n: int, row_bytes: int) -> torch.Tensor:
        try:
            whole = self.spare.pop()
        except IndexError:
            whole = np.empty(0, np.uint8)
        if len(whole) < n * row_bytes:
            whole = np.empty(n * row_bytes, np.uint8)
        batch = whole[:n * row_bytes].reshape(n, row_bytes)
        weakref.finalize(batch, self.spare.append, whole).atexit = False  # the tensor holds ``batch`` while it lives
        return torch.from_numpy(batch)
