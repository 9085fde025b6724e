"""The slow, obvious twin of ``patchsae.ablation``: the whole model, a dense mask and a dense decode per condition."""

import torch


@torch.no_grad()
def slow_logits(clip, sae, pixels, text, layer, keep=None, add_error=False):
    """Logits ``[B,C]`` of one condition, from a forward pass of its own.

    ``pixels [B,3,H,W]``; ``keep``: 0 or 1 ``[B,S]``, the latents of each image that stay; None edits nothing.
    """

    def edit(block, inputs, z):
        h = sae.encode(z)
        if add_error:
            return z - (h * (1 - keep)[:, None]) @ sae.W_dec
        return sae.decode(h * keep[:, None])

    blocks = clip.model.vision_model.encoder.layers
    hook = None if keep is None else blocks[layer].register_forward_hook(edit)
    try:
        embeddings = clip.model.get_image_features(pixels).pooler_output
    finally:
        if hook is not None:
            hook.remove()
    unit = embeddings / embeddings.norm(dim=-1, keepdim=True)
    return clip.model.logit_scale.exp() * unit @ text.T


def keep_mask(rankings, k, mode):
    """0 or 1 ``[B,S]`` from each image's ranking ``[B,S]``: its first k latents on, or off."""
    first = torch.zeros(rankings.shape)
    for row, ranking in zip(first, rankings):
        row[ranking[:k]] = 1
    return first if mode == "on" else 1 - first


def slow_masking(clip, sae, pixels, text, layer, rankings, ks, add_error=False):
    """Every condition, one after the other: {(mode, k): logits ``[B,C]``}, the original under ("original", 0)."""
    logits = {("original", 0): slow_logits(clip, sae, pixels, text, layer)}
    for mode in ("on", "off"):
        for k in ks:
            keep = keep_mask(rankings, k, mode)
            logits[mode, k] = slow_logits(clip, sae, pixels, text, layer, keep, add_error)
    return logits
