"""The paper's data sets: their table, CoOp's folders and lists, its few shots, the hub, and what is missing."""

import json
import random
import re
from collections import defaultdict

import numpy as np
import pytest
from conftest import refused, save_picture
from PIL import Image

from patchsae.data import benchmarks
from patchsae.data.benchmarks import CLASS_NAMES, TABLE, missing, open_benchmark, where_from
from patchsae.studies.adapt import few_shots

ELEVEN = {"ImageNet", "Caltech101", "OxfordPets", "StanfordCars", "OxfordFlowers", "Food101", "FGVCAircraft", "SUN397",
          "DescribableTextures", "EuroSAT", "UCF101"}


def test_table_has_the_papers_data_sets():
    """Base and novel test images of CoOp, CoCoOp and MaPLe add up to what it says."""
    assert {row["title"] for row in TABLE.values()} >= ELEVEN and set(CLASS_NAMES) == ELEVEN
    assert {"imagenet-v2", "imagenet-sketch", "imagenet-a", "imagenet-r", "cifar100"} < set(TABLE)
    for task, row in TABLE.items():
        assert row["classes"] == len(CLASS_NAMES.get(row["title"], [0] * row["classes"])), task
        assert {"train", "test"} <= set(row["counts"]) and where_from(task) and row["gigabytes"] > 0
    published = {"caltech101": 1549 + 916, "oxford-pets": 1881 + 1788, "stanford-cars": 4002 + 4039,
                 "flowers102": 1053 + 1410, "food101": 15300 + 15000, "fgvc-aircraft": 1666 + 1667,
                 "sun397": 9950 + 9900, "dtd": 864 + 828, "eurosat": 4200 + 3900, "ucf101": 1934 + 1849,
                 "imagenet": 50000}
    assert {task: TABLE[task]["counts"]["test"] for task in published} == published


@pytest.fixture
def small(monkeypatch):
    """Change counts of rows, so that data sets of a few files are whole."""
    def change(task, **counts):
        monkeypatch.setitem(TABLE, task, TABLE[task] | {"counts": counts})
    return change


def write_images(folder, names) -> None:
    """Little images, each another colour."""
    for i, name in enumerate(names):
        save_picture(folder / name, np.full((5, 4 + i % 3, 3), (i % 256, 3 * i % 256, 7), np.uint8))


@pytest.fixture
def eurosat(tmp_path, small):
    """EuroSAT in CoOp's folders: its labels out of order, so that only the names say which class is which."""
    names = list(CLASS_NAMES["EuroSAT"])
    order = np.random.default_rng(0).permutation(len(names))
    split = {}
    for s, (part, per_class) in enumerate((("train", 20), ("val", 6), ("test", 3))):
        rows = [[f"{names[label].replace(' ', '')}/{part}_{k}.png", int(np.flatnonzero(order == label)[0]),
                 names[label].replace(" ", "_")] for k in range(per_class) for label in order]
        split[part] = [rows[i] for i in np.random.default_rng(s).permutation(len(rows))]
    write_images(tmp_path / "eurosat" / "2750", [row[0] for part in split.values() for row in part])
    (tmp_path / "eurosat" / "split_zhou_EuroSAT.json").write_text(json.dumps(split))
    small("eurosat", train=200, val=60, test=30)
    return tmp_path


def test_coop_folder(eurosat):
    ds = open_benchmark(eurosat, "eurosat", "test")
    assert ds.class_names == CLASS_NAMES["EuroSAT"] and len(ds) == 30
    for path, label in ds.files:
        assert path.parent.name == CLASS_NAMES["EuroSAT"][label].replace(" ", "")
    assert [label for _, label in ds.files[:12]] == [*range(10), 0, 1]  # classes in turn
    assert [f for f, _ in open_benchmark(eurosat, "eurosat", "test", 7).files] == [f for f, _ in ds.files[:7]]
    cropped = open_benchmark(eurosat, "eurosat", "test", 3, 16)
    assert cropped[0].image.shape == (16, 16, 3) and cropped.fingerprint() != ds.fingerprint()


def test_images_are_counted_once_and_what_differs_is_said(eurosat, small, monkeypatch):
    """Counts are noted with the hash of the list, and made again when anything comes into the folders or goes."""
    notes, top = eurosat / "run" / "image_counts.json", eurosat / "eurosat" / "2750"

    def lacking(**options):
        benchmarks.lacking.cache_clear()
        return benchmarks.lacking(eurosat, "eurosat", notes, **options)

    assert lacking() == "" and json.loads(notes.read_text())["eurosat"]["train"] == 200
    with monkeypatch.context() as patch:
        patch.setattr(benchmarks.os, "listdir", lambda folder: pytest.fail("counted again"))
        assert lacking() == ""
    (top / "Forest" / "train_3.png").unlink()
    assert lacking() == "199 of 200 train images" and lacking(subset=True) == ""
    for path in top.glob("*/test_*.png"):
        path.rename(path.with_name(f".{path.name}"))
    assert lacking(subset=True) == "0 of 30 test images"
    (eurosat / "eurosat" / "split_zhou_EuroSAT.json").write_text("{}")
    assert "is not a split file of CoOp" in lacking()


