"""What ``tools/bench.py`` compares with: the published algorithms in straightforward PyTorch.

Batched, without gradients where none are needed and without loops over latents, but with nothing of this repository's
in them but the weights: the whole CLIP runs where its block 11 is wanted, an autoencoder makes dense ``[B,T,S]``
tensors and always encodes and decodes, and statistics and class counts are two programs that each start from the images.
"""

import torch
from torch import nn


class PlainSae(nn.Module):
    """h = relu((z - b_dec) W_enc + b_enc), z_hat = h W_dec + b_dec, with the losses that the forward pass returns."""

    def __init__(self, sae, l1: float = 8e-5):
        super().__init__()
        for name, weight in sae.named_parameters():
            setattr(self, name, nn.Parameter(weight.detach().clone()))
        self.l1 = l1

    def forward(self, z: torch.Tensor, dead: torch.Tensor | None = None) -> dict:
        """``z [B,T,D]``; ``dead``: bool ``[S]``, latents that get ghost gradients."""
        pre = (z - self.b_dec) @ self.W_enc + self.b_enc
        h = torch.relu(pre)
        z_hat = h @ self.W_dec + self.b_dec
        m = (z_hat - z).pow(2) / z.norm(dim=-1, keepdim=True)
        ghost = m.new_zeros(())
        if dead is not None and dead.any():
            ghost = self.ghost(z, pre, z_hat, m, dead)
        mse, l1 = m.mean(), self.l1 * h.abs().sum(-1).mean()
        return {"total": mse + l1 + ghost, "mse": mse, "l1": l1, "ghost": ghost, "h": h, "z_hat": z_hat}

    def ghost(self, z, pre, z_hat, m, dead) -> torch.Tensor:
        """The ghost term, with boolean indices."""
        residual = (z - z_hat).detach()
        out = torch.exp(pre[..., dead]) @ self.W_dec[dead]
        scale = residual.norm(dim=-1, keepdim=True) / (out.norm(dim=-1, keepdim=True) * 2 + 1e-6)
        out = out * scale.detach()
        q = (out - residual).pow(2) / residual.norm(dim=-1, keepdim=True)
        return (q * (m / (q + 1e-6)).detach()).mean()


class PlainTraining:
    """The published training step: unit rows, loss, backward, no gradient along a row, Adam with a warm-up."""

    def __init__(self, sae, quiet: torch.Tensor, lr: float = 4e-4, warmup: int = 500, dead_after: int = 64):
        self.sae, self.quiet, self.dead_after = PlainSae(sae), quiet.clone(), dead_after
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / warmup))

    def step(self, z: torch.Tensor) -> dict:
        """One step on tokens ``[B,T,D]``."""
        rows = self.sae.W_dec
        with torch.no_grad():
            rows /= rows.norm(dim=1, keepdim=True)
        found = self.sae(z, self.quiet > self.dead_after)
        self.optimizer.zero_grad()
        found["total"].backward()
        with torch.no_grad():
            rows.grad -= (rows.grad * rows).sum(1, keepdim=True) * rows
        self.optimizer.step()
        self.schedule.step()
        fired = (found["h"].detach() > 0).flatten(0, -2).any(0)
        self.quiet = torch.where(fired, 0, self.quiet + 1)
        return found


class HookedClip:
    """A whole CLIP with a hook on one block; the text tower reads one empty prompt with every batch, as published."""

    def __init__(self, model, layer: int):
        self.model, self.tokens = model, None
        self.prompt = torch.tensor([[model.config.text_config.bos_token_id, model.config.text_config.eos_token_id]],
                                   device=model.device)
        model.vision_model.encoder.layers[layer].register_forward_hook(self.keep)

    def keep(self, block, inputs, output) -> None:
        """The hook."""
        self.tokens = output[0] if isinstance(output, tuple) else output

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """``[B,3,H,W]`` to the tokens ``[B,T,D]`` after the block."""
        self.model(input_ids=self.prompt, attention_mask=torch.ones_like(self.prompt), pixel_values=pixels)
        return self.tokens


@torch.no_grad()
def statistics(clip: HookedClip, sae: PlainSae, pixels, labels, n_classes: int, k: int = 10, batch: int = 8) -> dict:
    """The first program: frequency, mean activation, entropy of labels and reference images."""
    s, device = sae.b_enc.shape[0], pixels.device
    values, rows = torch.zeros(s, k, device=device), torch.zeros(s, k, dtype=torch.long, device=device)
    total, count = torch.zeros(s, device=device), torch.zeros(s, device=device)
    for start in range(0, len(pixels), batch):
        strength = sae(clip(pixels[start:start + batch]))["h"].mean(1).T
        total += strength.sum(1)
        count += (strength > 0).sum(1)
        new, where = strength.topk(min(k, strength.shape[1]), dim=1)
        values, order = torch.cat([values, new], 1).topk(k, dim=1)
        rows = torch.cat([rows, where + start], 1).gather(1, order)
    weight = torch.zeros(s, n_classes, device=device).scatter_add_(1, labels[rows], values)
    share = weight / weight.sum(1, keepdim=True)
    return {"frequency": count / len(pixels), "mean_activation": total / count, "values": values, "rows": rows,
            "entropy": -torch.xlogy(share, share).sum(1)}


@torch.no_grad()
def class_counts(clip: HookedClip, sae: PlainSae, pixels, labels, n_classes: int, tau: float = 0.2, batch: int = 8):
    """The second program, which starts again from the images: tokens above tau by class, ``[C,S]``."""
    counts = torch.zeros(n_classes, sae.b_enc.shape[0], dtype=torch.long, device=pixels.device)
    for start in range(0, len(pixels), batch):
        active = (sae(clip(pixels[start:start + batch]))["h"] > tau).sum(1)
        counts.index_add_(0, labels[start:start + batch], active)
    return counts
