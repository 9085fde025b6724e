"""Reading the disk cache of activations that ``cache`` writes; nothing is served unchecked.

A cache is a folder, made once of one model, cut and data set::

    shard-00000.bin    image tokens of whole images, [rows, T, D] of float16 or bfloat16, little-endian
    shard-00000.json   its sidecar, written after it: sha256 of the shard; content id, label and crc32 of every image;
                       what could not be read and why; what half precision cost
    manifest.json      written last, and publishes: what the cache was made of, sha256 of every sidecar

Opening checks everything but the shards' bytes. These are checked image by image when a process first reads them, and
all at once by ``Cache.verify``.
"""

import functools
import hashlib
import itertools
import json
import math
import mmap
import os
import weakref
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from patchsae.activations import read_pixels
from patchsae.clip import Clip
from patchsae.data.images import hash_of
from patchsae.weights.files import write_atomically
from patchsae.weights.formats import file_sha256

FORMAT, MANIFEST = 1, "manifest.json"
#: Part of the key -> what is said of a cache where it differs.
DIFFERENT = {"model": "with another model", "block": "at another block", "preprocessing": "with other preprocessing",
             "images": "of other images"}
#: What to do about a file that is missing or damaged.
MISSING, MEND = "run `make cache`, which writes it", "remove it and run `make cache`, which writes it anew"
#: When a cache is verified, the tokens of the first of so many images are computed again, and may differ by this share
#: of their norm: half precision, and sums in another order.
EVERY, TOLERANCE = 64, 1e-2
#: Batches whose memory is kept for others.
SPARE = 8


def cache_parts(clip: Clip, ds, layer: int) -> dict:
    """What a cache is made of: weights, block, what happens to pixels, images."""
    levels = None
    if clip.processor is not None:  # what normalising makes of every grey level
        grey = torch.arange(256, dtype=torch.uint8)[None, None, :, None].expand(-1, -1, -1, 3)
        levels = hash_of(clip.normalise(grey).flatten().tolist())
    preprocessing = {"size": clip.crop.size, "resample": int(clip.crop.resample), "levels": levels}
    return {"model": clip.fingerprint(), "block": clip.block(layer), "preprocessing": preprocessing,
            "images": ds.fingerprint()}


def cache_key(parts: dict) -> str:
    """Hash of what a cache is made of: 16 hexadecimal digits."""
    return hash_of([FORMAT, json.dumps(parts, sort_keys=True)])


# Files that carry a hash of themselves

def sealed(content: dict) -> bytes:
    """The one way in which a JSON file of a cache is written: with the sha256 of everything else in it."""
    rest = {key: value for key, value in content.items() if key != "hash"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return (json.dumps(rest | {"hash": digest}, sort_keys=True) + "\n").encode()


def save_sealed(path: Path, content: dict) -> None:
    """Write a file for ``load_sealed``."""
    write_atomically(path, lambda temporary: temporary.write_bytes(sealed(content)))


def load_sealed(path: Path) -> dict:
    """Read a file that ``save_sealed`` wrote, if every byte of it is still the same."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {MISSING}.")
    try:
        content = json.loads(data := path.read_bytes())
        if isinstance(content, dict) and sealed(content) == data:
            return content
    except (ValueError, RecursionError):
        pass
    raise ValueError(f"{path} is damaged, it is not what was written; {MEND}.")


def check_hash(path: Path, sha256: str) -> None:
    """Refuse a file that is missing, or whose bytes are not those that were written."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {MISSING}.")
    if file_sha256(path) != sha256:
        raise ValueError(f"{path} is damaged or belongs to another {MANIFEST}, its sha256 is not the one that was "
                         f"noted; {MEND}.")


def check_size(path: Path, size: int) -> None:
    """Refuse a file that is missing, or shorter or longer than it was."""
    try:
        found = os.stat(path).st_size
    except OSError:
        raise FileNotFoundError(f"{path} is missing; {MISSING}.") from None
    if found != size:
        raise ValueError(f"{path} is damaged, it has {found} bytes and not {size}; {MEND}.")


# The cache

def open_cache(clip: Clip, ds, layer: int, folder: Path) -> "Cache":
    """Open a finished cache, if it is one of this model, cut and data set and all its files are there."""
    return Cache(Path(folder), read_manifest(Path(folder), cache_parts(clip, ds, layer)))


