"""Top-k masking against its slow twin, its selections against loops, and everything that can be given wrongly."""

import collections
import copy
import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from ablation_twin import slow_logits, slow_masking
from conftest import LAYER, SIDE, one_sentence, random_clip_model, random_sae

from patchsae import ArrayDataset, SparseAutoencoder, load_clip, load_profile
from patchsae.ablation import (
    CHANCE,
    SELECTIONS,
    class_order,
    dataset_order,
    make_arm,
    masked_tokens,
    matched_order,
    random_order,
    topk_masking,
    unshared_order,
    wrong_classes,
)
from patchsae.clip import Clip, class_prototypes
from patchsae.config import ROOT
from patchsae.data.datasets import open_dataset, templates
from patchsae.fast.segments import active_latents, segment_sums
from patchsae.latents import collect_latents
from patchsae.studies.study import committed_folder

S, C = 64, 5
KS = [1, 2, 5, 10, 50, S]


@pytest.fixture(scope="module")
def sae():
    """About a quarter of 64 latents fire on a token; the last four never."""
    sae = random_sae(n_latents=S, bias=-0.6)
    sae.b_enc.data[-4:] = -1e3
    return sae


@pytest.fixture(scope="module")
def split():
    """Test images of five classes, of another seed than the training images."""
    pixels = torch.randn(23, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    return ArrayDataset(pixels, np.arange(23) % C)


@pytest.fixture(scope="module")
def lat(clip, sae):
    pixels = torch.randn(40, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(6))
    return collect_latents(clip, sae, ArrayDataset(pixels, np.arange(40) % C), LAYER)


@pytest.fixture(scope="module")
def text():
    features = torch.randn(C, 8, generator=torch.Generator().manual_seed(7))
    return torch.nn.functional.normalize(features, dim=-1)


def fake(counts, **fields):
    """Statistics with these class counts and nothing else to rank by."""
    counts = torch.as_tensor(counts)
    silent = torch.zeros(counts.shape[1])
    return SimpleNamespace(**{"class_counts": counts, "frequency": silent, "mean_activation": silent} | fields)


def logits_of(rows, mode, k):
    """Logits ``[B,C]`` of one condition."""
    return np.stack(rows[(rows["mode"] == mode) & (rows["k"] == k)]["logits"].to_list())


def own_rankings(order, ds):
    return torch.stack([order(int(label)) for label in ds.labels])


# Against the twin ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("add_error", [False, True])
@pytest.mark.parametrize("layer", [-2, -4, 0])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_condition_agrees_with_a_whole_run_of_the_model(sae, split, lat, text, add_error, layer, attention):
    clip = Clip(random_clip_model(attention=attention))
    rankings = torch.stack([torch.randperm(S, generator=torch.Generator().manual_seed(c)) for c in range(C)])
    rows = topk_masking(clip, sae, split, lat, text, layer, KS, ranking=rankings, add_error=add_error, per_image=True,
                        batch_images=7)
    slow = slow_masking(clip, sae, split.pixels, text, layer, rankings[split.labels], KS, add_error)
    slow["spliced", S] = slow_logits(clip, sae, split.pixels, text, layer, torch.ones(len(split), S), add_error)
    assert len(rows) == len(slow) * len(split)
    for (mode, k), expected in slow.items():
        found = logits_of(rows, mode, k)
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4, err_msg=f"{mode} {k}")
        best = expected.topk(2).values
        clear = (best[:, 0] - best[:, 1] > 1e-4).numpy()
        assert (found.argmax(1) == expected.argmax(1).numpy())[clear].all()


def test_sums_of_segments_are_those_of_a_dense_decode(sae, clip, split):
    z = clip.below(split.pixels[:6], LAYER)
    active, h = active_latents(sae, z), sae.encode(z)
    assert len(active.value) == (h > 0).sum()
    part = torch.from_numpy(np.random.default_rng(0).integers(0, 4, (6, S)))
    sums = segment_sums(sae, active, part[active.image, active.latent], (6, 4, z.shape[1]))
    for j in range(4):
        torch.testing.assert_close(sums[:, j], (h * (part == j)[:, None]) @ sae.W_dec, atol=1e-5, rtol=1e-5)


