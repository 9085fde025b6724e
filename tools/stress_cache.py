"""Damages a small disk cache in every way we could think of, and kills its writing at random: ``make stress``.

A fault counts as detected when opening the cache, or else reading all of it, is refused in a sentence that names a
file that was touched. A kill counts as survived when the continued cache has the same files, byte for byte, as one
that was written without interruption, and nothing else is in its folder.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from safetensors import safe_open
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import LAYER, SIDE, random_clip_model, tiny_processor  # noqa: E402

from patchsae import ArrayDataset, cache  # noqa: E402
from patchsae.cache import MANIFEST, cache_bytes, open_cache, write_cache  # noqa: E402
from patchsae.clip import Clip  # noqa: E402
from patchsae.weights.sealed import SealedRows, save_rows  # noqa: E402

SHARD_IMAGES = 7


class Source(NamedTuple):
    """What a cache is made of."""

    clip: Clip
    ds: ArrayDataset
    layer: int

    def write(self, folder: Path, **settings) -> Path:
        """Write or continue its cache."""
        with mock.patch.object(cache, "SHARD_BYTES", SHARD_IMAGES * cache_bytes(self.clip, 1)):
            write_cache(*self, folder, batch_images=4, **settings)
        return folder

    def open(self, folder: Path) -> cache.Cache:
        """Open a cache that should be of it."""
        return open_cache(folder, *self)


def images(n: int, seed: int) -> ArrayDataset:
    """Random uint8 images of three classes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (n, SIDE, SIDE, 3), dtype=np.uint8)
    return ArrayDataset(pixels, np.arange(n) % 3)


def bright_processor():
    """Preprocessing with another mean colour."""
    processor = tiny_processor()
    processor.image_mean = [0.4, 0.4, 0.4]
    return processor


def sources(n: int) -> dict[str, Source]:
    """The cache that is damaged, and others that could be taken for it."""
    clip, ds = Clip(random_clip_model(0), None, tiny_processor()), images(n, 0)
    other = Clip(random_clip_model(1), None, tiny_processor())
    return {"own": Source(clip, ds, LAYER), "model": Source(other, ds, LAYER),
            "block": Source(clip, ds, 0), "images": Source(clip, images(n, 1), LAYER),
            "preprocessing": Source(Clip(random_clip_model(0), None, bright_processor()), ds, LAYER)}


class World:
    """A whole cache, caches of other things in folders beside it, and a number generator."""

    def __init__(self, folder: Path, n: int, seed: int):
        self.sources, self.rng = sources(n), np.random.default_rng(seed)
        self.folders = {name: source.write(folder / name) for name, source in self.sources.items()}
        self.folders["dtype"] = self.sources["own"].write(folder / "dtype", dtype=torch.bfloat16)

    def some(self, folder: Path, pattern: str, n: int = 1) -> list[Path]:
        """Different random files of a folder."""
        return list(self.rng.choice(sorted(folder.glob(pattern)), n, replace=False))

    def other(self, *names: str) -> Path:
        """A folder with a cache of something else."""
        return self.folders[str(self.rng.choice(names))]


def flip(world: World, path: Path, first: int | None = None) -> list[Path]:
    """Change one byte, or one of the first ones."""
    data = bytearray(path.read_bytes())
    data[world.rng.integers(first or len(data))] ^= int(world.rng.integers(1, 256))
    path.write_bytes(data)
    return [path]


def cut(world: World, path: Path) -> list[Path]:
    """Shorten a file."""
    os.truncate(path, world.rng.integers(path.stat().st_size))
    return [path]


def lengthen(world: World, path: Path) -> list[Path]:
    """Append random bytes."""
    path.write_bytes(path.read_bytes() + world.rng.bytes(world.rng.integers(1, 500)))
    return [path]


def overwrite(world: World, path: Path) -> list[Path]:
    """Replace a run of bytes by zeros, as a lost block is."""
    data, whole = bytearray(path.read_bytes()), path.read_bytes()
    while data == whole:
        start = int(world.rng.integers(len(data)))
        end = min(len(data), start + int(world.rng.integers(8, 100)))
        data[start:end] = bytes(end - start)
    path.write_bytes(data)
    return [path]


def remove(world: World, path: Path) -> list[Path]:
    """Remove a file."""
    path.unlink()
    return [path]


def exchange(first: Path, second: Path) -> list[Path]:
    """Swap two files."""
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])
    return [first, second]


def exchange_images(world: World, folder: Path) -> list[Path]:
    """Swap two images within a shard."""
    path = world.some(folder, "*0[0-2].safetensors")[0]
    data = path.read_bytes()
    start = len(data) - SHARD_IMAGES * cache_bytes(world.sources["own"].clip, 1)
    rows = np.frombuffer(data[start:], np.uint8).reshape(SHARD_IMAGES, -1).copy()
    first, second = world.rng.choice(SHARD_IMAGES, 2, replace=False)
    rows[[first, second]] = rows[[second, first]]
    path.write_bytes(data[:start] + rows.tobytes())
    return [path]


def borrow(world: World, folder: Path) -> list[Path]:
    """Put the file of another model, block, preprocessing or set of images in the place of one of this cache."""
    path = world.some(folder, "shard-*")[0]
    shutil.copy(world.other("model", "block", "preprocessing", "images", "dtype") / path.name, path)
    return [path]


def relabel(world: World, folder: Path) -> list[Path]:
    """Edit what a shard says and its own seal with it."""
    path = world.some(folder, "shard-*")[0]
    with safe_open(path, "pt") as file:
        z = file.get_tensor("z")
    notes = SealedRows(path).notes
    notes["labels"][0] += 1
    save_rows(path, z, notes)
    return [path]


