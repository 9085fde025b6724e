"""A profile for somebody's own images and model; what its runs leave is put back; commands answer in a sentence."""

import os
import shutil
import subprocess
import sys
import tomllib

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SIDE, one_sentence, random_sae
from PIL import Image

from patchsae import config, load_profile, sae_loss
from patchsae.activations import pixel_batches
from patchsae.clip import load_clip
from patchsae.data.datasets import open_dataset
from patchsae.project import check, new, reset
from patchsae.project.ask import agreed
from patchsae.world.scenes import draw_scene

CLASSES = ("big cat", "bee", "Käfer", "hot_dog", "ship", "tree")


@pytest.fixture(scope="module")
def model(tmp_path_factory, clip) -> str:
    """The tiny CLIP as a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny clip"
    for part in (clip.model, clip.tokenizer, clip.processor):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A project folder of its own."""
    for room in (config, new, reset):
        monkeypatch.setattr(room, "ROOT", tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def images(tmp_path):
    """Six classes of six images, of every mode that photographs come in."""
    rng, kinds = np.random.default_rng(3), (("L", "png"), ("CMYK", "jpg"), ("RGBA", "PNG"), ("P", "gif"), ("1", "tif"))
    for name in CLASSES:
        (tmp_path / "my pets" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (*rng.integers(24, 40, 2), 3), dtype=np.uint8)
            mode, ending = kinds[i % len(kinds)]
            Image.fromarray(pixels).convert(mode).save(tmp_path / "my pets" / name / f"Bild ü{i}.{ending}")
    notes = Image.Exif()
    notes[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "my pets" / "bee" / "rotated.jpeg", exif=notes)
    return tmp_path / "my pets"


def written(images, model, name="pets", masks="") -> str:
    """What is said when a profile is written."""
    return new.run(name, str(images), model, masks, True)


def refused(images, model, name="pets", masks="") -> str:
    """The sentence with which a profile is refused; none is written."""
    with pytest.raises((ValueError, OSError)) as error:
        written(images, model, name, masks)
    assert one_sentence(error.value) and not (config.ROOT / "profiles").exists()
    return str(error.value)


def test_a_profile_is_written_and_opens_what_it_says(images, model, capsys):
    (images / "bee" / "broken.png").write_bytes(b"no image")
    (images / "stray.jpg").write_bytes(b"of no class")
    (images / "bee" / "IMG_1.HEIC").write_bytes(b"of another kind")
    last, said = written(images, model), capsys.readouterr().out
    assert last.endswith("patchsae train --profile pets")
    for words in ("6 classes, 30 images to train on and 7 to test on", "split by content", "broken.png", "stray.jpg",
                  ".heic", "4 blocks of width 12 and takes 16 pixels", "09_measured_interpretability"):
        assert words in said, words
    profile = load_profile("pets")
    assert profile.data.images == str(images) and profile.adaptation.tasks == ("pets",)
    train, test = (open_dataset(profile, "pets", split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("Käfer", "bee", "big cat", "hot dog", "ship", "tree")
    assert len(train) + len(test) == 38 and train[0].image.shape == (SIDE, SIDE, 3)
    opened = load_clip(profile.model.name)
    read = sum(len(batch.labels) for ds in (train, test) for batch in pixel_batches(opened, ds, 8))
    assert read == 37 and len(train.unreadable) + len(test.unreadable) == 1
    assert not check.missing_lines(profile)
    assert all(opened.block(layer) < opened.block(profile.model.layer) for layer in profile.model.other_layers)


def test_the_same_again_is_no_conflict_and_something_else_is(images, model):
    written(images, model)
    text = (config.ROOT / "profiles" / "pets.toml").read_text()
    written(images, model)
    (config.ROOT / "profiles" / "pets.toml").write_text(text.replace("seed = 0", "seed = 1"))
    with pytest.raises(ValueError, match="is there already") as error:
        written(images, model)
    assert one_sentence(error.value)
    assert "seed = 1" in (config.ROOT / "profiles" / "pets.toml").read_text()


def test_folders_inside_the_project_are_named_from_there(images, model, home):
    shutil.copytree(images, home / "photos" / "train")
    shutil.copytree(model, home / "clip")
    written("photos", "clip")
    profile = load_profile("pets")
    assert (profile.data.images, profile.model.name) == ("photos/train", "clip")
    assert len(open_dataset(profile, "pets", "train")) == 31


def test_images_that_cannot_be_used_are_refused_by_name(images, model, tmp_path):
    assert "nowhere" in refused(images / "nowhere", model)
    assert "one folder per class" in refused(images / "bee", model)
    one = tmp_path / "one"
    shutil.copytree(images / "bee", one / "bee")
    assert "one class alone, 'bee'" in refused(one, model)
    (one / "ant").mkdir()
    shutil.copy(images / "bee" / "rotated.jpeg", one / "ant" / "a.jpg")
    assert "'ant'" in refused(one, model)
    split = tmp_path / "split"
    for name in ("train", "val"):
        shutil.copytree(images, split / name)
    shutil.rmtree(split / "val" / "ship")
    assert "'ship' is in" in refused(split, model)
    (split / "val" / "Ship").mkdir()
    shutil.copy(images / "bee" / "rotated.jpeg", split / "val" / "Ship" / "a.jpg")
    assert "alone" in refused(split, model)
    shutil.copytree(images / "bee", images / "hot dog")
    assert "Two folders" in refused(images, model)
    shutil.rmtree(images / "hot dog")
    for i in range(2):
        (images / "bee" / f"broken {i}.png").write_bytes(b"no image")
    assert "2 of 39 images cannot be read" in refused(images, model)


def test_names_models_and_masks_that_cannot_be_used_are_refused(images, model, tmp_path):
    for name in ("", "../x", "a/b", "x.toml", "a b", "mini", "paper"):
        assert name in refused(images, model, name)
    assert "nothing here" in refused(images, model, masks="nothing here")
    assert "no clip" in refused(images, str(tmp_path / "no clip"))


def test_a_model_without_text_is_allowed_and_said(images, model, tmp_path, capsys):
    silent = tmp_path / "silent"
    shutil.copytree(model, silent)
    for path in silent.glob("*token*"):
        path.unlink()
    written(images, str(silent))
    said = capsys.readouterr().out
    assert "no tokenizer" in said and said.count("for want of text") == 2
    assert load_profile("pets").adaptation.tasks == ()


def test_masks_are_named_and_said(images, model, tmp_path, capsys):
    (tmp_path / "masks").mkdir()
    written(images, model, masks=str(tmp_path / "masks"))
    assert "how well latents match the masks" in capsys.readouterr().out
    assert load_profile("pets").data.masks == str(tmp_path / "masks")


def test_nothing_is_written_without_an_answer(images, model, home, monkeypatch):
    for answer in ("", "n", "no", "yep"):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        assert new.run("pets", str(images), model, "", False) == "Nothing was written." and not home.exists()
    monkeypatch.setattr("builtins.input", lambda question: " Yes ")
    assert agreed("?") and "is written" in new.run("pets", str(images), model, "", False)
    monkeypatch.setattr("builtins.input", lambda question: (_ for _ in ()).throw(EOFError))
    assert not agreed("?")


# Rules

def test_lambda_does_not_depend_on_the_length_of_the_tokens():
    """Both terms of equation 1 grow as z does: the best lambda for z is the best one for 7 z."""
    z, one, seven = torch.randn(5, 6, 12), random_sae(), random_sae()
    for bias in (seven.b_enc, seven.b_dec):
        bias.data *= 7
    small, large = (sae_loss(sae, scale * z, l1=1e-2) for sae, scale in ((one, 1), (seven, 7)))
    assert large.mse.item() == pytest.approx(7 * small.mse.item(), rel=1e-4)
    assert large.l1.item() == pytest.approx(7 * small.l1.item(), rel=1e-4)
    assert new.starting_l1(12, 7.0, 14.0) == new.starting_l1(12, 1.0, 2.0)


def test_rules_give_about_the_settings_of_mini_and_of_the_paper(tmp_path):
    scenes = [draw_scene("nouns", 0, i).image for i in range(24)]
    for i, image in enumerate(scenes):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    mini, paper = load_profile("mini").sae, load_profile("paper").sae
    tower = new.look_at_model(load_clip(str(config.PROFILES.parents[2] / "data/mini/clip")), sorted(tmp_path.glob("*")))
    l1, share = new.starting_l1(tower.width, tower.spread, tower.length), tower.spread / tower.length
    assert l1 == pytest.approx(mini.l1, rel=0.12) and tower.spread == pytest.approx(new.SPREAD, rel=0.1)
    # Of the paper's model, the share of its tokens' length that varies is assumed to be mini's.
    assert new.starting_l1(768, share, 1.0) == pytest.approx(paper.l1, rel=0.12)
    assert new.starting_rate(128, mini.steps) == pytest.approx(mini.learning_rate, rel=0.05)
    assert new.starting_rate(768, paper.steps) == pytest.approx(paper.learning_rate, rel=0.35)


def test_settings_fit_the_size_of_data_and_model():
    small = new.Tower(128, 65, 6, 4, 64, -2, 44.0, 36.7)
    large = new.Tower(768, 197, 12, 12, 224, -2, 44.0, 36.7)
    few, many = new.fitting(small, 288, 72, False), new.fitting(small, 100_000, 5000, False)
    assert few["steps"] == 3000 and few["n_latents"] == 256 and few["batch_images"] == 16
    assert many["train_images"] == 4096 and many["test_images"] == 1024 and many["n_latents"] > few["n_latents"]
    cpu, gpu = new.fitting(large, 288, 72, False), new.fitting(large, 1_281_167, 50_000, True)
    assert cpu["steps"] == 500 and cpu["batch_images"] == 5
    assert gpu["n_latents"] == 49_152 and gpu["batch_images"] == 128 and 15_000 < gpu["steps"] <= 20_480
    assert gpu["train_images"] == 1_281_167 and gpu["pass_images"] * 197 * 49_152 <= 2**26


@pytest.mark.parametrize("l0, ev, words", [(11, 0.8, "usual"), (60, 0.9, "raise"), (2, 0.8, "lower"),
                                           (9, 0.3, "lower")])
def test_a_training_says_which_way_to_turn_lambda(l0, ev, words):
    log = pd.DataFrame({"l0": [500] * 90 + [l0] * 10, "ev": [0.0] * 90 + [ev] * 10})
    assert words in new.judgement(log, 128) and f"{l0:.1f}" in new.judgement(log, 128)


# Putting back

@pytest.fixture
def repository(home):
    """A repository with data and figures of the mini profile, and what a run left."""
    files = {"data/mini/table.csv": "1", "data/mini/clip/model": "w", "figures/mini/a.png": "a",
             ".gitignore": "data/*/run/\nbuild/\nfigures/own/\ndata/own/\n", "notebooks/x": "x"}
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], cwd=home, check=True)
    (home / "data/mini/table.csv").write_text("2")
    (home / "data/mini/clip/model").unlink()
    for name in ("data/mini/run/sae/log.csv", "figures/mini/new.png", "build/mini/x.json", "build/own/x.json",
                 "figures/own/a.png", "data/own/run/x", "data/own/images/cat/1.png"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("made")
    (home / "notebooks/x").write_text("mine")
    return home


def test_reset_puts_a_profile_back_and_leaves_the_rest(repository, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda question: "")
    assert reset.run("mini", False) == "Nothing was changed." and (repository / "data/mini/run").exists()
    listed = capsys.readouterr().out
    assert "put back data/mini/table.csv" in listed and "remove data/mini/run" in listed and "own" not in listed
    assert reset.run("mini", True) == "2 files are put back, 3 files and folders removed."
    clean = subprocess.run(["git", "status", "--porcelain"], cwd=repository, capture_output=True, text=True).stdout
    assert clean == " M notebooks/x\n" and (repository / "figures/own/a.png").exists()
    assert not (repository / "data/mini/run").exists() and (repository / "build").exists()
    assert "as it was" in reset.run("mini", True)


def test_reset_of_ones_own_profile_keeps_its_images(repository, images, model):
    written(images, model, "own")
    assert "0 files are put back, 3" in reset.run("own", True)
    assert (repository / "data/own/images/cat/1.png").exists() and not (repository / "figures/own").exists()
    assert (repository / "data/mini/table.csv").read_text() == "2" and (repository / "profiles/own.toml").exists()


def test_reset_without_a_repository_removes_runs_alone(home):
    for name in ("data/mini/run/x", "data/mini/table.csv", "figures/mini/a.png"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("2")
    assert "0 files are put back, 1" in reset.run("mini", True)
    assert (home / "data/mini/table.csv").exists() and (home / "figures/mini/a.png").exists()


# The command line

def test_help_computes_nothing():
    from patchsae.__main__ import COMMANDS

    code = """import sys
from patchsae.__main__ import COMMANDS, main
for command in ([], *([name] for name in COMMANDS)):
    try:
        main([*command, "--help"])
    except SystemExit as end:
        assert end.code == 0, command
assert not {"torch", "transformers", "numpy"} & set(sys.modules), sorted(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: patchsae") == 1 + len(COMMANDS)


@pytest.mark.parametrize("command", ["train", "latents", "cache", "check", "fetch", "dashboard", "reset", "artifacts"])
def test_an_unknown_profile_is_a_sentence_in_every_command(command, monkeypatch, capsys):
    from patchsae.__main__ import main

    for arguments, variable in (([command, "--profile", "nonsense"], "mini"), ([command], "nonsense")):
        monkeypatch.setenv("PROFILE", variable)
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert "nonsense" in str(error.value) and one_sentence(error.value)


def test_a_package_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    from patchsae.__main__ import EXTRAS, main

    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "patchsae.app.dashboard", raising=False)
    with pytest.raises(SystemExit, match=r"jinja2.*dashboard.*'patchsae\[app\]'") as error:
        main(["dashboard", "--profile", "mini"])
    assert one_sentence(error.value)
    project = tomllib.loads((config.PROFILES.parents[2] / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS.values()) <= set(project["optional-dependencies"])


def test_new_and_reset_run_from_make(tmp_path):
    root = config.PROFILES.parents[2]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-n", "new", "NAME=pets", f"IMAGES={tmp_path}/my pets", "MASKS=m", "YES=1", "PYTHON=python"]
    line = subprocess.run(command, cwd=root, env=clean, capture_output=True, text=True).stdout.replace("\\\n\t\t", "")
    assert f'new "pets" --images "{tmp_path}/my pets"' in line and '--masks "m" --yes' in line and "--model" not in line
    line = subprocess.run(["make", "-n", "reset", "PYTHON=python"], cwd=root, env=clean, capture_output=True, text=True)
    assert line.stdout.strip().endswith("patchsae reset")