def test_tokens_without_any_latent_become_b_dec(sae):
    z = sae.b_dec.detach().expand(2, 3, -1)
    silent = random_sae(n_latents=S, bias=-100.0)
    sums = segment_sums(silent, active_latents(silent, z), torch.zeros(0, dtype=torch.long), (2, 2, 3))
    assert torch.equal(sums, torch.zeros_like(sums))
    assert torch.equal(masked_tokens(silent, z, sums, False), silent.b_dec.detach().expand(2, 3, 3, -1))


def test_removing_nothing_with_the_error_added_gives_z_bit_for_bit(sae, clip, split, lat, text):
    z = clip.below(split.pixels, LAYER)
    arm = make_arm(lat, "class", 0, KS)
    active = active_latents(sae, z)
    segment = torch.stack([arm.segments(int(c)) for c in split.labels])[active.image, active.latent].long()
    edited = masked_tokens(sae, z, segment_sums(sae, active, segment, (len(z), len(KS) + 1, z.shape[1])), True)
    assert torch.equal(edited[:, 0], z) and torch.equal(edited[:, len(KS)], z)  # spliced; on all
    assert not torch.equal(edited[:, 1], z)
    rows = topk_masking(clip, sae, split, lat, text, LAYER, KS, add_error=True, per_image=True)
    for mode in ("on", "spliced"):
        np.testing.assert_array_equal(logits_of(rows, mode, S), logits_of(rows, "on", S))
    np.testing.assert_allclose(logits_of(rows, "on", S), logits_of(rows, "original", 0), atol=1e-5)


def test_keeping_all_is_splicing_and_batches_do_not_matter(sae, clip, split, lat, text):
    rows = topk_masking(clip, sae, split, lat, text, LAYER, KS, per_image=True, batch_images=64)
    np.testing.assert_array_equal(logits_of(rows, "on", S), logits_of(rows, "spliced", S))
    single = topk_masking(clip, sae, split, lat, text, LAYER, KS, per_image=True, batch_images=1)
    assert rows["id"].tolist() == single["id"].tolist()
    np.testing.assert_allclose(np.stack(rows["logits"].to_list()), np.stack(single["logits"].to_list()), atol=1e-5)


def test_prompt_tokens_of_an_adapted_tower_stay_as_they_are(sae, clip, split, lat, text):
    prompts = torch.randn(3, 12)

    class Adapted(Clip):
        seen = []

        def below(self, pixels, layer):
            z = super().below(pixels, layer)
            return torch.cat([z, prompts.expand(len(z), -1, -1)], 1)

        def above(self, z, layer):
            self.seen.append(z[:, self.n_tokens:])
            return super().above(z, layer)

    adapted = Adapted(clip.model)
    rows = topk_masking(adapted, sae, split, lat, text, LAYER, [1, S])
    assert set(rows["mode"]) == {"original", "spliced", "on", "off"}
    assert all(torch.equal(tail, prompts.expand(len(tail), -1, -1)) for tail in adapted.seen)


# Selections ---------------------------------------------------------------------------------------------

def test_counts_rank_latents_with_ties_by_lowest_index():
    counts = torch.tensor([[3, 0, 3, 9, 0], [1, 1, 7, 0, 0]])
    assert class_order(fake(counts))(0).tolist() == [3, 0, 2, 1, 4]
    assert class_order(fake(counts))(1).tolist() == [2, 0, 1, 3, 4]
    assert dataset_order(fake(counts))(1).tolist() == [2, 3, 0, 1, 4]


def test_statistics_may_be_arrays(sae, clip, split, lat, text):
    fields = {f.name: getattr(lat, f.name) for f in dataclasses.fields(lat)}
    arrays = SimpleNamespace(**{k: v.numpy() if torch.is_tensor(v) else v for k, v in fields.items()})
    both = [topk_masking(clip, sae, split, x, text, LAYER, KS, SELECTIONS) for x in (lat, arrays)]
    pd.testing.assert_frame_equal(*both)


