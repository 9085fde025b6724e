"""How interpretable single latents are, in numbers: monosemanticity, places, hierarchy, redundancy, names."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from patchsae.activations import load_pixels
from patchsae.clip import Clip
from patchsae.latents import LatentStatistics
from patchsae.sae import SparseAutoencoder
from patchsae.studies.intervals import bootstrap, mean_interval
from patchsae.studies.recovery import Directions, Split, image_scores
from patchsae.studies.scores import PatchTruth, average_precision
from patchsae.world.scenes import WORLD

#: Latents whose partners in another seed are looked for, at most: the matching takes seconds then, and 1 GB.
MOST_MATCHED = 1024


def monosemanticity(activations: torch.Tensor, embeddings: torch.Tensor, chunk: int = 256) -> torch.Tensor:
    """Monosemanticity score of every latent: ``[N,S], [N,E] -> [S]``, in time linear in the number of items.

        MS = sum_{n<m} a_n a_m cos(e_n, e_m) / sum_{n<m} a_n a_m          a less its minimum over the items

    With unit embeddings the sums over pairs are ||sum a_n e_n||^2 - sum a_n^2 ||e_n||^2 and (sum a_n)^2 - sum a_n^2.
    1: the items that activate a latent look alike to the judge; a constant latent gets the mean cosine of all pairs,
    which is chance. NaN where a single item activates it; an embedding of zero is like no other.
    """
    e = F.normalize(embeddings.double(), dim=1)
    length, scores = e.square().sum(1), []
    for part in torch.arange(activations.shape[1]).split(chunk):
        a = activations[:, part].double()
        a -= a.amin(0)
        a += (a == 0).all(0)  # a constant latent weighs every pair the same
        square = a.square()
        alike = (a.T @ e).square().sum(1) - square.T @ length
        pairs = a.sum(0).square() - square.sum(0)
        scores.append(torch.where((a > 0).sum(0) > 1, alike / pairs, torch.nan))
    return torch.cat(scores)


def latent_monosemanticity(directions: Directions, split: Split, embeddings: torch.Tensor,
                           chunk: int = 256) -> torch.Tensor:
    """``monosemanticity`` of every candidate over the patches of a split, some candidates at a time: ``[S]``."""
    z, parts = split.patches, torch.arange(directions.weight.shape[1]).split(chunk)
    return torch.cat([monosemanticity(directions.scores(z, part), embeddings) for part in parts])


def own_precision(directions: Directions, split: Split, own: np.ndarray, chunk: int = 256) -> np.ndarray:
    """Average precision of every candidate for one concept each, ``own [S]`` (columns of the split): ``[S]``."""
    z, truth, found = split.patches, split.positives, []
    for part in torch.arange(directions.weight.shape[1]).split(chunk):
        h = directions.scores(z, part).numpy()
        found += [average_precision(h[:, i], truth[:, [own[s]]])[0] for i, s in enumerate(part.tolist())]
    return np.array(found)


def patch_attributes(split: Split) -> torch.Tensor:
    """The judge of a data set with ground truth: which concepts each patch shows, ``[B(T-1),C]``."""
    return torch.from_numpy(split.positives).float()


def morans_i(heat: torch.Tensor) -> torch.Tensor:
    """Spatial coherence of maps: ``[...,g,g] -> [...]``, NaN for a map without differences.

        I = (n / W) sum_{ij} w_ij (x_i - mean)(x_j - mean) / sum_i (x_i - mean)^2

    w_ij is 1 for patches with a common side and 0 for others, W its sum.

    1 towards smooth, -1 for a checkerboard, -1 / (n - 1) on average for the same values in random order.
    """
    g = heat.shape[-1]
    x = heat.double() - heat.double().mean((-2, -1), keepdim=True)
    across, down = (x[..., :-1] * x[..., 1:]).sum((-2, -1)), (x[..., :-1, :] * x[..., 1:, :]).sum((-2, -1))
    spread = x.square().sum((-2, -1))
    neighbours = 2 * g * (g - 1)
    return torch.where(spread > 0, g * g / neighbours * (across + down) / spread, torch.nan)


def spatial_coherence(directions: Directions, split: Split) -> torch.Tensor:
    """Moran's I of every candidate, averaged over the images on which it has differences: ``[S]``."""
    total = count = 0
    for h in image_scores(directions, split.z[:, 1:]):
        heat = h.transpose(1, 2).unflatten(-1, (round(h.shape[1] ** 0.5), -1))
        values = morans_i(heat)
        total, count = total + values.nan_to_num().sum(0), count + values.isfinite().sum(0)
    return total / count


