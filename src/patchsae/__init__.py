"""PatchSAE: sparse autoencoders on the tokens of CLIP's vision transformer (ICLR 2025), to be read and to be used.

The paper is a line, and the top level of this package is that line, in reading order::

    clip         images --below--> z, the residual stream [B,T,D] after a block; --above--> image embedding; text
    maple        an adapted model: the same two functions, with learned prompt tokens
    sae          z --encode--> h, the latents [B,T,S]; --decode--> z_hat; the loss (eq. 1 and 2)
    variants     other activations than relu
    activations  a data set's tokens, streamed; their order in training
    cache        the same tokens on the disk, verified
    train        one step, and a run that goes on where it stopped
    latents      one pass -> frequency, strength, reference images, class counts (eq. 3 to 5)
    masks        where in an image a latent is active
    ablation     latents switched on and off in zero-shot classification (sec. 4.1)
    config       profiles: which model, images and settings a run has

Folders carry it: ``data`` (where images come from), ``weights`` (where weights come from), ``fast`` (the same numbers,
sooner), ``world`` (the drawn world), ``studies`` (longer questions), ``figures``, ``app``, ``project``.

An example, on your own images ``uint8 [N,H,W,3]`` and labels ``[N]``::

    from patchsae import ArrayDataset, SparseAutoencoder, collect_latents, load_clip, train_steps

    clip = load_clip("openai/clip-vit-base-patch16")
    images = ArrayDataset(pixels, labels)
    sae = SparseAutoencoder(clip.width, 8 * clip.width)
    train_steps(sae, (clip.below(clip.pixels(batch), -2) for batch in pixels.reshape(-1, 16, *pixels.shape[1:])))
    latents = collect_latents(clip, sae, images, layer=-2)
    print(latents.table().sort_values("frequency"))
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from patchsae.ablation import topk_masking
    from patchsae.cache import open_cache, write_cache
    from patchsae.clip import load_clip
    from patchsae.config import load_profile
    from patchsae.data.datasets import ArrayDataset
    from patchsae.latents import collect_latents
    from patchsae.maple import MaPLe
    from patchsae.sae import SparseAutoencoder, sae_loss
    from patchsae.studies.study import open_study
    from patchsae.train import train_steps

__version__ = "0.2.0"
#: Public name -> the room it is in, which is imported when the name is first used.
_ROOMS = {"load_profile": "config", "load_clip": "clip", "MaPLe": "maple", "SparseAutoencoder": "sae",
          "sae_loss": "sae", "ArrayDataset": "data.datasets", "train_steps": "train", "write_cache": "cache",
          "open_cache": "cache", "collect_latents": "latents", "topk_masking": "ablation",
          "open_study": "studies.study"}

__all__ = ["ArrayDataset", "MaPLe", "SparseAutoencoder", "collect_latents", "load_clip", "load_profile", "open_cache",
           "open_study", "sae_loss", "topk_masking", "train_steps", "write_cache"]


def __getattr__(name: str):
    if name not in _ROOMS:
        raise AttributeError(f"module 'patchsae' has no attribute {name!r}")
    return getattr(importlib.import_module(f"patchsae.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
