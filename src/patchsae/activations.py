"""From images to tokens: streaming a data set through the part of the model below the cut."""

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from patchsae.clip import Clip
from patchsae.data.datasets import ArrayDataset
from patchsae.data.images import Unreadable

#: Tokens of a training set are kept in memory up to this size: 1 GiB.
MEMORY = 2**30
#: Worker processes that read images from files; more of them wait for the disk or for the model.
MOST_WORKERS = 16
#: Share of a data set's images that may be unreadable; a pass goes on over them and says how many.
MOST_UNREADABLE = 1e-3


class PixelBatch(NamedTuple):
    """``pixels [B,3,H,W]``, ``labels [B]``, ``ids`` and ``rows`` (positions in the data set), each of length B."""

    pixels: torch.Tensor
    labels: torch.Tensor
    ids: list
    rows: np.ndarray


class TokenBatch(NamedTuple):
    """``z [B,T,D]`` at the cut, ``labels [B]``, ``ids`` and ``rows``, each of length B."""

    z: torch.Tensor
    labels: torch.Tensor
    ids: list
    rows: np.ndarray


class LostWorker(ChildProcessError):
    """A process that reads images has ended."""


class _Reader(Dataset):
    """Reads batches of images, in worker processes where there are any: cropped, and still uint8.

    ``batches``: positions in ``ds``, an array for each batch.
    """

    def __init__(self, ds, crop, batches: list[np.ndarray]):
        self.ds, self.crop, self.batches = ds, crop, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k: int) -> tuple:
        """Images, labels, ids and rows of what can be read, and row -> reason for the rest."""
        read, unreadable = [], {}
        for row in map(int, self.batches[k]):
            try:
                read.append((self.ds[row], row))
            except Unreadable as error:
                unreadable[row] = str(error)
        images = [torch.as_tensor(self.crop(item.image) if _is_uint8(item) else item.image) for item, _ in read]
        return (torch.stack(images) if images else None, torch.tensor([item.label for item, _ in read]),
                [item.id for item, _ in read], np.array([row for _, row in read], dtype=np.int64), unreadable)


def _is_uint8(item) -> bool:
    image = item.image
    if image.dtype not in (np.uint8, torch.uint8):
        return False
    if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"An image is uint8 of shape {list(image.shape)}; give uint8 [H, W, 3].")
    return True


def _finish(clip: Clip, images, labels, ids, rows) -> PixelBatch:
    """Move images to the model's device and normalise them there."""
    images = images.to(clip.device, non_blocking=True)
    return PixelBatch(clip.normalise(images) if images.dtype == torch.uint8 else images, labels, ids, rows)


def load_pixels(clip: Clip, ds, rows) -> PixelBatch:
    """Read and preprocess the images at these positions of a data set; one that cannot be read is an error."""
    *batch, unreadable = _Reader(ds, clip.crop, [rows])[0]
    if unreadable:
        raise Unreadable(next(iter(unreadable.values())))
    return _finish(clip, *batch)


def read_pixels(clip: Clip, ds, batches: list[np.ndarray]) -> Iterator[PixelBatch]:
    """The images at the positions of each batch, read ahead by worker processes where a data set is one of files.

    Images that cannot be read are left out and noted in ``ds.unreadable``, up to ``MOST_UNREADABLE`` of the data set.
    """
    workers = min(MOST_WORKERS, os.cpu_count() or 1, len(batches) // 4) if ds.from_files else 0
    # A generator of its own: without one, a loader would draw from the global one.
    loader = DataLoader(_Reader(ds, clip.crop, batches), batch_size=None, collate_fn=tuple, num_workers=workers,
                        pin_memory=clip.device.type == "cuda", generator=torch.Generator())
    for *batch, unreadable in _alive(loader):
        if unreadable:
            _tolerate(ds, unreadable)
        if batch[0] is not None:
            yield _finish(clip, *batch)


def _alive(loader: DataLoader) -> Iterator[tuple]:
    """What a loader gives; a lost worker process is one sentence."""
    try:
        yield from loader
    except (RuntimeError, OSError, EOFError) as error:
        # What a data set itself raised is passed on, marked as caught in a worker.
        lost = "DataLoader worker" in str(error) or isinstance(error, (ConnectionError, EOFError))
        if not lost or "Caught" in str(error):
            raise
        raise LostWorker("A process that reads images was lost, perhaps for want of memory; run again, and it goes on "
                         "from what is finished.") from None


def _tolerate(ds, unreadable: dict[int, str]) -> None:
    """Note images that cannot be read, and stop where they are more than a few."""
    ds.unreadable.update(unreadable)
    if len(ds.unreadable) > MOST_UNREADABLE * len(ds):
        raise ValueError(f"{len(ds.unreadable)} of {len(ds)} images cannot be read, more than {MOST_UNREADABLE:.1%}; "
                         f"the first is: {next(iter(ds.unreadable.values()))}")


def pixel_batches(clip: Clip, ds, batch_images: int = 64, title: str = "") -> Iterator[PixelBatch]:
    """Every image of a data set once, in order, with a bar that carries ``title``."""
    if len(ds) == 0:
        raise ValueError("The data set is empty; give one with at least one image.")
    batches = [np.arange(start, min(start + batch_images, len(ds))) for start in range(0, len(ds), batch_images)]
    yield from tqdm(read_pixels(clip, ds, batches), total=len(batches), desc=title, disable=not title, mininterval=1)


def kept_pixels(clip: Clip, ds):
    """The data set with its images read and preprocessed once, for several passes; itself where they do not fit into
    ``MEMORY`` bytes. Content ids and labels stay."""
    if 12 * len(ds) * clip.image_size**2 > MEMORY:
        return ds
    batches = list(pixel_batches(clip, ds))
    return ArrayDataset(torch.cat([b.pixels.cpu() for b in batches]), torch.cat([b.labels for b in batches]),
                        [name for b in batches for name in b.ids], ds.class_names)


@torch.no_grad()
def token_batches(clip: Clip, ds, layer: int, batch_images: int = 64, title: str = "") -> Iterator[TokenBatch]:
    """The tokens of every image once, in order."""
    for batch in pixel_batches(clip, ds, batch_images, title):
        z = clip.below(batch.pixels, layer)
        if not z.isfinite().all():
            bad = int((~z.isfinite()).flatten(1).any(1).nonzero()[0])
            raise ValueError(f"Image {batch.ids[bad]} (position {batch.rows[bad]}) gives tokens that are not finite; "
                             "check its pixels and the model's weights.")
        yield TokenBatch(z, *batch[1:])
