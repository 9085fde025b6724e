"""Parts of a reconstruction, summed from the active latents alone: where few of many latents are active, soon done."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from patchsae.sae import SparseAutoencoder


class Active(NamedTuple):
    """Latents above 0: where they are and their values, each ``[N]``."""

    image: torch.Tensor
    token: torch.Tensor
    latent: torch.Tensor
    value: torch.Tensor


def active_latents(sae: SparseAutoencoder, z: torch.Tensor) -> Active:
    """Encode tokens ``[B,T,D]`` and keep what is above 0."""
    h = sae.encode(z)
    where = h.nonzero(as_tuple=True)
    return Active(*where, h[where])


def segment_sums(sae: SparseAutoencoder, active: Active, segment: torch.Tensor, shape: tuple) -> torch.Tensor:
    """Sums of h_s W_dec[s] over the active latents of each segment: ``[B,J+1,T,D]``.

    ``segment [N]``: that of each active latent; ``shape``: (B, J+1, T).
    """
    bag, by_bag = torch.sort((active.image * shape[1] + segment) * shape[2] + active.token, stable=True)
    starts = torch.searchsorted(bag, torch.arange(np.prod(shape), device=bag.device))
    sums = F.embedding_bag(active.latent[by_bag], sae.W_dec, starts, mode="sum",
                           per_sample_weights=active.value[by_bag])
    return sums.view(*shape, -1)