def stability(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    """Decoder cosine of every latent with its partner in another seed: ``[S,D], [S',D] -> [min(S,S')]``.

    Partners are different for different latents: the one-to-one matching of largest total cosine. Of more than
    ``MOST_MATCHED`` latents so many, in equal steps, are matched to all of the other seed, and the rest are NaN.
    """
    chosen = spread(len(first), MOST_MATCHED)
    cosine = (F.normalize(first[chosen], dim=1) @ F.normalize(second, dim=1).T).numpy()
    rows, columns = linear_sum_assignment(cosine, maximize=True)
    if len(chosen) == len(first):
        return cosine[rows, columns]
    found = np.full(len(first), np.nan, np.float32)
    found[chosen[rows]] = cosine[rows, columns]
    return found


def spread(n: int, most: int) -> np.ndarray:
    """At most so many of the numbers below n, from 0 in equal steps."""
    return np.unique(np.arange(min(n, most)) * n // min(n, most))


def coherence(decoder: torch.Tensor, chunk: int = 1024) -> np.ndarray:
    """Redundancy: the largest absolute cosine of every decoder row with another row: ``[S,D] -> [S]``."""
    rows, found = F.normalize(decoder, dim=1), []
    for start in range(0, len(rows), chunk):
        cosine = (rows[start:start + chunk] @ rows.T).abs()
        itself = torch.arange(start, start + len(cosine))[:, None]
        found.append(cosine.scatter_(1, itself, 0).amax(1))
    return torch.cat(found).numpy()


# Hierarchy ----------------------------------------------------------------------------------------------


def with_groups(split: Split, groups: Mapping[str, str], kind: str = "noun") -> Split:
    """The split's concepts of one kind, and after them their groups, each the union of its members."""
    members = [c for c, (k, _) in enumerate(split.concepts) if k == kind]
    names = list(dict.fromkeys(groups[split.concepts[c][1]] for c in members))
    of_group = [[c for c in members if groups[split.concepts[c][1]] == name] for name in names]
    unions = np.stack([split.share[..., own].sum(-1) for own in of_group], -1)
    own = split.only(members)
    return own._replace(share=np.concatenate([own.share, unions], -1),
                        concepts=own.concepts + [("group", name) for name in names])


def absorption(directions: Directions, scores: np.ndarray, split: Split, groups: Mapping[str, str]) -> pd.DataFrame:
    """Does a group have a latent, and where do its members' own latents take its place?

    ``scores [S,C]``: average precision on training scenes of the concepts of ``with_groups``. Columns group, latent,
    auprc (of the group's best latent), members (mean auprc of the members' best), silent (share of the group's patches
    where its latent is silent) and absorbed (where it is silent and the member's own latent fires).
    """
    best, truth, rows = scores.argmax(0), split.positives, []
    fires = directions.scores(split.patches, torch.from_numpy(best)).numpy()
    found = [average_precision(fires[:, c], truth[:, [c]])[0] for c in range(len(best))]
    for c, (kind, name) in enumerate(split.concepts):
        if kind == "group":
            own = [m for m, (k, member) in enumerate(split.concepts) if k != "group" and groups[member] == name]
            silent = truth[:, c] & (fires[:, c] <= 0)
            absorbed = silent & (truth[:, own] & (fires[:, own] > 0)).any(1)
            rows.append((name, best[c], found[c], np.mean([found[m] for m in own]),
                         silent.sum() / truth[:, c].sum(), absorbed.sum() / truth[:, c].sum()))
    return pd.DataFrame(rows, columns=["group", "latent", "auprc", "members", "silent", "absorbed"])


def splitting(directions: Directions, scores: np.ndarray, train: Split, test: Split, gain: float = 0.02,
              most: int = 5) -> pd.DataFrame:
    """Over how many latents a concept is split: latents are added while that helps on training scenes.

    Starting with the best, that latent of the ``most`` best by ``scores [S,C]`` is added whose sum with the chosen ones
    has the largest average precision, as long as that grows by ``gain``. Columns kind, concept, latents (how many), one
    and together (average precision of the first and of the sum on test scenes).
    """
    rows = []
    for c, name in enumerate(train.concepts):
        order = torch.from_numpy(np.argsort(-scores[:, c], kind="stable")[:most].copy())
        h = directions.scores(train.patches, order).numpy()
        chosen = _grow(h, PatchTruth(train.positives[:, [c]]), gain)
        own = directions.scores(test.patches, order[chosen]).numpy()
        one, together = (average_precision(x, test.positives[:, [c]])[0] for x in (own[:, 0], own.sum(1)))
        rows.append((*name, len(chosen), one, together))
    return pd.DataFrame(rows, columns=["kind", "concept", "latents", "one", "together"])


def _grow(h: np.ndarray, truth: PatchTruth, gain: float) -> list[int]:
    """Columns of ``[N,most]`` to sum, the first one first."""
    chosen, reached = [0], truth.average_precision(h[:, 0])[0]
    while len(chosen) < h.shape[1]:
        total = h[:, chosen].sum(1)
        rest = [j for j in range(h.shape[1]) if j not in chosen]
        found = [truth.average_precision(total + h[:, j])[0] for j in rest]
        if max(found) < reached + gain:
            break
        chosen, reached = chosen + [rest[int(np.argmax(found))]], max(found)
    return chosen


# Names --------------------------------------------------------------------------------------------------


def true_names(scores: np.ndarray, split: Split, bar: float = 0.3) -> np.ndarray:
    """The concept of every latent by ground truth: ``[S,C] -> [S]`` columns, -1 where there is no name.

    That of the largest average precision above chance, (precision - chance) / (1 - chance), if it reaches ``bar``.
    """
    chance = split.positives.mean(0)
    above = (scores - chance) / (1 - chance)
    return np.where(above.max(1) >= bar, above.argmax(1), -1)


def prompts(concepts: list) -> list[str]:
    """What each concept is called in a caption, by the templates of the tasks about its kind."""
    tasks = {"noun": "nouns", "colour": "colours", "texture": "textures", "background": "backgrounds", "text": "words"}
    own = {kind: WORLD["tasks"][task]["template"] for kind, task in tasks.items()} | {"style": "a {} of a scene."}
    return [own.get(kind, "a photo of a {}.").format(name) for kind, name in concepts]


@torch.no_grad()
def text_names(clip: Clip, sae: SparseAutoencoder, stats: LatentStatistics, ds, latents, text: torch.Tensor,
               layer: int) -> pd.DataFrame:
    """Name latents through the model's own text tower: which text loses most when the latent is removed.

    On each of a latent's reference images (``ds``: what the statistics were taken of) the latent is taken out of every
    token (z - h_s W_dec[s]), the forward pass is finished, and the drop of cosine with every text ``[N,P]`` is noted,
    less its mean over texts. The name is the text with the largest mean drop; confidence is the share of reference
    images on which that text has the largest one. Columns latent, name (a row of ``text``, -1 for a latent without
    images), confidence.
    """
    rows = []
    for latent in latents:
        images = stats.reference_rows[latent]
        images = images[images >= 0].numpy()
        found = _text_name(clip, sae, ds, images, latent, text, layer) if len(images) else (-1, 0.0)
        rows.append((latent, *found))
    return pd.DataFrame(rows, columns=["latent", "name", "confidence"])


def _text_name(clip: Clip, sae: SparseAutoencoder, ds, images, latent: int, text, layer: int) -> tuple[int, float]:
    z = clip.below(load_pixels(clip, ds, images).pixels, layer)
    removed = z - sae.encode(z)[..., latent, None] * sae.W_dec[latent]
    before, after = (F.normalize(clip.above(tokens, layer), dim=-1) @ text.T for tokens in (z, removed))
    drop = (before - after) - (before - after).mean(1, keepdim=True)
    name = int(drop.mean(0).argmax())
    return name, (drop.argmax(1) == name).float().mean().item()


# What predicts it ---------------------------------------------------------------------------------------


def regression(table: pd.DataFrame, target: str, seed: int = 0, n: int = 1000) -> pd.DataFrame:
    """Least squares of a measure on the four statistics of the paper's scatter, all standardised.

    ``table``: a row a latent, columns frequency, mean_activation, label_entropy, label_std and ``target``; rows with
    a missing value are left out. Columns term, coefficient, low, high (95 %, bootstrap over latents), alone (r^2 of
    the term by itself); the last row, "all", has the r^2 of the whole in ``alone``.
    """
    known = table[(table["frequency"] > 0) & (table["mean_activation"] > 0)].dropna(
        subset=["label_entropy", "label_std", target])
    x = known[["frequency", "mean_activation", "label_entropy", "label_std"]].to_numpy(float)
    x, y = np.hstack([np.log10(x[:, :2]), x[:, 2:]]), known[target].to_numpy(float)
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()

    def fit(counts):
        root = np.sqrt(counts)
        return np.linalg.lstsq(x * root[:, None], y * root, rcond=None)[0]

    coefficients = fit(np.ones(len(x)))
    low, high = bootstrap(lambda counts: np.apply_along_axis(fit, 1, counts), len(x), n, seed)
    names = ["log10 frequency", "log10 activation", "label entropy", "label deviation"]
    rows = [*zip(names, coefficients, low, high, (x * y[:, None]).mean(0) ** 2),
            ("all", np.nan, np.nan, np.nan, 1 - np.square(y - x @ coefficients).mean())]
    return pd.DataFrame(rows, columns=["term", "coefficient", "low", "high", "alone"])


def region_means(table: pd.DataFrame, target: str, boxes: Mapping, seed: int = 0, n: int = 1000) -> pd.DataFrame:
    """Mean of a measure over the latents in each region of the scatter (log10 units), with a 95 % interval."""
    x, y, rows = np.log10(table["frequency"]), np.log10(table["mean_activation"]), []
    for name, (x0, x1, y0, y1) in boxes.items():
        inside = table.loc[x.between(x0, x1) & y.between(y0, y1), [target]].dropna().to_numpy()
        ends = mean_interval(inside, n, seed) if len(inside) else ([np.nan], [np.nan])
        rows.append((name, len(inside), inside.mean() if len(inside) else np.nan, *(end[0] for end in ends)))
    return pd.DataFrame(rows, columns=["region", "latents", target, "low", "high"])
