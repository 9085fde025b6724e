"""Before and after: swaps, groups, rates, masking by either side, readouts; known extremes and slow twins."""

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LAYER, SIDE, WIDTH, one_sentence, random_sae
from scipy.stats import mannwhitneyu
from test_fidelity import perfect_sae

from patchsae import ArrayDataset, load_profile
from patchsae.ablation import topk_masking
from patchsae.clip import Clip
from patchsae.config import MethodSettings
from patchsae.latents import collect_latents
from patchsae.maple import new_maple
from patchsae.studies import adaptation, remapping
from patchsae.studies import adaptation_sweep as sweep
from patchsae.studies.adapt import (
    UNTRAINED,
    Adapted,
    Recipe,
    adaptation_key,
    adapted_model,
    as_adapted,
    new_prompts,
    unadapted,
)
from patchsae.studies.recovery import Split
from patchsae.studies.study import Study
from patchsae.world.dataset import SceneDataset

NAMES = ("cat", "dog", "pig", "owl", "duck")


@pytest.fixture
def models(clip):
    """Plain CLIP, and the same with prompts that change what it says."""
    model = new_maple(clip, NAMES, n=2, depth=3, vision=True, seed=1)
    with torch.no_grad():
        for parameter in model.prompts.parameters():
            parameter += 0.8 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    plain = Study(load_profile("mini"))
    plain.clip = clip
    return unadapted(plain, "nouns"), as_adapted(model)


@pytest.fixture
def few(pixel_data):
    return ArrayDataset(pixel_data.pixels, pixel_data.labels, class_names=NAMES)


# Accuracies ---------------------------------------------------------------------------------------------

MIXTURES = list(itertools.product(adaptation.SIDES, repeat=3))


def slow_hits(before, after, ds):
    """Image by image: image tokens of one model, read by another beside its own prompt tokens, told by a third."""
    models, hits = dict(zip(adaptation.SIDES, (before, after))), {mixture: [] for mixture in MIXTURES}
    text, n = {side: model.text(NAMES) for side, model in models.items()}, before.tower.n_tokens
    for i in range(len(ds)):
        z = {side: model.tower.below(ds.pixels[i:i + 1], LAYER) for side, model in models.items()}
        for below, above, words in MIXTURES:
            embedding = models[above].tower.above(torch.cat([z[below][:, :n], z[above][:, n:]], 1), LAYER)
            cosine = torch.nn.functional.cosine_similarity(embedding, text[words])
            hits[below, above, words].append(int(cosine.argmax()) == ds.labels[i])
    return hits


def test_swaps_mix_image_tokens_the_blocks_that_read_them_and_text(models, few):
    before, after = models
    assert after.tower.below(few.pixels[:1], LAYER).shape[1] == before.tower.n_tokens + 2
    found = adaptation.swap_hits(before, after, few, LAYER)
    assert {mixture: hits.tolist() for mixture, hits in found.items()} == slow_hits(before, after, few)
    assert list(found) == MIXTURES and len({hits.tobytes() for hits in found.values()}) > 4


def test_swaps_at_another_cut_have_the_same_whole_models(models, few):
    found = [adaptation.swap_hits(*models, few, layer) for layer in (LAYER, 0)]
    for side in adaptation.SIDES:
        assert np.array_equal(*(hits[side, side, side] for hits in found))
    assert any((found[0][mixture] != found[1][mixture]).any() for mixture in MIXTURES)


def test_swap_table_has_every_mixture_and_its_interval(models, few):
    table, hits = adaptation.swap_table(*models, few, LAYER), adaptation.swap_hits(*models, few, LAYER)
    assert list(table.columns) == ["below", "above", "text", "n", "accuracy", "low", "high"]
    assert (table["low"] <= table["accuracy"]).all() and (table["accuracy"] <= table["high"]).all()
    for row in table.itertuples():
        assert row.n == len(few) and row.accuracy == hits[row.below, row.above, row.text].mean()
    assert adaptation.swap_table(models[0], models[0], few, LAYER)["accuracy"].nunique() == 1
    for side in adaptation.SIDES:
        row, = adaptation.whole(table, side).itertuples()
        assert (row.below, row.above, row.text) == (side,) * 3


