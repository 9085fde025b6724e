"""The sparse step against the dense loss and autograd; the GPU's kernels, in Triton's interpreter, against the CPU."""

import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import random_sae
from test_sae import NAMES

from patchsae import SparseAutoencoder, sae_loss
from patchsae.fast.sparse import _positive, _positive_within, _Sums, find_active, sparse_step, weighted_sums


def case(dtype, seed, share_dead, bias=-1.5, n=61, width=6, latents=40, **variant):
    """An autoencoder, tokens ``[n, width]``, and which latents are dead."""
    numbers = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(width, latents, **variant).to(dtype)
    sae.load_state_dict(random_sae(width, latents, seed, bias, dtype).state_dict())
    z = torch.randn(n, width, generator=numbers, dtype=dtype) * 1.5
    return sae, z, torch.rand(latents, generator=numbers) < share_dead


@pytest.mark.parametrize("share_dead, bias", [(0.0, -1.5), (0.3, -1.5), (1.0, -1.5), (0.3, -100.0), (0.3, 100.0)])
@pytest.mark.parametrize("superset", [False, True])
@pytest.mark.parametrize("variant", [{}, {"activation": "topk", "k": 4}], ids=["relu", "topk"])
def test_the_sparse_step_is_the_dense_one_and_its_backward_pass(share_dead, bias, superset, variant):
    sae, z, dead = case(torch.float64, 3, share_dead, bias, **variant)
    if bias > 0:
        dead[:] = False  # exp of such pre-activations has no meaning
    losses = sae_loss(sae, z, 0.02, dead)
    losses.total.backward()
    expected = {name: getattr(sae, name).grad.clone() for name in NAMES}
    sae.zero_grad()
    candidates = torch.arange(40) if superset else dead.nonzero()[:, 0]
    done = sparse_step(sae, z, 0.02, dead, candidates, capacity=10**6)
    for name in ("mse", "l1", "ghost", "total", "z_hat"):
        torch.testing.assert_close(getattr(done, name), getattr(losses, name).detach())
    for name in NAMES:
        torch.testing.assert_close(getattr(sae, name).grad, expected[name], msg=name)
    assert done.n_active == (losses.h > 0).sum() and torch.equal(done.fired, (losses.h > 0).any(0))


def test_gradients_by_finite_differences():
    sae, z, dead = case(torch.float64, 5, 0.0)
    sparse_step(sae, z, 0.05, dead, dead.nonzero()[:, 0], 0)
    numbers = np.random.default_rng(0)
    for name in NAMES:
        parameter = getattr(sae, name)
        for _ in range(6):
            at = tuple(numbers.integers(0, parameter.shape))
            total = []
            for shift in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter[at] += shift
                    total.append(sae_loss(sae, z, 0.05).total.item())
                    parameter[at] -= shift
            assert (total[0] - total[1]) / 2e-6 == pytest.approx(parameter.grad[at].item(), rel=1e-5, abs=1e-9)


def test_tokens_are_encoded_a_few_at_a_time_with_the_same_result(monkeypatch):
    sae, z, dead = case(torch.float32, 8, 0.2)
    candidates = dead.nonzero()[:, 0]
    whole = find_active(sae, z, candidates, 0)
    for at_once in (1, 7, 60, 61):
        monkeypatch.setattr("patchsae.fast.sparse.AT_ONCE", at_once)
        for a, b in zip(find_active(sae, z, candidates, 0), whole):
            torch.testing.assert_close(a, b)
    h = sae.encode(z).detach()
    rebuilt = torch.zeros_like(h)
    rebuilt[whole.tokens, whole.latents] = whole.values
    torch.testing.assert_close(rebuilt, h)


def test_half_precision_differs_by_its_rounding():
    """Without ghosts, whose weight m / q has no bound where a residual is met by chance."""
    sae, z, dead = case(torch.float32, 2, 0.0, n=500)
    exact = sparse_step(sae, z, 0.02, dead, dead.nonzero()[:, 0], 0)
    gradients = {name: getattr(sae, name).grad.clone() for name in NAMES}
    half = sparse_step(sae, z, 0.02, dead, dead.nonzero()[:, 0], 0, bf16=True)
    assert 0 < abs(half.total - exact.total) < 0.01 * exact.total
    for name in NAMES:
        assert (getattr(sae, name).grad - gradients[name]).norm() < 0.02 * gradients[name].norm()


# The kernels

