"""What a GPU does differently: kernels, streams, half precision, room for active latents. Run by ``make test-gpu``.

These need a CUDA device, and Triton compiling its kernels rather than interpreting them, as all other tests have it.
"""

import os

import numpy as np
import pytest
import torch
from conftest import LAYER, SIDE, random_sae

import patchsae.train
from patchsae import ArrayDataset, SparseAutoencoder, collect_latents, open_cache, sae_loss, topk_masking, write_cache
from patchsae.clip import Clip
from patchsae.fast.pools import ahead
from patchsae.fast.sparse import sparse_step
from patchsae.train import Training, train_sae

GPU = torch.device("cuda")

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="There is no CUDA device, or Triton interprets its kernels; run make test-gpu where there is one.")


def wide_sae(latents: int = 4096, width: int = 64, share_dead: float = 0.02) -> SparseAutoencoder:
    """An autoencoder on the GPU of which few latents are active on a token, and some never are."""
    sae = SparseAutoencoder(width, latents, torch.Generator().manual_seed(3))
    with torch.no_grad():
        sae.b_enc[:] = -0.25
        sae.b_enc[:int(share_dead * latents)] = -30
    return sae.to(GPU)


def some_tokens(n: int = 512, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).to(GPU)


def dead_latents(sae: SparseAutoencoder) -> torch.Tensor:
    return sae.b_enc.detach() < -20


def by_kernels(sae: SparseAutoencoder, z: torch.Tensor, bf16: bool = False):
    """Loss terms and gradients of the sparse step."""
    dead = dead_latents(sae)
    room = 2 * int((sae.encode(z) > 0).sum())
    done = sparse_step(sae, z, 8e-5, dead, dead.nonzero()[:, 0], room, bf16)
    return torch.stack(done[:4]), {name: p.grad.clone() for name, p in sae.named_parameters()}


def test_the_step_by_kernels_is_the_dense_one():
    sae, z = wide_sae(), some_tokens()
    losses, gradients = by_kernels(sae, z)
    sae.zero_grad()
    dense = sae_loss(sae, z, l1=8e-5, dead=dead_latents(sae))
    dense.total.backward()
    expected = torch.stack([dense.mse, dense.l1, dense.ghost, dense.total]).detach()
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-7)
    for name, p in sae.named_parameters():
        assert (gradients[name] - p.grad).norm() <= 1e-3 * p.grad.norm(), name


@pytest.mark.parametrize("skewed", [False, True])
def test_gradients_are_the_same_bits_again(skewed):
    """A latent that is active on every token is summed in the same order each time, too."""
    sae, z = wide_sae(), some_tokens(4096)
    if skewed:
        sae.b_enc.data[-4:] = 5
    (first, a), (again, b) = by_kernels(sae, z), by_kernels(sae, z)
    assert torch.equal(first, again) and all(torch.equal(a[name], b[name]) for name in a)


def test_half_precision_differs_by_its_rounding():
    sae, z = wide_sae(), some_tokens()
    (exact, a), (rounded, b) = by_kernels(sae, z), by_kernels(sae, z, bf16=True)
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=1e-6)
    assert all((a[name] - b[name]).norm() <= 0.05 * a[name].norm() for name in a)


def test_what_is_computed_ahead_is_what_was_asked_for():
    """Each tensor is made of the one before it, on the other stream, while the first one is busy."""
    def items():
        x = torch.zeros(1 << 20, device=GPU)
        for _ in range(20):
            x = x + 1
            yield x.clone()

    for i, x in enumerate(ahead(items(), GPU)):
        busy = torch.randn(1024, 1024, device=GPU)
        for _ in range(5):
            busy = busy @ busy / 1024
        assert x.min().item() == x.max().item() == i + 1


@pytest.fixture
def small_counts_as_wide(monkeypatch):
    monkeypatch.setattr(patchsae.train, "WIDE", 0)
    monkeypatch.setattr(patchsae.train, "SPARSE_BELOW", {"cpu": 2.0, "cuda": 2.0})


def test_more_active_latents_than_there_is_room_for_are_refused_at_the_next_look(small_counts_as_wide, monkeypatch):
    monkeypatch.setattr(patchsae.train, "LOOK_EVERY", {"cpu": 1, "cuda": 2})
    training = Training(random_sae().to(GPU))
    z = torch.randn(64, training.sae.d_model, generator=torch.Generator().manual_seed(1)).to(GPU)
    training.step(z)
    training.step(z)
    training.capacity = 3
    training.step(z)
    with pytest.raises(patchsae.train.TooManyActive):
        training.step(z)


@pytest.fixture
def on_gpu(clip) -> Clip:
    """The tests' CLIP on the GPU; it goes back afterwards."""
    clip.model.to(GPU)
    yield Clip(clip.model, clip.tokenizer, clip.processor)
    clip.model.to("cpu")


@pytest.fixture
def images() -> ArrayDataset:
    numbers = np.random.default_rng(0)
    return ArrayDataset(numbers.integers(0, 256, (40, SIDE, SIDE, 3), dtype=np.uint8), np.arange(40) % 4,
                        class_names=("cat", "dog", "pig", "owl"))


def test_a_run_resumes_to_the_same_bytes(small_counts_as_wide, profile, on_gpu, images, tmp_path, monkeypatch):
    whole, log = train_sae(profile, on_gpu, images, tmp_path / "whole")
    steps, save = 0, Training.save

    def stop_once(self, folder):
        nonlocal steps
        save(self, folder)
        steps += 1
        if steps == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "save", stop_once)
    with pytest.raises(KeyboardInterrupt):
        train_sae(profile, on_gpu, images, tmp_path / "cut")
    again, log_again = train_sae(profile, on_gpu, images, tmp_path / "cut")
    assert log.equals(log_again)
    assert all(torch.equal(whole.state_dict()[name], value) for name, value in again.state_dict().items())


def test_statistics_masking_and_cache_are_those_of_the_cpu(clip, images, tmp_path):
    """First on the CPU, then on the GPU with the same weights, in float32."""
    text = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(2)), dim=1)

    def all_of_it(folder):
        sae = random_sae().to(clip.device)
        stats = collect_latents(clip, sae, images, LAYER)
        table = topk_masking(clip, sae, images, stats, text, LAYER, [1, 5, "all"], per_image=True)
        write_cache(clip, images, LAYER, folder)
        tokens = next(open_cache(folder).batches([np.arange(8)], clip.device))
        return stats, np.stack(table["logits"]), tokens

    before = all_of_it(tmp_path / "cpu")
    clip.model.to(GPU)
    try:
        after = all_of_it(tmp_path / "gpu")
    finally:
        clip.model.to("cpu")
    assert after[2].is_cuda
    torch.testing.assert_close(after[0].mean_activation, before[0].mean_activation, rtol=1e-3, atol=1e-4,
                               equal_nan=True)
    assert (after[0].class_counts - before[0].class_counts).abs().sum() <= 1e-3 * before[0].class_counts.sum()
    assert np.abs(after[1] - before[1]).max() < 1e-2
    torch.testing.assert_close(after[2].cpu().float(), before[2].float(), rtol=1e-2, atol=1e-2)
