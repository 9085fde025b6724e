"""Where b_dec starts: medians of tokens (A.1)."""

import torch


def initial_b_dec(z: torch.Tensor, how: str) -> torch.Tensor:
    """Starting value of b_dec from tokens ``[B,T,D]``: ``[D]`` (A.1).

    "geometric_median" of all tokens; "geometric_median_by_position" is the published variant (one median per
    token position, then their mean); "mean"; "zeros".
    """
    if how == "geometric_median":
        return geometric_median(z.flatten(0, 1))
    if how == "geometric_median_by_position":
        return geometric_median(z.transpose(0, 1)).mean(0)
    if how == "mean":
        return z.flatten(0, 1).mean(0)
    if how == "zeros":
        return torch.zeros(z.shape[-1], device=z.device)
    raise ValueError(f"b_dec cannot start from {how!r}; choose geometric_median, geometric_median_by_position, "
                     "mean or zeros.")


@torch.no_grad()
def geometric_median(points: torch.Tensor, iterations: int = 100, tolerance: float = 1e-6) -> torch.Tensor:
    """The point with the least sum of distances: ``[...,N,D] -> [...,D]``.

    Weiszfeld's iteration, with Vardi and Zhang's step away from a data point that it would be caught in.
    """
    points = points.double()
    median = points.mean(-2)
    for _ in range(iterations):
        offset = points - median.unsqueeze(-2)
        distance = offset.norm(dim=-1, keepdim=True)
        weight = torch.where(distance > 0, 1 / distance, 0.0)
        pull, here = (weight * offset).sum(-2), (distance == 0).sum(-2)
        # The points at the median itself hold it with a force of at most their number.
        hold = (1 - here / pull.norm(dim=-1, keepdim=True).clamp_min(1e-300)).clamp_min(0)
        moved = median + hold * pull / weight.sum(-2).clamp_min(1e-300)
        done = (moved - median).norm(dim=-1).max() <= tolerance * moved.norm(dim=-1).max()
        median = moved
        if done:
            break
    return median.float()
