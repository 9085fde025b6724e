"""TopK, BatchTopK, JumpReLU and Matryoshka against slow twins, their gradients, their files and their training."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import one_sentence, random_sae
from safetensors.torch import load_file, save_file
from test_sae import NAMES, loop_forward, numbers_of, twin_loss

from patchsae import SparseAutoencoder, sae_loss, train_steps, variants
from patchsae.studies.recovery import latent_directions
from patchsae.train import Training, new_saes, run_key, train_sae
from patchsae.weights.files import tensor_hash
from patchsae.weights.formats import BATCHED, FIXED, read_sae, write_official, write_saelens

D, S, K, N = 5, 32, 3, 7
OTHERS = ("topk", "batchtopk", "jumprelu", "matryoshka")
KIND = {"topk": {"activation": "topk", "k": K}, "batchtopk": {"activation": "batchtopk", "k": K},
        "jumprelu": {"activation": "jumprelu"}, "matryoshka": {"activation": "matryoshka", "k": K}}


@pytest.fixture
def double():
    """float64 everywhere, so that a twin can be compared to 12 digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(activation, seed=0, k=K, n=N):
    """An autoencoder with nothing special about its numbers, in the default dtype, and tokens ``[n,D]``."""
    sae = SparseAutoencoder(D, S, activation=activation, k=k)
    numbers = np.random.default_rng(50 + seed)
    with torch.no_grad():
        for name, tensor in random_sae(D, S, seed).state_dict().items():
            getattr(sae, name).copy_(tensor)
        if activation == "jumprelu":
            sae.log_threshold.copy_(torch.from_numpy(numbers.normal(size=S) * 0.3 - 1))
        if activation in BATCHED:
            sae.threshold.fill_(0.7)
    return sae, torch.from_numpy(numbers.normal(size=(n, D)) * 2 + 0.5).to(torch.get_default_dtype())


# Latents: numbers one at a time -------------------------------------------------------------------------

def kept_first(values, k):
    """Positions of the k largest numbers, the earlier of equal ones first."""
    return set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])


def slow_encode(sae, z):
    """Latents of every token from their definition: lists of floats."""
    rows = []
    for token in z:
        pre = loop_forward(numbers_of(sae), token.tolist())[0]
        if sae.activation == "topk":
            kept = kept_first(pre, sae.k)
        elif sae.activation == "jumprelu":
            kept = {j for j in range(S) if pre[j] > math.exp(float(sae.log_threshold[j].detach()))}
        else:
            kept = {j for j in range(S) if pre[j] > float(sae.threshold)}
        rows.append([max(pre[j], 0.0) if j in kept else 0.0 for j in range(S)])
    return rows


@pytest.mark.parametrize("activation", OTHERS)
def test_encode_equals_loops(double, activation):
    sae, z = make(activation)
    np.testing.assert_allclose(sae.encode(z).detach(), slow_encode(sae, z), rtol=1e-12, atol=1e-12)
    assert torch.equal(sae.encode(z[None, :, None]), sae.encode(z)[None, :, None])
    h = sae.encode(z)
    assert not torch.signbit(h).any() and 0 < (h > 0).sum() < (sae.pre_activations(z) > 0).sum()


@pytest.mark.parametrize("activation", ["relu", *OTHERS])
def test_encode_looks_at_one_token_whatever_the_mode(activation):
    """Neither training mode nor the other tokens of a batch, nor the loss taken before, changes a token's latents."""
    sae, z = make(activation)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    whole = sae.train().encode(z)
    alone = torch.cat([sae.eval().encode(token[None]) for token in z])
    torch.testing.assert_close(whole, alone)
    sae_loss(sae.train(), z)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