def test_random_rankings_differ_by_seed_and_class():
    draws = {(s, c): tuple(random_order(fake(np.ones((3, 50))), s)(c).tolist()) for s in range(3) for c in range(3)}
    assert len(set(draws.values())) == 9
    assert all(sorted(draw) == list(range(50)) for draw in draws.values())
    assert draws[1, 2] == tuple(random_order(fake(np.ones((3, 50))), 1)(2).tolist())


def test_shared_latents_go_to_the_end():
    counts = np.zeros((5, 40), np.int64)
    counts[:4, 0] = 9, 9, 9, 9  # leads the lists of all four classes
    counts[:3, 1] = 8, 8, 8  # of three
    counts[:2, 2] = 7, 7  # of two: not more than half
    counts[3, 3] = 1
    order = unshared_order(fake(counts))
    assert order(0).tolist() == [2, *range(3, 40), 0, 1]
    # Latent 1 never was active in class 3: it is no member of that class's list, but it still is shared.
    assert order(3).tolist() == [3, 2, *range(4, 40), 0, 1]


def test_matched_latents_are_alike_and_never_the_same():
    numbers = np.random.default_rng(0)
    frequency, strength = 10 ** numbers.uniform(-3, 0, 2000), 10 ** numbers.uniform(-3, 0, 2000)
    lat = fake(numbers.permuted(np.tile(np.arange(2000), (3, 1)), axis=1), frequency=torch.from_numpy(frequency),
               mean_activation=torch.from_numpy(strength))
    own = class_order(lat)(1).numpy()
    draws = [matched_order(lat, seed, 50)(1).numpy() for seed in range(4)]
    for draw in draws:
        assert sorted(draw.tolist()) == list(range(2000))
        assert (draw[:50] != own[:50]).all()
        assert draw[50:80].tolist() == [s for s in own if s not in draw[:50]][:30]
    for x in (frequency, strength):
        gap = np.log10([x[draw[:50]] for draw in draws]) - np.log10(x[own[:50]])
        assert abs(gap.mean()) < 0.03 and np.abs(gap).max() < 0.4  # of a range of 3
    assert len({tuple(draw[:50]) for draw in draws}) == 4


@pytest.mark.parametrize("depth", [0, 1, S - 1, S])
def test_matching_lasts_until_no_latent_is_free(lat, depth):
    ranking, own = matched_order(lat, 0, depth)(2), class_order(lat)(2)
    assert sorted(ranking.tolist()) == list(range(S))
    assert (ranking[:depth] != own[:depth])[:-1].all()


@pytest.mark.parametrize("seed", range(4))
def test_a_wrong_class_is_always_another(seed):
    classes = [0, 2, 3, 7]
    other = wrong_classes(classes, seed)
    assert sorted(other) == sorted(other.values()) == classes
    assert all(a != b for a, b in other.items())


def test_each_selection_ranks_by_what_its_name_says(sae, clip, split, lat, text):
    rows = topk_masking(clip, sae, split, lat, text, LAYER, KS, SELECTIONS, per_image=True, seed=[3, 4])
    original = slow_logits(clip, sae, split.pixels, text, LAYER)
    own, wrong = class_order(lat), wrong_classes(range(C), 4)
    expected = {
        "class": own_rankings(own, split),
        "dataset": own_rankings(dataset_order(lat), split),
        "random": own_rankings(random_order(lat, 4), split),
        "matched": own_rankings(matched_order(lat, 4, 50), split),
        "wrong-class": torch.stack([own(wrong[int(c)]) for c in split.labels]),
        "predicted-class": torch.stack([own(int(c)) for c in original.argmax(1)]),
        "class-unshared": own_rankings(unshared_order(lat), split),
    }
    for selection in SELECTIONS:
        mine = rows[rows["selection"] == selection]
        assert mine["seed"].unique().tolist() == ([3, 4] if selection in CHANCE else [3])
        mine = mine[mine["seed"] == mine["seed"].max()]
        for (mode, k), logits in slow_masking(clip, sae, split.pixels, text, LAYER, expected[selection], KS).items():
            np.testing.assert_allclose(logits_of(mine, mode, k), logits, atol=1e-4, err_msg=f"{selection} {mode} {k}")


