"""A definition of remapping that could fail: what latents can tell before and after, and what is made of it.

The paper's claim is that adaptation gains accuracy by mapping concepts that are already there to classes. So before
adaptation a linear readout of the latents must already tell the classes as well as the adapted model does, and
adaptation must not make the latents tell much more. Both are measured on images that nothing was fitted to.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from patchsae.activations import token_batches
from patchsae.clip import Clip
from patchsae.data.images import Images
from patchsae.masks import concept_list, patch_concepts
from patchsae.sae import SparseAutoencoder
from patchsae.studies.adapt import Adapted
from patchsae.studies.adaptation import gain_parts, whole
from patchsae.studies.intervals import percentiles
from patchsae.studies.recovery import Split
from patchsae.studies.scores import average_precision
from patchsae.world.probes import fit_readout, image_embeddings

#: Weight of the sum of squared weights in every readout.
PENALTY = 1e-3


@torch.no_grad()
def image_latents(tower: Clip, sae: SparseAutoencoder, ds, layer: int, tau: float,
                  batch_images: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Image-level activations ``[N,S]``, means over image tokens, and class counts ``[C,S]`` (sec. 3.2, eq. 5).

    One pass; counts are those of ``collect_latents``. Prompt tokens are left out.
    """
    means, counts = [], torch.zeros(len(ds.class_names), sae.n_latents, dtype=torch.long, device=tower.device)
    for batch in token_batches(tower, ds, layer, batch_images):
        h = sae.encode(batch.z[:, :tower.n_tokens])
        means.append(h.mean(1))
        counts.index_add_(0, batch.labels.to(tower.device), (h > tau).sum(1))
    return torch.cat(means), counts.cpu()


def concept_readout(sae: SparseAutoencoder, train: Split, test: Split, kinds: Sequence[str]) -> pd.DataFrame:
    """How well each ground-truth concept can be read linearly from the latents of single patches.

    One regression per kind on the patches that show exactly one concept of the kind or none. Columns kind, concept, ap
    (area under the precision-recall curve), share (of patches, which is what chance gives).
    """
    tables = []
    with torch.no_grad():
        x, x_test = (sae.encode(split.patches.to(sae.W_enc.device)) for split in (train, test))
    for kind in kinds:
        columns = [i for i, (k, _) in enumerate(train.concepts) if k == kind]
        table = _kind_readout(x, train.positives[:, columns], x_test, test.positives[:, columns])
        tables.append(table.assign(kind=kind, concept=[train.concepts[i][1] for i in columns]))
    return pd.concat(tables, ignore_index=True)[["kind", "concept", "ap", "share"]].dropna()


def _kind_readout(x, y: np.ndarray, x_test, y_test: np.ndarray) -> pd.DataFrame:
    """Average precision of one regression for the concepts of one kind and for none of them."""
    clear, clear_test = y.sum(1) <= 1, y_test.sum(1) <= 1
    labels = np.where(y.any(1), y.argmax(1), y.shape[1])
    read = fit_readout(x[clear], torch.from_numpy(labels[clear]).to(x.device), PENALTY)
    scores, truth = read(x_test[clear_test]).softmax(1).cpu().numpy(), y_test[clear_test]
    ap = [average_precision(scores[:, i], truth[:, [i]])[0] if i < scores.shape[1] else np.nan
          for i in range(truth.shape[1])]
    return pd.DataFrame({"ap": ap, "share": truth.mean(0)})


def remapped_share(zero_shot: float, adapted: float, readable_before: float) -> float:
    """Share of the gain that a readout of the unadapted latents reaches: NaN without a gain.

        (min(readable before, adapted) - zero-shot) / (adapted - zero-shot), at least 0
    """
    if adapted <= zero_shot:
        return float("nan")
    return max(0.0, (min(readable_before, adapted) - zero_shot) / (adapted - zero_shot))


#: Measures that are made of a readout of the latents before, which is what defines the truth of a task.
DEFINING = ("gain not readable before", "readout gains, latents")


