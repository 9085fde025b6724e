"""The disk cache of activations: the tokens at the cut, computed once, kept in half precision, never served unchecked.

A cache is a folder, of one model, block, preprocessing and set of images::

    shard-00000.safetensors   "z" [n,T,D], float16 or bfloat16: the image tokens of n whole images; and notes as JSON:
                              what the cache was made of; content id, label and crc32 of each image; what could not be
                              read and why; sums that tell the cost of half precision
    manifest.json             written last, and publishes: what the cache was made of, and the seal of every shard

Opening checks everything but the tokens (see ``weights.sealed``). These are checked image by image when a process first
reads them, and all at once by ``Cache.verify``. A shard has its name only when all of it is written, so that writing
goes on after an interruption, to the same bytes.
"""

import functools
import itertools
import json
import math
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from patchsae.clip import Clip
from patchsae.config import Profile
from patchsae.data.adapters import as_images
from patchsae.data.checks import Device, Layer, Natural, NotNegative, Whole, guard, indices
from patchsae.data.images import Images, hash_of
from patchsae.fast import processes
from patchsae.fast.memory import BatchMemory
from patchsae.fast.shards import FORMAT, MANIFEST, Writer, refuse_other
from patchsae.weights.sealed import MEND, MISSING, SealedRows, load_sealed

#: What a cache may take on the disk where nobody says otherwise, and about how large a shard is: 10 GiB and 256 MiB.
MOST_BYTES, SHARD_BYTES = 10 * 2**30, 2**28


# What it is made of -------------------------------------------------------------------------------------

def made_of(clip: Clip | None, ds: Images | None, layer: Layer | None) -> dict:
    """What decides the tokens, as far as it is given: weights, what happens to pixels, block, images."""
    if clip is None and layer is not None:
        raise ValueError("Blocks are counted in a model; give the model together with the layer.")
    made = {} if clip is None else {"model": clip.fingerprint(), "preprocessing": clip.preprocessing()}
    made |= {} if layer is None else {"block": clip.block(layer)}
    return made | ({} if ds is None else {"images": as_images(ds).fingerprint()})


def cache_folder(profile: Profile, clip: Clip, ds: Images) -> Path:
    """Where the cache of a data set at the profile's cut goes."""
    decided_by = json.dumps(made_of(clip, ds, profile.model.layer), sort_keys=True)
    return profile.run_dir / "activations" / hash_of([FORMAT, decided_by])


def cache_bytes(clip: Clip, n_images: Whole) -> int:
    """Size of the tokens ``[N,T,D]`` in half precision."""
    return 2 * n_images * clip.n_tokens * clip.width


# Reading ------------------------------------------------------------------------------------------------

def open_cache(folder: Path, clip: Clip | None = None, ds: Images | None = None, layer: Layer | None = None) -> "Cache":
    """Open a finished cache all of whose files are there, whole and of one writing.

    ``clip``, ``ds`` and ``layer``: where given, a cache that was made of others is refused.
    """
    return Cache(Path(folder), made_of(clip, ds, layer))


@functools.lru_cache(maxsize=8)  # a layer each, of those that train in one pass
def profile_cache(profile: Profile, clip: Clip, ds: Images) -> "Cache | None":
    """The disk cache that the profile trains on, if it does."""
    if not profile.data.cache:
        return None
    expected = made_of(clip, ds, profile.model.layer) | {"dtype": profile.data.cache}
    return Cache(cache_folder(profile, clip, ds), expected)