def mixtures_with(accuracy):
    """A table of swaps from accuracy as a function of which of below, above and text are adapted (0 or 1)."""
    return pd.DataFrame([dict(zip(adaptation.PARTS, mixture)) | {"accuracy": accuracy(
        *(int(side == "adapted") for side in mixture))} for mixture in MIXTURES])


def slow_shares(accuracy):
    """Shapley values from their formula: over all sets of other parts, s! (2 - s)! / 3! times what a part adds."""
    shares = []
    for part in range(3):
        others, share = [i for i in range(3) if i != part], 0.0
        for size in range(3):
            for members in itertools.combinations(others, size):
                without = [int(i in members) for i in range(3)]
                having = [int(i in (*members, part)) for i in range(3)]
                weight = math.factorial(size) * math.factorial(2 - size) / 6
                share += weight * (accuracy(*having) - accuracy(*without))
        shares.append(share)
    return shares


@pytest.mark.parametrize("seed", range(5))
def test_parts_of_a_gain_add_up_and_are_shapley_values(seed):
    values = np.random.default_rng(seed).random((2, 2, 2))
    table = mixtures_with(lambda *which: values[which])
    parts = adaptation.gain_parts(table.sample(frac=1, random_state=seed))
    assert list(parts.index) == ["gain", "below", "above", "text"]
    assert np.isclose(parts["gain"], values[1, 1, 1] - values[0, 0, 0])
    assert np.isclose(parts["gain"], parts[["below", "above", "text"]].sum())
    assert np.allclose(parts[["below", "above", "text"]], slow_shares(lambda *which: values[which]))


def test_a_part_that_does_nothing_gains_nothing():
    parts = adaptation.gain_parts(mixtures_with(lambda below, above, text: 0.3 + 0.1 * below + 0.2 * below * text))
    assert np.allclose(parts[["gain", "below", "above", "text"]], [0.3, 0.2, 0, 0.1])


def test_parts_that_are_interchangeable_share_alike():
    parts = adaptation.gain_parts(mixtures_with(lambda below, above, text: 0.4 + 0.3 * (below and text) - 0.1 * above))
    assert np.allclose(parts[["gain", "below", "above", "text"]], [0.2, 0.15, -0.1, 0.15])


def test_rates_and_means_at_their_known_values():
    assert np.allclose(adaptation.harmonic_mean([0.6948, 0, 1], [0.7422, 0, 1]), [0.71772, 0, 1], atol=1e-4)
    # Table 1 of the paper: StanfordCars 53.45 to 56.16 is 5.82 %, EuroSAT 42.61 to 73.07 is 53.08 %.
    assert np.allclose(100 * adaptation.improvement_rate([0.5345, 0.4261], [0.5616, 0.7307]), [5.82, 53.08], atol=0.01)
    assert np.isnan(adaptation.improvement_rate([1.0], [1.0])).all()


def test_means_over_seeds_have_t_intervals():
    table = pd.DataFrame({"half": "base", "method": ["a"] * 6 + ["b"], "seed": [1, 1, 2, 2, 3, 3, 0],
                          "accuracy": [0.2, 0.4, 0.3, 0.5, 0.4, 0.6, 0.7]})
    rows = adaptation.seed_means(table, ["half", "method"]).set_index("method")
    assert np.isclose(rows.loc["a", "accuracy"], 0.4) and rows.loc["a", "seeds"] == 3
    assert np.isclose(rows.loc["a", "high"] - 0.4, 4.302653 * 0.1 / 3**0.5, atol=1e-6)
    assert rows.loc["b", "low"] == rows.loc["b", "high"] == 0.7


