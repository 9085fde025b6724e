"""Tables of adaptation over tasks, methods and seeds, made once by ``make mini-artifacts`` and read by notebook 06.

A group of rows that is in its table already, under the same key, is not computed again, and adapted models are kept
under their settings: an interrupted run goes on where it stopped.
"""

import functools
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from patchsae.activations import kept_pixels
from patchsae.clip import Clip, load_clip
from patchsae.config import Profile, device
from patchsae.data.datasets import Subset, open_dataset
from patchsae.sae import SparseAutoencoder
from patchsae.studies.adapt import (
    METHODS,
    UNTRAINED,
    adaptation_key,
    adapted_model,
    halves,
    image_embeddings,
    unadapted,
)
from patchsae.studies.adaptation import correlations, group_sizes, interval, swap_table
from patchsae.studies.fidelity import measure
from patchsae.studies.remapping import concept_readout, image_latents, readout
from patchsae.studies.study import committed_folder, trained_sae
from patchsae.weights.files import write_atomically
from patchsae.world.probes import PROBED

#: Methods whose adapted models are committed, because they are small.
KEPT = ("maple", "coop")
#: Ranks that end "high" and begin "low" in the tables.
UPPER, LOWER = 10, 100
FIDELITY = ["mse", "l0", "dead", "ev_patch", "ev_cls", "accuracy_original", "accuracy_spliced"]


def table_path(profile: Profile, name: str) -> Path:
    """Where a table of this room is committed."""
    return profile.data_dir / "adapted" / f"{name}.csv"


@functools.lru_cache(maxsize=4)
def images(profile: Profile, clip: Clip, task: str, split: str):
    """The images of a split that everything here is measured on, read once."""
    ds = open_dataset(profile, task, split)
    if split == "train":
        ds = Subset(ds, range(len(ds.class_names)), range(min(len(ds), profile.adaptation.images)))
    return kept_pixels(clip, ds)


@functools.lru_cache(maxsize=64)
def clip_embeddings(profile: Profile, clip: Clip, task: str, classes: range) -> torch.Tensor:
    """Embeddings of the unadapted tower on the test images of some classes, ``[N,P]``: every method is held to them."""
    return image_embeddings(clip, Subset(images(profile, clip, task, "test"), classes))


def model_of(profile: Profile, clip: Clip, task: str, method: str, seed: int, part: str = "base"):
    """An adapted model; method "zero-shot" is CLIP as it is."""
    if method == "zero-shot":
        return unadapted(profile, clip, task)
    return adapted_model(profile, clip, task, method, seed, open_dataset(profile, task, "train"), part,
                         f"{method} on {task}, seed {seed}")


def accuracy_rows(profile: Profile, clip: Clip, task: str, method: str, seed: int) -> pd.DataFrame:
    """Accuracy on both halves of a task's test split, with the image tower and the text features of CLIP and of the
    adapted model in every combination: half, image, text, n, accuracy, low, high."""
    test, after = images(profile, clip, task, "test"), model_of(profile, clip, task, method, seed)
    return pd.concat([swap_table(unadapted(profile, clip, task), after, Subset(test, classes),
                                 clip_embeddings(profile, clip, task, classes)).assign(half=half)
                      for half, classes in halves(test).items()])


def transfer_rows(profile: Profile, clip: Clip, task: str, method: str, seed: int) -> pd.DataFrame:
    """Trained on all classes of ``task``, tested on all classes of every task: the cross-data-set and domain-shift
    protocols. Columns target, image, text, n, accuracy, low, high."""
    after, rows = model_of(profile, clip, task, method, seed, "all"), []
    for target in profile.adaptation.tasks:
        test = images(profile, clip, target, "test")
        known = clip_embeddings(profile, clip, target, range(len(test.class_names)))
        table = swap_table(unadapted(profile, clip, target), after, test, known)
        rows.append(table[table["image"] == table["text"]].assign(target=target))
    return pd.concat(rows)


@functools.lru_cache(maxsize=4)
def clip_counts(profile: Profile, clip: Clip, sae: SparseAutoencoder, task: str, classes: range) -> torch.Tensor:
    """Class counts of the unadapted tower on training images."""
    seen = Subset(images(profile, clip, task, "train"), classes)
    return image_latents(clip, sae, seen, profile.model.layer, profile.latents.tau, profile.data.batch_images)[1]


