"""The mini profile's table 2: one autoencoder per configuration, trained once by ``make mini-artifacts``.

Rows are keyed by their settings and the model's weights; what is already in the table is not trained again.
"""

import dataclasses
import shutil
from pathlib import Path

import pandas as pd

from patchsae.clip import Clip, class_prototypes, load_clip
from patchsae.config import ROOT, Profile, device
from patchsae.data.datasets import open_dataset, templates
from patchsae.studies.fidelity import measure
from patchsae.studies.study import committed_folder, run_folder
from patchsae.train import new_sae, run_key, train_sae
from patchsae.weights.files import write_atomically

#: Other activations than relu, with about as many active latents: jumprelu's lambda weighs L0, so that it is another.
ACTIVATIONS = {"TopK": {"activation": "topk"}, "BatchTopK": {"activation": "batchtopk"},
               "JumpReLU": {"activation": "jumprelu", "l1": 1.5}, "Matryoshka": {"activation": "matryoshka"}}
#: Configuration -> changes to the profile's [sae] settings; layers and seeds are added in ``configurations``.
CHANGES = {"default": {}, "lambda 0": {"l1": 0.0}, "lambda x10": {"l1": 10}, "expansion x0.5": {"expansion": 0.5},
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


def configurations(profile: Profile) -> dict[tuple[str, int], Profile]:
    """(name, seed) -> profile, in the order of the table; the default comes with three seeds."""
    rows = {}
    for name, changes in CHANGES.items():
        factors = {k: v * getattr(profile.sae, k) for k, v in changes.items() if k in FACTORS}
        rows[name, profile.seed] = profile.with_sae(**changes | factors)
    rows |= {(f"layer {layer}", profile.seed): profile.at_layer(layer) for layer in profile.model.other_layers}
    seeds = range(profile.seed, profile.seed + SEEDS)
    default = {("default", s): dataclasses.replace(profile, seed=s) for s in seeds}
    return default | rows | {("random", profile.seed): profile}


def table_path(profile: Profile) -> Path:
    """The committed table."""
    return profile.data_dir / "table2.csv"


def table2(profile: Profile, quality: pd.DataFrame) -> pd.DataFrame:
    """The profile's sweep: configuration, seed, key and what ``fidelity.measure`` gives.

    Where the profile has none (``make mini-artifacts`` makes one), ``quality`` stands in for it: a column of
    measurements for "trained" and one for "random".
    """
    if table_path(profile).is_file():
        return pd.read_csv(table_path(profile))
    rows = quality.T.rename({"trained": "default"}).rename_axis("configuration").reset_index()
    return rows.assign(seed=profile.seed, key="")


def committed_row(profile: Profile, clip: Clip) -> pd.Series | None:
    """The row of the committed table with exactly these settings, or None."""
    table = pd.read_csv(table_path(profile)) if table_path(profile).is_file() else pd.DataFrame({"key": []})
    found = table[(table["key"] == run_key(profile, clip)) & (table.get("configuration") != "random")]
    return None if found.empty else found.iloc[0]


def published(name: str) -> pd.DataFrame:
    """A table as the paper prints it, from ``data/published_<name>.csv``."""
    return pd.read_csv(ROOT / "data" / f"published_{name}.csv")


def row(name: str, profile: Profile, clip: Clip, sae) -> dict:
    """Measure one autoencoder on the test split: one row of the table."""
    test = open_dataset(profile, profile.data.task, "test")
    text = class_prototypes(clip, test.class_names, templates(profile, profile.data.task))
    numbers = measure(clip, sae, test, text, profile.model.layer, profile.sae.tokens, profile.data.batch_images)
    return {"configuration": name, "seed": profile.seed, "key": run_key(profile, clip)} | numbers.round(6).to_dict()


def run(profile: Profile) -> pd.DataFrame:
    """Train and measure whatever the table does not have yet; keep the autoencoders that notebooks look into."""
    clip, path = load_clip(profile.model.name, device()), table_path(profile)
    done = pd.read_csv(path).to_dict("records") if path.is_file() else []
    rows = []
    for (name, _), changed in configurations(profile).items():
        known = [r for r in done if (r["configuration"], r["key"]) == (name, run_key(changed, clip))]
        rows += known or [row(name, changed, clip, _sae(name, changed, clip))]
        _save(path, table := pd.DataFrame(rows))
        print(table.tail(1).to_string(header=False), flush=True)
    return table


def _save(path: Path, table: pd.DataFrame) -> None:
    write_atomically(path, lambda temporary: table.to_csv(temporary, index=False))


def _sae(name: str, profile: Profile, clip: Clip):
    """Train one configuration. Those that notebooks 02 to 04 look into are kept among the committed data."""
    train = open_dataset(profile, profile.data.task, "train")
    if name == "random":
        return new_sae(profile, clip, train)
    sae, _ = train_sae(profile, clip, train, run_folder(profile, clip))
    if name.startswith(KEPT):
        folder = shutil.copytree(run_folder(profile, clip), committed_folder(profile, clip), dirs_exist_ok=True)
        log = pd.read_csv(folder / "log.csv")[LOG_EVERY - 1::LOG_EVERY]
        write_atomically(folder / "log.csv", lambda path: log.to_csv(path, index=False))
    return sae