def measures(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """What each way of saying "something new was learned" says of each adapted model, larger where it says so more.

    ``tables``: "accuracy", "readouts", "changes" and "crosscoders" of ``truth_sweep``. One row per task, method, images
    and seed, with its truth, its ``gain`` on base classes and a column per measure; NaN where it was not taken.

    | measure | |
    |---|---|
    | gain not readable before | 1 - ``remapped_share``, by a readout of the latents fitted to all images |
    | the same, from shots | by a readout fitted to the shots alone |
    | readout gains, latents; z; class token | accuracy of a readout after less before |
    | a linear probe falls short | accuracy of the adapted model less that of a probe of the same images |
    | image side's share | below / gain (``gain_parts``) |
    | R; variance lost | change outside the dictionary; explained variance before less after |
    | activations differ | 1 - Pearson's r of log counts |
    | latents that enter | latents that enter the first ranks, as a share of these |
    | crosscoder, by norm; and scaling; changed | share of latents that are the adapted tower's alone, or changed |
    """
    by = ["task", "truth", "method", "images", "seed"]
    base = tables["accuracy"].query("half == 'base'")
    parts = pd.DataFrame({key: gain_parts(rows) for key, rows in base.groupby(by, sort=False)}).T.rename_axis(by)
    adapted, plain = (whole(base, side).set_index(by)["accuracy"].reindex(parts.index) for side in ("adapted", "clip"))
    read = tables["readouts"].set_index([*by, "source", "fitted"])["accuracy"].unstack(["source", "fitted"])
    before = read.xs("zero-shot", level="method").droplevel(["images", "seed"])
    after, before = read.reindex(parts.index), before.loc[parts.index.get_level_values("task")].set_axis(parts.index)
    probe = adapted.xs("linear probe", level="method").reindex(parts.index.droplevel("method")).set_axis(parts.index)
    changes, pairs = (tables[name].set_index(by).reindex(parts.index) for name in ("changes", "crosscoders"))

    def unreadable(fitted: str) -> list[float]:
        return [1 - remapped_share(*row) for row in zip(plain, adapted, before["latents", fitted])]

    columns = {"gain not readable before": unreadable("all"), "the same, from shots": unreadable("shots")}
    columns |= {f"readout gains, {source}": after[source, "all"] - before[source, "all"]
                for source in ("latents", "z", "class token")}
    columns |= {"a linear probe falls short": adapted - probe, "image side's share": parts["below"] / parts["gain"],
                "R": changes["R"], "variance lost": changes["ev_clip"] - changes["ev_frozen"],
                "activations differ": 1 - changes["pearson_log"], "latents that enter": changes["enter"],
                "crosscoder, by norm": pairs["after_by_norm"], "crosscoder, and scaling": pairs["after"],
                "crosscoder, changed": pairs["changed"]}
    return pd.DataFrame({"gain": parts["gain"]} | columns, index=parts.index).reset_index()


def areas(table: pd.DataFrame, least_gain: float, draws: int = 2000) -> pd.DataFrame:
    """How well each of ``measures`` tells "new" from "remap", among models that gained at least so much.

    Columns method, images, measure, area, low, high, remap, new (how many tasks of each).

    area: that under the ROC curve, the chance that a task of new is above one of remap, a tie counting half. Intervals:
    bootstrap over the tasks of each kind; seeds are averaged first. Left out where a kind has no task.
    """
    kept = table[(table["gain"] >= least_gain) & table["truth"].isin(["new", "remap"])]
    means = kept.groupby(["method", "images", "truth", "task"], sort=False).mean(numeric_only=True)
    rows = []
    for (method, images), part in means.groupby(level=["method", "images"], sort=False):
        for name in part.columns.drop(["gain", "seed"]):
            values = part[name].dropna()
            truths = values.index.get_level_values("truth")
            new, old = (values[truths == truth].to_numpy() for truth in ("new", "remap"))
            if len(new) and len(old):
                rng = np.random.default_rng(0)
                samples = [_area(rng.choice(new, len(new)), rng.choice(old, len(old))) for _ in range(draws)]
                low, high = percentiles(np.array(samples))
                rows.append((method, images, name, _area(new, old), low, high, len(old), len(new)))
    return pd.DataFrame(rows, columns=["method", "images", "measure", "area", "low", "high", "remap", "new"])


def _area(new: np.ndarray, old: np.ndarray) -> float:
    above = new[:, None] - old[None]
    return float(((above > 0) + (above == 0) / 2).mean())


def concept_map(model: Adapted, ds: Images, kinds) -> pd.DataFrame:
    """What a concept does to a class: the class's mean logit with it minus without it, in deviations of all logits.

    One row per class of ``ds``, one column per concept of ``kinds`` that some images show on any patch and some do
    not; ``[C,K]``.
    """
    logits = model.tower.logits(image_embeddings(model.tower, ds), model.text(ds.class_names)).double().cpu().numpy()
    logits = (logits - logits.mean(1, keepdims=True)) / logits.std()
    shown = patch_concepts(ds, range(len(ds)), kinds).any(1)
    columns = {name: logits[with_it].mean(0) - logits[~with_it].mean(0)
               for (_, name), with_it in zip(concept_list(ds, kinds), shown.T) if with_it.any() and not with_it.all()}
    return pd.DataFrame(columns, index=list(ds.class_names))
