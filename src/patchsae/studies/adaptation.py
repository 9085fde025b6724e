"""What adaptation changes (sec. 4.2): accuracies, swapped sides, latents before and after, and what they can tell.

``before`` and ``after`` are models as in ``adapt``: an image tower and how it embeds class names. The autoencoder is
the one trained on plain CLIP, the images are the same, and so are the tokens: prompts are left out.
"""

import collections
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import pearsonr, spearmanr, t

from patchsae.ablation import descending, topk_masking
from patchsae.activations import pixel_batches, token_batches
from patchsae.maple import MaPLe
from patchsae.sae import SparseAutoencoder
from patchsae.studies.adapt import Adapted
from patchsae.studies.intervals import accuracy_table, mean_interval, wilson_interval

SIDES = ("clip", "adapted")
#: The parts of a model that are exchanged one by one.
PARTS = ("below", "above", "text")


@torch.no_grad()
def swap_hits(before: Adapted, after: Adapted, ds, layer: int) -> dict[tuple[str, ...], np.ndarray]:
    """Which images are classified right by every mixture of two models: (below, above, text) -> bool ``[N]``.

    Each of the three is "clip" or "adapted": whose blocks make the image tokens, whose blocks read them (with its
    prompt tokens beside them, where it has some), and whose text features they are compared with.
    """
    models, found = dict(zip(SIDES, (before, after))), collections.defaultdict(list)
    text = {side: model.text(ds.class_names) for side, model in models.items()}
    for batch in pixel_batches(before.tower, ds):
        z = {side: model.tower.below(batch.pixels, layer) for side, model in models.items()}
        for below, above in itertools.product(SIDES, SIDES):
            tower, n = models[above].tower, before.tower.n_tokens
            embeddings = tower.above(torch.cat([z[below][:, :n], z[above][:, n:]], 1), layer)
            for words in SIDES:
                told = tower.logits(embeddings, text[words]).argmax(1).cpu()
                found[below, above, words].append(told == batch.labels)
    return {parts: torch.cat(hits).numpy() for parts, hits in found.items()}


def swap_table(before: Adapted, after: Adapted, ds, layer: int) -> pd.DataFrame:
    """``swap_hits`` as accuracies: columns below, above, text, n, accuracy, low, high."""
    return pd.DataFrame([dict(zip(PARTS, parts)) | wilson_interval(hits)
                         for parts, hits in swap_hits(before, after, ds, layer).items()])


def whole(table: pd.DataFrame, side: str) -> pd.DataFrame:
    """The rows of a ``swap_table`` in which nothing is swapped: CLIP's ("clip"), or the adapted model's ("adapted")."""
    return table[(table[list(PARTS)] == side).all(axis=1)]


def gain_parts(table: pd.DataFrame) -> pd.Series:
    """Split the gain of one ``swap_table`` among the three parts of the model: gain = below + above + text.

    A part's share is what exchanging it brings, mean over the six orders in which the three can be exchanged (its
    Shapley value).
    """
    a, shares = table.set_index(list(PARTS))["accuracy"], dict.fromkeys(PARTS, 0.0)
    for order in itertools.permutations(PARTS):
        mixture = dict.fromkeys(PARTS, "clip")
        for part in order:
            start = a[tuple(mixture.values())]
            mixture[part] = "adapted"
            shares[part] += (a[tuple(mixture.values())] - start) / 6
    return pd.Series({"gain": sum(shares.values())} | shares)


def harmonic_mean(base, novel):
    """2 b n / (b + n) of accuracies; 0 where both are."""
    total = np.asarray(base, float) + novel
    return np.divide(2 * np.asarray(base, float) * novel, total, out=np.zeros_like(total), where=total > 0)


def improvement_rate(before, after):
    """Delta = (adapted - zero-shot) / (1 - zero-shot) (table 1); NaN where nothing was left to improve."""
    left = 1 - np.asarray(before, float)
    return np.divide(np.asarray(after, float) - before, left, out=np.full_like(left, np.nan), where=left > 0)


def main_table(accuracy: pd.DataFrame) -> pd.DataFrame:
    """``table1.csv`` from the swaps: columns task, half, method, seed, accuracy, low, high; zero-shot once a task."""
    plain = whole(accuracy, "clip").drop_duplicates(["task", "half"]).assign(method="zero-shot", seed=0)
    columns = ["task", "half", "method", "seed", "accuracy", "low", "high"]
    return pd.concat([plain, whole(accuracy, "adapted")])[columns].reset_index(drop=True)


