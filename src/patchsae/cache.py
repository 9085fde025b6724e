"""The disk cache of activations: computed once, in half precision, by as many processes as there are; ``make cache``.

What a cache looks like on the disk, and how it is read, is in ``shards``.
"""

import functools
import hashlib
import itertools
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from patchsae.activations import MOST_UNREADABLE, LostWorker, read_pixels
from patchsae.clip import Clip
from patchsae.config import Profile
from patchsae.fast import processes
from patchsae.shards import (
    FORMAT,
    MANIFEST,
    Cache,
    as_bytes,
    cache_key,
    cache_parts,
    load_sealed,
    open_cache,
    read_manifest,
    save_sealed,
)
from patchsae.weights.files import write_atomically
from patchsae.weights.formats import file_sha256

#: What a cache may take on the disk where nobody says otherwise, and about how large a shard is: 10 GiB and 1 GiB.
MOST_BYTES, SHARD_BYTES = 10 * 2**30, 2**30


def cache_folder(profile: Profile, clip: Clip, ds) -> Path:
    """Where the cache of a data set at the profile's cut goes."""
    return profile.run_dir / "activations" / cache_key(cache_parts(clip, ds, profile.model.layer))


@functools.lru_cache(maxsize=1)
def profile_cache(profile: Profile, clip: Clip, ds) -> Cache | None:
    """The disk cache that the profile trains on, if it does."""
    if not profile.data.cache:
        return None
    found = open_cache(clip, ds, profile.model.layer, cache_folder(profile, clip, ds))
    if found.manifest["dtype"] != profile.data.cache:
        raise ValueError(f"{found.folder} is in {found.manifest['dtype']}, but the profile asks for "
                         f"{profile.data.cache}; change data.cache, or remove the folder and run `make cache`.")
    return found


def cache_bytes(clip: Clip, n_images: int, dtype: torch.dtype = torch.float16) -> int:
    """Size of all shards: N T D times the bytes of a number."""
    return n_images * clip.n_tokens * clip.width * dtype.itemsize


