"""Sources of images: arrays, folders, parts of others, and whatever a profile names."""

import functools
import json
from pathlib import Path

import numpy as np

from patchsae.config import Profile
from patchsae.data.benchmarks import TABLE, open_benchmark
from patchsae.data.images import FileDataset, Images, Item, content_id, images_in, in_turn

TEMPLATES = json.loads(Path(__file__).with_name("prompt_templates.json").read_text())


class ArrayDataset(Images):
    """Images in memory.

    ``pixels``: float ``[N,3,H,W]``, already preprocessed, or uint8 ``[N,H,W,3]`` images; ``labels``: ``[N]``
    integers; ``ids``: ``[N]``, by default a hash of each image; ``class_names``: by default the label numbers.
    """

    def __init__(self, pixels, labels, ids=None, class_names=None):
        labels = np.asarray(labels)
        if labels.ndim != 1 or len(labels) and labels.dtype.kind not in "iu":
            raise ValueError(f"Labels are {labels.dtype} of shape {list(labels.shape)}; give one integer per image.")
        if len(pixels) != len(labels) or (ids is not None and len(ids) != len(labels)):
            raise ValueError(f"There are {len(pixels)} images but {len(labels)} labels"
                             f"{'' if ids is None else f' and {len(ids)} ids'}; give one of each per image.")
        count = int(labels.max()) + 1 if len(labels) else 0
        super().__init__(labels, class_names or map(str, range(count)))
        self.pixels, self._ids = pixels, None if ids is None else list(ids)
        if len(labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            raise ValueError(f"Labels must lie in [0, {len(self.class_names)}), one per class name; "
                             f"found {self.labels.min()} to {self.labels.max()}.")

    def __getitem__(self, i: int) -> Item:
        image = self.pixels[i]
        return Item(image, int(self.labels[i]), content_id(image) if self._ids is None else self._ids[i])

    def identity(self) -> list:
        """Pixels, ids, labels and names."""
        contents, ids = [content_id(image) for image in self.pixels], list(map(str, self._ids or []))
        return [contents, ids, self.labels.tolist(), self.class_names]


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


class Subset(Images):
    """Images of some classes of a data set, relabelled from 0 in the order of ``classes``.

    ``rows``: positions in ``ds`` to choose from, by default all. Content ids stay those of ``ds``.
    """

    def __init__(self, ds, classes, rows=None):
        new = {c: i for i, c in enumerate(classes)}
        self.ds, self.from_files = ds, ds.from_files
        self.rows = np.array([r for r in (range(len(ds)) if rows is None else rows) if int(ds.labels[r]) in new], int)
        super().__init__([new[int(ds.labels[r])] for r in self.rows], (ds.class_names[c] for c in classes))

    def __getitem__(self, i: int) -> Item:
        return self.ds[int(self.rows[i])]._replace(label=int(self.labels[i]))

    def identity(self) -> list:
        """What the whole holds, and which of it this is."""
        return [self.ds.fingerprint(), self.rows.tolist(), self.labels.tolist(), self.class_names]


@functools.lru_cache(maxsize=4)
def open_dataset(profile: Profile, task: str, split: str):
    """The images of a task, as the profile says.

    "scenes" are drawn; "folders" are ``data/<profile>/images/<task>/<split>/<class name>/``; "benchmarks" are rows of
    ``datasets.toml`` in the folders of CoOp, ``data/<profile>/images/<folder>/``, or on the Hugging Face hub.
    """
    n = profile.data.train_images if split == "train" else profile.data.test_images
    if profile.data.source == "scenes":
        from patchsae.world.dataset import SceneDataset  # the drawn world is loaded by those who look at it

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
    return [own_template(profile, task)]


def own_template(profile: Profile, task: str) -> str:
    """The wording of a task's classes in zero-shot classification (CoOp's, for its data sets)."""
    if profile.data.source == "scenes":
        from patchsae.world.scenes import WORLD

        return WORLD["tasks"][task]["template"]
    return TEMPLATES["dataset_templates"].get(TABLE.get(task, {}).get("title"), TEMPLATES["maple"])
