"""Profiles: every key known, every mistake one sentence, every change another fingerprint."""

import dataclasses
import os
import subprocess
import sys
import typing

import pytest
from conftest import one_sentence, random_clip_model

import patchsae.config
from patchsae.clip import Clip
from patchsae.config import PROFILES, ROOT, MethodSettings, Profile, SaeSettings, load_profile, resolve, start
from patchsae.train import run_key

#: All that a profile has to say.
LEAST = '[model]\nname = "data/mini/clip"\n[data]\ntask = "birds"\n'
SECTIONS = [f.name for f in dataclasses.fields(Profile) if dataclasses.is_dataclass(f.type)]


def refusal(call, *arguments, **named) -> str:
    """The one sentence with which a call is refused."""
    with pytest.raises(ValueError) as error:
        call(*arguments, **named)
    assert one_sentence(error.value)
    return str(error.value)


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
    for settings in (profile, profile.sae):
        with pytest.raises(dataclasses.FrozenInstanceError):
            settings.seed = 1


def test_profile_is_chosen_by_the_environment(monkeypatch, write):
    monkeypatch.setenv("PROFILE", write())
    assert load_profile().name == "other"
    assert load_profile(write(name="third")).name == "third"
    monkeypatch.setenv("PROFILE", "nowhere")
    assert {"nowhere", "other"} <= set(refusal(load_profile).replace("'", "").replace(",", "").split())
    monkeypatch.delenv("PROFILE")
    write(name="mini")
    assert load_profile().name == "mini"


@pytest.mark.parametrize("name", ["../mini", "mini.toml", "Mini", "/etc/passwd", "config"])
def test_only_profiles_are_profiles(name):
    assert "mini, paper, rehearsal" in refusal(load_profile, name)


def test_a_profile_is_a_path_or_one_of_the_projects_or_of_the_packages(tmp_path, monkeypatch):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    monkeypatch.setattr(patchsae.config, "ROOT", project)
    monkeypatch.chdir(tmp_path)
    for folder, seed in ((project / "profiles", 1), (elsewhere, 2)):
        folder.mkdir(parents=True)
        for name in ("mini", "birds of Köln"):
            (folder / f"{name}.toml").write_text(f"seed = {seed}\n{LEAST}", encoding="utf-8")
    assert (load_profile("mini").seed, load_profile("birds of Köln").seed, load_profile("paper").seed) == (1, 1, 42)
    assert load_profile(elsewhere / "birds of Köln.toml").seed == load_profile("elsewhere/mini.toml").seed == 2
    assert load_profile("profiles/mini.toml").seed == 1, "a path is looked for in the project folder too"
    assert load_profile("birds of Köln").run_dir == project / "data" / "birds of Köln" / "run"
    said = refusal(load_profile, "bird.toml")
    assert str(project / "bird.toml") in said and "birds of Köln, mini, paper, rehearsal" in said
    assert resolve("elsewhere") == resolve(elsewhere.relative_to(tmp_path)) and resolve("elsewhere").is_dir()
    assert resolve("profiles") == project / "profiles" and str(resolve("owner/name")) == "owner/name"


def test_the_name_is_the_files_name(write):
    assert load_profile(write("seed = 0", 'seed = 0\nname = "mini"')).name == "other"


@pytest.mark.parametrize("old, new, named", [
    ("steps = ", "stepz = 3\nsteps = ", ["sae.stepz", "save_every"]),
    ("[latents]", "[latents]\nalpha = 1", ["latents.alpha", "n_reference, tau"]),
    ("seed = 0", "seed = 0\nsed = 1", ["sed", "seed"]),
    ("", "\n[maple_]\nx = 1\n", ["maple_", "maple,"]),
    ('name = "data/mini/clip"', "", ["model.name"]),
    ("learning_rate = 0.02\n", "", ["maple.learning_rate"]),
    ("[latents]", "[latent]", ["key latent;", "latents"]),
    ("[model]", "[[model]]", ["model", "a table"]),
    ("[model]", "model = 1979-05-27\n[model_]", ["model"]),
    ("seed = 0", "seed = ", ["TOML"]),
    ("seed = 0", "seed = 1979-05-27", ["seed", "integer"]),
    ('tokens = "all"', 'tokens = "patch"', ["sae.tokens", "'patch'", "'all' or 'cls'"]),
    ("steps = 8000", 'steps = "many"', ["sae.steps", "'many'", "integer"]),
    ("steps = 8000", "steps = 1e30", ["sae.steps", "integer"]),
    ("l1 = 1.3e-3", "l1 = nan", ["sae.l1", "finite"]),
    ("layer = -2", "layer = 400", ["model.layer", "400", "less than 64"]),
    ('transfer = ["sketches",', 'transfer = ["textures",', ["data.transfer", "twice"]),
    ("seeds = [1, 2, 3]", "seeds = []", ["adaptation.seeds", "at least 1"]),
    ("ev_gain = 0 ", "ev_gain = inf ", ["bounds.ev_gain", "finite"]),
])
def test_a_mistake_in_a_profile_is_one_sentence(write, old, new, named):
    said = refusal(load_profile, write(old, new))
    assert "other.toml" in said and all(words in said for words in named), said


