"""Tables over tasks of known truth: their models, their keys, and that every row says what it should."""

import dataclasses
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_sae

from patchsae.config import MethodSettings
from patchsae.studies import truth_sweep
from patchsae.studies.adapt import METHODS, UNTRAINED, Recipe, adaptation_key, adapted_model, halves
from patchsae.studies.diffing import CHANGED, read_tokens
from patchsae.studies.recovery import Split
from patchsae.studies.study import Study
from patchsae.world.dataset import SceneDataset
from patchsae.world.scenes import CONCEPTS, TRUTHS

SOURCES = ["latents", "z", "class token"]
TASK = "colour_rows"


@pytest.fixture
def small(clip, profile, tmp_path, monkeypatch):
    """A study of the tiny CLIP, few scenes and few steps, writing elsewhere."""
    monkeypatch.setattr("patchsae.config.ROOT", tmp_path)
    monkeypatch.setattr(truth_sweep, "STEPS", 10)
    short = MethodSettings(learning_rate=0.05, epochs=1, least_steps=0, batch_images=4)
    settings = dataclasses.replace(profile.adaptation, shots=3, depth=2, images=32)
    methods = dict.fromkeys(("maple", "coop", "lora", "fine_tuning"), short)
    return study_of(dataclasses.replace(profile.with_sae(k=2), adaptation=settings, **methods), clip)


def study_of(profile, clip):
    study = Study(profile)
    study.clip, study.sae = clip, random_sae(n_latents=24, bias=0.3)
    study.images = lambda task, split: SceneDataset(task, split, 48)
    return study


# Readouts -----------------------------------------------------------------------------------------------

def test_what_a_source_tells_is_read_from_it_alone():
    numbers = torch.Generator().manual_seed(0)
    labels, truth = torch.arange(60) % 4, torch.arange(40) % 4
    fitted = {"told": torch.eye(4)[labels], "noise": torch.randn(60, 4, generator=numbers)}
    tested = {"noise": torch.randn(40, 4, generator=numbers), "told": torch.eye(4)[truth]}
    table = truth_sweep.readout_rows(fitted, labels, tested, truth)
    assert list(table.columns) == ["source", "n", "accuracy", "low", "high"]
    assert table["source"].tolist() == ["told", "noise"] and (table["n"] == 40).all()
    assert table["accuracy"][0] == 1 and table["accuracy"][1] < 0.6
    assert (table["low"] <= table["accuracy"]).all() and (table["accuracy"] <= table["high"]).all()
    wrong = truth_sweep.readout_rows(fitted, labels, tested, (truth + 1) % 4)
    assert wrong["accuracy"][0] == 0


def test_readouts_see_summaries_of_latents_and_tokens_and_the_finished_class_token(small, clip):
    ds = small.images(TASK, "train")
    seen = read_tokens(clip, ds, small.layer)
    told = truth_sweep.told_of(clip, small.sae, seen, small.layer)
    assert list(told) == SOURCES
    for name, x in (("latents", small.sae.encode(seen.z).detach()), ("z", seen.z)):
        expected = torch.stack([torch.cat([image[1:].mean(0), image[1:].max(0).values, image[0]]) for image in x])
        torch.testing.assert_close(told[name], expected)
    torch.testing.assert_close(told["class token"], clip.above(seen.z, small.layer))


def test_prompts_stand_beside_the_tokens_whose_class_token_is_read(small):
    tower = adapted_model(Recipe(small, TASK, UNTRAINED, 1)).tower
    ds = small.images(TASK, "train")
    seen = read_tokens(tower, ds, small.layer)
    assert seen.prompts.shape[1] == 2
    told = truth_sweep.told_of(tower, small.sae, seen, small.layer)["class token"]
    torch.testing.assert_close(told, tower.above(torch.cat([seen.z, seen.prompts], 1), small.layer))
    alone = tower.above(seen.z, small.layer)
    assert not torch.allclose(told, alone, atol=1e-3)


def test_images_of_a_task_are_those_of_its_base_half(small):
    for ds, split in zip(truth_sweep.base_images(small, TASK), ("train", "test")):
        whole = small.images(TASK, split)
        base, most = halves(whole)["base"], 32 if split == "train" else 48
        assert ds.labels.tolist() == [label for label in whole.labels[:most] if label in base]
        assert ds.class_names == whole.class_names[:len(base)]