def write_cache(clip: Clip, ds, layer: int, folder: Path, dtype: torch.dtype = torch.float16,
                shard_images: int | None = None, most_bytes: float = MOST_BYTES, batch_images: int = 64,
                title: str = "") -> Cache:
    """Write the image tokens of a data set to ``folder``, or go on at the first shard that is not complete.

    ``shard_images``: images of a shard, by default as many as 1 GiB holds; ``most_bytes``: what the cache may take.
    Processes of one launch share the shards. The bytes depend neither on how many they are nor on interruptions.
    """
    if not len(ds):
        raise ValueError("The data set is empty; give one with at least one image.")
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"A cache is in float16 or bfloat16, not in {dtype}; choose one of these.")
    shard_images = shard_images or max(1, SHARD_BYTES // cache_bytes(clip, 1, dtype))
    writer = _Writer(clip, ds, layer, Path(folder), dtype, shard_images, batch_images)
    if not all(processes.gathered(writer.is_published())):
        _refuse_size(writer.folder, cache_bytes(clip, len(ds), dtype), most_bytes)
        writer.write(title)
    return Cache(writer.folder, read_manifest(writer.folder, writer.parts))


def _refuse_size(folder: Path, size: int, most_bytes: float) -> None:
    """Stop before anything is written where the cache is larger than allowed, or than the disk has room for."""
    if size > most_bytes:
        raise ValueError(f"The cache would take {gigabytes(size)} in {folder}, more than {gigabytes(most_bytes)}; pass "
                         f"most_bytes={size} or answer yes to the question of `make cache`.")
    missing = size - sum(path.stat().st_size for path in folder.glob("shard-*.bin"))
    if missing > (free := free_bytes(folder)):
        raise OSError(f"The cache takes {gigabytes(missing)} more in {folder}, but {gigabytes(free)} are free; free "
                      "space there or choose another folder.")


def free_bytes(folder: Path) -> int:
    """Room on the disk that a folder is on or will be on."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free


def gigabytes(n: float) -> str:
    """A number of bytes as people read it."""
    return f"{n / 1e9:.3g} GB"


class _Writer:
    """One writing of a cache. ``head``: what every sidecar and the manifest say alike; ``n``: how many shards."""

    def __init__(self, clip: Clip, ds, layer: int, folder: Path, dtype: torch.dtype, shard_images: int, batch: int):
        self.clip, self.ds, self.layer, self.folder, self.dtype, self.batch = clip, ds, layer, folder, dtype, batch
        self.parts, self.n = cache_parts(clip, ds, layer), -(-len(ds) // shard_images)
        self.head = {"key": cache_key(self.parts), "dtype": str(dtype).removeprefix("torch."),
                     "shape": [clip.n_tokens, clip.width], "n_images": len(ds), "shard_images": shard_images}

    def is_published(self) -> bool:
        """Whether the cache is there, as far as opening it tells; a folder with another one is an error."""
        if not (self.folder / MANIFEST).is_file():
            return False
        manifest = read_manifest(self.folder, self.parts)
        self._refuse_other(self.folder / MANIFEST, manifest, "dtype")
        try:
            Cache(self.folder, manifest)
        except (FileNotFoundError, ValueError):
            return False  # a file was removed or damaged, and is made anew
        return True

    def _refuse_other(self, path: Path, content: dict, *names: str) -> None:
        """Refuse a file of another cache, which would be overwritten; ``names``: what has to be the same."""
        for name in names:
            if content.get(name) != self.head[name]:
                raise ValueError(f"{path} is of a cache with the {name} {content.get(name)}, not {self.head[name]}; "
                                 f"use that, choose another folder or remove {self.folder}.")

    def write(self, title: str) -> None:
        """Write the shards that are not complete, each process its share of them, and publish the cache."""
        incomplete = [k for k in processes.share(self.n) if not self._is_complete(k)]
        todo = [k for part in self._met(incomplete) for k in part]
        if processes.rank() == 0:
            _clear(self.folder)
        self._met()
        if not self._written([todo[i] for i in processes.share(len(todo))], title):
            raise ChildProcessError("A process that reads images was lost, perhaps for want of memory; run again, the "
                                    f"finished shards in {self.folder} are kept.")
        self._met()
        if processes.rank() == 0:
            self._publish()
        self._met()

    def _written(self, todo: list[int], title: str) -> bool:
        """Write these shards; False where a process that reads images was lost. Raising that here would keep its
        loader alive, which fails again whenever another of its processes ends."""
        try:
            for k, batches in self._by_shard(todo, title):
                self._write_shard(k, batches)
        except LostWorker:
            return False
        return True

    def _met(self, value=None) -> list:
        """What every process gives; where one was lost, an error."""
        try:
            return processes.gathered(value)
        except RuntimeError as error:
            raise ChildProcessError("Another process of this launch was lost; run again, the finished shards in "
                                    f"{self.folder} are kept.") from error

    def _path(self, k: int) -> Path:
        return self.folder / f"shard-{k:05}.bin"

    def _rows(self, k: int) -> range:
        """Positions in the data set that belong to a shard."""
        size = self.head["shard_images"]
        return range(k * size, min((k + 1) * size, len(self.ds)))

    def _is_complete(self, k: int) -> bool:
        """Whether a shard is there and whole; what could not be read of it is noted again."""
        path = self._path(k)
        try:
            sidecar = load_sealed(path.with_suffix(".json"))
        except (FileNotFoundError, ValueError):
            return False
        self._refuse_other(path.with_suffix(".json"), sidecar, *self.head)
        if not path.is_file() or file_sha256(path) != sidecar["sha256"]:
            return False
        self.ds.unreadable.update(_unreadable(sidecar))
        return True

    def _by_shard(self, todo: list[int], title: str) -> Iterator[tuple[int, Iterator]]:
        """Shards and their batches of pixels. Batches begin anew with each shard, so that its bytes are its own."""
        parts = [np.array(self._rows(k)[i:i + self.batch]) for k in todo
                 for i in range(0, len(self._rows(k)), self.batch)]
        bar = tqdm(read_pixels(self.clip, self.ds, parts), total=len(parts), desc=title, mininterval=1,
                   disable=not title or processes.rank() > 0)
        stream = itertools.chain(bar, [None])
        held = next(stream)

        def batches(k: int) -> Iterator:
            nonlocal held
            while held is not None and held.rows[0] in self._rows(k):
                yield held
                held = next(stream)

        for k in todo:
            yield k, batches(k)

    @torch.no_grad()
    def _write_shard(self, k: int, batches) -> None:
        record = _Record()

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                for batch in batches:
                    z = self.clip.below(batch.pixels, self.layer)[:, :self.clip.n_tokens]
                    file.write(record.add(batch, z, _half(batch, z, self.dtype)))
                file.flush()
                os.fsync(file.fileno())

        write_atomically(self._path(k), write)
        noted = self.ds.unreadable
        unreadable = {str(row): noted[row] for row in self._rows(k) if row in noted}
        save_sealed(self._path(k).with_suffix(".json"), self.head | record.content() | {"unreadable": unreadable})

    def _publish(self) -> None:
        """Write the manifest from the sidecars."""
        files = [self._path(k).with_suffix(".json") for k in range(self.n)]
        sidecars = [load_sealed(path) for path in files]
        unreadable = {row: reason for sidecar in sidecars for row, reason in _unreadable(sidecar).items()}
        if len(unreadable) > MOST_UNREADABLE * len(self.ds):  # processes counted each for itself
            raise ValueError(f"{len(unreadable)} of {len(self.ds)} images cannot be read, more than "
                             f"{MOST_UNREADABLE:.1%}; the first is: {next(iter(unreadable.values()))}")
        shards = [{"name": path.stem, "rows": len(sidecar["ids"]), "sha256": file_sha256(path)}
                  for path, sidecar in zip(files, sidecars)]
        save_sealed(self.folder / MANIFEST, self.head | {
            "format": FORMAT, "parts": self.parts, "rows": sum(shard["rows"] for shard in shards), "shards": shards,
            "n_unreadable": len(unreadable), "unreadable": sorted(unreadable),
            "explained_variance_cost": explained_variance_cost([sidecar["moments"] for sidecar in sidecars])})


class _Record:
    """What is noted of a shard while it is written."""

    def __init__(self):
        self.digest, self.ids, self.labels, self.crc32 = hashlib.sha256(), [], [], []
        self.tokens, self.sum, self.squares, self.error = 0, torch.zeros(0), 0.0, 0.0

    def add(self, batch, z: torch.Tensor, half: torch.Tensor) -> np.ndarray:
        """Note a batch of tokens ``[B,T,D]`` and what is kept of them; returns its bytes ``[B, bytes of an image]``."""
        images = as_bytes(half.cpu().contiguous())
        self.digest.update(images)
        self.crc32 += map(zlib.crc32, images)
        self.ids += map(str, batch.ids)
        self.labels += batch.labels.tolist()
        exact = z.double().flatten(0, 1)
        self.sum = exact.sum(0) + (self.sum if self.tokens else 0)
        self.squares += exact.square().sum().item()
        self.error += (exact - half.flatten(0, 1)).square().sum().item()
        self.tokens += len(exact)
        return images

    def content(self) -> dict:
        """What the sidecar says of the shard."""
        moments = {"tokens": self.tokens, "sum": self.sum.tolist(), "squares": self.squares, "error": self.error}
        return {"sha256": self.digest.hexdigest(), "crc32": self.crc32, "ids": self.ids, "labels": self.labels,
                "moments": moments, "explained_variance_cost": explained_variance_cost([moments])}


def explained_variance_cost(moments: list[dict]) -> float:
    """What rounding takes from the explained variance: sum ||z - half(z)||^2 / sum ||z - mean z||^2 over all tokens.

    ``moments``: of each shard the number of tokens, their sum ``[D]``, sum of squares and squared rounding error.
    """
    moments = [part for part in moments if part["tokens"]]
    total, n = np.sum([part["sum"] for part in moments], axis=0), sum(part["tokens"] for part in moments)
    variance = sum(part["squares"] for part in moments) - np.square(total).sum() / max(1, n)
    return float(sum(part["error"] for part in moments) / variance) if variance > 0 else 0.0


def _half(batch, z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Tokens in half precision; values that it cannot hold are an error."""
    half = z.to(dtype)
    if half.isfinite().all():
        return half
    bad = int((~half.isfinite()).flatten(1).any(1).nonzero()[0])
    image = f"Image {batch.ids[bad]} (position {batch.rows[bad]})"
    if not z[bad].isfinite().all():
        raise ValueError(f"{image} gives tokens that are not finite; check its pixels and the model's weights.")
    raise ValueError(f"{image} has activations of up to {z[bad].abs().max():.3g}, which is too large for float16; "
                     "choose bfloat16, as `patchsae cache --dtype bfloat16` does.")


def _unreadable(sidecar: dict) -> dict[int, str]:
    """Position -> reason."""
    return {int(row): reason for row, reason in sidecar["unreadable"].items()}


def _clear(folder: Path) -> None:
    """Remove the manifest, so that until it is written anew there is no cache, and what lost processes left behind."""
    files = [path for path in folder.glob(".*.*.*.*") if path.suffixes[-2][1:].isdigit()]
    left = [path for path in files if not _is_alive(int(path.suffixes[-2][1:]))]
    try:
        for path in (*folder.glob(MANIFEST), *left):
            path.unlink()
    except OSError as error:
        raise OSError(f"Cannot remove {path}: {error.strerror}; choose another folder.") from error


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True