class Cache:
    """A finished cache: ``cache[rows] -> [B,T,D]`` in its own dtype and in the order of ``rows``, which are positions
    in the data set. Images that could not be read when it was written are left out.

    ``rows``: the positions that it holds, ``len(cache)`` of them; ``labels`` and ``ids`` belong to these.
    """

    def __init__(self, folder: Path, expected: dict):
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, so there is no finished cache; {MISSING}.")
        self.folder, self.manifest = folder, load_sealed(path)
        if (version := self.manifest["format"]) != FORMAT:
            raise ValueError(f"{path} has the format {version}, not {FORMAT}; remove {folder} and run `make cache`.")
        refuse_other(path, self.manifest["made_of"], expected)
        self.shape, self.dtype = tuple(self.manifest["shape"]), getattr(torch, self.manifest["made_of"]["dtype"])
        self.shards = [SealedRows(folder / name) for name in self.manifest["shards"]]
        for shard, seal in zip(self.shards, self.manifest["shards"].values()):
            if shard.notes["seal"] != seal:
                raise ValueError(f"{shard.path} is damaged or belongs to another {MANIFEST}; {MEND}.")
        readable = np.ones(self.manifest["n_images"], dtype=bool)
        readable[np.array(self.manifest["unreadable"], dtype=np.int64)] = False
        self.rows, self.places = np.flatnonzero(readable), np.where(readable, np.cumsum(readable) - 1, -1)
        self._starts = np.cumsum([0] + [len(shard) for shard in self.shards])
        self._memory = BatchMemory()

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int64, one for each of ``rows``."""
        return np.array([label for shard in self.shards for label in shard.notes["labels"]], np.int64)

    @functools.cached_property
    def ids(self) -> list[str]:
        """Content ids, one for each of ``rows``."""
        return [name for shard in self.shards for name in shard.notes["ids"]]

    def __getitem__(self, rows) -> torch.Tensor:
        return self._read(rows)

    def batches(self, rows: Iterable, device: Device = "cpu", threads: Natural = 2) -> Iterator[torch.Tensor]:
        """The tokens of each batch of positions, in order, on a device; threads read ahead."""
        device, rows = torch.device(device), iter(rows)
        with ThreadPoolExecutor(threads) as pool:
            read = functools.partial(pool.submit, self._read, pin=device.type == "cuda")
            ahead = deque(map(read, itertools.islice(rows, threads + 1)))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(map(read, itertools.islice(rows, 1)))
                yield batch.to(device, non_blocking=True)

    def _read(self, rows, pin: bool = False) -> torch.Tensor:
        """Copies of the images at these positions; ``pin``: in memory from which a GPU fetches while it works."""
        try:
            rows = indices(rows, len(self.places), f"positions among {len(self.places)} images").reshape(-1)
        except ValueError as error:
            raise IndexError(str(error)) from None  # at which a loop over a cache ends
        places = self.places[rows][self.places[rows] >= 0]
        size = len(places), math.prod(self.shape) * self.dtype.itemsize
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=True) if pin else self._memory(*size)
        numbers = np.searchsorted(self._starts, places, "right") - 1
        for out, s, i in zip(memory.numpy(), numbers.tolist(), (places - self._starts[numbers]).tolist()):
            self.shards[s].copy(i, out)
        return memory.view(self.dtype).view(-1, *self.shape)

    def verify(self) -> None:
        """Check every byte; ``patchsae cache --verify`` compares them with the images and the model, too."""
        for shard in tqdm(self.shards, desc="bytes of the cache", mininterval=1):
            shard.verify()


# Writing ------------------------------------------------------------------------------------------------

def write_cache(clip: Clip, ds, layer: Layer, folder: Path, dtype: torch.dtype = torch.float16,
                most_bytes: NotNegative = MOST_BYTES, batch_images: Natural = 64) -> Cache:
    """Write the image tokens of a data set to ``folder``, or go on at the first shard that is not complete.

    ``most_bytes``: what the cache may take; a larger one is refused before anything is written. Processes of one launch
    share the shards. The bytes depend neither on how many they are nor on interruptions.
    """
    ds, folder = as_images(ds), Path(folder)
    if not len(ds):
        raise ValueError("The data set is empty; give one with at least one image.")
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"A cache is in float16 or bfloat16, not in {dtype}; choose one of these.")
    made = made_of(clip, ds, layer) | {"dtype": str(dtype).removeprefix("torch."),
                                       "shard_images": max(1, SHARD_BYTES // cache_bytes(clip, 1))}
    if not all(processes.gathered(_is_finished(folder, made))):
        _refuse_size(folder, cache_bytes(clip, len(ds)), most_bytes)
        Writer(clip, ds, folder, made, batch_images).write()
    return open_cache(folder)


def _is_finished(folder: Path, made: dict) -> bool:
    """Whether a cache is there; one that is damaged or of something else is an error."""
    try:
        Cache(folder, made)
    except FileNotFoundError:
        return False
    return True


def _refuse_size(folder: Path, size: int, most_bytes: float) -> None:
    """Stop where the cache is larger than allowed, or than the disk has room for."""
    if size > most_bytes:
        raise ValueError(f"The cache would take {gigabytes(size)} in {folder}, more than {gigabytes(most_bytes)}; pass "
                         f"most_bytes={size} or answer yes to the question of `make cache`.")
    missing = size - sum(path.stat().st_size for path in folder.glob("shard-*"))
    if missing > (free := free_bytes(folder)):
        raise OSError(f"The cache takes {gigabytes(missing)} more in {folder}, but {gigabytes(free)} are free; free "
                      "space there or choose another folder.")


def free_bytes(folder: Path) -> int:
    """Room on the disk that a folder is on or will be on."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free


def gigabytes(n: NotNegative) -> str:
    """A number of bytes as people read it."""
    return f"{n / 1e9:.3g} GB"


guard(globals())
