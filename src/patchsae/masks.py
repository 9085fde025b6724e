"""Where a latent is active: patch heat maps and soft masks (sec. 3.2-3.3), and the ground truth they are held to."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch

from patchsae.clip import Clip
from patchsae.data.checks import Indices, Layer, Natural, Pixels, guard, indices
from patchsae.data.images import Images
from patchsae.sae import SparseAutoencoder

#: A patch shows a concept when the concept covers at least this share of its pixels.
COVERED = 0.25


@torch.no_grad()
def heat_maps(clip: Clip, sae: SparseAutoencoder, pixels: Pixels, layer: Layer, latents: Indices) -> torch.Tensor:
    """Activation of chosen latents on every patch: ``[B,3,H,W] -> [B,n,grid,grid]``."""
    z = clip.below(pixels, layer)[:, 1:clip.n_tokens]
    latents = np.atleast_1d(indices(latents, sae.n_latents, "latents"))
    return sae.encode(z)[..., latents].transpose(1, 2).unflatten(-1, (clip.grid, clip.grid))


def enlarge(heat: Annotated[np.ndarray, "number g,g"], size: Natural) -> np.ndarray:
    """Repeat patch values over their pixels: ``[g,g] -> [size,size]``."""
    places = np.arange(size) * len(heat) // size
    return heat[places][:, places]


def soft_mask(image: Annotated[np.ndarray, "uint8 L,L,3"], heat: Annotated[np.ndarray, "number g,g"]) -> np.ndarray:
    """The image with every pixel multiplied by its patch's activation, min-max normalised (fig. 2).

    ``image``: uint8 ``[H,W,3]``; ``heat``: ``[g,g]``. A map without differences hides nothing if it is active
    and everything if it is not.
    """
    if not np.isfinite(heat).all():
        raise ValueError("The heat map has values that are not finite; check the image and the autoencoder.")
    low, high = float(heat.min()), float(heat.max())
    share = (heat - low) / (high - low) if high > low else np.full_like(heat, float(high > 0))
    return (image * enlarge(share, len(image))[..., None]).round().astype(np.uint8)


def concept_list(ds: Images, kinds: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """Every concept of a data set with ground truth as (kind, name), in the order of the columns of
    ``patch_coverage``; ``kinds``: of these kinds alone."""
    return [(kind, name) for kind in _kinds(ds, kinds) for name in ds.concepts[kind]]


def _kinds(ds: Images, kinds: Sequence[str] | None) -> Sequence[str]:
    """The kinds of concepts that are asked for, all of which there are."""
    if not ds.concepts or set(kinds or ()) - set(ds.concepts):
        raise ValueError(f"There is ground truth for {', '.join(ds.concepts) or 'nothing'} here, not for "
                         f"{', '.join(kinds or ('concepts',))!r}; choose other images or kinds.")
    return kinds or tuple(ds.concepts)


def patch_concepts(ds: Images, rows, kinds: Sequence[str] | None = None) -> np.ndarray:
    """Which concepts each patch of these images shows: bool ``[images, patches, concepts]``."""
    return patch_coverage(ds, rows, kinds) >= COVERED


def patch_coverage(ds: Images, rows, kinds: Sequence[str] | None = None) -> np.ndarray:
    """Share of each patch's pixels that each concept covers: float32 ``[images, patches, concepts]``."""
    rows, kinds = np.atleast_1d(indices(rows, len(ds), "positions")), _kinds(ds, kinds)
    if not len(rows):
        raise ValueError("No images are named; give the positions of at least one.")
    shares = [np.concatenate([scene.coverage(kind) for kind in kinds], axis=-1)
              for scene in (ds.scene(int(i)) for i in rows)]
    return np.stack(shares).reshape(len(shares), -1, shares[0].shape[-1])


def overlap(mask: Annotated[np.ndarray, "bool ..."], truth: Annotated[np.ndarray, "bool ..."]) -> float:
    """Intersection over union of two boolean masks; NaN when both are empty."""
    union = (mask | truth).sum()
    return float((mask & truth).sum() / union) if union else float("nan")


guard(globals())
