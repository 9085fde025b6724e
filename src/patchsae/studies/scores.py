"""How well a score of patches tells a concept: precision and recall, thresholds, overlap in pixels, pointing."""

import numpy as np


class PatchTruth:
    """Which of N patches show which of C concepts, as a list of pairs sorted by concept.

    Patches show few concepts each, so that walking along the pairs is much faster than along ``[N,C]``.
    """

    def __init__(self, positives: np.ndarray):
        self.concept, self.patch = np.nonzero(positives.T)
        self.n_patches, self.totals = len(positives), positives.sum(0)

    def average_precision(self, scores: np.ndarray) -> np.ndarray:
        """``average_precision`` of one score ``[N]`` for every concept: ``[C]``."""
        # A threshold at score s takes rank(s) patches; what is not positive is taken last, all at once.
        rank = _ranks(scores)[self.patch]
        concept, rank = self.concept[rank > 0], rank[rank > 0]
        key = np.sort(concept * (self.n_patches + 1) + rank)
        concept, rank = np.divmod(key, self.n_patches + 1)
        hits = np.bincount(concept, minlength=len(self.totals))
        taken = np.searchsorted(key, key, side="right") - (hits.cumsum() - hits)[concept]
        precise = np.bincount(concept, weights=taken / rank, minlength=len(hits))
        silent = (self.totals - hits) * (self.totals / max(1, self.n_patches))
        with np.errstate(invalid="ignore"):
            return (precise + silent) / self.totals


def _ranks(scores: np.ndarray) -> np.ndarray:
    """How many scores are at least as large, for every positive one, and 0 for the others: ``[N] -> [N]``."""
    active = np.flatnonzero(scores > 0)
    active = active[np.argsort(-scores[active], kind="stable")]
    ends = np.flatnonzero(np.diff(scores[active], append=-1.0)) + 1
    ranks = np.zeros(len(scores), np.int64)
    ranks[active] = np.repeat(ends, np.diff(ends, prepend=0))
    return ranks


def average_precision(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Area under the precision-recall curve of one score for many concepts: ``[N], [N,C] -> [C]``.

    sum over thresholds of (change in recall) x precision; equal scores share a threshold. NaN without positives.
    Scores of 0 or less are one group, so that a sparse latent costs as much as it fires.
    """
    return PatchTruth(positives).average_precision(scores)


def best_threshold(scores: np.ndarray, share: np.ndarray) -> float:
    """The threshold at which "score at or above it" overlaps a concept best: ``[N], [N] -> `` a score above 0.

    ``share``: how much of each patch the concept covers, so that the overlap is that of pixels; chosen on training
    scenes. Infinity for a score that is nowhere positive.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=-np.inf) < 0)
    ends = ends[scores[order][ends] > 0]
    if not len(ends):
        return float("inf")
    hits = share[order].cumsum(dtype=float)[ends]
    return float(scores[order][ends[np.argmax(hits / (ends + 1 + share.sum(dtype=float) - hits))]])


def pixel_overlap(mask: np.ndarray, share: np.ndarray) -> float:
    """Intersection over union, in pixels, of chosen patches and a concept that covers a share of each: ``[N], [N]``."""
    hits = share[mask].sum(dtype=float)
    union = mask.sum() + share.sum(dtype=float) - hits
    return float(hits / union) if union else float("nan")


def pointing_game(heat: np.ndarray, positives: np.ndarray) -> float:
    """Share of the images with a concept whose strongest patch shows it: ``[B,P], [B,P]``; silence is a miss."""
    places, shown = heat.argmax(1), positives.any(1)
    hits = positives[np.arange(len(heat)), places] & (heat.max(1) > 0)
    return float(hits[shown].mean()) if shown.any() else float("nan")
