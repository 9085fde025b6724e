"""What takes days is said before it begins, and asked for."""

import pandas as pd
import pytest
from conftest import one_sentence

from patchsae import load_profile
from patchsae.data import benchmarks
from patchsae.project import artifacts, check
from patchsae.studies.study import Study


def test_missing_data_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(type(load_profile("paper")), "data_dir", property(lambda self: tmp_path))
    monkeypatch.setattr(check, "model_file", lambda name: None)
    monkeypatch.setattr(benchmarks.constants, "HF_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"ImageNet.*make check PROFILE=paper") as error:
        artifacts.run("paper", yes=True)
    assert one_sentence(error.value)


def test_hours_are_said_and_asked_for(tmp_path, monkeypatch):
    mini, asked, made = load_profile("mini"), [], []
    for room in ("truths", "sweep", "adaptation_sweep", "recovery_sweep"):
        monkeypatch.setattr(getattr(artifacts, room), "run", lambda study: made.append(study))
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "")
    monkeypatch.setattr(artifacts, "STAMPS", tmp_path / "stamps.csv")
    artifacts.run("mini")
    assert len(made) == 4 and not asked
    long = mini.with_sae(steps=100 * mini.sae.steps)
    monkeypatch.setattr(artifacts, "open_study", lambda name: Study(long))
    assert artifacts.run("mini") == "Nothing was made." and "hours on two cores" in asked[0]
    stamp = {"profile": "mini", "notebook": "01_train_sae", "seconds": 60.0, "peak_bytes": 1e9, "gflops": 1e-3}
    pd.DataFrame([stamp]).to_csv(artifacts.STAMPS, index=False)
    artifacts.run("mini")  # a machine that has become faster
    assert len(made) == 8 and len(asked) == 1
    pd.DataFrame([stamp | {"gflops": 1e6}]).to_csv(artifacts.STAMPS, index=False)
    assert artifacts.run("mini") == "Nothing was made." and "hours on this machine" in asked[1]
    artifacts.run("mini", yes=True)
    assert len(made) == 12 and len(asked) == 2