@pytest.mark.parametrize("activation", ["relu", *OTHERS])
def test_some_latents_alone(activation):
    sae, z = make(activation)
    h = sae.encode(z)
    torch.testing.assert_close(sae.encode_some(z, [4, 2]), h[:, [4, 2]])
    torch.testing.assert_close(sae.encode_some(z, 3), h[:, 3])
    torch.testing.assert_close(latent_directions(sae).scores(z, torch.arange(9)), h[:, :9].detach())
    torch.testing.assert_close(latent_directions(sae).scores(z), h.detach())


def test_of_equal_ones_the_lowest_index_is_kept():
    pre = torch.tensor([[1.0, 2, 2, 2, 0], [3, 3, 3, 3, 3], [-1, 0, 0, 5, -2], [1, 2, 3, 4, 5]])
    assert variants.top_k(pre, 2).tolist() == [[0, 2, 2, 0, 0], [3, 3, 0, 0, 0], [0, 0, 0, 5, 0], [0, 0, 0, 4, 5]]
    assert variants.batch_top_k(torch.tensor([[1.0, 2, 0], [2, 2, 5]]), 1).tolist() == [[0, 2, 0], [0, 0, 5]]
    numbers = np.random.default_rng(0).integers(-2, 4, (200, 12))  # ties everywhere
    for k in (1, 5, 12):
        kept = np.array([[j in kept_first(row, k) for j in range(12)] for row in numbers.tolist()])
        expected = (np.maximum(numbers, 0) * kept).tolist()
        assert variants.top_k(torch.from_numpy(numbers).float(), k).tolist() == expected


def test_damage_is_not_hidden():
    """A NaN among the tokens or the weights stays one, so that training stops at it."""
    for activation in OTHERS:
        sae, z = make(activation)
        z[2, 1] = float("nan")
        assert not sae_loss(sae, z).total.isfinite()
        sae, z = make(activation)
        sae.W_enc.data[1, 4] = float("nan")
        assert not sae_loss(sae, z).total.isfinite()


# The loss -----------------------------------------------------------------------------------------------

class TwinJump(torch.autograd.Function):
    """One pre-activation and one threshold: value h or H, and the pseudo-gradient written out."""

    @staticmethod
    def forward(ctx, pre, theta, count):
        ctx.numbers = float(pre), float(theta), count
        on = 1.0 if pre > theta else 0.0
        return torch.tensor(on if count else on * float(pre))

    @staticmethod
    def backward(ctx, gradient):
        pre, theta, count = ctx.numbers
        near = 1.0 if abs((pre - theta) / variants.BANDWIDTH) < 0.5 else 0.0
        to_theta = -(1.0 if count else theta) / variants.BANDWIDTH * near
        return gradient * (0.0 if count or pre <= theta else 1.0), gradient * to_theta, None


