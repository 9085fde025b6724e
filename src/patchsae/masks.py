"""Where a latent is active: patch heat maps, soft masks, and scores against the drawn ground truth (sec. 3.2-3.3)."""

import numpy as np
import torch

from patchsae.clip import Clip
from patchsae.datasets import SceneDataset
from patchsae.sae import SparseAutoencoder
from patchsae.scenes import CONCEPTS

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


def concept_list(kinds=tuple(CONCEPTS)) -> list[tuple[str, str]]:
    """Every concept of the pictogram world as (kind, name), in the order of the columns of ``patch_concepts``."""
    return [(kind, name) for kind in kinds for name in CONCEPTS[kind]]


def patch_concepts(ds: SceneDataset, rows, kinds=tuple(CONCEPTS)) -> np.ndarray:
    """Which concepts each patch of these scenes shows: bool ``[images, patches, concepts]``."""
    scenes = (ds.scene(int(i)) for i in rows)
    shown = [np.concatenate([s.coverage(kind) >= COVERED for kind in kinds], axis=-1) for s in scenes]
    return np.stack(shown).reshape(len(shown), -1, len(concept_list(kinds)))


def average_precision(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Area under the precision-recall curve of one score for many concepts: ``[N], [N,C] -> [C]``.

    sum over thresholds of (change in recall) x precision; equal scores share a threshold. NaN without positives.
    Scores of 0 or less are one group, so that a sparse latent costs as much as it fires.
    """
    active = np.flatnonzero(scores > 0)
    active = active[np.argsort(-scores[active], kind="stable")]
    ends = np.flatnonzero(np.diff(scores[active], append=-1.0))
    hits = positives[active].cumsum(0)[ends] if len(active) else np.zeros((0, positives.shape[1]))
    total = positives.sum(0)
    hits, size = np.vstack([hits, total]), np.append(ends + 1, len(scores))
    gained = np.diff(hits, axis=0, prepend=0)
    with np.errstate(invalid="ignore"):
        return (gained * (hits / size[:, None])).sum(0) / total


@torch.no_grad()
def latent_concept_scores(z: torch.Tensor, sae: SparseAutoencoder, positives: np.ndarray,
                          chunk: int = 256) -> np.ndarray:
    """Average precision of every latent for every concept over patch tokens: ``[N,D], [N,C] -> [S,C]``."""
    rows = []
    for start in range(0, sae.n_latents, chunk):
        part = slice(start, start + chunk)
        h = torch.relu((z - sae.b_dec) @ sae.W_enc[:, part] + sae.b_enc[part]).T.contiguous().numpy()
        rows += [average_precision(latent, positives) for latent in h]
    return np.array(rows)


def overlap(mask: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two boolean masks; NaN when both are empty."""
    union = (mask | truth).sum()
    return float((mask & truth).sum() / union) if union else float("nan")
