"""What is committed for the notebooks to show: the mini CLIP, and the tables of sweeps, seeds and many adaptations."""

import pandas as pd

from patchsae.config import ROOT, load_profile, start
from patchsae.figures import pretraining_curves
from patchsae.project.ask import agreed
from patchsae.project.check import needs
from patchsae.project.stamps import STAMPS, estimate, rate, size
from patchsae.studies import adaptation_sweep, recovery_sweep, sweep, truth_sweep, truths
from patchsae.studies.study import Study, open_study
from patchsae.world import pretrain

#: Hours from which on it is asked for.
HOURS = 8


def mini_clip() -> str:
    """Train the mini profile's CLIP and report on it."""
    folder = ROOT / start("mini").model.name
    pretrain.save(folder, *pretrain.train())
    log = pd.read_csv(folder / "training_log.csv")
    pretraining_curves(log).savefig(folder / "training_curve.png", metadata={"Software": None})
    pretrain.report(folder)
    return f"The mini CLIP is in {folder.relative_to(ROOT)}/"


def run(name: str | None, yes: bool = False) -> str:
    """Fill every table of a profile that is not full yet; what takes longer than ``HOURS`` after a question, unless
    ``yes``."""
    profile = load_profile(name)
    if lacking := [need.name for need in needs(profile) if not need.there and need.stops]:
        raise FileNotFoundError(f"The tables of {profile.name} cannot be made without {' and '.join(lacking)}; "
                                f"`make check PROFILE={profile.name}` says where to get what is missing.")
    study = open_study(name)
    trained = len(sweep.configurations(study.profile))
    hours, where = _hours(study)
    if not yes and trained * hours > HOURS and not agreed(
            f"The tables of {profile.name} take {trained} autoencoders of full length, at most {trained * hours:,.0f} "
            f"hours {where}, and many adapted models; what is there is not made again, and what is cut goes on. "
            "Start?"):
        return "Nothing was made."
    for room in (truths, sweep, adaptation_sweep, truth_sweep, recovery_sweep):
        room.run(study)
    return f"The tables of the profile {study.profile.name} are in {study.profile.short(study.profile.data_dir)}/"


def _hours(study: Study) -> tuple[float, str]:
    """What an autoencoder takes to train and measure, and where: here, as notebook 01 of a recorded run tells, else on
    the two cores that mini's were trained on."""
    if STAMPS.is_file():
        hours = estimate(study.profile, pd.read_csv(STAMPS), rate())["hours"]
        if "01_train_sae" in hours:
            return hours["01_train_sae"], "on this machine"
    longer = size(study.profile).work / size(load_profile("mini")).work
    return sweep.MINUTES / 60 * longer, "on two cores (make rehearsal measures this machine)"