# Rows ---------------------------------------------------------------------------------------------------

CHANGES = ["R", "low", "high", "ev_clip", "ev_frozen", "ev_data", "ev_model", "R_stage", "readable_stage", "pearson",
           "pearson_log", "spearman", "enter", "leave"]
CROSSCODERS = ["ev", "before", "after", "before_by_norm", "after_by_norm", "changed", "patched_most", "patched_rest",
               "patched_matched", "patched_low", "patched_high"]


def test_rows_of_an_adapted_model_have_what_they_are_asked_for(small):
    readouts, changes = truth_sweep.latent_rows(Recipe(small, TASK, "fine-tuning", 1))
    assert readouts["source"].tolist() == 2 * SOURCES and readouts["fitted"].tolist() == ["shots"] * 3 + ["all"] * 3
    assert (readouts["n"] == len(truth_sweep.base_images(small, TASK)[1])).all()
    row, = changes.to_dict("records")
    assert list(row) == CHANGES and np.isfinite(list(row.values())).all()
    assert row["low"] <= row["R"] <= row["high"] and 0 <= row["readable_stage"] <= 1
    assert 0 <= row["enter"] <= 1 and 0 <= row["leave"] <= 1


def test_a_tower_that_is_not_changed_changes_nothing(small):
    before = [read_tokens(small.clip, ds, small.layer) for ds in truth_sweep.base_images(small, TASK)]
    row = truth_sweep._changes(small, before, before)
    assert np.isnan(row["R"]) and row["ev_clip"] == row["ev_frozen"] and row["ev_data"] == row["ev_model"]
    assert np.isclose(row["pearson"], 1) and row["enter"] == row["leave"] == 0


def test_changes_before_and_after_are_not_confused(small):
    before = [read_tokens(small.clip, ds, small.layer) for ds in truth_sweep.base_images(small, TASK)]
    after = [tokens._replace(z=tokens.z * 3) for tokens in before]
    row = truth_sweep._changes(small, before, after)
    assert row["ev_clip"] == truth_sweep.explained(small.sae, before[1].z)
    assert row["ev_frozen"] == truth_sweep.explained(small.sae, after[1].z)
    steps = dataclasses.replace(small.profile.sae, steps=2000)
    small.profile = dataclasses.replace(small.profile, sae=steps)
    trained = truth_sweep._changes(small, before, after)
    assert trained["ev_model"] > max(trained["ev_data"], row["ev_model"]) and trained["ev_frozen"] == row["ev_frozen"]


def test_latents_that_enter_and_leave_are_shares_of_the_first_ranks(small, monkeypatch):
    before = [read_tokens(small.clip, ds, small.layer) for ds in truth_sweep.base_images(small, TASK)]
    counts = iter([torch.arange(24).flip(0).repeat(2, 1) + 1, torch.arange(24).roll(1).repeat(2, 1) + 1])
    monkeypatch.setattr(truth_sweep, "_class_counts", lambda study, tokens: next(counts))
    monkeypatch.setattr(truth_sweep, "HIGH", 4 / 24)
    row = truth_sweep._changes(small, before, before)
    # First ranks: latents 0 to 3, then 0 and 21 to 23; of the first, 1 to 3 are last afterwards.
    assert row["leave"] == row["enter"] == 3 / 4


def test_what_is_fitted_sees_training_images_alone(small, monkeypatch):
    seen = [read_tokens(small.clip, ds, small.layer) for ds in truth_sweep.base_images(small, TASK)]
    fitted, counted = [], []
    after, count = [tokens._replace(z=tokens.z + 1) for tokens in seen], truth_sweep._class_counts

    def continued(sae, z, settings, steps):
        fitted.append((z, steps))
        return sae

    monkeypatch.setattr(truth_sweep.diffing, "continued", continued)
    monkeypatch.setattr(truth_sweep, "_class_counts", lambda study, some: counted.append(some) or count(study, some))
    truth_sweep._changes(small, seen, after)
    steps = round(truth_sweep.STAGE * small.profile.sae.steps)
    assert [(id(z), n) for z, n in fitted] == [(id(seen[0].z), steps), (id(after[0].z), steps)]
    assert [id(some) for some in counted] == [id(seen[0]), id(after[0])]


