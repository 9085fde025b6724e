"""What the mini CLIP can do and what its tokens hold: zero-shot accuracies and linear probes, on held-out scenes."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from patchsae.activations import token_batches
from patchsae.clip import Clip, class_prototypes
from patchsae.data.datasets import Subset
from patchsae.masks import COVERED
from patchsae.world.dataset import SceneDataset
from patchsae.world.scenes import CONCEPTS, KINDS, NAMES, TASKS, WORLD, Plan, Scene

PROBED = ("noun", "colour", "texture", "background")


@torch.no_grad()
def image_embeddings(clip: Clip, ds, batch_images: int = 64, layer: int = -2) -> torch.Tensor:
    """Image embeddings of a data set: ``[N,P]``, not normalised."""
    return torch.cat([clip.above(batch.z, layer) for batch in token_batches(clip, ds, layer, batch_images)])


def zero_shot_table(clip: Clip, n: int = 2048) -> pd.DataFrame:
    """Zero-shot accuracy on every task, and on scenes with one object, with the chance level of each."""
    trials = []  # title, data set, positions in it, names to choose from, their labels, template
    for task in TASKS:
        ds = SceneDataset(task, "test", n)
        asked = ds.class_names, ds.labels, WORLD["tasks"][task]["template"]
        trials.append((task, ds, range(n), *asked))
        if task in ("nouns", "sketches"):
            style, plural = {"nouns": ("photo", "photos"), "sketches": ("sketch", "sketches")}[task]
            trials.append((f"{task}, one object, {plural}", ds, _of_one_object(ds, style), *asked))
    ds = SceneDataset("nouns", "test", n)
    rows, labels = _of_one_object(ds, "photo"), np.array([image_labels(ds.scene(i).plan, PROBED) for i in range(n)])
    for kind, names, template in (("colour", CONCEPTS["colour"], "a {} object."),
                                  ("background", NAMES["backgrounds"], "on {}.")):
        asked = names, labels[:, PROBED.index(kind)], template
        trials.append((f"{kind} words, one object, photos", ds, rows, *asked))
    table = [(what, len(names), len(rows), _zero_shot(clip, ds, rows, names, labels[rows], template), 1 / len(names))
             for what, ds, rows, names, labels, template in trials]
    return pd.DataFrame(table, columns=["what", "classes", "images", "accuracy", "chance"]).round(4)


def _of_one_object(ds: SceneDataset, style: str) -> list[int]:
    plans = (ds.scene(i).plan for i in range(len(ds)))
    return [i for i, plan in enumerate(plans) if len(plan.things) == 1 and plan.style == style]


def _zero_shot(clip: Clip, ds: SceneDataset, rows, names, labels: np.ndarray, template: str) -> float:
    """Share of images whose nearest class prompt is the right one; ``labels [len(rows)]`` index ``names``."""
    chosen = Subset(ds, range(len(ds.class_names)), rows)
    logits = clip.logits(image_embeddings(clip, chosen), class_prototypes(clip, names, [template]))
    return float((logits.argmax(1).cpu().numpy() == labels).mean())


def probe_table(clip: Clip, n_train: int = 2048, n_test: int = 1024) -> pd.DataFrame:
    """Accuracy of linear probes on single tokens, for every block: what a patch token says of its patch.

    A patch is labelled with the concept of each kind that covers most of it, if it covers a quarter or more; the
    class token with what the largest object has. Trained on train scenes of ``nouns``, scored on test scenes.
    """
    rows = []
    splits = {"train": SceneDataset("nouns", "train", n_train), "test": SceneDataset("nouns", "test", n_test)}
    scenes = {name: [ds.scene(i) for i in range(len(ds))] for name, ds in splits.items()}
    labels = {"patch": {name: np.array([patch_labels(s, PROBED) for s in own]) for name, own in scenes.items()},
              "class": {name: np.array([image_labels(s.plan, PROBED) for s in own]) for name, own in scenes.items()}}
    for layer in range(len(clip.blocks)):
        z = {name: torch.cat([batch.z for batch in token_batches(clip, ds, layer)]) for name, ds in splits.items()}
        tokens = {"patch": {name: z[name][:, 1:].flatten(0, 1) for name in z},
                  "class": {name: z[name][:, 0] for name in z}}
        for k, kind in enumerate(PROBED):
            for which, x in tokens.items():
                y = {name: torch.from_numpy(labels[which][name][..., k].ravel()) for name in z}
                rows.append((layer, kind, which, *_probe(x["train"], y["train"], x["test"], y["test"])))
    return pd.DataFrame(rows, columns=["layer", "concept", "tokens", "accuracy", "chance", "n_test"]).round(4)


def patch_labels(scene: Scene, kinds=KINDS) -> np.ndarray:
    """Of each kind the concept that covers most of a patch, or -1 under a quarter of it: int ``[patches, kinds]``."""
    covers = [scene.coverage(kind).reshape(-1, len(CONCEPTS[kind])) for kind in kinds]
    return np.stack([np.where(cover.max(1) >= COVERED, cover.argmax(1), -1) for cover in covers], 1)


def image_labels(plan: Plan, kinds=KINDS) -> list[int]:
    """Index of each kind's concept in the image as a whole, of things in the largest one; -1 where it has none."""
    thing = plan.things[0]
    names = {"noun": thing.noun, "style": plan.style, "text": plan.word}
    if plan.style == "photo":
        names |= {"colour": thing.colour, "texture": thing.texture, "background": plan.background}
    return [CONCEPTS[kind].index(names[kind]) if names.get(kind) else -1 for kind in kinds]


