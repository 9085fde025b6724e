"""What is committed for the notebooks to show: the mini CLIP, and the tables of sweeps, seeds and many adaptations."""

import pandas as pd

from patchsae.config import ROOT, start
from patchsae.figures import pretraining_curves
from patchsae.studies import adaptation_sweep, recovery_sweep, sweep, truths
from patchsae.studies.study import open_study
from patchsae.world import pretrain


def mini_clip() -> str:
    """Train the mini profile's CLIP and report on it."""
    folder = ROOT / start("mini").model.name
    pretrain.save(folder, *pretrain.train())
    log = pd.read_csv(folder / "training_log.csv")
    pretraining_curves(log).savefig(folder / "training_curve.png", metadata={"Software": None})
    pretrain.report(folder)
    return f"The mini CLIP is in {folder.relative_to(ROOT)}/"


def run(name: str | None) -> str:
    """Fill every table of a profile that is not full yet."""
    study = open_study(name)
    for room in (truths, sweep, adaptation_sweep, recovery_sweep):
        room.run(study)
    return f"The tables of the profile {study.profile.name} are in {study.profile.short(study.profile.data_dir)}/"
