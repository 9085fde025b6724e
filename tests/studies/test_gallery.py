"""The rules that choose latents for pictures."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LAYER, WIDTH, one_sentence, random_sae

from patchsae import ArrayDataset, collect_latents
from patchsae.masks import heat_maps, soft_mask
from patchsae.studies import gallery


@pytest.fixture
def study(clip, image_data):
    sae = random_sae(WIDTH, 20)
    return SimpleNamespace(clip=clip, sae=sae, layer=LAYER, train=image_data,
                           stats=collect_latents(clip, sae, image_data, LAYER, n_reference=4))


@pytest.fixture
def stats(study):
    return study.stats


def test_references_are_the_images_that_the_statistics_name(stats, image_data):
    for latent in range(20):
        rows = [r for r in stats.reference_rows[latent].tolist() if r >= 0]
        images = gallery.references(stats, image_data, latent)
        assert len(images) == len(rows)
        assert all(np.array_equal(image, image_data[row].image) for image, row in zip(images, rows))


def test_references_refuse_other_images(stats, image_data):
    other = ArrayDataset(image_data.pixels[::-1].copy(), image_data.labels, class_names=image_data.class_names)
    latent = int((stats.reference_rows >= 0).any(1).nonzero()[0])
    with pytest.raises(ValueError, match="another image") as error:
        gallery.references(stats, other, latent)
    assert one_sentence(error.value)


def test_regions_hold_their_share_and_picks_lie_inside():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"latent": range(400), "frequency": 10 ** rng.uniform(-4, 0, 400),
                          "mean_activation": 10 ** rng.uniform(-3, 1, 400), "label_entropy": rng.random(400)})
    boxes = gallery.regions(table)
    log = np.log10(table[["frequency", "mean_activation"]]).set_axis(["x", "y"], axis=1)
    x0, x1, _, _ = boxes["rare, weak"]
    assert log["x"].between(x0, x1).mean() == pytest.approx(0.25, abs=0.01)
    picked = gallery.pick_latents(table, boxes)
    assert list(picked["region"]) == [name for name in boxes for _ in range(2)]
    for name, which, latent in picked.values:
        x0, x1, y0, y1 = boxes[name]
        inside = table[log["x"].between(x0, x1) & log["y"].between(y0, y1)]
        assert latent in set(inside["latent"])
        extreme = inside["label_entropy"].min() if which == "lowest entropy" else inside["label_entropy"].max()
        assert table.loc[latent, "label_entropy"] == extreme


def test_distinctive_and_top_latents():
    class Counts:
        class_counts = torch.tensor([[9, 0, 5], [9, 4, 0], [9, 0, 0]])

    assert gallery.distinctive_latents(Counts).tolist() == [2, 1, 0]
    assert gallery.top_latent(Counts, []) == 0
    assert gallery.top_latent(Counts, exclude=[0]) == 2


def test_strongest_breaks_ties_by_index_and_pairs_are_told_apart():
    assert gallery.strongest(torch.tensor([1.0, 3.0, 3.0, 2.0]), 3) == [1, 2, 3]
    pair = {"photo": torch.tensor([5.0, 4.0, 3.0, 0.0]), "sketch": torch.tensor([0.0, 4.0, 3.0, 5.0])}
    entropy = torch.tensor([0.0, 2.0, 1.0, 0.0])
    assert gallery.pair_latents(pair, entropy, k=3) == {"shared": 2, "photo only": 0, "sketch only": 3}
    assert gallery.pair_latents(pair, entropy, k=1) == {"photo only": 0, "sketch only": 3}


def test_masks_are_those_of_the_chosen_latents_on_the_chosen_image(study, image_data):
    pixels = study.clip.pixels([image_data[3].image])
    expected = heat_maps(study.clip, study.sae, pixels, LAYER, list(range(20)))[0].numpy()
    for latent, (heat, image) in zip((5, 2), gallery.masked(study, image_data, 3, [5, 2])):
        assert np.allclose(heat, expected[latent], atol=1e-6)
        assert np.array_equal(image, soft_mask(image_data[3].image, heat))
    first, second = gallery.mask_rows_of(study, image_data, 3, [5, 2])
    assert np.array_equal(first.image, image_data[3].image) and second.image is None
    assert second.title == "latent 2" and np.allclose(second.heat, expected[2], atol=1e-6)


def test_token_latents_are_those_of_the_image(study, image_data):
    z = study.clip.below(study.clip.pixels([image_data[3].image]), LAYER)
    assert torch.allclose(gallery.token_latents(study, image_data, 3), study.sae.encode(z)[0], atol=1e-6)


def test_layer_latents_are_the_strongest_of_one_patch(study, image_data):
    grid = study.clip.grid
    pixels = study.clip.pixels([image_data[3].image])
    heats = heat_maps(study.clip, study.sae, pixels, LAYER, list(range(20)))[0]
    shown = gallery.layer_latents(study, image_data, 3, (0, grid - 1))
    strongest = heats[:, 0, grid - 1].sort(descending=True, stable=True).indices[:3].tolist()
    assert [latent.title for latent in shown] == [f"latent {s}" for s in strongest]
    for latent, s in zip(shown, strongest):
        assert np.allclose(latent.heat, heats[s], atol=1e-6)
        assert len(latent.images) == len(gallery.references(study.stats, image_data, s, 4))


def test_style_row_masks_both_images(study, image_data):
    title, images, *_ = gallery.style_row(study, 4, "shared", [(image_data, 0), (image_data, 5)])
    expected = [gallery.masked(study, image_data, row, [4])[0][1] for row in (0, 5)]
    expected += gallery.references(study.stats, image_data, 4, 4)
    assert title == "shared" and all(np.array_equal(*pair) for pair in zip(images, expected, strict=True))


def test_first_correct_prefers_a_hit_and_names_a_missing_class(study, clip, image_data):
    text = clip.text_features(["a photo of a cat.", "a photo of a dog.", "a photo of a pig."])
    study.text = text
    for label in range(3):
        row = gallery.first_correct(study, image_data, label)
        own = [i for i in range(len(image_data)) if image_data[i].label == label]
        pixels = clip.pixels([image_data[i].image for i in own])
        right = clip.logits(clip.above(clip.below(pixels, -1), -1), text).argmax(1) == label
        assert row == (own[int(right.int().argmax())] if right.any() else own[0])
    with pytest.raises(ValueError, match="no image of class 7") as error:
        gallery.first_correct(study, image_data, 7)
    assert one_sentence(error.value)
