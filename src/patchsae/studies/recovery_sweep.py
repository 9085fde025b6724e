"""Concept recovery of every method and variant with three seeds: tables made once by ``make mini-artifacts``.

``concept_recovery.csv`` has a row a concept, ``recovery_samples.csv`` the share of concepts recovered in every
bootstrap sample of test scenes, the same samples for all rows, so that differences between methods are paired.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from patchsae.data.masked import open_masked
from patchsae.studies import controls
from patchsae.studies.intervals import percentiles
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
from patchsae.studies.study import Study, trained_sae
from patchsae.studies.sweep import ACTIVATIONS, seeds, train_together, variants
from patchsae.studies.tables import Group, fill, noted, read, remedy
from patchsae.weights.files import result_key

#: Variant -> changes to the profile's [sae] settings, as in ``sweep``; layers are added.
VARIANTS = {"lambda x0.5": {"l1": 0.5}, "lambda x2": {"l1": 2}, "expansion x0.5": {"expansion": 0.5},
            "expansion x2": {"expansion": 2}, "b_dec geometric median": {"b_dec": "geometric_median"}, **ACTIVATIONS}
#: The method that reads something else than the residual stream.
HIDDEN = "hidden neurons"
#: Methods that train nothing: notebook 09 has them where the tables are not made yet.
CHEAP = ("autoencoder", "principal components", "neurons", HIDDEN, "random autoencoder", "linear probe")
#: Methods without chance in them are the same for every seed.
ONCE = ("neurons", HIDDEN, "linear probe")
#: Training scenes that candidates are matched on, at most.
MATCH_IMAGES = 2048
TABLES = ("concept_recovery.csv", "recovery_samples.csv")
#: Raised when recovery gives other numbers from the same settings.
VERSION = 1
#: What a row of the mini profile takes on two cores.
MINUTES = 1.5


@functools.lru_cache(maxsize=1)
def splits(study: Study) -> list[Split]:
    """The scenes to match on and the scenes to score on, with the concepts that both show."""
    return shared_concepts(*(read_split(study.clip, ds, study.layer, n) for ds, n in _scenes(study)))


def _scenes(study: Study) -> Iterator[tuple]:
    """The images with masks of either split, and how many of them are read."""
    s = study.profile.data
    for split, n in (("train", min(MATCH_IMAGES, s.train_images)), ("test", s.test_images)):
        yield open_masked(study.profile, study.clip, split), n


def methods(configuration: str, study: Study) -> dict[str, Callable[[Split], Directions]]:
    """Method -> candidates from the scenes to match on. The default has every control; other widths have k-means with
    as many centroids, and layers their autoencoder."""
    p, clip = study.profile, study.clip
    width = round(p.sae.expansion * clip.width)
    every = {"autoencoder": lambda _: latent_directions(trained_sae(p, clip, study.train)),
             "k-means": lambda split: controls.clusters(split, width, p.seed),
             "principal components": lambda split: controls.principal_components(split, p.seed),
             "neurons": controls.neurons, HIDDEN: controls.neurons,
             "random autoencoder": lambda _: controls.random_autoencoder(study),
             "shuffled autoencoder": lambda _: controls.shuffled_autoencoder(study), "linear probe": controls.probe}
    kept = every if configuration == "default" else ("autoencoder", "k-means") if "expansion" in configuration else (
        "autoencoder",)
    return {name: every[name] for name in kept}


def tables(study: Study) -> list[pd.DataFrame]:
    """The two tables of the profile, with the ``attrs`` of ``read``.

    As committed; this autoencoder's rows stand with them as the configuration "these settings" where they are of
    others. Where nothing is committed, the first seed of what needs no training is computed now, in the run folder.
    """
    p = study.profile
    try:
        wanted = groups(study)
    except FileNotFoundError as error:  # no images with masks
        return [noted(pd.DataFrame(), False, str(error)) for _ in TABLES]
    here, advice = _files(p.run_dir), remedy(p, len(wanted) * MINUTES)
    committed = read(_files(p.data_dir), wanted, advice)
    if committed[0].empty:
        fill(here, [group for group in wanted if group.names["method"] in CHEAP and
                    (group.names["configuration"], group.names["seed"]) == ("default", p.seed)])
        return read(here, wanted, advice)
    if committed[0].attrs["current"]:
        return committed
    fill(here, [wanted[0]._replace(names=wanted[0].names | {"configuration": "these settings"})])
    return [noted(pd.concat([table, pd.read_csv(path)], ignore_index=True), **table.attrs)
            for table, path in zip(committed, here)]


def groups(study: Study) -> list[Group]:
    """What the tables have: every method of every variant with its seeds."""
    @functools.lru_cache(maxsize=1)
    def read_at(layer: int) -> list[Split]:
        return splits(study if layer == study.layer else study.variant(study.profile.at_layer(layer)))

    scenes = [[ds.fingerprint(), n] for ds, n in _scenes(study)]
    wanted = []
    for configuration, changed in variants(study.profile, VARIANTS).items():
        for seed in seeds(study.profile):
            variant = study.variant(dataclasses.replace(changed, seed=seed))
            for method, make in methods(configuration, variant).items():
                if seed == study.profile.seed or method not in ONCE:
                    key = result_key(VERSION, method=method, clip=study.clip_key, scenes=scenes,
                                     settings=variant.profile.sae_settings(), draws=study.profile.seed)
                    read_both = functools.partial(_hidden, study, read_at) if method == HIDDEN else read_at
                    compute = functools.partial(_rows, make, read_both, variant.layer, study.profile.seed)
                    names = {"configuration": configuration, "method": method, "seed": seed}
                    wanted.append(Group(names, key, compute, variant.profile if method == "autoencoder" else None))
    return wanted


def _files(folder: Path) -> list[Path]:
    return [folder / name for name in TABLES]


def _hidden(study: Study, read_at: Callable[[int], list[Split]], layer: int) -> list[Split]:
    """The splits with hidden neurons in the place of tokens."""
    both = zip(_scenes(study), read_at(layer))
    return [controls.hidden_neurons(study.clip, ds, layer, split) for (ds, _), split in both]


def _rows(make: Callable, read_both: Callable[[int], list[Split]], layer: int, seed: int) -> list[pd.DataFrame]:
    """What one method recovers: a row a concept, and shares in every bootstrap sample."""
    train, test = read_both(layer)
    directions = make(train)
    recovery = recover(directions, train, test, resamples(len(test.z), seed))
    return [recovery.table.assign(candidates=directions.weight.shape[1]).round(4), sampled_shares(recovery)]


def sampled_shares(recovery: Recovery) -> pd.DataFrame:
    """Share of concepts recovered in every bootstrap sample: a row a kind, and "together" for those that count."""
    kinds, over = recovery.table["kind"].to_numpy(), recovery.samples >= BAR
    counted = {"together": np.isin(kinds, COUNTED)} | {kind: kinds == kind for kind in dict.fromkeys(kinds)}
    return pd.DataFrame([(name, *over[:, which].mean(1).round(4)) for name, which in counted.items()],
                        columns=["kind", *map(str, range(len(over)))])


def run(study: Study) -> None:
    """Fill both tables with whatever they lack."""
    files, wanted = _files(study.profile.data_dir), groups(study)
    train_together(files, wanted, study)
    fill(files, wanted)


def intervals(table: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """Share recovered by configuration, method and kind: mean over seeds, with a 95 % interval.

    The interval resamples test scenes, and seeds where there are several. ``minus``, ``minus_low`` and ``minus_high``:
    the default autoencoder's share minus this one, over the same resampled scenes. Columns besides: candidates.
    """
    over, columns = _shares(table), [c for c in samples if c.isdigit()]
    drawn = {names: _mix_seeds(group[columns].to_numpy(), i)
             for i, (names, group) in enumerate(samples.groupby(["configuration", "method", "kind"], sort=False))}
    rows = []
    for (configuration, method, kind), shares in drawn.items():
        reference, this = ("default", "autoencoder", kind), (configuration, method, kind)
        rows.append((*this, over["candidates"][this], over["share"][this], *percentiles(shares),
                     over["share"][reference] - over["share"][this], *percentiles(drawn[reference] - shares)))
    return pd.DataFrame(rows, columns=["configuration", "method", "kind", "candidates", "share", "low", "high",
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
