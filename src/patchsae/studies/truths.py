"""Tasks whose truth is known before anything is trained, and what shows that each is what it claims.

Of a task that is to be gained by *remapping* the classes are known concepts under other names: a linear readout of the
latents tells them before adaptation. Of one that takes something *new* the classes differ in what such a readout cannot
tell, though it has every training image and the labels of all classes. *Mixed* tasks have both, in known parts.

The readout that defines the truth is a logistic regression on three things side by side: the mean over patch tokens,
the maximum over patch tokens, and the class token. It sees no positions: which latent fires where is not in it.
"""

import functools
from pathlib import Path

import pandas as pd
import torch

from patchsae.activations import token_batches
from patchsae.studies.adapt import halves, unadapted
from patchsae.studies.remapping import PENALTY
from patchsae.studies.study import Study, fingerprint
from patchsae.studies.tables import Group, fill, noted, read, remedy
from patchsae.weights.files import result_key
from patchsae.world.probes import fit_readout
from patchsae.world.scenes import TRUTHS

#: What is `new` is told at most so much better than by chance.
TOLD = 0.1
#: Raised when measuring gives other numbers from the same settings.
VERSION = 1
#: What a task of the mini profile takes on two cores.
MINUTES = 0.3


def summary(tokens: torch.Tensor) -> torch.Tensor:
    """What the readout sees of images, ``[B,T,K] -> [B,3K]``: mean and maximum over patches, and the class token."""
    return torch.cat([tokens[:, 1:].mean(1), tokens[:, 1:].amax(1), tokens[:, 0]], 1)


@torch.no_grad()
def summaries(study: Study, task: str, split: str) -> dict[str, torch.Tensor]:
    """Of every image of a task: "latents" ``[N,3S]``, "z" ``[N,3D]``, "embeddings" ``[N,P]`` and "labels" ``[N]``."""
    clip, parts = study.clip, []
    for batch in token_batches(clip, study.images(task, split), study.layer):
        z = batch.z[:, :clip.n_tokens]
        parts.append((summary(study.sae.encode(z)), summary(z), clip.above(batch.z, study.layer), batch.labels))
    names = ("latents", "z", "embeddings", "labels")
    return {name: torch.cat(values).cpu() for name, values in zip(names, zip(*parts))}


def hits(logits: torch.Tensor, labels: torch.Tensor, classes: range) -> torch.Tensor:
    """Which images of some classes are told among these, from logits ``[N,C]``: bool ``[n]``."""
    chosen = (labels >= classes[0]) & (labels <= classes[-1])
    return logits[chosen][:, classes[0]:classes[-1] + 1].argmax(1) + classes[0] == labels[chosen]


def truth_rows(study: Study, task: str) -> pd.DataFrame:
    """What shows that a task is what it claims, one row.

    truth; base_zero_shot: CLIP's accuracy on the base half, where chance is base_chance; readout and readout_z: what
    readouts of the latents and of the tokens, fitted to all training images, tell of all classes, by chance ``chance``.
    """
    train, test = (summaries(study, task, split) for split in ("train", "test"))
    ds, clip = study.images(task, "test"), study.clip
    zero_shot = clip.logits(test["embeddings"].to(clip.device), unadapted(study, task).text(ds.class_names)).cpu()
    base, every = halves(ds)["base"], range(len(ds.class_names))

    def accuracy(logits, classes) -> float:
        return hits(logits, test["labels"], classes).float().mean().item()

    told = {name: accuracy(fit_readout(train[name], train["labels"], PENALTY)(test[name]), every)
            for name in ("latents", "z")}
    return pd.DataFrame([{"truth": TRUTHS[task], "base_zero_shot": accuracy(zero_shot, base),
                          "base_chance": 1 / len(base), "readout": told["latents"], "readout_z": told["z"],
                          "chance": 1 / len(every)}])


def groups(study: Study) -> list[Group]:
    """What the table has: every task of known truth."""
    return [Group({"task": task}, _key(study, task), functools.partial(_rows, study, task)) for task in TRUTHS]


def _rows(study: Study, task: str) -> list[pd.DataFrame]:
    return [truth_rows(study, task).round(4)]


def _key(study: Study, task: str) -> str:
    return result_key(VERSION, clip=study.clip_key, autoencoder=fingerprint(study.sae),
                      layer=study.clip.block(study.layer), task=task, truth=TRUTHS[task],
                      images=[study.images(task, split).fingerprint() for split in ("train", "test")])


def table(study: Study) -> pd.DataFrame:
    """The committed table with the ``attrs`` of ``tables.read``; empty for a profile whose images are not drawn."""
    if study.profile.data.source != "scenes":
        return noted(pd.DataFrame(), False, "Only drawn scenes have tasks whose truth is known: left out.")
    wanted = groups(study)
    return read([_file(study)], wanted, remedy(study.profile, len(wanted) * MINUTES))[0]


def run(study: Study) -> None:
    """Fill the table with whatever it lacks."""
    if study.profile.data.source == "scenes":
        fill([_file(study)], groups(study))


def _file(study: Study) -> Path:
    return study.profile.data_dir / "tasks.csv"
