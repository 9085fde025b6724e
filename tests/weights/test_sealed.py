"""Sealed files: what was written is read, and no byte of it changes unnoticed."""

import re

import pytest
import torch
from conftest import refused

from patchsae.weights.sealed import UNSEALED, SealedRows, load_sealed, save_rows, save_sealed

NOTES = {"ids": ["", "é\n", UNSEALED.decode(), f'"seal": "{"a" * 64}"'], "labels": [0, 1, 2, 3]}


def read_rows(path):
    rows = SealedRows(path)
    rows.verify()
    return rows.rows.copy(), rows.notes


@pytest.fixture(params=["json", torch.float16, torch.bfloat16], ids=str)
def sealed(request, tmp_path):
    """A file and how it is read."""
    if request.param == "json":
        save_sealed(tmp_path / "a.json", NOTES)
        return tmp_path / "a.json", load_sealed
    save_rows(tmp_path / "a.safetensors", torch.randn(4, 2, 3).to(request.param), NOTES)
    return tmp_path / "a.safetensors", read_rows


def test_what_was_written_is_read(tmp_path):
    save_sealed(tmp_path / "a.json", NOTES)
    assert NOTES.items() < load_sealed(tmp_path / "a.json").items()
    for dtype in (torch.float16, torch.bfloat16):
        for n in (0, 1, 4):
            z = torch.randn(n, 2, 3).to(dtype)
            save_rows(tmp_path / "a.safetensors", z, NOTES)
            rows, notes = read_rows(tmp_path / "a.safetensors")
            assert rows.tobytes() == z.view(torch.uint8).numpy().tobytes() and len(rows) == n
            assert NOTES.items() < notes.items()


def test_every_changed_byte_and_longer_shorter_and_missing_files_are_found(sealed):
    path, read = sealed
    whole = path.read_bytes()
    flipped = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1:] for i in range(len(whole))]
    resized = [whole[:n] for n in range(0, len(whole), 3)] + [whole + b"\0", whole + b" ", whole + whole]
    for changed in flipped + resized:
        path.write_bytes(changed)
        with refused(re.escape(str(path))):
            read(path)
    path.write_bytes(whole)
    read(path)
    path.unlink()
    with refused(re.escape(str(path)), FileNotFoundError):
        read(path)
