"""PatchSAE: sparse autoencoders on the tokens of CLIP's vision transformer."""

from patchsae.ablation import topk_masking
from patchsae.clip import load_clip
from patchsae.config import load_profile
from patchsae.datasets import ArrayDataset
from patchsae.latents import collect_latents
from patchsae.maple import MaPLe
from patchsae.sae import SparseAutoencoder, sae_loss
from patchsae.train import train_steps

__all__ = ["ArrayDataset", "MaPLe", "SparseAutoencoder", "collect_latents", "load_clip", "load_profile", "sae_loss",
           "topk_masking", "train_steps"]
