"""Images and masks of one's own: they stay where they are, and what would mislabel them is refused."""

import shutil
import types

import numpy as np
import pytest
from conftest import SIDE, picture, refused, save_picture
from PIL import Image

from patchsae.config import DataSettings, ModelSettings, Profile
from patchsae.data.datasets import model_config, open_dataset, split_files
from patchsae.data.masked import open_masked


def put(root, classes, n=6, first=0):
    """``n`` different images in a folder for each class."""
    for c, name in enumerate(classes):
        for i in range(n):
            save_picture(root / name / f"{i}.png", picture(first + 100 * c + i, (20, 24, 3)))
    return root


def own(root, model="data/mini/clip", **settings) -> Profile:
    """A profile of images in a folder."""
    data = {"task": "pets", "images": str(root)} | settings
    return Profile(name="pets", model=ModelSettings(name=model), data=DataSettings(**data))


def both(profile, task="pets"):
    """The two splits."""
    return [open_dataset(profile, task, split) for split in ("train", "test")]


def contents(ds) -> dict[str, str]:
    """Content id -> class name."""
    return {item.id: ds.class_names[item.label] for item in ds}


def test_split_by_content_is_the_same_wherever_and_whatever_the_images_are_called(tmp_path):
    root, other = put(tmp_path / "a", ["cat", "hot_dog", "Käfer"], 10), tmp_path / "elsewhere" / "b"
    train, test = map(contents, both(own(root)))
    assert len(train) == 24 and len(test) == 6 and not train.keys() & test.keys()
    assert sorted(test.values()) == ["Käfer"] * 2 + ["cat"] * 2 + ["hot dog"] * 2
    for path in root.glob("*/*.png"):
        (other / path.parent.name.replace("_", " ")).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, other / path.parent.name.replace("_", " ") / f"renamed {99 - int(path.stem)}.png")
    assert [*map(contents, both(own(other)))] == [train, test]
    assert len(both(own(root, test_share=0.5))[1]) == 15


def test_equal_images_stay_in_one_split_and_every_split_has_every_class(tmp_path):
    root = put(tmp_path, ["a", "b"], 2)
    for i in range(20):
        shutil.copy(root / "a" / "0.png", root / "a" / f"copy {i}.png")
    for share in (0.01, 0.5, 0.99):
        train, test = (split_files(root, split, share)[0] for split in ("train", "test"))
        assert len(train) + len(test) == 24 and {label for _, label in train} == {label for _, label in test} == {0, 1}
        assert len({path in dict(test) for path in root.glob("a/copy*")}) == 1


@pytest.mark.parametrize("names", [("train", "test"), ("Train", "val"), ("training", "Validation")])
def test_folders_of_splits_are_read_as_they_are(tmp_path, names):
    for k, name in enumerate(names):
        put(tmp_path / name, ["cat", "dog"], 2 + k, 1000 * k)
    train, test = both(own(tmp_path))
    assert (len(train), len(test)) == (4, 6) and train.class_names == test.class_names == ("cat", "dog")
    assert len(both(own(tmp_path, train_images=2))[0]) == 2


@pytest.mark.parametrize("train, test, names", [
    (["train", "plane"], None, ("plane", "train")),  # a class may be called like a split
    (["K\u00e4fer", "ant"], ["Ka\u0308fer", "ant"], ("K\u00e4fer", "ant"))])  # file systems write an umlaut in two ways
def test_names_of_classes(tmp_path, train, test, names):
    put(tmp_path if test is None else tmp_path / "train", train)
    put(tmp_path / "test", test or [], 6, 5000)
    assert [ds.class_names for ds in both(own(tmp_path))] == [names] * 2


@pytest.mark.parametrize("train, test, named", [
    (["cat", "dog"], ["cat"], "'dog' is in .*train alone"),
    (["cat"], ["cat", "dog"], "'dog' is in .*test alone"),
    (["cat", "dog"], ["Cat", "dog"], "'cat' is in .*train alone"),
    (["hot_dog", "hot dog"], ["hot dog"], "Two folders in .* are both the class 'hot dog'"),
    (["cat"], [], "no images in .*test")])
def test_classes_that_would_be_mislabelled_are_refused_by_name(tmp_path, train, test, named):
    put(tmp_path / "train", train)
    put(tmp_path / "test", test, 6, 5000)
    with refused(named):
        open_dataset(own(tmp_path), "pets", "test")


def test_size_is_the_models_where_the_profile_names_none(tmp_path, clip):
    root = put(tmp_path / "images", ["cat", "dog"])
    clip.model.save_pretrained(tmp_path / "clip")
    for model, side in (("data/mini/clip", 64), (str(tmp_path / "clip"), SIDE)):
        assert both(own(root, model))[0][0].image.shape == (side, side, 3)
    with refused("no clip", FileNotFoundError):
        model_config(str(tmp_path / "no clip"), local=True)


@pytest.mark.parametrize("turn, where", [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))])
def test_rotated_photographs_stand_upright(tmp_path, turn, where):
    """The corner that is first in the file is where the camera's note says."""
    put(tmp_path, ["a"], 2)
    image, notes = np.zeros((40, 40, 3), np.uint8), Image.Exif()
    image[:20, :20], notes[0x0112] = 255, turn
    Image.fromarray(image).save(tmp_path / "x.jpg", quality=95, exif=notes)
    ds = open_dataset(own(tmp_path), "pets", "train")
    ds.files = [(tmp_path / "x.jpg", 0)]
    assert ds[0].image[where].min() > 200 and np.median(ds[0].image) < 50


# Masks

@pytest.fixture
def halves(tmp_path):
    """Images whose upper half is masked with a number; ``halves(number, *names of the numbers)`` is their profile."""
    def make(value, *lines):
        root = put(tmp_path / "images", ["cat", "dog"])
        for path in root.glob("*/*.png"):
            plane = np.zeros((20, 24), np.uint8)
            plane[:10] = value
            save_picture(tmp_path / "masks" / path.relative_to(root), plane)
        if lines:
            (tmp_path / "masks" / "classes.txt").write_text("\n".join(lines))
        return own(root, masks=str(tmp_path / "masks"))
    return make


SHAPE = types.SimpleNamespace(image_size=SIDE, grid=2)


def test_masks_of_ones_own_are_the_class_or_named_numbers(halves, tmp_path):
    profile = halves(255)
    ds = open_masked(profile, SHAPE, "test")
    assert len(ds) == 2 and ds.concepts == {"noun": ("cat", "dog")}
    for i in range(2):
        coverage = ds.scene(i).coverage("noun")
        assert coverage[0, :, ds.labels[i]].tolist() == [1, 1] and coverage.sum() == 2
    (tmp_path / "masks" / "classes.txt").write_text("sky\nhead\n")
    with refused("from 0 to 2"):
        open_masked(profile, SHAPE, "test").scene(0)


def test_numbers_of_masks_are_lines_of_their_names(halves, tmp_path):
    profile = halves(2, "sky", "head")
    train = open_masked(profile, SHAPE, "train")
    assert len(train) == 10 and train.scene(0).mask("noun", "head")[0].all()
    before = train.fingerprint()
    for path in (tmp_path / "masks").glob("*/*.png"):
        save_picture(path, np.ones((20, 24), np.uint8))
    assert open_masked(profile, SHAPE, "train").fingerprint() != before
    shutil.rmtree(tmp_path / "masks")
    with refused("no folder of masks", FileNotFoundError):
        open_masked(profile, SHAPE, "train")
