"""What takes days is said before it begins, and asked for."""

import importlib
import pkgutil

import pandas as pd
import pytest
from conftest import one_sentence

from patchsae import load_profile, studies
from patchsae.data import benchmarks
from patchsae.project import artifacts, check
from patchsae.studies.study import Study

ROOMS = [room.name for room in pkgutil.iter_modules(studies.__path__, "patchsae.studies.")]


def test_missing_data_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(type(load_profile("paper")), "data_dir", property(lambda self: tmp_path))
    monkeypatch.setattr(check, "model_file", lambda name: None)
    monkeypatch.setattr(benchmarks.constants, "HF_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"ImageNet.*make check PROFILE=paper") as error:
        artifacts.run("paper", yes=True)
    assert one_sentence(error.value)


def test_hours_are_said_and_asked_for(tmp_path, monkeypatch):
    mini, asked, made = load_profile("mini"), [], []
    rooms = [room for room in map(importlib.import_module, ROOMS) if hasattr(room, "run")]
    for room in rooms:
        monkeypatch.setattr(room, "run", lambda study: made.append(study))
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "")
    monkeypatch.setattr(artifacts, "STAMPS", tmp_path / "stamps.csv")
    artifacts.run("mini")
    assert len(made) == len(rooms) == 5 and not asked  # every room of studies that fills tables
    long = mini.with_sae(steps=100 * mini.sae.steps)
    monkeypatch.setattr(artifacts, "open_study", lambda name: Study(long))
    assert artifacts.run("mini") == "Nothing was made." and "hours on two cores" in asked[0]
    stamp = {"profile": "mini", "notebook": "01_train_sae", "seconds": 60.0, "peak_bytes": 1e9, "gflops": 1e-3}
    pd.DataFrame([stamp]).to_csv(artifacts.STAMPS, index=False)
    artifacts.run("mini")  # a machine that has become faster
    assert len(made) == 10 and len(asked) == 1
    pd.DataFrame([stamp | {"gflops": 1e6}]).to_csv(artifacts.STAMPS, index=False)
    assert artifacts.run("mini") == "Nothing was made." and "hours on this machine" in asked[1]
    artifacts.run("mini", yes=True)
    assert len(made) == 15 and len(asked) == 2
