"""Files in which every changed byte is noticed: JSON with a seal, and rows of half precision with a checksum each.

A seal is the SHA-256 of the file, with 64 zeros in the place of the seal itself. A file of rows is a safetensors file
of one tensor, "z", and of notes as JSON, the crc32 of every row among them. Its seal covers all that lies before the
rows, so that opening it is quick, and a row can be read and checked without the others.
"""

import hashlib
import json
import math
import mmap
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from patchsae.weights.files import write_atomically

#: A seal before it is computed; and where it is: the first thing that a file says of itself.
UNSEALED, SEAL = b"0" * 64, re.compile(rb"seal[^0-9a-f]+([0-9a-f]{64})")
MISSING, MEND = "run `make cache`, which writes it", "remove it and run `make cache`, which writes it anew"


def save_sealed(path: Path, content: dict) -> None:
    """Write JSON for ``load_sealed``."""
    data = _sealed(_unsealed(content).encode())
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def load_sealed(path: Path) -> dict:
    """Read JSON that ``save_sealed`` wrote, if every byte of it is still the same; with its "seal"."""
    _check_size(path)
    data = path.read_bytes()
    _check_seal(path, data)
    return json.loads(data)


def save_rows(path: Path, z: torch.Tensor, notes: dict) -> None:
    """Write rows ``[n,...]`` in half precision, with notes about them, for ``SealedRows``."""
    checksums = [zlib.crc32(row) for row in z.view(torch.uint8).flatten(1).numpy()]
    data = save({"z": z}, {"notes": _unsealed(notes | {"crc32": checksums})})
    start = len(data) - z.nbytes

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(_sealed(data[:start]))
            file.write(memoryview(data)[start:])

    write_atomically(path, write)


class SealedRows:
    """A file that ``save_rows`` wrote, mapped into memory; ``len`` of them, and ``notes``, with the "seal"."""

    def __init__(self, path: Path):
        self.path = path
        _check_size(path)
        try:
            with safe_open(path, "np") as file:  # this compares the size of the file with what it says
                shape, notes = file.get_slice("z").get_shape(), (file.metadata() or {}).get("notes", "")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged, it is no whole safetensors file; {MEND}.") from error
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = len(self.map) - 2 * math.prod(shape)
        _check_seal(path, self.map[:start])
        self.notes = json.loads(notes)
        self.checksums = np.array(self.notes.pop("crc32"), dtype=np.uint32)
        self.rows = np.frombuffer(self.map, np.uint8, offset=start).reshape(shape[0], 2 * math.prod(shape[1:]))
        self.checked = np.zeros(len(self), dtype=bool)

    def __len__(self) -> int:
        return len(self.checksums)

    def copy(self, i: int, out: np.ndarray) -> None:
        """Copy the bytes of a row; the first copy of each is checked."""
        _check_size(self.path, len(self.map))
        out[:] = self.rows[i]
        if not self.checked[i]:
            self._check(i, out)

    def verify(self) -> None:
        """Check every row."""
        _check_size(self.path, len(self.map))
        for i, row in enumerate(self.rows):
            self._check(i, row)

    def _check(self, i: int, row: np.ndarray) -> None:
        if zlib.crc32(row) != self.checksums[i]:
            raise ValueError(f"{self.path} is damaged, row {i} is not what was written; {MEND}.")
        self.checked[i] = True


def _check_size(path: Path, size: int | None = None) -> None:
    """Refuse a file that is gone or has another size: touching what is no longer there would end the process."""
    try:
        found = path.stat().st_size
    except OSError:
        raise FileNotFoundError(f"{path} is missing; {MISSING}.") from None
    if size is not None and found != size:
        raise ValueError(f"{path} is damaged, it has {found} bytes and not {size}; {MEND}.")


def _unsealed(content: dict) -> str:
    """JSON with room for a seal, which comes first, so that nothing that follows can be taken for it."""
    return json.dumps({"seal": ""} | content | {"seal": UNSEALED.decode()})


def _sealed(data: bytes) -> bytes:
    """The same bytes with the seal in its place."""
    return data.replace(UNSEALED, hashlib.sha256(data).hexdigest().encode(), 1)


def _check_seal(path: Path, data: bytes) -> None:
    """Refuse bytes that are not those that were sealed."""
    seal = SEAL.search(data)
    if seal is None or _sealed(data[:seal.start(1)] + UNSEALED + data[seal.end(1):]) != data:
        raise ValueError(f"{path} is damaged, it is not what was written; {MEND}.")
