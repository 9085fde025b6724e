"""Drawn scenes as a source of images."""

import numpy as np

from patchsae.data.images import Images, Item, content_id
from patchsae.world.scenes import CONCEPTS, GROUPS, VERSION, Scene, class_names, draw_scene

#: Scenes of different splits never share a seed. Seed 2 drew the pre-training of the mini CLIP.
SPLIT_SEEDS = {"train": 0, "test": 1}


class SceneDataset(Images):
    """The first ``n`` scenes of a pictogram task and split, drawn when asked for."""

    concepts, groups = CONCEPTS, GROUPS

    def __init__(self, task: str, split: str, n: int):
        if split not in SPLIT_SEEDS:
            raise ValueError(f"Scenes have the splits {' and '.join(SPLIT_SEEDS)}, not {split!r}.")
        names = class_names(task)
        super().__init__(np.arange(n) % len(names), names)  # labels go round in turn
        self.task, self.split, self.n = task, split, n

    def scene(self, i: int) -> Scene:
        """The scene with its plan, caption and ground-truth maps."""
        if not 0 <= i < self.n:
            raise IndexError(f"Scene {i} is outside the {self.n} scenes of {self.task}/{self.split}.")
        return draw_scene(self.task, SPLIT_SEEDS[self.split], i)

    def __getitem__(self, i: int) -> Item:
        scene = self.scene(i)
        return Item(scene.image, scene.label, content_id(scene.image))

    def identity(self) -> list:
        """Scenes follow from their names and the version of the drawing."""
        return [self.task, self.split, self.n, VERSION]
