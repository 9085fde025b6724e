"""The paper's data sets: rows of ``datasets.toml``, read in the folders of CoOp or from the Hugging Face hub.

Labels are given by name, in the order of CoOp's class names, on which base and novel classes depend.
"""

import functools
import json
import os
import tomllib
from pathlib import Path

import numpy as np
from huggingface_hub import constants

from patchsae.data.images import FileDataset, HubDataset, hash_of, images_in, in_turn
from patchsae.weights.files import load_json, save_json
from patchsae.weights.hub import why_not

TABLE = tomllib.loads(Path(__file__).with_name("datasets.toml").read_text())
CLASS_NAMES = {title: tuple(halves["base"] + halves["new"]) for title, halves in
               json.loads(Path(__file__).with_name("classnames_base_novel.json").read_text()).items()}
#: Where the tasks with a split_zhou_*.json come from together, split files included.
COOP_SOURCE = "https://huggingface.co/zhengli97/prompt_learning_dataset"


def open_benchmark(root: Path, task: str, split: str, n: int | None = None,
                   size: int | None = None, subset: bool = False) -> FileDataset | HubDataset:
    """The images of one split of a row, classes in turn, at most ``n`` of them, all counts checked.

    ``size``: pixels a side that images are cropped to. ``subset``: the files and classes that are there are all, and
    no count is checked.
    """
    row = _row(task)
    if split not in row["counts"]:
        raise ValueError(f"{task} has the splits {', '.join(row['counts'])}, not {split!r}.")
    if absent := missing(root, task):
        if "hub" in row:
            return open_hub(task, split, n, size)
        raise FileNotFoundError(f"{task} lacks {absent[0]}; get it from {where_from(task)}.")
    files, names = _read(row, Path(root) / row["folder"], split, subset)
    if not subset:
        _check_count(task, split, len(files))
    return FileDataset(Path(root), in_turn(files, n), names, size, list(dict.fromkeys(label for _, label in files)))


def missing(root: Path, task: str) -> list[Path]:
    """What a row needs under ``root`` and is not there."""
    row = _row(task)
    if row["layout"] == "hub":
        return [Path(row["hub"]["id"])]
    folder = Path(root) / row["folder"]
    needed = {"coop": [row.get("split")], "aircraft": ["variants.txt", "images_variant_train.txt"],
              "wnid": ["classnames.txt"], "numbered": []}[row["layout"]]
    needed += [row["images"]] if "images" in row else sorted(set(row["splits"].values()))
    return [folder / name for name in needed if not (folder / name).exists()]


def on_this_machine(task: str) -> bool:
    """Whether the hub's copy of a row lies whole in the cache of ``datasets``."""
    cache, row = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets", _row(task)
    there = Path(cache).glob(f"{row['hub']['id'].replace('/', '___')}/**/dataset_info.json") if "hub" in row else ()
    return any(not path.parent.name.endswith(".incomplete") for path in there)


@functools.lru_cache(maxsize=256)
def lacking(root: Path, task: str, notes: Path, subset: bool = False) -> str:
    """How the images of a row, whose folder is there, differ from what was published; "" where they do not, and for a
    ``subset`` where each split has any.

    They are counted once: counts are noted in the file ``notes`` with the hash of what the split files list, and of the
    folders that the images are in with the times at which anything came into them or went.
    """
    row = _row(task)
    folder, wanted = Path(root) / row["folder"], {split: row["counts"][split] for split in ("train", "test")}
    try:
        if "splits" in row:
            listed, tops = [], {folder / place for place in row["splits"].values()}
            parents = {Path(entry) for top in tops for entry in os.scandir(top) if entry.is_dir()}
        else:
            listed = [(str(path), title) for split in wanted for path, title in _listed(row, folder, split)]
            parents = {Path(path).parent for path, _ in listed}
        times = [[str(p), p.stat().st_mtime_ns if p.is_dir() else 0] for p in sorted(parents)]
        state, noted = hash_of([subset, listed, times]), load_json(notes) if notes.is_file() else {}
        if noted.get(task, {}).get("state") != state:
            files = {split: [path for path, _ in _read(row, folder, split, subset)[0]] for split in wanted}
            there = {p: set(os.listdir(p)) if p.is_dir() else set() for p in parents}
            counts = {split: sum(path.name in there[path.parent] for path in files[split]) for split in wanted}
            noted[task] = {"state": state} | counts
            save_json(notes, noted)
    except (OSError, ValueError) as error:
        return str(error)
    return ", ".join(f"{noted[task][split]:,} of {n:,} {split} images" for split, n in wanted.items()
                     if not noted[task][split] or not subset and noted[task][split] != n)


def where_from(task: str) -> str:
    """The link or command that gets a row's images."""
    return _row(task).get("get", COOP_SOURCE)


def _row(task: str) -> dict:
    if task not in TABLE:
        raise ValueError(f"There is no data set {task!r} in datasets.toml; choose one of {', '.join(TABLE)}.")
    return TABLE[task]


def _check_count(task: str, split: str, found: int) -> None:
    expected = TABLE[task]["counts"][split]
    if found != expected:
        raise ValueError(f"{task}/{split} has {found:,} images where {expected:,} are expected; complete it from "
                         f"{where_from(task)}.")


# Files in the layouts of CoOp: those of a split with their labels, in the order of its source, and the class names

def _read(row: dict, folder: Path, split: str, subset: bool) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    return (_from_list if row["layout"] in ("coop", "aircraft") else _from_folders)(row, folder, split, subset)