def slow_loss(sae, p, tokens, lam, dead):
    """The loss from its definition, a token and a latent at a time, on a dict of parameters ``p``."""
    pre = torch.stack([(z - p["b_dec"]) @ p["W_enc"] + p["b_enc"] for z in tokens])
    sparsity = 0.0
    if sae.activation == "jumprelu":
        rows = []
        for row in pre:
            theta = p["log_threshold"].exp()
            rows.append(torch.stack([TwinJump.apply(row[j], theta[j], False) for j in range(S)]))
            sparsity = sparsity + lam * sum(TwinJump.apply(row[j], theta[j], True) for j in range(S)) / len(tokens)
        h = torch.stack(rows)
    elif sae.activation == "topk":
        h = torch.stack([torch.stack([row[j].clamp(min=0) if j in kept_first(row.tolist(), sae.k) else 0 * row[j]
                                      for j in range(S)]) for row in pre])
    else:
        kept = kept_first(pre.flatten().tolist(), sae.k * len(tokens))
        h = torch.stack([torch.stack([pre[i, j].clamp(min=0) if i * S + j in kept else 0 * pre[i, j]
                                      for j in range(S)]) for i in range(len(tokens))])
    ends = [2, 4, 8, 16, 32] if sae.activation == "matryoshka" else [S]
    errors = []
    for n in ends:
        z_hat = torch.stack([sum(row[j] * p["W_dec"][j] for j in range(n)) + p["b_dec"] for row in h])
        errors.append(torch.stack([(a - b) ** 2 / (b**2).sum().sqrt() for a, b in zip(z_hat, tokens)]))
    ghost = 0.0
    if dead is not None and sae.activation in BATCHED:
        for i, z in enumerate(tokens):
            r, own = (z - z_hat[i]).detach(), dead.nonzero()[:, 0].tolist()
            kept = kept_first(pre[i][dead].tolist(), sae.k)
            again = sum(pre[i][j].clamp(min=0) * p["W_dec"][j] for n, j in enumerate(own) if n in kept)
            ghost = ghost + ((again - r) ** 2 / (z**2).sum().sqrt()).mean() / 32 / len(tokens)
    elif dead is not None:
        theta = p["log_threshold"].exp() if sae.activation == "jumprelu" else torch.zeros(S)
        for i, z in enumerate(tokens):
            r = (z - z_hat[i]).detach()
            g = torch.exp((pre[i] - theta)[dead]) @ p["W_dec"][dead]
            g = g * ((r**2).sum().sqrt() / (2 * (g**2).sum().sqrt() + 1e-6)).detach()
            q = (g - r) ** 2 / (r**2).sum().sqrt()
            ghost = ghost + (q * (errors[-1][i] / (q + 1e-6)).detach()).mean() / len(tokens)
    return torch.stack([e.mean() for e in errors]).mean(), sparsity, ghost


@pytest.mark.parametrize("with_dead", [False, True])
@pytest.mark.parametrize("activation", OTHERS)
def test_loss_and_gradients_equal_the_slow_twin(double, activation, with_dead):
    sae, z = make(activation)
    dead = torch.arange(S) % 5 == 1 if with_dead else None
    losses = sae_loss(sae, z, 0.03, dead)
    losses.total.backward()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    mse, sparsity, ghost = slow_loss(sae, leaves, z, 0.03, dead)
    (mse + sparsity + ghost).backward()
    for found, expected in zip(losses[:3], (mse, sparsity, ghost)):
        assert found.item() == pytest.approx(torch.as_tensor(expected).item(), rel=1e-10, abs=1e-14)
    assert (losses.ghost.item() > 0) == with_dead and (losses.l1.item() > 0) == (activation not in FIXED)
    for name, parameter in sae.named_parameters():
        assert leaves[name].grad.any()
        torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", OTHERS)
def test_gradients_equal_finite_differences(double, activation):
    """Of all that is differentiable: as long as the same latents are kept, everything but the thresholds."""
    sae, z = make(activation)
    sae_loss(sae, z, 0.03).total.backward()
    for name in NAMES:
        parameter, gradient = getattr(sae, name), getattr(sae, name).grad
        for at in torch.randperm(parameter.numel(), generator=torch.Generator().manual_seed(1))[:12].tolist():
            ends = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter.view(-1)[at] += step
                    ends.append(sae_loss(sae, z, 0.03).total.item())
                    parameter.view(-1)[at] -= step
            assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(gradient.view(-1)[at].item(), rel=1e-4, abs=1e-8)


def test_jumprelu_estimates_the_gradient_of_the_expected_loss(double):
    """Over many pre-activations of density p: d E[h] / d theta = -theta p(theta), d E[H] / d theta = -p(theta)."""
    pre = torch.linspace(-1, 3, 400_001)  # p = 1/4
    for function, expected in ((variants._Jump, -0.8 / 4), (variants._Step, -1 / 4)):
        theta = torch.tensor(0.8, requires_grad=True)
        function.apply(pre, theta).mean().backward()
        assert theta.grad.item() == pytest.approx(expected, rel=1e-3)


