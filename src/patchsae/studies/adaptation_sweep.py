"""Tables of adaptation over tasks, methods and seeds, made once by ``make mini-artifacts`` for notebooks 06 and 07.

Adapted models are kept under what decides them, and rows that are in their table are not computed again: an
interrupted run goes on where it stopped.
"""

import functools
import itertools
from pathlib import Path

import pandas as pd
import torch

from patchsae.activations import kept_pixels
from patchsae.clip import Clip
from patchsae.data.datasets import Subset
from patchsae.data.images import Images
from patchsae.sae import SparseAutoencoder
from patchsae.studies.adapt import METHODS, UNTRAINED, Recipe, adaptation_key, adapted_model, halves, unadapted
from patchsae.studies.adaptation import SIDES, correlations, group_sizes, swap_table, whole
from patchsae.studies.fidelity import measure
from patchsae.studies.intervals import wilson_interval
from patchsae.studies.recovery import read_split
from patchsae.studies.remapping import PENALTY, concept_readout, image_latents
from patchsae.studies.study import Study, committed_folder, fingerprint, trained_sae
from patchsae.studies.tables import Group, fill, noted, read, remedy
from patchsae.weights.files import result_key
from patchsae.world.probes import PROBED, fit_readout

#: Methods whose adapted models are committed, because they are small.
KEPT = ("maple", "coop")
#: Methods that a notebook looks at on its own, where nothing is committed.
FEW = ("zero-shot", "maple", UNTRAINED)
#: Ranks that end "high" and begin "low" in the tables.
UPPER, LOWER = 10, 100
FIDELITY = ["mse", "l0", "dead", "ev_patch", "ev_cls", "accuracy_original", "accuracy_spliced"]
#: Scenes of each split whose patches concepts are read from.
CONCEPT_IMAGES = 256
#: Raised when measuring gives other numbers from the same settings.
VERSIONS = {"accuracy": 2, "transfer": 2, "latents": 1, "concepts": 1}
#: What a group of rows of each table of the mini profile takes on two cores.
MINUTES = {"accuracy": 0.4, "transfer": 0.5, "latents": 0.4, "concepts": 0.3}


@functools.lru_cache(maxsize=4)
def images(study: Study, task: str, split: str) -> Images:
    """The images of a split that everything here is measured on, read once."""
    ds = study.images(task, split)
    if split == "train":
        ds = Subset(ds, range(len(ds.class_names)), range(min(len(ds), study.profile.adaptation.images)))
    return kept_pixels(study.clip, ds)


@functools.lru_cache(maxsize=4)
def clip_counts(study: Study, task: str, classes: range) -> torch.Tensor:
    """Class counts of the unadapted tower on training images."""
    seen, p = Subset(images(study, task, "train"), classes), study.profile
    return image_latents(study.clip, study.sae, seen, study.layer, p.latents.tau, p.data.batch_images)[1]


def first_images(ds: Images, classes: range, n: int) -> Subset:
    """Those of some classes among the first ``n`` images, at least one of each class: classes come in turn."""
    return Subset(ds, classes, range(min(len(ds), max(n, len(ds.class_names)))))


# Rows ---------------------------------------------------------------------------------------------------

def accuracy_rows(recipe: Recipe) -> pd.DataFrame:
    """Accuracy on both halves of a task's test split, with every mixture of CLIP and the adapted model: half, and the
    columns of ``swap_table``."""
    study, task, after = recipe.study, recipe.task, adapted_model(recipe)
    test = images(study, task, "test")
    return pd.concat([swap_table(unadapted(study, task), after, Subset(test, classes), study.layer).assign(half=half)
                      for half, classes in halves(test).items()])


def transfer_rows(recipe: Recipe) -> pd.DataFrame:
    """Trained on all classes of a task, tested on all classes of every task: the cross-data-set and domain-shift
    protocols. Column target, and those of ``swap_table``, of CLIP and of the adapted model."""
    study, after, rows = recipe.study, adapted_model(recipe), []
    for target in study.profile.adaptation.tasks:
        table = swap_table(unadapted(study, target), after, images(study, target, "test"), study.layer)
        rows += [whole(table, side).assign(target=target) for side in SIDES]
    return pd.concat(rows)


