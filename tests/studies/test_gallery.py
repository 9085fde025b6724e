"""The rules that choose latents for pictures."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LAYER, WIDTH, one_sentence, random_sae

from patchsae import ArrayDataset, collect_latents
from patchsae.studies import gallery


@pytest.fixture
def stats(clip, image_data):
    return collect_latents(clip, random_sae(WIDTH, 20), image_data, LAYER, n_reference=4)


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
    boxes = gallery.regions(table, share=0.25)
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
    assert gallery.top_latent(Counts) == 0
    assert gallery.top_latent(Counts, exclude=[0]) == 2


def test_strongest_breaks_ties_by_index_and_pairs_are_told_apart():
    assert gallery.strongest(torch.tensor([1.0, 3.0, 3.0, 2.0]), 3) == [1, 2, 3]
    pair = {"photo": torch.tensor([5.0, 4.0, 3.0, 0.0]), "sketch": torch.tensor([0.0, 4.0, 3.0, 5.0])}
    entropy = torch.tensor([0.0, 2.0, 1.0, 0.0])
    assert gallery.pair_latents(pair, entropy, k=3) == {"shared": 2, "photo only": 0, "sketch only": 3}
    assert gallery.pair_latents(pair, entropy, k=1) == {"photo only": 0, "sketch only": 3}


def test_first_correct_prefers_a_hit_and_names_a_missing_class(clip, image_data):
    text = clip.text_features(["a photo of a cat.", "a photo of a dog.", "a photo of a pig."])
    for label in range(3):
        row = gallery.first_correct(clip, image_data, label, text)
        own = [i for i in range(len(image_data)) if image_data[i].label == label]
        pixels = clip.pixels([image_data[i].image for i in own])
        right = clip.logits(clip.above(clip.below(pixels, -1), -1), text).argmax(1) == label
        assert row == (own[int(right.int().argmax())] if right.any() else own[0])
    with pytest.raises(ValueError, match="no image of class 7") as error:
        gallery.first_correct(clip, image_data, 7, text)
    assert one_sentence(error.value)
