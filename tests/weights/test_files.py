"""Files of weights: written whole, with the user's own rights, and found in a model's folder and nowhere else."""

import errno
import json
import os
import stat

import pytest
import torch
from conftest import refused
from safetensors import SafetensorError

from patchsae.weights.files import load_json, load_tensors, model_files, save_json, save_tensors, write_atomically


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_rights_of_any_new_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        save_tensors(tmp_path / "a.safetensors", {"w": torch.ones(2)})
        save_json(tmp_path / "a.json", {})
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~mask}
    assert torch.equal(load_tensors(tmp_path / "a.safetensors")["w"], torch.ones(2))


@pytest.mark.parametrize("number, words", [
    (errno.ENOSPC, "free space"), (errno.EDQUOT, "free space"), (errno.EROFS, "can be written to"),
    (errno.EACCES, "can be written to"), (errno.EIO, "can be written to")])
@pytest.mark.parametrize("half", [False, True])
def test_advice_depends_on_what_went_wrong_and_nothing_is_left_behind(tmp_path, number, words, half):
    (tmp_path / "a").write_text("before")

    def fail(temporary):
        if half:
            temporary.write_text("half of it")
        raise OSError(number, os.strerror(number))

    with refused(f"{os.strerror(number)}.*{words}", OSError) as error:
        write_atomically(tmp_path / "a", fail)
    assert ("free space" in str(error.value)) == (words == "free space")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_a_full_disk_is_told_by_its_number_for_tensors_too(tmp_path, monkeypatch):
    """The library's own error names the system's number in words."""
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("patchsae.weights.files.save_file", full)
    with refused("free space", OSError):
        save_tensors(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    assert not list(tmp_path.iterdir())


def index(folder, files, name="model.safetensors"):
    """An index of shards, as transformers writes it."""
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": files}))


def test_files_of_a_model(tmp_path):
    assert model_files(tmp_path) == []
    (tmp_path / "pytorch_model.bin").touch()
    assert model_files(tmp_path) == [tmp_path / "pytorch_model.bin"]
    for part in ("b", "a"):
        (tmp_path / part).touch()
    index(tmp_path, {"x": "b", "y": "a", "z": "b"})
    assert model_files(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    (tmp_path / "model.safetensors").touch()
    assert model_files(tmp_path) == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize("files", [
    {"x": "../outside"}, {"x": "/etc/passwd"}, {"x": "sub/inside"}, {"x": "absent"}, {"x": ".."}, {"x": ""}, {}, [], 3,
    {"x": None}, {"x": ["a"]}])
def test_an_index_may_not_lead_elsewhere(tmp_path, files):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "outside", folder / "sub" / "inside"):
        path.touch()
    index(folder, files)
    with refused():
        model_files(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "{}", "[" * 10**5, "\x00", '{"a": '])
def test_damaged_settings_are_one_sentence(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with refused():
        load_json(tmp_path / "a.json", "a")
