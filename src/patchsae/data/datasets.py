"""Sources of images: arrays, folders, parts of others, and whatever a profile names."""

import functools
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from patchsae.config import Profile, resolve
from patchsae.data.benchmarks import TABLE, lacking, missing, on_this_machine, open_benchmark
from patchsae.data.checks import Natural, guard, indices
from patchsae.data.hashes import file_hashes
from patchsae.data.images import FileDataset, Images, Item, content_id, images_in, in_turn

#: What folders of the splits are called, in any case; the first that is there is read.
SPLITS = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation")}
Split = Literal["train", "test"]
TEMPLATES = json.loads(Path(__file__).with_name("prompt_templates.json").read_text())


class ArrayDataset(Images):
    """Images in memory.

    ``pixels``: float ``[N,3,H,W]``, already preprocessed, or uint8 ``[N,H,W,3]`` images; ``labels``: ``[N]``
    integers; ``ids``: ``[N]``, by default a hash of each image; ``class_names``: by default the label numbers.
    """

    def __init__(self, pixels: np.ndarray | torch.Tensor | Sequence, labels, ids: Iterable | None = None,
                 class_names: Sequence[str] | None = None):
        labels = np.asarray(labels)
        if len(pixels) and not hasattr(pixels[0], "dtype"):
            raise ValueError(f"An image is a {type(pixels[0]).__name__}; give arrays or tensors.")
        if labels.ndim != 1 or len(labels) and labels.dtype.kind not in "iu":
            raise ValueError(f"Labels are {labels.dtype} of shape {list(labels.shape)}; give one integer per image.")
        if len(pixels) != len(labels) or (ids is not None and len(ids) != len(labels)):
            raise ValueError(f"There are {len(pixels)} images but {len(labels)} labels"
                             f"{'' if ids is None else f' and {len(ids)} ids'}; give one of each per image.")
        count = int(labels.max()) + 1 if len(labels) else 0
        super().__init__(labels, class_names or map(str, range(count)))
        self.pixels, self._ids = pixels, None if ids is None else list(ids)

    def __getitem__(self, i: int) -> Item:
        image = self.pixels[i]
        return Item(image, int(self.labels[i]), content_id(image) if self._ids is None else self._ids[i])

    def identity(self) -> list:
        """Pixels, ids, labels and names."""
        contents, ids = [content_id(image) for image in self.pixels], list(map(str, self._ids or []))
        return [contents, ids, self.labels.tolist(), self.class_names]


class FolderDataset(FileDataset):
    """Images in one folder per class: ``<root>/<class name>/<image>``, at most ``n`` of them, classes in turn."""

    def __init__(self, root: Path, n: Natural | None = None, size: Natural | None = None):
        files, names = class_files(Path(root))
        super().__init__(root, in_turn(files, n), names, size)


def subfolders(root: Path) -> list[Path]:
    """Folders in a folder by name, hidden ones left out."""
    return sorted(p for p in root.iterdir() if p.is_dir() and p.name[0] != ".") if root.is_dir() else []


def class_files(root: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """Images of the class folders in a folder with their labels, and the class names: those of the folders, by
    alphabet, with spaces for underscores."""
    named = [(unicodedata.normalize("NFC", folder.name.replace("_", " ")), folder) for folder in subfolders(root)]
    names = tuple(name for name, _ in sorted(named))
    files = [(file, label) for label, (_, folder) in enumerate(sorted(named)) for file in images_in(folder)]
    if not files:
        raise FileNotFoundError(f"There are no images in {root}; put them in one folder per class there.")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"Two folders in {root} are both the class {twice[0]!r}; put their images into one of them.")
    return files, names


def split_folders(root: Path) -> dict[str, Path]:
    """The folders in a folder that hold the classes of a split, as far as there are any: split -> folder."""
    folders = {p.name.lower(): p for p in subfolders(root) if subfolders(p) and not images_in(p)}
    known = {split: [folders[name] for name in names if name in folders] for split, names in SPLITS.items()}
    return {split: places[0] for split, places in known.items() if places}


def split_files(root: Path, split: Split,
                test_share: Annotated[float, Field(gt=0, lt=1)]) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """Images of a split with their labels, and the class names.

    They lie in ``<root>/train/<class>/`` and ``<root>/test/<class>/``, where the classes must be the same, or in
    ``<root>/<class>/``: then of each class that share is taken for tests whose content hashes come first. That is the
    same images whatever they are called; equal ones stay together, and no split is left without a class that has two.
    """
    if places := split_folders(root):
        found = {name: class_files(place) for name, place in places.items()}
        classes = {name: set(names) for name, (_, names) in found.items()}
        for name, other in (("train", "test"), ("test", "train")):
            if alone := sorted(classes.get(name, set()) - classes.get(other, classes.get(name, set()))):
                raise ValueError(f"The class {alone[0]!r} is in {places[name]} alone; put images of it into "
                                 f"{places[other]} too, or remove it.")
        if split not in found:
            raise FileNotFoundError(f"There are no images in {root / split}; put them in one folder per class there.")
        return found[split]
    files, names = class_files(root)
    hashes = file_hashes(root, [path for path, _ in files])
    distinct = {label: set() for _, label in files}
    for path, label in files:
        distinct[label].add(hashes[path])
    tests = {label: max(1, min(round(test_share * len(own)), len(own) - 1)) for label, own in distinct.items()}
    last = {label: sorted(own)[tests[label] - 1] for label, own in distinct.items()}
    return [(path, label) for path, label in files if (hashes[path] <= last[label]) == (split == "test")], names