def latent_rows(recipe: Recipe) -> pd.DataFrame:
    """What the latents of CLIP's autoencoder say in an adapted tower: one row per half.

    readable, low, high: accuracy of a linear readout of the classes, fitted to training and scored on test images;
    what ``fidelity.measure`` gives on the first test images; correlations of data-set-level activations with CLIP's;
    latents per class in each group (ranks 10 and 100), ``group high`` and so on.
    """
    study, after = recipe.study, adapted_model(recipe)
    sae, layer, tau, n = study.sae, study.layer, study.profile.latents.tau, study.profile.data.batch_images
    train, test = (images(study, recipe.task, split) for split in ("train", "test"))
    rows = []
    for half, classes in halves(test).items():
        seen, unseen = Subset(train, classes), Subset(test, classes)
        few = first_images(test, classes, len(test) // 2)
        (x, counts), (x_test, _) = (image_latents(after.tower, sae, ds, layer, tau, n) for ds in (seen, unseen))
        before = clip_counts(study, recipe.task, classes)
        read_out = fit_readout(x, torch.from_numpy(seen.labels).to(x.device), PENALTY)
        told = wilson_interval(read_out(x_test).argmax(1).cpu().numpy() == unseen.labels)
        sizes = group_sizes(before, counts, [UPPER], [LOWER])
        quality = measure(after.tower, sae, few, after.text(few.class_names), layer, batch_images=n)[FIDELITY]
        rows.append({"half": half, "readable": told["accuracy"], "low": told["low"], "high": told["high"]}
                    | quality.to_dict() | correlations(before.sum(0), counts.sum(0))
                    | {f"group {name}": size for name, size in zip(sizes["group"], sizes["mean"])})
    return pd.DataFrame(rows)


def concept_rows(recipe: Recipe) -> pd.DataFrame:
    """How well every ground-truth concept of the profile's own task is read from single patches in a tower that was
    adapted to a task: kind, concept, ap, share."""
    study, tower = recipe.study, adapted_model(recipe).tower
    splits = [read_split(tower, ds, study.layer, CONCEPT_IMAGES) for ds in (study.train, study.test)]
    return concept_readout(study.sae, *splits, PROBED)


# Tables -------------------------------------------------------------------------------------------------

ROWS = {"accuracy": accuracy_rows, "transfer": transfer_rows, "latents": latent_rows, "concepts": concept_rows}


def recipes(study: Study) -> dict[str, list[Recipe]]:
    """Table -> the adapted models whose rows it has."""
    s, own = study.profile.adaptation, study.profile.data.task

    def each(methods, tasks=s.tasks, seeds=s.seeds, classes="base"):
        return [Recipe(study, *which, classes) for which in itertools.product(tasks, methods, seeds)]

    plain, once = each(["zero-shot"], seeds=[0]), s.seeds[:1]
    return {"accuracy": each([*METHODS, UNTRAINED]), "transfer": each(KEPT, [own], classes="all"),
            "latents": plain + each(["maple"]) + each([UNTRAINED, "lora", "fine-tuning"], seeds=once),
            "concepts": plain[:1] + each(["maple"]) + each([UNTRAINED], seeds=once) if study.train.concepts else []}


def tables(study: Study) -> dict[str, pd.DataFrame]:
    """Every table of adaptation, "accuracy", "transfer", "latents" and "concepts", with the ``attrs`` of ``read``.

    As committed; where nothing is, the rows of one task and seed, of MaPLe and its start, are computed now, in the run
    folder. They are empty, and the note says why, where there is no task to adapt to or no text.
    """
    p, folder, wanted = study.profile, study.profile.data_dir / "adapted", recipes(study)
    if not p.adaptation.tasks or study.clip.tokenizer is None:
        lacking = "model has no tokenizer" if p.adaptation.tasks else "profile names no task in [adaptation]"
        note = f"The {lacking}, so that nothing is adapted: left out."
        return {name: noted(pd.DataFrame(), False, note) for name in ROWS}
    if not _file(folder, "accuracy").is_file():
        folder, task, seed = p.run_dir / "adapted", p.adaptation.tasks[0], p.adaptation.seeds[0]
        for name in ("accuracy", "latents", "concepts"):
            few = [r for r in wanted[name] if r.task == task and r.method in FEW and r.seed in (0, seed)]
            fill([_file(folder, name)], _groups(name, few))
    return {name: read([_file(folder, name)], _groups(name, chosen), remedy(p, len(chosen) * MINUTES[name]))[0]
            for name, chosen in wanted.items()}


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.csv"


def _groups(name: str, chosen: list[Recipe]) -> list[Group]:
    return [Group({"task": recipe.task, "method": recipe.method, "seed": recipe.seed}, _key(name, recipe),
                  functools.partial(_rows, name, recipe)) for recipe in chosen]


def _rows(name: str, recipe: Recipe) -> list[pd.DataFrame]:
    return [ROWS[name](recipe).round(6)]


def _key(name: str, recipe: Recipe) -> str:
    """What decides the rows of an adapted model in a table."""
    study = recipe.study
    p, own = study.profile, study.profile.data.task
    tasks = {"transfer": p.adaptation.tasks, "concepts": (own,)}.get(name, (recipe.task,))
    read_with = {} if name in ("accuracy", "transfer") else {
        "autoencoder": fingerprint(study.sae), "layer": study.clip.block(study.layer), "tau": p.latents.tau,
        "images": min(p.adaptation.images, len(recipe.train))}
    return result_key(VERSIONS[name], table=name, model=adaptation_key(recipe), **read_with,
                      tests=[study.images(task, "test").fingerprint() for task in tasks])


def farthest_task(latents: pd.DataFrame, seed: int) -> str:
    """The task to which MaPLe's adaptation changed the activations of the base classes most."""
    rows = latents[(latents["method"] == "maple") & (latents["seed"] == seed) & (latents["half"] == "base")]
    return rows.loc[rows["pearson_log"].idxmin(), "task"]


def sae_of_the_adapted(study: Study, task: str) -> SparseAutoencoder | None:
    """The autoencoder of the profile's settings and images, trained on the tower that MaPLe adapted to ``task``; None
    where weights are given, which are the same for every tower."""
    if study.profile.sae.weights:
        return None
    return trained_sae(study.profile, _maple_tower(study, task), study.train)


def _maple_tower(study: Study, task: str) -> Clip:
    return adapted_model(Recipe(study, task, "maple", study.profile.adaptation.seeds[0])).tower


def run(study: Study) -> None:
    """Make every table, and keep the adapted models that notebooks look into."""
    p, folder = study.profile, study.profile.data_dir / "adapted"
    if not p.adaptation.tasks or study.clip.tokenizer is None:
        return
    for name, chosen in recipes(study).items():
        fill([_file(folder, name)], _groups(name, chosen))
    for recipe in recipes(study)["accuracy"]:
        target = folder / adaptation_key(recipe)
        if recipe.method in KEPT and not (target / "prompts.safetensors").is_file():
            adapted_model(recipe).tower.save(target)
    if not p.sae.weights:
        far = farthest_task(pd.read_csv(_file(folder, "latents")), p.adaptation.seeds[0])
        sae_of_the_adapted(study, far).save_pretrained(committed_folder(p, _maple_tower(study, far)))
