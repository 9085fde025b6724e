"""Every claim has a rule that can fail, and what has no table is not judged."""

import dataclasses

import make_verdicts
import numpy as np
import pandas as pd
import pytest

from patchsae.config import ROOT, load_profile
from patchsae.studies import verdicts
from patchsae.studies.verdicts import CLAIMS, VERDICTS

FOLDER = ROOT / "figures" / "mini"


def committed(name: str) -> pd.DataFrame:
    return pd.read_csv(FOLDER / f"{name}.csv")


def changed(claim: str, name: str, **columns) -> verdicts.Finding:
    """What a claim's rule says when columns of one of its tables are other ones: functions of the table."""
    measure = next(c.measure for c in CLAIMS if c.claim.startswith(claim))
    table = committed(name)
    other = table.assign(**columns)
    return measure(lambda asked: other if asked == name else committed(asked))


def scaled(column: str, factor: float):
    return lambda table: factor * table[column]


@pytest.mark.parametrize("claim, name, columns", [
    ("Splicing", "table2", {"accuracy_spliced": lambda t: t["accuracy_original"] - 0.06}),
    ("Removing ten latents of the class", "05_differences", {c: scaled(c, -1) for c in ("difference", "low", "high")}),
    ("Removing ten random", "ablation", {"accuracy": lambda t: t["accuracy"].where(t["mode"] != "off", 0.5)}),
    ("Latents of the whole", "ablation", {"high": lambda t: t["high"] + 0.1}),
    ("MaPLe gains", "table1", {"accuracy": lambda t: t["accuracy"].where(t["method"] != "maple", 0.5)}),
    ("MaPLe does not lose", "table1", {"accuracy": lambda t: t["accuracy"] - 0.2 * (t["method"] == "maple")}),
    ("A class's top", "07_group_ranks", {"low": scaled("low", 0.5)}),
    ("Hardly a latent", "07_group_ranks", {"high": lambda t: t["high"] + 1}),
    ("Who classifies", "07_masking_base", {"accuracy": lambda t: 0.5 + 0.4 * (t["selects"] == "adapted")}),
    ("What is gained", "07_remapping", {"remapped": scaled("remapped", 0.2)}),
    ("What is gained", "07_remapping", {"new": scaled("gain", 0.8)}),
    ("Adaptation learns nothing new", "08_measures", {"gain": lambda t: t["gain"] + 0.1}),
    ("Whether top latents", "verdict_measures", {"low": scaled("low", 0.5)}),
    ("CLIP's autoencoder", "07_fidelity",
     {"accuracy_spliced": lambda t: t["accuracy_spliced"] - 0.1 * (t["method"] == "maple")}),
    ("Latents have concepts", "09_recovery", {"minus_low": scaled("minus_low", -1)}),
    ("Latents are more mono", "09_single_latents",
     {"method": lambda t: t["method"].map({"trained": "untrained", "untrained": "trained"})}),
    ("Latents keep", "09_transfer", {"there": scaled("there", 0.5)}),
])
def test_a_claim_that_holds_would_fail_on_other_numbers(claim, name, columns):
    assert changed(claim, name).holds and not changed(claim, name, **columns).holds


@pytest.mark.parametrize("claim, name, columns", [
    ("The contrastive", "table2", {"contrastive_spliced": lambda t: t["contrastive_original"] - 0.1}),
    ("Low label entropy", "09_regression", {"high": lambda t: t["high"] - 1}),
])
def test_a_claim_that_fails_would_hold_on_other_numbers(claim, name, columns):
    assert not changed(claim, name).holds and changed(claim, name, **columns).holds


def test_two_clouds_are_asked_of_wide_dictionaries_alone(monkeypatch):
    clouds = pd.DataFrame({"frequency": [1e-4] * 700 + [0.1] * 300, "mean_activation": [0.1] * 700 + [1.0] * 300})
    found = verdicts.two_clouds(lambda name: clouds)
    assert found.holds and found.ours == 70
    assert not verdicts.two_clouds(lambda name: clouds.assign(frequency=0.1)).holds
    with pytest.raises(LookupError):
        verdicts.two_clouds(lambda name: clouds.head(200))


def test_intervals_over_seeds_are_those_of_t():
    rows = pd.DataFrame({"seed": [1, 1, 2, 2, 3, 3]})
    mean, low, high = verdicts._over_seeds(rows, np.array([1.0, 3, 3, 3, 4, 4]))
    assert mean == 3 and np.isclose(high - mean, 4.302653 / np.sqrt(3)) and np.isclose(mean - low, high - mean)


def test_what_is_not_there_is_not_judged(tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHSAE_FIGURES", str(tmp_path))
    table = verdicts.verdicts(dataclasses.replace(load_profile("mini"), name="nowhere"))
    assert set(table["verdict"]) == {VERDICTS[3]} and table[["ours", "low", "high"]].isna().all(axis=None)


def test_readme_has_the_committed_table():
    text = make_verdicts.README.read_text(encoding="utf-8")
    assert make_verdicts.page(text) == text
    again, kept = verdicts.verdicts(load_profile("mini")), committed("verdicts")
    assert again["verdict"].tolist() == kept["verdict"].tolist()
    np.testing.assert_allclose(again["ours"], kept["ours"], rtol=1e-5)
