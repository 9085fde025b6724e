"""Images in files: decoded and cropped one way everywhere, and counted where they cannot be read."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from patchsae.data.checks import Natural, Whole, checked, guard, indices, shown
from patchsae.data.hashes import file_hashes

#: Images up to this many times longer than wide are resized as a whole, and then equal CLIP's own bit for bit.
LONGEST = 8
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Item(NamedTuple):
    """One image: uint8 ``[H, W, 3]`` or preprocessed float ``[3, H, W]``, its label and its content id."""

    image: np.ndarray | torch.Tensor
    label: int
    id: str


class Unreadable(ValueError):
    """One image cannot be read; a pass over a data set goes on over a few of these."""


class LostWorker(RuntimeError):
    """A process that reads images has ended."""


def content_id(image: np.ndarray | torch.Tensor) -> str:
    """Hash of an image's shape and bytes: 16 hexadecimal digits."""
    array = np.ascontiguousarray(image)
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()[:16]


def hash_of(content: list) -> str:
    """Hash of what JSON can write: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def rgb(image: Image.Image) -> np.ndarray:
    """The first frame of an image, upright, as uint8 ``[H, W, 3]``; of 16 bits the upper 8, transparency left out."""
    image.load()  # damage is an error here; after one that was passed over, the rest would be black
    with contextlib.suppress(Exception):  # damaged notes of a camera turn nothing
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    if not image.mode.startswith(("I", "F")):
        return np.array(image.convert("RGB"))
    grey = np.asarray(image)
    if not np.isfinite(grey).all():
        raise ValueError("The image has pixels that are not finite.")
    if image.mode.startswith("I") and grey.max() > 255:
        grey = grey >> 8
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


def read_image(source: Path | bytes, name: str | Path) -> np.ndarray:
    """Decode a file, or its bytes, to uint8 ``[H, W, 3]``, upright; ``name`` is what an error calls it."""
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            return rgb(image)
    except Exception as error:  # every decoder has errors of its own for damaged bytes
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise Unreadable(f"Cannot read the image {name} ({reason}); replace or remove it.") from error


class Crop(NamedTuple):
    """CLIP's crop: the shorter side is brought to ``size`` pixels, bicubic, and the central square kept.

    A map of numbers ``[H, W]`` is cut alike with ``Image.Resampling.NEAREST``.
    """

    size: int
    resample: Image.Resampling = Image.Resampling.BICUBIC

    @checked
    def __call__(self, image: np.ndarray | torch.Tensor) -> np.ndarray:
        """uint8 ``[H, W, 3] -> [size, size, 3]``."""
        image = np.asarray(image)
        if 0 in image.shape or image.ndim != 2 and (image.ndim != 3 or image.dtype != np.uint8 or image.shape[2] != 3):
            raise ValueError(f"An image is {image.dtype} of shape {list(image.shape)}; give uint8 [H, W, 3], or a map "
                             "[H, W].")
        size, (height, width) = self.size, image.shape[:2]
        if (height, width) == (size, size):
            return image
        # The sides of the whole resized image are cut to whole pixels, as CLIP's own preprocessing does.
        tall, wide = (size, size * width // height) if height <= width else (size * height // width, size)
        top, left = (tall - size) // 2, (wide - size) // 2
        picture = Image.fromarray(image)
        if max(tall, wide) <= LONGEST * size:
            whole = picture.resize((wide, tall), self.resample)
            return np.array(whole)[top:top + size, left:left + size]
        # Of an image much longer than it is wide only the square is computed: the whole would not fit into memory.
        box = (left * width / wide, top * height / tall, (left + size) * width / wide, (top + size) * height / tall)
        box = (*box[:2], min(box[2], width), min(box[3], height))
        return np.array(picture.resize((size, size), self.resample, box))


def patch_shares(plane: Annotated[np.ndarray, "int L,L"], n: Natural, grid: Natural) -> np.ndarray:
    """Share of each patch that each of n concepts covers: int ``[S,S]``, -1 for none -> float32 ``[grid,grid,n]``."""
    if not -1 <= plane.min() <= plane.max() < n:
        raise ValueError(f"The map names concepts from {plane.min()} to {plane.max()}, of {n}; -1 is for none.")
    places = np.arange(len(plane)) * grid // len(plane)
    patch = places[:, None] * grid + places
    counts = np.bincount((patch * (n + 1) + plane + 1).ravel(), minlength=grid**2 * (n + 1)).reshape(grid, grid, n + 1)
    pixels = np.bincount(patch.ravel()).reshape(grid, grid, 1)
    return (counts[..., 1:] / pixels).astype(np.float32)


class Images:
    """What every source of images is: ``len(ds)``, ``ds[i] -> Item``, ``ds.class_names`` and ``ds.labels [N]``.

    What a source does not have is as it stands here. ``from_files``: reading takes a while, so that worker processes
    read ahead. ``label_order``: the labels in the order in which the source first names them, where that is not their
    own. ``counted``: whether images that are read count in the file that ``PATCHSAE_READ`` names. ``concepts``: kind ->
    names of what ``scene(i).coverage(kind)`` has ground truth for; ``groups``: concept -> what it belongs to.
    ``unreadable``: position -> reason, filled by passes over the data set.
    """

    #: What a source of another kind must have to stand for one.
    needs = ("class_names", "labels", "unreadable")
    from_files: bool = False
    counted: bool = False
    label_order: tuple[int, ...] = ()
    concepts: dict[str, tuple[str, ...]] = {}
    groups: dict[str, str] = {}

    def __init__(self, labels, class_names: Iterable[str]):
        given, labels, self.class_names = labels, np.asarray(labels), tuple(class_names)
        flags = isinstance(given, list | tuple) and any(isinstance(label, bool) for label in given)
        if labels.ndim != 1 or len(labels) and labels.dtype.kind not in "iu" or flags:
            raise ValueError(f"Labels are {shown(labels)}; give one integer per image.")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.class_names):
            raise ValueError(f"Labels must lie in [0, {len(self.class_names)}), one per class name; found "
                             f"{labels.min()} to {labels.max()}.")
        self.labels = labels.astype(np.int64)
        self.unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Item:
        raise NotImplementedError

    def uncropped(self) -> "Images":
        """The same images as they are in their files, in whatever sizes."""
        return self

    def readable(self, rows) -> Iterator[tuple[int, Item]]:
        """Those of the positions ``rows`` whose image can be read, with the image; the others are noted."""
        for row in np.atleast_1d(indices(rows, len(self), "positions")).tolist():
            try:
                yield row, self[row]
            except Unreadable as error:
                self.unreadable[row] = str(error)

    def scene(self, i: int):
        """Image ``i`` with its ground truth, where the source has ``concepts``."""
        raise ValueError(f"{type(self).__name__} has no ground truth; use images with masks.")

    def fingerprint(self) -> str:
        """Hash of what the data set holds, computed once: 16 hexadecimal digits."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return hash_of(self.identity())

    def identity(self) -> list:
        """What decides the images, their order, their labels and how they are shown, as JSON can write it."""
        raise NotImplementedError


