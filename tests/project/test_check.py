"""What a profile needs is said before anything is computed; what is fetched is verified; the rehearsal is timed."""

import dataclasses
import json
import os
import subprocess
import sys
import time
import types

import numpy as np
import pandas as pd
import pytest
from conftest import one_sentence
from huggingface_hub import constants
from PIL import Image

from patchsae import load_profile
from patchsae.config import ROOT
from patchsae.data import benchmarks
from patchsae.data.datasets import open_dataset
from patchsae.data.masked import open_masked
from patchsae.project import check, fetch, plan, rehearsal, stamps
from patchsae.studies.sweep import published
from patchsae.weights.formats import file_sha256
from patchsae.world.scenes import CONCEPTS, KINDS, draw_scene


def files(root) -> dict:
    """Every file under a folder with its time, but for git's own."""
    found = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name != ".git"]
        found |= {os.path.join(folder, name): os.stat(os.path.join(folder, name)).st_mtime_ns for name in names}
    return found


def make(command: str, home) -> subprocess.CompletedProcess:
    """Call make for the paper profile on a machine that has fetched nothing."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "HF_"))}
    return subprocess.run(["make", command, "PROFILE=paper", f"PYTHON={sys.executable}"], cwd=ROOT, text=True,
                          env=clean | {"HF_HOME": str(home)}, capture_output=True)


def test_figures_without_weights_stop_with_the_list_and_write_nothing(tmp_path):
    before, start = files(ROOT), time.monotonic()
    result = make("figures", tmp_path)
    assert result.returncode != 0 and time.monotonic() - start < 60
    assert files(ROOT) == before and not list(tmp_path.iterdir())
    lines = [line.strip() for line in result.stderr.splitlines()]
    for name in ("clip-vit-base-patch16", "ImageNet (imagenet)"):
        place = next(i for i, line in enumerate(lines) if name in line)
        assert lines[place + 1].startswith("get it: ") and len(lines[place + 1]) > 20
    assert "make fetch PROFILE=paper" in result.stderr and "run_notebook" not in result.stdout
    assert "Traceback" not in result.stderr


def recorded(profile: str = "mini", seconds: float = 100, **values) -> pd.DataFrame:
    """Stamps of two notebooks of a profile."""
    row = {"seconds": seconds, "processor_seconds": 150, "peak_bytes": 2e9, "passes": 1.25,
           "gflops": 50.0, "machine": "here"} | values
    return pd.DataFrame([{"profile": profile, "notebook": name} | row for name in ("01_train_sae", "explorer")])


def test_report_names_everything(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HOME", "nowhere")
    monkeypatch.setattr(check, "STAMPS", tmp_path / "stamps.csv")
    for name in ("mini", "paper", "rehearsal"):
        profile = load_profile(name)
        text = check.report(profile)
        assert all(need.name in text for need in check.needs(profile)) and "make rehearsal records one" in text
        recorded().to_csv(tmp_path / "stamps.csv", index=False)
        text = check.report(profile)
        assert "01_train_sae" in text and "explorer" in text and "GFLOP/s" in text
        (tmp_path / "stamps.csv").unlink()
    few = dataclasses.replace(load_profile("paper").data, test_images=300)
    text = check.report(dataclasses.replace(load_profile("paper"), data=few))
    assert "Too few: 300 test images leave classes of imagenet (1000 classes), imagenet-sketch" in text
    assert "sun397 (397 classes) without any" in text and "dtd (" not in text
    assert all(need.there for need in check.needs(load_profile("mini")))
    assert not check.missing_lines(load_profile("mini"))


def test_hours_and_memory_are_those_of_the_recorded_run_scaled_by_the_rule():
    mini, paper = load_profile("mini"), load_profile("paper")
    same = stamps.estimate(mini, recorded(), 50)
    assert same["hours"].tolist() == pytest.approx([100 / 3600] * 2) and same["memory"].tolist() == [2, 2]
    assert stamps.estimate(mini, recorded(), 25)["hours"].iloc[0] == pytest.approx(200 / 3600)
    few = dataclasses.replace(mini, data=dataclasses.replace(mini.data, train_images=64, test_images=8))
    assert stamps.estimate(few, recorded(), 50).equals(same)  # nothing is scaled down
    twice = mini.with_sae(steps=2 * mini.sae.steps + (mini.data.train_images + mini.data.test_images) // 16)
    assert stamps.estimate(twice, recorded(), 50)["hours"].iloc[0] == pytest.approx(200 / 3600)
    larger, known = stamps.estimate(paper, recorded("rehearsal"), 50), stamps.size(load_profile("rehearsal"))
    assert stamps.size(paper)[:2] == pytest.approx((known.work * (20480 * 128 + 1331167) / 96, known.weights))
    assert larger["memory"].iloc[0] == pytest.approx(2 + 4e-9 * stamps.HELD * (128 - 4) * 197 * 49152)


def test_the_recorded_profile_nearest_in_size_is_scaled():
    both = pd.concat([recorded("mini", 100), recorded("rehearsal", 1)])
    assert stamps.estimate(load_profile("mini"), both, 50)["hours"].iloc[0] == pytest.approx(100 / 3600)
    assert stamps.estimate(load_profile("rehearsal"), both, 50)["hours"].iloc[0] == pytest.approx(1 / 3600)


def test_a_run_is_recorded_in_the_place_of_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setattr(stamps, "ROOT", tmp_path)
    monkeypatch.setattr(stamps, "rate", lambda: 12.34)
    place = tmp_path / "data" / "stamps.csv"
    with pytest.raises(FileNotFoundError) as error:
        stamps.record(load_profile("mini"), place)
    assert one_sentence(error.value)
    for name, seconds in (("mini", 5), ("rehearsal", 7), ("mini", 9)):
        (tmp_path / "build" / name).mkdir(parents=True, exist_ok=True)
        took = {"seconds": seconds, "processor_seconds": 8, "peak_bytes": 1e9, "passes": 2.5, "key": "k", "files": {}}
        (tmp_path / "build" / name / "01_train_sae.json").write_text(json.dumps(took))
        stamps.record(load_profile(name), place)
    table = pd.read_csv(place)
    assert table[["profile", "seconds", "gflops"]].values.tolist() == [["rehearsal", 7, 12.3], ["mini", 9, 12.3]]


def test_other_tasks_and_masks_are_named_and_stop_nothing(tmp_path, monkeypatch):
    """Notebooks show the tasks that are there; notebook 09 can do without masks, and one public set will do."""
    profile = load_profile("paper")
    monkeypatch.setattr(type(profile), "data_dir", property(lambda self: tmp_path))
    lines, rest = "\n".join(check.missing_lines(profile)), "\n".join(check.missing_lines(profile, stops=False))
    tasks = ("StanfordCars", "FGVCAircraft", "SUN397", "EuroSAT", "UCF101", "split_zhou_Caltech101.json", "CIFAR100")
    assert all(title in rest and title not in lines for title in tasks) and "ImageNet" in lines
    assert "masks in" in rest and "ADEChallengeData2016.zip" in rest and "masks" not in lines
    (tmp_path / "segmentation" / "oxford-pets").mkdir(parents=True)
    assert "masks in" not in "\n".join(check.missing_lines(profile, stops=False))
    assert not any("masks" in need.name for need in check.needs(load_profile("mini")))


def test_model_of_the_hub_is_there_when_its_cache_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    revision = "57c216476eefef5ab752ec549e440a49ae4ae5f3"
    folder = tmp_path / "models--openai--clip-vit-base-patch16" / "snapshots" / revision
    name = f"openai/clip-vit-base-patch16@{revision}"
    folder.mkdir(parents=True)
    for file in ("config.json", "preprocessor_config.json", "model.safetensors"):
        assert not has(name, tmp_path)
        (folder / file).write_text("{}")
    assert has(name, tmp_path) and not has(name.replace("16@", "32@"), tmp_path)
    assert check.model_file("data/mini/clip") and not check.model_file("data/nothing")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_weights_in_any_layout_is_there(tmp_path, file):
    assert not check.model_file(str(tmp_path))
    for name in ("config.json", file):
        (tmp_path / name).write_text("{}")
    assert check.model_file(str(tmp_path)) == tmp_path / file


def has(name, cache) -> bool:
    """Whether a model is found, looking in this cache alone."""
    from functools import partial

    from huggingface_hub import try_to_load_from_cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "try_to_load_from_cache", partial(try_to_load_from_cache, cache_dir=cache))
        return check.model_file(name) is not None


def test_a_named_autoencoder_that_is_not_there_is_missing(tmp_path):
    profile = load_profile("mini")
    for name, there in (("nothing/out.pt", False), (str(tmp_path), True), ("someone/autoencoder", True)):
        assert [need.there for need in check.needs(profile.with_sae(weights=name)) if name in need.name] == [there]


# Fetching

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has one model; what it states as the hash of the weights can be changed."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    stated = {"model.safetensors": file_sha256(folder / "model.safetensors")}

    def info(self, repository, revision, files_metadata):
        assert len(revision) == 40 and files_metadata
        large = [types.SimpleNamespace(rfilename=n, lfs=types.SimpleNamespace(sha256=h)) for n, h in stated.items()]
        return types.SimpleNamespace(siblings=[*large, types.SimpleNamespace(rfilename="config.json", lfs=None)])

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    monkeypatch.setattr(type(load_profile("paper")), "data_dir", property(lambda self: tmp_path / "data"))
    return stated


def test_fetched_files_are_verified_and_noted(hub, tmp_path):
    found = fetch.fetch_model(load_profile("paper"))
    assert json.loads((tmp_path / "data" / "fetched.json").read_text()) == found
    assert found["model.safetensors"] == hub["model.safetensors"] and set(found) == {"model.safetensors", "config.json"}
    hub["model.safetensors"] = "0" * 64
    with pytest.raises(ValueError) as error:
        fetch.fetch_model(load_profile("paper"))
    assert one_sentence(error.value) and "model.safetensors" in str(error.value)
    assert [path.name for path in (tmp_path / "snapshot").iterdir()] == ["config.json"]  # what was bad is fetched anew


def test_hub_out_of_reach_is_one_sentence(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    with pytest.raises(OSError) as error:
        fetch.fetch_model(load_profile("paper"))
    assert one_sentence(error.value) and "check the network" in str(error.value)


def test_what_the_hub_does_not_give_stops_nothing_else_and_much_is_asked_for(tmp_path, monkeypatch):
    """Model and ImageNet fail, CIFAR-100 comes; 155 GB start after a question alone."""
    asked, opened = [], []

    def open_hub(task, split):
        opened.append(task)
        if task == "imagenet":
            raise FileNotFoundError("The terms are to be accepted.")
        return range(5)

    monkeypatch.setattr(fetch, "open_hub", open_hub)
    monkeypatch.setattr(fetch, "on_this_machine", lambda task: False)
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "n")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: (_ for _ in ()).throw(OSError("down")))
    monkeypatch.setattr(type(load_profile("paper")), "data_dir", property(lambda self: tmp_path))
    with pytest.raises(OSError, match="1 of 14 could not") as error:
        fetch.run("paper")
    assert len(asked) == 1 and "imagenet is 155 GB" in asked[0] and "GB are free" in asked[0]
    assert "imagenet: not fetched; make fetch with YES=1" in str(error.value) and set(opened) == {"cifar100"}
    with pytest.raises(OSError, match="2 of 14 could not") as error:
        fetch.run("paper", yes=True)
    lines = str(error.value).splitlines()
    assert len(asked) == 1 and "imagenet: FAILED. The terms are to be accepted." in lines
    assert "cifar100: 10 images from the hub" in lines and any("caltech101: not on the hub" in line for line in lines)


def test_an_autoencoder_that_is_named_on_the_hub_is_fetched_too(tmp_path, monkeypatch):
    (tmp_path / "final.safetensors").write_bytes(b"")
    monkeypatch.setattr(fetch, "autoencoder_folder", lambda name: tmp_path)
    monkeypatch.setattr(fetch, "load_profile", lambda name: load_profile("mini").with_sae(weights="someone/sae"))
    lines = fetch.run("mini").splitlines()
    assert lines[:2] == ["data/mini/clip: there", "someone/sae: 1 files of the autoencoder from the hub"]


def test_images_of_the_hub_are_there_when_their_cache_is_whole(tmp_path, monkeypatch):
    """Wherever the cache is; what was cut while it was unpacked is not there."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    there = tmp_path / "uoft-cs___cifar100" / "default" / "0.0.0"
    for folder, whole in ((there / "aadb.incomplete", False), (there / "aadb", True)):
        folder.mkdir(parents=True)
        assert not benchmarks.on_this_machine("cifar100")
        (folder / "dataset_info.json").write_text("{}")
        assert benchmarks.on_this_machine("cifar100") == whole and not benchmarks.on_this_machine("imagenet")