def test_ghosts_of_silent_latents_far_above_zero():
    """With topk a dead latent may have any pre-activation below the others: the loss is finite, and the formula's."""
    sae, z = make("topk")
    dead = torch.arange(S) < 4
    sae.b_enc.data[dead] = torch.tensor([100.0, 99, 101, 60])  # exp is infinite in float32, but not in float64
    sae.b_enc.data[~dead] = 200
    losses = sae_loss(sae, z, dead=dead)
    losses.total.backward()
    sae = sae.double()
    expected = slow_loss(sae, dict(sae.named_parameters()), z.double(), 8e-5, dead)[2]
    assert losses.ghost.item() == pytest.approx(expected.item(), rel=1e-3) and losses.ghost > 0
    assert all(p.grad.isfinite().all() for p in sae.parameters()) and sae.W_dec.grad[:3].any()


@pytest.mark.parametrize("activation", OTHERS)
def test_who_else_could_be_dead_does_not_matter(activation):
    """The engine names latents among which the dead ones are; more of them change nothing."""
    sae, z = make(activation)
    dead = torch.arange(S) % 5 == 1
    few, many = (sae_loss(sae, z, 0.03, dead, at) for at in (dead.nonzero()[:, 0], torch.arange(S)))
    torch.testing.assert_close(few.ghost, many.ghost)
    assert sae_loss(sae, z, 0.03, torch.zeros(S, dtype=torch.bool), torch.arange(S)).ghost == 0


def test_dead_latents_of_jumprelu_get_lower_thresholds():
    sae, z = make("jumprelu")
    dead = torch.arange(S) < 6
    sae.log_threshold.data[dead] = 2.5  # above every pre-activation
    assert not (sae.encode(z) > 0)[:, dead].any()
    gradients = [torch.autograd.grad(sae_loss(sae, z, 0.03, mask).total, sae.log_threshold)[0] for mask in (None, dead)]
    assert not gradients[0][dead].any() and gradients[1][dead].any()
    assert torch.equal(gradients[0][~dead], gradients[1][~dead])


# Extremes -----------------------------------------------------------------------------------------------

def relu_twin(sae):
    plain = SparseAutoencoder(D, S)
    plain.load_state_dict({name: sae.state_dict()[name] for name in NAMES})
    return plain


def test_keeping_all_latents_is_relu():
    for activation in ("topk", "batchtopk"):
        sae, z = make(activation, k=S)
        plain = relu_twin(sae)
        losses, expected = sae_loss(sae, z, 0.0), sae_loss(plain, z, 0.0)
        assert all(torch.equal(a, b) for a, b in zip(losses, expected))
        assert activation == "batchtopk" or torch.equal(sae.encode(z), plain.encode(z))


def test_without_a_threshold_jumprelu_and_the_untrained_batched_ones_are_relu():
    for activation in ("jumprelu", "batchtopk", "matryoshka"):
        sae, z = make(activation)
        with torch.no_grad():
            sae.log_threshold.fill_(-math.inf) if activation == "jumprelu" else sae.threshold.zero_()
        assert torch.equal(sae.encode(z), relu_twin(sae).encode(z))
    assert make("jumprelu")[0].log_threshold.exp().min() > 0
    assert SparseAutoencoder(D, S, activation="matryoshka", k=1).threshold == 0


def test_batchtopk_keeps_k_a_token_on_average_and_topk_on_every_one():
    for seed in range(20):
        sae, z = make("batchtopk", seed, n=40)
        counts = (sae_loss(sae, z).h > 0).sum(-1)
        assert counts.sum() == K * 40 and counts.min() < K < counts.max()
        sae, z = make("topk", seed, n=40)
        counts = (sae.encode(z) > 0).sum(-1)
        assert counts.max() == K and bool((counts <= K).all())


def test_matryoshka_with_one_prefix_is_batchtopk(monkeypatch):
    (nested, z), plain = make("matryoshka"), make("batchtopk")[0]
    assert not torch.equal(sae_loss(nested, z).mse, sae_loss(plain, z).mse)
    monkeypatch.setattr(variants, "PREFIXES", (1,))
    dead = torch.arange(S) < 3
    assert all(torch.equal(a, b) for a, b in zip(sae_loss(nested, z, dead=dead), sae_loss(plain, z, dead=dead)))


