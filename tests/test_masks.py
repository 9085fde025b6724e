"""Heat maps, soft masks and average precision against loops over patches, pixels and thresholds."""

import math

import numpy as np
import pytest
import torch
from conftest import LAYER, SIDE, WIDTH, random_clip_model, random_sae

from patchsae.clip import Clip
from patchsae.masks import (
    concept_list,
    enlarge,
    heat_maps,
    overlap,
    patch_concepts,
    patch_coverage,
    soft_mask,
)
from patchsae.studies.scores import average_precision, best_threshold, pixel_overlap, pointing_game
from patchsae.world.dataset import SceneDataset
from patchsae.world.scenes import CONCEPTS, KINDS


@pytest.fixture(scope="module")
def wide_clip():
    """Three by three patches, so that rows and columns cannot be mixed up unseen."""
    from transformers import CLIPConfig, CLIPModel

    config = random_clip_model().config.to_dict()
    config["vision_config"] |= {"image_size": 24, "patch_size": 8}
    torch.manual_seed(3)
    return Clip(CLIPModel(CLIPConfig(**config)))


def test_heat_maps_are_the_patch_tokens_in_reading_order(wide_clip):
    sae, latents = random_sae(WIDTH, 20), [7, 0, 19]
    pixels = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    heat = np.asarray(heat_maps(wide_clip, sae, pixels, LAYER, latents))
    assert heat.shape == (4, 3, 3, 3)
    with torch.no_grad():
        h = sae.encode(wide_clip.below(pixels, LAYER))
    for b, i, row, column in np.ndindex(4, 3, 3, 3):
        expected = h[b, 1 + 3 * row + column, latents[i]].item()
        assert heat[b, i, row, column] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_heat_maps_do_not_depend_on_the_batch_and_leave_out_extra_tokens(clip):
    class Prompted(Clip):
        def below(self, pixels, layer):
            z = super().below(pixels, layer)
            return torch.cat([z, torch.ones_like(z[:, :2])], 1)

    sae = random_sae(WIDTH, 20)
    pixels = torch.randn(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    together = np.asarray(heat_maps(clip, sae, pixels, LAYER, [2, 3]))
    single = np.concatenate(
        [np.asarray(heat_maps(clip, sae, pixels[i : i + 1], LAYER, [2, 3])) for i in range(5)]
    )
    np.testing.assert_allclose(together, single, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        together,
        np.asarray(heat_maps(Prompted(clip.model), sae, pixels, LAYER, [2, 3])),
        rtol=1e-4,
        atol=1e-5,
    )


def test_enlarge_repeats_patches():
    heat = np.arange(6.0).reshape(2, 3)[:, :2] + 0.5
    large = enlarge(heat, 8)
    assert large.shape == (8, 8)
    for y, x in np.ndindex(8, 8):
        assert large[y, x] == heat[y // 4, x // 4]


def test_soft_mask_multiplies_every_pixel_by_its_patch():
    rng = np.random.default_rng(0)
    image, heat = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8), rng.random((3, 3)) * 7 + 2
    masked = np.asarray(soft_mask(image, heat))
    low, high = heat.min(), heat.max()
    assert masked.shape == image.shape
    scale = 1 if masked.dtype == np.uint8 else (255 if masked.max() <= 1 else 1)
    for y, x, c in np.ndindex(12, 12, 3):
        expected = image[y, x, c] * (heat[y // 4, x // 4] - low) / (high - low)
        assert float(masked[y, x, c]) * scale == pytest.approx(expected, abs=1.0)
    assert not masked[np.kron(heat == low, np.ones((4, 4))) > 0].any()
    assert np.array_equal(
        masked[np.kron(heat == high, np.ones((4, 4))) > 0], image[np.kron(heat == high, np.ones((4, 4))) > 0]
    )


def test_soft_mask_of_a_flat_map_has_no_nan():
    image = np.full((8, 8, 3), 200, np.uint8)
    assert np.array_equal(soft_mask(image, np.full((2, 2), 3.0)), image)
    assert not np.asarray(soft_mask(image, np.zeros((2, 2)))).any()


def naive_average_precision(scores, positive):
    """One threshold after the other: take everything at or above it, look at precision and recall."""
    if not positive.any():
        return math.nan
    scores = np.maximum(scores, 0)
    area, before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        taken = [p for s, p in zip(scores, positive) if s >= threshold]
        precision, recall = sum(taken) / len(taken), sum(taken) / positive.sum()
        area += (recall - before) * precision
        before = recall
    return area


def scored(seed, n, levels):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=n) if levels is None else rng.integers(-2, levels, n).astype(float)
    positives = rng.random((n, 6)) < rng.random(6)
    positives[:, 4], positives[:, 5] = False, True
    return scores, positives


@pytest.mark.parametrize(
    "n, levels", [(1, None), (2, 1), (50, None), (50, 3), (50, 1), (200, 12), (200, None)]
)
@pytest.mark.parametrize("seed", range(3))
def test_average_precision_equals_the_thresholds(n, levels, seed):
    scores, positives = scored(seed, n, levels)
    found = average_precision(scores, positives)
    assert found.shape == (6,)
    expected = [naive_average_precision(scores, positives[:, c]) for c in range(6)]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    assert math.isnan(found[4]) and found[5] == pytest.approx(1)


def test_average_precision_by_hand_and_without_order():
    positives = np.array([[1, 0], [0, 1], [1, 0], [0, 0]], bool)
    np.testing.assert_allclose(
        average_precision(np.array([4.0, 3, 2, 1]), positives), [0.5 + 0.5 * 2 / 3, 0.5]
    )
    np.testing.assert_allclose(
        average_precision(np.zeros(4), positives), [0.5, 0.25]
    )  # silent: the base rate
    np.testing.assert_allclose(average_precision(np.array([0.0, -1, -2, 0]), positives), [0.5, 0.25])
    scores, many = scored(0, 100, 4)
    order = np.random.default_rng(1).permutation(100)
    np.testing.assert_allclose(average_precision(scores, many), average_precision(scores[order], many[order]))
    np.testing.assert_allclose(
        average_precision(scores, many), average_precision(np.exp(scores) - np.exp(0), many)
    )


def slow_overlap(scores, share, threshold):
    """Pixel by pixel: each patch has 8 of them, a share of which the concept covers."""
    both = either = 0
    for score, part in zip(scores, share):
        for pixel in range(8):
            chosen, true = score >= threshold, pixel < 8 * part
            both, either = both + (chosen and true), either + (chosen or true)
    return both / either if either else math.nan


@pytest.mark.parametrize("seed", range(4))
def test_best_threshold_against_all_thresholds(seed):
    rng = np.random.default_rng(seed)
    share = rng.integers(0, 9, 40) / 8 * (rng.random(40) < 0.4)
    scores = np.maximum(0, rng.integers(-3, 6, 40) + 4 * share)
    levels = sorted(set(scores[scores > 0]))
    expected = max(slow_overlap(scores, share, level) for level in levels)
    threshold = best_threshold(scores, share)
    assert threshold in levels and slow_overlap(scores, share, threshold) == pytest.approx(expected)
    assert pixel_overlap(scores >= threshold, share) == pytest.approx(expected)


def test_overlap_of_pixels_at_its_extremes():
    share = np.array([1.0, 0, 1, 0])
    assert best_threshold(share * 3, share) == 3 and pixel_overlap(share > 0, share) == 1
    assert pixel_overlap(share == 0, share) == 0 and math.isnan(pixel_overlap(share > 2, 0 * share))
    assert pixel_overlap(np.ones(4, bool), share) == 0.5  # a constant latent: the share of the concept
    assert best_threshold(np.zeros(4), share) == math.inf


def test_pointing_game_by_hand():
    heat = np.array([[0, 2.0, 1], [0, 0, 0], [5, 5, 0], [1, 0, 0]])
    shown = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0], [0, 0, 0]], bool)
    assert pointing_game(heat, shown) == pytest.approx(1 / 3)  # hit, silent, tie to the first patch; not shown
    assert pointing_game(shown * 1.0, shown) == 1 and math.isnan(pointing_game(heat, shown & False))


