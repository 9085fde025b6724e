"""Where a latent is active: patch heat maps and soft masks (sec. 3.2-3.3), and the ground truth they are held to."""

import numpy as np
import torch

from patchsae.clip import Clip
from patchsae.data.images import Images
from patchsae.sae import SparseAutoencoder

#: A patch shows a concept when the concept covers at least this share of its pixels.
COVERED = 0.25


@torch.no_grad()
def heat_maps(clip: Clip, sae: SparseAutoencoder, pixels: torch.Tensor, layer: int, latents) -> torch.Tensor:
    """Activation of chosen latents on every patch: ``[B,3,H,W] -> [B,n,grid,grid]``."""
    z = clip.below(pixels, layer)[:, 1:clip.n_tokens]
    return sae.encode(z)[..., latents].transpose(1, 2).unflatten(-1, (clip.grid, clip.grid))


def enlarge(heat: np.ndarray, size: int) -> np.ndarray:
    """Repeat patch values over their pixels: ``[g,g] -> [size,size]``."""
    places = np.arange(size) * len(heat) // size
    return heat[places][:, places]


def soft_mask(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """The image with every pixel multiplied by its patch's activation, min-max normalised (fig. 2).

    ``image``: uint8 ``[H,W,3]``; ``heat``: ``[g,g]``. A map without differences hides nothing if it is active
    and everything if it is not.
    """
    low, high = float(heat.min()), float(heat.max())
    share = (heat - low) / (high - low) if high > low else np.full_like(heat, float(high > 0))
    return (image * enlarge(share, len(image))[..., None]).round().astype(np.uint8)


def concept_list(ds: Images, kinds=None) -> list[tuple[str, str]]:
    """Every concept of a data set with ground truth as (kind, name), in the order of the columns of
    ``patch_coverage``; ``kinds``: of these kinds alone."""
    return [(kind, name) for kind in kinds or ds.concepts for name in ds.concepts[kind]]


def patch_concepts(ds: Images, rows, kinds=None) -> np.ndarray:
    """Which concepts each patch of these images shows: bool ``[images, patches, concepts]``."""
    return patch_coverage(ds, rows, kinds) >= COVERED


def patch_coverage(ds: Images, rows, kinds=None) -> np.ndarray:
    """Share of each patch's pixels that each concept covers: float32 ``[images, patches, concepts]``."""
    shares = [np.concatenate([scene.coverage(kind) for kind in kinds or ds.concepts], axis=-1)
              for scene in (ds.scene(int(i)) for i in rows)]
    return np.stack(shares).reshape(len(shares), -1, shares[0].shape[-1])


def overlap(mask: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two boolean masks; NaN when both are empty."""
    union = (mask | truth).sum()
    return float((mask & truth).sum() / union) if union else float("nan")
