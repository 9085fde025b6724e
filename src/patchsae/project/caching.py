"""``patchsae cache``: says how much it will write and where, asks, and writes or verifies the cache of a profile."""

import time
from pathlib import Path

import numpy as np
import torch

from patchsae.activations import read_pixels
from patchsae.cache import (
    MANIFEST,
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
from patchsae.fast import processes


def _time(clip: Clip, ds, layer: int) -> str:
    """About how long the pass over the data set takes: as long as over a few images, projected to all processes."""
    few = np.arange(min(16, len(ds)))
    begin = time.perf_counter()
    for batch in read_pixels(clip, ds, [few]):
        with torch.no_grad():
            clip.below(batch.pixels, layer).cpu()
    minutes = (time.perf_counter() - begin) / 60 * len(ds) / len(few) / processes.count()
    return f"{minutes / 60:.1f} hours" if minutes > 90 else f"{max(1, minutes):.0f} minutes"


def _plan(clip: Clip, ds, layer: int, folder: Path, dtype: torch.dtype) -> str:
    """What will be written, where, and how long it takes."""
    size, there = cache_bytes(clip, len(ds), dtype), len([*folder.glob("shard-*.json")])
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


def run(name: str | None, yes: bool, kind: str | None, verify: bool) -> str:
    """Write the profile's cache, or verify it; returns what was done."""
    profile = start(name)
    dtype = getattr(torch, kind or profile.data.cache or "float16")
    clip, layer = load_clip(profile.model.name, device()), profile.model.layer
    ds = open_dataset(profile, profile.data.task, "train")
    folder = cache_folder(profile, clip, ds)
    if verify:
        cache = open_cache(clip, ds, layer, folder)
        cache.verify(clip, ds, "verifying the cache")
        return f"Every byte and every image of {folder} is as it was written ({len(cache):,} images)."
    if not (folder / MANIFEST).is_file():
        plan = _plan(clip, ds, layer, folder, dtype)
        if processes.rank() == 0:
            print(plan, flush=True)
        if not yes and not _agreed():
            return "Nothing was written."
    cache = write_cache(clip, ds, layer, folder, dtype, None, float("inf"), profile.data.batch_images,
                        "tokens of the images")
    said = cache.manifest
    return (f"{folder} holds the tokens of {len(cache):,} images, {said['n_unreadable']} could not be read; "
            f"{said['dtype']} takes {said['explained_variance_cost']:.1e} of the explained variance.")