def test_main_table_has_zero_shot_once_and_both_halves():
    rows = [{"task": task, "half": half, "method": method, "seed": seed, "n": 4, "low": 0.4, "high": 0.6,
             "accuracy": {("clip",) * 3: 0.5, ("adapted",) * 3: 0.7}.get(mixture, 0.1)} | dict(
                 zip(adaptation.PARTS, mixture))
            for task in ("x", "y") for half in ("base", "novel") for method in ("maple", "coop") for seed in (1, 2)
            for mixture in MIXTURES]
    table = adaptation.main_table(pd.DataFrame(rows))
    assert list(table.columns) == ["task", "half", "method", "seed", "accuracy", "low", "high"]
    assert (table["method"] == "zero-shot").sum() == 4 and len(table) == 4 + 16
    assert (table["accuracy"] == np.where(table["method"] == "zero-shot", 0.5, 0.7)).all()


# Latents ------------------------------------------------------------------------------------------------

def slow_group(before, after, upper, lower):
    """The rule, latent by latent."""
    names = np.full(before.shape, "", dtype=object)
    for c in range(len(before)):
        places = []
        for counts in (before[c], after[c]):
            order = sorted(range(len(counts)), key=lambda s: (-counts[s], s))
            places.append({s: order.index(s) + 1 if counts[s] > 0 else len(counts) for s in range(len(counts))})
        for s in range(before.shape[1]):
            a, b = places[0][s], places[1][s]
            if a <= upper and b <= upper:
                names[c, s] = "high"
            elif a <= upper and b > lower:
                names[c, s] = "high to low"
            elif a > lower and b <= upper:
                names[c, s] = "low to high"
    return names


def test_groups_follow_the_rule():
    rng = np.random.default_rng(0)
    before, after = rng.poisson(0.8, (2, 6, 40))
    names = slow_group(before, after, 5, 20)
    found = adaptation.groups(torch.from_numpy(before), torch.from_numpy(after), 5, 20)
    for name, members in found.items():
        assert np.array_equal(members.numpy(), names == name) and members.any()


def test_groups_at_their_extremes():
    counts = torch.arange(30).flip(0).repeat(3, 1) + 1
    same = adaptation.groups(counts, counts, 4, 10)
    assert same["high"].sum(1).tolist() == [4, 4, 4] and not same["high to low"].any() | same["low to high"].any()
    swapped = adaptation.groups(counts, counts.flip(1), 4, 10)
    assert not swapped["high"].any()
    assert swapped["high to low"].sum() == swapped["low to high"].sum() == 12
    silent = adaptation.groups(torch.zeros(3, 30, dtype=torch.long), counts, 4, 10)
    assert silent["low to high"].sum() == 12 and not silent["high"].any()
    with pytest.raises(ValueError, match="Ranks 12 and 10") as error:
        adaptation.groups(counts, counts, 12, 10)
    assert one_sentence(error.value)
    table = adaptation.group_sizes(counts, counts, [4, 12], [10, 20, 99])
    assert set(zip(table["upper"], table["lower"])) == {(4, 10), (4, 20), (12, 20)}
    assert table[(table["group"] == "high") & (table["upper"] == 4)]["mean"].eq(4).all()


def test_correlations_at_their_extremes():
    counts = torch.tensor([1, 5, 30, 200, 0])
    assert all(np.isclose(v, 1) for v in adaptation.correlations(counts, counts).values())
    assert np.isclose(adaptation.correlations(counts, -counts + 200)["spearman"], -1)


def test_prompt_tokens_count_only_when_they_are_asked_for(models, few):
    tower, sae = models[1].tower, random_sae(bias=0.4)
    alone, mixed = (collect_latents(tower, sae, few, LAYER, n_reference=3, tokens=tokens)
                    for tokens in ("all", "all and prompts"))
    h = sae.encode(tower.below(few.pixels, LAYER))
    assert torch.equal(alone.class_counts.sum(0), (h[:, :tower.n_tokens] > 0.2).sum((0, 1)))
    assert torch.equal(mixed.class_counts.sum(0), (h > 0.2).sum((0, 1)))
    assert (mixed.class_counts != alone.class_counts).any()


