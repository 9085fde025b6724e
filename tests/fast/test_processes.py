"""Two processes that share a training, on the CPU: the same losses as one to rounding, and one set of files."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from patchsae.weights.files import load_tensors

HERE = Path(__file__).parent
TRAINING = """
import sys
import numpy as np, torch
from pathlib import Path
from conftest import random_clip_model
import patchsae.train
from patchsae import ArrayDataset
from patchsae.fast import processes
from patchsae.clip import Clip
from patchsae.config import load_profile
from patchsae.train import train_sae

torch.set_num_threads(1)
processes.join()
WIDE, BELOW = patchsae.train.WIDE, patchsae.train.SPARSE_BELOW
for name, changes in eval(sys.argv[2]).items():
    sparse = changes.pop("sparse", False)
    patchsae.train.WIDE, patchsae.train.SPARSE_BELOW = (0, {"cpu": 2.0}) if sparse else (WIDE, BELOW)
    settings = dict(expansion=3, batch_images=4, steps=12, save_every=4, warmup=5, dead_after=2, l1=0.5, b_dec="mean")
    profile = load_profile("mini").with_sae(**settings | changes)
    ds = ArrayDataset(torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(11)), np.arange(24) % 5)
    train_sae(profile, Clip(random_clip_model()), ds, Path(sys.argv[1]) / name)
"""
#: Trainings, by name: changes to the profile's settings of the autoencoder.
DENSE = {"dense": {}, "class tokens": {"tokens": "cls"}}
SPARSE = {"sparse": {"sparse": True}, "topk": {"sparse": True, "activation": "topk", "k": 4}}


def launch(script: str, *arguments: str, n: int = 2, **more: str) -> list[tuple[str, int]]:
    """Run a script in n processes that know of each other, as ``accelerate launch`` starts them: errors, statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = [HERE.parent, HERE.parent / "data", HERE]
    path = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    shared = os.environ | more | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if n > 1:
        shared |= {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared |= {"ACCELERATE_USE_CPU": "true"}
    running = [subprocess.Popen([sys.executable, "-c", script, *arguments], stderr=subprocess.PIPE, text=True,
                                env=shared | ({"RANK": str(i), "LOCAL_RANK": str(i)} if n > 1 else {}))
               for i in range(n)]
    return [(process.communicate(timeout=300)[1], process.returncode) for process in running]


def train(folder: Path, which: dict, n: int = 2, **more: str) -> None:
    """Run trainings, each in a folder of its name."""
    for error, status in launch(TRAINING, str(folder), repr(which), n=n, **more):
        assert status == 0, error


def assert_same(folder: Path, expected: Path) -> None:
    """Equal logs and weights to rounding, and no other files."""
    log, reference = (pd.read_csv(f / "log.csv") for f in (folder, expected))
    assert len(log) == 12
    exact = [c for c in log.columns if c != "ev"]  # the mean of two batches' explained variance is not that of both
    np.testing.assert_allclose(log[exact], reference[exact], rtol=1e-3, atol=2e-5, err_msg=folder.name)
    ours, theirs = (load_tensors(f / "sae.safetensors") for f in (folder, expected))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-3)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "log.csv", "sae.safetensors"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """All trainings, each by one process."""
    folder = tmp_path_factory.mktemp("alone")
    train(folder, DENSE | SPARSE, n=1)
    return folder


def test_two_processes_train_as_one(alone, tmp_path):
    train(tmp_path, DENSE | SPARSE)
    for name in DENSE | SPARSE:
        assert_same(tmp_path / name, alone / name)


def test_two_processes_train_as_one_with_sharded_weights(alone, tmp_path):
    train(tmp_path, DENSE, ACCELERATE_USE_FSDP="true")
    for name in DENSE:
        assert_same(tmp_path / name, alone / name)


def test_two_processes_cannot_share_a_batch_of_three(tmp_path):
    for error, status in launch(TRAINING, str(tmp_path), "{'three': {'batch_images': 3}}"):
        assert status and "cannot be shared evenly by 2 processes" in error
