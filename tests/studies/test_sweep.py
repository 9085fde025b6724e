"""Configurations of the sweep, and autoencoders found again by their settings."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from patchsae.clip import Clip
from patchsae.config import load_profile
from patchsae.studies import study as study_room
from patchsae.studies import sweep
from patchsae.studies.study import Study, committed_folder, committed_log, passes, run_folder, trained_sae
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
    given = dataclasses.replace(profile, sae=dataclasses.replace(profile.sae, weights="a"))
    rows = sweep.configurations(given)
    assert [seed for name, seed in rows if name == "default"] == [0] and rows["default", 0] == given
    assert rows["ghost off", 0].sae.weights == ""


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
    monkeypatch.setattr("patchsae.studies.study.train_saes", lambda *_: pytest.fail("trained again"))
    assert trained_sae(profile, clip, pixel_data).fingerprint() == first.fingerprint()


def test_the_committed_one_comes_first(clip, profile, pixel_data, tmp_path, monkeypatch):
    monkeypatch.setattr("patchsae.config.ROOT", tmp_path)
    other, _ = train_sae(profile.with_sae(steps=3), clip, pixel_data, tmp_path / "other")
    other.save_pretrained(committed_folder(profile, clip))
    assert trained_sae(profile, clip, pixel_data).fingerprint() == other.fingerprint()


def test_what_notebooks_compare_trains_in_one_pass_with_the_profiles_own(study, clip, pixel_data, monkeypatch):
    trained, train = [], study_room.train_saes
    monkeypatch.setattr(study_room, "train_saes",
                        lambda profiles, *rest: trained.append(profiles) or train(profiles, *rest))
    p, one = study.profile, study_of(study.profile.with_sae(one_order=True), clip, pixel_data)
    sae, log = one.training()
    q = one.profile
    assert trained == [[q, q.with_sae(tokens="cls"), q.at_layer(0), one.next_seed().profile]] and len(log) == 12
    assert one.sae is sae and trained_sae(q, clip, pixel_data).fingerprint() == sae.fingerprint()
    one.saes(trained[0])  # all of them are there
    one.training()  # its own again, now and here
    study.training()  # whose seeds have orders of their own
    assert trained[1:] == [[q], [p, p.with_sae(tokens="cls"), p.at_layer(0)], [study.next_seed().profile]]


def test_a_pass_has_room_for_so_many_autoencoders(profile, clip, monkeypatch):
    monkeypatch.setattr(study_room, "device_bytes", lambda device: 2 * 32 * profile.sae.expansion * clip.width**2 * 3.5)
    many = [profile.at_layer(0), profile.with_sae(l1=1), profile.with_sae(l1=2), profile.with_sae(expansion=12),
            profile.with_sae(shuffle="tokens"), profile]
    assert passes(many, clip.width, "cpu") == [many[:3], [many[3]], [many[5]], [many[4]]]


@pytest.fixture
def study(clip, profile, pixel_data, tmp_path, monkeypatch):
    """Two configurations of a few steps, everything written to a folder of its own."""
    monkeypatch.setattr("patchsae.config.ROOT", tmp_path)
    monkeypatch.setattr(sweep, "CHANGES", {"lambda x10": {"l1": 10}})
    monkeypatch.setattr(sweep, "SEEDS", 2)
    monkeypatch.setattr(sweep, "LOG_EVERY", 3)
    return study_of(dataclasses.replace(profile, model=dataclasses.replace(profile.model, other_layers=(0,))), clip,
                    pixel_data)


def study_of(profile, clip, images):
    study = Study(profile)
    study.clip, study.images = Clip(clip.model, None, clip.processor), lambda task, split: images
    return study


def test_a_sweep_keeps_what_notebooks_look_into(study, clip, monkeypatch):
    trained, train = [], study_room.train_saes
    monkeypatch.setattr(study_room, "train_saes",
                        lambda profiles, *rest: trained.append(profiles) or train(profiles, *rest))
    sweep.run(study)
    assert [len(profiles) for profiles in trained] == [3, 1]  # the second seed has an order of its own
    sweep.run(study)
    assert len(trained) == 2
    table = sweep.table2(study, pd.DataFrame())
    assert table.attrs["current"] and table["configuration"].tolist() == [
        "default", "default", "lambda x10", "layer 0", "random"]
    assert table["accuracy_original"].isna().all() and table["mse"].gt(0).all()  # this model has no text
    p = study.profile
    for kept in (p, dataclasses.replace(p, seed=p.seed + 1), p.at_layer(0)):
        assert committed_log(kept, clip)["step"].tolist() == [3, 6, 9, 12]
    assert len(list((p.data_dir / "sae").iterdir())) == 3
    assert sweep.committed_row(study)["configuration"] == "default"


def test_other_settings_stand_beside_the_committed_table(study, clip, pixel_data, monkeypatch):
    quality = pd.DataFrame({"trained": {"mse": 1.0}, "random": {"mse": 9.0}, "other": {"mse": 5.0}})
    alone = sweep.table2(study, quality)
    assert alone.set_index("configuration")["mse"].to_dict() == {"default": 1, "random": 9}
    assert "There is no table2.csv" in alone.attrs["note"] and not study.profile.data_dir.exists()
    sweep.run(study)
    before = (study.profile.data_dir / "table2.csv").read_bytes()
    monkeypatch.setattr(sweep, "trained_sae", lambda *_: pytest.fail("trained in a notebook"))
    other = study_of(study.profile.with_sae(l1=0.3), clip, pixel_data)
    shown = sweep.table2(other, quality)
    assert shown["configuration"].tolist()[-1] == "these settings" and len(shown) == 6 and shown["mse"].iloc[-1] == 1
    assert "5 of its 5 runs" in shown.attrs["note"] and sweep.committed_row(other) is None
    assert (study.profile.data_dir / "table2.csv").read_bytes() == before
    tenfold = study_of(study.profile.with_sae(l1=10 * study.profile.sae.l1), clip, pixel_data)
    assert sweep.committed_row(tenfold)["configuration"] == "lambda x10"


def test_published_table_has_the_default_row():
    table = sweep.published("table2")
    row = table[table["note"] == "the paper's default"].iloc[0]
    assert row["mse"] == 0.0025 and row["l0"] == 148.56 and len(table) == 13
    assert np.isclose(table["lambda"].max(), 8e-4)
