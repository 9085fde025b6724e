"""Activations of an autoencoder besides the paper's relu: what they compute of pre-activations, and their gradients.

| name | a latent is kept when its pre-activation is | in training | sparsity term |
|---|---|---|---|
| relu | above 0 | the same | lambda * L1 |
| topk (Gao et al. 2024) | among the k largest of the token | the same | none |
| batchtopk (Bussmann et al. 2024) | above one threshold | among the k N largest of N tokens | none |
| jumprelu (Rajamanoharan et al. 2024) | above its own threshold, which is learned | the same | lambda * L0 |
| matryoshka (Bussmann et al. 2025) | as batchtopk | as batchtopk; nested prefixes reconstruct | none |

What is kept is cut at 0 in every one, so that latents are never negative. Each is a ``SparseAutoencoder`` that says
what is different about it.
"""

from typing import Annotated

import torch
from torch import nn

from patchsae.data import checks
from patchsae.sae import SparseAutoencoder, ghost_loss, reconstruction_error
from patchsae.weights.formats import checked_k

#: Where the thresholds of jumprelu start, and the width of the kernel that moves them, both in units of latents.
FIRST_THRESHOLD, BANDWIDTH = 0.5, 1.0
#: Share of the batched variants' threshold that one training step leaves as it was.
MEMORY = 0.99
#: Divisors of the number of latents that give the prefixes of matryoshka.
PREFIXES = (16, 8, 4, 2, 1)
#: Weight of the auxiliary loss.
AUXILIARY = 1 / 32


class TopK(SparseAutoencoder):
    """The k largest of each token."""

    activation, l1_counts = "topk", 0.0

    def prepare(self, k: checks.Whole) -> None:
        self.k = checked_k(self.activation, k, self.n_latents)

    def activate(self, pre: checks.Latents, latents=slice(None)) -> torch.Tensor:
        return top_k(pre, self.k)

    def encode_some(self, z: checks.Tokens, latents: checks.Indices) -> torch.Tensor:
        # Whether a latent is among the k largest depends on all of them.
        return self.encode(z)[..., checks.indices(latents, self.n_latents, "latents")]


class BatchTopK(SparseAutoencoder):
    """The k N largest of a batch of N tokens; afterwards what is above one ``threshold []``, which training estimates.

    Ghost gradients diverge here, since a dead latent that grows takes the places of others: dead latents have
    ``auxiliary_loss``.
    """

    activation, l1_counts, steps_sparsely = "batchtopk", 0.0, False

    def prepare(self, k: checks.Whole) -> None:
        self.k = checked_k(self.activation, k, self.n_latents)
        self.register_buffer("threshold", torch.zeros(()))

    def activate(self, pre: checks.Floats, latents=slice(None)) -> torch.Tensor:
        return _Jump.apply(pre, self.threshold)

    def activate_in_training(self, pre: checks.Latents) -> torch.Tensor:
        return batch_top_k(pre, self.k)

    def revive(self, z: checks.Tokens, z_hat: checks.Tokens, m: checks.Tokens, pre: checks.Latents,
               latents: checks.SomeOf, dead: checks.Chosen) -> torch.Tensor:
        return auxiliary_loss(z, z_hat, pre[..., latents], self.W_dec[latents], dead, self.k)

    @torch.no_grad()
    def after_step(self, h: checks.Latents) -> None:
        """The running mean of the smallest latent kept; 0 before the first step."""
        least = torch.where(h > 0, h, torch.inf).amin()
        moved = torch.where(self.threshold > 0, MEMORY * self.threshold + (1 - MEMORY) * least, least)
        self.threshold.copy_(torch.where(least.isfinite(), moved, self.threshold))


class Matryoshka(BatchTopK):
    """BatchTopK of which the first n latents alone reconstruct z too, for every prefix n."""

    activation = "matryoshka"

    def error(self, z: checks.Tokens, h: checks.Latents, m: checks.Tokens) -> torch.Tensor:
        lengths = prefixes(self.n_latents)
        shorter = (reconstruction_error(z, h[..., :n] @ self.W_dec[:n] + self.b_dec).mean() for n in lengths[:-1])
        return (m.mean() + sum(shorter)) / len(lengths)


