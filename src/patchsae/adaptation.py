"""What adaptation changes (sec. 4.2): accuracies, swapped sides, latents before and after, and what they can tell.

``before`` and ``after`` are models as in ``adapt``: an image tower and how it embeds class names. The autoencoder is
the one trained on plain CLIP, the images are the same, and so are the tokens: prompts are left out.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest

from patchsae.adapt import Adapted, image_embeddings

SIDES = ("clip", "adapted")


def interval(hits: np.ndarray) -> dict[str, float]:
    """Accuracy of ``hits [N]`` with its 95 % Wilson interval."""
    found = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return {"n": len(hits), "accuracy": float(np.mean(hits)), "low": found.low, "high": found.high}


@torch.no_grad()
def swap_hits(before: Adapted, after: Adapted, ds) -> dict[tuple[str, str], np.ndarray]:
    """Which images are classified right with the image tower of one model and the text features of the other.

    (image side, text side) -> bool ``[N]``; sides are "clip" and "adapted".
    """
    models = dict(zip(SIDES, (before, after)))
    embeddings = {side: image_embeddings(model.tower, ds) for side, model in models.items()}
    text = {side: model.text(ds.class_names) for side, model in models.items()}
    return {(image, words): (before.tower.logits(embeddings[image], text[words]).argmax(1).cpu().numpy() == ds.labels)
            for image in SIDES for words in SIDES}


def swap_table(before: Adapted, after: Adapted, ds) -> pd.DataFrame:
    """``swap_hits`` as accuracies: columns image, text, n, accuracy, low, high."""
    return pd.DataFrame([{"image": image, "text": words} | interval(hits)
                         for (image, words), hits in swap_hits(before, after, ds).items()])
