"""What every notebook begins with: a profile's model, images, autoencoder and statistics, each made when first used."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from patchsae.clip import Clip, class_prototypes, load_clip
from patchsae.config import Profile, device, resolve, start
from patchsae.data.checks import Device, Layer, Natural, guard
from patchsae.data.datasets import images_there, open_dataset, templates
from patchsae.data.images import Images
from patchsae.data.masked import masks_folder
from patchsae.fast.memory import device_bytes
from patchsae.latents import LatentStatistics, Question, saved_latents
from patchsae.sae import SparseAutoencoder
from patchsae.train import new_saes, rides, run_key, train_saes
from patchsae.weights.files import result_key


class LeftOut(Exception):
    """The rest of a notebook has nothing to show for this profile; shown as its sentence alone."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class Study:
    """A profile, opened.

    ``profile``: without the tasks whose images are not there, which ``absent`` names. ``layer``: the cut. ``clip``,
    ``train`` and ``test`` (the images of the profile's task), ``sae`` (committed or trained before, else trained now),
    ``stats`` (its statistics on ``train``) and ``text [C,P]`` (the classes' text features) are loaded or computed when
    they are first asked for, and kept.
    """

    def __init__(self, profile: Profile):
        data, adaptation = profile.data, profile.adaptation
        self.absent = [task for task in dict.fromkeys((*data.transfer, *adaptation.tasks))
                       if not images_there(profile, task)]

        def there(tasks: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(task for task in tasks if task not in self.absent)

        self.profile = dataclasses.replace(
            profile, data=dataclasses.replace(data, transfer=there(data.transfer)),
            adaptation=dataclasses.replace(adaptation, tasks=there(adaptation.tasks)))
        self.layer = profile.model.layer

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
    def text(self) -> torch.Tensor | None:
        """Text features of the task's classes, ``[C,P]``; None of a model without a tokenizer."""
        if self.clip.tokenizer is None:
            return None
        return class_prototypes(self.clip, self.test.class_names, templates(self.profile, self.profile.data.task))

    @functools.cached_property
    def clip_key(self) -> str:
        """What decides the tokens of an image: weights and preprocessing."""
        return result_key(1, weights=fingerprint(self.clip), preprocessing=self.clip.preprocessing())

    def training(self) -> tuple[SparseAutoencoder, pd.DataFrame | None]:
        """Train the profile's autoencoder now and here, or go on with what was begun: it and its log. Where the
        profile names weights, these and None.

        Those that notebooks compare it with train in the same pass over the images, as far as they are not there.
        """
        p = self.profile
        if p.sae.weights:
            return self.sae, None
        others = [other for other in compared(p) if not _place(other, self.clip)]
        self.sae, log = _train([p, *others], self.clip, self.train)
        return self.sae, log

    def saes(self, profiles: Sequence[Profile]) -> list[SparseAutoencoder]:
        """The autoencoders of other settings on the same images; what is missing trains in one pass."""
        return trained_saes(profiles, self.clip, self.train)

    def untrained(self) -> SparseAutoencoder:
        """The autoencoder before training, of the width of ``sae``: a floor for every measure."""
        expansion = self.sae.n_latents / self.clip.width  # given weights may have another one than the profile says
        settings = dataclasses.replace(self.profile.sae, expansion=expansion)
        return new_saes([dataclasses.replace(self.profile, sae=settings)], self.clip, self.train)[0]

    def committed_log(self) -> pd.DataFrame | None:
        """The log of the committed training of exactly these settings, every tenth step of it, or None."""
        return committed_log(self.profile, self.clip)

    def check(self, name: str, value: float, current: bool = True) -> None:
        """Print a number that the profile's [bounds] has a bound for, and fail where it is below it; where there is
        none, or the number is of other settings than the profile's, say that it was not checked."""
        bound = self.profile.expected(name, None) if current else None
        why = "this profile states no bound" if current else "it is of other settings than this profile's"
        print(f"{name} = {value:.3f}: " + (f"not checked, {why}" if bound is None else f"at least {bound} is expected"))
        assert bound is None or value >= bound, f"{name} is {value:.3f}, less than the {bound} that is expected"

    def need(self, there: bool, sentence: str) -> None:
        """End a notebook with a sentence where what all of it is about is not there."""
        if not there:
            raise LeftOut(sentence)

    @property
    def has_masks(self) -> bool:
        """Whether there is ground truth for patches: of the profile's own images or of a public data set."""
        return has_masks(self.profile)

    def images(self, task: str, split: str) -> Images:
        """The images of any task of the profile; passes over the training images of its own are counted."""
        ds = open_dataset(self.profile, task, split)
        ds.counted = (task, split) == (self.profile.data.task, "train")
        return ds

    def statistics(self, sae: SparseAutoencoder, ds: Images, layer: Layer | None = None,
                   tokens: str = "all") -> LatentStatistics:
        """Statistics of any autoencoder on any images, kept in the profile's run folder."""
        return self.answers([Question(self.clip, sae, self.layer if layer is None else layer, tokens)], ds)[0]

    def answers(self, questions: Sequence[Question], ds: Images) -> list[LatentStatistics]:
        """Statistics of several autoencoders, kept likewise; one pass over the images finds what is not there."""
        p = self.profile
        return saved_latents(p.run_dir, questions, ds, p.latents.tau, p.latents.n_reference, p.data.batch_images)

    def variant(self, profile: Profile) -> "Study":
        """The same model and images under other settings, e.g. ``variant(profile.with_sae(l1=1e-3))``."""
        other = Study(profile)
        other.clip, other.images = self.clip, self.images
        return other

    def next_seed(self) -> "Study | None":
        """The same settings with the next seed; None where the autoencoder's weights are given, whatever the seed."""
        return None if self.profile.sae.weights else self.variant(next_seed(self.profile))


def open_study(profile: Profile | str | None = None) -> Study:
    """Open a profile (by default the one that ``PROFILE`` names), with its number of threads and its seed set."""
    study = Study(profile if isinstance(profile, Profile) else start(profile))
    if study.absent:
        print(f"Left out, for want of their images: {', '.join(study.absent)}; `make check` says where they go.")
    return study


@functools.lru_cache(maxsize=64)
def fingerprint(model: Clip | SparseAutoencoder) -> str:
    """The hash of a model that is not trained any more, computed once: that of a ViT-B/16 takes a second."""
    return model.fingerprint()


# Where a profile's autoencoder is ------------------------------------------------------------------------

def run_folder(profile: Profile, clip: Clip) -> Path:
    """Where the profile's own training goes."""
    return profile.run_dir / "sae" / run_key(profile, clip)


def committed_folder(profile: Profile, clip: Clip) -> Path:
    """Where the committed autoencoder of exactly these settings would be."""
    return profile.data_dir / "sae" / run_key(profile, clip)


def committed_log(profile: Profile, clip: Clip) -> pd.DataFrame | None:
    """The log of the committed training of exactly these settings, every tenth step of it, or None."""
    path = committed_folder(profile, clip) / "log.csv"
    return pd.read_csv(path) if path.is_file() else None


def trained_sae(profile: Profile, clip: Clip, ds: Images) -> SparseAutoencoder:
    """The profile's autoencoder: the one it names; or committed or trained before; else trained now on ``ds``."""
    return trained_saes([profile], clip, ds)[0]


def trained_saes(profiles: Sequence[Profile], clip: Clip, ds: Images) -> list[SparseAutoencoder]:
    """The autoencoders of several profiles."""
    train_missing(profiles, clip, ds)
    return [given_sae(p, clip) if p.sae.weights else SparseAutoencoder.from_pretrained(_place(p, clip), clip.device)
            for p in profiles]


def train_missing(profiles: Sequence[Profile], clip: Clip, ds: Images) -> None:
    """Train the autoencoders that are neither named nor there, in as few passes over ``ds`` as can be."""
    missing = {run_key(p, clip): p for p in profiles if not p.sae.weights and not _place(p, clip)}
    if missing:
        _train(list(missing.values()), clip, ds)


def compared(profile: Profile) -> list[Profile]:
    """Settings of the autoencoders that notebooks compare the profile's with: of the class token alone and of other
    layers (02), and of the next seed where there are masks to measure with (07)."""
    others = [profile.with_sae(tokens="cls"), *map(profile.at_layer, profile.model.other_layers)]
    return others + [next_seed(profile)] * has_masks(profile)


def next_seed(profile: Profile) -> Profile:
    """The same settings with the next seed."""
    return dataclasses.replace(profile, seed=profile.seed + 1)


def has_masks(profile: Profile) -> bool:
    """Whether there is ground truth for patches: of the profile's own images or of a public data set."""
    return profile.data.source == "scenes" or masks_folder(profile) is not None


@torch.enable_grad()  # also for an autoencoder that is first asked for where no gradients are wanted
def _train(profiles: list[Profile], clip: Clip, ds: Images) -> tuple[SparseAutoencoder, pd.DataFrame]:
    """Train autoencoders in their run folders; what the first of them gives."""
    groups = passes(profiles, clip.width, clip.device)
    return [train_saes(group, clip, ds, [run_folder(p, clip) for p in group])[0] for group in groups][0]


def passes(profiles: Sequence[Profile], width: Natural, device: Device) -> list[list[Profile]]:
    """The profiles in groups that train in one pass over the images of a model of this width: of equal images in an
    equal order, and so many that their weights, gradients and moments take half of the device's memory."""
    groups, room = [], device_bytes(device) / 2
    for same in dict.fromkeys(map(rides, profiles)):
        taken = room
        for profile in (p for p in profiles if rides(p) == same):
            if taken + training_bytes(profile, width) > room:
                groups.append([])
                taken = 0
            groups[-1].append(profile)
            taken += training_bytes(profile, width)
    return groups


def training_bytes(profile: Profile, width: Natural) -> float:
    """Weights, gradients and two moments, in float32, of the profile's autoencoder for a model of this width."""
    return 4 * 4 * 2 * profile.sae.expansion * width**2


def _place(profile: Profile, clip: Clip) -> Path | None:
    """Where the profile's autoencoder is, committed or trained before."""
    places = (committed_folder(profile, clip), run_folder(profile, clip))
    return next((place for place in places if (place / "sae.safetensors").is_file()), None)


def given_sae(profile: Profile, clip: Clip) -> SparseAutoencoder:
    """The autoencoder that the profile names instead of training one."""
    sae = SparseAutoencoder.from_pretrained(resolve(profile.sae.weights), clip.device)
    if sae.d_model != clip.width:
        raise ValueError(f"{profile.sae.weights} is for tokens of width {sae.d_model}, but {profile.model.name} has "
                         f"{clip.width}; choose an autoencoder of this model.")
    return sae


guard(globals())
