"""Public data sets with masks, through the interface of drawn scenes: ``ds.scene(i).coverage(kind)``.

They are read where they lie, as their authors pack them, from ``data/<profile>/segmentation/<name>/``:

    ade20k         images/, annotations/ (png of class numbers), objectInfo150.txt, sceneCategories.txt
    partimagenet   images/<split>/, annotations/<split>.json (COCO polygons)
    oxford-pets    images/, annotations/trimaps/, annotations/trainval.txt and test.txt
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from patchsae.clip import Clip
from patchsae.config import Profile
from patchsae.data.datasets import open_dataset
from patchsae.data.hashes import file_hashes
from patchsae.data.images import Crop, Images, Item, content_id, read_image

#: A pixel without a concept.
NONE = -1


class Entry(NamedTuple):
    """One image: its file, its label, the file of its mask, and ``read(size)``, which gives the concept of every pixel,
    int ``[h,w]``, -1 for none, where ``size`` is the (width, height) of the image."""

    path: Path
    label: int
    mask: Path
    read: Callable[[tuple[int, int]], np.ndarray]


@dataclass(frozen=True)
class MaskedImage:
    """An image and the concept of each of its pixels, cut as the model sees it.

    ``image``: uint8 ``[size,size,3]``; ``plane``: int ``[size,size]``, -1 for none; ``names``: of its numbers;
    ``grid``: patches a side.
    """

    image: np.ndarray
    plane: np.ndarray
    names: tuple[str, ...]
    grid: int

    def mask(self, kind: str, name: str) -> np.ndarray:
        """Where the concept is: bool ``[size,size]``."""
        return self.plane == self.names.index(name)

    def coverage(self, kind: str) -> np.ndarray:
        """Share of each patch that each concept covers: float32 ``[grid,grid,concepts]``."""
        places = np.arange(len(self.plane)) * self.grid // len(self.plane)
        patch, n = places[:, None] * self.grid + places, len(self.names) + 1
        counts = np.bincount((patch * n + self.plane + 1).ravel(), minlength=self.grid**2 * n)
        pixels = np.bincount(patch.ravel(), minlength=self.grid**2)
        return (counts.reshape(-1, n) / pixels[:, None])[:, 1:].reshape(self.grid, self.grid, -1).astype(np.float32)


class MaskedDataset(Images):
    """Images with masks in a folder. ``concepts``: kind -> names; ``groups``: concept -> what it belongs to."""

    def __init__(self, root: Path, entries: list[Entry], names, class_names, groups: dict, size: int, grid: int):
        if not entries:
            raise FileNotFoundError(f"There are no images in {root}; unpack the data set there as its authors packed "
                                    "it.")
        super().__init__([entry.label for entry in entries], class_names)
        self.root, self.entries, self.groups, self.concepts = root, entries, groups, {"noun": tuple(names)}
        self.size, self.grid = size, grid

    def scene(self, i: int) -> MaskedImage:
        """The image and its mask, resized to the model's size by the shorter side and cut in the middle."""
        entry = self.entries[i]
        image = read_image(entry.path, entry.path)
        height, width = image.shape[:2]
        plane = entry.read((width, height)).astype(np.int32)
        if plane.shape != (height, width):
            raise ValueError(f"The mask of {entry.path} is {list(plane.shape[::-1])} pixels, the image "
                             f"{[width, height]}; fetch the data set again.")
        own = Crop(self.size, Image.Resampling.NEAREST)(plane)
        return MaskedImage(Crop(self.size)(image), own, self.concepts["noun"], self.grid)

    def __getitem__(self, i: int) -> Item:
        image = self.scene(i).image
        return Item(image, int(self.labels[i]), content_id(image))

    def identity(self) -> list:
        """What the images and masks hold, the labels, what the numbers of the masks mean, and how they are cut."""
        hashes = file_hashes(self.root, [path for entry in self.entries for path in (entry.path, entry.mask)])
        files = [[hashes[entry.path], hashes[entry.mask]] for entry in self.entries]
        return [files, self.labels.tolist(), self.concepts, self.groups, self.class_names, self.size, self.grid]


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot read the image {path} ({error}); fetch the data set again.") from error


