"""Whatever holds images and labels, as a source of images."""

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.data import Subset as TorchSubset

from patchsae.data.checks import guard
from patchsae.data.datasets import ArrayDataset, Subset
from patchsae.data.images import Images, Item, content_id, rgb


class TorchImages(Images):
    """A map-style data set of torch that gives (image, label): a Pillow image, uint8 ``[H,W,3]``, or preprocessed float
    ``[3,H,W]``. Labels are its ``targets`` where it has them; otherwise every image is read once for its label."""

    def __init__(self, ds: Dataset):
        self.ds = ds
        targets = getattr(ds, "targets", None)
        labels = [self._pair(i)[1] for i in range(len(ds))] if targets is None else list(targets)
        if wrong := [label for label in labels if int(label) != label or label < 0]:
            raise ValueError(f"The data set has the label {wrong[0]!r}; labels are whole numbers from 0.")
        names = getattr(ds, "classes", None) or range(int(max(labels, default=-1)) + 1)
        super().__init__([int(label) for label in labels], map(str, names))

    def __getitem__(self, i: int) -> Item:
        image = self._pair(i)[0]
        image = rgb(image) if isinstance(image, Image.Image) else image
        if not isinstance(image, np.ndarray | torch.Tensor):
            raise ValueError(f"Image {i} of the data set is a {type(image).__name__}; give a Pillow image, uint8 "
                             "[H, W, 3] or preprocessed float [3, H, W].")
        return Item(image, int(self.labels[i]), content_id(image))

    def _pair(self, i: int) -> tuple:
        pair = self.ds[i]
        if not isinstance(pair, tuple | list) or len(pair) < 2:
            raise ValueError(f"Item {i} of the data set is a {type(pair).__name__}; give a data set of (image, label).")
        return tuple(pair[:2])

    def identity(self) -> list:
        """Content ids, for which every image is read, labels and names."""
        return [[self[i].id for i in range(len(self))], self.labels.tolist(), self.class_names]


def as_images(source) -> Images:
    """A source of images as the functions of this package take it: an ``Images`` itself, a map-style data set of torch,
    a part of either, a ``DataLoader`` (whose data set is read in its own order) or a pair of arrays."""
    if isinstance(source, Images):
        return source
    if isinstance(source, DataLoader):
        return as_images(source.dataset)
    if isinstance(source, TorchSubset) and isinstance(source.dataset, Images):
        ds = source.dataset
        return Subset(ds, range(len(ds.class_names)), source.indices)
    if isinstance(source, TensorDataset):
        source = source.tensors[:2]
    if isinstance(source, tuple | list) and len(source) == 2 and all(hasattr(part, "shape") for part in source):
        return ArrayDataset(*source)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__") and not hasattr(source, "shape"):
        return TorchImages(source)
    raise ValueError(f"A {type(source).__name__} is no data set of images; give an ArrayDataset(pixels, labels), a "
                     "torch data set of (image, label), a DataLoader of one, or (pixels, labels).")


guard(globals())
