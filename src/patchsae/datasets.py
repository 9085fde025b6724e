"""One small interface for every source of images: ``len(ds)``, ``ds[i] -> Item``, ``ds.class_names``."""

import functools
import json
from pathlib import Path

import numpy as np

from patchsae.benchmarks import TABLE, open_benchmark
from patchsae.config import Profile
from patchsae.images import FileDataset, Item, content_id, hash_of, images_in, in_turn
from patchsae.scenes import WORLD, Scene, class_names, draw_scene

TEMPLATES = json.loads(Path(__file__).with_name("prompt_templates.json").read_text())
#: Scenes of different splits never share a seed. Seed 2 drew the pre-training of the mini CLIP.
SPLIT_SEEDS = {"train": 0, "test": 1}


class ArrayDataset:
    """Images in memory.

    ``pixels``: float ``[N,3,H,W]``, already preprocessed, or uint8 ``[N,H,W,3]`` images; ``labels``: ``[N]``
    integers; ``ids``: ``[N]``, by default a hash of each image; ``class_names``: by default the label numbers.
    """

    def __init__(self, pixels, labels, ids=None, class_names=None):
        self.pixels, self.labels = pixels, np.asarray(labels)
        if self.labels.ndim != 1 or len(self.labels) and self.labels.dtype.kind not in "iu":
            raise ValueError(f"Labels are {self.labels.dtype} of shape {list(self.labels.shape)}; "
                             "give one integer per image.")
        self.labels = self.labels.astype(np.int64)
        if len(pixels) != len(self.labels) or (ids is not None and len(ids) != len(self.labels)):
            raise ValueError(f"There are {len(pixels)} images but {len(self.labels)} labels"
                             f"{'' if ids is None else f' and {len(ids)} ids'}; give one of each per image.")
        self._ids = None if ids is None else list(ids)
        count = int(self.labels.max()) + 1 if len(self.labels) else 0
        self.class_names = tuple(class_names or map(str, range(count)))
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            raise ValueError(f"Labels must lie in [0, {len(self.class_names)}), one per class name; "
                             f"found {self.labels.min()} to {self.labels.max()}.")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Item:
        image = self.pixels[i]
        return Item(image, int(self.labels[i]), content_id(image) if self._ids is None else self._ids[i])

    def fingerprint(self) -> str:
        """Hash of what the data set holds."""
        contents, ids = [content_id(image) for image in self.pixels], list(map(str, self._ids or []))
        return hash_of([contents, ids, self.labels.tolist(), self.class_names])


class SceneDataset:
    """The first ``n`` scenes of a pictogram task and split, drawn when asked for."""

    def __init__(self, task: str, split: str, n: int):
        if split not in SPLIT_SEEDS:
            raise ValueError(f"Scenes have the splits {' and '.join(SPLIT_SEEDS)}, not {split!r}.")
        self.task, self.split, self.n = task, split, n
        self.class_names = class_names(task)
        self.labels = np.arange(n) % len(self.class_names)  # labels go round in turn

    def __len__(self) -> int:
        return self.n

    def scene(self, i: int) -> Scene:
        """The scene with its plan, caption and ground-truth maps."""
        if not 0 <= i < self.n:
            raise IndexError(f"Scene {i} is outside the {self.n} scenes of {self.task}/{self.split}.")
        return draw_scene(self.task, SPLIT_SEEDS[self.split], i)

    def __getitem__(self, i: int) -> Item:
        scene = self.scene(i)
        return Item(scene.image, scene.label, content_id(scene.image))

    def fingerprint(self) -> str:
        """Hash of what the data set holds: scenes follow from their names and the drawing code."""
        drawing = [Path(__file__).with_name(name).read_text() for name in ("scenes.py", "scenes.toml")]
        return hash_of([self.task, self.split, self.n, *drawing])


class FolderDataset(FileDataset):
    """Images in one folder per class: ``<root>/<class name>/<image>``, at most ``n`` of them, classes in turn."""

    def __init__(self, root: Path, n: int | None = None, size: int | None = None):
        root = Path(root)
        seen = [p for p in root.iterdir() if p.name[0] != "."] if root.is_dir() else []
        folders = sorted(p for p in seen if p.is_dir())
        files = [(f, label) for label, folder in enumerate(folders) for f in images_in(folder)]
        if not files:
            raise FileNotFoundError(f"There are no images in {root}; put them in one folder per class there.")
        super().__init__(root, in_turn(files, n), tuple(p.name.replace("_", " ") for p in folders), size)


class Subset:
    """Images of some classes of a data set, relabelled from 0 in the order of ``classes``.

    ``rows``: positions in ``ds`` to choose from, by default all. Content ids stay those of ``ds``.
    """

    def __init__(self, ds, classes, rows=None):
        self.ds, self.class_names = ds, tuple(ds.class_names[c] for c in classes)
        new = {c: i for i, c in enumerate(classes)}
        self.rows = np.array([r for r in (range(len(ds)) if rows is None else rows) if int(ds.labels[r]) in new], int)
        self.labels = np.array([new[int(ds.labels[r])] for r in self.rows], dtype=np.int64)
        if hasattr(ds, "unreadable"):
            self.unreadable = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Item:
        return self.ds[int(self.rows[i])]._replace(label=int(self.labels[i]))

    def fingerprint(self) -> str:
        """Hash of what the data set holds."""
        return hash_of([self.ds.fingerprint(), self.rows.tolist(), self.labels.tolist(), self.class_names])


@functools.lru_cache(maxsize=4)
def open_dataset(profile: Profile, task: str, split: str):
    """The images of a task, as the profile says.

    "scenes" are drawn; "folders" are ``data/<profile>/images/<task>/<split>/<class name>/``; "benchmarks" are rows of
    ``datasets.toml`` in the folders of CoOp, ``data/<profile>/images/<folder>/``, or on the Hugging Face hub.
    """
    n = profile.data.train_images if split == "train" else profile.data.test_images
    if profile.data.source == "scenes":
        return SceneDataset(task, split, n)
    root, size = profile.data_dir / "images", profile.data.image_size
    if profile.data.source == "folders":
        return FolderDataset(root / task / split, n, size)
    return open_benchmark(root, task, split, n, size)


def templates(profile: Profile, task: str) -> list[str]:
    """The prompt templates of a task: the profile's ensemble, or the task's own single template."""
    choice = profile.model.templates
    if choice in ("imagenet_ensemble_7", "imagenet_ensemble_80"):
        return TEMPLATES[choice]
    return [own_template(task)]


def own_template(task: str) -> str:
    """The wording of a task's classes in zero-shot classification (CoOp's, for its data sets)."""
    own = {name: t["template"] for name, t in WORLD["tasks"].items()}
    own |= {name: TEMPLATES["dataset_templates"].get(row["title"], TEMPLATES["maple"]) for name, row in TABLE.items()}
    return own.get(task, TEMPLATES["maple"])
