"""Concept recovery at its extremes and against loops: a perfect latent, a constant one, shuffled truth."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LAYER, WIDTH, random_sae
from scipy.special import softmax

from patchsae.studies import controls, recovery_sweep
from patchsae.studies.recovery import (
    BAR,
    Directions,
    Split,
    bootstrap_precision,
    concept_scores,
    image_recovery,
    latent_directions,
    one_to_one,
    read_split,
    recover,
    resamples,
    shared_concepts,
    transferred,
)
from patchsae.studies.scores import average_precision
from patchsae.studies.study import Study
from patchsae.world.dataset import SceneDataset

SCENES, PATCHES, CONCEPTS = 30, 9, 4


def world(seed, noise=0.0):
    """Tokens whose coordinate c says how much of a patch concept c covers, class tokens first."""
    rng = np.random.default_rng(seed)
    share = rng.choice([0, 0, 0, 0.3, 1.0], (SCENES, PATCHES, CONCEPTS)).astype(np.float32)
    z = np.zeros((SCENES, PATCHES + 1, WIDTH), np.float32)
    z[:, 1:, :CONCEPTS] = share + noise * rng.normal(size=share.shape)
    z[..., CONCEPTS:] = rng.normal(size=z[..., CONCEPTS:].shape)
    return Split(torch.from_numpy(z), share, [("noun", f"c{c}") for c in range(CONCEPTS)])


def directions(weight, **options):
    weight = torch.as_tensor(weight, dtype=torch.float32)
    return Directions(torch.zeros(len(weight)), weight, torch.zeros(weight.shape[1]), **options)


def test_perfect_latents_recover_everything():
    train, test = world(0), world(1)
    found = recover(directions(np.eye(WIDTH)), train, test, resamples(SCENES, 0, 20))
    table = found.table
    assert table["candidate"].tolist() == list(range(CONCEPTS))
    for column in ("auprc", "low", "high", "pointing", "one_to_one", "train_auprc"):
        assert table[column].tolist() == [1.0] * CONCEPTS, column
    assert (found.samples == 1).all()
    # Every patch that shows something is chosen, so the overlap is the share those patches are filled.
    for c in range(CONCEPTS):
        share = test.share[..., c]
        assert table["overlap"][c] == pytest.approx(max(share.sum() / (share > 0).sum(), (share == 1).sum() / (
            (share == 1).sum() + share[share < 1].sum())), abs=0.02)


def test_constant_candidates_have_the_chance_level():
    train, test = world(0), world(1)
    flat = Directions(torch.zeros(WIDTH), torch.zeros(WIDTH, 3), torch.ones(3))
    table = recover(flat, train, test, resamples(SCENES, 0, 20)).table
    np.testing.assert_allclose(table["auprc"], table["chance"])
    np.testing.assert_allclose(table["chance"], test.positives.mean(0))
    assert (table["auprc"] < BAR).all()


def test_shuffled_truth_is_chance():
    train, test = world(0), world(1)
    order = np.random.default_rng(2).permutation(SCENES * PATCHES)
    moved = test._replace(share=test.share.reshape(-1, CONCEPTS)[order].reshape(test.share.shape))
    table = recover(directions(np.eye(WIDTH)), train, moved, resamples(SCENES, 0, 20)).table
    np.testing.assert_allclose(table["auprc"], table["chance"], atol=0.12)


def test_matching_looks_at_training_scenes_alone():
    """A candidate that is perfect on the test scenes alone is not chosen."""
    train, test = world(0), world(1)
    train.z[..., 1:, 5], test.z[:, 1:, 5] = -1, test.z[:, 1:, 0]
    train.z[:, 1:, 0] *= torch.from_numpy(np.random.default_rng(0).random((SCENES, PATCHES)) > 0.3)
    test.z[..., 0] = 0
    table = recover(directions(np.eye(WIDTH)), train, test, resamples(SCENES, 0, 20)).table
    assert table["candidate"][0] == 0 and table["auprc"][0] == pytest.approx(table["chance"][0])


def test_scores_are_the_average_precision_of_each_pair():
    split, sae = world(3, 0.3), random_sae(WIDTH, 20, bias=-0.5)
    found = concept_scores(latent_directions(sae), split, chunk=7)
    with torch.no_grad():
        h = sae.encode(split.patches).numpy()
    for s in range(20):
        np.testing.assert_allclose(found[s], average_precision(h[:, s], split.positives), rtol=1e-5)


def test_dense_scores_keep_their_order_and_count_at_every_threshold():
    z = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0))
    weight = np.random.default_rng(0).normal(size=(WIDTH, 3))
    dense = directions(weight, sparse=False).scores(z)
    plain = z @ torch.as_tensor(weight, dtype=torch.float32)
    assert (dense > 0).all() and torch.equal(dense.argsort(0), plain.argsort(0))
    unit = directions(weight, sparse=False, unit=True)
    assert torch.allclose(unit.scores(z), unit.scores(7 * z), atol=1e-6)
    assert torch.equal(directions(weight).scores(z), plain.relu())


def test_one_to_one_matching_against_all_permutations():
    from itertools import permutations

    scores = np.random.default_rng(0).random((5, 3))
    best = max(permutations(range(5), 3), key=lambda p: sum(scores[s, c] for c, s in enumerate(p)))
    assert one_to_one(scores).tolist() == list(best)
    assert sorted(one_to_one(scores.T)) == [-1, -1, 0, 1, 2]


@pytest.mark.parametrize("levels", [None, 5])
def test_bootstrap_equals_precision_on_repeated_scenes(levels):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(SCENES, PATCHES)) if levels is None else rng.integers(-1, levels, (SCENES, PATCHES))
    positive = rng.random((SCENES, PATCHES)) < softmax(scores.astype(float), 0) * 8
    weights = resamples(SCENES, 5, 6)
    found = bootstrap_precision(scores.astype(float), positive, weights)
    for value, weight in zip(found, weights.astype(int)):
        rows = np.repeat(np.arange(SCENES), weight)
        expected = average_precision(scores[rows].ravel().astype(float), positive[rows].reshape(-1, 1))[0]
        assert value == pytest.approx(expected, rel=1e-5)
    assert (weights.sum(1) == SCENES).all()


def test_splits_keep_the_concepts_that_both_show(clip):
    few = [read_split(clip_of_scenes(), SceneDataset("nouns", split, n), LAYER, n) for split, n in
           (("train", 4), ("test", 6))]
    first, second = shared_concepts(*few)
    assert first.concepts == second.concepts and first.share.shape[-1] == len(first.concepts)
    assert first.positives.any(0).all() and second.positives.any(0).all()
    place = few[0].concepts.index(first.concepts[3])
    np.testing.assert_array_equal(first.share[..., 3], few[0].share[..., place])


def clip_of_scenes():
    """A random CLIP that takes scenes of 64 pixels in 64 patches."""
    from conftest import random_clip_model, tiny_processor
    from transformers import CLIPConfig, CLIPModel

    from patchsae.clip import Clip

    config = random_clip_model().config.to_dict()
    config["vision_config"] |= {"image_size": 64, "patch_size": 8}
    processor = tiny_processor()
    processor.size, processor.crop_size = {"shortest_edge": 64}, {"height": 64, "width": 64}
    torch.manual_seed(0)
    return Clip(CLIPModel(CLIPConfig(**config)), None, processor)


def test_transfer_follows_the_matched_candidate():
    train, test, there = world(0), world(1), world(4)
    both = directions(np.eye(WIDTH))
    home = recover(both, train, test, resamples(SCENES, 0, 20)).table
    there.z[:, 1:, 1] = 0
    table = transferred(both, home, there.only([0, 1]), resamples(SCENES, 0, 20))
    assert table["there"].tolist() == [1.0, pytest.approx(table["chance"][1])] and table["home"].tolist() == [1, 1]


def test_readings_of_whole_images():
    train, test = world(0), world(1)
    for split in (train, test):  # in every second image neither of the two is to be seen
        split.share[::2, :, 0] = split.share[1::2, :, 1] = 0
        split.z[:, 1:, :2] = torch.from_numpy(split.share[..., :2])
        split.z[:, 0, 0] = torch.from_numpy((split.share[..., 0] > 0).any(1)).float()
    table = image_recovery(directions(np.eye(WIDTH)), train.only([0, 1]), test.only([0, 1]))
    value = table.set_index(["tokens", "concept"])["auprc"]
    assert value["strongest patch", "c0"] == value["strongest patch", "c1"] == value["class token", "c0"] == 1
    assert value["class token", "c1"] < 0.8  # nothing in the class token says it


# Controls


def test_controls_have_as_many_candidates_as_they_say():
    split = world(0, 0.1)
    assert controls.neurons(split).weight.shape == (WIDTH, 2 * WIDTH)
    parts = controls.principal_components(split, 0)
    assert parts.weight.shape == (WIDTH, 2 * WIDTH)
    torch.testing.assert_close(parts.weight[:, :WIDTH].T @ parts.weight[:, :WIDTH], torch.eye(WIDTH), atol=1e-5, rtol=0)
    spread = ((split.patches - parts.centre) @ parts.weight[:, :WIDTH]).var(0)
    assert (spread[:-1] >= spread[1:] - 1e-5).all()
    centroids = controls.clusters(split, 6, 0)
    assert centroids.weight.shape == (WIDTH, 6)
    assert torch.equal(centroids.weight, controls.clusters(split, 6, 0).weight)


def test_neurons_are_coordinates_both_ways():
    split = world(0)
    scores = controls.neurons(split).scores(split.patches)
    for d in range(WIDTH):
        order = split.patches[:, d].argsort()
        assert (scores[order, d].diff() >= 0).all() and (scores[order, WIDTH + d].diff() <= 0).all()


def test_probe_is_a_ceiling():
    train, test = world(0, 0.05), world(1, 0.05)
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    train, test = (split._replace(z=split.z @ mixing) for split in (train, test))
    table = recover(controls.probe(train), train, test, resamples(SCENES, 0, 20)).table
    assert table["candidate"].tolist() == list(range(CONCEPTS)) and table["auprc"].min() > 0.97


@pytest.mark.parametrize("layer", [0, 1, LAYER, -1])
def test_hidden_neurons_are_those_of_the_block(clip, pixel_data, layer):
    split = Split(torch.zeros(5, 5, WIDTH), np.zeros((5, 4, 1), np.float32), [("noun", "a")])
    found, kept = controls.hidden_neurons(clip, pixel_data, layer, split), []
    handle = clip.blocks[layer].mlp.fc2.register_forward_hook(lambda module, inputs, output: kept.append(inputs[0]))
    clip.below(pixel_data.pixels[:5], layer)
    handle.remove()
    torch.testing.assert_close(found.z, kept[0], atol=1e-5, rtol=1e-4)


def test_shuffled_autoencoder_sees_the_same_coordinates(study):
    found = controls.shuffled_autoencoder(study)
    assert found.weight.shape == (WIDTH, 36) and found.weight.isfinite().all()
    assert not torch.equal(found.weight, controls.random_autoencoder(study).weight)


def test_more_centroids_than_tokens_are_as_many_as_tokens():
    few = Split(world(0).z[:1], world(0).share[:1], world(0).concepts)
    assert controls.clusters(few, 500, 0).weight.shape[1] == PATCHES


# Tables


@pytest.fixture
def study(clip, pixel_data, profile, tmp_path, monkeypatch):
    """Images and masks of a few tokens, everything written to a folder of its own."""
    monkeypatch.setattr("patchsae.config.ROOT", tmp_path)
    study = Study(profile)
    study.clip, study.images = clip, lambda task, split: pixel_data
    return study


@pytest.fixture
def few_methods(study, monkeypatch):
    """Three methods whose candidates are known, on scenes that are made up; what was computed, in order."""
    perfect, nothing = directions(np.eye(WIDTH)), directions(np.zeros((WIDTH, 3)))
    asked = []

    def methods(configuration, variant):
        def make(name, candidates):
            def method(_):
                asked.append((configuration, name, variant.profile.seed))
                return candidates
            return method
        return {name: make(name, perfect if name == "autoencoder" else nothing) for name in
                ("autoencoder", "k-means", "neurons")}

    monkeypatch.setattr(recovery_sweep, "splits", lambda _: [world(0), world(1, 0.1)])
    monkeypatch.setattr(recovery_sweep, "methods", methods)
    monkeypatch.setattr(recovery_sweep, "VARIANTS", {"lambda x2": {"l1": 2}})
    monkeypatch.setattr(recovery_sweep, "resamples", lambda n, seed: resamples(n, seed, 8))
    return asked


def test_methods_without_chance_come_with_the_first_seed(study):
    names = [group.names for group in recovery_sweep.groups(study)]
    default = [n for n in names if n["configuration"] == "default"]
    assert sum(n["method"] == "autoencoder" for n in default) == 3 == sum(n["method"] == "k-means" for n in default)
    assert sum(n["method"] in recovery_sweep.ONCE for n in default) == len(recovery_sweep.ONCE)
    assert {n["method"] for n in names if n["configuration"] == "expansion x2"} == {"autoencoder", "k-means"}
    assert {n["method"] for n in names if n["configuration"] == "layer 0"} == {"autoencoder"}
    given = study.variant(dataclasses.replace(study.profile, sae=dataclasses.replace(study.profile.sae, weights="a")))
    assert {group.names["seed"] for group in recovery_sweep.groups(given)} == {study.profile.seed}


def test_without_tables_what_needs_no_training_is_computed(study, few_methods):
    table, samples = recovery_sweep.tables(study)
    assert "make mini-artifacts" in table.attrs["note"] and not table.attrs["current"]
    assert few_methods == [("default", "autoencoder", 0), ("default", "neurons", 0)]
    together = recovery_sweep.intervals(table, samples).query("kind == 'together'").set_index("method")
    assert together["share"].to_dict() == {"autoencoder": 1, "neurons": 0}
    assert together.loc["neurons", "minus"] == 1
    assert [path.name for path in study.profile.data_dir.iterdir()] == ["run"]


def test_other_settings_stand_beside_the_committed_tables(study, few_methods):
    recovery_sweep.run(study)
    table, samples = recovery_sweep.tables(study)
    assert table.attrs["current"] and not table.attrs["note"] and len(set(few_methods)) == len(few_methods)
    before = {path.name: path.read_bytes() for path in study.profile.data_dir.glob("*.csv")}
    few_methods.clear()
    other = study.variant(study.profile.with_sae(l1=0.3))
    shown, drawn = recovery_sweep.tables(other)
    assert few_methods == [("default", "autoencoder", 0)] and "is shown as it is" in shown.attrs["note"]
    pd.testing.assert_frame_equal(shown[:len(table)], table)
    assert set(shown["configuration"][len(table):]) == {"these settings"}
    assert "these settings" in set(recovery_sweep.intervals(shown, drawn)["configuration"])
    assert before == {path.name: path.read_bytes() for path in study.profile.data_dir.glob("*.csv")}


def test_without_masks_tables_are_empty_and_say_so(study):
    data = dataclasses.replace(study.profile.data, source="folders")
    for table in recovery_sweep.tables(study.variant(dataclasses.replace(study.profile, data=data))):
        assert table.empty and "no masks" in table.attrs["note"]


def test_intervals_of_the_committed_tables():
    names = dict(configuration="default", key="k", kind="noun")
    table = pd.DataFrame([names | dict(method=m, seed=s, auprc=a, candidates=8, concept=c)
                          for m, values in (("autoencoder", (1, 1, 0.9, 0.5)), ("k-means", (0.1, 0.7, 0.1, 0.1)))
                          for (s, c), a in zip([(0, "a"), (0, "b"), (1, "a"), (1, "b")], values)])
    samples = pd.DataFrame([names | dict(method=m, seed=s) | {str(i): v for i in range(10)}
                            for m, s, v in (("autoencoder", 0, 1), ("autoencoder", 1, 0.5), ("k-means", 0, 0.5),
                                            ("k-means", 1, 0.0))])
    found = recovery_sweep.intervals(table, samples).set_index("method")
    assert found["share"].to_dict() == {"autoencoder": 0.75, "k-means": 0.25}
    assert found.loc["k-means", "minus"] == 0.5 and found.loc["autoencoder", "minus"] == 0
    assert found.loc["autoencoder", "low"] >= 0.5 and found.loc["autoencoder", "high"] <= 1
