"""From images to tokens: a data set streamed once through the part of the model below the cut."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from patchsae.clip import Clip
from patchsae.data.adapters import as_images
from patchsae.data.checks import Layer, Natural, Pixels, guard, indices
from patchsae.data.datasets import ArrayDataset
from patchsae.data.images import Images, Unreadable
from patchsae.data.reading import read_ahead, read_rows

#: Pixels and tokens that are read several times are kept in memory up to this size: 1 GiB.
MEMORY = 2**30


# One pass -----------------------------------------------------------------------------------------------

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


def load_pixels(clip: Clip, ds: Images, rows) -> PixelBatch:
    """Read and preprocess the images at these positions of a data set; one that cannot be read is an error."""
    rows = np.atleast_1d(indices(rows, len(ds), "positions"))
    if not len(rows):
        raise ValueError("No images are named; give the positions of at least one.")
    *batch, unreadable = read_rows(ds, clip.crop, rows)
    if unreadable:
        raise Unreadable(next(iter(unreadable.values())))
    return _preprocessed(clip, *batch)


def read_pixels(clip: Clip, ds: Images, batches: list[np.ndarray]) -> Iterator[PixelBatch]:
    """The images at the positions of each batch, preprocessed, those left out that cannot be read."""
    batches = [indices(rows, len(ds), "positions") for rows in batches]
    for batch in read_ahead(ds, clip.crop, batches, pin=clip.device.type == "cuda"):
        yield _preprocessed(clip, *batch)


def _preprocessed(clip: Clip, images: torch.Tensor, labels, ids, rows) -> PixelBatch:
    """Move images to the model's device and normalise them there."""
    images = images.to(clip.device, non_blocking=True)
    if images.dtype == torch.uint8:
        return PixelBatch(clip.normalise(images), labels, ids, rows)
    refuse_not_finite(images, ids, rows, "has pixels", "check how it was preprocessed")
    return PixelBatch(images, labels, ids, rows)


def refuse_not_finite(x: torch.Tensor, ids: list, rows: Sequence[int], what: str, advice: str) -> None:
    """Stop at the first image of which something ``[B,...]`` is not finite."""
    if not x.isfinite().all():
        bad = int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"Image {ids[bad]} (position {rows[bad]}) {what} that are not finite; {advice}.")


def pixel_batches(clip: Clip, ds, batch_images: Natural = 64, title: str = "") -> Iterator[PixelBatch]:
    """Every image of a data set once, in order, with a bar that carries ``title``."""
    ds = as_images(ds)
    if len(ds) == 0:
        raise ValueError("The data set is empty; give one with at least one image.")
    batches = [np.arange(start, min(start + batch_images, len(ds))) for start in range(0, len(ds), batch_images)]
    yield from tqdm(read_pixels(clip, ds, batches), total=len(batches), desc=title, disable=not title, mininterval=1)


@torch.no_grad()
def token_batches(clip: Clip, ds, layer: Layer, batch_images: Natural = 64, title: str = "") -> Iterator[TokenBatch]:
    """The tokens of every image once, in order."""
    for batch in pixel_batches(clip, ds, batch_images, title):
        yield TokenBatch(*finite_tokens(clip, batch, [layer]), *batch[1:])


def finite_tokens(clip: Clip, batch: PixelBatch, layers: Sequence[Layer]) -> list[torch.Tensor]:
    """Tokens of a batch of images at each of some layers, ``[B,T,D]``, all of them finite."""
    found = tokens_at(clip, batch.pixels, layers)
    for z in found:
        refuse_not_finite(z, batch.ids, batch.rows, "gives tokens", "check its pixels and the model's weights")
    return found


def tokens_at(clip: Clip, pixels: Pixels, layers: Sequence[Layer]) -> list[torch.Tensor]:
    """What ``clip.below`` gives at each of some layers, ``[B,3,H,W] -> [B,T,D]``; no block is computed twice."""
    found, last = {}, None
    for block in sorted(map(clip.block, layers)):
        found[block] = clip.below(pixels, block) if last is None else clip.between(found[last], last, block)
        last = block
    return [found[clip.block(layer)] for layer in layers]


def kept_pixels(clip: Clip, ds: Images) -> Images:
    """The data set with its images read and preprocessed once, for several passes; itself where they do not fit into
    ``MEMORY`` bytes. Content ids and labels stay."""
    if 12 * len(ds) * clip.image_size**2 > MEMORY:
        return ds
    batches = list(pixel_batches(clip, ds))
    return ArrayDataset(torch.cat([b.pixels.cpu() for b in batches]), torch.cat([b.labels for b in batches]),
                        [name for b in batches for name in b.ids], ds.class_names)


guard(globals())