def _lines(path: Path) -> list[str]:
    """Lines of a text file of the data set that hold anything."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise FileNotFoundError(f"There is no {path}; unpack the data set there as its authors packed it.") from error


def ade20k(folder: Path, split: str, size: int, grid: int) -> MaskedDataset:
    """ADE20K's scene-parsing release: 150 concepts; labels are scenes. Pixels of 0 are none of the 150."""
    part = {"train": "training", "test": "validation"}[split]
    names = [line.split("\t")[-1].split(",")[0].strip() for line in _lines(folder / "objectInfo150.txt")[1:]]
    scene = dict(line.split()[:2] for line in _lines(folder / "sceneCategories.txt"))
    classes = sorted(set(scene.values()))

    def read(mask: Path, _size) -> np.ndarray:
        return np.asarray(_open(mask)).astype(np.int32) - 1

    masks = folder / "annotations" / part
    entries = [Entry(path, classes.index(scene[path.stem]), (mask := masks / f"{path.stem}.png"),
                     functools.partial(read, mask))
               for path in sorted((folder / "images" / part).glob("*.jpg"))]
    return MaskedDataset(folder, entries, names, classes, {}, size, grid)


def partimagenet(folder: Path, split: str, size: int, grid: int) -> MaskedDataset:
    """PartImageNet: 40 parts, each of a super-category; labels are the ImageNet classes in the file names."""
    part = {"train": "train", "test": "val"}[split]
    path = folder / "annotations" / f"{part}.json"
    content = json.loads("\n".join(_lines(path)))
    categories = sorted(content["categories"], key=lambda c: c["id"])
    place, outlines = {c["id"]: i for i, c in enumerate(categories)}, {}
    for annotation in content["annotations"]:
        if not isinstance(annotation["segmentation"], list):
            raise ValueError(f"{path} has a mask that is no polygon (annotation {annotation['id']}); convert it to "
                             "polygons first.")
        outlines.setdefault(annotation["image_id"], []).append((place[annotation["category_id"]], annotation))

    def read(own: list, pixels: tuple[int, int]) -> np.ndarray:
        canvas = Image.new("I", pixels, NONE)
        for number, annotation in sorted(own, key=lambda a: -a[1]["area"]):  # smaller parts lie on larger ones
            for polygon in annotation["segmentation"]:
                ImageDraw.Draw(canvas).polygon(polygon, fill=number)
        return np.asarray(canvas)

    images = sorted(content["images"], key=lambda image: image["file_name"])
    classes = sorted({Path(image["file_name"]).name.split("_")[0] for image in images})
    entries = [Entry(folder / "images" / part / Path(image["file_name"]).name,
                     classes.index(Path(image["file_name"]).name.split("_")[0]), path,
                     functools.partial(read, outlines.get(image["id"], []))) for image in images]
    groups = {c["name"]: c["supercategory"] for c in categories}
    return MaskedDataset(folder, entries, list(groups), classes, groups, size, grid)


def oxford_pets(folder: Path, split: str, size: int, grid: int) -> MaskedDataset:
    """Oxford-IIIT Pets: the trimap's foreground is the breed; groups are cat and dog. Borders (3) are nothing."""
    listing = folder / "annotations" / {"train": "trainval.txt", "test": "test.txt"}[split]
    listed = [line.split() for line in _lines(listing)]
    breed = {int(number): name.rsplit("_", 1)[0].replace("_", " ").lower() for name, number, *_ in listed}
    species = {breed[int(number)]: {"1": "cat", "2": "dog"}[kind] for _, number, kind, *_ in listed}
    names = [breed[number] for number in sorted(breed)]

    def read(mask: Path, label: int, _size) -> np.ndarray:
        return np.where(np.asarray(_open(mask)) == 1, label, NONE)

    masks = folder / "annotations" / "trimaps"
    entries = [Entry(folder / "images" / f"{name}.jpg", (label := names.index(breed[int(number)])),
                     (mask := masks / f"{name}.png"), functools.partial(read, mask, label))
               for name, number, *_ in sorted(listed)]
    return MaskedDataset(folder, entries, names, names, species, size, grid)


#: Folder under ``data/<profile>/segmentation/`` -> its reader.
READERS = {"ade20k": ade20k, "partimagenet": partimagenet, "oxford-pets": oxford_pets}
#: Where the first of them, which has most concepts, comes from.
SOURCE = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"


def masks_folder(profile: Profile) -> Path | None:
    """The first public set of masks that is there; none is needed where the profile's own images have ground truth."""
    folders = [profile.data_dir / "segmentation" / name for name in READERS]
    return next((folder for folder in folders if folder.is_dir()), None)


def open_masked(profile: Profile, clip: Clip, split: str):
    """Images with ground truth: the profile's own where it has one, else the first public set that is there."""
    own = profile.data.source == "scenes" and open_dataset(profile, profile.data.task, split)
    if own:
        return own
    if (folder := masks_folder(profile)) is not None:
        return READERS[folder.name](folder, split, clip.image_size, clip.grid)
    raise FileNotFoundError(f"There are no masks in {profile.data_dir / 'segmentation'}; unpack one of "
                            f"{', '.join(READERS)} there, the first from {SOURCE}.")
