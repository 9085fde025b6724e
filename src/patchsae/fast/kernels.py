"""Triton kernels for sums over active latents on a GPU; ``TRITON_INTERPRET=1`` runs them on the CPU, for tests.

Entries ``[M]`` are grouped: group g has the entries ``offsets[g] <= i < offsets[g + 1]``; those behind the last offset
are padding. Sums are taken in float32 and in a fixed order, so that the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl

#: Columns of a table that one program sums, and latents that one program looks at in a step.
COLUMNS, LATENTS = 256, 1024


@triton.jit
def _sums_kernel(values, index, offsets, table, out, width, BLOCK: tl.constexpr):
    group, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.load(offsets + group), tl.load(offsets + group + 1)):
        row = tl.load(index + i).to(tl.int64) * width
        total += tl.load(values + i).to(tl.float32) * tl.load(table + row + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + group.to(tl.int64) * width + column, total, mask=inside)


@triton.jit
def _dots_kernel(rows, index, offsets, table, out, width, BLOCK: tl.constexpr):
    group, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < width
    own = tl.load(rows + group.to(tl.int64) * width + column, mask=inside, other=0).to(tl.float32)
    for i in range(tl.load(offsets + group), tl.load(offsets + group + 1)):
        row = tl.load(index + i).to(tl.int64) * width
        other = tl.load(table + row + column, mask=inside, other=0).to(tl.float32)
        tl.store(out + i, tl.sum(own * other))


@triton.jit
def _active_kernel(h, offsets, tokens, latents, values, n_latents, capacity, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    place = tl.load(offsets + token)
    for start in range(0, n_latents, BLOCK):
        latent = start + tl.arange(0, BLOCK)
        value = tl.load(h + token.to(tl.int64) * n_latents + latent, mask=latent < n_latents, other=0).to(tl.float32)
        on = (value > 0).to(tl.int32)
        at = place + tl.cumsum(on) - 1
        kept = (on > 0) & (at < capacity)
        tl.store(tokens + at, token, mask=kept)
        tl.store(latents + at, latent, mask=kept)
        tl.store(values + at, value, mask=kept)
        place += tl.sum(on)


def sums(values: torch.Tensor, index: torch.Tensor, offsets: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """For each group the sum of ``values [M]`` times the rows ``index [M]`` of ``table [R,D]``: ``[G,D]``, float32."""
    out = torch.empty(len(offsets) - 1, table.shape[1], device=table.device)
    grid = (len(out), triton.cdiv(table.shape[1], COLUMNS))
    _sums_kernel[grid](values, index, offsets, table, out, table.shape[1], BLOCK=COLUMNS)
    return out


def dots(rows: torch.Tensor, index: torch.Tensor, offsets: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """For each entry the product of its group's row of ``rows [G,D]`` and row ``index`` of ``table``: ``[M]``, float32;
    0 for padding."""
    out = torch.zeros(len(index), device=table.device)
    block = triton.next_power_of_2(table.shape[1])
    _dots_kernel[(len(rows),)](rows, index, offsets, table, out, table.shape[1], BLOCK=block)
    return out


def active(h: torch.Tensor, offsets: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, latents and values of the positive entries of ``h [N,S]`` in order, each ``[capacity]``; padding is of
    latent S and value 0, and what does not fit is left out."""
    tokens = torch.zeros(capacity, dtype=torch.int32, device=h.device)
    latents, values = torch.full_like(tokens, h.shape[1]), torch.zeros(capacity, device=h.device)
    _active_kernel[(len(h),)](h, offsets, tokens, latents, values, h.shape[1], capacity, BLOCK=LATENTS)
    return tokens, latents, values