@pytest.mark.parametrize("n, expected", [(224, [14, 28, 56, 112, 224]), (49152, [3072, 6144, 12288, 24576, 49152]),
                                         (36, [2, 4, 9, 18, 36]), (3, [1, 2, 3]), (1, [1])])
def test_prefixes(n, expected):
    assert variants.prefixes(n) == expected


def test_relu_is_what_it_was(double):
    """The paper's own: no more tensors, no other hash, the same loss as its twin."""
    sae = SparseAutoencoder(D, S, torch.Generator().manual_seed(1))
    assert sorted(sae.state_dict()) == sorted(NAMES) and (sae.activation, sae.k) == ("relu", 0)
    assert sae.fingerprint() == tensor_hash(sae.state_dict())
    sae, z = make("relu")
    expected = twin_loss({name: getattr(sae, name).detach() for name in NAMES}, z, 0.03, None)
    assert sae_loss(sae, z, 0.03).total.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("activation, k", [("gelu", 0), ("topk", 0), ("topk", S + 1), ("batchtopk", True),
                                           ("matryoshka", 2.0), ("topk", None)])
def test_settings_that_make_no_sense(activation, k):
    with pytest.raises(ValueError) as error:
        SparseAutoencoder(D, S, activation=activation, k=k)
    assert one_sentence(error.value)


# The threshold of the batched ones ----------------------------------------------------------------------

def test_threshold_is_the_running_mean_of_the_smallest_latent_kept():
    sae, _ = make("batchtopk")
    sae.threshold.zero_()
    expected = 0.0
    for seed in range(5):
        h = sae_loss(sae, make("batchtopk", seed)[1]).h.detach()
        least = min(v for v in h.flatten().tolist() if v > 0)
        expected = least if seed == 0 else 0.99 * expected + 0.01 * least
        sae.after_step(h)
        assert float(sae.threshold) == pytest.approx(expected, rel=1e-6)
    sae.after_step(torch.zeros(3, S))  # a batch without latents says nothing
    assert float(sae.threshold) == pytest.approx(expected, rel=1e-6)
    for activation in ("relu", "topk", "jumprelu"):
        other, _ = make(activation)
        before = other.fingerprint()
        other.after_step(h)
        assert other.fingerprint() == before


def test_after_training_the_threshold_keeps_about_k():
    sae = SparseAutoencoder(D, S, torch.Generator().manual_seed(0), "batchtopk", K)
    batches = made_up_tokens(150)
    train_steps(sae, batches, lr=0.01, warmup=10)
    kept = (sae.encode(torch.cat(batches[-40:])) > 0).sum(-1).float().mean().item()
    assert kept == pytest.approx(K, abs=0.5) and float(sae.threshold) > 0


# Training -----------------------------------------------------------------------------------------------

def made_up_tokens(steps, seed=0):
    """Tokens ``[4,10,D]`` that are sums of two of 24 directions, a list of batches."""
    numbers = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(24, D, generator=numbers), dim=1)
    weights = torch.rand(steps, 4, 10, 24, generator=numbers)
    weights = torch.where(weights >= weights.topk(2, -1).values[..., -1:], 2 + weights, 0)
    return list(weights @ directions)


@pytest.mark.parametrize("activation", OTHERS)
def test_training_decreases_the_loss(activation):
    sae = SparseAutoencoder(D, S, torch.Generator().manual_seed(0), **KIND[activation])
    history = train_steps(sae, made_up_tokens(60), lr=0.01, l1=0.01, warmup=5, dead_after=4)
    assert history[-5:, 0].mean() < 0.6 * history[:5, 0].mean()
    if activation == "jumprelu":
        assert sae.log_threshold.exp().std() > 0.01  # thresholds moved, each its own way