def test_masking_leaves_prompt_tokens_as_they_are(models, few):
    tower, sae = models[1].tower, random_sae(bias=0.4)
    ranking = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(c)) for c in range(5)])
    rows = topk_masking(tower, sae, few, None, models[1].text(NAMES), LAYER, [3, "all"], ranking=ranking,
                        per_image=True)
    for i in range(4):
        z = tower.below(few.pixels[i:i + 1], LAYER)
        image, prompts = z[:, :tower.n_tokens], z[:, tower.n_tokens:]
        h = sae.encode(image)
        h[..., ranking[few.labels[i], :3]] = 0
        whole = torch.cat([sae.decode(h), prompts], 1)
        logits = tower.logits(tower.above(whole, LAYER), models[1].text(NAMES))[0].detach()
        mine = rows[(rows["id"] == few[i].id) & (rows["mode"] == "off") & (rows["k"] == 3)]["logits"].item()
        assert np.abs(mine - logits.numpy()).max() < 1e-4


def test_masking_grid_selects_by_one_side_and_classifies_by_the_other(models, few):
    before, after = models
    sae = random_sae(bias=0.4)
    counts = {side: collect_latents(m.tower, sae, few, LAYER, n_reference=3).class_counts
              for side, m in zip(adaptation.SIDES, models)}
    table = adaptation.masking_grid(dict(zip(adaptation.SIDES, models)), sae, counts, few, LAYER, [2, "all"])
    assert len(table) == 4 * 7
    lat = collect_latents(before.tower, sae, few, LAYER, n_reference=3)
    direct = topk_masking(before.tower, sae, few, lat, before.text(NAMES), LAYER, [2, "all"])
    own = table[(table["selects"] == "clip") & (table["classifies"] == "clip")].set_index(["mode", "k"])["accuracy"]
    summed = direct.groupby(["mode", "k"])[["correct", "n"]].sum()
    assert np.allclose(own.drop(("on", 0)).sort_index(), (summed["correct"] / summed["n"]).sort_index())
    assert own["on", 0] == own["off", 20]
    whole = table[table["mode"] == "original"].groupby("classifies")["accuracy"].nunique()
    assert whole.eq(1).all()  # who selects cannot matter where nothing is masked
    third = adaptation.masking_grid({"third": after}, sae, {"clip": counts["clip"]}, few, LAYER, [2, "all"])
    pair = table[(table["selects"] == "clip") & (table["classifies"] == "adapted")].reset_index(drop=True)
    pd.testing.assert_frame_equal(third, pair.assign(classifies="third"))


def test_mean_prompts_are_the_same_for_every_image_and_all_else_is_as_it_was(models, few):
    after = models[1]
    mean, n = adaptation.mean_prompts(after, few, LAYER), after.tower.n_tokens
    z, whole = (model.tower.below(few.pixels, LAYER) for model in (mean, after))
    assert torch.equal(z[:, :n], whole[:, :n]) and mean.text is after.text
    expected = sum(whole[i, n:] for i in range(len(few))) / len(few)
    for image in z[:, n:]:
        torch.testing.assert_close(image, expected)
    assert (whole[:, n:] - expected).abs().max() > 1e-3
    assert torch.equal(mean.tower.above(z, LAYER), after.tower.above(z, LAYER))


# What can be read ---------------------------------------------------------------------------------------

def test_image_latents_leave_prompts_out(models, few):
    tower, sae = models[1].tower, random_sae(bias=0.4)
    means, counts = remapping.image_latents(tower, sae, few, LAYER, 0.3)
    h = sae.encode(tower.below(few.pixels, LAYER)[:, :tower.n_tokens]).mean(1)
    assert torch.allclose(means, h, atol=1e-6)
    assert torch.equal(counts, collect_latents(tower, sae, few, LAYER, 0.3, n_reference=3).class_counts)


@pytest.mark.parametrize("values, share", [((0.2, 0.8, 0.8), 1), ((0.2, 0.8, 1.0), 1), ((0.2, 0.8, 0.5), 0.5),
                                           ((0.2, 0.8, 0.1), 0), ((0.5, 0.5, 0.9), float("nan"))])