class Subset(Images):
    """Images of some classes of a data set, relabelled from 0 in the order of ``classes``.

    ``rows``: positions in ``ds`` to choose from, by default all. Content ids stay those of ``ds``.
    """

    def __init__(self, ds: Images, classes: Iterable[int], rows=None):
        classes = indices(classes, len(ds.class_names), "classes").tolist()
        rows = np.atleast_1d(indices(slice(None) if rows is None else rows, len(ds), "positions"))
        new = {c: i for i, c in enumerate(classes)}
        self.ds, self.from_files = ds, ds.from_files
        self.rows = np.array([r for r in rows if int(ds.labels[r]) in new], int)
        super().__init__([new[int(ds.labels[r])] for r in self.rows], (ds.class_names[c] for c in classes))

    def __getitem__(self, i: int) -> Item:
        return self.ds[int(self.rows[i])]._replace(label=int(self.labels[i]))

    def identity(self) -> list:
        """What the whole holds, and which of it this is."""
        return [self.ds.fingerprint(), self.rows.tolist(), self.labels.tolist(), self.class_names]


@functools.lru_cache(maxsize=4)
def open_dataset(profile: Profile, task: str, split: Split):
    """The images of a task, as the profile says; files are cropped as the model takes them.

    "scenes" are drawn; "folders" are ``data/<profile>/images/<task>/``, and for the profile's own task ``images`` where
    it is given, in the layouts of :func:`split_files`; "benchmarks" are rows of ``datasets.toml`` in the folders of
    CoOp, ``data/<profile>/images/<folder>/``, or on the Hugging Face hub.
    """
    settings = profile.data
    n = settings.train_images if split == "train" else settings.test_images
    if settings.source == "scenes":
        from patchsae.world.dataset import SceneDataset  # the drawn world is loaded by those who look at it

        return SceneDataset(task, split, n)
    size = model_config(profile.model.name).image_size
    if settings.source == "benchmarks":
        return open_benchmark(profile.data_dir / "images", task, split, n, size, settings.subset)
    root = images_folder(profile, task)
    files, names = split_files(root, split, settings.test_share)
    return FileDataset(root, in_turn(files, n), names, size)


def images_there(profile: Profile, task: str) -> bool:
    """Whether the images of a task are where ``open_dataset`` reads them, of a benchmark all that were published or a
    subset; of a task that nothing is trained on, those for tests."""
    if profile.data.source == "scenes":
        return True
    if profile.data.source == "benchmarks":
        there = not missing(profile.data_dir / "images", task)
        return not images_lacking(profile, task) if there else on_this_machine(task)
    root, trained = images_folder(profile, task), (profile.data.task, *profile.adaptation.tasks)
    splits = split_folders(root).keys() or ({"train", "test"} if subfolders(root) else set())
    return ({"train", "test"} if task in trained else {"test"}) <= splits


def images_lacking(profile: Profile, task: str) -> str:
    """How the images of a benchmark whose folder is there differ from what was published; "" where they do not."""
    return lacking(profile.data_dir / "images", task, profile.run_dir / "image_counts.json", profile.data.subset)


def images_folder(profile: Profile, task: str) -> Path:
    """Where the images of a task of a profile with folders lie."""
    given = profile.data.images and task == profile.data.task
    return resolve(profile.data.images) if given else profile.data_dir / "images" / task


@functools.lru_cache(maxsize=4)
def model_config(name: str, local: bool = False):
    """The image tower of a folder, a file or a model of the hub, or of its ``local`` cache alone, as a
    ``transformers.CLIPVisionConfig``."""
    from transformers import CLIPConfig

    from patchsae.weights.clips import read_clip

    path = resolve(name)
    if path.is_file():  # in OpenAI's layout, where the weights alone have the shape
        return read_clip(path).config.vision_config
    source, _, revision = (str(path), "", "") if path.is_dir() else name.partition("@")
    try:
        return CLIPConfig.from_pretrained(source, revision=revision or None, local_files_only=local).vision_config
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"There is no CLIP at {name}: it is neither a folder with config.json nor a model the "
                                "hub can give.") from error


def templates(profile: Profile, task: str) -> list[str]:
    """The prompt templates of a task: the profile's ensemble, or the task's own single template."""
    choice = profile.model.templates
    if choice in ("imagenet_ensemble_7", "imagenet_ensemble_80"):
        return TEMPLATES[choice]
    return [own_template(profile, task)]


def own_template(profile: Profile, task: str) -> str:
    """The wording of a task's classes in zero-shot classification (CoOp's, for its data sets)."""
    if profile.data.source == "scenes":
        from patchsae.world.scenes import WORLD

        return WORLD["tasks"].get(task, {}).get("template", TEMPLATES["maple"])
    return TEMPLATES["dataset_templates"].get(TABLE.get(task, {}).get("title"), TEMPLATES["maple"])


guard(globals())
