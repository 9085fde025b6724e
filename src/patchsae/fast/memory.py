"""How much memory there is; memory for batches, used again, since fresh pages of the operating system take longer to
get than to fill."""

import os
import weakref
from collections import deque

import numpy as np
import torch

#: Batches whose memory is kept for others.
SPARE = 8


def device_bytes(device: torch.device | str) -> int:
    """Memory of a GPU, or of the machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