def test_a_subset_is_the_classes_and_images_that_are_there(eurosat, small, tmp_path, monkeypatch):
    for path in (eurosat / "eurosat" / "2750").glob("*/*.png"):
        if path.parent.name not in ("Forest", "RiverLake", "River") or path.name == "train_4.png":
            path.unlink()
    train, test = (open_benchmark(eurosat, "eurosat", split, subset=True) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("Forest", "River")
    assert np.bincount(train.labels).tolist() == [19, 19] and np.bincount(test.labels).tolist() == [3, 3]
    assert all(path.parent.name == train.class_names[label] for path, label in train.files)
    monkeypatch.setitem(CLASS_NAMES, "ImageNet", ("tench", "great white shark", "hen"))
    root = tmp_path / "imagenet"
    write_images(root / "images", [f"{name}/{i}.JPEG" for name in ("train/n01", "train/n03", "val/n03") for i in "01"])
    (root / "classnames.txt").write_text("n01 tench\nn02 great white shark\nn03 hen")
    for split, labels in (("train", [0, 1, 0, 1]), ("test", [1, 1])):
        ds = open_benchmark(tmp_path, "imagenet", split, subset=True)
        assert ds.class_names == ("tench", "hen") and ds.labels.tolist() == labels
    write_images(tmp_path / "imagenetv2" / "imagenetv2-matched-frequency-format-val", ["2/a.jpeg", "0/b.jpeg"])
    assert open_benchmark(tmp_path, "imagenet-v2", "test", subset=True).class_names == ("tench", "hen")
    (root / "classnames.txt").write_text("n01 tench\nn03 ocean")
    with refused("are not the"):
        open_benchmark(tmp_path, "imagenet", "train", subset=True)


def theirs(split: dict, shots: int, seed: int) -> list:
    """CoOp's few shots as its code describes them, with Python's global generator."""
    random.seed(seed)
    tracker = defaultdict(list)
    for row in split["train"]:
        tracker[row[1]].append(row)
    return [row[0] for rows in tracker.values()
            for row in (random.sample(rows, shots) if len(rows) >= shots else rows)]


@pytest.mark.parametrize("shots", [1, 4, 16, 64])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_few_shots_are_those_of_coop(eurosat, shots, seed):
    split = json.loads((eurosat / "eurosat" / "split_zhou_EuroSAT.json").read_text())
    state = random.getstate()
    ds = open_benchmark(eurosat, "eurosat", "train")
    train = few_shots(ds, range(10), shots, seed)
    assert random.getstate() == state
    root, files = eurosat / "eurosat" / "2750", [ds.files[row][0] for row in train.rows]
    assert [path.relative_to(root).as_posix() for path in files] == theirs(split, shots, seed)
    assert all(CLASS_NAMES["EuroSAT"][label].replace(" ", "") == path.parent.name
               for path, label in zip(files, train.labels))


@pytest.mark.parametrize("change, words", [
    ({"test": 31}, "31 are expected"), ("not json", "split file"), ("no class", "does not have"),
    ("outside", "outside its folder"), ("absolute", "outside its folder"), ("no split", "split file"),
    ("numbers", "split file")])
def test_damaged_lists_are_one_sentence(eurosat, small, change, words):
    path = eurosat / "eurosat" / "split_zhou_EuroSAT.json"
    split = json.loads(path.read_text())
    if isinstance(change, dict):
        small("eurosat", train=200, val=60, **change)
    elif change == "not json":
        path.write_text(path.read_text()[:-9])
    else:
        row = {"no class": ["Forest/test_0.png", 1, "Ocean"], "outside": ["../../secret.png", 1, "Forest"],
               "absolute": ["/etc/secret.png", 1, "Forest"], "numbers": 3, "no split": 0}[change]
        split = {} if change == "no split" else split | {"test": [*split["test"][1:], row]}
        path.write_text(json.dumps(split))
    with refused(words):
        open_benchmark(eurosat, "eurosat", "test")


def test_what_is_missing_is_named(tmp_path):
    for task, row in TABLE.items():
        assert missing(tmp_path, task)
        if "hub" not in row:
            with refused(re.escape(where_from(task)), FileNotFoundError):
                open_benchmark(tmp_path, task, "test")
    for task, split in (("mnist", "test"), ("dtd", "all")):
        with refused():
            open_benchmark(tmp_path, task, split)


def test_aircraft_lists(tmp_path, small):
    names = CLASS_NAMES["FGVCAircraft"]
    folder = tmp_path / "fgvc_aircraft"
    write_images(folder / "images", [f"{i:07}.jpg" for i in range(6)])
    (folder / "variants.txt").write_text("\n".join(names))
    for part, numbers in (("train", (0, 1)), ("val", (2, 3)), ("test", (4, 5))):
        (folder / f"images_variant_{part}.txt").write_text("".join(f"{i:07} {names[40 + i]}\n" for i in numbers))
    small("fgvc-aircraft", train=2, val=2, test=2)
    ds = open_benchmark(tmp_path, "fgvc-aircraft", "test")
    assert [(path.name, label) for path, label in ds.files] == [("0000004.jpg", 44), ("0000005.jpg", 45)]


@pytest.mark.parametrize("task", ["imagenet-a", "imagenet-sketch"])
def test_folders_of_wordnet_ids(tmp_path, small, monkeypatch, task):
    row = TABLE[task]
    folder = tmp_path / row["folder"]
    monkeypatch.setitem(CLASS_NAMES, "ImageNet", ("tench", "great white shark", "hen"))
    ids = ["n01440764", "n01484850", "n01514859"]
    write_images(folder / row["splits"]["test"], [f"{wnid}/{k}.JPEG" for wnid in ids for k in range(2)])
    lines = [f"{wnid} {name}" for wnid, name in zip(ids, CLASS_NAMES["ImageNet"])]
    (folder / "classnames.txt").write_text("\n".join([*lines, "n99999999 unused"]))
    small(task, train=6, test=6)
    ds = open_benchmark(tmp_path, task, "test")
    assert ds.class_names == ("tench", "great white shark", "hen")
    assert [(path.parent.name, label) for path, label in ds.files] == [*zip(ids, range(3))] * 2
    (folder / "classnames.txt").write_text("\n".join(reversed(lines[:2])))
    with refused():
        open_benchmark(tmp_path, task, "test")


def test_numbered_folders(tmp_path, small, monkeypatch):
    monkeypatch.setitem(CLASS_NAMES, "ImageNet", tuple(f"class {i}" for i in range(12)))
    top = tmp_path / "imagenetv2" / "imagenetv2-matched-frequency-format-val"
    write_images(top, [f"{label}/a.jpeg" for label in range(12)])
    small("imagenet-v2", train=12, test=12)
    ds = open_benchmark(tmp_path, "imagenet-v2", "test")
    assert [int(path.parent.name) for path, _ in ds.files] == [label for _, label in ds.files] == list(range(12))


def test_hub_table(tmp_path, small, monkeypatch):
    """A data set of the hub, here a local copy in its format: bytes decoded here, labels by name, counts checked."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    names = [name.upper() for name in reversed(CLASS_NAMES["EuroSAT"])]
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=names)})
    images = [Image.new("RGB", (6, 5), (9 * i, 0, 0)) for i in range(20)]
    table = datasets.Dataset.from_dict({"img": images, "fine": [i // 2 for i in range(20)]}, features)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "hub" / "data" / "test-00000.parquet")
    row = TABLE["cifar100"] | {"title": "EuroSAT", "counts": {"train": 20, "test": 20}, "hub": {
        "id": str(tmp_path / "hub"), "image": "img", "label": "fine", "splits": {"test": "test", "train": "train"}}}
    monkeypatch.setitem(TABLE, "cifar100", row)
    ds = open_benchmark(tmp_path, "cifar100", "test")
    assert ds.class_names == CLASS_NAMES["EuroSAT"] and [ds[i].label for i in range(12)] == [*range(10), 0, 1]
    for i in range(20):
        assert ds[i].label == 9 - ds[i].image[0, 0, 0] // 9 // 2
    assert len(open_benchmark(tmp_path, "cifar100", "test", 4)) == 4

    def fingerprint(source=(), images=ds.table, labels=ds.labels):
        return benchmarks.HubDataset(images, "img", labels, ds.class_names, None, source).fingerprint()

    turned = ds.table.select(range(19, -1, -1))
    assert ds.fingerprint() == fingerprint() != fingerprint(images=turned)  # no revision is fixed: what they hold
    assert fingerprint(["id", None, "test", "4f2a"]) == fingerprint(["id", None, "test", "4f2a"], turned)
    assert len({fingerprint(["id", None, "test", "4f2a"]), fingerprint(["id", None, "test", "77b1"]),
                fingerprint(["id", None, "train", "4f2a"]), fingerprint(),
                fingerprint(["id", None, "test", "4f2a"], labels=9 - ds.labels)}) == 5
    monkeypatch.setitem(TABLE, "cifar100", row | {"counts": {"train": 20, "test": 19}})
    for split, error in (("test", ValueError), ("train", FileNotFoundError)):
        with refused(kind=error):
            open_benchmark(tmp_path, "cifar100", split)
    assert benchmarks.missing(tmp_path, "cifar100")
