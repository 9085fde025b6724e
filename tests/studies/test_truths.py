"""What shows that a task is what it claims: a readout without positions, hits within halves, the committed table."""

import dataclasses

import pandas as pd
import pytest
import torch
from conftest import random_sae

from patchsae import load_profile
from patchsae.config import ROOT
from patchsae.studies import truths
from patchsae.studies.study import Study, open_study
from patchsae.world.dataset import SceneDataset
from patchsae.world.scenes import TRUTHS, class_names


@pytest.fixture
def small(clip):
    """A study of the tiny CLIP and few scenes."""
    study = Study(load_profile("mini"))
    study.clip, study.sae = clip, random_sae()
    study.images = lambda task, split: SceneDataset(task, split, 48)
    return study


def test_a_summary_has_no_positions():
    tokens = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    seen = truths.summary(tokens)
    moved = torch.cat([tokens[:, :1], tokens[:, [3, 1, 4, 2]]], 1)
    assert seen.shape == (3, 12)
    torch.testing.assert_close(truths.summary(moved), seen)
    assert torch.equal(seen[:, 8:], tokens[:, 0]) and (seen[:, 4:8] >= seen[:, :4]).all()


def test_hits_choose_among_the_classes_of_a_half():
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(40) % 6
    for classes in (range(3), range(3, 6), range(6)):
        expected = [max(classes, key=lambda c: logits[i, c].item()) == labels[i].item()
                    for i in range(40) if labels[i].item() in classes]
        assert truths.hits(logits, labels, classes).tolist() == expected


def test_a_row_has_what_the_table_is_asked_for(small):
    row = truths.truth_rows(small, "colour_rows").iloc[0]
    assert list(row.index) == ["truth", "base_zero_shot", "base_chance", "readout", "readout_z", "chance"]
    assert row["truth"] == "new" and row["chance"] == 0.25 and row["base_chance"] == 0.5
    assert all(0 <= row[name] <= 1 for name in ("base_zero_shot", "readout", "readout_z"))
    key = truths.groups(small)[0].key
    small.sae = random_sae(seed=9)
    assert truths.groups(small)[0].key != key


def test_only_drawn_scenes_have_the_table(small):
    other = dataclasses.replace(small.profile, data=dataclasses.replace(small.profile.data, source="folders"))
    table = truths.table(Study(other))
    assert table.empty and not table.attrs["current"] and table.attrs["note"].endswith("left out.")


def test_every_committed_task_is_what_it_claims():
    study = open_study("mini")
    table = truths.table(study)
    assert table.attrs["current"] and table["task"].tolist() == list(TRUTHS)
    # Names that say nothing are a fixed, wrong map: that scatters round chance by more than the images do.
    assert (table["base_zero_shot"] <= 0.6).all() and (table["base_zero_shot"] >= table["base_chance"] - 0.1).all()
    best = table[["readout", "readout_z"]].max(axis=1)
    new, remap, mixed = (table["truth"] == truth for truth in ("new", "remap", "mixed"))
    assert (best[new] <= table["chance"][new] + truths.TOLD).all()
    assert (table["readout"][remap] >= 0.9).all() and (table["readout_z"][remap] >= 0.7).all()
    assert (best[mixed] > table["chance"][mixed] + truths.TOLD).all() and (best[mixed] < 0.8).all()
    assert (table["chance"] == [1 / len(class_names(task)) for task in table["task"]]).all()
    assert pd.read_csv(ROOT / "data/mini/tasks.csv").columns[:3].tolist() == ["task", "key", "truth"]
