"""Top-k latent masking in zero-shot classification, with controls that can fail (sec. 4.1, Fig. 5a-b and 6).

``on`` k keeps only the first k latents of a ranking, ``off`` k removes only those; then the forward pass is
finished and the image classified. ``below`` and the encoder run once per image. The values of k cut the ranking
into segments; each segment's part of the reconstruction is summed from its active latents alone, and running sums
over the segments give every condition: ``on`` from the top of the ranking, ``off`` from its bottom. (Subtracting
from the total instead would leave rounding errors, which LayerNorm blows up where little else is left.)
"""

import collections
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.spatial import cKDTree

from patchsae.activations import token_batches
from patchsae.clip import Clip
from patchsae.data.adapters import as_images
from patchsae.data.checks import BatchTokens, Layer, Natural, Seed, Whole, guard, indices
from patchsae.data.datasets import Subset
from patchsae.data.images import Images
from patchsae.fast.segments import active_latents, segment_sums
from patchsae.latents import LatentStatistics
from patchsae.sae import SparseAutoencoder

#: "class": counts of the image's class (paper). "dataset": counts of all classes (paper). "random" (paper).
#: "matched": random, but alike in frequency and activation. "wrong-class": counts of another class.
#: "predicted-class": counts of the class that the unedited model predicts, so that no true label is used.
#: "class-unshared": "class" without latents that lead the lists of over half of the classes (authors' later variant).
SELECTIONS = ("class", "dataset", "random", "matched", "wrong-class", "predicted-class", "class-unshared")
#: Selections in which chance plays a part: each seed is a new draw.
CHANCE = ("random", "matched", "wrong-class")
#: Length of the list of leading latents of a class; how many alike latents a matched one is drawn from.
LIST, ALIKE = 100, 10
#: Dense latents held at a time, unless one image has more: 2^23 values are 32 MiB.
DENSE = 2**23

Order = Callable[[int], torch.Tensor]


# Rankings -----------------------------------------------------------------------------------------------

def descending(counts: Annotated[torch.Tensor, "number S"]) -> torch.Tensor:
    """Indices from the largest count to the smallest, ties lowest index first: ``[S] -> [S]``."""
    return torch.argsort(counts, descending=True, stable=True)


def class_order(lat: LatentStatistics) -> Order:
    """Each class's latents by how many training tokens of the class they are active on (eq. 4-5)."""
    counts = torch.as_tensor(lat.class_counts)
    return lambda label: descending(counts[label])


def dataset_order(lat: LatentStatistics) -> Order:
    """The same for every class: latents by their counts over all classes."""
    ranking = descending(torch.as_tensor(lat.class_counts).sum(0))
    return lambda label: ranking


def random_order(lat: LatentStatistics, seed: Seed) -> Order:
    """A permutation that depends on the seed and the class alone."""
    n = torch.as_tensor(lat.class_counts).shape[1]
    return lambda label: torch.from_numpy(np.random.default_rng([seed, label]).permutation(n))


