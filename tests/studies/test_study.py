"""Opening a profile: what is there is shown, what is not is named."""

import dataclasses

import numpy as np
from conftest import SIDE
from PIL import Image

from patchsae import open_study
from patchsae.config import load_profile


def put(folder, classes=("cat", "dog")):
    """Four images of each class, in a folder each."""
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((SIDE, SIDE, 3), 40 * place + i, np.uint8)).save(folder / name / f"{i}.png")


def test_tasks_without_images_are_left_out_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("patchsae.config.ROOT", tmp_path)
    mini = load_profile("mini")
    data = dataclasses.replace(mini.data, source="folders", task="pets", transfer=("owls", "toys"))
    profile = dataclasses.replace(
        mini, name="pets", data=data, adaptation=dataclasses.replace(mini.adaptation, tasks=("pets", "toys", "cars")))
    for task in ("pets", "toys"):
        put(tmp_path / "data/pets/images" / task)
    study = open_study(profile)
    assert study.absent == ["owls", "cars"] and "owls, cars" in capsys.readouterr().out
    assert study.profile.data.transfer == ("toys",) and study.profile.adaptation.tasks == ("pets", "toys")


def test_a_task_of_tests_alone_needs_no_training_images(tmp_path, monkeypatch):
    monkeypatch.setattr("patchsae.config.ROOT", tmp_path)
    mini = load_profile("mini")
    data = dataclasses.replace(mini.data, source="folders", task="pets", transfer=("owls",))
    adaptation = dataclasses.replace(mini.adaptation, tasks=())
    put(tmp_path / "data/pets/images/owls/test")
    profile = dataclasses.replace(mini, name="pets", data=data, adaptation=adaptation)
    assert not open_study(profile).absent
    also_trained = dataclasses.replace(profile, adaptation=dataclasses.replace(adaptation, tasks=("owls",)))
    assert open_study(also_trained).absent == ["owls"]


def test_where_all_is_there_the_profile_stays_as_it_is():
    profile = load_profile("mini")
    study = open_study(profile)
    assert study.profile == profile and not study.absent