def test_remapped_share_at_its_known_values(values, share):
    assert np.isclose(remapping.remapped_share(*values), share, equal_nan=True)


def test_concepts_that_are_in_the_latents_are_read():
    kinds, concepts = ("background", "style"), [("background", name) for name in "abc"] + [("style", "d")]
    rng = np.random.default_rng(0)

    def split(told):
        share = np.concatenate([np.eye(3)[rng.integers(0, 3, (30, 9))], rng.random((30, 9, 1)) < 0.3], -1)
        z = np.zeros((30, 10, WIDTH), np.float32)
        z[:, 1:, :4] = share if told else rng.normal(size=share.shape)
        return Split(torch.from_numpy(z), share.astype(np.float32), concepts)

    table = remapping.concept_readout(perfect_sae(), split(True), split(True), kinds)
    assert table["kind"].tolist() == ["background"] * 3 + ["style"] and table["ap"].min() > 0.95
    noise = remapping.concept_readout(perfect_sae(), split(False), split(False), kinds)
    assert (noise["ap"] - noise["share"]).abs().max() < 0.15  # chance is the share


BY = ["task", "truth", "method", "images", "seed"]
SOURCES = [(source, fitted) for source in ("latents", "z", "class token") for fitted in ("shots", "all")]


@pytest.fixture
def measured():
    """Rows of the tables that measures are made of, full of random numbers: three tasks, two seeds, all images."""
    rng, tables = np.random.default_rng(0), {name: [] for name in ("accuracy", "readouts", "changes", "crosscoders")}
    for task, truth in (("b", "remap"), ("a", "new"), ("c", "mixed")):
        plain = dict(zip(BY, (task, truth, "zero-shot", "shots", 0)))
        tables["readouts"] += [plain | {"source": source, "fitted": fitted, "accuracy": rng.uniform(0.5, 1)}
                               for source, fitted in [*SOURCES, ("pixels", "all")]]
        tables["changes"].append(plain | {"ev_clip": 0.9})
        start = rng.uniform(0.2, 0.4, 2)
        for method, (images, seed) in itertools.product(("linear probe", "maple", "lora"),
                                                        (("shots", 1), ("shots", 2), ("all", 1))):
            which = dict(zip(BY, (task, truth, method, images, seed)))
            for (half, zero_shot), mixture in itertools.product(zip(("base", "novel"), start), MIXTURES):
                accuracy = zero_shot if mixture == ("clip",) * 3 else rng.uniform(0.5, 0.9)
                tables["accuracy"].append(which | dict(zip(adaptation.PARTS, mixture)) | {
                    "half": half, "accuracy": accuracy})
            if method != "linear probe":
                tables["readouts"] += [which | {"source": source, "fitted": fitted, "accuracy": rng.random()}
                                       for source, fitted in SOURCES]
                tables["changes"].append(which | {name: rng.random() for name in (
                    "R", "ev_clip", "ev_frozen", "pearson_log", "enter")})
            if (method, images) in (("maple", "shots"), ("lora", "all")) and seed == 1:
                tables["crosscoders"].append(which | {name: rng.random() for name in (
                    "before_by_norm", "after_by_norm", "before", "after", "changed")})
    return tables


def frames(tables):
    return {name: pd.DataFrame(rows) for name, rows in tables.items()}


def only(rows, column, **which):
    """The one value of a column in the rows that are asked for; NaN without any."""
    values = [row[column] for row in rows if which.items() <= row.items()]
    assert len(values) <= 1
    return values[0] if values else np.nan


