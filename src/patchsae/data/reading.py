"""Images at positions of a data set: cropped, and read ahead by worker processes where they are in files."""

import functools
import os
import signal
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader

from patchsae.data.images import Crop, Images, Item, LostWorker

#: Worker processes that read images from files; more of them wait for the disk or for the model.
MOST_WORKERS = 16
#: Share of a data set's images that may be unreadable, one image in any case; a pass goes on over them and counts them.
MOST_UNREADABLE = 1e-3


def read_rows(ds: Images, crop: Crop, rows: Sequence[int]) -> tuple:
    """Images (None without any), labels, ids and positions of what can be read, and position -> reason for the rest.

    Images are uint8 ``[B,S,S,3]``, cropped, or float ``[B,3,H,W]``, as they are where they are preprocessed already.
    """
    rows = list(map(int, rows))
    _count(ds, len(rows))
    pairs = list(ds.readable(rows))
    read, items = [row for row, _ in pairs], [item for _, item in pairs]
    images = [torch.as_tensor(crop(item.image) if _is_uint8(item) else item.image) for item in items]
    return (torch.stack(images) if images else None, torch.tensor([item.label for item in items]),
            [item.id for item in items], np.array(read, dtype=np.int64),
            {row: ds.unreadable[row] for row in rows if row not in read})


def _count(ds: Images, n: int) -> None:
    """Add to the file that ``PATCHSAE_READ`` names that so many images were read of how many, in whatever process. What
    is part of a data set counts as that."""
    if place := os.environ.get("PATCHSAE_READ"):
        while isinstance(getattr(ds, "ds", None), Images):
            ds = ds.ds
        if ds.counted:
            with open(place, "a") as file:
                file.write(f"{n} {len(ds)}\n")


def _is_uint8(item: Item) -> bool:
    """Whether an image is to be cropped and normalised, rather than preprocessed already; anything else is refused."""
    image = item.image
    uint8 = image.dtype in (np.uint8, torch.uint8)
    floating = image.is_floating_point() if torch.is_tensor(image) else image.dtype.kind == "f"
    if image.ndim != 3 or not (floating or uint8 and image.shape[-1] == 3 and 0 not in image.shape):
        raise ValueError(f"Image {item.id} is {image.dtype} of shape {list(image.shape)}; give uint8 [H, W, 3], or "
                         "preprocessed pixels as float [3, H, W].")
    return uint8


def read_ahead(ds: Images, crop: Crop, batches: list[np.ndarray], pin: bool = False) -> Iterator[tuple]:
    """Images, labels, ids and positions of each batch; what cannot be read is left out and noted in ``ds.unreadable``.

    ``pin``: in memory from which a GPU fetches while it works.
    """
    workers = min(MOST_WORKERS, os.cpu_count() or 1, len(batches) // 4) if ds.from_files else 0
    # A generator of its own: without one, a loader would draw from the global one.
    loader = DataLoader(range(len(ds)), batch_sampler=batches, collate_fn=functools.partial(read_rows, ds, crop),
                        num_workers=workers, pin_memory=pin, generator=torch.Generator())
    for *batch, unreadable in _alive(loader):
        ds.unreadable.update(unreadable)
        refuse_unreadable(ds.unreadable, len(ds))
        if batch[0] is not None:
            yield tuple(batch)


def refuse_unreadable(unreadable: dict[int, str], n: int) -> None:
    """Stop where more of n images cannot be read than a pass goes on over."""
    if len(unreadable) > max(1, MOST_UNREADABLE * n):
        raise ValueError(f"{len(unreadable)} of {n} images cannot be read, more than {MOST_UNREADABLE:.1%}; the first "
                         f"is: {next(iter(unreadable.values()))}")


def _alive(loader: DataLoader) -> Iterator[tuple]:
    """What a loader gives; a lost worker process is one sentence."""
    lost = False
    try:
        yield from _started(loader)
    except (RuntimeError, OSError, EOFError) as error:
        # What a data set itself raised is passed on, marked as caught in a worker.
        lost = "DataLoader worker" in str(error) or isinstance(error, (ConnectionError, EOFError))
        if not lost or "Caught" in str(error):
            raise
    if lost:  # raised above it would keep the error of the loader alive, and with it the other workers, which end later
        raise LostWorker("A process that reads images was lost, perhaps for want of memory; run again, and it goes on "
                         "from what is finished.")


def _started(loader: DataLoader) -> Iterator[tuple]:
    """The iterator of a loader. Where a worker ends, torch raises an error wherever the program is at that moment;
    without that signal the error comes where its batch is asked for."""
    if not loader.num_workers or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    before, batches = signal.getsignal(signal.SIGCHLD), iter(loader)
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    return batches
