"""Table 2: one autoencoder per configuration, trained once by ``make mini-artifacts`` and read by notebook 01."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from patchsae.config import Profile
from patchsae.sae import SparseAutoencoder
from patchsae.studies.fidelity import measure
from patchsae.studies.study import Study, committed_folder, run_folder, train_missing, trained_sae
from patchsae.studies.tables import Group, fill, missing, noted, read, remedy
from patchsae.train import new_saes
from patchsae.weights.files import result_key, write_atomically

#: Other activations than relu, with about as many active latents: jumprelu's lambda weighs L0, so that it is another.
ACTIVATIONS = {"TopK": {"activation": "topk"}, "BatchTopK": {"activation": "batchtopk"},
               "JumpReLU": {"activation": "jumprelu", "l1": 1.5}, "Matryoshka": {"activation": "matryoshka"}}
#: Configuration -> changes to the profile's [sae] settings; layers, seeds and "random" are added.
CHANGES = {"lambda 0": {"l1": 0.0}, "lambda x10": {"l1": 10}, "expansion x0.5": {"expansion": 0.5},
           "expansion x2": {"expansion": 2}, "ghost off": {"ghost": False}, "b_dec mean": {"b_dec": "mean"},
           "b_dec geometric median": {"b_dec": "geometric_median"}, "class token only": {"tokens": "cls"},
           **ACTIVATIONS}
#: These are factors on the profile's value, the others values.
FACTORS = ("l1", "expansion")
#: Autoencoders that other notebooks look into.
KEPT = ("default", "layer", "class token")
SEEDS = 3
#: Of the log of an autoencoder that is kept, every tenth step is.
LOG_EVERY = 10
#: Raised when measuring gives other numbers from the same settings.
VERSION = 1
#: What a row of the mini profile takes on two cores.
MINUTES = 1.5


def variants(profile: Profile, changes: dict[str, dict]) -> dict[str, Profile]:
    """Configuration -> profile: the default, then one change at a time, then the layers it is compared with."""
    changed = {"default": profile}
    for name, settings in changes.items():
        changed[name] = profile.with_sae(**{
            key: value * getattr(profile.sae, key) if key in FACTORS else value for key, value in settings.items()})
    return changed | {f"layer {layer}": profile.at_layer(layer) for layer in profile.model.other_layers}


def configurations(profile: Profile) -> dict[tuple[str, int], Profile]:
    """(name, seed) -> profile, in the order of the table; the default comes with several seeds."""
    default = {("default", seed): dataclasses.replace(profile, seed=seed) for seed in seeds(profile)}
    once = {(name, profile.seed): changed for name, changed in variants(profile, CHANGES).items()}
    return default | once | {("random", profile.seed): profile}


def seeds(profile: Profile) -> range:
    """The seeds of what comes with several: given weights are the same with every one."""
    return range(profile.seed, profile.seed + (1 if profile.sae.weights else SEEDS))


def table2(study: Study, quality: pd.DataFrame) -> pd.DataFrame:
    """The profile's sweep: configuration, seed, key and what ``fidelity.measure`` gives; ``attrs`` as in ``tables``.

    Where it is of other settings or not made yet, what was measured now stands with it: ``quality`` has a column for
    "trained" and one for "random".
    """
    profile, groups = study.profile, _groups(study)
    table, = read([_file(profile)], groups, remedy(profile, len(groups) * MINUTES))
    if table.attrs["current"]:
        return table
    names = {"trained": "these settings"} if len(table) else {"trained": "default", "random": "random"}
    measured = quality[list(names)].T.rename(names).rename_axis("configuration").reset_index()
    beside = [part for part in (table, measured.assign(seed=profile.seed, key="")) if len(part)]
    return noted(pd.concat(beside, ignore_index=True), **table.attrs)


def committed_row(study: Study) -> pd.Series | None:
    """The row of the committed table with exactly these settings, or None."""
    path = _file(study.profile)
    table = pd.read_csv(path) if path.is_file() else pd.DataFrame({"key": [], "configuration": []})
    rows = table[(table["key"] == _key(study)) & (table["configuration"] != "random")]
    return None if rows.empty else rows.iloc[0]


def published(name: str) -> pd.DataFrame:
    """A table as it is printed: "table1" and "table2" of the paper, "maple" of MaPLe's."""
    return pd.read_csv(Path(__file__).with_name(f"published_{name}.csv"))


def run(study: Study) -> None:
    """Train and measure whatever the table does not have yet; keep the autoencoders that notebooks look into."""
    train_together([_file(study.profile)], _groups(study), study)
    fill([_file(study.profile)], _groups(study))


def train_together(files: Sequence[Path], groups: Sequence[Group], study: Study) -> None:
    """Train the autoencoders of the rows that a table lacks, in as few passes over the images as can be."""
    train_missing([group.trains for group in missing(files, groups) if group.trains], study.clip, study.train)


def _file(profile: Profile) -> Path:
    return profile.data_dir / "table2.csv"


def _groups(study: Study) -> list[Group]:
    changed = {names: study.variant(profile) for names, profile in configurations(study.profile).items()}
    return [Group({"configuration": name, "seed": seed}, _key(variant), functools.partial(_row, name, variant),
                  variant.profile if name != "random" else None)
            for (name, seed), variant in changed.items()]


def _key(study: Study) -> str:
    """What decides a row, besides its configuration."""
    return result_key(VERSION, clip=study.clip_key, settings=study.profile.sae_settings(),
                      images=study.test.fingerprint(), templates=study.profile.model.templates)


def _row(name: str, study: Study) -> list[pd.DataFrame]:
    """Measure one autoencoder on the test split."""
    p = study.profile
    numbers = measure(study.clip, _sae(name, study), study.test, study.text, study.layer, p.sae.tokens,
                      p.data.batch_images)
    return [numbers.round(6).to_frame().T]


def _sae(name: str, study: Study) -> SparseAutoencoder:
    """The autoencoder of one configuration. Those that notebooks 02 to 04 look into are kept among committed data."""
    profile, clip = study.profile, study.clip
    if name == "random":
        return new_saes([profile], clip, study.train)[0]
    sae, target = trained_sae(profile, clip, study.train), committed_folder(profile, clip)
    if name.startswith(KEPT) and not profile.sae.weights and not (target / "sae.safetensors").is_file():
        log = pd.read_csv(run_folder(profile, clip) / "log.csv")[LOG_EVERY - 1::LOG_EVERY]
        write_atomically(target / "log.csv", lambda path: log.to_csv(path, index=False))
        sae.save_pretrained(target)
    return sae
