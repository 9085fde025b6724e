"""Tokens in training's order, ahead of time on a second stream, and shuffled over the images of a pool."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from patchsae.activations import TrainingTokens, epoch_rows
from patchsae.fast import processes

#: Images whose tokens are shuffled with each other: two such pools are in memory, one that training draws from and one
#: that is being filled, so many images at a time.
POOL_IMAGES, FILL_IMAGES = 1024, 128


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
