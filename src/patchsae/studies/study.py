"""What every notebook begins with: a profile's model, images, autoencoder and statistics, each made when first used."""

import functools

import torch

from patchsae.clip import Clip, class_prototypes, load_clip
from patchsae.config import Profile, device, start
from patchsae.data.datasets import open_dataset, templates
from patchsae.data.images import Images
from patchsae.latents import LatentStatistics, saved_latents
from patchsae.sae import SparseAutoencoder
from patchsae.train import trained_sae


class Study:
    """A profile, opened.

    ``layer``: the cut. ``clip``, ``train`` and ``test`` (the images of the profile's task), ``sae`` (committed or
    trained before, else trained now), ``stats`` (its statistics on ``train``) and ``text [C,P]`` (the classes' text
    features) are loaded or computed when they are first asked for, and kept.
    """

    def __init__(self, profile: Profile):
        self.profile, self.layer = profile, profile.model.layer

    @functools.cached_property
    def clip(self) -> Clip:
        """The profile's model."""
        return load_clip(self.profile.model.name, device())

    @functools.cached_property
    def train(self) -> Images:
        """Training images of the profile's task."""
        return self.images(self.profile.data.task, "train")

    @functools.cached_property
    def test(self) -> Images:
        """Test images of the profile's task."""
        return self.images(self.profile.data.task, "test")

    @functools.cached_property
    def sae(self) -> SparseAutoencoder:
        """The profile's autoencoder."""
        return trained_sae(self.profile, self.clip, self.train)

    @functools.cached_property
    def stats(self) -> LatentStatistics:
        """Statistics of the autoencoder on the training images."""
        return self.statistics(self.sae, self.train)

    @functools.cached_property
    def text(self) -> torch.Tensor:
        """Text features of the task's classes, ``[C,P]``."""
        return class_prototypes(self.clip, self.test.class_names, templates(self.profile, self.profile.data.task))

    def images(self, task: str, split: str) -> Images:
        """The images of any task of the profile."""
        return open_dataset(self.profile, task, split)

    def statistics(self, sae: SparseAutoencoder, ds: Images, layer: int | None = None,
                   tokens: str = "all") -> LatentStatistics:
        """Statistics of any autoencoder on any images, kept in the profile's run folder."""
        p = self.profile
        return saved_latents(p.run_dir, self.clip, sae, ds, self.layer if layer is None else layer, p.latents.tau,
                             p.latents.n_reference, p.data.batch_images, tokens)

    def variant(self, profile: Profile) -> "Study":
        """The same model and images under other settings, e.g. ``variant(profile.with_sae(l1=1e-3))``."""
        other = Study(profile)
        other.clip, other.train, other.test = self.clip, self.train, self.test
        return other


def open_study(profile: Profile | str | None = None) -> Study:
    """Open a profile (by default the one that ``PROFILE`` names), with its number of threads and its seed set."""
    return Study(profile if isinstance(profile, Profile) else start(profile))
