"""Intervals of what was classified image by image: bootstrapped over images, the same draws for every condition."""

import numpy as np
import pandas as pd


def correctness(images: pd.DataFrame, pool_seeds: bool = False) -> pd.DataFrame:
    """Rows per image -> one row per image and one column per selection, mode, k and seed, 1 where correct.

    ``images``: from ``topk_masking(..., per_image="predictions")``; ``pool_seeds``: the mean over seeds.
    """
    keys = ["selection", "mode", "k", "seed"]
    right = images.assign(right=(images["prediction"] == images["label"]).astype(float),
                          copy=images.groupby([*keys, "id"]).cumcount())  # equal images share an id
    table = right.pivot(index=["id", "copy"], columns=keys, values="right")
    return table.T.groupby(level=keys[:3], sort=False).mean().T if pool_seeds else table


def bootstrap(values: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile intervals of means over images: ``[N,K] -> ([K], [K])``, the same draws in every column."""
    rng, n, means = np.random.default_rng(seed), len(values), []
    for start in range(0, draws, 64):
        counts = [np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(min(64, draws - start))]
        means.append(np.array(counts, float) @ values / n)
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)
    return low, high


def accuracy_table(images: pd.DataFrame, pool_seeds: bool = False, draws: int = 2000) -> pd.DataFrame:
    """Accuracy of every condition: columns selection, mode, k, seed, accuracy, low, high."""
    return _with_intervals(correctness(images, pool_seeds), "accuracy", draws)


def difference_table(images: pd.DataFrame, first="class", second="matched", draws: int = 2000) -> pd.DataFrame:
    """Accuracy under one selection minus another, paired by image: columns mode, k, difference, low, high."""
    table = correctness(images, pool_seeds=True)
    return _with_intervals(table[first] - table[second], "difference", draws)


def _with_intervals(table: pd.DataFrame, name: str, draws: int) -> pd.DataFrame:
    low, high = bootstrap(table.to_numpy(), draws)
    return table.columns.to_frame(index=False).assign(**{name: table.mean().to_numpy(), "low": low, "high": high})
