"""Tables over tasks of known truth: every way to adapt, what it gains, what can be read out, and what changed."""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import CLIPModel

from patchsae.activations import load_pixels
from patchsae.clip import Clip
from patchsae.data.datasets import Subset
from patchsae.data.images import Images
from patchsae.sae import SparseAutoencoder
from patchsae.studies import diffing
from patchsae.studies.adapt import METHODS, UNTRAINED, Recipe, adaptation_key, adapted_model, halves
from patchsae.studies.adaptation import correlations, groups
from patchsae.studies.adaptation_sweep import accuracy_rows, images
from patchsae.studies.diffing import Tokens, read_tokens
from patchsae.studies.intervals import wilson_interval
from patchsae.studies.recovery import read_split
from patchsae.studies.remapping import PENALTY
from patchsae.studies.study import Study, fingerprint
from patchsae.studies.tables import Group, fill, noted, read, remedy
from patchsae.studies.truths import summary
from patchsae.studies.variance import Variance
from patchsae.weights.files import result_key
from patchsae.world.probes import fit_readout
from patchsae.world.scenes import TRUTHS

#: The tables, by what they are about.
FILES = {"accuracy": ["accuracy"], "latents": ["readouts", "changes"], "crosscoders": ["crosscoders"],
         "planted": ["planted"]}
#: Of methods that change the image tower, those whose tokens a crosscoder compares with CLIP's, and on how many images.
COMPARED = (("maple", "shots"), ("lora", "all"), ("fine-tuning", "all"))
#: Methods that are given all images too. CoOp is not: it learns four words.
WITH_ALL = ("maple", "lora", "linear probe", "fine-tuning")
#: Share of the training steps of CLIP's autoencoder that are added to adapt it to another tower or other images.
STAGE = 0.05
#: Seeds of planted changes, others than those that the crosscoder's settings were found with, and training steps there.
PLANTED, PLANTED_STEPS = (11, 12, 13), 3000
#: Ranks that end "high" and begin "low", as shares of the dictionary.
HIGH, LOW = 0.045, 0.45
#: Of a crosscoder: latents and active latents for one of the autoencoder's, and training steps.
WIDER, MORE_ACTIVE, STEPS = 2, 1.5, 1000
#: Random halves of its latents that are patched.
RANDOM = 5
#: Raised when measuring gives other numbers from the same settings.
VERSION = 1
#: What a group of rows of the mini profile takes on two cores.
MINUTES = {"accuracy": 0.4, "latents": 0.3, "crosscoders": 0.8, "planted": 0.8}


def base_images(study: Study, task: str) -> list[Images]:
    """Training and test images of the base half of a task."""
    both = (images(study, task, split) for split in ("train", "test"))
    return [Subset(ds, halves(ds)["base"]) for ds in both]


# Readouts -----------------------------------------------------------------------------------------------

@torch.no_grad()
def told_of(tower: Clip, sae: SparseAutoencoder, seen: Tokens, layer: int) -> dict[str, torch.Tensor]:
    """What readouts are fitted to: summaries of latents ``[N,3S]`` and of tokens ``[N,3D]``, and the class token as it
    comes out of the tower ``[N,P]``."""
    whole = torch.cat([seen.z, seen.prompts], 1)
    return {"latents": summary(sae.encode(seen.z)), "z": summary(seen.z),
            "class token": torch.cat([tower.above(part, layer) for part in whole.split(64)])}


def readout_rows(fitted: dict[str, torch.Tensor], labels: torch.Tensor, tested: dict[str, torch.Tensor],
                 truth: torch.Tensor) -> pd.DataFrame:
    """How well a linear readout of each of several things tells the classes: columns source, n, accuracy, low, high."""
    return pd.DataFrame([{"source": name} | wilson_interval(
        (fit_readout(fitted[name], labels, PENALTY)(tested[name]).argmax(1) == truth).numpy()) for name in fitted])


