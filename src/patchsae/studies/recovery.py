"""Concept recovery: which concepts have a latent of their own, on scenes that did not choose it.

A candidate (a latent, a neuron, a centroid) is matched to a concept by average precision over the patch tokens of
training scenes and scored on test scenes. The concept is recovered when that score reaches ``BAR``. Concepts count
when both sets of scenes show them: of the pictogram world's task ``nouns`` these are all 64 nouns and 10 colours, the
4 textures and 6 backgrounds of pre-training, both styles and all 10 words.
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from patchsae.activations import token_batches
from patchsae.clip import Clip
from patchsae.data.datasets import Subset
from patchsae.masks import COVERED, concept_list, patch_coverage
from patchsae.sae import SparseAutoencoder
from patchsae.studies.intervals import percentiles
from patchsae.studies.scores import PatchTruth, average_precision, best_threshold, pixel_overlap, pointing_game

#: A concept is recovered at this average precision over held-out patch tokens.
BAR = 0.6
#: The kinds of concept that count towards the share of concepts recovered; style and text are reported beside them.
COUNTED = ("noun", "colour", "texture", "background")
#: Bootstrap samples of an interval, and thresholds at most in each (quantiles of the positives' scores).
RESAMPLES, THRESHOLDS = 200, 256
#: Scores held at once, at most: 67 MB, those of one image of the paper's size.
DENSE = 2**24


class Directions(NamedTuple):
    """Candidates for concepts: S functions of a token.

        score = (z - centre) @ weight + bias        z - centre brought to unit length first where ``unit``

    ``centre [D]``, ``weight [D,S]``, ``bias [S]``. A sparse method is cut at 0; the scores of any other are made
    positive by a function that keeps their order (softplus), so that every threshold counts. The latents of ``sae`` are
    cut as its activation says.
    """

    centre: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    sparse: bool = True
    unit: bool = False
    sae: SparseAutoencoder | None = None

    @torch.no_grad()
    def scores(self, z: torch.Tensor, part=slice(None)) -> torch.Tensor:
        """Scores of some candidates on tokens: ``[...,D] -> [...,part]``."""
        if self.sae is not None:
            return self.sae.encode_some(z, part)
        x = F.normalize(z - self.centre, dim=-1) if self.unit else z - self.centre
        x = x @ self.weight[:, part] + self.bias[part]
        return torch.relu(x) if self.sparse else F.softplus(x)


def latent_directions(sae: SparseAutoencoder) -> Directions:
    """The latents of an autoencoder as candidates, on the CPU as the tokens of a ``Split`` are."""
    sae = copy.deepcopy(sae).cpu()
    return Directions(*(p.detach() for p in (sae.b_dec, sae.W_enc, sae.b_enc)), sae=sae)


def image_scores(directions: Directions, z: torch.Tensor) -> Iterator[torch.Tensor]:
    """Scores of every candidate on tokens ``[B,T,D]``, some images at a time: parts of ``[B,T,S]``."""
    at_once = max(1, min(64, DENSE // (z.shape[1] * directions.weight.shape[1])))
    return (directions.scores(part) for part in z.split(at_once))


class Split(NamedTuple):
    """Tokens and ground truth of scenes: ``z [B,T,D]``, the class token first; ``share [B,T-1,C]`` of the pixels of
    each patch; ``concepts``: C pairs of kind and name."""

    z: torch.Tensor
    share: np.ndarray
    concepts: list

    @property
    def patches(self) -> torch.Tensor:
        """Patch tokens ``[B(T-1),D]``."""
        return self.z[:, 1:].flatten(0, 1)

    @property
    def positives(self) -> np.ndarray:
        """Which concepts each patch shows: bool ``[B(T-1),C]``."""
        return (self.share >= COVERED).reshape(-1, self.share.shape[-1])

    def only(self, columns) -> "Split":
        """The same scenes with some of the concepts."""
        return self._replace(share=self.share[..., columns], concepts=[self.concepts[c] for c in columns])


def read_split(clip: Clip, ds, layer: int, n: int, batch_images: int = 64) -> Split:
    """Tokens and ground truth, of every kind, of the first ``n`` scenes of a data set."""
    rows, kinds = range(min(n, len(ds))), tuple(ds.concepts)
    first = Subset(ds, range(len(ds.class_names)), rows)
    z = torch.cat([batch.z[:, :clip.n_tokens].cpu() for batch in token_batches(clip, first, layer, batch_images)])
    return Split(z, patch_coverage(ds, rows, kinds), concept_list(ds, kinds))


def shared_concepts(*splits: Split) -> list[Split]:
    """The splits with the concepts that every one of them shows, in the order of the first."""
    shown = [{c for c, any_ in zip(s.concepts, s.positives.any(0)) if any_} for s in splits]
    names = [c for c in splits[0].concepts if all(c in concepts for concepts in shown)]
    return [split.only([split.concepts.index(name) for name in names]) for split in splits]


def concept_scores(directions: Directions, split: Split, chunk: int = 256) -> np.ndarray:
    """Average precision of every candidate for every concept over the patch tokens of a split: ``[S,C]``."""
    truth, z, precision = PatchTruth(split.positives), split.patches, []
    for part in torch.arange(directions.weight.shape[1]).split(chunk):
        scores = directions.scores(z, part).T.contiguous().numpy()
        precision += [truth.average_precision(candidate) for candidate in scores]
    return np.array(precision)


def one_to_one(scores: np.ndarray) -> np.ndarray:
    """The matching of concepts to different candidates with the largest total score: ``[S,C] -> [C]``.

    The Hungarian method; with fewer candidates than concepts those left over get -1.
    """
    candidates, concepts = linear_sum_assignment(np.nan_to_num(scores), maximize=True)
    matched = np.full(scores.shape[1], -1)
    matched[concepts] = candidates
    return matched


def resamples(n_scenes: int, seed: int, n: int = RESAMPLES) -> np.ndarray:
    """How often each scene is drawn in each bootstrap sample: float32 ``[n,B]``. The same for every method."""
    rng = np.random.default_rng([seed, n_scenes])
    return rng.multinomial(n_scenes, np.full(n_scenes, 1 / n_scenes), n).astype(np.float32)


def bootstrap_precision(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision of one candidate for one concept in every bootstrap sample of scenes.

    ``scores``, ``positive``: ``[B,P]``; ``weights [n,B]``. Patches are grouped at no more than ``THRESHOLDS``
    scores, so that a sample is a weighted sum of counts per scene.
    """
    known = np.unique(scores[positive & (scores > 0)])
    levels = np.unique(np.quantile(known, np.linspace(0, 1, THRESHOLDS), method="lower")) if len(known) else known
    group = len(levels) - np.searchsorted(levels, scores, side="right")  # 0 holds the strongest, the last the silent
    counts = group + (len(levels) + 1) * np.arange(len(scores))[:, None]
    shape = len(scores), len(levels) + 1
    size = np.bincount(counts.ravel(), minlength=np.prod(shape)).reshape(shape)
    hits = np.bincount(counts[positive], minlength=np.prod(shape)).reshape(shape)
    gained, taken = weights @ hits, (weights @ size).cumsum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nansum(gained * gained.cumsum(1) / taken, 1) / gained.sum(1)


