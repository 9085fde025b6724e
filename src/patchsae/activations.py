"""From images to tokens: a data set streamed through the part of the model below the cut, once or in training's order.

In training every image (or every token) is used once per epoch, and the order is a function of the seed alone, so that
a training that was interrupted goes on with the batch it would have had.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from patchsae.clip import Clip
from patchsae.data.adapters import as_images
from patchsae.data.checks import Layer, Natural, Pixels, Seed, Whole, guard, indices
from patchsae.data.datasets import ArrayDataset
from patchsae.data.images import Images, Unreadable
from patchsae.data.reading import read_ahead, read_rows

#: Tokens of a training set are kept in memory up to this size: 1 GiB.
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


# The order of training ----------------------------------------------------------------------------------

@functools.lru_cache(maxsize=4)
def epoch_rows(n: Natural, epoch: Whole, seed: Seed) -> np.ndarray:
    """The order of one epoch over n images: a permutation that depends on the seed and the epoch alone."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.flags.writeable = False
    return order


def training_rows(n: Whole, step: Whole, batch_images: Natural, seed: Seed) -> np.ndarray:
    """Positions of the images of one training step.

    A function of its arguments, so that a resumed run goes on with the batch it would have had. Every image is
    used once per epoch; a batch may straddle two epochs.
    """
    if n == 0:
        raise ValueError("The data set is empty; give one with at least one image.")
    places = np.arange(step * batch_images, (step + 1) * batch_images)
    return np.array([epoch_rows(n, int(p // n), seed)[p % n] for p in places])


class TrainingTokens:
    """Image tokens of the images at any positions of a data set, at each of ``layers``: ``tokens[rows]`` is a list of
    ``[B,T,D]``. Images are read and blocks computed once for all layers.

    They are read from disk caches where these are given, one a layer (see ``cache``). Otherwise, where all of a layer's
    fit into ``MEMORY`` bytes, they are computed once and kept; else whenever they are asked for, ``bf16`` for autocast.
    Each way the same rows give the same bytes again, so that a resumed training goes on as it would have.
    """

    def __init__(self, clip: Clip, ds: Images, layers: Sequence[Layer], bf16: bool = False, caches: Sequence = ()):
        self.clip, self.ds, self.layers, self.bf16, self.caches = clip, ds, list(layers), bf16, list(caches)
        self.kept = None
        if wrong := [cache for cache in caches if not hasattr(cache, "manifest")]:
            raise ValueError(f"A cache is a {type(wrong[0]).__name__}; give what open_cache returns.")
        for cache in caches:
            ds.unreadable.update(dict.fromkeys(cache.manifest["unreadable"], "unreadable when cached"))
        # The same for one layer as for several, since tokens computed in other batches round otherwise.
        if not caches and 4 * len(ds) * clip.n_tokens * clip.width <= MEMORY:
            self._keep()

    def _keep(self) -> None:
        """Compute the tokens of all images, and note where those of each position are."""
        parts, read = [], []
        with torch.no_grad(), self._autocast():
            for batch in pixel_batches(self.clip, self.ds, title="tokens of the images"):
                parts.append([self._of_images(z) for z in finite_tokens(self.clip, batch, self.layers)])
                read += batch.rows.tolist()
        self.kept, self.place = list(map(torch.cat, zip(*parts))), np.full(len(self.ds), -1)
        self.place[read] = np.arange(len(read))

    def __getitem__(self, rows: np.ndarray) -> list[torch.Tensor]:
        return next(self.batches([rows]))

    def _of_images(self, z: torch.Tensor) -> torch.Tensor:
        return z[:, :self.clip.n_tokens].float()

    def _autocast(self):
        return torch.autocast(self.clip.device.type, torch.bfloat16, enabled=self.bf16)

    def batches(self, rows: Iterable[np.ndarray]) -> Iterator[list[torch.Tensor]]:
        """The tokens of each batch of positions, float32; images that cannot be read are left out."""
        rows = list(rows)
        if self.caches:
            for found in zip(*(cache.batches(rows, self.clip.device) for cache in self.caches)):
                yield [z.float() for z in found]
        elif self.kept is not None:
            for batch in rows:
                places = self.place[indices(batch, len(self.place), "positions")]
                places = torch.from_numpy(places[places >= 0])
                yield [z[places] for z in self.kept]
        else:
            for batch in read_pixels(self.clip, self.ds, rows):
                with torch.no_grad(), self._autocast():
                    found = tokens_at(self.clip, batch.pixels, self.layers)
                yield [self._of_images(z) for z in found]


guard(globals())
