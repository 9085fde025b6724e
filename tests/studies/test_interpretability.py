"""Measures of single latents at their extremes and against loops over pairs, neighbours and images."""

import math
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import LAYER, WIDTH, random_sae

from patchsae import collect_latents
from patchsae.studies import interpretability
from patchsae.studies.interpretability import (
    absorption,
    coherence,
    latent_monosemanticity,
    monosemanticity,
    morans_i,
    own_precision,
    patch_attributes,
    prompts,
    region_means,
    regression,
    spatial_coherence,
    splitting,
    spread,
    stability,
    text_names,
    true_names,
    with_groups,
)
from patchsae.studies.recovery import Directions, Split, concept_scores, image_scores
from patchsae.studies.scores import average_precision


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Monosemanticity


def pairwise_monosemanticity(a, e):
    """The definition: a double loop over pairs of items."""
    a = [float(v) - float(min(a)) for v in a]
    above = below = 0.0
    for n, m in combinations(range(len(a)), 2):
        norm = float(e[n].norm() * e[m].norm())
        above += a[n] * a[m] * (float(e[n] @ e[m]) / norm if norm else 0.0)
        below += a[n] * a[m]
    return above / below if below else math.nan


def test_monosemanticity_equals_the_double_loop():
    e = numbers(40, 7).double()
    e[5] = 0
    a = numbers(40, 6, seed=1).relu()
    a[:, 2] = numbers(40, seed=2)  # negative values too
    a[:, 3] = 0
    a[4, 3] = 2.0  # one item
    found = monosemanticity(a, e, chunk=4)
    expected = [pairwise_monosemanticity(a[:, s], e) for s in range(6)]
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert math.isnan(found[3])


def test_monosemanticity_equals_the_quadratic_definition_on_500_images():
    e, a = numbers(500, 64), (numbers(500, 300, seed=1) - 1.5).relu()
    unit = F.normalize(e.double(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(0)
    pairs = torch.ones(500, 500, dtype=torch.double).fill_diagonal_(0)
    b = a.double() - a.double().amin(0)
    quadratic = ((b.T @ cosine) * b.T).sum(1) / ((b.T @ pairs) * b.T).sum(1)
    assert (monosemanticity(a, e) - quadratic).abs().max() < 1e-6


def test_monosemanticity_at_its_extremes():
    labels = torch.arange(60) % 6
    e = F.one_hot(labels).float()
    perfect = F.one_hot(labels).float() * 3
    assert torch.allclose(monosemanticity(perfect, e), torch.ones(6, dtype=torch.double))
    chance = (10 * 9 * 6) / (60 * 59)  # pairs of equal labels
    constant = torch.full((60, 2), 0.7)
    np.testing.assert_allclose(monosemanticity(constant, e), chance)
    shuffled = perfect[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    assert monosemanticity(shuffled, e).mean() == pytest.approx(chance, abs=0.08)
    assert torch.allclose(monosemanticity(perfect * 9, 5 * e), torch.ones(6, dtype=torch.double))


# Places


def slow_moran(x):
    n, mean, above, weights = x.numel(), x.mean(), 0.0, 0
    side = len(x)
    for (i, j), (k, m) in ((p, q) for p in np.ndindex(side, side) for q in np.ndindex(side, side)):
        if abs(i - k) + abs(j - m) == 1:
            above, weights = above + float((x[i, j] - mean) * (x[k, m] - mean)), weights + 1
    return n / weights * above / float((x - mean).square().sum())


def test_moran_equals_the_sum_over_neighbours_and_has_its_extremes():
    maps = numbers(3, 5, 4, 4).double()
    found = morans_i(maps)
    assert found.shape == (3, 5)
    for index in np.ndindex(3, 5):
        assert found[index].item() == pytest.approx(slow_moran(maps[index]))
    board = torch.tensor([[(i + j) % 2 for j in range(6)] for i in range(6)]).float()
    assert morans_i(board).item() == pytest.approx(-1)
    assert math.isnan(morans_i(torch.ones(4, 4)).item())
    half = torch.zeros(8, 8)
    half[:, :4] = 1
    assert morans_i(half).item() > 0.8
    order = [half.flatten()[torch.randperm(64, generator=torch.Generator().manual_seed(i))] for i in range(400)]
    assert morans_i(torch.stack(order).view(-1, 8, 8)).mean().item() == pytest.approx(-1 / 63, abs=0.01)


def test_spatial_coherence_averages_over_the_images_with_differences():
    z = torch.zeros(3, 10, 2)
    z[0, 1:, 0] = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0, 0])
    z[1, 1:, 0] = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0, 1])
    split = Split(z, np.zeros((3, 9, 1), np.float32), [("noun", "a")])
    found = spatial_coherence(Directions(torch.zeros(2), torch.eye(2), torch.zeros(2)), split)
    expected = np.mean([slow_moran(z[i, 1:, 0].double().view(3, 3)) for i in (0, 1)])
    assert found[0].item() == pytest.approx(expected) and math.isnan(found[1].item())