def test_hash_of_the_weights_is_reported_and_a_changed_one_refused(tmp_path, monkeypatch):
    profile = load_profile("mini")
    digest = file_sha256(ROOT / "data" / "mini" / "clip" / "model.safetensors")
    assert check.weights_line(profile).endswith(f"{digest}, unverified, no hash of it is known")
    monkeypatch.setattr(type(profile), "data_dir", property(lambda self: tmp_path))
    (tmp_path / "fetched.json").write_text(json.dumps({"model.safetensors": digest}))
    assert check.weights_line(profile).endswith(f"{digest}, verified")
    (tmp_path / "fetched.json").write_text(json.dumps({"model.safetensors": "0" * 64}))
    with pytest.raises(ValueError) as error:
        check.weights_line(profile)
    assert one_sentence(error.value)


# The rehearsal

def test_drawn_images_are_in_folders_of_the_stated_classes(tmp_path, monkeypatch):
    profile = load_profile("rehearsal")
    data = dataclasses.replace(profile.data, train_images=16, test_images=8)
    shared = dataclasses.replace(profile.adaptation, images=4, shots=4)
    profile = dataclasses.replace(profile, data=data, adaptation=shared)
    monkeypatch.setattr(type(profile), "data_dir", property(lambda self: tmp_path))
    assert rehearsal.draw_images(profile) == 16 + 3 * 8 + 4 * 4 == len(list(tmp_path.rglob("*.png")))
    assert len(list((tmp_path / "images" / "nouns" / "train").iterdir())) == rehearsal.CLASSES
    assert Image.open(next(tmp_path.rglob("*.png"))).size == (224, 224)
    assert check.needs(profile)[1].there
    drawn = dataclasses.replace(profile, model=dataclasses.replace(profile.model, name="data/mini/clip"))
    train, test = (open_dataset(drawn, "nouns", split) for split in ("train", "test"))
    assert train.class_names == test.class_names and np.bincount(test.labels).tolist() == [2] * rehearsal.CLASSES


