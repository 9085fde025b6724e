"""From images to tokens: streaming a data set through the part of the model below the cut."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from patchsae.clip import Clip

#: Tokens of a training set are kept in memory up to this size: 1 GiB.
MEMORY = 2**30


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


def load_pixels(clip: Clip, ds, rows) -> PixelBatch:
    """Read and preprocess the images at these positions of a data set."""
    items = [ds[int(i)] for i in rows]
    images = [torch.as_tensor(item.image) for item in items]
    pixels = clip.pixels([item.image for item in items]) if images[0].dtype == torch.uint8 else torch.stack(images)
    return PixelBatch(pixels.to(clip.device), torch.tensor([item.label for item in items]),
                      [item.id for item in items], np.asarray(rows))


def pixel_batches(clip: Clip, ds, batch_images: int = 64, title: str = "") -> Iterator[PixelBatch]:
    """Every image of a data set once, in order, with a bar that carries ``title``."""
    if len(ds) == 0:
        raise ValueError("The data set is empty; give one with at least one image.")
    starts = range(0, len(ds), batch_images)
    for start in tqdm(starts, desc=title, disable=not title, mininterval=1):
        yield load_pixels(clip, ds, range(start, min(start + batch_images, len(ds))))


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


def epoch_rows(n: int, epoch: int, seed: int) -> np.ndarray:
    """The order of one epoch over n images: a permutation that depends on the seed and the epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def training_rows(n: int, step: int, batch_images: int, seed: int) -> np.ndarray:
    """Positions of the images of one training step.

    A function of its arguments, so that a resumed run goes on with the batch it would have had. Every image is
    used once per epoch; a batch may straddle two epochs.
    """
    if n == 0:
        raise ValueError("The data set is empty; give one with at least one image.")
    places = np.arange(step * batch_images, (step + 1) * batch_images)
    epochs = {int(e): epoch_rows(n, int(e), seed) for e in np.unique(places // n)}
    return np.array([epochs[int(p // n)][p % n] for p in places])


class TrainingTokens:
    """Image tokens of the images at any positions of a data set: ``tokens[rows] -> [B,T,D]``.

    Where all of them fit into ``MEMORY`` bytes they are computed once, in the data set's order, and kept;
    otherwise they are computed whenever they are asked for. Either way the same rows give the same bytes again, so
    that a resumed training goes on as it would have.
    """

    def __init__(self, clip: Clip, ds, layer: int):
        self.clip, self.ds, self.layer, self.kept = clip, ds, layer, None
        if 4 * len(ds) * clip.n_tokens * clip.width <= MEMORY:
            self.kept = torch.cat([batch.z[:, :clip.n_tokens]
                                   for batch in token_batches(clip, ds, layer, title="tokens of the images")])

    @torch.no_grad()
    def __getitem__(self, rows: np.ndarray) -> torch.Tensor:
        if self.kept is not None:
            return self.kept[torch.from_numpy(rows)]
        return self.clip.below(load_pixels(self.clip, self.ds, rows).pixels, self.layer)[:, :self.clip.n_tokens]


@functools.lru_cache(maxsize=1)
def training_tokens(clip: Clip, ds, layer: int) -> TrainingTokens:
    """The tokens of a model and data set at a layer; the last ones asked for are kept."""
    return TrainingTokens(clip, ds, layer)