# Seeds and redundancy


def test_stability_finds_the_same_latents_in_another_order():
    first, order = numbers(9, 5), torch.randperm(9, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(stability(first, 3 * first[order]), 1, rtol=1e-5)
    assert stability(torch.eye(4), torch.eye(4)[:, [1, 0, 3, 2]]).tolist() == [1] * 4
    assert stability(torch.eye(4)[:2], torch.eye(4)[2:]).tolist() == [0, 0]
    assert len(stability(first, first[:4])) == 4


def test_of_many_latents_some_are_matched_to_all_of_the_other_seed(monkeypatch):
    first, order = numbers(12, 6), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    whole = stability(first, first[order] + 0.3 * numbers(12, 6, seed=2))
    monkeypatch.setattr(interpretability, "MOST_MATCHED", 5)
    few = stability(first, first[order] + 0.3 * numbers(12, 6, seed=2))
    chosen = spread(12, 5)
    assert chosen.tolist() == [0, 2, 4, 7, 9] and spread(3, 5).tolist() == [0, 1, 2]
    assert np.isfinite(few).nonzero()[0].tolist() == chosen.tolist() and len(few) == 12
    assert (few[chosen] >= whole[chosen] - 1e-6).mean() > 0.5  # fewer rivals for the same partners


def test_parts_give_what_the_whole_gives(monkeypatch):
    """Chunks of latents and of images bound memory and change nothing."""
    latents = Directions(numbers(6), numbers(6, 23, seed=1), numbers(23, seed=2))
    share = np.random.default_rng(0).choice([0, 0, 1.0], (5, 9, 3)).astype(np.float32)
    split = Split(numbers(5, 10, 6, seed=3), share, [("noun", name) for name in "abc"])
    judge, rows = patch_attributes(split), numbers(23, 4, seed=4)
    whole = monosemanticity(latents.scores(split.patches), judge)
    torch.testing.assert_close(latent_monosemanticity(latents, split, judge, chunk=7), whole, equal_nan=True)
    own = np.arange(23) % 3
    precision = [average_precision(latents.scores(split.patches)[:, s].numpy(), split.positives[:, [c]])[0]
                 for s, c in enumerate(own)]
    np.testing.assert_allclose(own_precision(latents, split, own, chunk=5), precision, rtol=1e-6)
    np.testing.assert_allclose(coherence(rows, chunk=4), coherence(rows), rtol=1e-6)
    places = spatial_coherence(latents, split)
    monkeypatch.setattr("patchsae.studies.recovery.DENSE", 1)
    assert [len(h) for h in image_scores(latents, split.z)] == [1] * 5
    torch.testing.assert_close(spatial_coherence(latents, split), places, equal_nan=True)


def test_coherence_is_the_cosine_with_the_nearest_other_latent():
    rows = torch.tensor([[1.0, 0, 0], [-2.0, 0, 0], [0, 1, 0], [0, 1, 1]])
    np.testing.assert_allclose(coherence(rows), [1, 1, 0.5**0.5, 0.5**0.5], rtol=1e-6)
    assert coherence(torch.eye(5)).tolist() == [0] * 5


# Hierarchy


GROUPS = {"cat": "animals", "dog": "animals", "car": "vehicles", "bus": "vehicles"}


def animals(seed=0):
    """Every patch shows one noun; coordinate n says which, coordinate 4 is a latent for all animals but cats."""
    rng = np.random.default_rng(seed)
    noun = rng.integers(0, 4, (20, 4))
    share = np.eye(4, dtype=np.float32)[noun]
    z = np.zeros((20, 5, 6), np.float32)
    z[:, 1:, :4] = share
    z[:, 1:, 4] = noun == 1
    z[:, 1:, 5] = noun >= 2
    return Split(torch.from_numpy(z), share, [("noun", name) for name in GROUPS])


def test_groups_are_unions_of_their_members():
    split = with_groups(animals(), GROUPS)
    assert split.concepts[4:] == [("group", "animals"), ("group", "vehicles")]
    np.testing.assert_array_equal(split.share[..., 4], split.share[..., 0] + split.share[..., 1])


def test_absorption_by_hand():
    split, identity = with_groups(animals(), GROUPS), Directions(torch.zeros(6), torch.eye(6), torch.zeros(6))
    found = absorption(identity, concept_scores(identity, split), split, GROUPS).set_index("group")
    assert found.loc["vehicles", "latent"] == 5
    assert found.loc["vehicles", ["auprc", "members", "silent", "absorbed"]].tolist() == [1, 1, 0, 0]
    # The best single latent for animals misses one of the two, which has a latent of its own.
    seen = split.positives[:, :2].sum(0)
    assert found.loc["animals", "silent"] == found.loc["animals", "absorbed"]
    assert found.loc["animals", "silent"] == pytest.approx(seen.min() / seen.sum())


def test_splitting_counts_the_latents_that_it_takes():
    split, identity = animals(), Directions(torch.zeros(6), torch.eye(6), torch.zeros(6))
    split = with_groups(split, GROUPS)
    found = splitting(identity, concept_scores(identity, split), split, split).set_index("concept")
    assert found.loc["animals", "latents"] == 2 and found.loc["animals", "together"] == 1
    assert found.loc["vehicles", "latents"] == 1 and found.loc["cat", ["latents", "one"]].tolist() == [1, 1]


# Names


def test_true_names_are_above_chance_or_absent():
    split = Split(torch.zeros(1, 5, 2), np.array([[[1, 0.0], [1, 0], [1, 1], [0, 1]]], np.float32),
                  [("style", "photo"), ("noun", "cat")])
    scores = np.array([[0.8, 0.5], [0.8, 0.9], [0.75, 0.5]])  # chance is 0.75 and 0.5
    assert true_names(scores, split, 0.15).tolist() == [0, 1, -1]


def test_prompts_follow_the_tasks_and_fall_back():
    assert prompts([("noun", "cat"), ("text", "milk"), ("part", "wing")]) == [
        "a photo of a cat.", "a photo with the word milk.", "a photo of a wing."]


def test_text_names_say_what_removal_loses(clip, image_data):
    """Against a loop: remove, finish the forward pass, look at which text loses most on each reference image."""
    sae, text = random_sae(WIDTH, 20), F.normalize(numbers(6, 8), dim=-1)
    stats = collect_latents(clip, sae, image_data, LAYER, n_reference=3)
    table = text_names(clip, sae, stats, image_data, [2, 11], text, LAYER).set_index("latent")
    for latent in (2, 11):
        drops = []
        for row in stats.reference_rows[latent].tolist():
            z = clip.below(clip.pixels(image_data[row].image), LAYER)
            with torch.no_grad():
                part = sae.encode(z)[..., latent, None] * sae.W_dec[latent]
                drop = [(F.normalize(clip.above(t, LAYER), dim=-1) @ text.T)[0] for t in (z, z - part)]
            drops.append((drop[0] - drop[1]) - (drop[0] - drop[1]).mean())
        name = int(torch.stack(drops).mean(0).argmax())
        assert table.loc[latent, "name"] == name
        assert table.loc[latent, "confidence"] == pytest.approx(np.mean([int(d.argmax()) == name for d in drops]))


def test_a_latent_that_never_fires_has_no_name(clip, image_data):
    sae = random_sae(WIDTH, 20)
    with torch.no_grad():
        sae.b_enc[3] = -1e6
    stats = collect_latents(clip, sae, image_data, LAYER, n_reference=3)
    table = text_names(clip, sae, stats, image_data, [3], F.normalize(numbers(6, 8), dim=-1), LAYER)
    assert table.loc[0, "name"] == -1 and table.loc[0, "confidence"] == 0


# Regression


def latents(n=400):
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"frequency": rng.uniform(0.01, 1, n), "mean_activation": rng.uniform(0.01, 1, n),
                          "label_entropy": rng.uniform(0, 2, n), "label_std": rng.uniform(0, 9, n)})
    return table.assign(score=np.log10(table["frequency"]) - 2 * table["label_entropy"])


