"""Intervals: against scipy, at their stated coverage, paired where they say so."""

import numpy as np
import pandas as pd
import pytest
from conftest import one_sentence

from patchsae.studies.intervals import (
    accuracy_table,
    bootstrap,
    correctness,
    difference_table,
    mean_interval,
    percentiles,
    wilson_interval,
)

KEYS = ["selection", "mode", "k", "seed"]


def predictions(n=60, copies=0):
    """What ``topk_masking`` gives of n images, the first ``copies`` of them twice: four edits, chance with 3 seeds."""
    numbers = np.random.default_rng(0)
    edits = [("original", 0), ("spliced", 8), ("on", 2), ("off", 2)]
    conditions = [(name, seed, *edit) for name, seeds in (("class", 1), ("matched", 3)) for seed in range(seeds)
                  for edit in edits]
    tables = []
    for image in [*range(n), *range(copies)]:
        table = pd.DataFrame(conditions, columns=["selection", "seed", "mode", "k"]).assign(id=f"{image:02}", label=1)
        right = numbers.random(len(table)) < np.where(table["selection"] == "class", 0.3, 0.6)
        unedited = table["mode"].isin(["original", "spliced"])
        tables.append(table.assign(prediction=np.where(unedited, image % 2, right).astype(int)))
    return pd.concat(tables, ignore_index=True)


def test_intervals_are_those_of_scipy():
    from scipy.stats import bootstrap as scipy_bootstrap

    values = (np.random.default_rng(0).random((200, 3)) < [0.1, 0.5, 0.9]).astype(float)
    low, high = mean_interval(values, draws=4000)
    for column, a, b in zip(values.T, low, high):
        expected = scipy_bootstrap((column,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
        assert abs(a - expected.low) < 0.012 and abs(b - expected.high) < 0.012
    np.testing.assert_array_equal(mean_interval(values), mean_interval(values))
    assert not np.array_equal(mean_interval(values, seed=0), mean_interval(values, seed=1))


def test_any_statistic_is_resampled_by_how_often_things_are_drawn():
    """Against rows that are drawn one sample at a time; medians are no sums."""
    x, rng = np.random.default_rng(1).normal(size=(50, 2)), np.random.default_rng(7)
    slow = np.percentile([np.median(x[rng.integers(0, 50, 50)], axis=0) for _ in range(130)], [2.5, 97.5], axis=0)

    def medians(counts):
        return np.array([np.median(np.repeat(x, count.astype(int), axis=0), axis=0) for count in counts])

    np.testing.assert_allclose(bootstrap(medians, 50, draws=130, seed=7), slow)
    values = np.arange(101.0)
    assert np.allclose(percentiles(values), [2.5, 97.5]) and np.allclose(percentiles(np.append(values, np.nan)),
                                                                         [2.5, 97.5])


def test_counts_have_wilsons_interval():
    assert wilson_interval(np.array([True, False, True, True]))["accuracy"] == 0.75
    whole = wilson_interval(np.ones(10, bool))
    assert whole["n"] == 10 and whole["high"] == 1 > whole["low"] == pytest.approx(1 / (1 + 1.959964**2 / 10))


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    numbers = np.random.default_rng(3)
    samples = (numbers.random((150, 400)) < 0.3).astype(float)
    low, high = mean_interval(samples, draws=1000)
    assert 0.90 < ((low <= 0.3) & (0.3 <= high)).mean() < 0.99


def test_tables_of_accuracies_and_paired_differences():
    images = predictions()
    table = accuracy_table(images)
    assert table.columns.tolist() == [*KEYS, "accuracy", "low", "high"]
    assert (table["low"] <= table["accuracy"]).all() and (table["accuracy"] <= table["high"]).all()
    right = (images["prediction"] == images["label"]).groupby([images[key] for key in KEYS]).mean()
    np.testing.assert_allclose(table["accuracy"], right.loc[pd.MultiIndex.from_frame(table[KEYS])])
    assert table["mode"][:4].tolist() == ["original", "spliced", "on", "off"]

    pooled = accuracy_table(images, pool_seeds=True).set_index(["selection", "mode", "k"])["accuracy"]
    difference = difference_table(images)
    assert difference.columns.tolist() == ["mode", "k", "difference", "low", "high"]
    for row in difference.itertuples():
        assert row.difference == pytest.approx(pooled["class", row.mode, row.k] - pooled["matched", row.mode, row.k])
    unedited = difference[difference["mode"].isin(["original", "spliced"])]
    assert (unedited[["difference", "low", "high"]] == 0).all(axis=None)


def test_pairing_makes_differences_exact():
    hard = np.random.default_rng(0).random(300) < 0.5
    rows = pd.DataFrame({"id": [*map(str, range(300))] * 2, "label": 1, "mode": "off", "k": 1, "seed": 0,
                         "selection": np.repeat(["class", "matched"], 300),
                         "prediction": np.concatenate([np.zeros(300, int), hard.astype(int)])})
    worse = difference_table(rows)
    assert worse["difference"][0] == pytest.approx(-hard.mean()) and worse["high"][0] < -0.35
    same = rows.assign(prediction=np.tile(hard.astype(int), 2))
    assert difference_table(same)[["low", "high"]].to_numpy().tolist() == [[0, 0]]


def test_equal_images_are_all_counted():
    images = predictions(23, copies=4)
    assert images["id"].nunique() == 23 and len(correctness(images)) == 27


def test_repeated_seeds_and_other_images_do_not_shrink_intervals():
    images = predictions(23)
    again = pd.concat([images, images[(images["selection"] == "matched") & (images["seed"] == 0)]])
    for wrong in (again, images.iloc[:-1]):
        with pytest.raises(ValueError, match="more images than others") as error:
            accuracy_table(wrong)
        assert one_sentence(error.value)