def test_concepts_of_patches_equal_a_count_of_pixels():
    ds = SceneDataset("nouns", "test", 6)
    rows = [4, 0]
    found, names = patch_concepts(ds, rows), concept_list(ds)
    assert found.shape == (2, 64, len(names)) and found.dtype == bool
    assert [name for _, name in names] == [name for kind in KINDS for name in CONCEPTS[kind]]
    for i, row in enumerate(rows):
        maps = ds.scene(row).maps
        for patch, (c, (kind, name)) in ((p, cn) for p in range(64) for cn in enumerate(names)):
            y, x = 8 * (patch // 8), 8 * (patch % 8)
            plane = maps[KINDS.index(kind), y : y + 8, x : x + 8]
            assert found[i, patch, c] == ((plane == CONCEPTS[kind].index(name)).sum() >= 16), (
                row,
                patch,
                kind,
                name,
            )
    np.testing.assert_array_equal(patch_coverage(ds, rows) >= 0.25, found)
    assert concept_list(SceneDataset("nouns", "train", 1), ("style",)) == [("style", "photo"), ("style", "sketch")]
    np.testing.assert_array_equal(
        patch_concepts(ds, rows, ("style",)), found[:, :, [n[0] == "style" for n in names]]
    )


def test_overlap():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    assert math.isnan(overlap(a, b))
    a[:2], b[1:3] = True, True
    assert overlap(a, b) == pytest.approx(4 / 12) == overlap(b, a)
    assert overlap(a, a) == 1.0 and overlap(a, ~a) == 0.0