def unshared_order(lat: LatentStatistics) -> Order:
    """``class_order`` with the latents that lead the lists of more than half of the classes moved to the end.

    A list holds the first 100 latents of a class (or a quarter, if that is less) that were active at all.
    """
    counts, order, classes = torch.as_tensor(lat.class_counts), class_order(lat), _rankable(lat, None)
    lists = torch.zeros(counts.shape[1], dtype=torch.long)
    for label in classes:
        leading = order(label)[:min(LIST, counts.shape[1] // 4)]
        lists[leading] += counts[label, leading] > 0
    shared = 2 * lists > len(classes)

    def unshared(label: int) -> torch.Tensor:
        ranking = order(label)
        return torch.cat([ranking[~shared[ranking]], ranking[shared[ranking]]])

    return unshared


def matched_order(lat: LatentStatistics, seed: Seed, depth: Whole) -> Order:
    """Random latents that are alike in frequency and mean activation to those of a class's ranking, place by place.

    Each is another one of the ten nearest (log10 of both, in units of their spread) that are still free. Nothing
    else is known of them: keeping the class's own out would tell a mask that removes them what to spare. After
    ``depth`` places the others follow in the class's order.
    """
    order, points = class_order(lat), _log_statistics(lat)
    near = cKDTree(points).query(points, min(len(points), LIST))[1].astype(np.int32)

    def matched(label: int) -> torch.Tensor:
        ranking, rng = order(label).numpy(), np.random.default_rng([seed, label])
        free, chosen = np.ones(len(points), bool), []
        for latent in ranking[:depth]:
            alike = near[latent][free[near[latent]] & (near[latent] != latent)][:ALIKE]
            if not len(alike):
                others = np.flatnonzero(free & (np.arange(len(points)) != latent))
                distance = np.square(points[others] - points[latent]).sum(1)
                last = min(ALIKE, len(others)) - 1
                alike = others[np.argpartition(distance, last)[:ALIKE]] if len(others) else [latent]
            chosen.append(alike[rng.integers(len(alike))])
            free[chosen[-1]] = False
        others = ranking[~np.isin(ranking, chosen)]
        return torch.from_numpy(np.concatenate([np.array(chosen, np.int64), others]))

    return matched


def _log_statistics(lat) -> np.ndarray:
    """log10 of frequency and mean activation, over their spread: ``[S,2]``; silent latents lie far below all."""
    pair = torch.stack([torch.as_tensor(x).double().cpu() for x in (lat.frequency, lat.mean_activation)], 1)
    alive = (pair > 0).all(1)
    logs = pair.where(alive[:, None], torch.ones(())).log10()
    if alive.any():
        logs = torch.where(alive[:, None], logs, logs[alive].amin(0) - 10)
        logs /= logs[alive].std(0, correction=0).clamp_min(1e-6)
    return logs.numpy()


def wrong_classes(classes: Sequence[Whole], seed: Seed) -> dict[int, int]:
    """Another class for each class: all of them on one random cycle."""
    if len(classes) < 2:
        raise ValueError("A wrong class takes two classes with training images; choose another selection.")
    cycle = np.random.default_rng(seed).permutation(classes)
    return dict(zip(cycle.tolist(), np.roll(cycle, -1).tolist()))


class Arm(NamedTuple):
    """One way to choose latents; ``segments(label) [S]``: for each latent, how many of the values of k its rank for
    this class lies beyond."""

    selection: str
    seed: int
    segments: Callable[[int], torch.Tensor]


def make_arm(lat: LatentStatistics | None, selection: Literal[*SELECTIONS], seed: Seed, ks: Sequence[Natural],
             ranking: np.ndarray | torch.Tensor | None = None) -> Arm:
    """Prepare a selection; ``ranking [C,S]`` replaces its order of latents."""
    if ranking is not None:
        order = torch.as_tensor(ranking).__getitem__
    elif selection == "matched":
        order = matched_order(lat, seed, max([k for k in ks if k < len(lat.frequency)], default=0))
    elif selection == "random":
        order = random_order(lat, seed)
    else:
        order = {"dataset": dataset_order, "class-unshared": unshared_order}.get(selection, class_order)(lat)
    other = wrong_classes(_rankable(lat, ranking), seed) if selection == "wrong-class" else {}
    bounds = torch.tensor(ks, dtype=torch.long)

    @functools.cache
    def segments(label: int) -> torch.Tensor:
        rank = torch.argsort(ranked := order(other.get(label, label)).long().cpu())
        if not torch.equal(ranked[rank], torch.arange(len(ranked))):
            raise ValueError(f"The ranking of class {label} does not name every latent once; give an order of all.")
        return torch.bucketize(rank, bounds, right=True).to(torch.int16)

    return Arm(selection, seed, segments)


def _rankable(lat, ranking) -> list[int]:
    """Classes that can be ranked: those with training images, or all of a given ranking."""
    rankable = torch.ones(len(ranking)) if ranking is not None else torch.as_tensor(lat.class_counts).any(1)
    return rankable.nonzero()[:, 0].tolist()


# Editing tokens -----------------------------------------------------------------------------------------

def masked_tokens(sae: SparseAutoencoder, z: BatchTokens, sums: Annotated[torch.Tensor, "B,J,T,D"],
                  add_error: bool) -> torch.Tensor:
    """Spliced, on k_1..k_J, off k_1..k_J: ``[B,T,D], [B,J+1,T,D] -> [B,1+2J,T,D]`` (sec. 4.1).

        on k  = b_dec + sum over ranks < k of h_s W_dec[s];  off k = b_dec + sum over ranks >= k
        with the autoencoder's error: z - sum over the removed latents, so that removing none leaves z bit for bit
    """
    top = list(itertools.accumulate(sums.unbind(1)))
    bottom = list(itertools.accumulate(sums.flip(1).unbind(1)))[-2::-1]
    if add_error:
        return torch.stack([z, *(z - removed for removed in [*bottom, *top[:-1]])], 1)
    return torch.stack([top[-1], *top[:-1], *bottom], 1).add_(sae.b_dec)


# Classification -----------------------------------------------------------------------------------------

class Setup(NamedTuple):
    """What all images share. ``text [C,P]``; ``n_k``: how many values of k, J; ``classes``: those not left out."""

    clip: Clip
    sae: SparseAutoencoder
    text: torch.Tensor
    layer: int
    arms: Sequence[Arm]
    n_k: int
    classes: Sequence[int]
    add_error: bool


@torch.no_grad()
def masked_logits(setup: Setup, ds: Images, batch_images: Natural, title: str) -> Iterator[tuple]:
    """Classify images of ``setup.classes`` under every condition, in order: batches of logits, labels and ids."""
    for batch in token_batches(setup.clip, ds, setup.layer, batch_images, title):
        labels = batch.labels.tolist()
        logits = batch_logits(setup, batch.z, labels)
        if not logits.isfinite().all():
            raise ValueError("Images with latents switched off have logits that are not finite; check the weights of "
                             "the autoencoder and of the model.")
        yield logits.cpu(), labels, batch.ids


def batch_logits(setup: Setup, z: BatchTokens, labels: Sequence[int]) -> torch.Tensor:
    """Logits of images ``[B,T,D]``, original, spliced, on k_1..k_J and off k_1..k_J: ``[B,arms,2+2J,C]``."""
    labels = np.atleast_1d(indices(labels, len(setup.text), "labels")).tolist()
    if len(labels) != len(z):
        raise ValueError(f"There are {len(labels)} labels of {len(z)} images; give one of each.")
    original = _classify(setup, z[:, None])
    predicted = torch.tensor(setup.classes)[original[:, 0, setup.classes].argmax(1).cpu()].tolist()
    group = max(1, DENSE // (z.shape[1] * setup.sae.n_latents))
    edited = torch.cat([_edited_logits(setup, z[i:i + group], labels[i:i + group], predicted[i:i + group])
                        for i in range(0, len(z), group)])
    return torch.cat([original[:, None].expand(-1, len(setup.arms), -1, -1), edited], 2)


def _edited_logits(setup: Setup, z: torch.Tensor, labels, predicted) -> torch.Tensor:
    """Logits of images ``[B,T,D]`` under every edit: ``[B,arms,1+2J,C]``. Prompt tokens stay as they are."""
    tokens, prompts = z[:, :setup.clip.n_tokens], z[:, setup.clip.n_tokens:]
    active, logits = active_latents(setup.sae, tokens), []
    for arm in setup.arms:
        whose = predicted if arm.selection == "predicted-class" else labels
        segment = torch.stack([arm.segments(label) for label in whose]).to(z.device)[active.image, active.latent]
        sums = segment_sums(setup.sae, active, segment.long(), (len(z), setup.n_k + 1, tokens.shape[1]))
        edited = masked_tokens(setup.sae, tokens, sums, setup.add_error)
        if prompts.shape[1]:
            edited = torch.cat([edited, prompts[:, None].expand(-1, edited.shape[1], -1, -1)], 2)
        logits.append(_classify(setup, edited))
    return torch.stack(logits, 1)


def _classify(setup: Setup, z: torch.Tensor) -> torch.Tensor:
    """Finish the forward pass: ``[B,M,T,D] -> [B,M,C]``."""
    embeddings = setup.clip.above(z.flatten(0, 1), setup.layer)
    if embeddings.shape[1] != setup.text.shape[1]:
        raise ValueError(f"Text features have width {setup.text.shape[1]}, but this model's image embeddings have "
                         f"{embeddings.shape[1]}; make them with the same CLIP.")
    return setup.clip.logits(embeddings, setup.text).unflatten(0, z.shape[:2])


def topk_masking(clip: Clip, sae: SparseAutoencoder, ds, lat: LatentStatistics | None,
                 text_features: torch.Tensor, layer: Layer, ks: Sequence,
                 selection: str | Sequence[str] = "class",
                 ranking: np.ndarray | torch.Tensor | Sequence | None = None, add_error: bool = False,
                 per_image: Literal[False, True, "predictions"] = False, seed: int | Sequence[int] = 0,
                 batch_images: Natural = 64,
                 title: str = "") -> pd.DataFrame:
    """Classify a data set with the first k latents of a ranking kept (on) or removed (off) (sec. 4.1, Fig. 5).

    ``lat``: statistics of the training split, from ``collect_latents``. ``text_features [C,P]``: used as they are.
    ``ks``: integers, or "all". ``selection``: one or several of ``SELECTIONS``; several, and several seeds, share
    one pass, and only those in ``CHANCE`` have rows for every seed. ``ranking [C,S]``: order of latents per class,
    instead of the selection's. ``add_error``: give back what the autoencoder leaves out of z.

    Returns one row per selection, seed, mode, k and class: ``n`` images, ``correct`` of them. Modes are "original"
    (k = 0), "spliced" (k = all latents), "on" and "off". ``per_image=True`` gives one row per image and condition:
    ``id``, ``label``, ``prediction``, ``logits`` (cosine times temperature, array ``[C]``); "predictions" leaves
    the logits out. Classes without training images are left out; ``attrs["left_out"]`` says how many.
    """
    ds, ks = as_images(ds), _checked_ks(ks, sae.n_latents)
    selections, seeds = _several(selection, "selection", str), _several(seed, "seed", int)
    _check_latents(sae, ds, clip.block(layer), lat, ranking)
    text = _checked_text(sae, ds, lat, text_features, ranking)
    arms = [make_arm(lat, name, s, ks, ranking) for name in selections
            for s in seeds[:None if name in CHANCE else 1]]
    classes = _rankable(lat, ranking)
    rows = np.flatnonzero(np.isin(ds.labels, classes))
    if not len(rows):
        raise ValueError("No image is of a class with training images; use the training split of the same task.")
    if len(rows) < len(ds):
        ds = Subset(ds, range(len(ds.class_names)), rows)
    setup = Setup(clip, sae, text.to(clip.device), layer, arms, len(ks), classes, add_error)
    edits = [("original", 0), ("spliced", sae.n_latents), *(("on", k) for k in ks), *(("off", k) for k in ks)]
    conditions = pd.DataFrame([(arm.selection, arm.seed, *edit) for arm in arms for edit in edits],
                              columns=["selection", "seed", "mode", "k"])
    batches = masked_logits(setup, ds, batch_images, title)
    table = _image_rows(batches, conditions, per_image is True) if per_image else _class_rows(batches, conditions)
    table.attrs["left_out"] = len(text) - len(classes)
    return table


def _several(values, what: str, kind: type) -> list:
    """One value or several different ones, as a list."""
    listed = np.atleast_1d(values).tolist()
    if wrong := [value for value in listed if type(value) is not kind]:
        raise ValueError(f"The {what} {wrong[0]!r} is a {type(wrong[0]).__name__}; give {kind.__name__}s.")
    if not listed or len(set(listed)) < len(listed):
        raise ValueError(f"{what} is {values!r}; give at least one, and each once: a repeated one would count its "
                         "images twice.")
    return listed


def _checked_ks(ks, n_latents: int) -> list[int]:
    """The values of k in order, each once."""
    if isinstance(ks, str) or not np.iterable(ks):
        raise ValueError(f"ks is {ks!r}; give a list of how many latents to switch, such as [1, 10, 'all'].")
    counts = [n_latents if isinstance(k, str) and k == "all" else k for k in ks]
    if wrong := [k for k in counts if type(k) is not int and not isinstance(k, np.integer) or not 1 <= k <= n_latents]:
        raise ValueError(f"k = {wrong[0]} is not a whole number between 1 and {n_latents}, the number of latents of "
                         "this autoencoder; choose another k.")
    return sorted(set(map(int, counts)))


def _check_latents(sae: SparseAutoencoder, ds: Images, block: int, lat, ranking) -> None:
    """Refuse statistics of another autoencoder and, where they rank the latents, of another block or other classes."""
    if lat is None and ranking is None:
        raise ValueError("There are neither latents nor a ranking; give the result of collect_latents.")
    if lat is not None and lat.sae_hash != sae.fingerprint():
        raise ValueError("These latents were collected with another autoencoder; run collect_latents with it.")
    if ranking is None and lat.block != block:
        raise ValueError(f"These latents were collected after block {lat.block}, not after block {block}; give the "
                         "layer they are of.")
    if ranking is None and lat.class_names[:len(ds.class_names)] != ds.class_names:
        raise ValueError("These latents were collected with other class names, or in another order, than these images "
                         "have; use the training split of the same task.")


def _checked_text(sae: SparseAutoencoder, ds: Images, lat, text_features, ranking) -> torch.Tensor:
    """Text features ``[C,P]``, none of which is nothing, of as many classes as latents are ranked for."""
    text = torch.as_tensor(text_features)
    if text.ndim != 2 or not text.is_floating_point():
        raise ValueError(f"Text features are {text.dtype} of shape {list(text.shape)}; give floats [C, P], one row a "
                         "class.")
    if bad := (~(text.isfinite().all(1) & text.any(1))).nonzero()[:, 0].tolist():
        raise ValueError(f"The text features of class {bad[0]} are zero or not finite; make them again with this CLIP.")
    table = torch.as_tensor(lat.class_counts if ranking is None else ranking)
    if table.is_floating_point() or table.dtype == torch.bool:
        raise ValueError(f"The ranking is {table.dtype}; give whole numbers, the latents of each class in order.")
    if tuple(table.shape) != (len(text), sae.n_latents) or len(ds.class_names) > len(text):
        name = "class counts" if ranking is None else "ranking"
        raise ValueError(f"{len(ds.class_names)} classes of images, {len(text)} text features, {sae.n_latents} "
                         f"latents and {name} of shape {list(table.shape)} do not fit; use one task and autoencoder.")
    if ranking is None and not table.any():
        raise ValueError("No class has training images; collect latents from the training split of this task.")
    return text


def _class_rows(batches: Iterator[tuple], conditions: pd.DataFrame) -> pd.DataFrame:
    """Count the correct predictions per condition and class."""
    n, correct = collections.Counter(), collections.Counter()
    for logits, labels, _ in batches:
        n.update(labels)
        for label, predictions in zip(labels, logits.argmax(-1).flatten(1).numpy()):
            correct[label] = correct[label] + (predictions == label)
    tables = [conditions.assign(**{"class": label, "n": n[label], "correct": correct[label]}) for label in sorted(n)]
    return pd.concat(tables, ignore_index=True)


def _image_rows(batches: Iterator[tuple], conditions: pd.DataFrame, keep_logits: bool) -> pd.DataFrame:
    """One row per image and condition."""
    tables = []
    for logits, labels, ids in batches:
        table = pd.concat([conditions] * len(ids), ignore_index=True)
        table.insert(0, "id", np.repeat(np.array(ids, dtype=object), len(conditions)))
        table.insert(1, "label", np.repeat(labels, len(conditions)))
        table["prediction"] = logits.argmax(-1).flatten().numpy()
        tables.append(table.assign(logits=list(logits.flatten(0, 2).numpy())) if keep_logits else table)
    return pd.concat(tables, ignore_index=True)


guard(globals())