def replace_all(world: World, folder: Path, name: str) -> list[Path]:
    """Put a whole cache of something else there, with as many images."""
    shutil.copytree(world.folders[name], folder, dirs_exist_ok=True)
    return [folder / MANIFEST]


def stale_manifest(world: World, folder: Path) -> list[Path]:
    """Put the manifest of another cache there; files that do not belong to it may be blamed as well."""
    shutil.copy(world.other("model", "block", "preprocessing", "images", "dtype") / MANIFEST, folder / MANIFEST)
    return list(folder.iterdir())


#: Fault -> what does it to a copy of the cache; returns the files that may be blamed.
FAULTS: dict[str, Callable[[World, Path], list[Path]]] = {
    "byte of a shard": lambda w, f: flip(w, w.some(f, "shard-*")[0]),
    "byte of what a shard says": lambda w, f: flip(w, w.some(f, "shard-*")[0], 1000),
    "byte of the manifest": lambda w, f: flip(w, f / MANIFEST),
    "shortened shard": lambda w, f: cut(w, w.some(f, "shard-*")[0]),
    "shortened manifest": lambda w, f: cut(w, f / MANIFEST),
    "longer shard": lambda w, f: lengthen(w, w.some(f, "shard-*")[0]),
    "longer manifest": lambda w, f: lengthen(w, f / MANIFEST),
    "lost block of a shard": lambda w, f: overwrite(w, w.some(f, "shard-*")[0]),
    "lost block of the manifest": lambda w, f: overwrite(w, f / MANIFEST),
    "missing file": lambda w, f: remove(w, w.some(f, "*")[0]),
    "swapped shards": lambda w, f: exchange(*w.some(f, "*0[0-2].safetensors", 2)),
    "swapped images": exchange_images,
    "shard of another cache": borrow,
    "edited label, seal and all": relabel,
    "stale manifest": stale_manifest,
    "other model": lambda w, f: replace_all(w, f, "model"),
    "other block": lambda w, f: replace_all(w, f, "block"),
    "other preprocessing": lambda w, f: replace_all(w, f, "preprocessing"),
    "other images, as many": lambda w, f: replace_all(w, f, "images"),
}


def refusal(source: Source, folder: Path) -> str | None:
    """What opening or reading the whole cache says against it, or None."""
    try:
        for _ in source.open(folder).batches(np.random.default_rng(0).permutation(len(source.ds)).reshape(-1, 3)):
            pass
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    return None


def is_detected(world: World, fault: str, folder: Path) -> bool:
    """Do one thing to a copy of the cache and see whether it is refused as it should be."""
    shutil.copytree(world.folders["own"], folder)
    touched = FAULTS[fault](world, folder)
    said = refusal(world.sources["own"], folder)
    shutil.rmtree(folder)
    return said is not None and "\n" not in said and said.endswith(".") and any(str(path) in said for path in touched)


def contents(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, hidden files included."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_on_one_thread(source: Source, folder: Path) -> None:
    """Write a cache in a forked process, which must neither wait for threads that it does not have nor take a lock with
    it that others wait for, when it is killed."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    source.write(folder)


def kill(source: Source, folder: Path, seconds: float) -> bool:
    """Kill a process that writes the cache after so long; whether it was still at it."""
    child = multiprocessing.get_context("fork").Process(target=write_on_one_thread, args=(source, folder))
    child.start()
    time.sleep(seconds)
    running = child.is_alive()
    child.kill()
    child.join()
    return running


def is_continued(source: Source, folder: Path, seconds: float, whole: dict[str, bytes]) -> bool:
    """Kill the writing of a cache, continue it, and compare it with one that was not interrupted."""
    while not kill(source, folder, seconds):
        shutil.rmtree(folder)
        seconds *= 0.9
    source.write(folder)
    same = contents(folder) == whole
    shutil.rmtree(folder)
    return same


def stress_faults(folder: Path, n: int, seed: int) -> int:
    """How many of n faults were detected; those that were not are listed."""
    world = World(folder, 24, seed)
    assert refusal(world.sources["own"], world.folders["own"]) is None
    names = [list(FAULTS)[i % len(FAULTS)] for i in range(n)]
    missed = Counter(name for name in names if not is_detected(world, name, folder / "copy"))
    for name, times in missed.items():
        print(f"missed: {name}, {times} of {names.count(name)} times")
    return n - missed.total()


def stress_kills(folder: Path, n: int, seed: int) -> int:
    """How many of n interrupted writings were continued to the same bytes."""
    source, rng = sources(40 * SHARD_IMAGES)["own"], np.random.default_rng(seed)
    begin = time.perf_counter()
    whole = contents(source.write(folder / "whole"))
    moments = rng.uniform(0, time.perf_counter() - begin, n)
    return sum(is_continued(source, folder / "killed", seconds, whole) for seconds in moments)


def main() -> None:
    """Both, with a line each that a script can read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        detected = stress_faults(Path(folder), arguments.faults, arguments.seed)
        print(f"BENCH cache-faults {detected} of {arguments.faults} detected", flush=True)
        same = stress_kills(Path(folder), arguments.kills, arguments.seed)
        print(f"BENCH cache-kills {same} of {arguments.kills} identical")
    if (detected, same) != (arguments.faults, arguments.kills):
        sys.exit("The cache cannot be trusted; mend src/patchsae/cache.py or src/patchsae/weights/sealed.py.")


if __name__ == "__main__":
    main()
