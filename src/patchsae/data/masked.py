"""Public data sets with masks, through the interface of drawn scenes: ``ds.scene(i).coverage(kind)``.

They are read where they lie, as their authors pack them, from ``data/<profile>/segmentation/<name>/``:

    ade20k         images/, annotations/ (png of class numbers), objectInfo150.txt, sceneCategories.txt
    partimagenet   images/<split>/, annotations/<split>.json (COCO polygons)
    oxford-pets    images/, annotations/trimaps/, annotations/trainval.txt and test.txt

or, for images of one's own, from the folder that the profile names as ``masks``.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from patchsae.clip import Clip
from patchsae.config import Profile, resolve
from patchsae.data.datasets import open_dataset
from patchsae.data.hashes import file_hashes
from patchsae.data.images import Crop, FileDataset, Images, Item, content_id, in_turn, patch_shares, read_image

#: A pixel without a concept.
NONE = -1


class Entry(NamedTuple):
    """One image: its file, its label, and the file of its mask."""

    path: Path
    label: int
    mask: Path


class Masks(NamedTuple):
    """What a folder holds. ``read(entry, (width, height))`` gives the concept of every pixel of an image of that size:
    int ``[h,w]``, a number of ``names``, or -1 for none. ``groups``: concept -> what it is part of."""

    entries: list[Entry]
    names: list[str]
    class_names: list[str]
    read: Callable[[Entry, tuple[int, int]], np.ndarray]
    groups: dict[str, str] = {}


class MaskedImage(NamedTuple):
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
        return patch_shares(self.plane, len(self.names), self.grid)


class MaskedDataset(Images):
    """Images with masks in the folder ``root``, cut to ``size`` pixels and ``grid`` patches a side."""

    def __init__(self, root: Path, masks: Masks, size: int, grid: int):
        if not masks.entries:
            raise FileNotFoundError(f"There are no images in {root}; unpack the data set there as its authors packed "
                                    "it.")
        super().__init__([entry.label for entry in masks.entries], masks.class_names)
        self.root, self.entries, self.read, self.groups = root, masks.entries, masks.read, masks.groups
        self.concepts, self.size, self.grid = {"noun": tuple(masks.names)}, size, grid

    def scene(self, i: int) -> MaskedImage:
        """The image and its mask, resized to the model's size by the shorter side and cut in the middle."""
        entry = self.entries[i]
        image = read_image(entry.path, entry.path)
        height, width = image.shape[:2]
        plane = self.read(entry, (width, height)).astype(np.int32)
        if plane.shape != (height, width):
            raise ValueError(f"The mask of {entry.path} is {list(plane.shape[::-1])} pixels, the image "
                             f"{[width, height]}; fetch the data set again.")
        plane = Crop(self.size, Image.Resampling.NEAREST)(plane)
        return MaskedImage(Crop(self.size)(image), plane, self.concepts["noun"], self.grid)

    def __getitem__(self, i: int) -> Item:
        image = self.scene(i).image
        return Item(image, int(self.labels[i]), content_id(image))

    def identity(self) -> list:
        """What the images and masks hold, the labels, what the numbers of the masks mean, and how they are cut."""
        hashes = file_hashes(self.root, [path for entry in self.entries for path in (entry.path, entry.mask)])
        files = [[hashes[entry.path], hashes[entry.mask]] for entry in self.entries]
        return [files, self.labels.tolist(), self.concepts, self.groups, self.class_names, self.size, self.grid]


def _numbers(entry: Entry) -> np.ndarray:
    """What a mask in a png holds."""
    try:
        return np.asarray(Image.open(entry.mask)).astype(np.int32)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot read the mask {entry.mask} ({error}); fetch the data set again.") from error


def _lines(path: Path) -> list[str]:
    """Lines of a text file of the data set that hold anything."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise FileNotFoundError(f"There is no {path}; unpack the data set there as its authors packed it.") from error


def ade20k(folder: Path, split: str) -> Masks:
    """ADE20K's scene-parsing release: 150 concepts; labels are scenes. Pixels of 0 are none of the 150."""
    part = {"train": "training", "test": "validation"}[split]
    names = [line.split("\t")[-1].split(",")[0].strip() for line in _lines(folder / "objectInfo150.txt")[1:]]
    scene = dict(line.split()[:2] for line in _lines(folder / "sceneCategories.txt"))
    classes = sorted(set(scene.values()))
    entries = [Entry(path, classes.index(scene[path.stem]), folder / "annotations" / part / f"{path.stem}.png")
               for path in sorted((folder / "images" / part).glob("*.jpg"))]
    return Masks(entries, names, classes, lambda entry, _: _numbers(entry) - 1)