def test_several_selections_in_one_pass_are_the_single_ones(sae, clip, split, lat, text):
    together = topk_masking(clip, sae, split, lat, text, LAYER, KS, SELECTIONS, seed=[0, 1])
    for selection, seed in itertools.product(SELECTIONS, [0, 1]):
        if seed == 0 or selection in CHANCE:
            alone = topk_masking(clip, sae, split, lat, text, LAYER, KS, selection, seed=seed)
            of = together[(together["selection"] == selection) & (together["seed"] == seed)].reset_index(drop=True)
            pd.testing.assert_frame_equal(alone, of)


# Rows ---------------------------------------------------------------------------------------------------

def test_rows_per_class_count_the_rows_per_image(sae, clip, split, lat, text):
    images = topk_masking(clip, sae, split, lat, text, LAYER, KS, per_image="predictions")
    assert "logits" not in images and len(images) == len(split) * (2 + 2 * len(KS))
    classes = topk_masking(clip, sae, split, lat, text, LAYER, KS)
    assert classes.columns.tolist() == ["selection", "seed", "mode", "k", "class", "n", "correct"]
    right = images[images["prediction"] == images["label"]]
    right = collections.Counter(right.groupby(["mode", "k", "label"]).size().to_dict())
    for row in classes.to_dict("records"):
        assert row["n"] == (split.labels == row["class"]).sum()
        assert row["correct"] == right[row["mode"], row["k"], row["class"]]
    assert (classes.groupby(["mode", "k"])["n"].sum() == len(split)).all()


def test_ks_may_come_in_any_order_and_as_all(sae, clip, split, lat, text):
    one = topk_masking(clip, sae, split, lat, text, LAYER, ["all", 5, 1, 5])
    pd.testing.assert_frame_equal(one, topk_masking(clip, sae, split, lat, text, LAYER, (1, 5, S)))
    assert set(topk_masking(clip, sae, split, lat, text, LAYER, [])["mode"]) == {"original", "spliced"}


def test_classes_without_training_images_are_left_out_and_counted(sae, clip, split, lat, text):
    counts = lat.class_counts.clone()
    counts[[1, 4]] = 0
    fewer = dataclasses.replace(lat, class_counts=counts)
    rows = topk_masking(clip, sae, split, fewer, text, LAYER, KS, SELECTIONS, per_image=True)
    assert rows.attrs["left_out"] == 2
    assert set(rows["label"]) == {0, 2, 3} and rows["id"].nunique() == np.isin(split.labels, [0, 2, 3]).sum()
    whole = topk_masking(clip, sae, split, lat, text, LAYER, KS, per_image=True)
    assert whole.attrs["left_out"] == 0
    np.testing.assert_allclose(logits_of(rows[rows["selection"] == "class"], "off", 2),
                               logits_of(whole[whole["label"].isin([0, 2, 3])], "off", 2), atol=1e-5)


def test_the_predicted_class_is_one_that_can_be_ranked(sae, clip, split, lat, text):
    counts = lat.class_counts.clone()
    counts[[1, 4]] = 0
    fewer = dataclasses.replace(lat, class_counts=counts)
    rows = topk_masking(clip, sae, split, fewer, text, LAYER, KS, "predicted-class", per_image=True)
    there = np.isin(split.labels, [0, 2, 3])
    pixels, classes = split.pixels[torch.from_numpy(there)], torch.tensor([0, 2, 3])
    predicted = classes[slow_logits(clip, sae, pixels, text, LAYER)[:, classes].argmax(1)]
    rankings = torch.stack([class_order(lat)(int(c)) for c in predicted])
    for (mode, k), logits in slow_masking(clip, sae, pixels, text, LAYER, rankings, KS).items():
        np.testing.assert_allclose(logits_of(rows, mode, k), logits, atol=1e-4)