class Recovery(NamedTuple):
    """``table``: a row a concept; ``samples [n,C]``: its average precision in every bootstrap sample."""

    table: pd.DataFrame
    samples: np.ndarray


def recover(directions: Directions, train: Split, test: Split, weights: np.ndarray) -> Recovery:
    """Match on training scenes, score on test scenes.

    Columns kind, concept; candidate, the best single one, and its auprc with a 95 % interval (low, high), overlap
    (of pixels, at the threshold that is best on training scenes) and pointing; one_to_one, the auprc under the
    one-to-one matching; train_auprc; chance, the share of patches that show the concept.
    """
    precision, positives = concept_scores(directions, train), test.positives
    best, single = precision.argmax(0), one_to_one(precision)
    fitted, held_out = (directions.scores(split.patches, torch.from_numpy(best)).numpy() for split in (train, test))
    alone = directions.scores(test.patches, torch.from_numpy(np.maximum(single, 0))).numpy()
    samples, rows, images = [], [], (len(test.z), -1)
    for c, (kind, concept) in enumerate(test.concepts):
        score, shown = np.ascontiguousarray(held_out[:, c]), positives[:, [c]]
        samples.append(bootstrap_precision(score.reshape(images), shown.reshape(images), weights))
        threshold = best_threshold(np.ascontiguousarray(fitted[:, c]), train.share[..., c].ravel())
        second = average_precision(alone[:, c], shown)[0] if single[c] >= 0 else np.nan
        rows.append((kind, concept, best[c], average_precision(score, shown)[0], *percentiles(samples[-1]),
                     pixel_overlap(score >= threshold, test.share[..., c].ravel()),
                     pointing_game(score.reshape(images), shown.reshape(images)), second, precision[best[c], c],
                     shown.mean()))
    columns = ["kind", "concept", "candidate", "auprc", "low", "high", "overlap", "pointing", "one_to_one",
               "train_auprc", "chance"]
    return Recovery(pd.DataFrame(rows, columns=columns), np.stack(samples, 1))


