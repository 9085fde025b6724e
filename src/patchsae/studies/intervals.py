"""95 % intervals: of counts, and bootstrapped over whatever was drawn, the same draws for everything compared."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.stats import binomtest

#: Samples whose draws are held at once.
AT_ONCE = 64


def wilson_interval(hits: np.ndarray) -> dict[str, float]:
    """n, accuracy, low and high of ``hits [N]``, with Wilson's interval."""
    ends = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return {"n": len(hits), "accuracy": float(np.mean(hits)), "low": ends.low, "high": ends.high}


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], n: int, draws: int = 2000,
              seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Percentile intervals of K statistics of n things drawn again: ``([K], [K])``.

    ``statistic``: how often each thing was drawn in each sample, ``[samples,n]`` -> ``[samples,K]``.
    """
    rng, samples = np.random.default_rng(seed), []
    for start in range(0, draws, AT_ONCE):
        counts = [np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(min(AT_ONCE, draws - start))]
        samples.append(statistic(np.array(counts, float)))
    return percentiles(np.concatenate(samples))


def percentiles(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The interval of bootstrap samples ``[samples,...]``, leaving out those that are not defined."""
    low, high = np.nanpercentile(samples, [2.5, 97.5], axis=0)
    return low, high


def mean_interval(values: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """``bootstrap`` of means over things: ``[N,K] -> ([K], [K])``."""
    return bootstrap(lambda counts: counts @ values / len(values), len(values), draws, seed)


# What was classified image by image ---------------------------------------------------------------------

def correctness(images: pd.DataFrame, pool_seeds: bool = False) -> pd.DataFrame:
    """Rows per image -> one row per image and one column per selection, mode, k and seed, 1 where correct.

    ``images``: from ``topk_masking(..., per_image="predictions")``; ``pool_seeds``: the mean over seeds.
    """
    keys = ["selection", "mode", "k", "seed"]
    right = images.assign(right=(images["prediction"] == images["label"]).astype(float),
                          copy=images.groupby([*keys, "id"]).cumcount())  # equal images share an id
    table = right.pivot(index=["id", "copy"], columns=keys, values="right")
    if table.isna().any(axis=None):
        raise ValueError("Some conditions have more images than others, or have them twice; give each selection and "
                         "seed once, over the same images.")
    return table.T.groupby(level=keys[:3], sort=False).mean().T if pool_seeds else table


def accuracy_table(images: pd.DataFrame, pool_seeds: bool = False, draws: int = 2000) -> pd.DataFrame:
    """Accuracy of every condition: columns selection, mode, k, seed, accuracy, low, high."""
    return _with_intervals(correctness(images, pool_seeds), "accuracy", draws)


def difference_table(images: pd.DataFrame, first="class", second="matched", draws: int = 2000) -> pd.DataFrame:
    """Accuracy under one selection minus another, paired by image: columns mode, k, difference, low, high."""
    table = correctness(images, pool_seeds=True)
    return _with_intervals(table[first] - table[second], "difference", draws)


def _with_intervals(table: pd.DataFrame, name: str, draws: int) -> pd.DataFrame:
    low, high = mean_interval(table.to_numpy(), draws)
    return table.columns.to_frame(index=False).assign(**{name: table.mean().to_numpy(), "low": low, "high": high})