class FileDataset(Images):
    """Images in files.

    ``files``: pairs of a path and a label; ``root``: the folder they are in; ``size``: pixels a side that CLIP's crop
    brings them to, so that maps over patches lie on what is shown; None leaves them.
    """

    from_files = True

    def __init__(self, root: Path, files: list[tuple[Path, int]], class_names: Iterable[str],
                 size: Natural | None = None,
                 label_order: Iterable[int] = ()):
        super().__init__([label for _, label in files], class_names)
        self.root, self.files, self.size, self.label_order = Path(root), files, size, tuple(label_order)

    def __getitem__(self, i: int) -> Item:
        path, label = self.files[i]
        return _item(read_image(path, path), label, self.size)

    def uncropped(self) -> "FileDataset":
        """The same images without the crop."""
        return FileDataset(self.root, self.files, self.class_names, None, self.label_order)

    def identity(self) -> list:
        """What the files hold, not what they are called; one that cannot be read holds nothing."""
        hashes = file_hashes(self.root, [path for path, _ in self.files])
        return [[[hashes[path], label] for path, label in self.files], list(self.class_names), self.size]


class HubDataset(Images):
    """Images in a column of a Hugging Face table, decoded here and cropped as above; ``labels [N]`` are numbers.

    ``source``: what fixes the images where a revision of the hub does: its id, configuration, split and revision.
    """

    from_files = True

    def __init__(self, table, column: str, labels: Annotated[np.ndarray, "int N"], class_names: Iterable[str],
                 size: Natural | None = None, source: Sequence = ()):
        rows = len(table) if hasattr(table, "__getitem__") and hasattr(table, "__len__") else -1
        if rows != len(labels) or rows and not (isinstance(table[0], dict) and column in table[0]):
            raise ValueError(f"The table is no table of {len(labels)} images in a column {column!r}; choose another.")
        super().__init__(labels, class_names)
        self.table, self.column, self.size, self.source = table, column, size, list(source)

    def __getitem__(self, i: int) -> Item:
        row = self.table[int(i)]
        if not isinstance(row, dict) or not row.get(self.column):
            raise Unreadable(f"Row {i} of the table has no image in the column {self.column!r}; remove it.")
        stored = row[self.column]
        name = f"{i} ({stored['path'] or self.column})"
        image = read_image(stored["bytes"] or Path(stored["path"]), name)
        return _item(image, int(self.labels[i]), self.size)

    def uncropped(self) -> "HubDataset":
        """The same images without the crop."""
        return HubDataset(self.table, self.column, self.labels, self.class_names, None, self.source)

    def identity(self) -> list:
        """The revision that the images are of; where none is fixed, what they hold."""
        stored = () if self.source else (self.table[i][self.column] for i in range(len(self)))
        data = (image["bytes"] or Path(image["path"]).read_bytes() for image in stored)
        images = self.source or [hashlib.sha256(image).hexdigest() for image in data]
        return [images, self.labels.tolist(), list(self.class_names), self.size]


def _item(image: np.ndarray, label: int, size: int | None) -> Item:
    image = image if size is None else Crop(size)(image)
    return Item(image, label, content_id(image))


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder by name, hidden ones left out."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; name one that holds images.")
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_ENDINGS and f.name[0] != ".")


def in_turn(files: list[tuple], n: Whole | None) -> list[tuple]:
    """The first ``n`` of pairs of a file and a label when classes take turns; all of them in that order for None."""
    seen, ranked = {}, []
    for path, label in files:
        seen[label] = seen.get(label, -1) + 1
        ranked.append((seen[label], label, path))
    return [(path, label) for _, label, path in sorted(ranked, key=lambda row: row[:2])[:n]]


guard(globals())