@pytest.fixture(params=OTHERS)
def changed(request, profile):
    return profile.with_sae(activation=request.param, k=K)


def test_resumed_equals_uninterrupted_bit_for_bit(changed, clip, pixel_data, tmp_path, monkeypatch):
    whole, log = train_sae(changed, clip, pixel_data, tmp_path / "whole")
    steps, step = [], Training.step

    def interrupted(self, z):
        steps.append(0)
        if len(steps) == 7:  # three steps after a checkpoint
            raise KeyboardInterrupt
        return step(self, z)

    monkeypatch.setattr(Training, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_sae(changed, clip, pixel_data, tmp_path / "parts")
    monkeypatch.setattr(Training, "step", step)
    resumed, again = train_sae(changed, clip, pixel_data, tmp_path / "parts")
    assert resumed.fingerprint() == whole.fingerprint() and again.equals(log)
    assert (resumed.activation, resumed.k) == (changed.sae.activation, K if resumed.activation in FIXED else 0)
    files = [(tmp_path / name / "sae.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_variants_start_from_the_weights_of_the_default(changed, profile, clip, pixel_data):
    plain, other = (new_saes([p], clip, pixel_data)[0] for p in (profile, changed))
    assert all(torch.equal(getattr(plain, name), getattr(other, name)) for name in NAMES)
    assert run_key(changed, clip) != run_key(profile, clip)


# Files --------------------------------------------------------------------------------------------------

def test_own_format_round_trip(tmp_path):
    z = make("topk")[1]
    for activation in OTHERS:
        sae = make(activation)[0]
        sae.save_pretrained(tmp_path / activation)
        for path in (tmp_path / activation, tmp_path / activation / "sae.safetensors"):
            again = SparseAutoencoder.from_pretrained(path)
            assert (again.activation, again.k, again.fingerprint()) == (activation, sae.k, sae.fingerprint())
            assert torch.equal(again.encode(z), sae.encode(z)) and again.report["verified"]
    assert len({make(activation)[0].fingerprint() for activation in ("relu", *OTHERS)}) == 1 + len(OTHERS)
    assert make("topk", k=2)[0].fingerprint() != make("topk", k=3)[0].fingerprint()
    random_sae(D, S).save_pretrained(tmp_path / "relu")
    assert set(json.loads((tmp_path / "relu" / "config.json").read_text())) == {"d_model", "n_latents", "hash"}
    assert SparseAutoencoder.from_pretrained(tmp_path / "relu").activation == "relu"


@pytest.mark.filterwarnings("ignore:.*unverified")
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "matryoshka"])
def test_saelens_round_trip(tmp_path, activation):
    sae, z = make(activation, n=400)
    write_saelens(tmp_path, sae, "a model", "a place")
    config, tensors = json.loads((tmp_path / "cfg.json").read_text()), load_file(tmp_path / "sae_weights.safetensors")
    architecture = "topk" if activation == "topk" else "jumprelu"
    assert config["architecture"] == architecture and config.get("k") == (K if activation == "topk" else None)
    assert set(tensors) == {*NAMES, *(["threshold"] if architecture == "jumprelu" else [])}
    assert architecture == "topk" or tensors["threshold"].shape == (S,)
    for path in (tmp_path, tmp_path / "sae_weights.safetensors"):
        again = SparseAutoencoder.from_pretrained(path)
        assert again.activation == architecture
        np.testing.assert_array_equal(again.encode(z).detach(), sae.encode(z).detach())


@pytest.mark.filterwarnings("ignore:.*unverified")
@pytest.mark.parametrize("settings, activation", [
    ({"architecture": "topk", "k": K}, "topk"), ({"architecture": "topk", "k": K, "activation_fn_str": "relu"}, "topk"),
    ({"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}, "topk"),
    ({"architecture": "jumprelu"}, "jumprelu"),
    ({"architecture": "jumprelu", "apply_b_dec_to_input": False}, "jumprelu")])
def test_saelens_folders_of_others(tmp_path, settings, activation):
    """Files as SAELens writes them, by hand; what they compute from its definition in numpy."""
    sae, z = make(activation)
    w = {name: getattr(sae, name).detach().clone() for name in NAMES}
    threshold = torch.rand(S, generator=torch.Generator().manual_seed(2)) - 0.2  # some of 0 or less
    save_file(w | ({"threshold": threshold} if activation == "jumprelu" else {}), tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": S, "activation_fn_kwargs": {}} | settings))
    w, z = {name: tensor.double().numpy() for name, tensor in w.items()}, z.double().numpy()
    pre = (z - w["b_dec"] * settings.get("apply_b_dec_to_input", True)) @ w["W_enc"] + w["b_enc"]
    if activation == "topk":
        kept = np.array([[j in kept_first(row, K) for j in range(S)] for row in pre.tolist()])
    else:
        kept = pre > threshold.double().numpy()
    again = SparseAutoencoder.from_pretrained(tmp_path)
    assert again.activation == activation
    h = again.encode(torch.from_numpy(z).float()).detach()
    np.testing.assert_allclose(h, np.maximum(pre, 0) * kept, atol=1e-5)


def test_the_official_format_is_for_relu(tmp_path):
    for activation in OTHERS:
        with pytest.raises(ValueError) as error:
            write_official(tmp_path / "a.pt", make(activation)[0])
        assert one_sentence(error.value) and not list(tmp_path.iterdir())
    for activation in ("jumprelu", "batchtopk"):
        with pytest.raises(ValueError) as error:
            write_official(tmp_path / "a.pt", make(activation)[0].state_dict())
        assert one_sentence(error.value)
    write_official(tmp_path / "a.pt", random_sae(D, S))
    assert read_sae(tmp_path / "a.pt")[1]["activation"] == "relu"


@pytest.mark.parametrize("activation", OTHERS)
def test_flipped_bytes_are_found(tmp_path, activation):
    sae, numbers = make(activation)[0], np.random.default_rng(1)
    sae.save_pretrained(tmp_path)
    for trial in range(60):
        file = tmp_path / ("config.json" if trial % 3 else "sae.safetensors")
        good = file.read_bytes()
        bad = bytearray(good)
        bad[int(numbers.integers(len(good)))] ^= 1 << int(numbers.integers(8))
        file.write_bytes(bad)
        try:
            assert SparseAutoencoder.from_pretrained(tmp_path).fingerprint() == sae.fingerprint()
        except (ValueError, OSError) as error:
            assert one_sentence(error), error
        file.write_bytes(good)


@pytest.mark.parametrize("changes", [{"activation": "gelu"}, {"activation": ["topk"]}, {"k": 0}, {"k": "3"},
                                     {"k": S + 1}, {"activation": "jumprelu"}, {"k": K + 1}])
def test_settings_beside_the_weights_that_do_not_go_with_them(tmp_path, changes):
    make("topk")[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError) as error:
        SparseAutoencoder.from_pretrained(tmp_path)
    assert one_sentence(error.value)


def test_weights_with_thresholds_are_never_taken_for_relu(tmp_path):
    for activation in ("jumprelu", "batchtopk", "matryoshka"):
        save_file(make(activation)[0].state_dict(), tmp_path / "alone.safetensors")
        with pytest.raises(ValueError) as error:
            SparseAutoencoder.from_pretrained(tmp_path / "alone.safetensors")
        assert one_sentence(error.value)


@pytest.mark.parametrize("changes", [{"activation_fn_str": "jumprelu"},
                                     {"architecture": "jumprelu", "activation_fn": "topk"}, {"k": None}])
def test_saelens_folders_with_other_equations_are_refused(tmp_path, changes):
    write_saelens(tmp_path, make("topk")[0], "m", "h")
    config = json.loads((tmp_path / "cfg.json").read_text()) | changes
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        read_sae(tmp_path)
    assert one_sentence(error.value)
