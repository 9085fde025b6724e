"""A training step from the active latents alone: the dense formulas without their zeros (sec. 3.1, A.1).

A token has some 150 active latents of 49,152. Finding them takes one dense product. Decoding, the gradient of the
activations and the gradients of both weight matrices, four more such products in a dense step, are sums over the
active latents here. Nothing waits for the device: on a GPU the number of active latents has a bound that is set
beforehand, and that it was kept is asked for later.

With a_ns = h_ns of token n and latent s where it is active, c_n = z_n - b_dec, and G_n = dL/dz_hat_n, which autograd
gives, the chain rule reads, all sums over active pairs (n, s) alone:

    z_hat_n   = sum_s a_ns W_dec[s] + b_dec            dL/dW_dec[s]   = sum_n a_ns G_n
    p_ns      = dL/da_ns = <G_n, W_dec[s]> + lambda/N  dL/dW_enc[:,s] = sum_n p_ns c_n
    dL/db_enc[s] = sum_n p_ns                          since da/d pre = 1 where a latent is active and 0 elsewhere
    dL/db_dec = sum_n G_n - W_enc dL/db_enc            by way of z_hat, and by way of c_n = z_n - b_dec
    ghosts add their own dL/d pre_nk and dL/d rows_k of the few dead latents k, dense, in the same four places
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from patchsae.fast import onednn
from patchsae.sae import SparseAutoencoder, ghost_loss, reconstruction_error

#: Tokens that the CPU encodes at a time, so that their latents stay in its cache.
AT_ONCE = 512


class Active(NamedTuple):
    """The active latents of N tokens, token by token: ``tokens``, ``latents`` and ``values``, ``[M]`` each.

    ``offsets [N+1]``: where each token's begin. ``pre_dead [N,K]``: pre-activations of the latents asked for.
    On a GPU M is a capacity; entries behind the last offset are padding, of latent S and value 0. ``total``: how many
    there were, more than M if some did not fit.
    """

    tokens: torch.Tensor
    latents: torch.Tensor
    values: torch.Tensor
    offsets: torch.Tensor
    pre_dead: torch.Tensor
    total: torch.Tensor


class SparseStep(NamedTuple):
    """Scalars ``mse``, ``l1`` (weighted), ``ghost`` and ``total``; ``z_hat [N,D]``; ``n_active``: active latents of all
    tokens together; ``fired``: bool ``[S]``."""

    mse: torch.Tensor
    l1: torch.Tensor
    ghost: torch.Tensor
    total: torch.Tensor
    z_hat: torch.Tensor
    n_active: torch.Tensor
    fired: torch.Tensor


class _Sums(torch.autograd.Function):
    """``kernels.sums`` with the gradient of its values."""

    @staticmethod
    def forward(ctx, values, index, offsets, table):
        from patchsae.fast import kernels  # Triton comes with the CUDA builds of torch alone

        ctx.save_for_backward(index, offsets, table)
        return kernels.sums(values, index, offsets, table)

    @staticmethod
    def backward(ctx, gradient):
        from patchsae.fast import kernels

        return kernels.dots(gradient.contiguous(), *ctx.saved_tensors), None, None, None


def weighted_sums(values, index, offsets, table) -> torch.Tensor:
    """For each group of entries the sum of ``values [M]`` times the rows ``index [M]`` of ``table [R,D]``: ``[G,D]``.

    Group g has the entries ``offsets[g] <= i < offsets[g + 1]``. Differentiable in ``values``.
    """
    if table.is_cuda:
        return _Sums.apply(values, index, offsets, table)
    return F.embedding_bag(index, table, offsets, mode="sum", per_sample_weights=values, include_last_offset=True)


@torch.no_grad()
def find_active(sae: SparseAutoencoder, z: torch.Tensor, candidates: torch.Tensor, capacity: int,
                bf16: bool = False) -> Active:
    """Encode tokens ``[N,D]`` and keep what is active. ``candidates [K]``: latents whose pre-activations are kept."""
    parts = []
    for part in z.split(len(z) if z.is_cuda else AT_ONCE):
        with torch.autocast(z.device.type, torch.bfloat16, enabled=bf16):
            linear = F.linear if bf16 else onednn.linear
            pre = linear(part - sae.b_dec, sae.W_enc.T, sae.b_enc)
        # What is above 0 is looked for below, which is all that relu does.
        h = pre if type(sae) is SparseAutoencoder else sae.activate(pre)
        parts.append((*(_positive_within(h, capacity) if z.is_cuda else _positive(h)), pre[:, candidates].to(z.dtype)))
    if len(parts) == 1:
        counts, tokens, latents, values, pre_dead = parts[0]
    else:
        starts = range(0, len(z), AT_ONCE)
        tokens = torch.cat([part[1] + start for part, start in zip(parts, starts)])
        counts, _, latents, values, pre_dead = map(torch.cat, zip(*parts))
    ends = counts.cumsum(0)
    offsets = F.pad(ends.clamp(max=len(latents)), (1, 0))
    return Active(tokens, latents, values.to(z.dtype), offsets, pre_dead, ends[-1])


def _positive(h: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """How many entries of each row of ``[N,S]`` are positive, and their rows, columns and values."""
    # numpy's search for what is true takes a sixth of the time of torch's.
    where = np.flatnonzero((h > 0).numpy())
    rows, columns = map(torch.from_numpy, np.divmod(where, h.shape[1]))
    return torch.bincount(rows, minlength=len(h)), rows, columns, h.flatten()[torch.from_numpy(where)]


def _positive_within(h: torch.Tensor, capacity: int) -> tuple[torch.Tensor, ...]:
    """The same on a GPU, where not more than ``capacity`` are found and no size depends on what is."""
    from patchsae.fast import kernels

    counts = (h > 0).sum(1)
    starts = (counts.cumsum(0) - counts).clamp(max=capacity)
    return counts, *kernels.active(h, starts, capacity)


def sparse_step(sae: SparseAutoencoder, z: torch.Tensor, l1: float, dead: torch.Tensor, candidates: torch.Tensor,
                capacity: int, bf16: bool = False) -> SparseStep:
    """What ``sae_loss`` and its backward pass give for relu or topk, for tokens ``[N,D]``: gradients are left in the
    parameters.

    ``dead``: bool ``[S]``; ``candidates [K]``: latents among which all dead ones are. ``bf16``: encode in half
    precision, and on a GPU read the rows that are summed in it.
    """
    dtype = torch.bfloat16 if bf16 and z.is_cuda else z.dtype
    found = find_active(sae, z, candidates, capacity, bf16)
    values, pre = found.values.requires_grad_(), found.pre_dead.requires_grad_()
    rows = sae.W_dec.detach()[candidates].requires_grad_()
    z_hat = weighted_sums(values, found.latents, found.offsets, sae.W_dec.detach().to(dtype)) + sae.b_dec.detach()
    z_hat.retain_grad()
    m = reconstruction_error(z, z_hat)
    mse, sparsity, ghost = m.mean(), l1 * sae.l1_counts * values.sum() / len(z), m.new_zeros(())
    if len(candidates):
        ghost = ghost_loss(z, z_hat, m, pre, rows, dead[candidates])
    total = mse + sparsity + ghost
    total.backward()
    fired = _set_gradients(sae, z, found, z_hat.grad, dtype)
    if len(candidates):
        sae.W_dec.grad.index_add_(0, candidates, rows.grad)
        sae.W_enc.grad.T.index_add_(0, candidates, pre.grad.T @ (z - sae.b_dec.detach()))
        sae.b_enc.grad.index_add_(0, candidates, pre.grad.sum(0))
    sae.b_dec.grad = z_hat.grad.sum(0) - sae.W_enc.detach() @ sae.b_enc.grad
    return SparseStep(*(t.detach() for t in (mse, sparsity, ghost, total, z_hat)), found.total, fired)


def _set_gradients(sae: SparseAutoencoder, z, found: Active, above: torch.Tensor, dtype) -> torch.Tensor:
    """Gradients of W_enc, b_enc and W_dec by what is active, from ``above [N,D]``, that of z_hat; which latents fired.

    The entries are put in the order of their latents, so that each latent's gradients are sums over its tokens.
    """
    latents, order = found.latents.sort(stable=True)
    tokens, slopes = found.tokens[order], found.values.grad[order]
    offsets = torch.searchsorted(latents, torch.arange(sae.n_latents + 1, device=z.device, dtype=latents.dtype))
    centred = (z - sae.b_dec.detach()).to(dtype)
    sae.W_dec.grad = weighted_sums(found.values.detach()[order], tokens, offsets, above.to(dtype))
    sae.W_enc.grad = weighted_sums(slopes, tokens, offsets, centred).T
    sae.b_enc.grad = torch.segment_reduce(slopes, "sum", offsets=offsets, initial=0, unsafe=True)
    return offsets.diff() > 0