def slow_measures(tables, which):
    """One row, value by value."""
    accuracy = [row for row in tables["accuracy"] if row["half"] == "base"]
    own = [row for row in accuracy if which.items() <= row.items()]
    values = {mixture: only(own, "accuracy", **dict(zip(adaptation.PARTS, mixture))) for mixture in MIXTURES}
    adapted, plain = values[("adapted",) * 3], values[("clip",) * 3]
    below = slow_shares(lambda *which: values[tuple(adaptation.SIDES[i] for i in which)])[0]
    whole = dict.fromkeys(adaptation.PARTS, "adapted")
    probe = only(accuracy, "accuracy", **which | whole | {"method": "linear probe"})

    def read(source, fitted, **of):
        return only(tables["readouts"], "accuracy", task=which["task"], source=source, fitted=fitted, **of)

    def readable(fitted):
        return max(0, (min(read("latents", fitted, method="zero-shot"), adapted) - plain) / (adapted - plain))

    def gain(source):
        return read(source, "all", **{name: which[name] for name in ("method", "images", "seed")}) - read(
            source, "all", method="zero-shot")

    changes = {name: only(tables["changes"], name, **which) for name in
               ("R", "ev_clip", "ev_frozen", "pearson_log", "enter")}
    pairs = {name: only(tables["crosscoders"], name, **which) for name in ("after_by_norm", "after", "changed")}
    return which | {
        "gain": adapted - plain, "gain not readable before": 1 - readable("all"),
        "the same, from shots": 1 - readable("shots"), "readout gains, latents": gain("latents"),
        "readout gains, z": gain("z"), "readout gains, class token": gain("class token"),
        "a linear probe falls short": adapted - probe, "image side's share": below / (adapted - plain),
        "R": changes["R"], "variance lost": changes["ev_clip"] - changes["ev_frozen"],
        "activations differ": 1 - changes["pearson_log"], "latents that enter": changes["enter"],
        "crosscoder, by norm": pairs["after_by_norm"], "crosscoder, and scaling": pairs["after"],
        "crosscoder, changed": pairs["changed"]}


def test_measures_equal_look_ups(measured):
    found = remapping.measures(frames(measured))
    assert len(found) == 3 * 3 * 3
    expected = pd.DataFrame([slow_measures(measured, dict(zip(BY, row))) for row in found[BY].itertuples(index=False)])
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)
    assert set(remapping.DEFINING) < set(found.columns)
    assert (found["a linear probe falls short"][found["method"] == "linear probe"] == 0).all()


def test_measures_do_not_depend_on_the_order_of_rows(measured):
    tables = frames(measured)
    shuffled = {name: table.sample(frac=1, random_state=3) for name, table in tables.items()}
    found, expected = (remapping.measures(some).sort_values(BY, ignore_index=True) for some in (shuffled, tables))
    pd.testing.assert_frame_equal(found, expected)


def told_apart(new, remap, **columns):
    """A table of measures of one method: lists of values, one list a task, one value a seed."""
    rows = [{"task": f"{truth} {i}", "truth": truth, "method": "maple", "images": "shots", "seed": seed, "gain": 0.3,
             "measure": value} | columns for truth, tasks in (("new", new), ("remap", remap))
            for i, values in enumerate(tasks) for seed, value in enumerate(values)]
    return pd.DataFrame(rows)


def area(table, least_gain=0.1):
    row, = remapping.areas(table, least_gain, draws=200).to_dict("records")
    return row


@pytest.mark.parametrize("new, remap, value", [
    ([[3], [4]], [[1], [2]], 1), ([[1], [2]], [[3], [4]], 0), ([[1], [1]], [[1], [1], [1]], 0.5),
    ([[1], [3]], [[2], [2]], 0.5), ([[1], [3]], [[1], [2]], 0.625)])
def test_areas_at_their_known_values(new, remap, value):
    row = area(told_apart(new, remap))
    assert list(row) == ["method", "images", "measure", "area", "low", "high", "remap", "new"]
    assert (row["method"], row["images"], row["measure"]) == ("maple", "shots", "measure")
    assert row["area"] == value and row["low"] <= value <= row["high"]
    assert (row["new"], row["remap"]) == (len(new), len(remap))
    if value in (0, 1):
        assert row["low"] == row["high"] == value