def test_readouts_of_shots_are_of_shots_whatever_the_model_learned_from(small):
    tokens = [read_tokens(small.clip, ds, small.layer) for ds in truth_sweep.base_images(small, TASK)]
    few = Recipe(small, TASK, "lora", 1)
    found = [truth_sweep._readouts(recipe, small.clip, *tokens) for recipe in (few, few._replace(images="all"))]
    pd.testing.assert_frame_equal(*found)


def test_activations_are_counted_by_class(small):
    tokens = read_tokens(small.clip, truth_sweep.base_images(small, TASK)[0], small.layer)
    counts, h = truth_sweep._class_counts(small, tokens), small.sae.encode(tokens.z)
    for c in range(2):
        assert counts[c].tolist() == (h[tokens.labels == c] > small.profile.latents.tau).sum((0, 1)).tolist()


def test_rows_of_clip_itself_have_floors_and_no_change(small):
    readouts, changes = truth_sweep.latent_rows(Recipe(small, TASK, "zero-shot"))
    assert readouts["source"].tolist() == 2 * SOURCES + ["untrained tower", "pixels"]
    assert readouts["fitted"].tolist() == ["shots"] * 3 + ["all"] * 5
    seen = read_tokens(small.clip, truth_sweep.base_images(small, TASK)[1], small.layer)
    assert list(changes.columns) == ["ev_clip"] and changes["ev_clip"][0] == truth_sweep.explained(small.sae, seen.z)


def test_explained_variance_is_that_of_patch_tokens():
    sae, z = random_sae(), torch.randn(6, 5, 12, generator=torch.Generator().manual_seed(0))
    patches = z[:, 1:].reshape(-1, 12)
    left = sum((token - sae(token)).square().sum().item() for token in patches)
    whole = sum((token - patches.mean(0)).square().sum().item() for token in patches)
    assert truth_sweep.explained(sae, z) == pytest.approx(1 - left / whole, rel=1e-5)
    z[:, 0] += 100
    assert truth_sweep.explained(sae, z) == pytest.approx(1 - left / whole, rel=1e-5)


@pytest.mark.parametrize("method", [UNTRAINED, "lora"])
def test_a_row_of_a_crosscoder_has_what_it_is_asked_for(small, method):
    table = truth_sweep.crosscoder_rows(Recipe(small, TASK, method, 1))
    row, = table.to_dict("records")
    assert list(row) == CROSSCODERS and np.isfinite(list(row.values())).all()
    assert row["patched_low"] <= row["patched_matched"] <= row["patched_high"]
    assert row["before"] <= row["before_by_norm"] <= 1 and row["after"] <= row["after_by_norm"] <= 1


