"""Whatever holds images and labels gives what an ``ArrayDataset`` of the same gives."""

import numpy as np
import pytest
import torch
from conftest import LAYER, SIDE, picture, random_sae, refused
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from patchsae import ArrayDataset, collect_latents
from patchsae.data.adapters import as_images


class Pairs(Dataset):
    """A data set of torch, of any kind of image."""

    def __init__(self, images, labels, **named):
        self.images, self.labels = images, labels
        self.__dict__ |= named

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.images[i], self.labels[i]


def same(a, b):
    for name in ("frequency", "reference_values", "class_counts"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name))
    assert a.class_names == b.class_names and (a.reference_ids == b.reference_ids).all()


@pytest.mark.parametrize("make", [
    lambda x, y: Pairs(x, y), lambda x, y: DataLoader(Pairs(x, y), batch_size=4, shuffle=True), lambda x, y: (x, y),
    lambda x, y: TensorDataset(x, torch.from_numpy(y)), lambda x, y: Subset(ArrayDataset(x, y), range(len(y))),
    lambda x, y: Pairs(x, [-1] * len(y), targets=y.tolist())])
def test_preprocessed_pixels(clip, make):
    pixels, labels = torch.randn(9, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)), np.arange(9) % 3
    sae = random_sae()
    expected = collect_latents(clip, sae, ArrayDataset(pixels, labels), LAYER)
    same(collect_latents(clip, sae, make(pixels, labels), LAYER), expected)


def test_pictures(clip):
    pixels, labels = picture(0, (6, 20, 24, 3)), np.arange(6) % 2
    sae, names = random_sae(), ["cat", "dog"]
    expected = collect_latents(clip, sae, ArrayDataset(pixels, labels, class_names=names), LAYER)
    for images in ([Image.fromarray(p) for p in pixels], list(pixels)):
        same(collect_latents(clip, sae, Pairs(images, labels.tolist(), classes=names), LAYER), expected)


def test_a_part_keeps_positions_labels_and_hash():
    ds = ArrayDataset(torch.randn(8, 3, SIDE, SIDE), np.arange(8) % 4)
    part = as_images(Subset(ds, [5, 2]))
    assert part.labels.tolist() == [1, 2] and part[0].id == ds[5].id
    assert as_images(ds) is ds and as_images(Pairs(ds.pixels, ds.labels)).fingerprint() != part.fingerprint()


@pytest.mark.parametrize("source", [
    5, None, "images", torch.randn(4, 3, SIDE, SIDE), Pairs(["a"], [0]), Pairs(torch.randn(2, 3, SIDE, SIDE), [0, 1.5]),
    Pairs(torch.randn(2, 3, SIDE, SIDE), [0, -1]), [1, 2, 3],
    Pairs(np.zeros((2, SIDE, SIDE), np.uint8), [0, 1]), Pairs(np.zeros((2, 3, SIDE, SIDE), np.int32), [0, 1])])
def test_what_is_no_data_set_is_one_sentence(clip, source):
    with refused():
        collect_latents(clip, random_sae(), source, LAYER)
