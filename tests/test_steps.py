"""Steps by the sparse way, with looks far apart, in half precision and in two processes, against plain dense ones."""

import numpy as np
import pytest
import torch
from conftest import random_sae
from test_sae import NAMES
from test_train import sleepy_sae, tokens, twin_training

import patchsae.train
from patchsae.train import Training


@pytest.fixture
def sparse(monkeypatch):
    """Every autoencoder counts as wide, and every step after the first is sparse."""
    monkeypatch.setattr(patchsae.train, "WIDE", 0)
    monkeypatch.setattr(patchsae.train, "SPARSE_BELOW", {"cpu": 2.0})


def looks_every(monkeypatch, n):
    monkeypatch.setattr(patchsae.train, "LOOK_EVERY", {"cpu": n})


@pytest.mark.parametrize("ghost", [True, False])
@pytest.mark.parametrize("look_every", [1, 2, 3])
def test_forty_sparse_steps_equal_the_plain_loop(sparse, monkeypatch, ghost, look_every):
    looks_every(monkeypatch, look_every)
    sae, batches = sleepy_sae(torch.float64), tokens(40, torch.float64)
    start = {name: getattr(sae, name).detach().clone() for name in NAMES}
    settings = {"lr": 0.002, "l1": 0.02, "warmup": 10, "dead_after": 4, "ghost": ghost}
    expected, final, dead = twin_training(start, batches, **settings)
    assert dead[5:].any(1).all() and (dead[:-1] & ~dead[1:]).any(), "there must be ghosts that come and go"
    training = Training(sae, **settings)
    assert training.look_every == look_every
    history = torch.stack([torch.stack(training.step(z))[:4] for z in batches])
    assert training.capacity > 0
    torch.testing.assert_close(history, expected.double(), rtol=1e-6, atol=1e-9)
    for name in NAMES:
        torch.testing.assert_close(getattr(sae, name).detach(), final[name], rtol=1e-6, atol=1e-9)


def test_a_step_says_what_the_dense_formulas_say(sparse):
    sae, (first, z) = random_sae(6, 16), tokens(2, torch.float32)
    training = Training(sae, dead_after=0)
    training.step(first)
    assert training.capacity
    with torch.no_grad():
        h = sae.encode(z).flatten(0, -2)
        flat, z_hat = z.flatten(0, -2), sae.decode(h)
    step = training.step(z)
    assert step.l0 == pytest.approx((h > 0).sum(1).float().mean().item())
    assert step.dead == pytest.approx(1 - (h > 0).any(0).float().mean().item())
    explained = 1 - (flat - z_hat).square().sum() / (flat - flat.mean(0)).square().sum()
    assert step.ev == pytest.approx(explained.item(), abs=1e-5)


def test_the_way_changes_with_how_many_are_active(monkeypatch):
    monkeypatch.setattr(patchsae.train, "WIDE", 0)
    monkeypatch.setattr(patchsae.train, "SPARSE_BELOW", {"cpu": 0.2})
    sae, (z,) = random_sae(6, 16), tokens(1, torch.float32)
    training = Training(sae, lr=1e-9)
    for bias, is_sparse in ((5.0, False), (-4.0, True), (5.0, False)):
        with torch.no_grad():
            sae.b_enc[:] = bias
        training.step(z)
        assert bool(training.capacity) == is_sparse


def test_narrow_autoencoders_stay_dense():
    training = Training(random_sae(6, 16))
    training.sae.b_enc.data[:] = -4
    training.step(tokens(1, torch.float32)[0])
    assert training.capacity == 0 and not training.optimizer.defaults["fused"]


@pytest.mark.parametrize("saved_after", [1, 4, 5, 9])
@pytest.mark.parametrize("look_every", [1, 3])
def test_resumed_between_looks_bit_for_bit(sparse, monkeypatch, tmp_path, saved_after, look_every):
    looks_every(monkeypatch, look_every)
    settings = {"lr": 0.01, "l1": 0.02, "warmup": 5, "dead_after": 4}
    batches = tokens(14, torch.float32)
    whole, part = Training(sleepy_sae(torch.float32), **settings), Training(sleepy_sae(torch.float32), **settings)
    for z in batches[:saved_after]:
        whole.step(z)
        part.step(z)
    part.save(tmp_path)
    again = Training(random_sae(6, 16, 99), **settings)
    again.resume(tmp_path)
    for z in batches[saved_after:]:
        assert torch.equal(torch.stack(whole.step(z)), torch.stack(again.step(z)))
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name


def test_a_damaged_checkpoint_is_found_at_every_byte_of_its_tensors(tmp_path):
    training = Training(sleepy_sae(torch.float32))
    training.step(tokens(1, torch.float32)[0])
    training.save(tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(whole), 60):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:])
        with pytest.raises((ValueError, OSError)):
            Training(random_sae(6, 16)).resume(tmp_path)


def test_half_precision_trains_nearly_as_single(monkeypatch):
    histories = []
    for precision in ("float32", "bf16"):
        training = Training(random_sae(6, 64), lr=0.01, l1=0.01, warmup=1, ghost=False, precision=precision)
        histories.append(torch.stack([training.step(z).total for z in tokens(60, torch.float32, images=40)]))
        assert training.sae.W_enc.dtype == torch.float32
    exact, half = histories
    assert not torch.equal(exact, half) and ((half - exact).abs() < 0.02 * exact).all()
    assert half[-1] < 0.8 * half[0]
