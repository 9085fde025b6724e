"""How faithful an autoencoder is: reconstruction, sparsity, zero-shot accuracy with it spliced in (table 2)."""

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from patchsae.activations import token_batches
from patchsae.clip import Clip, contrastive_loss
from patchsae.sae import SparseAutoencoder
from patchsae.studies.variance import Variance

CONDITIONS = ("original", "spliced", "ablated")


class _Sums:
    """What one pass adds up: losses and counts over tokens, hits and contrastive losses over images."""

    def __init__(self, n_latents: int, device):
        self.patch, self.cls = Variance(), Variance()
        self.mse = self.l1 = self.l0 = 0.0
        self.n_tokens, self.fired = 0, torch.zeros(n_latents, dtype=torch.bool, device=device)
        self.hits, self.losses = {c: [] for c in CONDITIONS}, {c: [] for c in CONDITIONS}

    def add_tokens(self, z, z_hat, h) -> None:
        """Count tokens ``[B,T,D]``, their reconstructions and latents ``[B,T,S]``."""
        self.cls.add(z[:, :1], z_hat[:, :1])
        if z.shape[1] > 1:
            self.patch.add(z[:, 1:], z_hat[:, 1:])
        self.mse += ((z_hat - z).square().mean(-1) / z.norm(dim=-1)).sum().item()
        self.l0 += (h > 0).sum().item()
        self.l1 += h.sum().item()
        self.fired |= (h > 0).flatten(0, 1).any(0)
        self.n_tokens += z.shape[0] * z.shape[1]


@torch.no_grad()
def measure(clip: Clip, sae: SparseAutoencoder, ds, text_features: torch.Tensor | None, layer: int,
            tokens: str = "all", batch_images: int = 64) -> pd.Series:
    """Quality of an autoencoder on a data set, one number each:

    mse (the loss's, without lambda), l0, l1 (unweighted), dead (share of latents that never fire here),
    ev_patch and ev_cls (explained variance, centred), and for z as it is, with the autoencoder spliced in, and
    with z set to zero: accuracy_* (zero-shot, from ``text_features [C,P]``) and contrastive_* (CLIP's loss of
    images and class prompts in batches, same classes being positives); NaN without text features.
    ``tokens="cls"`` replaces the class token alone; an adapted tower's prompt tokens are never replaced.
    """
    sums = _Sums(sae.n_latents, clip.device)
    for batch in token_batches(clip, ds, layer, batch_images):
        z = batch.z[:, :1] if tokens == "cls" else batch.z[:, :clip.n_tokens]
        h = sae.encode(z)
        z_hat = sae.decode(h)
        sums.add_tokens(z, z_hat, h)
        edited = {"original": z, "spliced": z_hat, "ablated": torch.zeros_like(z)}
        for condition in CONDITIONS if text_features is not None else ():
            whole = torch.cat([edited[condition], batch.z[:, z.shape[1]:]], 1)
            _classify(clip, sums, condition, clip.above(whole, layer), batch.labels.to(clip.device), text_features)
    return _summary(sums)


def _classify(clip: Clip, sums: _Sums, condition: str, embedding, labels, text_features) -> None:
    sums.hits[condition].append((clip.logits(embedding, text_features).argmax(1) == labels).cpu())
    loss = contrastive_loss(F.normalize(embedding, dim=-1), text_features[labels], labels, clip.logit_scale)
    sums.losses[condition].append(loss.item())


def _summary(sums: _Sums) -> pd.Series:
    result = {"mse": sums.mse / sums.n_tokens, "l0": sums.l0 / sums.n_tokens, "l1": sums.l1 / sums.n_tokens,
              "dead": 1 - sums.fired.float().mean().item(),
              "ev_patch": sums.patch.explained(), "ev_cls": sums.cls.explained()}
    result |= {f"accuracy_{c}": torch.cat(hits).float().mean().item() if hits else float("nan")
               for c, hits in sums.hits.items()}
    return pd.Series(result | {f"contrastive_{c}": float(np.mean(losses)) if losses else float("nan")
                               for c, losses in sums.losses.items()})