def test_drawn_masks_are_read_as_ade20k_is(tmp_path, monkeypatch):
    """A pixel shows its scene's noun, or else its background, at the place and under the name that were drawn."""
    profile = load_profile("rehearsal")
    monkeypatch.setattr(type(profile), "data_dir", property(lambda self: tmp_path))
    monkeypatch.setattr(rehearsal, "MASKED", {"training": 3, "validation": 2})
    assert rehearsal.draw_masks(profile) == 5
    for split, n in (("train", 3), ("test", 2)):
        ds = open_masked(profile, types.SimpleNamespace(image_size=224, grid=14), split)
        assert len(ds) == n and ds[0].image.shape == (224, 224, 3)
    number = int(ds.entries[0].path.stem.split("_")[1])
    drawn, found = draw_scene("nouns", 1, number), ds.scene(0)
    for kind in ("noun", "background"):
        for name in {CONCEPTS[kind][c] for c in np.unique(drawn.maps[KINDS.index(kind)]) if c >= 0}:
            whole = drawn.mask(kind, name).repeat(4, 0).repeat(4, 1)
            seen = found.mask("noun", name)[:, :]
            wanted = np.asarray(Image.fromarray(whole).resize((224, 224), Image.Resampling.NEAREST))
            hidden = np.zeros_like(seen) if kind == "noun" else wanted & (found.plane < len(CONCEPTS["noun"]))
            assert (seen == (wanted & ~hidden)).mean() > 0.97, name


