"""Encoding for the sake of sums over each image's tokens, without ever holding all latents of an image."""

import torch

from patchsae.fast import onednn
from patchsae.sae import SparseAutoencoder

#: What a CPU encodes at a time where it goes through oneDNN: 6 MB of latents of ViT-B/16's 197 tokens.
IMAGES_AT_ONCE, LATENTS_AT_ONCE = 4, 2048


class Encoder:
    """Encodes tokens for the sake of each image's mean activations and counts.

    The latents of an image are 39 MB at the paper's size. On a CPU they are made some at a time, small enough to be
    counted before they leave its cache.
    """

    def __init__(self, sae: SparseAutoencoder):
        self.sae = sae
        # Another activation than relu may depend on all latents of a token.
        plain = type(sae) is SparseAutoencoder
        in_parts = plain and sae.n_latents >= 2 * LATENTS_AT_ONCE and onednn.serves(sae.W_enc.T)
        self.rows = sae.W_enc.detach().T.contiguous() if in_parts else None

    def image_level(self, z: torch.Tensor, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean activation over the tokens ``[B,T,D]`` of each image, and how many are above ``tau``: ``[B,S]`` each."""
        if self.rows is None:
            return _mean_and_count(self.sae.encode(z), tau)
        layers = list(zip(self.rows.split(LATENTS_AT_ONCE), self.sae.b_enc.split(LATENTS_AT_ONCE)))
        means, counts = [], []
        for centred in (few - self.sae.b_dec for few in z.split(IMAGES_AT_ONCE)):
            parts = (_mean_and_count(onednn.linear(centred, rows, bias, relu=True), tau) for rows, bias in layers)
            mean, count = zip(*parts)
            means.append(torch.cat(mean, 1))
            counts.append(torch.cat(count, 1))
        return torch.cat(means), torch.cat(counts)


def _mean_and_count(h: torch.Tensor, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over the tokens of ``h [B,T,n]`` and how many are above ``tau``, ``[B,n]`` each; ``h`` is used up."""
    return h.mean(1), h.gt_(tau).sum(1, dtype=torch.float32).long()