def _probe(x, y, x_test, y_test) -> tuple[float, float, int]:
    """Multinomial logistic regression: accuracy, share of the commonest class, number of test tokens."""
    x, y, x_test, y_test = x[y >= 0], y[y >= 0], x_test[y_test >= 0], y_test[y_test >= 0]
    accuracy = (fit_readout(x, y, 1e-4)(x_test).argmax(1) == y_test).float().mean().item()
    return accuracy, y_test.bincount().max().item() / len(y_test), len(y_test)


# One regression for every readout -----------------------------------------------------------------------

class Readout(NamedTuple):
    """A linear readout of C things from D numbers, ``[N,D] -> [N,C]``: ``(x - centre) @ weight + bias``."""

    centre: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.centre) @ self.weight + self.bias


def fit_readout(x: torch.Tensor, y: torch.Tensor, penalty: float, iterations: int = 60) -> Readout:
    """Logistic regression on ``x [N,D]``, brought to zero mean and unit deviation; what never varies weighs nothing.

    ``y``: labels ``[N]``, one of several classes each, or ``[N,C]`` of 0 and 1, any of C things each. The biases of
    things, log odds of what may be rare, are not penalised; those of classes, which a constant may be added to, are.
    """
    mean, std = x.mean(0), x.std(0)
    std = torch.where(std > 0, std, 1)
    penalties = torch.full((x.shape[1] + 1, 1), penalty, device=x.device)
    penalties[-1] *= y.ndim == 1
    scaled = torch.cat([(x - mean) / std, torch.ones_like(x[:, :1])], 1)
    weights = logistic_weights(scaled, y, penalties, iterations)
    return Readout(mean, weights[:-1] / std[:, None], weights[-1])


def logistic_weights(x: torch.Tensor, y: torch.Tensor, penalty: float | torch.Tensor,
                     iterations: int = 60) -> torch.Tensor:
    """Logistic regression by L-BFGS: ``x [N,D]``, ``y`` as in ``fit_readout`` -> weights ``[D,C]``.

    Minimises the mean cross-entropy (of C things: summed over them) plus ``penalty``, one number or ``[D,1]``, times
    the sum of squared weights.
    """
    weight = torch.zeros(x.shape[1], int(y.max()) + 1 if y.ndim == 1 else y.shape[1], device=x.device)
    optimizer = torch.optim.LBFGS([weight.requires_grad_()], max_iter=iterations, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        error = F.cross_entropy(x @ weight, y) if y.ndim == 1 else (
            F.binary_cross_entropy_with_logits(x @ weight, y, reduction="sum") / len(y))
        value = error + (penalty * weight.square()).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach()