def partimagenet(folder: Path, split: str) -> Masks:
    """PartImageNet: 40 parts, each of a super-category; labels are the ImageNet classes in the file names."""
    part = {"train": "train", "test": "val"}[split]
    path = folder / "annotations" / f"{part}.json"
    content = json.loads("\n".join(_lines(path)))
    files = {image["id"]: folder / "images" / part / Path(image["file_name"]).name for image in content["images"]}
    groups = {c["id"]: (c["name"], c["supercategory"]) for c in sorted(content["categories"], key=lambda c: c["id"])}
    numbers, outlines = {key: i for i, key in enumerate(groups)}, defaultdict(list)
    for annotation in sorted(content["annotations"], key=lambda a: -a["area"]):  # smaller parts lie on larger ones
        if not isinstance(annotation["segmentation"], list):
            raise ValueError(f"{path} has a mask that is no polygon (annotation {annotation['id']}); convert it to "
                             "polygons first.")
        outlines[files.get(annotation["image_id"])].append(annotation)

    def read(entry: Entry, pixels: tuple[int, int]) -> np.ndarray:
        canvas = Image.new("I", pixels, NONE)
        for annotation in outlines[entry.path]:
            for polygon in annotation["segmentation"]:
                ImageDraw.Draw(canvas).polygon(polygon, fill=numbers[annotation["category_id"]])
        return np.asarray(canvas)

    titles = {file: file.name.split("_")[0] for file in sorted(files.values())}
    classes = sorted(set(titles.values()))
    entries = [Entry(file, classes.index(title), path) for file, title in titles.items()]
    return Masks(entries, [name for name, _ in groups.values()], classes, read, dict(groups.values()))


def oxford_pets(folder: Path, split: str) -> Masks:
    """Oxford-IIIT Pets: the trimap's foreground is the breed; groups are cat and dog. Borders (3) are nothing."""
    listing = folder / "annotations" / {"train": "trainval.txt", "test": "test.txt"}[split]
    listed = [line.split() for line in _lines(listing)]
    breed = {int(number): name.rsplit("_", 1)[0].replace("_", " ").lower() for name, number, *_ in listed}
    species = {breed[int(number)]: {"1": "cat", "2": "dog"}[kind] for _, number, kind, *_ in listed}
    names = [breed[number] for number in sorted(breed)]
    entries = [Entry(folder / "images" / f"{name}.jpg", names.index(breed[int(number)]),
                     folder / "annotations" / "trimaps" / f"{name}.png") for name, number, *_ in sorted(listed)]
    return Masks(entries, names, names, lambda entry, _: np.where(_numbers(entry) == 1, entry.label, NONE), species)


def own_masks(folder: Path, images: FileDataset) -> Masks:
    """Masks of images in class folders: a png of numbers where the image would be if the folder of masks were that of
    the images. The numbers count the lines of ``classes.txt`` there from 1; without it, all but 0 is the image's class.
    """
    listing = folder / "classes.txt"
    listed = listing.is_file()
    names = _lines(listing) if listed else images.class_names

    def read(entry: Entry, _) -> np.ndarray:
        numbers = _numbers(entry)
        if numbers.ndim != 2 or listed and numbers.max() > len(names):
            raise ValueError(f"The mask {entry.mask} does not hold one number from 0 to {len(names)} a pixel; mend it.")
        return numbers - 1 if listed else np.where(numbers > 0, entry.label, NONE)

    entries = [Entry(path, label, folder / path.relative_to(images.root).with_suffix(".png"))
               for path, label in images.files]
    return Masks([entry for entry in entries if entry.mask.is_file()], names, images.class_names, read)


#: Folder under ``data/<profile>/segmentation/`` -> its reader.
READERS = {"ade20k": ade20k, "partimagenet": partimagenet, "oxford-pets": oxford_pets}
#: Where the first of them, which has most concepts, comes from.
SOURCE = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"


def masks_folder(profile: Profile) -> Path | None:
    """The folder of masks that the profile names, or else the first public set of them that is there."""
    named = [profile.data_dir / "segmentation" / name for name in READERS]
    folders = [resolve(profile.data.masks)] if profile.data.masks else named
    return next((folder for folder in folders if folder.is_dir()), None)


def open_masked(profile: Profile, clip: Clip, split: str):
    """Images with ground truth: the profile's own where it has one, else the first public set that is there."""
    if profile.data.source == "scenes":
        return open_dataset(profile, profile.data.task, split)
    folder = masks_folder(profile)
    if folder is None and profile.data.masks:
        raise FileNotFoundError(f"There is no folder of masks {profile.data.masks}; mend data.masks of the profile.")
    if folder is None:
        raise FileNotFoundError(f"There are no masks in {profile.data_dir / 'segmentation'}; unpack one of "
                                f"{', '.join(READERS)} there, the first from {SOURCE}.")
    if folder.name in READERS:
        masks = READERS[folder.name](folder, split)
    else:
        masks = own_masks(folder, open_dataset(profile, profile.data.task, split))
    # Classes in turn: a pass over the first images sees all of them.
    entries = [entry for entry, _ in in_turn([(entry, entry.label) for entry in masks.entries], None)]
    return MaskedDataset(folder, masks._replace(entries=entries), clip.image_size, clip.grid)