def read_manifest(folder: Path, parts: dict) -> dict:
    """What the manifest says, if it is of a cache that was made of these parts."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, so there is no finished cache; {MISSING}.")
    manifest = load_sealed(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has the format {manifest.get('format')}, not {FORMAT}; remove {folder} and run "
                         "`make cache` again.")
    if differs := [how for part, how in DIFFERENT.items() if manifest["parts"][part] != parts[part]]:
        raise ValueError(f"{path} is of a cache that was made {' and '.join(differs)}; choose another folder, or "
                         "remove this one and run `make cache` again.")
    return manifest


class _Shard:
    """One shard, mapped into memory, and what its images have to be: ``crc32``, one for each."""

    def __init__(self, path: Path, crc32: list[int], image_bytes: int):
        self.path, self.crc32, self.size = path, np.array(crc32, dtype=np.uint32), len(crc32) * image_bytes
        check_size(path, self.size)
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.images = np.frombuffer(self.map, np.uint8).reshape(-1, image_bytes)
        self.checked = np.zeros(len(self.images), dtype=bool)

    def copy(self, i: int, out: np.ndarray) -> None:
        """Copy the bytes of an image; the first copy of each is checked."""
        check_size(self.path, self.size)  # touching what is no longer there would end the process
        out[:] = self.images[i]
        if not self.checked[i] and zlib.crc32(out) != self.crc32[i]:
            raise ValueError(f"{self.path} is damaged, the tokens of its image {i} are not those that were written; "
                             f"{MEND}.")
        self.checked[i] = True


class Cache:
    """A finished cache: ``cache[rows] -> [B,T,D]`` in its own dtype and in the order of ``rows``, which are positions
    in the data set. Images that could not be read when it was written are left out.

    ``rows``: the positions that it holds, ``len(cache)`` of them; ``labels`` and ``ids`` belong to these.
    """

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.manifest, self.shards = folder, manifest, manifest["shards"]
        self.dtype, self.shape = getattr(torch, manifest["dtype"]), tuple(manifest["shape"])
        self.image_bytes = math.prod(self.shape) * self.dtype.itemsize
        readable = np.ones(manifest["n_images"], dtype=bool)
        readable[np.array(manifest["unreadable"], dtype=np.int64)] = False
        self.rows, self._place = np.flatnonzero(readable), np.where(readable, np.cumsum(readable) - 1, -1)
        self._starts = np.cumsum([0] + [shard["rows"] for shard in self.shards])
        self._memory = _Memory()
        self._shard = functools.cache(lambda s: _Shard(self._path(s), self._sidecar(s)["crc32"], self.image_bytes))
        self._check_files()

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int64, one for each of ``rows``."""
        return np.array([label for s in range(len(self.shards)) for label in self._sidecar(s)["labels"]], np.int64)

    @functools.cached_property
    def ids(self) -> list[str]:
        """Content ids, one for each of ``rows``."""
        return [name for s in range(len(self.shards)) for name in self._sidecar(s)["ids"]]

    def __getitem__(self, rows) -> torch.Tensor:
        return self._read(rows)

    def batches(self, rows: Iterable, device: str | torch.device = "cpu", threads: int = 2) -> Iterator[torch.Tensor]:
        """The tokens of each batch of positions, in order, on a device; threads read ahead."""
        device, rows = torch.device(device), iter(rows)
        with ThreadPoolExecutor(threads) as pool:
            submit = functools.partial(pool.submit, self._read, pin=device.type == "cuda")
            ahead = deque(submit(part) for part in itertools.islice(rows, threads + 1))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(submit(part) for part in itertools.islice(rows, 1))
                yield batch.to(device, non_blocking=True)

    def _read(self, rows, pin: bool = False) -> torch.Tensor:
        """Copies of the images at these positions; ``pin``: in memory from which a GPU fetches while it works."""
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self._place):
            raise IndexError(f"Positions {rows.min()} to {rows.max()} are not all in this data set of "
                             f"{len(self._place)} images; choose others.")
        places = self._place[rows][self._place[rows] >= 0]
        shape = len(places), self.image_bytes
        memory = torch.empty(shape, dtype=torch.uint8, pin_memory=True) if pin else self._memory(*shape)
        shards = np.searchsorted(self._starts, places, "right") - 1
        for out, s, i in zip(memory.numpy(), shards.tolist(), (places - self._starts[shards]).tolist()):
            self._shard(s).copy(i, out)
        return memory.view(self.dtype).view(-1, *self.shape)

    def _path(self, s: int) -> Path:
        return self.folder / f"{self.shards[s]['name']}.bin"

    def _sidecar(self, s: int) -> dict:
        path = self._path(s).with_suffix(".json")
        check_hash(path, self.shards[s]["sha256"])
        return json.loads(path.read_bytes())

    def _check_files(self) -> None:
        """Check that every file is there and has its size, and every sidecar its bytes."""
        for s, shard in enumerate(self.shards):
            check_hash(self._path(s).with_suffix(".json"), shard["sha256"])
            check_size(self._path(s), shard["rows"] * self.image_bytes)

    def verify(self, clip: Clip | None = None, ds=None, title: str = "") -> None:
        """Check every byte; with the model and the data set also every content id, and some tokens computed again."""
        for s in tqdm(range(len(self.shards)), desc=title, disable=not title, mininterval=1):
            check_hash(self._path(s), self._sidecar(s)["sha256"])
        if ds is not None:
            self._verify_images(clip, ds, title)

    def _verify_images(self, clip: Clip, ds, title: str) -> None:
        parts, found = np.split(self.rows, range(EVERY, len(self), EVERY)), 0
        bar = tqdm(read_pixels(clip, ds, parts), total=len(parts), desc=title, disable=not title, mininterval=1)
        for batch in bar:
            places = self._place[batch.rows]
            for row, name, label, place in zip(batch.rows, batch.ids, batch.labels.tolist(), places):
                if (str(name), label) != (self.ids[place], self.labels[place]):
                    raise ValueError(f"{self._sidecar_of(place)} has image {self.ids[place]} of class "
                                     f"{self.labels[place]} at position {row}, but the data set has {name} of class "
                                     f"{label} there; remove {self.folder} and run `make cache` again.")
            self._verify_tokens(clip, batch)
            found += len(places)
        if found < len(self):
            raise ValueError(f"{len(self) - found} images of {self.folder} cannot be read any more, the first is: "
                             f"{next(iter(ds.unreadable.values()))}")

    @torch.no_grad()
    def _verify_tokens(self, clip: Clip, batch) -> None:
        """Compute the tokens of the first image of a batch again."""
        z = clip.below(batch.pixels[:1], self.manifest["parts"]["block"])[:, :clip.n_tokens]
        kept = self[batch.rows[:1]].to(z)
        if (z - kept).norm() > TOLERANCE * z.norm():
            path = self._sidecar_of(self._place[batch.rows[0]]).with_suffix(".bin")
            raise ValueError(f"{path} holds other tokens of image {batch.ids[0]} than the model gives now; remove "
                             f"{self.folder} and run `make cache` again.")

    def _sidecar_of(self, place: int) -> Path:
        """The file that notes the image at this place."""
        return self._path(int(np.searchsorted(self._starts, place, "right")) - 1).with_suffix(".json")


class _Memory:
    """Memory for batches, used again when nothing refers to a batch any more: getting fresh pages from the operating
    system takes longer than filling them."""

    def __init__(self):
        self.spare = deque(maxlen=SPARE)

    def __call__(self, n: int, image_bytes: int) -> torch.Tensor:
        """uint8 ``[n, image_bytes]``."""
        try:
            whole = self.spare.pop()
        except IndexError:
            whole = np.empty(0, np.uint8)
        if len(whole) < n * image_bytes:
            whole = np.empty(n * image_bytes, np.uint8)
        part = whole[:n * image_bytes].reshape(n, image_bytes)
        weakref.finalize(part, self.spare.append, whole).atexit = False  # the tensor holds ``part`` while it lives
        return torch.from_numpy(part)


def as_bytes(images: torch.Tensor) -> np.ndarray:
    """The memory of ``[B,T,D]`` as bytes ``[B, bytes of an image]``; numpy has no bfloat16."""
    return images.view(torch.uint8).flatten(1).numpy()
