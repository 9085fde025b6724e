"""Sources of images: what an item is, ids that follow the content, and errors in one sentence."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import picture, refused, save_picture
from PIL import Image

from patchsae import ArrayDataset, config, load_profile
from patchsae.activations import token_batches
from patchsae.data.datasets import FolderDataset, content_id, open_dataset, templates
from patchsae.world.dataset import SceneDataset


def test_content_ids_follow_the_bytes_and_the_shape_and_not_the_layout_in_memory():
    image, changed, pixels = picture(), picture(), torch.randn(3, 4, 4)
    changed[5, 4, 2] ^= 1
    assert content_id(image) == content_id(torch.from_numpy(image)) == content_id(np.asfortranarray(image))
    others = [changed, image.transpose(1, 0, 2), image.reshape(5, 6, 3), image.reshape(30, 3), image.view(np.int8),
              image[::-1], np.zeros_like(image), pixels, pixels.double()]
    assert len({content_id(image), *map(content_id, others)}) == 10
    assert content_id(image[::2]) == content_id(image[::2].copy())
    turned = pixels.permute(0, 2, 1).contiguous().permute(0, 2, 1)
    assert content_id(pixels) == content_id(pixels.numpy()) == content_id(turned)
    assert content_id(np.zeros((2, 2, 3), np.uint8)) == "c547defe0b9f8d88"
    assert content_id(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)) == "3071ac54b4a84fb3"


# Arrays

def test_array_of_images():
    images, labels = np.stack([picture(i) for i in range(4)]), [1, 0, 2, 1]
    ds = ArrayDataset(images, labels)
    assert len(ds) == 4 and ds.class_names == ("0", "1", "2")
    for image, label, item in zip(images, labels, ds, strict=True):
        assert np.array_equal(item.image, image) and item.image.dtype == np.uint8
        assert item.label == label and isinstance(item.label, int) and item.id == content_id(image)
    assert ArrayDataset(images[::-1], [0] * 4)[3].id == ds[0].id
    with pytest.raises(IndexError):
        ds[4]
    assert len(ArrayDataset(np.zeros((0, 4, 4, 3), np.uint8), [])) == 0


@pytest.mark.parametrize("labels", [[2, 0], np.array([2, 0]), torch.tensor([2, 0]), np.array([2, 0], np.uint8)])
def test_array_of_pixels_with_names(labels):
    pixels = torch.randn(2, 3, 4, 4)
    ds = ArrayDataset(pixels, labels, ids=["b", "a"], class_names=["x", "y", "z", "w"])
    assert ds.class_names == ("x", "y", "z", "w") and torch.equal(ds[1].image, pixels[1])
    assert [(item.label, item.id) for item in ds] == [(2, "b"), (0, "a")]


@pytest.mark.parametrize("arguments", [
    {"labels": [0, 1]}, {"labels": [0, 1, 2, 3]}, {"labels": [0, 1, 0], "ids": ["a", "b"]}, {"labels": [0, -1, 0]},
    {"labels": [0, 3, 1], "class_names": ["a", "b", "c"]}, {"labels": [0.5, 1.7, 0.0]}],
    ids=["too few", "too many", "ids", "negative", "beyond the names", "not whole"])
def test_labels_that_do_not_fit(arguments):
    with refused():
        ArrayDataset(np.stack([picture(i) for i in range(3)]), **arguments)


@pytest.mark.parametrize("pixels", [
    np.zeros((3, 3, 8, 8), np.uint8), torch.zeros(3, 8, 8, 3), np.zeros((3, 8, 8, 3), np.int64)],
    ids=["bytes with channels first", "floats with channels last", "whole numbers that are not bytes"])
def test_pixels_that_do_not_fit_are_one_sentence_before_the_model(clip, pixels):
    with refused():
        list(token_batches(clip, ArrayDataset(pixels, [0, 1, 0]), -2))


def test_fingerprints_follow_what_a_data_set_holds(tree):
    images, ids = np.stack([picture(i) for i in range(3)]), ["a", "b", "c"]
    changed = images.copy()
    changed[2, 0, 0, 0] ^= 1

    def sets():
        return [ArrayDataset(images, [0, 1, 0]), ArrayDataset(changed, [0, 1, 0]), ArrayDataset(images, [0, 1, 1]),
                ArrayDataset(images, [0, 1, 0], class_names=["a", "b"]), ArrayDataset(images[::-1], [0, 1, 0]),
                ArrayDataset(images[:2], [0, 1]), ArrayDataset(images, [0, 1, 0], ids),
                ArrayDataset(changed, [0, 1, 0], ids), SceneDataset("nouns", "train", 3),
                SceneDataset("nouns", "train", 4), SceneDataset("nouns", "test", 3),
                SceneDataset("colours", "train", 3), FolderDataset(tree), FolderDataset(tree, 4)]

    found = [ds.fingerprint() for ds in sets()]
    assert len(set(found)) == len(found) and found == [ds.fingerprint() for ds in sets()]
    path = tree / "great_white_shark" / "great_white_shark 2.bmp"
    size = path.stat().st_size
    save_picture(path, picture(77, (10, 9, 3)))  # another image of the same size under the same name
    assert path.stat().st_size == size and FolderDataset(tree).fingerprint() != found[-2]


# Folders

@pytest.fixture
def tree(tmp_path):
    """Three classes with 3, 1 and 2 images, and things that are no images."""
    for name, count in (("great_white_shark", 3), ("ant", 1), ("bee", 2)):
        for i in reversed(range(count)):
            save_picture(tmp_path / name / f"{name} {i}{('.png', '.PNG', '.bmp')[i]}", picture(i, (8 + i, 9, 3)))
        (tmp_path / name / "notes.txt").write_text("no image")
        (tmp_path / name / ".hidden.png").write_bytes(b"scraps of a file manager")
    (tmp_path / ".ipynb_checkpoints").mkdir()  # notebooks leave them wherever someone looks at a file
    (tmp_path / "list.csv").write_text("no folder")
    return tmp_path


def test_folder_takes_classes_in_turn_and_in_order(tree):
    ds = FolderDataset(tree)
    assert ds.class_names == ("ant", "bee", "great white shark")
    assert [item.label for item in ds] == [0, 1, 2, 1, 2, 2]
    assert [path.stem for path, _ in ds.files] == ["ant 0", "bee 0", "great_white_shark 0", "bee 1",
                                                   "great_white_shark 1", "great_white_shark 2"]
    for n in (1, 4, 6, 100):
        assert FolderDataset(tree, n).files == ds.files[:n] and FolderDataset(tree, n).class_names == ds.class_names
    image = picture(2, (10, 9, 3))
    assert np.array_equal(ds[5].image, image) and ds[5].id == content_id(image)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_folder_reads_every_kind_of_image_as_rgb(tmp_path, mode):
    path = tmp_path / "a" / ("x.tif" if mode == "CMYK" else "x.png")
    path.parent.mkdir()
    Image.fromarray(picture(0, (8, 8, 3))).convert(mode).save(path)
    image = FolderDataset(tmp_path)[0].image
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8
    assert np.array_equal(image, np.asarray(Image.open(path).convert("RGB")))


def test_folder_errors_are_one_sentence(tree, tmp_path):
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "nowhere", tmp_path / "empty", tree / "list.csv"):
        with refused(str(root), FileNotFoundError):
            FolderDataset(root)
    for content in (b"", b"not an image", (tree / "ant" / "ant 0.png").read_bytes()[:60]):
        (tree / "ant" / "ant 0.png").write_bytes(content)
        with refused("ant 0.png"):
            FolderDataset(tree)[0]


# What a profile opens

def test_open_dataset(tree, monkeypatch):
    profile = load_profile("mini")
    train, test = open_dataset(profile, "colours", "train"), open_dataset(profile, "colours", "test")
    assert (len(train), len(test)) == (profile.data.train_images, profile.data.test_images)
    assert train[0].id == SceneDataset("colours", "train", 1)[0].id != test[0].id
    folders = dataclasses.replace(profile, data=dataclasses.replace(profile.data, source="folders", train_images=4))
    monkeypatch.setattr(type(profile), "data_dir", property(lambda self: tree.parent / "profile"))
    place = tree.parent / "profile" / "images" / "pets"
    place.mkdir(parents=True)
    tree.rename(place / "train")
    assert len(open_dataset(folders, "pets", "train")) == 4
    with refused(kind=FileNotFoundError):
        open_dataset(folders, "pets", "test")


@pytest.mark.parametrize("kind, task, count", [
    ("imagenet_ensemble_80", "nouns", 80), ("imagenet_ensemble_7", "aerial", 7), ("own", "pairs", 1),
    ("own", "textures", "a photo of a {} object."), ("own", "unheard of", "a photo of a {}.")])
def test_templates(kind, task, count):
    profile = load_profile("mini")
    found = templates(dataclasses.replace(profile, model=dataclasses.replace(profile.model, templates=kind)), task)
    assert found == [count] or len(found) == count
    assert all(t.count("{}") == 1 and "cat" in t.format("cat") for t in found)


@pytest.mark.parametrize("key, value", [("templates", "imagenet_ensemble_8"), ("source", "web"), ("tokens", "some")])
def test_misspelt_choices_are_named_when_the_profile_is_read(key, value, tmp_path, monkeypatch):
    text = (config.PROFILES / "mini.toml").read_text()
    lines = [f'{key} = "{value}"' if line.startswith(f"{key} = ") else line for line in text.splitlines()]
    (tmp_path / "odd.toml").write_text("\n".join(lines))
    monkeypatch.setattr(config, "PROFILES", tmp_path)
    with refused(value):
        load_profile("odd")
