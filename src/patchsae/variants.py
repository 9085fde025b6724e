"""Activations of an autoencoder besides the paper's relu: what they compute of pre-activations, and their gradients.

| name | a latent is kept when its pre-activation is | in training | sparsity term |
|---|---|---|---|
| relu | above 0 | the same | lambda * L1 |
| topk (Gao et al. 2024) | among the k largest of the token | the same | none |
| batchtopk (Bussmann et al. 2024) | above one threshold | among the k N largest of N tokens | none |
| jumprelu (Rajamanoharan et al. 2024) | above its own threshold, which is learned | the same | lambda * L0 |
| matryoshka (Bussmann et al. 2025) | as batchtopk | as batchtopk; nested prefixes reconstruct | none |

What is kept is cut at 0 in every one, so that latents are never negative.
"""

import torch

ACTIVATIONS = ("relu", "topk", "batchtopk", "jumprelu", "matryoshka")
#: Those of a fixed number of active latents per token, k.
FIXED = ("topk", "batchtopk", "matryoshka")
#: Those that choose latents over the whole batch in training, and by one threshold afterwards.
BATCHED = ("batchtopk", "matryoshka")
#: Where the thresholds of jumprelu start, and the width of the kernel that moves them, both in units of latents.
FIRST_THRESHOLD, BANDWIDTH = 0.5, 1.0
#: Share of the batched variants' threshold that one training step leaves as it was.
MEMORY = 0.99
#: Divisors of the number of latents that give the prefixes of matryoshka.
PREFIXES = (16, 8, 4, 2, 1)


def checked_k(activation: str, k: int, n_latents: int) -> int:
    """k of the variants that fix it, which must be from 1 to the number of latents; 0 of the others."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"There is no activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}.")
    if activation in FIXED and (not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= n_latents):
        raise ValueError(f"{activation} keeps k = {k!r} latents of {n_latents} per token; give a whole number from 1 "
                         f"to {n_latents} as k.")
    return k if activation in FIXED else 0


def top_k(pre: torch.Tensor, k: int) -> torch.Tensor:
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


def batch_top_k(pre: torch.Tensor, k: int) -> torch.Tensor:
    """The k N largest of all N tokens, cut at 0: ``[...,S] -> [...,S]``. Ties as in ``top_k``, earlier tokens first."""
    return top_k(pre.flatten(), k * (pre.numel() // pre.shape[-1])).view_as(pre)


def moved_threshold(threshold: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The running mean of the smallest kept latent ``[]`` after one more batch ``h [...,S]``; 0 before the first."""
    least = torch.where(h > 0, h, torch.inf).amin()
    moved = torch.where(threshold > 0, MEMORY * threshold + (1 - MEMORY) * least, least)
    return torch.where(least.isfinite(), moved, threshold)


def _kernel(pre: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """K((pre - theta) / epsilon) / epsilon with the rectangle K(u) = 1 for |u| < 1/2."""
    return ((pre - threshold).abs() < BANDWIDTH / 2).to(pre.dtype) / BANDWIDTH


class JumpReLU(torch.autograd.Function):
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


class Step(torch.autograd.Function):
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


def prefixes(n_latents: int) -> list[int]:
    """Lengths of the nested prefixes of matryoshka, ascending and different, the last being all latents."""
    return sorted({max(1, round(n_latents / divisor)) for divisor in PREFIXES})