@pytest.mark.parametrize("seed", range(4))
def test_areas_are_those_of_mann_and_whitney(seed):
    rng = np.random.default_rng(seed)
    new, remap = rng.integers(0, 6, (7, 1)) + 1, rng.integers(0, 6, (5, 1))
    assert np.isclose(area(told_apart(new, remap))["area"], mannwhitneyu(new[:, 0], remap[:, 0]).statistic / 35)


def test_intervals_of_areas_lie_around_them():
    rng = np.random.default_rng(3)
    new, remap = rng.normal(0.5, 1, (8, 1)), rng.normal(0, 1, (8, 1))
    row = area(told_apart(new, remap))
    assert row["low"] < row["area"] < row["high"] and 0.2 < row["high"] - row["low"] < 0.7


def test_seeds_are_averaged_before_tasks_are_compared():
    assert area(told_apart([[0, 9], [5, 5]], [[4, 4], [1, 7]]))["area"] == 1
    assert area(told_apart([[np.nan, 9], [5, 5]], [[4, 4], [np.nan, np.nan]]))["remap"] == 1


def test_areas_are_of_models_that_gained_and_of_tasks_of_two_kinds():
    table = told_apart([[3], [4]], [[5], [2]])
    table.loc[2, "gain"] = 0.0999
    table.loc[3, "gain"] = 0.1
    mixed = told_apart([[0]], [[9]]).assign(truth="mixed")
    assert area(pd.concat([table, mixed]))["area"] == 1 and area(pd.concat([table, mixed]), 0)["area"] == 0.5
    for new, remap in (([], [[1]]), ([[1]], []), ([[np.nan]], [[1]])):
        assert remapping.areas(told_apart(new, remap), 0.1, draws=5).empty
    assert list(remapping.areas(told_apart([[1]], []), 0.1).columns)[:3] == ["method", "images", "measure"]


def test_areas_are_of_each_method_and_measure(measured):
    table = remapping.areas(remapping.measures(frames(measured)), 0, draws=20)
    assert set(zip(table["method"], table["images"])) == set(itertools.product(("maple", "lora", "linear probe"),
                                                                              ("shots", "all")))
    maple = table[(table["method"] == "maple") & (table["images"] == "all")]
    assert not maple["measure"].str.startswith("crosscoder").any() and len(maple) == 11
    assert (table["new"] == 1).all() and table["area"].isin([0, 0.5, 1]).all()


def test_a_concept_map_shows_what_presence_does(monkeypatch):
    test = SceneDataset("textures", "test", 60)
    shown = remapping.patch_concepts(test, range(60), ("texture",)).any(1)

    class Tower:
        def logits(self, embeddings, text):
            return embeddings

    def embeddings(tower, ds):
        return torch.from_numpy(3.0 * shown.astype(float))

    monkeypatch.setattr(remapping, "image_embeddings", embeddings)
    table = remapping.concept_map(Adapted(Tower(), lambda names: None), test, ("texture",))
    assert table.shape == (10, 10) and list(table.columns) == list(test.class_names)
    values = table.to_numpy()
    assert values.diagonal().min() > values[~np.eye(10, dtype=bool)].max()


# Tables -------------------------------------------------------------------------------------------------

@pytest.fixture
def study(clip, profile, tmp_path, monkeypatch):
    """Two tasks, one of them with ground truth for its patches, adapted to in a few steps; everything is written to a
    folder of its own."""
    monkeypatch.setattr("patchsae.config.ROOT", tmp_path)
    short = MethodSettings(learning_rate=0.05, epochs=1, least_steps=0, batch_images=4)
    settings = dataclasses.replace(profile.adaptation, tasks=("nouns", "words"), seeds=(1,), shots=2, depth=2,
                                   images=20)
    methods = dict.fromkeys(("maple", "coop", "lora", "fine_tuning"), short)
    return study_of(dataclasses.replace(profile.with_sae(expansion=10), adaptation=settings, **methods), clip)


