"""Concept recovery of every method and variant with three seeds: tables trained once by ``make mini-artifacts``.

``concept_recovery.csv`` has a row a concept, ``recovery_samples.csv`` the share of concepts recovered in every
bootstrap sample of test scenes, the same samples for all rows, so that differences between methods are paired. Rows are
keyed by their settings and the model's weights; what is already in the tables is not computed again.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from patchsae.clip import Clip, load_clip
from patchsae.config import Profile, device
from patchsae.data.datasets import open_dataset
from patchsae.data.masked import open_masked
from patchsae.studies import controls
from patchsae.studies.recovery import (
    BAR,
    COUNTED,
    Directions,
    Recovery,
    Split,
    latent_directions,
    read_split,
    recover,
    resamples,
    shared_concepts,
)
from patchsae.studies.study import trained_sae
from patchsae.studies.sweep import ACTIVATIONS
from patchsae.train import run_key
from patchsae.weights.files import write_atomically

#: Variant -> factor on a setting of [sae], or another value of it; layers are added from the profile.
VARIANTS = {"lambda x0.5": {"l1": 0.5}, "lambda x2": {"l1": 2}, "expansion x0.5": {"expansion": 0.5},
            "expansion x2": {"expansion": 2}, "b_dec geometric median": {"b_dec": "geometric_median"}, **ACTIVATIONS}
SEEDS = 3
#: Methods that train nothing: notebook 07 has them where the tables are not made yet.
CHEAP = ("autoencoder", "principal components", "neurons", "hidden neurons", "random autoencoder", "linear probe")
#: Training scenes that candidates are matched on, at most.
MATCH_IMAGES = 2048
TABLES = ("concept_recovery.csv", "recovery_samples.csv")
#: What names a row of the tables.
NAMES = ["configuration", "method", "seed", "key"]


def variants(profile: Profile) -> dict[str, Profile]:
    """Configuration -> profile: the default, then one change at a time."""
    found = {"default": profile}
    for name, changes in VARIANTS.items():
        values = {k: v * getattr(profile.sae, k) if isinstance(v, (int, float)) else v for k, v in changes.items()}
        found[name] = profile.with_sae(**values)
    return found | {f"layer {layer}": profile.at_layer(layer) for layer in profile.model.other_layers}


def splits(profile: Profile, clip: Clip) -> list[Split]:
    """The scenes to match on and the scenes to score on, with the concepts that both show."""
    sizes = {"train": min(MATCH_IMAGES, profile.data.train_images), "test": profile.data.test_images}
    return shared_concepts(*(read_split(clip, open_masked(profile, clip, split), profile.model.layer, n)
                             for split, n in sizes.items()))


def methods(configuration: str, profile: Profile, clip: Clip, first_seed: int) -> dict:
    """Method -> function of the two splits that gives candidates and the two splits they read.

    The default has every control; other widths have k-means with as many centroids, and layers their autoencoder.
    Without chance in them, neurons and the probe are the same for every seed: they come with the first.
    """
    train, seed = open_dataset(profile, profile.data.task, "train"), profile.seed
    width = round(profile.sae.expansion * clip.width)

    def hidden(*both: Split):
        both = [controls.hidden_neurons(clip, open_masked(profile, clip, split), profile.model.layer, own)
                for split, own in zip(("train", "test"), both)]
        return controls.neurons(both[0]), *both

    found = {"autoencoder": lambda *both: (latent_directions(trained_sae(profile, clip, train)), *both),
             "k-means": lambda *both: (controls.clusters(both[0], width, seed), *both),
             "principal components": lambda *both: (controls.principal_components(both[0], seed), *both),
             "neurons": lambda *both: (controls.neurons(both[0]), *both), "hidden neurons": hidden,
             "random autoencoder": lambda *both: (controls.random_autoencoder(profile, clip, train), *both),
             "shuffled autoencoder": lambda *both: (controls.shuffled_autoencoder(profile, clip, train), *both),
             "linear probe": lambda *both: (controls.probe(both[0]), *both)}
    if configuration != "default":
        kept = ("autoencoder", "k-means") if "expansion" in configuration else ("autoencoder",)
        found = {k: found[k] for k in kept}
    once = ("neurons", "hidden neurons", "linear probe")
    return {k: v for k, v in found.items() if k not in once or seed == first_seed}


def tables(profile: Profile, clip: Clip) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The two tables of the profile; where they are not made yet, the first seed of what needs no training."""
    paths = [profile.data_dir / name for name in TABLES]
    if all(path.is_file() for path in paths):
        return tuple(pd.read_csv(path) for path in paths)
    print(f"There is no {paths[0].name} of the profile {profile.name}: what follows has one seed, the default and the "
          f"controls that need no training; make mini-artifacts PROFILE={profile.name} trains the rest.")
    both, found = splits(profile, clip), []
    for method, make in methods("default", profile, clip, profile.seed).items():
        if method in CHEAP:
            names = ("default", method, profile.seed, run_key(profile, clip))
            found.append(_labelled(names, *_recovered(make, both, profile.seed)))
    return tuple(pd.concat(parts, ignore_index=True) for parts in zip(*found))