def _readouts(recipe: Recipe, tower: Clip, train: Tokens, test: Tokens) -> pd.DataFrame:
    """Readouts of the base half from a tower, fitted to the shots of the recipe's seed and to all images."""
    study = recipe.study
    tested = told_of(tower, study.sae, test, study.layer)
    shots = read_tokens(tower, recipe._replace(images="shots").shots(), study.layer)
    return pd.concat([readout_rows(told_of(tower, study.sae, seen, study.layer), seen.labels, tested, test.labels)
                      .assign(fitted=name) for name, seen in (("shots", shots), ("all", train))])


def _floors(recipe: Recipe) -> pd.DataFrame:
    """What can be read from the pixels themselves, and from the tokens of a tower of the same shape with random
    weights."""
    study, (train, test) = recipe.study, base_images(recipe.study, recipe.task)
    torch.manual_seed(recipe.seed)
    random = Clip(CLIPModel(study.clip.model.config).to(study.clip.device))
    fitted, tested = {}, {}
    for ds, found in ((train, fitted), (test, tested)):
        seen = read_tokens(random, ds, study.layer)
        found |= {"untrained tower": summary(seen.z), "pixels": load_pixels(study.clip, ds, range(len(ds))).pixels
                  .cpu().flatten(1)}
    labels = (torch.as_tensor(ds.labels) for ds in (train, test))
    return readout_rows(fitted, next(labels), tested, next(labels)).assign(fitted="all")


# Changes ------------------------------------------------------------------------------------------------

def latent_rows(recipe: Recipe) -> list[pd.DataFrame]:
    """Of the base half of a task: the table of readouts from the adapted tower, and one row of what changed.

    The row: R with its interval (``diffing.change_left_out``); explained variance of patch tokens before (``ev_clip``)
    and after (``ev_frozen``), and with CLIP's autoencoder trained on for a while on these images as CLIP sees them
    (``ev_data``) and as the adapted tower sees them (``ev_model``); R of the latter, ``R_stage``, and what is readable
    from its latents, ``readable_stage``; correlations of activations before and after; latents per class that enter and
    leave the first ranks, as shares of those (``enter``, ``leave``).
    """
    study, (train, test) = recipe.study, base_images(recipe.study, recipe.task)
    tower, plain = adapted_model(recipe).tower, recipe.method == "zero-shot"
    seen, unseen = (read_tokens(tower, ds, study.layer) for ds in (train, test))
    readouts = _readouts(recipe, tower, seen, unseen)
    if plain:
        return [pd.concat([readouts, _floors(recipe)]), pd.DataFrame([{"ev_clip": explained(study.sae, unseen.z)}])]
    before = [read_tokens(study.clip, ds, study.layer) for ds in (train, test)]
    return [readouts, pd.DataFrame([_changes(study, before, (seen, unseen))])]


def _changes(study: Study, before: Sequence[Tokens], after: Sequence[Tokens]) -> dict[str, float]:
    """The row of ``latent_rows``, from the tokens of training and test images before and after."""
    sae, (train, test), (seen, unseen) = study.sae, before, after
    steps = round(STAGE * study.profile.sae.steps)
    of_data, of_model = (diffing.continued(sae, tokens.z, study.profile.sae, steps) for tokens in (train, seen))
    counts = [_class_counts(study, tokens) for tokens in (train, seen)]
    high, low = (max(1, round(share * sae.n_latents)) for share in (HIGH, LOW))
    moved = {name: members.sum(1).double().mean().item() / high for name, members in groups(*counts, high, low).items()}
    stage = diffing.change_left_out(of_model, test.z, unseen.z)
    with torch.no_grad():
        readable, = readout_rows({"": summary(of_model.encode(seen.z))}, seen.labels,
                                 {"": summary(of_model.encode(unseen.z))}, unseen.labels)["accuracy"]
    return (diffing.change_left_out(sae, test.z, unseen.z)
            | {"ev_clip": explained(sae, test.z), "ev_frozen": explained(sae, unseen.z),
               "ev_data": explained(of_data, unseen.z), "ev_model": explained(of_model, unseen.z),
               "R_stage": stage["R"], "readable_stage": readable}
            | correlations(*(count.sum(0) for count in counts))
            | {"enter": moved["low to high"], "leave": moved["high to low"]})


