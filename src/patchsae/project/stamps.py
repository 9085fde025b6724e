"""What recorded runs took, and what others will take.

``tools/run_notebook.py`` stamps every notebook with its seconds and memory. ``make rehearsal`` records the stamps of a
machine, and they are scaled by one rule: time grows with images x tokens x weights that a token passes, and falls with
the rate of the machine's matrix products; memory grows with the weights, and by ``HELD`` times the latents by which a
batch is larger. Nothing is scaled down, so that a small profile is told an upper bound.
"""

import json
import math
import os
import platform
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from patchsae.config import ROOT, Profile, device, load_profile
from patchsae.project.plan import shape
from patchsae.weights.files import write_atomically

STAMPS = ROOT / "data" / "rehearsal_stamps.csv"
#: Times that a dense step holds the latents of its batch.
HELD = 5


class Size(NamedTuple):
    """Multiplications of a run but for a factor that all profiles share, weights, and latents of a batch."""

    work: float
    weights: float
    latents: float


def size(profile: Profile) -> Size:
    """The size of a profile's run, from its settings and the shape of its model."""
    d, s, (width, blocks, tokens) = profile.data, profile.sae, shape(profile)
    weights = 12 * blocks * width**2 + 2 * s.expansion * width**2
    images = s.steps * s.batch_images + d.train_images + d.test_images
    return Size(images * tokens * weights, weights, max(s.batch_images, d.batch_images) * tokens * s.expansion * width)


def rate(seconds: float = 0.5) -> float:
    """Multiplications and additions a second of float32 matrix products, measured on this machine's device, in 1e9."""
    a = torch.randn(1024, 1024, device=device())
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            a @ a
        if a.is_cuda:
            torch.cuda.synchronize()
        done += 4
    return done * 2 * len(a) ** 3 / (time.perf_counter() - start) / 1e9


def record(profile: Profile, place: Path = STAMPS) -> pd.DataFrame:
    """Add the stamps of a profile's last run on this machine to the recorded ones, in the place of its older ones."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores{', GPU' * (device() == 'cuda')}"
    took, rows = ("seconds", "processor_seconds", "peak_bytes", "passes"), []
    for path in sorted((ROOT / "build" / profile.name).glob("*.json")):
        stamp = json.loads(path.read_text())
        rows.append({"profile": profile.name, "notebook": path.stem} | {name: stamp.get(name) for name in took})
    if not rows:
        raise FileNotFoundError(f"No notebook of {profile.name} was run here; make figures PROFILE={profile.name} "
                                "runs them.")
    new = pd.DataFrame(rows).assign(gflops=round(rate(), 1), machine=machine)
    old = pd.read_csv(place).query("profile != @profile.name") if place.is_file() else None
    table = pd.concat([old, new], ignore_index=True)
    write_atomically(place, lambda temporary: table.to_csv(temporary, index=False))
    return new


def estimate(profile: Profile, stamps: pd.DataFrame, gflops: float) -> pd.DataFrame:
    """Notebook -> hours and GB on a machine of so many GFLOP/s, scaled from the recorded profile nearest in size."""
    wanted, sizes = size(profile), {name: size(load_profile(name)) for name in stamps["profile"].unique()}
    nearest = min(sizes, key=lambda name: abs(math.log(sizes[name].work / wanted.work)))
    known, took = sizes[nearest], stamps[stamps["profile"] == nearest].set_index("notebook")
    longer = max(1, wanted.work / known.work) * took["gflops"] / gflops
    held = 4 * HELD * max(0, wanted.latents - known.latents)
    return pd.DataFrame({"hours": took["seconds"] * longer / 3600,
                         "memory": (took["peak_bytes"] * max(1, wanted.weights / known.weights) + held) / 1e9})
