"""``patchsae cache``: says how much it will write and where, asks, and writes or verifies the cache of a profile."""

import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from patchsae.activations import PixelBatch, read_pixels
from patchsae.cache import (
    MANIFEST,
    Cache,
    cache_bytes,
    cache_folder,
    free_bytes,
    gigabytes,
    open_cache,
    write_cache,
)
from patchsae.clip import Clip, load_clip
from patchsae.config import device, start
from patchsae.data.datasets import open_dataset
from patchsae.data.images import Images
from patchsae.fast import processes

#: The tokens of the first of so many images are computed again, and may differ from the cache's by this share of their
#: norm: half precision, and sums in another order.
EVERY, TOLERANCE = 64, 1e-2


def _time(clip: Clip, ds: Images, layer: int) -> str:
    """About how long the pass over the data set takes: as long as over a few images, projected to all processes."""
    few = np.arange(min(16, len(ds)))
    begin = time.perf_counter()
    for batch in read_pixels(clip, ds, [few]):
        with torch.no_grad():
            clip.below(batch.pixels, layer).cpu()
    minutes = (time.perf_counter() - begin) / 60 * len(ds) / len(few) / processes.count()
    return f"{minutes / 60:.1f} hours" if minutes > 90 else f"{max(1, minutes):.0f} minutes"


def _plan(clip: Clip, ds: Images, layer: int, folder: Path, dtype: torch.dtype) -> str:
    """What will be written, where, and how long it takes."""
    size, there = cache_bytes(clip, len(ds)), len([*folder.glob("shard-*")])
    return (f"The tokens of {len(ds):,} images after block {clip.block(layer)} take {gigabytes(size)} as "
            f"{str(dtype).removeprefix('torch.')} in {folder}, where {gigabytes(free_bytes(folder))} are free; {there} "
            f"shards are there already. All of it takes about {_time(clip, ds, layer)} on {processes.count()} "
            f"process{'es' * (processes.count() > 1)} like this one.")


def _agreed() -> bool:
    """Ask; where nobody can answer, the answer is no. The first process asks for all."""
    answer = ""
    if processes.rank() == 0:
        try:
            answer = input("Write it? [y/N] ")
        except EOFError:
            print("nobody can answer here; --yes answers")
    return processes.gathered(answer)[0].strip().lower() in ("y", "yes")


def verify_images(cache: Cache, clip: Clip, ds: Images) -> None:
    """Compare content ids and labels of a cache with its data set, and some tokens with what the model gives now."""
    batches, n_compared = np.split(cache.rows, range(EVERY, len(cache), EVERY)), 0
    for batch in tqdm(read_pixels(clip, ds, batches), "images of the cache", len(batches), mininterval=1):
        _verify_batch(cache, clip, batch)
        n_compared += len(batch.rows)
    if n_compared < len(cache):
        raise ValueError(f"{len(cache) - n_compared} images of {cache.folder} cannot be read any more, the first is: "
                         f"{next(iter(ds.unreadable.values()))}")


@torch.no_grad()
def _verify_batch(cache: Cache, clip: Clip, batch: PixelBatch) -> None:
    """Compare one batch; the tokens of its first image are computed again."""
    for row, name, label in zip(batch.rows, batch.ids, batch.labels.tolist()):
        place = cache.places[row]
        if (str(name), label) != (cache.ids[place], cache.labels[place]):
            raise ValueError(f"{cache.folder} has image {cache.ids[place]} of class {cache.labels[place]} at position "
                             f"{row}, but the data set has {name} of class {label} there; remove the folder and run "
                             "`make cache` again.")
    z = clip.below(batch.pixels[:1], cache.manifest["made_of"]["block"])[:, :clip.n_tokens]
    if (z - cache[batch.rows[:1]].to(z)).norm() > TOLERANCE * z.norm():
        raise ValueError(f"{cache.folder} holds other tokens of image {batch.ids[0]} (position {batch.rows[0]}) than "
                         "the model gives now; remove the folder and run `make cache` again.")


def run(name: str | None, yes: bool, kind: str | None, verify: bool) -> str:
    """Write the profile's cache, or verify it; returns what was done."""
    profile = start(name)
    dtype = getattr(torch, kind or profile.data.cache or "float16")
    clip, layer = load_clip(profile.model.name, device()), profile.model.layer
    ds = open_dataset(profile, profile.data.task, "train")
    folder = cache_folder(profile, clip, ds)
    if verify:
        cache = open_cache(folder, clip, ds, layer)
        cache.verify()
        verify_images(cache, clip, ds)
        return f"Every byte and every image of {folder} is as it was written ({len(cache):,} images)."
    if not (folder / MANIFEST).is_file():
        plan = _plan(clip, ds, layer, folder, dtype)
        if processes.rank() == 0:
            print(plan, flush=True)
        if not yes and not _agreed():
            return "Nothing was written."
    cache = write_cache(clip, ds, layer, folder, dtype, 2**63, profile.data.batch_images)
    said = cache.manifest
    return (f"{folder} holds the tokens of {len(cache):,} images, {len(said['unreadable'])} could not be read; "
            f"{said['made_of']['dtype']} takes {said['explained_variance_cost']:.1e} of the explained variance.")
