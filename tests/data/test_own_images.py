"""Images and masks of one's own: they stay where they are, and what would mislabel them is refused."""

import shutil
import types

import numpy as np
import pytest
from conftest import SIDE, one_sentence
from PIL import Image

from patchsae.config import DataSettings, ModelSettings, Profile
from patchsae.data.datasets import model_config, open_dataset, split_files
from patchsae.data.masked import open_masked


def picture(seed: int, size=(20, 24)) -> Image.Image:
    """A photograph of nothing."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def put(root, classes, n=6, first=0):
    """``n`` different images in a folder for each class."""
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(n):
            picture(first + 100 * c + i).save(root / name / f"{i}.png")
    return root


def own(root, **settings) -> Profile:
    """A profile of images in a folder."""
    data = {"task": "pets", "images": str(root), "image_size": SIDE} | settings
    return Profile(name="pets", model=ModelSettings(name="data/mini/clip"), data=DataSettings(**data))


def contents(profile, split) -> dict[str, str]:
    """Content id -> class name."""
    ds = open_dataset(profile, "pets", split)
    return {item.id: ds.class_names[item.label] for item in ds}


def test_split_by_content_is_the_same_wherever_and_whatever_the_images_are_called(tmp_path):
    root = put(tmp_path / "a", ["cat", "hot_dog", "Käfer"], 10)
    train, test = (contents(own(root), split) for split in ("train", "test"))
    assert len(train) == 24 and len(test) == 6 and not train.keys() & test.keys()
    assert sorted(test.values()) == ["Käfer"] * 2 + ["cat"] * 2 + ["hot dog"] * 2
    other = tmp_path / "elsewhere" / "b"
    for path in root.glob("*/*.png"):
        (other / path.parent.name.replace("_", " ")).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, other / path.parent.name.replace("_", " ") / f"renamed {99 - int(path.stem)}.png")
    assert contents(own(other), "test") == test and contents(own(other), "train") == train
    assert len(contents(own(root, test_share=0.5), "test")) == 15


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
    train, test = (open_dataset(own(tmp_path), "pets", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (4, 6) and train.class_names == test.class_names == ("cat", "dog")
    assert len(open_dataset(own(tmp_path, train_images=2), "pets", "train")) == 2


def test_a_class_may_be_called_like_a_split(tmp_path):
    put(tmp_path, ["train", "plane"])
    assert open_dataset(own(tmp_path), "pets", "test").class_names == ("plane", "train")


@pytest.mark.parametrize("train, test, named", [
    (["cat", "dog"], ["cat"], "'dog' is in .*train alone"),
    (["cat"], ["cat", "dog"], "'dog' is in .*test alone"),
    (["cat", "dog"], ["Cat", "dog"], "'cat' is in .*train alone"),
    (["hot_dog", "hot dog"], ["hot dog"], "Two folders in .* are both the class 'hot dog'"),
    (["cat"], [], "no images in .*test")])
def test_classes_that_would_be_mislabelled_are_refused_by_name(tmp_path, train, test, named):
    put(tmp_path / "train", train)
    put(tmp_path / "test", test, 6, 5000)
    with pytest.raises((ValueError, FileNotFoundError), match=named) as error:
        open_dataset(own(tmp_path), "pets", "test")
    assert one_sentence(error.value)


def test_one_name_in_two_spellings_of_unicode_is_one_class(tmp_path):
    """File systems write an umlaut as one sign or as two."""
    put(tmp_path / "train", ["K\u00e4fer", "ant"])
    put(tmp_path / "test", ["Ka\u0308fer", "ant"], 6, 5000)
    names = [open_dataset(own(tmp_path), "pets", split).class_names for split in ("train", "test")]
    assert names == [("K\u00e4fer", "ant")] * 2


def test_size_is_the_models_where_the_profile_names_none(tmp_path, clip):
    put(tmp_path / "images", ["cat", "dog"])
    clip.model.save_pretrained(tmp_path / "clip")
    profile = own(tmp_path / "images", image_size=0)
    assert open_dataset(profile, "pets", "train")[0].image.shape == (64, 64, 3)
    small = Profile(name="pets", model=ModelSettings(name=str(tmp_path / "clip")), data=profile.data)
    assert open_dataset(small, "pets", "train")[0].image.shape == (SIDE, SIDE, 3)
    with pytest.raises(FileNotFoundError) as error:
        model_config(str(tmp_path / "no clip"), local=True)
    assert one_sentence(error.value)


@pytest.mark.parametrize("turn, where", [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))])
def test_rotated_photographs_stand_upright(tmp_path, turn, where):
    """The corner that is first in the file is where the camera's note says."""
    (tmp_path / "a").mkdir()
    image = np.zeros((40, 40, 3), np.uint8)
    image[:20, :20] = 255
    notes = Image.Exif()
    notes[0x0112] = turn
    Image.fromarray(image).save(tmp_path / "a" / "x.jpg", quality=95, exif=notes)
    picture(1).save(tmp_path / "a" / "y.png")
    ds = open_dataset(own(tmp_path, test_share=0.5), "pets", "train")
    ds.files = [(tmp_path / "a" / "x.jpg", 0)]
    assert ds[0].image[where].min() > 200 and np.median(ds[0].image) < 50


# Masks

def masked(tmp_path, *lines: str, value=1):
    """Images whose upper half is masked, with names for the numbers of the masks if there are lines."""
    root = put(tmp_path / "images", ["cat", "dog"])
    for path in root.glob("*/*.png"):
        plane = np.zeros((20, 24), np.uint8)
        plane[:10] = value
        place = tmp_path / "masks" / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(plane).save(place)
    if lines:
        (tmp_path / "masks" / "classes.txt").write_text("\n".join(lines))
    return own(root, masks=str(tmp_path / "masks"))


def test_masks_of_ones_own_are_the_class_or_named_numbers(tmp_path):
    shape = types.SimpleNamespace(image_size=SIDE, grid=2)
    profile = masked(tmp_path, value=255)
    ds = open_masked(profile, shape, "test")
    assert len(ds) == 2 and ds.concepts == {"noun": ("cat", "dog")}
    for i in range(2):
        coverage = ds.scene(i).coverage("noun")
        assert coverage[0, :, ds.labels[i]].tolist() == [1, 1] and coverage.sum() == 2
    (tmp_path / "masks" / "classes.txt").write_text("sky\nhead\n")
    with pytest.raises(ValueError, match="from 0 to 2") as error:
        open_masked(profile, shape, "test").scene(0)
    assert one_sentence(error.value)


def test_numbers_of_masks_are_lines_of_their_names(tmp_path):
    shape = types.SimpleNamespace(image_size=SIDE, grid=2)
    profile = masked(tmp_path, "sky", "head", value=2)
    train = open_masked(profile, shape, "train")
    assert len(train) == 10 and train.scene(0).mask("noun", "head")[0].all()
    before = train.fingerprint()
    for path in (tmp_path / "masks").glob("*/*.png"):
        Image.fromarray(np.ones((20, 24), np.uint8)).save(path)
    assert open_masked(profile, shape, "train").fingerprint() != before
    shutil.rmtree(tmp_path / "masks")
    with pytest.raises(FileNotFoundError) as error:
        open_masked(profile, shape, "train")
    assert one_sentence(error.value)
