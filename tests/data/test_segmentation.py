"""Public masks: tiny made-up files in the formats of their authors, read through the interface of scenes."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import picture, refused
from conftest import save_picture as save

from patchsae.config import load_profile
from patchsae.data.masked import READERS, MaskedDataset, open_masked
from patchsae.masks import patch_concepts, patch_coverage
from patchsae.studies.recovery import concept_list

SIZE, GRID = 16, 4


def opened(name, folder, split="train", size=SIZE):
    """What a reader finds, as a source of images."""
    return MaskedDataset(folder, READERS[name](folder, split), size, GRID)


def write_ade(folder):
    """Two images of 24 x 16: left half wall (1), right half tree (3), the rest nothing (0)."""
    mask = np.zeros((16, 24), np.uint8)
    mask[:, :12], mask[:8, 12:] = 1, 3
    for part, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        save(folder / "images" / part / f"{name}.jpg", picture(0, (16, 24, 3)))
        save(folder / "annotations" / part / f"{name}.png", mask)
    names = ["wall", "building, edifice", "tree"]
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"] + [f"{i + 1}\t0.1\t1\t1\t1\t{n}" for i, n in enumerate(names)]
    (folder / "objectInfo150.txt").write_text("\n".join(lines))
    (folder / "sceneCategories.txt").write_text("ADE_train_00000001 kitchen\nADE_val_00000001 forest\n")


def write_parts(folder):
    """One image a split, a body with a smaller head on top of it."""
    categories = [{"id": 7, "name": "Bird Head", "supercategory": "Bird"},
                  {"id": 3, "name": "Bird Body", "supercategory": "Bird"}]
    for part in ("train", "val"):
        save(folder / "images" / part / "n01_5.JPEG", picture(1, (16, 16, 3)))
        body = {"id": 1, "image_id": 4, "category_id": 3, "area": 256, "segmentation": [[0, 0, 15, 0, 15, 15, 0, 15]]}
        head = {"id": 2, "image_id": 4, "category_id": 7, "area": 64, "segmentation": [[8, 0, 15, 0, 15, 7, 8, 7]]}
        content = {"images": [{"id": 4, "file_name": "n01_5.JPEG"}], "categories": categories,
                   "annotations": [head, body]}
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        (folder / "annotations" / f"{part}.json").write_text(json.dumps(content))


def write_pets(folder):
    """Two breeds; foreground (1), background (2) and border (3)."""
    trimap = np.full((16, 16), 2, np.uint8)
    trimap[:8], trimap[8] = 1, 3
    names = {"Abyssinian_3": (1, 1), "great_pyrenees_12": (2, 2)}
    for name in names:
        save(folder / "images" / f"{name}.jpg", picture(2, (16, 16, 3)))
        save(folder / "annotations" / "trimaps" / f"{name}.png", trimap)
    text = "\n".join(f"{name} {number} {kind} 1" for name, (number, kind) in names.items())
    for listing in ("trainval", "test"):
        (folder / "annotations" / f"{listing}.txt").write_text(text)


WRITERS = {"ade20k": write_ade, "partimagenet": write_parts, "oxford-pets": write_pets}


@pytest.fixture(params=WRITERS)
def ds(request, tmp_path):
    WRITERS[request.param](tmp_path)
    return opened(request.param, tmp_path)


def test_masks_are_read_as_scenes(ds):
    scene, item = ds.scene(0), ds[0]
    assert item.image.shape == (SIZE, SIZE, 3) and item.image.dtype == np.uint8 and len(item.id) == 16
    assert ds.class_names[item.label] and ds.labels[0] == item.label
    share = scene.coverage("noun")
    assert share.shape == (GRID, GRID, len(ds.concepts["noun"]))
    for c, name in enumerate(ds.concepts["noun"]):
        mask = scene.mask("noun", name)
        assert mask.shape == (SIZE, SIZE)
        for i, j in np.ndindex(GRID, GRID):
            assert share[i, j, c] == pytest.approx(mask[4 * i:4 * i + 4, 4 * j:4 * j + 4].mean())
    np.testing.assert_array_equal(patch_coverage(ds, [0], ("noun",))[0], share.reshape(GRID**2, -1))
    assert patch_concepts(ds, [0], ("noun",)).any()
    assert concept_list(ds, ("noun",)) == [("noun", name) for name in ds.concepts["noun"]]


@pytest.mark.parametrize("name", READERS)
def test_images_with_masks_are_known_by_what_the_files_of_both_hold(tmp_path, name):
    for folder in ("one", "two"):
        WRITERS[name](tmp_path / folder)
    ds = opened(name, tmp_path / "two")
    before = ds.fingerprint()
    assert opened(name, tmp_path / "one").fingerprint() == before
    assert opened(name, tmp_path / "one", size=8).fingerprint() != before
    for path in (ds.entries[0].path, ds.entries[0].mask):
        whole = path.read_bytes()
        for content in (whole + b" ", whole):
            path.write_bytes(content)
            assert (opened(name, tmp_path / "two").fingerprint() == before) == (content == whole)


def test_ade20k(tmp_path):
    write_ade(tmp_path)
    train, test = (opened("ade20k", tmp_path, split) for split in ("train", "test"))
    assert train.concepts["noun"] == ("wall", "building", "tree") and train.class_names == ("forest", "kitchen")
    assert (train[0].label, test[0].label) == (1, 0)
    scene = train.scene(0)  # the middle 16 of 24 columns
    assert scene.mask("noun", "wall")[:, :8].all() and not scene.mask("noun", "wall")[:, 8:].any()
    assert scene.mask("noun", "tree")[:8, 8:].all() and not scene.mask("noun", "tree")[8:].any()
    assert not scene.mask("noun", "building").any() and (scene.plane[8:, 8:] == -1).all()


def test_partimagenet(tmp_path):
    write_parts(tmp_path)
    ds = opened("partimagenet", tmp_path, "test")
    assert ds.concepts["noun"] == ("Bird Body", "Bird Head") and ds.groups["Bird Head"] == "Bird"
    assert ds.class_names == ("n01",)
    scene = ds.scene(0)
    assert scene.mask("noun", "Bird Head")[:8, 8:].all() and scene.mask("noun", "Bird Head").sum() == 64
    assert scene.mask("noun", "Bird Body").sum() == 192
    path = tmp_path / "annotations" / "train.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"] = {"counts": "abc", "size": [16, 16]}
    path.write_text(json.dumps(content))
    with refused("no polygon"):
        opened("partimagenet", tmp_path)


def test_oxford_pets(tmp_path):
    write_pets(tmp_path)
    ds = opened("oxford-pets", tmp_path, "test")
    assert ds.class_names == ("abyssinian", "great pyrenees") == ds.concepts["noun"]
    assert ds.groups == {"abyssinian": "cat", "great pyrenees": "dog"}
    for i, name in enumerate(ds.class_names):
        mask = ds.scene(i).mask("noun", name)
        assert ds[i].label == i and mask[:8].all() and not mask[8:].any()
    save(tmp_path / "annotations" / "trimaps" / "Abyssinian_3.png", np.ones((5, 16), np.uint8))
    with refused("pixels"):
        ds.scene(0)
    (tmp_path / "annotations" / "trimaps" / "Abyssinian_3.png").write_bytes(b"no png")
    with refused("Cannot read the mask"):
        ds.scene(0)


@pytest.mark.parametrize("name", READERS)
def test_a_folder_without_the_data_set_is_refused(tmp_path, name):
    with refused(kind=FileNotFoundError):
        opened(name, tmp_path)


def test_the_profile_decides_which_masks(tmp_path, monkeypatch, clip):
    mini = load_profile("mini")
    assert hasattr(open_masked(mini, clip, "test").scene(0), "maps")
    paper = dataclasses.replace(mini, name="paper", data=dataclasses.replace(mini.data, source="folders"))
    monkeypatch.setattr("patchsae.config.ROOT", tmp_path)
    with refused("ade20k", FileNotFoundError):
        open_masked(paper, clip, "test")
    write_pets(tmp_path / "data" / "paper" / "segmentation" / "oxford-pets")
    assert open_masked(paper, clip, "test").class_names == ("abyssinian", "great pyrenees")
