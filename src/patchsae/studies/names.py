"""Calling latents by what their reference images have in common: counts of concepts, and nothing else."""

import numpy as np

from patchsae.latents import LatentStatistics
from patchsae.masks import concept_list, patch_coverage

#: A latent is called after a concept that at least this share of its reference images show.
NAMED = 0.5


def reference_concepts(stats: LatentStatistics, ds) -> tuple[list[str], np.ndarray]:
    """How many reference images of each latent show each concept: names ``[C]`` and uint8 ``[S,C]``.

    Concepts are the classes of the data set; drawn scenes add every concept that they show.
    """
    rows, labels = stats.reference_rows.numpy(), stats.reference_labels.numpy()
    if ds.concepts:
        names = [f"{name} ({kind})" if kind != "noun" else name for kind, name in concept_list(ds)]
        drawn = {row: np.flatnonzero(patch_coverage(ds, [row])[0].any(0)) for row in np.unique(rows[rows >= 0])}
        shown = [[drawn.get(row, []) for row in of] for of in rows]
    else:
        names = list(ds.class_names)
        shown = [[[label] if label >= 0 else [] for label in of] for of in labels]
    counts = np.zeros((len(rows), len(names)), np.uint8)
    for latent, images in enumerate(shown):
        np.add.at(counts[latent], [concept for image in images for concept in image], 1)
    return names, counts


def latent_names(concepts: list[str], counts: np.ndarray, found: np.ndarray) -> list[str]:
    """Call each latent after the concept that its reference images show most beyond what all of them show.

    ``counts [S,C]``; ``found [S]``: how many reference images there are. Where no concept is in half of them the
    latent is "mixed".
    """
    share = counts / np.maximum(found, 1, dtype=np.float32)[:, None]
    beyond = np.where(share >= NAMED, share - counts.sum(0) / max(1, found.sum()), -1)
    best = beyond.argmax(1)
    return ["never fires" if n == 0 else concepts[c] if beyond[s, c] >= 0 else "mixed"
            for s, (n, c) in enumerate(zip(found, best))]