def test_rehearsal_has_the_papers_dimensions():
    small, paper = load_profile("rehearsal"), load_profile("paper")
    assert stamps.size(small).weights == stamps.size(paper).weights
    for name in ("expansion", "l1", "learning_rate", "warmup", "ghost", "b_dec", "tokens"):
        assert getattr(small.sae, name) == getattr(paper.sae, name)
    assert small.model.layer == paper.model.layer
    largest = 4 * 197 * 49152 * max(small.sae.batch_images, small.data.batch_images)
    assert largest <= 155e6  # bytes, as the profile states


def test_rehearsal_reports_times_and_projects_them(monkeypatch):
    monkeypatch.setattr(rehearsal, "record", lambda profile: recorded(profile.name).drop(columns="machine"))
    text = rehearsal.report(load_profile("rehearsal"), load_profile("paper"))
    assert len(text.splitlines()) == 4 and text.count("2.0") == 3 and "nan" not in text
    assert text.splitlines()[-1].split()[:5] == ["all", "200", "300", "2.0", "2.50"]


def test_the_plan_names_passes_and_who_rides_in_each(monkeypatch):
    """At the paper's size at most five and a half passes, with given weights at most two and a half."""
    monkeypatch.setattr("patchsae.studies.study.has_masks", lambda profile: True)
    monkeypatch.setattr(plan, "has_masks", lambda profile: True)
    monkeypatch.setattr("patchsae.studies.study.device_bytes", lambda device: 80e9)
    paper = load_profile("paper")
    given = dataclasses.replace(paper, sae=dataclasses.replace(paper.sae, weights="out.pt"))
    found = list(plan.plan(paper))
    assert [p.what for p in found] == ["01 training", "02 statistics", "07 training", "07 adaptation", "09 naming"]
    assert found[0].riders == ("own", "class token", "layer 1", "layer 4", "layer 7", "seed 43")
    assert found[1].riders == found[0].riders[:-1] and found[0].images == (20480 + 8) * 128
    assert found[0].held == 6 * 4 * 4 * 2 * 768 * 49152
    for profile, most in ((paper, 5.5), (given, 2.5)):
        assert sum(p.images for p in plan.plan(profile)) / 1281167 <= most
    last = plan.lines(paper, 1000.0)[-1].split()
    assert last[:2] == ["all", "5.36"] and float(plan.lines(paper, 500.0)[-1].split()[2]) == pytest.approx(
        2 * float(last[2]), rel=1e-3)
    monkeypatch.setattr("patchsae.studies.study.device_bytes", lambda device: 8e9)
    assert [len(p.riders) for p in plan.plan(paper)][:3] == [3, 3, 5]


def test_published_tables_add_up():
    """Means that the card states, the harmonic means of MaPLe's table, and the improvement rates of Table 1."""
    table, maple = (published(name) for name in ("table1", "maple"))
    means = table.groupby("half")[["accuracy_clip", "accuracy_maple"]].mean().round(2)
    assert means.loc["base"].tolist() == [63.20, 75.75] and means.loc["novel"].tolist() == [69.40, 69.53]
    own = maple.groupby("method")[["base", "novel"]].mean()
    assert own.loc["MaPLe"].round(2).tolist() == [82.28, 75.14] and abs(own.loc["CLIP"] - [69.34, 74.22]).max() < 0.01
    harmonic = 2 * maple["base"] * maple["novel"] / (maple["base"] + maple["novel"])
    assert (harmonic - maple["harmonic_mean"]).abs().max() < 0.007
    base = table[table["half"] == "base"]
    rate = 100 * (base["accuracy_maple"] - base["accuracy_clip"]) / (100 - base["accuracy_clip"])
    assert (rate - base["improvement_rate"]).abs().max() < 0.01
    assert set(table["task"]) == set(maple["task"]) and len(table) == 22 and len(maple) == 44
