"""Writing the disk cache of activations: in shards of whole images, by one process or several, from wherever it was
interrupted and to the same bytes (see ``cache``)."""

import itertools
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from patchsae.activations import PixelBatch, finite_tokens, read_pixels, refuse_not_finite
from patchsae.clip import Clip
from patchsae.data.images import Images, LostWorker
from patchsae.data.reading import refuse_unreadable
from patchsae.fast import processes
from patchsae.weights.sealed import SealedRows, save_rows, save_sealed

FORMAT, MANIFEST = 2, "manifest.json"
#: What decides a cache -> what is said of one of which it is {0} and not {1}, as asked for.
DIFFERENT = {"model": "with another model", "block": "after block {0} and not {1}", "images": "of other images",
             "preprocessing": "with other preprocessing", "dtype": "in {0} and not {1}",
             "shard_images": "in shards of {0} images and not {1}"}


def refuse_other(path: Path, made: dict, expected: dict) -> None:
    """Refuse a file of a cache that was made of other things."""
    if strange := set(expected) - set(DIFFERENT):
        raise ValueError(f"A cache is not made of {sorted(strange)[0]!r}; compare {', '.join(DIFFERENT)}.")
    if other := [DIFFERENT[name].format(made[name], asked) for name, asked in expected.items() if made[name] != asked]:
        raise ValueError(f"{path} is of a cache that was made {' and '.join(other)}; choose another folder, or remove "
                         f"{path.parent} and run `make cache` again.")


class Writer:
    """One writing of a cache; processes of one launch have equal parts of its shards. ``made_of``: all that decides
    it."""

    def __init__(self, clip: Clip, ds: Images, folder: Path, made_of: dict, batch_images: int):
        self.clip, self.ds, self.folder, self.made_of, self.batch_images = clip, ds, folder, made_of, batch_images
        self.dtype, self.shard_images = getattr(torch, made_of["dtype"]), made_of["shard_images"]
        self.paths = [folder / f"shard-{k:05}.safetensors" for k in range(-(-len(ds) // self.shard_images))]

    def write(self) -> None:
        """Write the shards that are not complete, each process its part of them, and publish the cache."""
        self._write_shards([k for k in processes.share(len(self.paths)) if not self._is_complete(k)])
        self._wait()
        if processes.rank() == 0:
            self._publish()
        self._wait()

    def _wait(self) -> None:
        try:
            processes.wait()
        except RuntimeError as error:
            raise LostWorker("Another process of this launch was lost; run again, and it goes on from what is "
                             f"finished in {self.folder}.") from error

    def _rows(self, k: int) -> range:
        """Positions in the data set that belong to a shard."""
        return range(len(self.ds))[k * self.shard_images:(k + 1) * self.shard_images]

    def _is_complete(self, k: int) -> bool:
        """Whether a shard is there and whole; what could not be read of it is noted again."""
        try:
            shard = SealedRows(self.paths[k])
            shard.verify()
        except (FileNotFoundError, ValueError):
            return False
        refuse_other(shard.path, shard.notes["made_of"], self.made_of)
        self.ds.unreadable |= dict(shard.notes["unreadable"])
        return True

    def _write_shards(self, numbers: list[int]) -> None:
        """Batches begin anew with each shard, so that its bytes are its own; images are read ahead over all of them."""
        batches = [np.array(rows[i:i + self.batch_images]) for rows in map(self._rows, numbers)
                   for i in range(0, len(rows), self.batch_images)]
        bar = tqdm(read_pixels(self.clip, self.ds, batches), "tokens of the images", len(batches), mininterval=1,
                   disable=processes.rank() > 0)
        left = set(numbers)
        for k, batches_of_shard in itertools.groupby(bar, lambda batch: int(batch.rows[0]) // self.shard_images):
            self._write_shard(k, batches_of_shard)
            left.remove(k)
        for k in left:  # none of its images can be read
            self._write_shard(k, [])

    @torch.no_grad()
    def _write_shard(self, k: int, batches: Iterable[PixelBatch]) -> None:
        tokens, ids, labels = [torch.empty(0, self.clip.n_tokens, self.clip.width, dtype=self.dtype)], [], []
        sums = np.zeros(self.clip.width + 2)  # over tokens of z, of ||z||^2 and of ||z - half||^2
        for batch in batches:
            z = finite_tokens(self.clip, batch, [self.made_of["block"]])[0][:, :self.clip.n_tokens]
            half = z.to(self.dtype)
            refuse_not_finite(half, batch.ids, batch.rows, "has activations in half precision",
                              "choose bfloat16, as `patchsae cache --dtype bfloat16` does")
            exact, error = z.double().flatten(0, 1), (z - half).double()
            sums += [*exact.sum(0).tolist(), exact.square().sum().item(), error.square().sum().item()]
            tokens.append(half.cpu())
            ids += map(str, batch.ids)
            labels += batch.labels.tolist()
        unreadable = [(row, self.ds.unreadable[row]) for row in self._rows(k) if row in self.ds.unreadable]
        save_rows(self.paths[k], torch.cat(tokens), {"made_of": self.made_of, "ids": ids, "labels": labels,
                                                     "unreadable": unreadable, "sums": sums.tolist()})

    def _publish(self) -> None:
        """Write the manifest from what the shards say, and remove what lost processes left."""
        shards = [SealedRows(path) for path in self.paths]
        unreadable = dict(pair for shard in shards for pair in shard.notes["unreadable"])
        refuse_unreadable(unreadable, len(self.ds))  # processes counted each for itself
        # What rounding takes from the explained variance: sum ||z - half||^2 / sum ||z - mean z||^2 over all tokens.
        *total, squares, error = np.sum([shard.notes["sums"] for shard in shards], axis=0)
        variance = squares - np.square(total).sum() / max(1, self.clip.n_tokens * sum(map(len, shards)))
        save_sealed(self.folder / MANIFEST, {
            "format": FORMAT, "made_of": self.made_of, "shape": [self.clip.n_tokens, self.clip.width],
            "n_images": len(self.ds), "unreadable": sorted(unreadable),
            "explained_variance_cost": float(error / variance) if variance > 0 else 0.0,
            "shards": {shard.path.name: shard.notes["seal"] for shard in shards}})
        for path in (*self.folder.glob(".shard-*"), *self.folder.glob(f".{MANIFEST}.*")):
            with suppress(OSError):
                path.unlink()