def seed_means(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Means over tasks (if not in ``by``) and seeds, with a t interval over seeds: columns accuracy, low, high, seeds.

    A method without chance (one seed) has its single value as both ends.
    """
    per_seed = table.groupby([*by, "seed"], sort=False)["accuracy"].mean()
    rows = per_seed.groupby(level=list(by), sort=False).agg(["mean", "std", "count"])
    half = (t.ppf(0.975, (rows["count"] - 1).clip(lower=1)) * rows["std"] / np.sqrt(rows["count"])).fillna(0)
    return pd.DataFrame({"accuracy": rows["mean"], "low": rows["mean"] - half, "high": rows["mean"] + half,
                         "seeds": rows["count"]}).reset_index()


# Latents before and after -------------------------------------------------------------------------------

GROUPS = ("high", "high to low", "low to high")


def ranks(counts: torch.Tensor) -> torch.Tensor:
    """Rank of every latent within each class, 1 for the most active, ties lowest index first: ``[C,S] -> [C,S]``.

    Latents that were never active share the last rank S: being listed first among the silent means nothing.
    """
    order = torch.stack([descending(row) for row in counts])
    places = torch.arange(1, counts.shape[1] + 1).expand_as(order)
    return torch.zeros_like(order).scatter_(1, order, places).where(counts > 0, torch.tensor(counts.shape[1]))


def groups(before: torch.Tensor, after: torch.Tensor, upper: int, lower: int) -> dict[str, torch.Tensor]:
    """Which latents of each class belong to which group, from class counts ``[C,S]`` before and after: bool ``[C,S]``.

    high: rank <= ``upper`` in both; high to low: rank <= ``upper`` before and > ``lower`` after; low to high: the
    reverse. The paper gives no rule; this one can be reconstructed (sec. 4.2, figs. 7 and 17).
    """
    if not 1 <= upper <= lower < before.shape[1]:
        raise ValueError(f"Ranks {upper} and {lower} do not cut {before.shape[1]} latents; give 1 <= upper <= lower < "
                         f"{before.shape[1]}.")
    first, second = ranks(before), ranks(after)
    return {"high": (first <= upper) & (second <= upper), "high to low": (first <= upper) & (second > lower),
            "low to high": (first > lower) & (second <= upper)}


def group_sizes(before: torch.Tensor, after: torch.Tensor, uppers: Sequence[int],
                lowers: Sequence[int]) -> pd.DataFrame:
    """Latents per class in every group, for every pair of ranks: columns upper, lower, group, mean, low, high.

    Intervals are bootstrapped over classes.
    """
    rows = []
    for upper, lower in itertools.product(uppers, lowers):
        if upper <= lower < before.shape[1]:
            for name, members in groups(before, after, upper, lower).items():
                sizes = members.sum(1, keepdim=True).double().numpy()
                low, high = mean_interval(sizes)
                rows.append((upper, lower, name, sizes.mean(), low[0], high[0]))
    return pd.DataFrame(rows, columns=["upper", "lower", "group", "mean", "low", "high"])


def correlations(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """Of two activation counts ``[S]``: Pearson's r of the counts and of log10(1 + count), Spearman's rho."""
    x, y = before.double().numpy(), after.double().numpy()
    return {"pearson": pearsonr(x, y).statistic, "pearson_log": pearsonr(np.log10(1 + x), np.log10(1 + y)).statistic,
            "spearman": spearmanr(x, y).statistic}


class MeanPrompts(MaPLe):
    """An adapted model whose prompt tokens at the cut are the same for every image: ``mean [n,D]``.

    Prompt tokens are not masked, and below the cut they have seen the image.
    """

    def __init__(self, model: MaPLe, mean: torch.Tensor):
        super().__init__(model, model.prompts, model.token_ids, model.template)
        self.mean = mean

    def below(self, pixels: torch.Tensor, layer: int) -> torch.Tensor:
        z = super().below(pixels, layer)
        return torch.cat([z[:, :self.n_tokens], self.mean.expand(len(z), -1, -1)], 1)


def mean_prompts(model: Adapted, ds, layer: int) -> Adapted:
    """A MaPLe whose prompt tokens at the cut are their means over the images of a data set."""
    tokens = [batch.z[:, model.tower.n_tokens:] for batch in token_batches(model.tower, ds, layer)]
    return model._replace(tower=MeanPrompts(model.tower, torch.cat(tokens).mean(0)))


def masking_grid(models: Mapping[str, Adapted], sae: SparseAutoencoder, counts: Mapping[str, torch.Tensor], ds,
                 layer: int, ks: Sequence[int], batch_images: int = 64) -> pd.DataFrame:
    """Fig. 5c, 15, 16: masking with latents selected by the one model's counts and images classified by another.

    ``models``: name -> model; ``counts``: side -> class counts ``[C,S]`` of the classes of ``ds`` on training images.
    Columns selects, classifies, mode, k, accuracy, low, high; nothing on, k = 0, is the same as all off.
    """
    tables = []
    for selects, classifies in itertools.product(counts, models):
        ranking, model = torch.stack([descending(row) for row in counts[selects]]), models[classifies]
        images = topk_masking(model.tower, sae, ds, None, model.text(ds.class_names), layer, ks, ranking=ranking,
                              per_image="predictions", batch_images=batch_images)
        table = accuracy_table(images, draws=500)
        nothing = table[(table["mode"] == "off") & (table["k"] == sae.n_latents)].assign(mode="on", k=0)
        tables.append(pd.concat([nothing, table]).assign(selects=selects, classifies=classifies))
    return pd.concat(tables)[["selects", "classifies", "mode", "k", "accuracy", "low", "high"]].reset_index(drop=True)


def who_decides(masking: pd.DataFrame, second: str) -> pd.DataFrame:
    """What exchanging the counts that select, or the model that classifies, makes of accuracy: one row per task.

    ``masking``: of ``masking_grid`` for every ``task``; ``second``: the model beside CLIP. Mean absolute differences
    over the values of k above 0 with latents on: columns "by who selects" and "by who classifies".
    """
    at = masking[(masking["mode"] == "on") & (masking["k"] > 0)].pivot_table(
        index=["task", "k"], columns=["selects", "classifies"], values="accuracy", sort=False)
    selects = sum((at["adapted", side] - at["clip", side]).abs() for side in ("clip", second)) / 2
    classifies = sum((at[side, second] - at[side, "clip"]).abs() for side in SIDES) / 2
    made = pd.DataFrame({"by who selects": selects, "by who classifies": classifies})
    return made.groupby("task", sort=False).mean()