def test_same_bytes_twice(sae, clip, split, lat, text):
    one, two = (topk_masking(clip, sae, split, lat, text, LAYER, KS, SELECTIONS, per_image=True, seed=[0, 1])
                for _ in range(2))
    assert np.array_equal(np.stack(one.pop("logits").to_list()), np.stack(two.pop("logits").to_list()))
    pd.testing.assert_frame_equal(one, two)


# What can be given wrongly ------------------------------------------------------------------------------

def broken(name, lat, text):
    """Arguments with one thing wrong."""
    good = {"lat": lat, "text_features": text, "ks": KS}
    counts = torch.zeros_like(lat.class_counts)
    return good | {
        "another SAE": {"lat": dataclasses.replace(lat, sae_hash="0" * 16)},
        "k too large": {"ks": [1, S + 1]},
        "k of 0": {"ks": [0, 1]},
        "text width": {"text_features": torch.randn(C, 9)},
        "text classes": {"text_features": text[:3]},
        "selection": {"selection": "classy"},
        "no counts": {"lat": dataclasses.replace(lat, class_counts=counts)},
        "one class": {"lat": dataclasses.replace(lat, class_counts=counts.index_fill(0, torch.tensor([2]), 1)),
                      "selection": "wrong-class"},
        "nothing to rank by": {"lat": None},
        "ranking shape": {"ranking": torch.zeros(C, S - 1, dtype=torch.long)},
        "ranking twice": {"ranking": torch.zeros(C, S, dtype=torch.long)},
        "ranking of floats": {"ranking": torch.rand(C, S)},
        "text of nothing": {"text_features": text.index_fill(0, torch.tensor([3]), 0)},
        "text not finite": {"text_features": text.index_fill(0, torch.tensor([1]), float("nan"))},
        "half a latent": {"ks": [1.7]},
        "ks as text": {"ks": "all"},
        "seed twice": {"seed": [0, 0], "selection": "random"},
        "selection twice": {"selection": ["class", "class"]},
        "seed as text": {"seed": "0"},
        "another block": {"lat": dataclasses.replace(lat, block=0)},
        "classes in another order": {"lat": dataclasses.replace(lat, class_names=lat.class_names[::-1])},
    }[name]