@torch.no_grad()
def _class_counts(study: Study, tokens: Tokens) -> torch.Tensor:
    """On how many tokens of each class every latent is active: ``[C,S]``."""
    active = (study.sae.encode(tokens.z) > study.profile.latents.tau).sum(1)
    return torch.zeros(int(tokens.labels.max()) + 1, active.shape[1], dtype=torch.long).index_add_(
        0, tokens.labels, active)


@torch.no_grad()
def explained(sae: SparseAutoencoder, z: torch.Tensor) -> float:
    """Explained variance of patch tokens, of ``z [N,T,D]``."""
    variance = Variance()
    variance.add(z[:, 1:], sae(z[:, 1:]))
    return variance.explained()


# Crosscoders --------------------------------------------------------------------------------------------

def crosscoder_rows(recipe: Recipe) -> pd.DataFrame:
    """A crosscoder of CLIP and the adapted tower on the training images of the base half, one row.

    ev (of both towers' tokens); before, after: shares of its active latents that are one tower's alone, before_by_norm
    and after_by_norm by their relative norm alone; changed: of those whose decoder rows differ. What latents carry of
    what the adapted tower makes of the change: patched_most, the half with the largest relative norms; patched_rest,
    the others; patched_matched, random halves alike in frequency (their mean; patched_low, patched_high: their range).
    """
    study, after = recipe.study, adapted_model(recipe)
    ds = base_images(study, recipe.task)[0]
    plain, seen = (read_tokens(tower, ds, study.layer) for tower in (study.clip, after.tower))
    crosscoder = _crosscoder(study, plain.z, seen.z, recipe.seed, STEPS)
    table = diffing.crosscoder_latents(crosscoder, plain.z, seen.z)
    active = table[table["frequency"] > 0]

    def carried(latents) -> float:
        return diffing.patched_share(crosscoder, after, ds.class_names, (plain, seen), study.layer, latents)

    order = np.argsort(-table["relative_norm"].to_numpy(), kind="stable")
    alike = [carried(half) for half in _matched_halves(table["frequency"].to_numpy(), RANDOM, recipe.seed)]
    return pd.DataFrame([{
        "ev": explained(crosscoder, torch.cat([plain.z, seen.z], -1)),
        "before": (active["specific"] == "before").mean(), "after": (active["specific"] == "after").mean(),
        "before_by_norm": (active["relative_norm"] <= 1 - diffing.NORM).mean(),
        "after_by_norm": (active["relative_norm"] >= diffing.NORM).mean(),
        "changed": (active["change"] >= diffing.CHANGED).mean(),
        "patched_most": carried(order[:len(order) // 2]), "patched_rest": carried(order[len(order) // 2:]),
        "patched_matched": np.mean(alike), "patched_low": min(alike), "patched_high": max(alike)}])


def _crosscoder(study: Study, before: torch.Tensor, after: torch.Tensor, seed: int, steps: int) -> diffing.Crosscoder:
    """A crosscoder of a size that goes with the profile's autoencoder."""
    active = round(MORE_ACTIVE * study.profile.sae.k)
    return diffing.train_crosscoder(before, after, WIDER * study.sae.n_latents, active, steps, seed)


def _matched_halves(frequency: np.ndarray, n: int, seed: int) -> list[np.ndarray]:
    """Halves of the latents that are alike in frequency: of every two neighbours in its order one, drawn at random."""
    order, rng = np.argsort(-frequency, kind="stable"), np.random.default_rng(seed)
    pairs = order[:len(order) // 2 * 2].reshape(-1, 2)
    return [pairs[np.arange(len(pairs)), rng.integers(0, 2, len(pairs))] for _ in range(n)]


def planted_rows(study: Study, seed: int) -> pd.DataFrame:
    """Planted changes (``diffing.plant``) and what a crosscoder finds of them: rule, kind, recall, false_positives
    as of ``diffing.detected``.

    Where nothing was planted all that is named is false: CLIP beside itself, and beside prompts that nobody trained.
    """
    split = read_split(study.clip, study.train, study.layer, study.profile.adaptation.images)
    untrained = adapted_model(Recipe(study, study.profile.data.task, UNTRAINED, seed)).tower
    changed, rows = diffing.plant(study.sae, split.z, split.positives, seed), []
    beside = {"nothing": split.z, UNTRAINED: read_split(untrained, study.train, study.layer, len(split.z)).z,
              "planted": changed.after}
    for kind, after in beside.items():
        crosscoder = _crosscoder(study, split.z, after, seed, PLANTED_STEPS)
        latents = diffing.crosscoder_latents(crosscoder, split.z, after)
        rows.append(diffing.detected(crosscoder, latents, changed) if kind == "planted" else
                    diffing.detected(crosscoder, latents).assign(kind=kind))
    return pd.concat(rows)


# Tables -------------------------------------------------------------------------------------------------

ROWS = {"accuracy": lambda recipe: [accuracy_rows(recipe)], "latents": latent_rows,
        "crosscoders": lambda recipe: [crosscoder_rows(recipe)]}


def recipes(study: Study) -> dict[str, list[Recipe]]:
    """Table -> the adapted models whose rows it has.

    Accuracy: every seed with a few shots, the first with all images; latents, of what changes the image tower: the
    first seed, and of MaPLe every one.
    """
    seeds = study.profile.adaptation.seeds
    few = [Recipe(study, *which) for which in itertools.product(TRUTHS, [*METHODS, UNTRAINED], seeds)]
    every = [Recipe(study, *which, images="all") for which in itertools.product(TRUTHS, WITH_ALL, seeds[:1])]
    changed = [recipe for recipe in few + every if recipe.method not in ("coop", "linear probe")
               and (recipe.seed == seeds[0] or recipe.method == "maple")]
    plain = [Recipe(study, task, "zero-shot") for task in TRUTHS]
    compared = [recipe for recipe in changed if (recipe.method, recipe.images) in COMPARED and recipe.seed == seeds[0]]
    return {"accuracy": few + every, "latents": plain + changed, "crosscoders": compared}


def _groups(study: Study, name: str) -> list[Group]:
    if name == "planted":
        own = [Recipe(study, study.profile.data.task, UNTRAINED, seed) for seed in PLANTED]
        return [Group({"seed": recipe.seed}, _key(name, recipe), functools.partial(_planted, study, recipe.seed))
                for recipe in own]
    return [Group({"task": r.task, "truth": TRUTHS[r.task], "method": r.method, "images": r.images, "seed": r.seed},
                  _key(name, r), functools.partial(_rows, name, r)) for r in recipes(study)[name]]


def _planted(study: Study, seed: int) -> list[pd.DataFrame]:
    return [planted_rows(study, seed).round(4)]


def _rows(name: str, recipe: Recipe) -> list[pd.DataFrame]:
    return [table.round(5) for table in ROWS[name](recipe)]


def _key(name: str, recipe: Recipe) -> str:
    """What decides the rows of an adapted model."""
    study = recipe.study
    p, layer = study.profile, study.clip.block(study.layer)
    read_with = {} if name == "accuracy" else {"autoencoder": fingerprint(study.sae), "tau": p.latents.tau,
                                               "sae": p.sae_settings()}
    if name in ("crosscoders", "planted"):
        read_with["k"] = p.sae.k  # which relu does not have among its settings
    return result_key(VERSION, table=name, model=adaptation_key(recipe), layer=layer, most=p.adaptation.images,
                      test=study.images(recipe.task, "test").fingerprint(), **read_with)


def _files(study: Study, name: str) -> list[Path]:
    return [study.profile.data_dir / "truth" / f"{file}.csv" for file in FILES[name]]


def tables(study: Study) -> dict[str, pd.DataFrame]:
    """Every table, with the ``attrs`` of ``tables.read``; empty for a profile whose images are not drawn."""
    if study.profile.data.source != "scenes":
        note = "Only drawn scenes have tasks whose truth is known: left out."
        return {file: noted(pd.DataFrame(), False, note) for files in FILES.values() for file in files}
    found = {}
    for name, files in FILES.items():
        groups = _groups(study, name)
        found |= zip(files, read(_files(study, name), groups, remedy(study.profile, len(groups) * MINUTES[name])))
    return found


def run(study: Study) -> None:
    """Fill every table with what it lacks."""
    if study.profile.data.source == "scenes":
        for name in FILES:
            fill(_files(study, name), _groups(study, name))
