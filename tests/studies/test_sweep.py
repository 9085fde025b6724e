"""Configurations of the sweep, and autoencoders found again by their settings."""

import numpy as np
import pytest

from patchsae.config import load_profile
from patchsae.studies import sweep
from patchsae.studies.study import committed_folder, run_folder, trained_sae
from patchsae.train import run_key, train_sae


def test_configurations_change_what_their_names_say():
    profile = load_profile("mini")
    rows = sweep.configurations(profile)
    assert [seed for name, seed in rows if name == "default"] == [0, 1, 2]
    assert rows["lambda 0", 0].sae.l1 == 0
    assert rows["lambda x10", 0].sae.l1 == pytest.approx(10 * profile.sae.l1)
    assert rows["expansion x2", 0].sae.expansion == 2 * profile.sae.expansion
    assert rows["ghost off", 0].sae.ghost is False
    assert rows["class token only", 0].sae.tokens == "cls"
    activations = {name: rows[name, 0].sae.activation for name in ("TopK", "BatchTopK", "JumpReLU", "Matryoshka")}
    assert activations == {name: name.lower() for name in activations}
    assert rows["TopK", 0].sae.l1 == profile.sae.l1 and rows["JumpReLU", 0].sae.l1 != profile.sae.l1
    layers = {p.model.layer for (name, _), p in rows.items() if name.startswith("layer")}
    assert layers == set(profile.model.other_layers)
    assert rows["default", 0] == profile


def test_key_follows_model_settings_and_seed_but_not_checkpoint_frequency(clip, profile):
    key = run_key(profile, clip)
    assert run_key(profile.with_sae(save_every=9), clip) == key
    assert run_key(profile.with_sae(l1=1.0), clip) != key
    assert run_key(profile.at_layer(0), clip) != key


def test_a_trained_autoencoder_is_found_again(clip, profile, pixel_data, tmp_path, monkeypatch):
    monkeypatch.setattr("patchsae.config.ROOT", tmp_path)
    first = trained_sae(profile, clip, pixel_data)
    assert run_folder(profile, clip).is_relative_to(tmp_path)
    assert (run_folder(profile, clip) / "sae.safetensors").is_file()
    monkeypatch.setattr("patchsae.train.train_sae", lambda *_: pytest.fail("trained again"))
    assert trained_sae(profile, clip, pixel_data).fingerprint() == first.fingerprint()


def test_the_committed_one_comes_first(clip, profile, pixel_data, tmp_path, monkeypatch):
    monkeypatch.setattr("patchsae.config.ROOT", tmp_path)
    other, _ = train_sae(profile.with_sae(steps=3), clip, pixel_data, tmp_path / "other")
    other.save_pretrained(committed_folder(profile, clip))
    assert trained_sae(profile, clip, pixel_data).fingerprint() == other.fingerprint()


def test_published_table_has_the_default_row():
    table = sweep.published("table2")
    row = table[table["note"] == "the paper's default"].iloc[0]
    assert row["mse"] == 0.0025 and row["l0"] == 148.56 and len(table) == 13
    assert np.isclose(table["lambda"].max(), 8e-4)
