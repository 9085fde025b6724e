"""A study of small random images, to look at with the explorer."""

import dataclasses

from conftest import LAYER, WIDTH, random_sae

from patchsae import ArrayDataset, collect_latents, load_profile
from patchsae.studies.study import Study

N = 20  # latents


class Pets(Study):
    """Task "pets"; "others" are the same images backwards; there are no images of "birds"."""

    def __init__(self, clip, ds, transfer=("others", "birds"), adapted_to=("pets", "others", "birds"), sae=None):
        mini = load_profile("mini")
        super().__init__(dataclasses.replace(
            mini, name="pets", model=dataclasses.replace(mini.model, templates="own", layer=LAYER),
            data=dataclasses.replace(mini.data, task="pets", transfer=transfer),
            adaptation=dataclasses.replace(mini.adaptation, tasks=adapted_to)))
        self.clip, self.train, self.sae = clip, ds, sae or random_sae(WIDTH, N)
        self.stats = collect_latents(clip, self.sae, ds, LAYER, n_reference=4)

    def images(self, task, split):
        """The images of a task."""
        if task == "birds":
            raise FileNotFoundError("There are no birds here.")
        ds = self.train
        return ds if task == "pets" else ArrayDataset(ds.pixels[::-1].copy(), ds.labels[::-1].copy(),
                                                      class_names=ds.class_names)