def _from_list(row: dict, folder: Path, split: str,
               subset: bool) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """A label is the place of the class's name in CoOp's order; of a subset, among the names that any file has."""
    names, listed = CLASS_NAMES[row["title"]], _listed(row, folder, split)
    if subset:
        there = {part: [pair for pair in _listed(row, folder, part) if pair[0].is_file()] for part in ("train", "test")}
        used = {title for pairs in there.values() for _, title in pairs}
        names, listed = tuple(name for name in names if name in used), there[split]
    labels = {name: label for label, name in enumerate(names)}
    return [(file, labels[title]) for file, title in listed], names


def _listed(row: dict, folder: Path, split: str) -> list[tuple[Path, str]]:
    """Files and class names as CoOp's JSON or the lists of FGVC-Aircraft have them."""
    path = folder / (row["split"] if row["layout"] == "coop" else f"images_variant_{split}.txt")
    try:
        if row["layout"] == "coop":
            pairs = [(str(name), str(title)) for name, _, title in json.loads(path.read_text())[split]]
        else:
            lines = [line.split(" ", 1) for line in path.read_text().splitlines() if line.strip()]
            pairs = [(f"{name}.jpg", title) for name, title in lines]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path} is not a split file of CoOp ({type(error).__name__}); get it again from "
                         f"{COOP_SOURCE}.") from error
    names, files = set(CLASS_NAMES[row["title"]]), []
    for name, title in pairs:
        if (title := title.replace("_", " ")) not in names:
            raise ValueError(f"{path} names the class {title[:80]!r}, which {row['title']} does not have; get it "
                             f"again from {COOP_SOURCE}.")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{path} names the file {name[:80]!r} outside its folder; get it again from "
                             f"{COOP_SOURCE}.")
        files.append((folder / row["images"] / name, title))
    return files


def _from_folders(row: dict, folder: Path, split: str,
                  subset: bool) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """One folder for each label, called by its number or by its WordNet id. Ids are labelled in their order, and
    classnames.txt says what they are called; of a subset those of both splits are labelled together."""
    top, names = folder / row["splits"][split], CLASS_NAMES.get(row["title"])
    tops = {folder / place for place in row["splits"].values()} if subset else {top}
    there = {p.name for place in tops if place.is_dir() for p in place.iterdir() if p.is_dir()}
    if row["layout"] == "numbered":
        numbers = [label for label in range(len(names)) if not subset or str(label) in there]
        folders, names = [top / str(label) for label in numbers], tuple(names[label] for label in numbers)
        if absent := [p for p in folders if p.name not in there]:
            raise FileNotFoundError(f"There is no folder {absent[0]}; complete it from {row['get']}.")
    else:
        lines = (folder / "classnames.txt").read_text().splitlines()
        titles = dict(line.strip().split(" ", 1) for line in lines if " " in line.strip())
        folders = [top / name for name in sorted(there) if name[0] == "n"]
        if unnamed := [p.name for p in folders if p.name not in titles]:
            raise ValueError(f"{folder / 'classnames.txt'} does not name {unnamed[0]}; take the file that CoOp gives.")
        named = tuple(titles[p.name] for p in folders)
        if names and (not set(named) <= set(names) if subset else named != names):
            raise ValueError(f"{folder} has {len(named)} classes that are not the {row['classes']} of {row['title']}; "
                             "complete the folders, and take CoOp's classnames.txt.")
        names = named
    return [(file, label) for label, p in enumerate(folders) if p.is_dir() for file in images_in(p)], names


# The hub

def open_hub(task: str, split: str, n: int | None = None, size: int | None = None) -> HubDataset:
    """A row's split as the Hugging Face hub, or its cache on this machine, gives it."""
    import datasets

    row, hub = _row(task), _row(task)["hub"]
    try:
        table = datasets.load_dataset(hub["id"], hub.get("config"), split=hub["splits"][split],
                                      revision=hub.get("revision"))
    except Exception as error:  # the library has errors of its own for every way a server can fail
        raise FileNotFoundError(f"{task} is in no folder, and the hub does not give {hub['id']}: "
                                f"{why_not(error, hub['id'], 'datasets/')}.") from error
    _check_count(task, split, len(table))
    names, labels = _hub_labels(table, row, hub)
    rows = [i for i, _ in in_turn(list(enumerate(labels.tolist())), n)]
    table = table.cast_column(hub["image"], datasets.Image(decode=False)).select(rows)
    source = [hub["id"], hub.get("config"), hub["splits"][split], hub["revision"]] if "revision" in hub else ()
    return HubDataset(table, hub["image"], labels[rows], names, size, source)


def _hub_labels(table, row: dict, hub: dict) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and labels in CoOp's order: by name, but for ImageNet, whose order is that of the WordNet ids."""
    feature, labels = table.features[hub["label"]], np.asarray(table[hub["label"]])
    theirs = [name.replace("_", " ") for name in feature.names]
    names = CLASS_NAMES.get(row["title"], tuple(theirs))
    if hub.get("order") == "wnid" and len(theirs) == len(names):
        return names, labels
    lower = {name.lower(): label for label, name in enumerate(names)}
    if unknown := [name for name in theirs if name.lower() not in lower]:
        raise ValueError(f"{hub['id']} has the class {unknown[0]!r}, which {row['title']} does not have; use a folder.")
    return names, np.array([lower[name.lower()] for name in theirs])[labels]
