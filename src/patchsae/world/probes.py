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
from patchsae.world.scenes import CONCEPTS, NAMES, TASKS, WORLD

PROBED = ("noun", "colour", "texture", "background")


@torch.no_grad()
def image_embeddings(clip: Clip, ds, batch_images: int = 64, layer: int = -2) -> torch.Tensor:
    """Image embeddings of a data set: ``[N,P]``, not normalised."""
    return torch.cat([clip.above(batch.z, layer) for batch in token_batches(clip, ds, layer, batch_images)])


def zero_shot(clip: Clip, ds: SceneDataset, rows, names, labels, template: str) -> float:
    """Share of images whose nearest class prompt is the right one; ``labels [len(rows)]`` index ``names``."""
    chosen = Subset(ds, range(len(ds.class_names)), rows)
    logits = clip.logits(image_embeddings(clip, chosen), class_prototypes(clip, names, [template]))
    return float((logits.argmax(1).cpu().numpy() == np.asarray(labels)).mean())


def zero_shot_table(clip: Clip, n: int = 2048) -> pd.DataFrame:
    """Zero-shot accuracy on every task, and on scenes with one object, with the chance level of each."""
    rows = []
    for task in TASKS:
        ds = SceneDataset(task, "test", n)
        every = np.arange(n)
        chosen = {task: every}
        if task in ("nouns", "sketches"):
            style, named = {"nouns": ("photo", "photos"), "sketches": ("sketch", "sketches")}[task]
            plans = [ds.scene(i).plan for i in every]
            chosen[f"{task}, one object, {named}"] = np.array(
                [i for i in every if len(plans[i].things) == 1 and plans[i].style == style])
        for name, part in chosen.items():
            labels = [ds.scene(i).label for i in part]
            accuracy = zero_shot(clip, ds, part, ds.class_names, labels, WORLD["tasks"][task]["template"])
            rows.append((name, len(ds.class_names), len(part), accuracy, 1 / len(ds.class_names)))
    rows += [_retrieval(clip, kind, n) for kind in ("colour", "background")]
    return pd.DataFrame(rows, columns=["what", "classes", "images", "accuracy", "chance"]).round(4)


def _retrieval(clip: Clip, kind: str, n: int) -> tuple:
    """Which colour or background word fits a photo of one object best."""
    ds = SceneDataset("nouns", "test", n)
    plans = [ds.scene(i).plan for i in range(n)]
    rows = [i for i, p in enumerate(plans) if len(p.things) == 1 and p.style == "photo"]
    names = NAMES["backgrounds"] if kind == "background" else CONCEPTS[kind]
    found = [plans[i].background if kind == "background" else plans[i].things[0].colour for i in rows]
    wording = {"colour": "a {} object.", "background": "on {}."}[kind]
    accuracy = zero_shot(clip, ds, rows, names, [names.index(name) for name in found], wording)
    return f"{kind} words, one object, photos", len(names), len(rows), accuracy, 1 / len(names)


def probe_table(clip: Clip, n_train: int = 2048, n_test: int = 1024) -> pd.DataFrame:
    """Accuracy of linear probes on single tokens, for every block: what a patch token says of its patch.

    A patch is labelled with the concept of each kind that covers most of it, if it covers a quarter or more; the
    class token with what the largest object has. Trained on train scenes of ``nouns``, scored on test scenes.
    """
    rows = []
    splits = {"train": SceneDataset("nouns", "train", n_train), "test": SceneDataset("nouns", "test", n_test)}
    patch = {name: _patch_labels(ds) for name, ds in splits.items()}
    whole = {name: _image_labels(ds) for name, ds in splits.items()}
    for layer in range(len(clip.blocks)):
        z = {name: torch.cat([batch.z for batch in token_batches(clip, ds, layer)]) for name, ds in splits.items()}
        for k, kind in enumerate(PROBED):
            for tokens, labels in (("patch", patch), ("class", whole)):
                x = {name: z[name][:, 1:].flatten(0, 1) if tokens == "patch" else z[name][:, 0] for name in z}
                result = _probe(x["train"], labels["train"][..., k].ravel(), x["test"], labels["test"][..., k].ravel())
                rows.append((layer, kind, tokens, *result))
    return pd.DataFrame(rows, columns=["layer", "concept", "tokens", "accuracy", "chance", "n_test"]).round(4)


def _patch_labels(ds: SceneDataset) -> np.ndarray:
    """int ``[images, patches, kinds]``; -1 where no concept of the kind covers a quarter of the patch."""
    cover = [[ds.scene(i).coverage(kind).reshape(-1, len(CONCEPTS[kind])) for kind in PROBED] for i in range(len(ds))]
    return np.array([np.stack([np.where(c.max(1) >= COVERED, c.argmax(1), -1) for c in kinds], 1) for kinds in cover])


def _image_labels(ds: SceneDataset) -> np.ndarray:
    """int ``[images, kinds]``: what the largest object is like; -1 for the colours and textures of sketches."""
    rows = []
    for plan in (ds.scene(i).plan for i in range(len(ds))):
        thing = plan.things[0]
        photo = (thing.colour, thing.texture, plan.background) if plan.style == "photo" else ("", "", "")
        names = dict(zip(PROBED, (thing.noun, *photo)))
        rows.append([CONCEPTS[kind].index(name) if name else -1 for kind, name in names.items()])
    return np.array(rows)


def _probe(x, y, x_test, y_test) -> tuple[float, float, int]:
    """Multinomial logistic regression: accuracy, share of the commonest class, number of test tokens."""
    y, y_test = torch.from_numpy(y), torch.from_numpy(y_test)
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
