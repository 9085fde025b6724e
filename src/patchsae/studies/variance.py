"""Explained variance, centred and streaming."""

import torch


class Variance:
    """Streaming explained variance, 1 - sum ||z - z_hat||^2 / sum ||z - mean||^2, in float64.

    It is centred on the mean of ``z``: a constant prediction scores at most 0 and a perfect one 1. (The
    published training log is not centred; there a constant predictor scores 0.8.)
    """

    def __init__(self):
        self.n, self.error, self.total, self.square = 0, 0.0, 0.0, 0.0

    def add(self, z: torch.Tensor, z_hat: torch.Tensor) -> None:
        """Count tokens ``[...,D]`` and their reconstructions."""
        z, z_hat = z.reshape(-1, z.shape[-1]).double(), z_hat.reshape(-1, z.shape[-1]).double()
        if self.n == 0:
            self.shift = z.mean(0)  # sums around a point near the mean lose no digits
        self.n += len(z)
        self.error += (z - z_hat).square().sum().item()
        self.total = self.total + (z - self.shift).sum(0)
        self.square += (z - self.shift).square().sum().item()

    def explained(self) -> float:
        """Explained variance of everything counted so far."""
        if self.n == 0:
            return float("nan")
        centred = self.square - (self.total.square().sum() / self.n).item()
        return 1 - self.error / centred if centred > 0 else float("nan")
