"""Tokens in training's order: read from a cache, kept or computed; ahead of time on a second stream; and shuffled over
the images of a pool.

Every image (or every token) is used once per epoch, and the order is a function of the seed alone, so that a training
that was interrupted goes on with the batch it would have had.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from patchsae.activations import MEMORY, finite_tokens, pixel_batches, read_pixels, tokens_at
from patchsae.clip import Clip
from patchsae.data.checks import Layer, Natural, Seed, Whole, indices
from patchsae.data.images import Images
from patchsae.fast import processes

#: Images whose tokens are shuffled with each other: two such pools are in memory, one that training draws from and one
#: that is being filled, so many images at a time.
POOL_IMAGES, FILL_IMAGES = 1024, 128


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


def ahead(items: Iterable[list[torch.Tensor]], device: torch.device) -> Iterator[list[torch.Tensor]]:
    """The same lists of tensors; on a GPU the next one is computed on a second stream while this one is used."""
    if device.type != "cuda":
        yield from items
        return
    stream, items = torch.cuda.Stream(device), iter(items)

    def begin():
        # What the next one is made of may still be on its way in the first stream.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            return next(items, None)

    coming = begin()
    while coming is not None:
        now = coming
        torch.cuda.current_stream(device).wait_stream(stream)
        for z in now:
            z.record_stream(torch.cuda.current_stream(device))
        coming = begin()
        yield now


def pool_spans(first: int, last: int, n: int, tokens: int) -> Iterator[tuple[int, int, int, int]]:
    """Where the tokens ``first`` to ``last`` of an endless sequence of epochs lie: epoch, pool, and from where to where
    in the shuffled pool; each of n images has ``tokens`` tokens."""
    while first < last:
        epoch, place = divmod(first, n * tokens)
        pool, start = divmod(place, POOL_IMAGES * tokens)
        size = min(POOL_IMAGES, n - pool * POOL_IMAGES) * tokens
        stop = min(size, start + last - first)
        yield epoch, pool, start, stop
        first += stop - start


def shuffled_tokens(tokens: TrainingTokens, steps: range, batch_images: int, seed: int,
                    cls: bool = False) -> Iterator[list[torch.Tensor]]:
    """Each step's tokens, as many as ``batch_images`` images have, drawn from pools of many images: ``[N,D]`` of each
    layer.

    Of several processes each shuffles the tokens of its own share of the images.
    """
    mine, per_image = processes.share(len(tokens.ds)), 1 if cls else tokens.clip.n_tokens
    size = batch_images * per_image
    spans = [list(pool_spans(step * size, (step + 1) * size, len(mine), per_image)) for step in steps]
    wanted = dict.fromkeys(span[:2] for step in spans for span in step)
    pools = ahead((_pool(tokens, mine, *which, seed, per_image) for which in wanted), tokens.clip.device)
    here, pool = None, None
    for step in spans:
        parts = []
        for *which, start, stop in step:
            if which != here:
                here, pool = which, next(pools)
            parts.append([z[start:stop] for z in pool])
        found = list(map(torch.cat, zip(*parts)))
        yield [z[:, :-1][z[:, -1] > 0] if tokens.ds.unreadable else z[:, :-1] for z in found]


def _pool(tokens: TrainingTokens, mine: range, epoch: int, pool: int, seed: int, per_image: int) -> list[torch.Tensor]:
    """The shuffled tokens of one pool, ``[P*T,D+1]`` of each layer: behind each token a 1, or a 0 where its image
    cannot be read."""
    rows = mine.start + epoch_rows(len(mine), epoch, seed)[pool * POOL_IMAGES:(pool + 1) * POOL_IMAGES]
    parts = [[F.pad(z[:, :per_image], (0, 1), value=1.0) for z in found]
             for found in tokens.batches(np.array_split(rows, -(-len(rows) // FILL_IMAGES)))]
    device = tokens.clip.device
    read = torch.tensor([i for i, row in enumerate(rows) if int(row) not in tokens.ds.unreadable], device=device)
    order = torch.from_numpy(np.random.default_rng([seed, epoch, pool]).permutation(len(rows) * per_image)).to(device)
    whole = (z.new_zeros(len(rows), *z.shape[1:]).index_copy_(0, read, z) for z in map(torch.cat, zip(*parts)))
    return [z.flatten(0, 1)[order] for z in whole]