def transferred(directions: Directions, home: pd.DataFrame, split: Split, weights: np.ndarray) -> pd.DataFrame:
    """Fig. 10 as numbers: does the candidate matched to a concept at home still find it on another task?

    ``home``: the table of ``recover``; ``split``: scenes of the other task. Columns kind, concept, candidate, home and
    there (average precision), low, high (95 %, over scenes) and chance; a row a concept that both have.
    """
    matched, rows = home.set_index(["kind", "concept"]), []
    for c, name in enumerate(split.concepts):
        shown = split.share[..., c] >= COVERED
        if name in matched.index and shown.any():
            candidate = int(matched.loc[name, "candidate"])
            score = directions.scores(split.z[:, 1:], [candidate]).numpy()[..., 0]
            low, high = percentiles(bootstrap_precision(score, shown, weights))
            there = average_precision(score.ravel(), shown.reshape(-1, 1))[0]
            rows.append((*name, candidate, matched.loc[name, "auprc"], there, low, high, shown.mean()))
    return pd.DataFrame(rows, columns=["kind", "concept", "candidate", "home", "there", "low", "high", "chance"])


#: What a latent's value on a whole image can be read from: the class token, or its patches.
READINGS = {"class token": lambda h: h[:, 0], "strongest patch": lambda h: h[:, 1:].amax(1),
            "mean of patches": lambda h: h[:, 1:].mean(1)}


def image_recovery(directions: Directions, train: Split, test: Split) -> pd.DataFrame:
    """Class token against patch tokens: is a concept anywhere in the image?

    Each reading gives one value an image and candidate; candidates are matched to concepts by average precision over
    training images and scored on test images. Columns tokens, kind, concept, candidate, auprc, chance.
    """
    shown = [(split.share >= COVERED).any(1) for split in (train, test)]
    values = [_read_images(directions, split.z) for split in (train, test)]
    rows, truth = [], PatchTruth(shown[0])
    for reading in READINGS:
        fitted, held_out = (of[reading] for of in values)
        best = np.array([truth.average_precision(candidate) for candidate in fitted]).argmax(0)
        rows += [(reading, *concept, best[c], average_precision(held_out[best[c]], shown[1][:, [c]])[0],
                  shown[1][:, c].mean()) for c, concept in enumerate(test.concepts)]
    return pd.DataFrame(rows, columns=["tokens", "kind", "concept", "candidate", "auprc", "chance"])


def _read_images(directions: Directions, z: torch.Tensor) -> dict[str, np.ndarray]:
    """Reading -> the value of every candidate on every image ``[S,B]``."""
    values = {reading: [] for reading in READINGS}
    for h in image_scores(directions, z):
        for reading, function in READINGS.items():
            values[reading].append(function(h))
    return {reading: torch.cat(parts).T.contiguous().numpy() for reading, parts in values.items()}