def recovered(recovery: Recovery) -> pd.DataFrame:
    """Share of concepts recovered in every bootstrap sample: a row a kind, and "together" for those that count."""
    kinds = recovery.table["kind"].to_numpy()
    over = recovery.samples >= BAR
    groups = {"together": np.isin(kinds, COUNTED)} | {kind: kinds == kind for kind in dict.fromkeys(kinds)}
    return pd.DataFrame([(name, *over[:, own].mean(1).round(4)) for name, own in groups.items()],
                        columns=["kind", *map(str, range(len(over)))])


def rows(profile: Profile, clip: Clip, known: set) -> Iterator[tuple[tuple, Directions, Recovery]]:
    """Compute what is not in the tables: names of the row, its candidates, its recovery."""
    read = {}
    for configuration, changed in variants(profile).items():
        for seed in range(profile.seed, profile.seed + SEEDS):
            own = dataclasses.replace(changed, seed=seed)
            for method, make in methods(configuration, own, clip, profile.seed).items():
                names = (configuration, method, seed, run_key(own, clip))
                if names not in known:
                    layer = own.model.layer
                    read = read if layer in read else {layer: splits(own, clip)}
                    yield names, *_recovered(make, read[layer], profile.seed)


def _recovered(make: Callable, both: list[Split], seed: int) -> tuple[Directions, Recovery]:
    """The candidates of one method and what they recover."""
    directions, train, test = make(*both)
    return directions, recover(directions, train, test, resamples(len(test.z), seed))


def _labelled(names: tuple, directions: Directions, found: Recovery) -> list[pd.DataFrame]:
    """Rows of both tables, under the names of the row."""
    label = pd.DataFrame([dict(zip(NAMES, names))])
    table = found.table.assign(candidates=directions.weight.shape[1]).round(4)
    return [label.merge(part, how="cross") for part in (table, recovered(found))]


def run(profile: Profile) -> None:
    """Fill both tables with whatever they lack, a row of either at a time, and drop rows of other settings."""
    clip, paths = load_clip(profile.model.name, device()), [profile.data_dir / name for name in TABLES]
    old = [pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=NAMES) for path in paths]
    known = {tuple(names) for names in old[1][NAMES].drop_duplicates().to_numpy().tolist()}
    for names, directions, found in rows(profile, clip, known):
        new = _labelled(names, directions, found)
        old = [pd.concat([a, b], ignore_index=True) if len(a) else b for a, b in zip(old, new)]
        _write(paths, old)
        share = (found.table[found.table["kind"].isin(COUNTED)]["auprc"] >= BAR).mean()
        print(f"{names[0]}, {names[1]}, seed {names[2]}: {share:.1%}", flush=True)
    _write(paths, [_current(profile, clip, table) for table in old])


def _current(profile: Profile, clip: Clip, table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table that belong to today's settings, in the order of the variants."""
    order = [(name, method, seed, run_key(own, clip)) for name, changed in variants(profile).items()
             for own in (dataclasses.replace(changed, seed=s) for s in range(profile.seed, profile.seed + SEEDS))
             for seed in [own.seed] for method in methods(name, own, clip, profile.seed)]
    place = {names: i for i, names in enumerate(order)}
    at = [place.get(tuple(names), -1) for names in table[NAMES].to_numpy().tolist()]
    return table.assign(at=at)[np.array(at) >= 0].sort_values("at", kind="stable").drop(columns="at")


def _write(paths: list, parts: list) -> None:
    for path, table in zip(paths, parts):
        write_atomically(path, lambda temporary, table=table: table.to_csv(temporary, index=False))


def intervals(table: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """Share recovered by configuration, method and kind: mean over seeds, with a 95 % interval.

    The interval resamples test scenes, and seeds where there are several. ``minus``, ``minus_low`` and ``minus_high``:
    the default autoencoder's share minus this one, over the same resampled scenes. Columns besides: candidates.
    """
    over, columns = _shares(table), [c for c in samples if c.isdigit()]
    drawn = {names: _mix_seeds(own[columns].to_numpy(), i)
             for i, (names, own) in enumerate(samples.groupby(["configuration", "method", "kind"], sort=False))}
    found = []
    for (configuration, method, kind), own in drawn.items():
        reference, mine = ("default", "autoencoder", kind), (configuration, method, kind)
        difference = drawn[reference] - own
        found.append((*mine, over["candidates"][mine], over["share"][mine], *np.quantile(own, (0.025, 0.975)),
                      over["share"][reference] - over["share"][mine], *np.quantile(difference, (0.025, 0.975))))
    return pd.DataFrame(found, columns=["configuration", "method", "kind", "candidates", "share", "low", "high",
                                        "minus", "minus_low", "minus_high"])


def _shares(table: pd.DataFrame) -> pd.DataFrame:
    """Share of concepts over the bar by configuration, method and kind, averaged over seeds."""
    counted = table[table["kind"].isin(COUNTED)].assign(kind="together")
    both = pd.concat([counted, table])
    both = both.assign(share=both["auprc"] >= BAR)
    return both.groupby(["configuration", "method", "kind"])[["share", "candidates"]].mean()


def _mix_seeds(samples: np.ndarray, stream: int) -> np.ndarray:
    """Means over resampled seeds: ``[seeds,n] -> [n]``, each over scenes resampled in its own way."""
    drawn = np.random.default_rng(stream).integers(len(samples), size=samples.shape)
    return np.take_along_axis(samples, drawn, 0).mean(0)