def test_what_a_profile_leaves_out_is_as_in_the_paper(tmp_path):
    (tmp_path / "own.toml").write_text(LEAST)
    own, paper = load_profile(tmp_path / "own.toml"), load_profile("paper")
    assert own.with_sae(precision="bf16").sae == paper.sae and own.latents == paper.latents
    shared = dataclasses.replace(own.adaptation, tasks=paper.adaptation.tasks, transfer_depth=3)
    assert shared == paper.adaptation and own.adaptation.transfer_depth == 0  # its text tower may have two blocks
    assert [getattr(own, name) == getattr(paper, name) for name in SECTIONS[-4:]] == [True] * 4
    assert own.data.transfer == own.adaptation.tasks == own.model.other_layers == () and own.bounds == {}
    assert own.expected("ev_gain", -1.0) == -1.0 and load_profile("mini").expected("accuracy_kept", -1.0) == 0.95


def wrong_values(kind) -> list:
    """Values that a setting of a type may not have: of other types, not finite, negative, out of all proportion."""
    kind = typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind
    if typing.get_origin(kind) is tuple:
        return [None, "word", 1, ["word"], {"word"}, (None,), (1.5,), (True,), ("",), (-100,)]
    numbers = [None, "1", True, -65, float("nan"), float("inf"), (1,)]
    wrong = {int: [*numbers, 1.7, 1.0, 10**30], float: numbers, bool: [None, 0, "true"], str: [None, 1, True, b"x"]}
    return wrong.get(kind, [None, "else", True, 1, ("float16",)])


@pytest.mark.parametrize("name", SECTIONS)
def test_no_setting_takes_what_it_cannot_be(name):
    profile = load_profile("mini")
    section = getattr(profile, name)
    for field in dataclasses.fields(section):
        for value in wrong_values(field.type):
            said = refusal(dataclasses.replace, section, **{field.name: value})
            assert f"{type(section).__name__}: {field.name}" in said
    assert "seed" in refusal(dataclasses.replace, profile, seed=-1)
    assert name in refusal(dataclasses.replace, profile, **{name: dataclasses.asdict(section)})


def test_changes_are_checked_like_the_file():
    profile = load_profile("mini")
    for changes in ({"l1": -1}, {"steps": 0}, {"expansion": 0}, {"k": -1}, {"tokens": "patch"}, {"lamda": 1}):
        assert next(iter(changes)) in refusal(profile.with_sae, **changes)
    assert "layer" in refusal(profile.at_layer, 1.5)
    assert "epochs" in refusal(MethodSettings, learning_rate=0.1, epochs=0, batch_images=4)
    assert "learning_rate" in refusal(MethodSettings, epochs=1, batch_images=4)


def test_whole_numbers_where_there_may_be_fractions(write):
    assert load_profile(write("tau = 0.2", "tau = 1")).latents.tau == 1


def test_with_sae_changes_the_autoencoder_alone():
    profile = load_profile("mini")
    other = profile.with_sae(l1=0.5, tokens="cls")
    assert (other.sae.l1, other.sae.tokens) == (0.5, "cls") and profile.sae.l1 != 0.5
    assert dataclasses.replace(other, sae=profile.sae) == profile


def changed(profile, section, key):
    """The same profile with one setting changed."""
    settings = getattr(profile, section)
    field, value = {f.name: f for f in dataclasses.fields(settings)}[key], getattr(settings, key)
    if typing.get_origin(field.type) is typing.Literal:
        other = next(choice for choice in typing.get_args(field.type) if choice != value)
    elif isinstance(value, bool):
        other = not value
    else:
        other = value + (0.5 if isinstance(value, float) else 1 if isinstance(value, int) else type(value)("x"))
    return dataclasses.replace(profile, **{section: dataclasses.replace(settings, **{key: other})})


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


def test_keys_are_those_of_the_committed_autoencoders():
    from patchsae.clip import load_clip

    profile = load_profile("mini")
    clip = load_clip(profile.model.name)
    variants = [profile, profile.at_layer(0), profile.with_sae(tokens="cls"), dataclasses.replace(profile, seed=2)]
    assert all((profile.data_dir / "sae" / run_key(variant, clip)).is_dir() for variant in variants)
    assert run_key(profile, clip) == "82b53e8d51b22d84"


@pytest.mark.parametrize("home", [None, "home"])
def test_the_project_folder_is_the_one_named_or_the_checkout_and_the_current_one_elsewhere(tmp_path, home):
    package = tmp_path / "site-packages" / "patchsae"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "config.py").write_bytes((ROOT / "src" / "patchsae" / "config.py").read_bytes())
    named = {"PATCHSAE_HOME": str(tmp_path / home)} if home else {}
    ask = "import sys; from patchsae.config import ROOT; print(ROOT, 'torch' in sys.modules, 'numpy' in sys.modules)"
    for place, found in ((package.parent, tmp_path), (ROOT / "src", ROOT)):
        clean = {k: v for k, v in os.environ.items() if k != "PATCHSAE_HOME"} | named | {"PYTHONPATH": str(place)}
        asked = subprocess.run([sys.executable, "-c", ask], cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert asked.stdout.split() == [str(tmp_path / home if home else found), "False", "False"], asked.stderr