class JumpReLU(SparseAutoencoder):
    """What is above a threshold ``exp(log_threshold [S])`` of each latent's own, which is learned; lambda weighs L0.

    Ghosts are exp of pre - theta, so that thresholds come down too: with exp of pre alone, latents jump from silence to
    large values on every token.
    """

    activation, steps_sparsely = "jumprelu", False

    def prepare(self, k: checks.Whole) -> None:
        self.log_threshold = nn.Parameter(torch.full((self.n_latents,), FIRST_THRESHOLD).log())

    def activate(self, pre: checks.Floats, latents=slice(None)) -> torch.Tensor:
        thresholds = self.log_threshold[latents].exp()
        if thresholds.ndim and pre.shape[-1] != len(thresholds):
            raise ValueError(f"There are {pre.shape[-1]} pre-activations of {len(thresholds)} latents; name "
                             "those that they are of.")
        return _Jump.apply(pre, thresholds)

    def sparsity(self, pre: checks.Latents, h: checks.Latents) -> torch.Tensor:
        return _Step.apply(pre, self.log_threshold.exp()).sum(-1).mean()

    def revive(self, z: checks.Tokens, z_hat: checks.Tokens, m: checks.Tokens, pre: checks.Latents,
               latents: checks.SomeOf, dead: checks.Chosen) -> torch.Tensor:
        above = pre[..., latents] - self.log_threshold[latents].exp()
        return ghost_loss(z, z_hat, m, above, self.W_dec[latents], dead)


KINDS = {kind.activation: kind for kind in (SparseAutoencoder, TopK, BatchTopK, JumpReLU, Matryoshka)}


def auxiliary_loss(z: checks.Tokens, z_hat: checks.Tokens, pre: checks.Some, rows: Annotated[torch.Tensor, "K,D"],
                   dead: checks.Chosen, k: checks.Natural) -> torch.Tensor:
    """Dead latents reconstruct the residual, the k strongest of each token (after Gao et al. 2024, A.2).

        r = sg(z - z_hat);   mean of (top_k(pre[dead]) W_dec[dead] - r)^2 / ||z||_2, over 32

    Arguments as in ``ghost_loss``.
    """
    h = top_k(pre.masked_fill(~dead, 0), min(k, len(dead)))
    return AUXILIARY * reconstruction_error(z, h @ rows + z_hat.detach()).mean() * dead.any()


def top_k(pre: checks.Latents, k: checks.Natural) -> torch.Tensor:
    """The k largest of the last dimension cut at 0, the others 0; of equal ones the lowest index first: ``[...,S]``."""
    h = torch.relu(pre)
    least = h.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    kept = h >= least
    # Among zeros it does not matter which are kept; above 0 too many are kept only where several equal the least.
    tied = (least > 0) & (kept.sum(-1, keepdim=True) > k)
    if tied.any():
        above, equal = h > least, h == least
        first = equal & (equal.cumsum(-1, dtype=torch.int32) <= k - above.sum(-1, keepdim=True))
        kept = torch.where(tied, above | first, kept)
    return h * kept


def batch_top_k(pre: checks.Latents, k: checks.Natural) -> torch.Tensor:
    """The k N largest of all N tokens, cut at 0: ``[...,S] -> [...,S]``. Ties as in ``top_k``, earlier tokens first."""
    return top_k(pre.flatten(), k * (pre.numel() // pre.shape[-1])).view_as(pre)


def prefixes(n_latents: checks.Natural) -> list[int]:
    """Lengths of the nested prefixes of matryoshka, ascending and different, the last being all latents."""
    return sorted({max(1, round(n_latents / divisor)) for divisor in PREFIXES})


def _kernel(pre: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """K((pre - theta) / epsilon) / epsilon with the rectangle K(u) = 1 for |u| < 1/2."""
    return ((pre - threshold).abs() < BANDWIDTH / 2).to(pre.dtype) / BANDWIDTH


class _Jump(torch.autograd.Function):
    """relu(pre) H(pre - theta), ``[...,S]`` and ``[S]`` or ``[]`` (Rajamanoharan et al., eq. 11).

        d / d pre   = H(pre - theta)
        d / d theta = -theta K((pre - theta) / epsilon) / epsilon       the true one is 0 almost everywhere
    """

    @staticmethod
    def forward(ctx, pre, threshold):
        ctx.save_for_backward(pre, threshold)
        return torch.relu(pre) * (pre > threshold)

    @staticmethod
    def backward(ctx, gradient):
        pre, threshold = ctx.saved_tensors
        to_threshold = None
        if ctx.needs_input_grad[1]:
            to_threshold = (-threshold * _kernel(pre, threshold) * gradient).sum_to_size(threshold.shape)
        return gradient * ((pre > threshold) & (pre > 0)), to_threshold


class _Step(torch.autograd.Function):
    """H(pre - theta): whether each latent is active, ``[...,S]`` and ``[S]`` (Rajamanoharan et al., eq. 12).

        d / d pre = 0;   d / d theta = -K((pre - theta) / epsilon) / epsilon
    """

    @staticmethod
    def forward(ctx, pre, threshold):
        ctx.save_for_backward(pre, threshold)
        return (pre > threshold).to(threshold.dtype)

    @staticmethod
    def backward(ctx, gradient):
        pre, threshold = ctx.saved_tensors
        return None, (-_kernel(pre, threshold) * gradient).sum_to_size(threshold.shape)


checks.guard(globals())