def test_regression_finds_an_exact_relation_and_ignores_noise():
    table = latents()
    table.loc[0, "label_entropy"] = np.nan
    found = regression(table, "score", n=50).set_index("term")
    x, y = np.log10(table["frequency"][1:]), table["score"][1:]
    assert found.loc["log10 frequency", "coefficient"] == pytest.approx(x.std() / y.std(), rel=1e-6)
    assert abs(found.loc["label deviation", "coefficient"]) < 1e-6 and found.loc["all", "alone"] == pytest.approx(1)
    alone = np.corrcoef(table["label_entropy"][1:], y)[0, 1] ** 2
    assert found.loc["label entropy", "alone"] == pytest.approx(alone)
    noise = regression(table.assign(score=np.random.default_rng(1).normal(size=len(table))), "score", n=200)
    assert noise["alone"].iloc[-1] < 0.05


def test_region_means_count_what_is_inside():
    table = latents().assign(score=1.0)
    found = region_means(table, "score", {"all": (-9, 9, -9, 9), "none": (5, 6, 5, 6)}, n=20)
    assert found["latents"].tolist() == [400, 0] and found["score"][0] == found["low"][0] == 1
    assert math.isnan(found["score"][1])


# Judges


def test_attributes_of_patches():
    split = animals()
    assert torch.equal(patch_attributes(split).argmax(1), torch.from_numpy(split.share.argmax(-1)).flatten())