def study_of(profile, clip):
    numbers = torch.Generator().manual_seed(0)
    images = {split: ArrayDataset(torch.randn(20, 3, SIDE, SIDE, generator=numbers), np.arange(20) % 5,
                                  class_names=NAMES) for split in ("train", "test")}
    study = Study(profile)
    study.clip, study.images, study.sae = clip, lambda task, split: images[split], random_sae(n_latents=120)
    return study


def test_without_committed_tables_small_ones_are_made_in_the_run_folder(study, monkeypatch):
    made = sweep.tables(study)
    assert {name: len(table) for name, table in made.items()} == {"accuracy": 32, "transfer": 0, "latents": 6,
                                                                  "concepts": 0}
    assert set(made["accuracy"]["method"]) == {"maple", UNTRAINED} and set(made["latents"]["task"]) == {"nouns"}
    assert not made["accuracy"].attrs["current"]
    note = made["accuracy"].attrs["note"]
    assert "10 of its 12 runs" in note and "make mini-artifacts PROFILE=mini" in note and note.endswith(".")
    folder = study.profile.data_dir
    assert [path.name for path in folder.iterdir()] == ["run"]
    latents = made["latents"].set_index(["method", "half"])
    assert (latents["low"] <= latents["readable"]).all() and (latents["readable"] <= latents["high"]).all()
    assert latents.loc[("zero-shot", "base"), "group high"] == sweep.UPPER
    monkeypatch.setattr(sweep, "adapted_model", lambda _: pytest.fail("computed again"))
    pd.testing.assert_frame_equal(sweep.tables(study)["latents"], made["latents"])


def test_committed_tables_are_shown_with_a_note_where_settings_are_others(study, clip, monkeypatch):
    sweep.run(study)
    made, folder = sweep.tables(study), study.profile.data_dir / "adapted"
    assert all(made[name].attrs == {"current": True, "note": ""} for name in sweep.ROWS)
    kept = {path.name for path in folder.iterdir() if path.is_dir()}
    small = [recipe for recipe in sweep.recipes(study)["accuracy"] if recipe.method in sweep.KEPT]
    assert kept == set(map(adaptation_key, small))
    before = {path.name: path.read_bytes() for path in folder.glob("*.csv")}
    monkeypatch.setattr(sweep, "adapted_model", lambda _: pytest.fail("computed in a notebook"))
    other = study_of(study.profile, clip)
    other.sae = random_sae(n_latents=120, seed=1)
    shown = sweep.tables(other)
    assert shown["accuracy"].attrs["current"] and not shown["latents"].attrs["current"]
    pd.testing.assert_frame_equal(shown["latents"], made["latents"])
    assert "latents.csv is shown as it is" in shown["latents"].attrs["note"]
    assert before == {path.name: path.read_bytes() for path in folder.glob("*.csv")}


def test_without_tasks_or_text_tables_are_empty_and_say_why(study, clip):
    p = study.profile
    alone = study_of(dataclasses.replace(p, adaptation=dataclasses.replace(p.adaptation, tasks=())), clip)
    silent = study_of(p, Clip(clip.model, None, clip.processor))
    for lacking, why in ((alone, "no task"), (silent, "no tokenizer")):
        made = sweep.tables(lacking)
        assert all(table.empty and why in table.attrs["note"] for table in made.values())
        sweep.run(lacking)
    assert not p.data_dir.exists()


def test_given_weights_are_those_of_no_other_tower_or_seed(study, clip):
    given = study_of(study.profile.with_sae(weights="somewhere"), clip)
    assert sweep.sae_of_the_adapted(given, "nouns") is None and given.next_seed() is None
    assert study.next_seed().profile.seed == study.profile.seed + 1


def test_control_prompts_are_those_that_training_starts_from(study, clip):
    control = Recipe(study, "nouns", UNTRAINED, 3)
    start = new_prompts(control._replace(method="maple"), NAMES)
    tower = adapted_model(control).tower
    assert tower.fingerprint() == start.fingerprint()
    assert tower.below(torch.zeros(1, 3, SIDE, SIDE), 2).shape[1] == clip.n_tokens + 2