@pytest.fixture
def kernels():
    """The Triton kernels, interpreted (see conftest.py); Triton comes with the CUDA builds of torch, or by itself."""
    pytest.importorskip("triton", reason="the GPU kernels are checked where Triton is installed: pip install triton")
    return importlib.import_module("patchsae.fast.kernels")


def entries(seed, groups=9, rows=30, padding=5):
    """Values, rows and offsets of entries in groups, some of them empty, and padding behind."""
    numbers = np.random.default_rng(seed)
    counts = numbers.integers(0, 6, groups)
    counts[2] = 0
    offsets = torch.from_numpy(np.concatenate([[0], counts.cumsum()]))
    m = int(counts.sum()) + padding
    values = torch.randn(m, generator=torch.Generator().manual_seed(seed))
    return values, torch.from_numpy(numbers.integers(0, rows, m)), offsets


@pytest.mark.parametrize("width", [5, 256, 300])
def test_kernel_sums_and_dots(kernels, width):
    values, index, offsets = entries(width)
    table = torch.randn(30, width, generator=torch.Generator().manual_seed(1))
    above = torch.randn(9, width, generator=torch.Generator().manual_seed(2))
    expected = torch.stack([(values[a:b, None] * table[index[a:b]]).sum(0) for a, b in zip(offsets, offsets[1:])])
    torch.testing.assert_close(kernels.sums(values, index, offsets, table), expected)
    leaf = values.clone().requires_grad_()
    _Sums.apply(leaf, index, offsets, table).backward(above)
    last = int(offsets[-1])
    ours = values[:last].clone().requires_grad_()
    on_cpu = weighted_sums(ours, index[:last], offsets, table)
    torch.testing.assert_close(on_cpu, expected)
    on_cpu.backward(above)
    torch.testing.assert_close(leaf.grad[:last], ours.grad)
    assert not leaf.grad[last:].any()


@pytest.mark.parametrize("capacity", [4000, 100])
def test_kernel_finds_what_is_active_up_to_its_capacity(kernels, capacity):
    h = torch.randn(7, 1500, generator=torch.Generator().manual_seed(0)) - 0.9
    h[3] = -1
    counts, rows, columns, values = _positive(h)
    found_counts, *found = _positive_within(h, capacity)
    assert torch.equal(counts, found_counts)
    n = min(capacity, int(counts.sum()))
    for expected, got in zip((rows, columns, values), found):
        assert len(got) == capacity
        torch.testing.assert_close(got[:n].to(expected.dtype), expected[:n])
    if n < capacity:
        assert bool((found[1][n:] == 1500).all()) and not found[2][n:].any()


def test_a_whole_step_with_the_kernels(kernels, monkeypatch):
    """As on a GPU: the entries have padding, and all sums are the kernels'."""
    sae, z, dead = case(torch.float32, 4, 0.3)
    candidates = dead.nonzero()[:, 0]
    expected = sparse_step(sae, z, 0.02, dead, candidates, 0)
    gradients = {name: getattr(sae, name).grad.clone() for name in NAMES}
    monkeypatch.setattr("patchsae.fast.sparse._positive", lambda h: _positive_within(h, 900))
    monkeypatch.setattr("patchsae.fast.sparse.weighted_sums", _Sums.apply)
    done = sparse_step(sae, z, 0.02, dead, candidates, 900)
    assert done.n_active < 900
    for a, b in zip(done, expected):
        torch.testing.assert_close(a, b)
    for name in NAMES:
        torch.testing.assert_close(getattr(sae, name).grad, gradients[name])


COMPILES = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from patchsae.fast import kernels

entries = {"index": "*i32", "offsets": "*i64"}
for half in ("*bf16", "*fp32"):
    table = {"table": half, "out": "*fp32", "width": "i32", "BLOCK": "constexpr"}
    active = {"tokens": "*i32", "latents": "*i32", "values": "*fp32", "n_latents": "i32", "capacity": "i32"}
    for kernel, types in ((kernels._sums_kernel, {"values": "*fp32"} | entries | table),
                          (kernels._dots_kernel, {"rows": "*fp32"} | entries | table),
                          (kernels._active_kernel, {"h": half, "offsets": "*i64"} | active | {"BLOCK": "constexpr"})):
        source = ASTSource(kernel, types, constexprs={"BLOCK": 1024})
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


def test_the_kernels_compile_for_an_h100(kernels):
    """Down to machine code, which needs no GPU; in a process in which they are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
