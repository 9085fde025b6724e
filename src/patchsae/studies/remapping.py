"""A definition of remapping that could fail: what latents can tell before and after, and what is made of it.

The paper's claim is that adaptation gains accuracy by mapping concepts that are already there to classes. So before
adaptation a linear readout of the latents must already tell the classes as well as the adapted model does, and
adaptation must not make the latents tell much more. Both are measured on images that nothing was fitted to.
"""

import numpy as np
import pandas as pd
import torch

from patchsae.activations import token_batches
from patchsae.clip import Clip
from patchsae.data.datasets import Subset
from patchsae.data.images import Images
from patchsae.masks import concept_list, patch_concepts
from patchsae.sae import SparseAutoencoder
from patchsae.studies.adapt import Adapted, image_embeddings
from patchsae.studies.scores import average_precision
from patchsae.world.probes import linear_weights

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


def readout(x: torch.Tensor, labels, x_test: torch.Tensor) -> torch.Tensor:
    """Scores of a multinomial logistic regression fitted to ``x [N,D]`` with ``labels [N]``: ``[M,D] -> [M,C]``.

    Inputs are brought to zero mean and unit deviation; those that never vary are left out.
    """
    labels, mean, std = torch.as_tensor(labels), x.mean(0), x.std(0)
    varies = std > 0
    one = torch.ones(1, device=x.device)

    def scaled(part):
        part = (part[:, varies] - mean[varies]) / std[varies]
        return torch.cat([part, one.expand(len(part), 1)], 1)

    return scaled(x_test) @ linear_weights(scaled(x), labels.to(x.device), int(labels.max()) + 1, PENALTY).T


@torch.no_grad()
def _patches(tower: Clip, sae: SparseAutoencoder, ds: Images, layer: int, kinds, n_images: int) -> tuple:
    """Latents of the patches of the first scenes ``[N,S]``, and the concepts they show, bool ``[N,K]``."""
    rows = range(min(n_images, len(ds)))
    first = Subset(ds, range(len(ds.class_names)), rows)
    latents = [sae.encode(batch.z[:, 1:tower.n_tokens]).flatten(0, 1) for batch in token_batches(tower, first, layer)]
    return torch.cat(latents), patch_concepts(ds, rows, kinds).reshape(-1, len(concept_list(ds, kinds)))


def concept_readout(tower: Clip, sae: SparseAutoencoder, train: Images, test: Images, layer: int,
                    kinds, n_images: int) -> pd.DataFrame:
    """How well each ground-truth concept can be read linearly from the latents of single patches.

    One regression per kind on the patches of the first ``n_images`` scenes of each split, those that show exactly one
    concept of the kind or none. Columns kind, concept, ap (area under the precision-recall curve), share (of patches,
    which is what chance gives).
    """
    (x, y), (x_test, y_test) = (_patches(tower, sae, ds, layer, kinds, n_images) for ds in (train, test))
    tables, concepts = [], concept_list(train, kinds)
    for kind in kinds:
        columns = [i for i, (k, _) in enumerate(concepts) if k == kind]
        tables.append(_kind_readout(x, y[:, columns], x_test, y_test[:, columns]).assign(
            kind=kind, concept=[concepts[i][1] for i in columns]))
    return pd.concat(tables, ignore_index=True)[["kind", "concept", "ap", "share"]].dropna()


def _kind_readout(x, y: np.ndarray, x_test, y_test: np.ndarray) -> pd.DataFrame:
    """Average precision of one regression for the concepts of one kind and for none of them."""
    clear, clear_test = y.sum(1) <= 1, y_test.sum(1) <= 1
    labels = np.where(y.any(1), y.argmax(1), y.shape[1])
    scores = readout(x[clear], labels[clear], x_test[clear_test]).softmax(1).cpu().numpy()
    truth = y_test[clear_test]
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


@torch.no_grad()
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
