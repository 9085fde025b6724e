"""Tokens in the order in which training sees them: streamed from the images, from memory or from a disk cache.

Every image (or every token) is used once per epoch, and the order is a function of the seed alone, so that a training
that was interrupted goes on with the batch it would have had.
"""

import functools
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from patchsae.activations import MEMORY, read_pixels, token_batches
from patchsae.cache import profile_cache
from patchsae.clip import Clip
from patchsae.config import Profile
from patchsae.fast import processes

#: Images whose tokens are shuffled with each other: two such pools are in memory, one that training draws from and one
#: that is being filled.
POOL_IMAGES = 1024
#: Images that go through the model at a time to fill a pool.
FILL_IMAGES = 128


# Order

@functools.lru_cache(maxsize=4)
def epoch_rows(n: int, epoch: int, seed: int) -> np.ndarray:
    """The order of one epoch over n images: a permutation that depends on the seed and the epoch alone."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.flags.writeable = False
    return order


def training_rows(n: int, step: int, batch_images: int, seed: int) -> np.ndarray:
    """Positions of the images of one training step.

    A function of its arguments, so that a resumed run goes on with the batch it would have had. Every image is
    used once per epoch; a batch may straddle two epochs.
    """
    if n == 0:
        raise ValueError("The data set is empty; give one with at least one image.")
    places = np.arange(step * batch_images, (step + 1) * batch_images)
    return np.array([epoch_rows(n, int(p // n), seed)[p % n] for p in places])


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


# Source

class TrainingTokens:
    """Image tokens of the images at any positions of a data set: ``tokens[rows] -> [B,T,D]``.

    They are read from a disk cache where one is given (see ``cache``). Otherwise, where all of them fit into ``MEMORY``
    bytes, they are computed once and kept; else they are computed whenever they are asked for, ``bf16`` for autocast.
    Each way the same rows give the same bytes again, so that a resumed training goes on as it would have.
    """

    def __init__(self, clip: Clip, ds, layer: int, bf16: bool = False, cache=None):
        self.clip, self.ds, self.layer, self.bf16, self.cache, self.kept = clip, ds, layer, bf16, cache, None
        if cache is not None:
            ds.unreadable.update(dict.fromkeys(cache.manifest["unreadable"], "unreadable when cached"))
        elif 4 * len(ds) * clip.n_tokens * clip.width <= MEMORY:
            with self._autocast():
                kept = list(token_batches(clip, ds, layer, title="tokens of the images"))
            self.kept = torch.cat([batch.z[:, :clip.n_tokens].float() for batch in kept])
            read = np.concatenate([batch.rows for batch in kept])
            self.place = np.full(len(ds), -1)
            self.place[read] = np.arange(len(read))

    def __getitem__(self, rows: np.ndarray) -> torch.Tensor:
        return next(self.batches([rows]))

    def _autocast(self):
        return torch.autocast(self.clip.device.type, torch.bfloat16, enabled=self.bf16)

    def batches(self, rows: Iterable[np.ndarray]) -> Iterator[torch.Tensor]:
        """The tokens of each batch of positions, float32; images that cannot be read are left out."""
        if self.cache is not None:
            for z in self.cache.batches(list(rows), self.clip.device):
                yield z.float()
        elif self.kept is not None:
            for part in rows:
                places = self.place[part]
                yield self.kept[torch.from_numpy(places[places >= 0])]
        else:
            for batch in read_pixels(self.clip, self.ds, list(rows)):
                with torch.no_grad(), self._autocast():
                    z = self.clip.below(batch.pixels, self.layer)
                yield z[:, :self.clip.n_tokens].float()


@functools.lru_cache(maxsize=1)
def training_tokens(clip: Clip, ds, layer: int, bf16: bool = False, cache=None) -> TrainingTokens:
    """The tokens of a model and data set at a layer; the last ones asked for are kept."""
    return TrainingTokens(clip, ds, layer, bf16, cache)


# Batches

def ahead(items: Iterable[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """The same tensors; on a GPU the next one is computed on a second stream while this one is used."""
    if device.type != "cuda":
        yield from items
        return
    stream, items = torch.cuda.Stream(device), iter(items)

    def begin():
        with torch.cuda.stream(stream):
            return next(items, None)

    coming = begin()
    while coming is not None:
        now = coming
        torch.cuda.current_stream(device).wait_stream(stream)
        now.record_stream(torch.cuda.current_stream(device))
        coming = begin()
        yield now


def training_batches(profile: Profile, clip: Clip, ds, steps: range) -> Iterator[torch.Tensor]:
    """Tokens of each training step: whole images ``[B,T,D]`` or shuffled tokens ``[B*T,D]``, of all tokens or of the
    class tokens alone (T = 1). Of several processes each has its share of every batch."""
    s, cache = profile.sae, profile_cache(profile, clip, ds)
    tokens = training_tokens(clip, ds, profile.model.layer, s.precision == "bf16", cache)
    if s.batch_images % processes.count():
        raise ValueError(f"A batch of {s.batch_images} images cannot be shared evenly by {processes.count()} "
                         "processes; change sae.batch_images or the number of processes.")
    if s.shuffle == "tokens":
        batches = shuffled_tokens(tokens, steps, s.batch_images // processes.count(), profile.seed, s.tokens == "cls")
    else:
        mine = np.array(processes.share(s.batch_images))
        rows = [training_rows(len(ds), step, s.batch_images, profile.seed)[mine] for step in steps]
        batches = (z[:, :1] if s.tokens == "cls" else z for z in tokens.batches(rows))
    return ahead(batches, clip.device)


def shuffled_tokens(tokens: TrainingTokens, steps: range, batch_images: int, seed: int,
                    cls: bool = False) -> Iterator[torch.Tensor]:
    """Each step's tokens, as many as ``batch_images`` images have, drawn from pools of many images: ``[N,D]``.

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
            parts.append(pool[start:stop])
        z = torch.cat(parts)
        yield z[:, :-1][z[:, -1] > 0] if tokens.ds.unreadable else z[:, :-1]


def _pool(tokens: TrainingTokens, mine: range, epoch: int, pool: int, seed: int, per_image: int) -> torch.Tensor:
    """The shuffled tokens of one pool, ``[P*T,D+1]``: behind each token a 1, or a 0 where its image cannot be read."""
    rows = mine.start + epoch_rows(len(mine), epoch, seed)[pool * POOL_IMAGES:(pool + 1) * POOL_IMAGES]
    parts = tokens.batches(np.array_split(rows, -(-len(rows) // FILL_IMAGES)))
    z = torch.cat([F.pad(part[:, :per_image], (0, 1), value=1.0) for part in parts])
    read = torch.tensor([i for i, row in enumerate(rows) if int(row) not in tokens.ds.unreadable], device=z.device)
    z = z.new_zeros(len(rows), *z.shape[1:]).index_copy_(0, read, z)
    order = np.random.default_rng([seed, epoch, pool]).permutation(len(rows) * per_image)
    return z.flatten(0, 1)[torch.from_numpy(order).to(z.device)]