def latent_rows(profile: Profile, clip: Clip, sae: SparseAutoencoder, task: str, method: str,
                seed: int) -> pd.DataFrame:
    """What the latents of CLIP's autoencoder say in an adapted tower: one row per half.

    readable, low, high: accuracy of a linear readout of the classes, fitted to training and scored on test images;
    what ``fidelity.measure`` gives on the first test images; correlations of data-set-level activations with CLIP's;
    latents per class in each group (ranks 10 and 100).
    """
    after, layer, tau = model_of(profile, clip, task, method, seed), profile.model.layer, profile.latents.tau
    n = profile.data.batch_images
    train, test, rows = *(images(profile, clip, task, split) for split in ("train", "test")), []
    for half, classes in halves(test).items():
        seen, unseen = Subset(train, classes), Subset(test, classes)
        few = Subset(test, classes, range(len(test) // 2))
        (x, counts), (x_test, _) = (image_latents(after.tower, sae, ds, layer, tau, n) for ds in (seen, unseen))
        before = clip_counts(profile, clip, sae, task, classes)
        found = interval(readout(x, seen.labels, x_test).argmax(1).cpu().numpy() == unseen.labels)
        sizes = group_sizes(before, counts, [UPPER], [LOWER]).set_index("group")["mean"]
        quality = measure(after.tower, sae, few, after.text(few.class_names), layer, batch_images=n)[FIDELITY]
        rows.append({"half": half, "readable": found["accuracy"], "low": found["low"], "high": found["high"]}
                    | quality.to_dict() | correlations(before.sum(0), counts.sum(0)) | sizes.to_dict())
    return pd.DataFrame(rows)


def concept_rows(profile: Profile, clip: Clip, sae: SparseAutoencoder, task: str, method: str,
                 seed: int) -> pd.DataFrame:
    """How well every ground-truth concept of the profile's own task is read from single patches in a tower that was
    adapted to ``task``: kind, concept, ap, share. Empty where images have no ground truth."""
    splits = [open_dataset(profile, profile.data.task, split) for split in ("train", "test")]
    if not all(ds.concepts for ds in splits):
        return pd.DataFrame(columns=["kind", "concept", "ap", "share"])
    tower = model_of(profile, clip, task, method, seed).tower
    return concept_readout(tower, sae, *splits, profile.model.layer, PROBED, n_images=256)


def filled_table(profile: Profile, clip: Clip, name: str, wanted: list[tuple], rows_of: Callable,
                 read_with: str = "") -> pd.DataFrame:
    """A committed table, with the groups (task, method, seed) it lacks computed and added.

    ``read_with``: fingerprint of the autoencoder that rows depend on; it becomes part of their keys.
    """
    path = table_path(profile, name)
    known = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=["task", "method", "seed", "key"])
    done = dict(iter(known.groupby(["task", "method", "seed", "key"])))
    keyed = {(task, *rest): (task, *rest, adaptation_key(profile, clip, task, *rest, open_dataset(
        profile, task, "train")) + read_with) for task, *rest in wanted}
    for group, key in keyed.items():
        if key not in done:
            done[key] = rows_of(*group).assign(**dict(zip(("task", "method", "seed", "key"), key)))
            whole = pd.concat([done[k] for k in keyed.values() if k in done])
            write_atomically(path, lambda temporary, whole=whole: whole.round(6).to_csv(temporary, index=False))
            print(f"{name}: {', '.join(map(str, group))}", flush=True)
    return pd.read_csv(path)


def tables(profile: Profile, clip: Clip, sae: SparseAutoencoder) -> dict[str, pd.DataFrame]:
    """Every table of adaptation, "accuracy", "transfer", "latents" and "concepts", as far as needed computed now."""
    tasks, seeds, own = profile.adaptation.tasks, profile.adaptation.seeds, profile.data.task
    plain = [(task, "zero-shot", 0) for task in tasks]

    def each(*methods, seeds=seeds):
        return list(itertools.product(tasks, methods, seeds))

    return {"accuracy": filled_table(profile, clip, "accuracy", each(*METHODS, UNTRAINED),
                                     functools.partial(accuracy_rows, profile, clip)),
            "transfer": filled_table(profile, clip, "transfer", list(itertools.product([own], KEPT, seeds)),
                                     functools.partial(transfer_rows, profile, clip)),
            "latents": filled_table(profile, clip, "latents",
                                    plain + each("maple") + each(UNTRAINED, "lora", "fine-tuning", seeds=seeds[:1]),
                                    functools.partial(latent_rows, profile, clip, sae), sae.fingerprint()),
            "concepts": filled_table(profile, clip, "concepts",
                                     plain[:1] + each("maple") + each(UNTRAINED, seeds=seeds[:1]),
                                     functools.partial(concept_rows, profile, clip, sae), sae.fingerprint())}


def farthest_task(latents: pd.DataFrame, seed: int) -> str:
    """The task to which MaPLe's adaptation changed the activations of the base classes most."""
    rows = latents[(latents["method"] == "maple") & (latents["seed"] == seed) & (latents["half"] == "base")]
    return rows.loc[rows["pearson_log"].idxmin(), "task"]


def sae_of_the_adapted(profile: Profile, clip: Clip, task: str) -> SparseAutoencoder:
    """The autoencoder of the profile's settings and images, trained on the tower that MaPLe adapted to ``task``."""
    tower = model_of(profile, clip, task, "maple", profile.adaptation.seeds[0]).tower
    return trained_sae(profile, tower, open_dataset(profile, profile.data.task, "train"))


def commit(profile: Profile, clip: Clip) -> None:
    """Copy the small adapted models to the committed data."""
    for task, method, seed in itertools.product(profile.adaptation.tasks, KEPT, profile.adaptation.seeds):
        key = adaptation_key(profile, clip, task, method, seed, open_dataset(profile, task, "train"))
        if (folder := profile.run_dir / "adapted" / key).is_dir():
            shutil.copytree(folder, profile.data_dir / "adapted" / key, dirs_exist_ok=True)


def run(profile: Profile) -> None:
    """Make every table, and keep the adapted models that notebooks look into."""
    clip = load_clip(profile.model.name, device())
    made = tables(profile, clip, trained_sae(profile, clip, open_dataset(profile, profile.data.task, "train")))
    commit(profile, clip)
    far = farthest_task(made["latents"], profile.adaptation.seeds[0])
    folder = committed_folder(profile, model_of(profile, clip, far, "maple", profile.adaptation.seeds[0]).tower)
    sae_of_the_adapted(profile, clip, far).save_pretrained(folder)
