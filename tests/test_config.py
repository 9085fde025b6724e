"""Profiles: every key known, every mistake one sentence, every change another fingerprint."""

import dataclasses

import pytest
from conftest import one_sentence, random_clip_model

import patchsae.config
from patchsae.clip import Clip
from patchsae.config import PROFILES, ROOT, SaeSettings, load_profile, start
from patchsae.train import run_key


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a changed copy of the mini profile where profiles are looked for."""
    monkeypatch.setattr(patchsae.config, "PROFILES", tmp_path)
    monkeypatch.delenv("PROFILE", raising=False)
    text = (PROFILES / "mini.toml").read_text()

    def write(old="", new="", name="other"):
        assert old in text, old
        (tmp_path / f"{name}.toml").write_text(text.replace(old, new, 1) if old else text + new)
        return name

    return write


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_profile_loads(path):
    profile = load_profile(path.stem)
    assert profile.name == path.stem and profile == load_profile(path.stem)
    assert hash(profile) == hash(load_profile(path.stem))
    assert profile.data_dir == ROOT / "data" / path.stem and profile.run_dir.parent == profile.data_dir
    for part in (profile, profile.sae):
        with pytest.raises(dataclasses.FrozenInstanceError):
            part.seed = 1


def test_profile_is_chosen_by_the_environment(monkeypatch, write):
    monkeypatch.setenv("PROFILE", write())
    assert load_profile().name == "other"
    assert load_profile(write(name="third")).name == "third"
    monkeypatch.setenv("PROFILE", "nowhere")
    with pytest.raises(ValueError) as error:
        load_profile()
    assert one_sentence(error.value) and "nowhere" in str(error.value) and "other" in str(error.value)
    monkeypatch.delenv("PROFILE")
    write(name="mini")
    assert load_profile().name == "mini"


@pytest.mark.parametrize("name", ["../mini", "mini.toml", "Mini", "/etc/passwd", "config"])
def test_only_profiles_are_profiles(name):
    with pytest.raises(ValueError) as error:
        load_profile(name)
    assert one_sentence(error.value)


def test_the_name_is_the_files_name(write):
    assert load_profile(write("seed = 0", 'seed = 0\nname = "mini"')).name == "other"


@pytest.mark.parametrize(
    "old, new, named",
    [
        ("steps = ", "stepz = 3\nsteps = ", "stepz"),
        ("[latents]", "[latents]\nalpha = 1", "alpha"),
        ("seed = 0", "seed = 0\nsed = 1", "sed"),
        ("", "\n[maple_]\nx = 1\n", "maple_"),
        ("tau = 0.2", "", "tau"),
        ("seed = 0", "", "seed"),
        ("[latents]", "[latent]", "latent"),
        ("[model]", "[[model]]", "model"),
        ("seed = 0", "seed = ", "other.toml"),
        ('tokens = "all"', 'tokens = "patch"', "patch"),
        ("steps = 8000", 'steps = "many"', "steps"),
        ("seed = 0", "seed = 0.5", "seed"),
        ("layer = -2", 'layer = "last"', "layer"),
    ],
    ids=[
        "unknown in sae",
        "unknown in latents",
        "unknown at the top",
        "unknown table",
        "missing in latents",
        "missing at the top",
        "misspelt table",
        "table of tables",
        "not toml",
        "bad choice",
        "words for a number",
        "half a seed",
        "words for a layer",
    ],
)
def test_a_mistake_in_a_profile_is_one_sentence(write, old, new, named):
    with pytest.raises(ValueError) as error:
        load_profile(write(old, new))
    assert one_sentence(error.value) and named in str(error.value)


def test_whole_numbers_where_there_may_be_fractions(write):
    assert load_profile(write("tau = 0.2", "tau = 1")).latents.tau == 1


def test_with_sae_changes_the_autoencoder_alone():
    profile = load_profile("mini")
    other = profile.with_sae(l1=0.5, tokens="cls")
    assert (other.sae.l1, other.sae.tokens) == (0.5, "cls") and profile.sae.l1 != 0.5
    assert dataclasses.replace(other, sae=profile.sae) == profile
    with pytest.raises(TypeError):
        profile.with_sae(lamda=1)


def changed(profile, section, key):
    """The same profile with one setting changed."""
    part = getattr(profile, section)
    value = getattr(part, key)
    value = (
        not value
        if isinstance(value, bool)
        else value + 1
        if isinstance(value, (int, float))
        else value + value or "other"
    )
    return dataclasses.replace(profile, **{section: dataclasses.replace(part, **{key: value})})


def test_a_trained_autoencoder_is_keyed_by_all_that_decides_it_and_no_more(clip):
    profile = load_profile("mini")
    key = run_key(profile, clip)
    assert key == run_key(load_profile("mini"), clip)
    assert key != run_key(dataclasses.replace(profile, seed=1), clip) and key != run_key(
        profile.at_layer(0), clip
    )
    assert key != run_key(profile, Clip(random_clip_model(seed=1)))
    names = {field.name for field in dataclasses.fields(SaeSettings)} - {"save_every", "k"}
    decides = [("sae", name) for name in sorted(names)]
    decides += [("data", "source"), ("data", "task"), ("data", "train_images"), ("model", "layer")]
    rest = [
        ("sae", "save_every"),
        ("sae", "k"),
        ("data", "transfer"),
        ("data", "test_images"),
        ("data", "batch_images"),
        ("latents", "tau"),
        ("latents", "n_reference"),
        ("model", "templates"),
    ]
    keys = [run_key(changed(profile, *which), clip) for which in decides]
    assert len({key, *keys}) == len(keys) + 1
    assert {run_key(changed(profile, *which), clip) for which in rest} == {key}


def test_the_number_of_active_latents_decides_only_where_it_is_fixed(clip):
    fixed = [run_key(load_profile("mini").with_sae(activation="topk", k=k), clip) for k in (8, 16)]
    free = [run_key(load_profile("mini").with_sae(activation="jumprelu", k=k), clip) for k in (8, 16)]
    assert fixed[0] != fixed[1] and free[0] == free[1] and free[0] not in fixed


def test_figures_can_be_sent_elsewhere(monkeypatch, tmp_path):
    profile = load_profile("mini")
    monkeypatch.delenv("PATCHSAE_FIGURES", raising=False)
    assert profile.figures_dir == ROOT / "figures" / "mini"
    monkeypatch.setenv("PATCHSAE_FIGURES", str(tmp_path))
    assert profile.figures_dir == tmp_path / "mini"


def test_start_fixes_threads_and_seeds():
    import numpy as np
    import torch

    threads = torch.get_num_threads()
    try:
        profile = start("mini")
        numbers = torch.rand(3).tolist(), np.random.rand(3).tolist()
        assert torch.get_num_threads() == profile.threads
        start("mini")
        assert (torch.rand(3).tolist(), np.random.rand(3).tolist()) == numbers
    finally:
        torch.set_num_threads(threads)
