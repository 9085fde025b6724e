"""Sources of images: what an item is, ids that follow the content, and errors in one sentence."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import one_sentence
from PIL import Image

from patchsae import ArrayDataset, config, load_profile
from patchsae.data.datasets import FolderDataset, content_id, open_dataset, templates
from patchsae.world.dataset import SceneDataset
from patchsae.world.scenes import TASKS, class_names, draw_scene


def picture(seed=0, shape=(6, 5, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# Content ids --------------------------------------------------------------------------------------------


def test_content_ids_follow_the_bytes_and_the_shape():
    image = picture()
    assert content_id(image) == content_id(image.copy()) == content_id(torch.from_numpy(image))
    assert len(content_id(image)) == 16 and set(content_id(image)) <= set("0123456789abcdef")
    changed = image.copy()
    changed[5, 4, 2] ^= 1
    others = [
        changed,
        image.transpose(1, 0, 2),
        image.reshape(5, 6, 3),
        image.reshape(30, 3),
        image.view(np.int8),
        image[::-1],
        np.zeros_like(image),
    ]
    assert len({content_id(image), *map(content_id, others)}) == 8


def test_content_ids_do_not_depend_on_the_layout_in_memory():
    image = picture()
    assert content_id(np.asfortranarray(image)) == content_id(image)
    assert content_id(picture(1, (12, 5, 3))[::2]) == content_id(picture(1, (12, 5, 3))[::2].copy())
    pixels = torch.randn(3, 4, 4)
    assert (
        content_id(pixels)
        == content_id(pixels.numpy())
        == content_id(pixels.permute(0, 2, 1).contiguous().permute(0, 2, 1))
    )
    assert content_id(pixels) != content_id(pixels.double())


def test_content_ids_are_known():
    assert content_id(np.zeros((2, 2, 3), np.uint8)) == "c547defe0b9f8d88"
    assert content_id(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)) == "3071ac54b4a84fb3"


# Arrays -------------------------------------------------------------------------------------------------


def test_array_of_images():
    images = np.stack([picture(i) for i in range(4)])
    ds = ArrayDataset(images, [1, 0, 2, 1])
    assert len(ds) == 4 and tuple(ds.class_names) == ("0", "1", "2")
    for i, item in enumerate(ds):
        assert np.array_equal(item.image, images[i]) and item.image.dtype == np.uint8
        assert (
            item.label == [1, 0, 2, 1][i] and isinstance(item.label, int) and item.id == content_id(images[i])
        )
    assert ArrayDataset(images[::-1], [0] * 4)[3].id == ds[0].id


@pytest.mark.parametrize(
    "labels", [[2, 0], np.array([2, 0]), torch.tensor([2, 0]), (2, 0), np.array([2, 0], np.uint8)]
)
def test_array_of_pixels_with_names(labels):
    pixels = torch.randn(2, 3, 4, 4)
    ds = ArrayDataset(pixels, labels, ids=["b", "a"], class_names=["x", "y", "z", "w"])
    assert tuple(ds.class_names) == ("x", "y", "z", "w")
    assert torch.equal(torch.as_tensor(ds[1].image), pixels[1]) and (ds[0].label, ds[1].label) == (2, 0)
    assert (ds[0].id, ds[1].id) == ("b", "a")


def test_array_can_be_walked_and_ends():
    ds = ArrayDataset(np.stack([picture(i) for i in range(3)]), [0, 1, 0])
    assert [item.label for item in ds] == [0, 1, 0]
    with pytest.raises(IndexError):
        ds[3]
    assert len(ArrayDataset(np.zeros((0, 4, 4, 3), np.uint8), [])) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"labels": [0, 1]},
        {"labels": [0, 1, 2, 3]},
        {"labels": [0, 1, 0], "ids": ["a", "b"]},
        {"labels": [0, -1, 0]},
        {"labels": [0, 3, 1], "class_names": ["a", "b", "c"]},
        {"labels": [0.5, 1.7, 0.0]},
    ],
    ids=["too few", "too many", "ids", "negative", "beyond the names", "not whole"],
)
def test_labels_that_do_not_fit(arguments):
    with pytest.raises(ValueError) as error:
        ArrayDataset(np.stack([picture(i) for i in range(3)]), **arguments)
    assert one_sentence(error.value)


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((3, 3, 8, 8), np.uint8), torch.zeros(3, 8, 8, 3), np.zeros((3, 8, 8, 3), np.int64)],
    ids=["bytes with channels first", "floats with channels last", "whole numbers that are not bytes"],
)
def test_pixels_that_do_not_fit_are_one_sentence_before_the_model(clip, pixels):
    from patchsae.activations import token_batches

    with pytest.raises(ValueError) as error:
        list(token_batches(clip, ArrayDataset(pixels, [0, 1, 0]), -2))
    assert one_sentence(error.value)


def test_fingerprints_follow_what_a_data_set_holds(tree):
    images = np.stack([picture(i) for i in range(3)])
    changed = images.copy()
    changed[2, 0, 0, 0] ^= 1
    sets = [
        ArrayDataset(images, [0, 1, 0]),
        ArrayDataset(changed, [0, 1, 0]),
        ArrayDataset(images, [0, 1, 1]),
        ArrayDataset(images, [0, 1, 0], class_names=["a", "b"]),
        ArrayDataset(images[::-1], [0, 1, 0]),
        ArrayDataset(images[:2], [0, 1]),
        ArrayDataset(images, [0, 1, 0], ids=["a", "b", "c"]),
        SceneDataset("nouns", "train", 3),
        SceneDataset("nouns", "train", 4),
        SceneDataset("nouns", "test", 3),
        SceneDataset("colours", "train", 3),
        FolderDataset(tree),
        FolderDataset(tree, 4),
    ]
    assert len({ds.fingerprint() for ds in sets}) == len(sets)
    assert ArrayDataset(images.copy(), np.array([0, 1, 0])).fingerprint() == sets[0].fingerprint()
    assert SceneDataset("nouns", "train", 3).fingerprint() == sets[7].fingerprint()
    assert FolderDataset(tree).fingerprint() == sets[11].fingerprint()


def test_fingerprint_sees_other_pixels_under_the_same_ids():
    one, other = (ArrayDataset(np.stack([picture(i), picture(9)]), [0, 1], ids=["a", "b"]) for i in (0, 1))
    assert one.fingerprint() != other.fingerprint()


def test_fingerprint_sees_another_image_of_the_same_size_under_the_same_name(tree):
    before = FolderDataset(tree).fingerprint()
    path = tree / "great_white_shark" / "great_white_shark 2.bmp"
    size = path.stat().st_size
    Image.fromarray(picture(77, (10, 9, 3))).save(path)
    assert path.stat().st_size == size and FolderDataset(tree).fingerprint() != before


# Scenes -------------------------------------------------------------------------------------------------


def test_scene_data_set():
    ds = SceneDataset("nouns", "test", 5)
    assert len(ds) == 5 and ds.class_names == class_names("nouns")
    for i, item in enumerate(ds):
        scene = draw_scene("nouns", 1, i)
        assert np.array_equal(item.image, scene.image) and item.label == scene.label
        assert item.id == content_id(scene.image) and np.array_equal(ds.scene(i).maps, scene.maps)
    for outside in (5, -1):
        with pytest.raises(IndexError) as error:
            ds[outside]
        assert one_sentence(error.value)


@pytest.mark.parametrize("task", TASKS)
def test_splits_and_pretraining_share_no_image(task):
    ids = [
        {ds[i].id for i in range(80)}
        for ds in (SceneDataset(task, "train", 80), SceneDataset(task, "test", 80))
    ]
    ids.append({content_id(draw_scene("pretraining", 2, i).image) for i in range(80)})
    assert len(set.union(*ids)) == 240


# Folders ------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """Three classes with 3, 1 and 2 images, and things that are no images."""
    for name, count in (("great_white_shark", 3), ("ant", 1), ("bee", 2)):
        (tmp_path / name).mkdir()
        for i in reversed(range(count)):
            ending = (".png", ".PNG", ".bmp")[i]
            Image.fromarray(picture(i, (8 + i, 9, 3))).save(tmp_path / name / f"{name} {i}{ending}")
        (tmp_path / name / "notes.txt").write_text("no image")
    (tmp_path / "list.csv").write_text("no folder")
    return tmp_path


def test_folder_takes_classes_in_turn_and_in_order(tree):
    ds = FolderDataset(tree)
    assert ds.class_names == ("ant", "bee", "great white shark") and len(ds) == 6
    assert [item.label for item in ds] == [0, 1, 2, 1, 2, 2]
    assert [path.stem for path, _ in ds.files] == [
        "ant 0",
        "bee 0",
        "great_white_shark 0",
        "bee 1",
        "great_white_shark 1",
        "great_white_shark 2",
    ]
    for n in range(1, 7):
        assert (
            FolderDataset(tree, n).files == ds.files[:n]
            and FolderDataset(tree, n).class_names == ds.class_names
        )
    assert len(FolderDataset(tree, 100)) == 6
    item = ds[5]
    assert np.array_equal(item.image, picture(2, (10, 9, 3))) and item.id == content_id(
        picture(2, (10, 9, 3))
    )


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_folder_reads_every_kind_of_image_as_rgb(tmp_path, mode):
    (tmp_path / "a").mkdir()
    image = Image.fromarray(picture(0, (8, 8, 3))).convert(mode)
    path = tmp_path / "a" / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    found = FolderDataset(tmp_path)[0].image
    assert found.shape == (8, 8, 3) and found.dtype == np.uint8
    assert np.array_equal(found, np.asarray(Image.open(path).convert("RGB")))


def test_hidden_folders_are_no_classes(tree):
    """Notebooks leave ``.ipynb_checkpoints`` wherever someone looks at a file."""
    (tree / ".ipynb_checkpoints").mkdir()
    (tree / "ant" / ".hidden.png").write_bytes(b"scraps of a file manager")
    assert FolderDataset(tree).class_names == ("ant", "bee", "great white shark")
    assert len(FolderDataset(tree)) == 6


def test_folder_errors_are_one_sentence(tree, tmp_path):
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "nowhere", tmp_path / "empty", tree / "list.csv"):
        with pytest.raises(FileNotFoundError) as error:
            FolderDataset(root)
        assert one_sentence(error.value) and str(root) in str(error.value)
    for content in (b"", b"not an image", (tree / "ant" / "ant 0.png").read_bytes()[:60]):
        (tree / "ant" / "ant 0.png").write_bytes(content)
        with pytest.raises((ValueError, OSError)) as error:
            FolderDataset(tree)[0]
        assert one_sentence(error.value) and "ant 0.png" in str(error.value)


# What a profile opens -----------------------------------------------------------------------------------


def test_open_dataset(tree, monkeypatch):
    profile = load_profile("mini")
    train, test = open_dataset(profile, "colours", "train"), open_dataset(profile, "colours", "test")
    assert (len(train), len(test)) == (profile.data.train_images, profile.data.test_images)
    assert train[0].id == SceneDataset("colours", "train", 1)[0].id != test[0].id
    folders = dataclasses.replace(
        profile, data=dataclasses.replace(profile.data, source="folders", train_images=4)
    )
    monkeypatch.setattr(type(profile), "data_dir", property(lambda self: tree.parent / "profile"))
    place = tree.parent / "profile" / "images" / "pets"
    place.mkdir(parents=True)
    tree.rename(place / "train")
    assert len(open_dataset(folders, "pets", "train")) == 4
    with pytest.raises(FileNotFoundError) as error:
        open_dataset(folders, "pets", "test")
    assert one_sentence(error.value)


def test_templates():
    profile = load_profile("mini")

    def chosen(kind, task):
        return templates(
            dataclasses.replace(profile, model=dataclasses.replace(profile.model, templates=kind)), task
        )

    assert (
        len(chosen("imagenet_ensemble_80", "nouns")) == 80
        and len(chosen("imagenet_ensemble_7", "nouns")) == 7
    )
    assert chosen("own", "textures") == ["a photo of a {} object."] and chosen("own", "unheard of") == [
        "a photo of a {}."
    ]
    for kind, task in (
        ("imagenet_ensemble_80", "nouns"),
        ("imagenet_ensemble_7", "aerial"),
        ("own", "pairs"),
    ):
        assert all(t.count("{}") == 1 and "cat" in t.format("cat") for t in chosen(kind, task))


@pytest.mark.parametrize("key, value", [("templates", "imagenet_ensemble_8"), ("source", "web"), ("tokens", "some")])
def test_misspelt_choices_are_named_when_the_profile_is_read(key, value, tmp_path, monkeypatch):
    text = (config.PROFILES / "mini.toml").read_text()
    lines = [f'{key} = "{value}"' if line.startswith(f"{key} = ") else line for line in text.splitlines()]
    (tmp_path / "odd.toml").write_text("\n".join(lines))
    monkeypatch.setattr(config, "PROFILES", tmp_path)
    with pytest.raises(ValueError, match=value) as error:
        load_profile("odd")
    assert one_sentence(error.value)
