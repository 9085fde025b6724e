"""The adapted models and their accuracies, made once by ``make mini-artifacts``.

What is in the tables already is not computed again, and adapted models are kept under their settings, so that an
interrupted run goes on where it stopped.
"""

import itertools
import shutil

import pandas as pd
import torch

from patchsae.adapt import METHODS, adaptation_key, adapted_model, as_adapted, halves, new_prompts, unadapted
from patchsae.adaptation import swap_table
from patchsae.checkpoints import write_atomically
from patchsae.clip import Clip, load_clip
from patchsae.config import Profile, device, start
from patchsae.datasets import Subset, open_dataset

#: Methods whose adapted models are committed: the small ones.
KEPT = ("maple", "coop")
UNTRAINED = "untrained prompts"


def table_path(profile: Profile, name: str):
    """A committed table of this room: "accuracy" or "transfer"."""
    return profile.data_dir / "adapted" / f"{name}.csv"


def committed_table(profile: Profile, name: str) -> pd.DataFrame:
    """Read a committed table."""
    path = table_path(profile, name)
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}; run make mini-artifacts, which makes it.")
    return pd.read_csv(path)


def model_of(profile: Profile, clip: Clip, task: str, method: str, seed: int, train, part: str = "base"):
    """The adapted model of a method, or of the control whose prompts nobody trained."""
    if method == UNTRAINED:
        return as_adapted(new_prompts(profile, clip, [train.class_names[i] for i in halves(train)["base"]],
                                      "maple", seed))
    return adapted_model(profile, clip, task, method, seed, train, part, f"{method} on {task}, seed {seed}")


def accuracy_rows(profile: Profile, clip: Clip, task: str, method: str, seed: int) -> pd.DataFrame:
    """Accuracy on both halves of a task's test split, with the image tower and the text features of CLIP and of the
    adapted model in every combination: task, half, method, seed, key, image, text, n, accuracy, low, high."""
    train, test = (open_dataset(profile, task, split) for split in ("train", "test"))
    after = model_of(profile, clip, task, method, seed, train)
    rows = [swap_table(unadapted(clip, task), after, Subset(test, classes)).assign(half=half)
            for half, classes in halves(test).items()]
    key = "" if method == UNTRAINED else adaptation_key(profile, clip, task, method, seed, train)
    return pd.concat(rows).assign(task=task, method=method, seed=seed, key=key)


def transfer_rows(profile: Profile, clip: Clip, method: str, seed: int) -> pd.DataFrame:
    """Trained on all classes of the profile's task, tested on all classes of every task: the cross-data-set and
    domain-shift protocols."""
    source = profile.data.task
    after = model_of(profile, clip, source, method, seed, open_dataset(profile, source, "train"), "all")
    rows = []
    for task in profile.adaptation.tasks:
        table = swap_table(unadapted(clip, task), after, open_dataset(profile, task, "test"))
        rows.append(table[table["image"] == table["text"]].assign(task=task))
    return pd.concat(rows).assign(source=source, method=method, seed=seed)


def run(profile: Profile) -> None:
    """Adapt to every task by every method with every seed, and measure."""
    clip, seeds = load_clip(profile.model.name, device()), profile.adaptation.seeds
    _table(profile, "accuracy", ["task", "method", "seed"],
           [(task, method, seed) for task, method, seed in itertools.product(
               profile.adaptation.tasks, (*METHODS, UNTRAINED), seeds)],
           lambda *row: accuracy_rows(profile, clip, *row))
    _table(profile, "transfer", ["method", "seed"], list(itertools.product(("coop", "maple"), seeds)),
           lambda *row: transfer_rows(profile, clip, *row))
    _commit(profile, clip)


def _table(profile: Profile, name: str, keys: list[str], wanted: list[tuple], rows_of) -> None:
    """Fill a table, one group of rows after the other; groups that are there already stay."""
    path = table_path(profile, name)
    done = dict(iter(pd.read_csv(path).groupby(keys))) if path.is_file() else {}
    for i, group in enumerate(wanted):
        if group not in done:
            done[group] = rows_of(*group)
            whole = pd.concat([done[g] for g in wanted if g in done])
            write_atomically(path, lambda temporary, whole=whole: whole.round(6).to_csv(temporary, index=False))
            print(f"{name} {i + 1} of {len(wanted)}: {group}", flush=True)


def _commit(profile: Profile, clip: Clip) -> None:
    """Copy the small adapted models to the committed data."""
    for task, method, seed in itertools.product(profile.adaptation.tasks, KEPT, profile.adaptation.seeds):
        key = adaptation_key(profile, clip, task, method, seed, open_dataset(profile, task, "train"))
        if (folder := profile.run_dir / "adapted" / key).is_dir():
            shutil.copytree(folder, profile.data_dir / "adapted" / key, dirs_exist_ok=True)


if __name__ == "__main__":
    profile_ = start()
    torch.set_num_threads(1)  # batches of a few images are no faster on more threads
    run(profile_)
