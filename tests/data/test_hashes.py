"""Hashes of files: of what they hold, computed once, and never of another file than the one that is there."""

import hashlib
import json
import os
import shutil
import time

import pytest

from patchsae.data import hashes
from patchsae.data.hashes import NOTES, file_hashes, notes_place

AN_HOUR = 3600 * 10**9


@pytest.fixture
def files(tmp_path):
    """Five files, unchanged for an hour."""
    (tmp_path / "data" / "a b").mkdir(parents=True)
    paths = [tmp_path / "data" / name for name in ("a b/1", "a b/2", "3", "é", "5")]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * (1000 + i))
        settle(path)
    return paths


def settle(path, ago=AN_HOUR):
    """Put the time of change of a file back."""
    os.utime(path, ns=(time.time_ns() - ago, time.time_ns() - ago))


@pytest.fixture
def read(monkeypatch):
    """The files that were read, by name."""
    names, digest = [], hashes.file_sha256
    monkeypatch.setattr(hashes, "file_sha256", lambda path: names.append(path.name) or digest(path))
    return names


def expected(paths):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_every_file_is_read_once(files, read):
    for _ in range(3):
        assert file_hashes(files[2].parent, [*files, files[0]]) == expected(files)
    assert sorted(read) == sorted(path.name for path in files)
    assert not [path for path in files[2].parent.iterdir() if path.name[0] == "." and path.name != NOTES]


def test_a_copy_is_the_same_wherever_it_lies(files, read, tmp_path):
    before = file_hashes(files[2].parent, files)
    shutil.copytree(files[2].parent, tmp_path / "copied", copy_function=shutil.copyfile)
    copies = [tmp_path / "copied" / path.relative_to(files[2].parent) for path in files]
    assert [*file_hashes(tmp_path / "copied", copies).values()] == [*before.values()] and len(read) == 10
    shutil.copytree(files[2].parent, tmp_path / "moved")  # with times and notes
    moved = [tmp_path / "moved" / path.relative_to(files[2].parent) for path in files]
    assert [*file_hashes(tmp_path / "moved", moved).values()] == [*before.values()] and len(read) == 10


def test_a_file_that_changed_is_read_again(files, read):
    file_hashes(files[2].parent, files)
    files[0].write_bytes(b"\7" * 1000)
    settle(files[1], 2 * AN_HOUR)
    assert file_hashes(files[2].parent, files) == expected(files) and sorted(read[5:]) == ["1", "2"]


def test_a_file_that_has_only_just_changed_is_not_noted(files, read):
    files[0].write_bytes(b"one")
    file_hashes(files[2].parent, files)
    assert "a b/1" not in json.loads((files[2].parent / NOTES).read_text())
    changed = files[0].stat().st_mtime_ns
    files[0].write_bytes(b"two")
    os.utime(files[0], ns=(changed, changed))  # as where a clock is coarse
    assert file_hashes(files[2].parent, files) == expected(files) and read.count("1") == 2


def test_an_interruption_keeps_what_was_noted(files, read, monkeypatch):
    monkeypatch.setattr(hashes, "SAVED_EVERY", 2)
    digest = hashes.file_sha256

    def stops(path):
        if path == files[3]:
            raise KeyboardInterrupt
        return digest(path)

    with monkeypatch.context() as patch:
        patch.setattr(hashes, "file_sha256", stops)
        with pytest.raises(KeyboardInterrupt):
            file_hashes(files[2].parent, files)
    read.clear()
    assert file_hashes(files[2].parent, files) == expected(files) and set(read) == {"3", "é", "5"}


def test_notes_of_others_stay(files):
    root = files[2].parent
    file_hashes(root, files[:2])
    file_hashes(root, files[2:])
    assert sorted(json.loads((root / NOTES).read_text())) == sorted(path.relative_to(root).as_posix() for path in files)


@pytest.mark.parametrize("damage", ["", "[1]", "{", '{"3": 1, "5": [1], "é": null}', "[" * 10**5, "\0"])
def test_damaged_notes_are_made_anew(files, damage):
    (files[2].parent / NOTES).write_text(damage)
    assert file_hashes(files[2].parent, files) == expected(files)
    assert len(json.loads((files[2].parent / NOTES).read_text())) == 5


def test_a_missing_file_holds_nothing(files):
    files[0].unlink()
    assert file_hashes(files[2].parent, files) == {files[0]: ""} | expected(files[1:])


def test_notes_of_a_folder_that_cannot_be_written_are_the_users(files, read, tmp_path, monkeypatch):
    root = files[2].parent
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: path != root)
    for _ in range(2):
        assert file_hashes(root, files) == expected(files)
    assert len(read) == 5 and not (root / NOTES).exists() and notes_place(root).is_relative_to(tmp_path / "cache")
    assert notes_place(root) != notes_place(tmp_path / "moved")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert file_hashes(root, files) == expected(files) and len(read) == 10