MISTAKES = {
    "another SAE": "another autoencoder", "k too large": f"k = {S + 1} is not a whole number between 1 and {S}",
    "k of 0": "k = 0", "ranking of floats": "whole numbers", "text of nothing": "class 3", "text not finite": "class 1",
    "half a latent": "k = 1.7", "ks as text": "give a list", "seed twice": "each once", "selection twice": "each once",
    "seed as text": "seed .* '0'", "another block": "after block 0", "classes in another order": "another order",
    "text width": "width 9", "text classes": "3 text features", "selection": "class-unshared",
    "no counts": "No class has training images", "one class": "two classes", "nothing to rank by": "neither",
    "ranking shape": f"ranking of shape \\[{C}, {S - 1}\\]", "ranking twice": "every latent once",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_clear_sentence(mistake, sae, clip, split, lat, text):
    with pytest.raises(ValueError, match=MISTAKES[mistake]) as error:
        topk_masking(clip, sae, split, layer=LAYER, **broken(mistake, lat, text))
    assert one_sentence(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_are_one_sentence(value, sae, clip, split, lat, text):
    """Otherwise every image would be of class 0, in a normal table."""
    pixels = split.pixels.clone()
    pixels[2, 0, 1, 1] = value
    with pytest.raises(ValueError, match="position 2.*not finite") as error:
        topk_masking(clip, sae, ArrayDataset(pixels, split.labels), lat, text, LAYER, KS)
    assert one_sentence(error.value)


def test_an_autoencoder_that_is_not_finite_is_one_sentence(sae, clip, split, text):
    broken = copy.deepcopy(sae)
    broken.W_dec.data[3, 0] = float("nan")
    latents = collect_latents(clip, broken, split, LAYER)
    with pytest.raises(ValueError, match="logits that are not finite") as error:
        topk_masking(clip, broken, split, latents, text, LAYER, KS)
    assert one_sentence(error.value)
    broken.W_enc.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite") as error:
        collect_latents(clip, broken, split, LAYER)
    assert one_sentence(error.value)


def test_images_only_of_classes_without_training_images_are_an_error(sae, clip, split, lat, text):
    counts = lat.class_counts.clone()
    counts[1] = 0
    only = ArrayDataset(split.pixels[split.labels == 1], split.labels[split.labels == 1])
    for per_image in (False, True):
        with pytest.raises(ValueError, match="No image is of a class") as error:
            topk_masking(clip, sae, only, dataclasses.replace(lat, class_counts=counts), text, LAYER, KS,
                         per_image=per_image)
        assert one_sentence(error.value)


def test_a_ranking_needs_no_statistics(sae, clip, split, lat, text):
    rankings = torch.stack([class_order(lat)(c) for c in range(C)])
    by_ranking = topk_masking(clip, sae, split, None, text, LAYER, KS, ranking=rankings.numpy())
    pd.testing.assert_frame_equal(by_ranking, topk_masking(clip, sae, split, lat, text, LAYER, KS))


# On the committed model ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def mini():
    """The mini CLIP, its autoencoder, eight test images of eight classes and a ranking per class."""
    profile = load_profile("mini")
    if not (profile.data_dir / "clip").is_dir():
        pytest.skip("data/mini/clip is not there")
    clip = load_clip(profile.model.name)
    train, test = (open_dataset(profile, profile.data.task, split) for split in ("train", "test"))
    sae = SparseAutoencoder.from_pretrained(committed_folder(profile, clip))
    text = class_prototypes(clip, test.class_names, templates(profile, profile.data.task))
    few, some = (ArrayDataset(np.stack([item.image for item in items]), [item.label for item in items],
                              class_names=test.class_names)
                 for items in ([test[i] for i in range(0, 64, 8)], [train[i] for i in range(128)]))
    return clip, sae, few, collect_latents(clip, sae, some, profile.model.layer), text, profile.model.layer


@pytest.mark.parametrize("add_error", [False, True])
def test_the_mini_model_agrees_with_the_twin(mini, add_error):
    clip, sae, few, lat, text, layer = mini
    ks = [1, 2, 5, 10, 50, 100, sae.n_latents]
    rows = topk_masking(clip, sae, few, lat, text, layer, ks, add_error=add_error, per_image=True)
    pixels = clip.pixels(list(few.pixels))
    slow = slow_masking(clip, sae, pixels, text, layer, own_rankings(class_order(lat), few), ks, add_error)
    for (mode, k), expected in slow.items():
        found, best = logits_of(rows, mode, k), expected.topk(2).values
        np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=f"{mode} {k}")
        clear = (best[:, 0] - best[:, 1] > 1e-4).numpy()
        assert (found.argmax(1) == expected.argmax(1).numpy())[clear].all()


def test_the_committed_numbers_say_that_class_latents_matter():
    path = ROOT / "figures" / "mini" / "ablation.csv"
    if not path.is_file():
        pytest.skip("figures/mini/ablation.csv is not there")
    table = pd.read_csv(path)
    assert table.columns.tolist() == ["selection", "mode", "k", "seed", "accuracy", "low", "high"]
    assert set(table["selection"]) == set(SELECTIONS)

    def rows(selection, mode, k):
        return table[(table["selection"] == selection) & (table["mode"] == mode) & (table["k"] == k)]

    original, spliced = rows("class", "original", 0), rows("class", "spliced", table["k"].max())
    assert spliced["accuracy"].item() >= 0.95 * original["accuracy"].item()
    own, matched = rows("class", "off", 10), rows("matched", "off", 10)
    assert len(matched) >= 3 and (own["accuracy"].item() <= matched["accuracy"] - 0.20).all()
    assert (own["high"].item() < matched["low"]).all()
