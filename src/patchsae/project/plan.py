"""Which passes over the training images the notebooks take, and who rides in each: ``make check`` says it first."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from patchsae.activations import MEMORY
from patchsae.config import Profile, device
from patchsae.data.datasets import model_config
from patchsae.studies.study import compared, has_masks, passes, training_bytes
from patchsae.train import FIRST_BATCHES

#: Width, blocks and tokens of ViT-B/16, which is assumed until the model's own configuration is there.
VIT_B16 = (768, 12, 197)
#: Share of the rate of matrix products that a pass reaches, at least (docs/performance.md).
SHARE = 0.4
#: Readings of the images that adaptation is measured on, where they are the profile's own: both towers together, the
#: autoencoder of the adapted one, and four for the rows of one task that notebook 07 computes.
OF_ADAPTATION = 6
#: Latents that notebook 09 names at most.
NAMED = 4096


class Pass(NamedTuple):
    """What is read how often in a notebook, for which autoencoders: ``images`` in all; ``held`` and ``written``: bytes
    of theirs in memory and on the disk."""

    what: str
    images: float
    riders: tuple[str, ...]
    held: float
    written: float = 0


def shape(profile: Profile) -> tuple[int, int, int]:
    """Width, blocks and tokens of the profile's model, as far as it is there to ask."""
    with contextlib.suppress(FileNotFoundError):
        vision = model_config(profile.model.name, local=True)
        return vision.hidden_size, vision.num_hidden_layers, (vision.image_size // vision.patch_size) ** 2 + 1
    return VIT_B16


def plan(profile: Profile) -> Iterator[Pass]:
    """The passes of all notebooks, where nothing was trained before."""
    s, n, k, (width, _, tokens) = profile.sae, profile.data.train_images, profile.latents.n_reference, shape(profile)
    trained, whole = [] if s.weights else [profile, *compared(profile)], training_bytes(profile, width)
    kept = 4 * n * tokens * width <= MEMORY
    steps = n if kept else (s.steps + FIRST_BATCHES) * s.batch_images
    for group in passes(trained, width, device()):
        weights = sum(training_bytes(p, width) for p in group)
        yield Pass("01 training", steps, tuple(_name(p, profile) for p in group), weights, 3 / 4 * weights)
    asked = tuple(_name(p, profile) for p in trained or [profile] if p.seed == profile.seed)
    yield Pass("02 statistics", n, asked, len(asked) * whole / 4)
    if profile.adaptation.tasks and not s.weights:
        yield Pass("07 training", steps, ("of the adapted tower",), whole, 3 / 4 * whole)
    if profile.data.task in profile.adaptation.tasks:
        yield Pass("07 adaptation", OF_ADAPTATION * min(profile.adaptation.images, n), ("own",), whole / 4)
    if has_masks(profile):
        yield Pass("09 naming", k * min(round(s.expansion * width), NAMED, n // k), ("own",), whole / 4)


def _name(other: Profile, profile: Profile) -> str:
    """How an autoencoder differs from the profile's own."""
    changes = {f"layer {other.model.layer}": other.model.layer != profile.model.layer,
               f"seed {other.seed}": other.seed != profile.seed, "class token": other.sae.tokens != profile.sae.tokens}
    return ", ".join(name for name, changed in changes.items() if changed) or "own"


def lines(profile: Profile, gflops: float) -> list[str]:
    """The plan as a table, with hours at a rate of matrix products in 1e9 operations a second."""
    (width, blocks, tokens), n = shape(profile), profile.data.train_images
    rows = [("Reads the training images", "times", "hours", "GB memory", "GB disk", "for")]
    found, seconds = list(plan(profile)), []
    for p in found:
        products = p.images * tokens * width**2 * (12 * blocks + len(p.riders) * profile.sae.expansion)
        seconds.append(2e-9 * products / gflops / SHARE)
        rows.append((p.what, f"{p.images / n:.2f}", f"{seconds[-1] / 3600:.2f}", f"{p.held / 1e9:.1f}",
                     f"{p.written / 1e9:.1f}", "; ".join(p.riders)))
    rows.append(("all", f"{sum(p.images for p in found) / n:.2f}", f"{sum(seconds) / 3600:.2f}",
                 f"{max(p.held for p in found) / 1e9:.1f}", f"{sum(p.written for p in found) / 1e9:.1f}", ""))
    return [f"  {what:<28}{times:>7}{hours:>8}{memory:>11}{disk:>9}   {riders}".rstrip()
            for what, times, hours, memory, disk, riders in rows]