@pytest.fixture
def made_up(small, monkeypatch):
    """A table of latents that is given, and which latents are then patched."""
    patched = []
    table = pd.DataFrame({"frequency": [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
                          "relative_norm": [1, 0.95, 0.9, 0.05, 0.5, 0.15, 0.6, 0.4],
                          "change": [2, CHANGED, 0.9 * CHANGED, 1.1 * CHANGED, 0, 0, 0, 0],
                          "specific": ["after", "after", "", "before", "", "", "", ""]})
    monkeypatch.setattr(truth_sweep.diffing, "crosscoder_latents", lambda *_: table)

    def patched_share(crosscoder, after, names, tokens, layer, latents):
        patched.append(sorted(latents))
        return float(len(patched))

    monkeypatch.setattr(truth_sweep.diffing, "patched_share", patched_share)
    return truth_sweep.crosscoder_rows(Recipe(small, TASK, UNTRAINED, 1)).iloc[0], patched


def test_shares_are_of_active_latents(made_up):
    row, _ = made_up
    assert np.allclose(row[["before", "after", "changed"]].astype(float), [1 / 7, 1 / 7, 2 / 7])
    assert np.allclose(row[["before_by_norm", "after_by_norm"]].astype(float), [1 / 7, 2 / 7])


def test_the_half_with_the_largest_relative_norms_is_patched_and_the_rest_and_random_ones(made_up):
    row, patched = made_up
    order = dict(zip(["patched_matched", "patched_low", "patched_high"], [3, 1, 5]))
    assert row[list(order)].tolist() == list(order.values())
    assert (row["patched_most"], row["patched_rest"]) == (6, 7)
    assert patched[5:] == [[0, 1, 2, 6], [3, 4, 5, 7]] and all(len(half) == 4 for half in patched[:5])


@pytest.mark.parametrize("n", [40, 41])
def test_random_halves_are_alike_in_frequency_and_have_no_latent_twice(n):
    frequency = np.random.default_rng(0).random(n)**4
    found = truth_sweep._matched_halves(frequency, 6, seed=1)
    order = sorted(range(n), key=lambda j: -frequency[j])
    for half in found:
        assert len(half) == 20 == len(set(half.tolist()))
        chosen = [order.index(j) // 2 for j in half]
        assert sorted(chosen) == list(range(20))  # one of every two neighbours
    assert len({tuple(sorted(half)) for half in found}) == 6
    again, other = (truth_sweep._matched_halves(frequency, 6, seed) for seed in (1, 2))
    assert np.array_equal(again, found) and not np.array_equal(other, found)


def test_planted_changes_are_looked_for_and_so_is_nothing(small, monkeypatch):
    numbers = np.random.default_rng(0)
    concepts = [(kind, name) for kind in ("noun", "colour") for name in CONCEPTS[kind]][:24]
    split = Split(torch.randn(30, 5, 12, generator=torch.Generator().manual_seed(0)),
                  (numbers.random((30, 4, 24)) < 0.4).astype(np.float32), concepts)
    moved, pairs, trained = split._replace(z=split.z + 1), [], truth_sweep._crosscoder

    def crosscoder(study, before, after, seed, steps):
        pairs.append((before, after))
        return trained(study, before, after, seed, steps)

    monkeypatch.setattr(truth_sweep, "_crosscoder", crosscoder)
    monkeypatch.setattr(truth_sweep, "read_split", lambda tower, *_: split if tower is small.clip else moved)
    table = truth_sweep.planted_rows(small, 1)
    assert set(table.columns) == {"rule", "kind", "recall", "false_positives"}
    assert all(before is split.z for before, _ in pairs)
    assert pairs[0][1] is split.z and pairs[1][1] is moved.z and len(pairs) == 3
    nulls = ["nothing", UNTRAINED]
    kinds = ["added", "with its concept", "rare", "removed", *nulls]
    assert Counter(zip(table["rule"], table["kind"])) == Counter(
        (rule, kind) for rule in ("norm", "norm and scaling", "change") for kind in kinds)
    assert table["recall"].isna().equals(table["kind"].isin(nulls))
    assert table["false_positives"].between(0, 1).all()
    pd.testing.assert_frame_equal(truth_sweep.planted_rows(small, 1), table)


# Tables -------------------------------------------------------------------------------------------------

def test_recipes_are_of_every_task_with_shots_of_all_seeds_and_all_images_of_one(small):
    chosen, n = truth_sweep.recipes(small), len(TRUTHS)
    assert list(chosen) == ["accuracy", "latents", "crosscoders"]
    assert {r.task for r in chosen["accuracy"]} == set(TRUTHS)
    every = {(method, "all", 1): n for method in METHODS if method != "coop"}
    assert Counter((r.method, r.images, r.seed) for r in chosen["accuracy"]) == every | {
        (method, "shots", seed): n for method in (*METHODS, UNTRAINED) for seed in (1, 2, 3)}
    few = [(method, 1) for method in ("lora", "fine-tuning", UNTRAINED)] + [("maple", seed) for seed in (1, 2, 3)]
    assert Counter((r.method, r.images, r.seed) for r in chosen["latents"]) == {
        (method, "shots", seed): n for method, seed in [*few, ("zero-shot", 0)]} | {
        (method, "all", 1): n for method in ("maple", "lora", "fine-tuning")}
    assert Counter((r.method, r.images, r.seed) for r in chosen["crosscoders"]) == {
        (method, images, 1): n for method, images in truth_sweep.COMPARED}


def test_every_row_has_a_key_and_a_name_of_its_own(small):
    for name in ("accuracy", "latents", "crosscoders", "planted"):
        groups = truth_sweep._groups(small, name)
        assert len({tuple(group.names.values()) for group in groups}) == len(groups)
        if name != "planted":
            assert len({group.key for group in groups}) == len(groups)
            assert all(group.names["truth"] == TRUTHS[group.names["task"]] for group in groups)
    assert [group.names["seed"] for group in truth_sweep._groups(small, "planted")] == list(truth_sweep.PLANTED)


def test_keys_tell_apart_what_rows_depend_on(small, clip):
    recipe = Recipe(small, TASK, "lora", 1)
    other = study_of(small.profile, clip)
    other.sae = random_sae(n_latents=24, seed=5)
    later = study_of(small.profile, clip)
    later.layer = 0
    for name in ("accuracy", "latents", "crosscoders"):
        key = truth_sweep._key(name, recipe)
        assert key != truth_sweep._key(name, recipe._replace(images="all"))
        assert key != truth_sweep._key(name, recipe._replace(study=later))
        assert (key == truth_sweep._key(name, recipe._replace(study=other))) == (name == "accuracy")
        assert key == truth_sweep._key(name, recipe._replace(study=study_of(small.profile, clip)))
    assert adaptation_key(recipe) != adaptation_key(recipe._replace(images="all"))


def test_keys_of_crosscoders_tell_apart_layers_images_and_active_latents(small, clip):
    p = small.profile
    more = study_of(p.with_sae(k=5), clip)
    fewer = study_of(dataclasses.replace(p, adaptation=dataclasses.replace(p.adaptation, images=16)), clip)
    later = study_of(p, clip)
    later.layer = 0
    for key in (lambda study: truth_sweep._key("crosscoders", Recipe(study, TASK, "lora", 1)),
                lambda study: truth_sweep._groups(study, "planted")[0].key):
        assert len({key(study) for study in (small, more, fewer, later)}) == 4
        assert key(small) == key(study_of(p, clip))


def test_a_profile_without_scenes_has_empty_tables_and_says_why(small):
    p = small.profile
    other = Study(dataclasses.replace(p, data=dataclasses.replace(p.data, source="folders")))
    made = truth_sweep.tables(other)
    assert list(made) == ["accuracy", "readouts", "changes", "crosscoders", "planted"]
    for table in made.values():
        assert table.empty and not table.attrs["current"] and table.attrs["note"].endswith("left out.")
    truth_sweep.run(other)
    assert not p.data_dir.exists()


def test_tables_are_filled_once_and_read_as_they_are(small, monkeypatch):
    monkeypatch.setattr(truth_sweep, "TRUTHS", {TASK: "new"})
    monkeypatch.setattr(truth_sweep, "METHODS", ("maple", "linear probe"))
    monkeypatch.setattr(truth_sweep, "WITH_ALL", ("linear probe",))
    monkeypatch.setattr(truth_sweep, "planted_rows", lambda study, seed: pd.DataFrame([{"rule": "norm", "seen": seed}]))
    assert all(table.empty and "make mini-artifacts" in table.attrs["note"]
               for table in truth_sweep.tables(small).values())
    truth_sweep.run(small)
    made = truth_sweep.tables(small)
    assert all(table.attrs == {"current": True, "note": ""} for table in made.values())
    assert {name: len(table) for name, table in made.items()} == {
        "accuracy": 16 * (3 * 3 + 1), "readouts": 8 + 6 * 4, "changes": 1 + 4, "planted": 3,
        "crosscoders": len(truth_sweep.recipes(small)["crosscoders"])}
    columns = ["task", "truth", "method", "images", "seed", "key"]
    assert all(list(made[name].columns[:6]) == columns for name in ("accuracy", "readouts", "changes", "crosscoders"))
    for name in ("accuracy_rows", "latent_rows", "crosscoder_rows", "planted_rows", "adapted_model"):
        monkeypatch.setattr(truth_sweep, name, lambda *_: pytest.fail("computed again"))
    truth_sweep.run(small)
