"""Times the disk cache at ViT-B/16's size, 197 tokens of width 768, against an Arrow cache: ``make bench-cache``.

Both sides read the same made-up rows in float16, in the same shuffled batches of whole images, with as many workers:
threads on our side, processes of a DataLoader on that of ``datasets``, which has them read one batch each ahead. Both
hand over float16 tensors in memory. Ours checks every image in the first epoch, Arrow nothing. Files are in the memory
of the operating system when they are read, unless ``--cold`` has it forget ours, once.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.data import DataLoader

from patchsae.cache import Cache, open_cache, write_cache
from patchsae.data.datasets import ArrayDataset

T, D = 197, 768


def made_up(row: int) -> torch.Tensor:
    """Tokens of an image, ``[T,D]`` float16."""
    return torch.randn(T, D, generator=torch.Generator().manual_seed(row)).half()


def stand_in() -> SimpleNamespace:
    """What writing a cache asks of a CLIP; its pixels are the number of an image, its tokens made up."""
    return SimpleNamespace(
        n_tokens=T, width=D, device=torch.device("cpu"), processor=None, fingerprint=lambda: "made up",
        preprocessing=lambda: "none", crop=None, block=lambda layer: layer,
        below=lambda pixels, layer: torch.stack([made_up(int(row)) for row in pixels[:, 0, 0, 0]]).float())


def write_ours(folder: Path, n: int) -> Cache:
    """Our cache."""
    pixels = torch.arange(n, dtype=torch.float32)[:, None, None, None].expand(n, 3, 1, 1)
    return write_cache(stand_in(), ArrayDataset(pixels, np.zeros(n, int)), 0, folder)


def write_arrow(folder: Path, n: int):
    """The same rows as a table of ``datasets``, opened from its file."""
    from datasets import Array2D, Dataset, Features, disable_progress_bars

    disable_progress_bars()
    features = Features({"z": Array2D((T, D), "float16")})
    table = Dataset.from_generator(lambda: ({"z": made_up(row).numpy()} for row in range(n)), features=features,
                                   cache_dir=str(folder), writer_batch_size=64)
    return table.with_format("torch", dtype=torch.float16)  # which would make float32 of them otherwise, and be slower


def orders(n: int, batch: int, seed: int) -> list[list[int]]:
    """Shuffled batches of whole images."""
    rows = np.random.default_rng(seed).permutation(n)
    return [rows[i:i + batch].tolist() for i in range(0, n - batch + 1, batch)]


def rate(batches: Iterable[torch.Tensor]) -> float:
    """Tokens a second from the first request on; every batch is touched."""
    start, tokens = time.perf_counter(), 0
    for z in batches:
        assert z.dtype == torch.float16 and z.shape[1:] == (T, D) and z[-1, -1, -1] == z[-1, -1, -1]
        tokens += z.shape[0] * T
    return tokens / (time.perf_counter() - start)


def arrow_batches(table, order: list[list[int]], workers: int) -> Iterable[torch.Tensor]:
    """Batches of a table, each looked up as a whole by a worker process."""
    return (batch["z"] for batch in DataLoader(table, sampler=order, batch_size=None, num_workers=workers))


def forget(folder: Path) -> None:
    """Have the operating system drop the files of a folder from memory."""
    os.sync()
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Write both, read both, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=3072)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cold", action="store_true", help="read our cache from the disk first")
    arguments = parser.parse_args()
    n, batch, workers = arguments.images, arguments.batch, arguments.workers
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        cache = write_ours(Path(folder) / "ours", n)
        print(f"BENCH cache-write-ours {n * T / (time.perf_counter() - start):.0f} tokens/s")
        if arguments.cold:
            forget(cache.folder)
            cold = rate(cache.batches(orders(n, batch, 9), threads=workers))
            print(f"BENCH cache-read-ours-cold {cold:.0f} tokens/s")
            cache = open_cache(cache.folder)
        ours = [rate(cache.batches(orders(n, batch, epoch), threads=workers)) for epoch in range(4)]
        table = write_arrow(Path(folder) / "arrow", n)
        assert torch.equal(table[5]["z"], cache[[5]][0]), "the two sides hold different rows"
        alone = rate(arrow_batches(table, orders(n, batch, 0), 0))
        arrow = [rate(arrow_batches(table, orders(n, batch, epoch), workers)) for epoch in range(2)]
    print(f"BENCH cache-read-ours-first {ours[0]:.0f} tokens/s")
    print(f"BENCH cache-read-ours {np.median(ours[1:]):.0f} tokens/s")
    print(f"BENCH cache-read-arrow {max(arrow):.0f} tokens/s")
    print(f"BENCH cache-read-arrow-no-workers {alone:.0f} tokens/s")
    print(f"RATIO cache-read {np.median(ours[1:]) / max(arrow):.1f} arrow")


if __name__ == "__main__":
    main()
