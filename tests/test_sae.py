"""The autoencoder and its loss against loops that spell the formulas out, one token and number at a time."""

import math

import numpy as np
import pytest
import torch
from conftest import one_sentence, random_sae
from scipy.optimize import minimize

from patchsae import SparseAutoencoder, sae_loss
from patchsae.fast.medians import geometric_median, initial_b_dec
from patchsae.studies.variance import Variance

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


@pytest.fixture
def double():
    """float64 everywhere, so that a twin can be compared to 12 digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def numbers_of(sae):
    return {name: getattr(sae, name).detach().numpy().astype(np.float64).copy() for name in NAMES}


def loop_forward(p, token):
    """pre [S], h [S], z_hat [D] of one token, one number at a time."""
    d, s = p["W_enc"].shape
    pre = [
        sum((token[i] - p["b_dec"][i]) * p["W_enc"][i, j] for i in range(d)) + p["b_enc"][j] for j in range(s)
    ]
    h = [value if value > 0 else 0.0 for value in pre]
    z_hat = [sum(h[j] * p["W_dec"][j, i] for j in range(s)) + p["b_dec"][i] for i in range(d)]
    return pre, h, z_hat


def length(vector):
    return math.sqrt(sum(value * value for value in vector))


def loop_loss(p, tokens, lam, dead, frozen=None):
    """mse, l1, ghost of tokens [N,D] by plain loops.

    ``frozen``: what stands under a stop-gradient, one entry a token, as returned by an earlier call; with it
    this is the function whose derivative the gradient is.
    """
    mse, l1, ghost, kept = [], [], [], []
    for n, z in enumerate(tokens):
        pre, h, z_hat = loop_forward(p, z)
        m = [(a - b) ** 2 / length(z) for a, b in zip(z_hat, z)]
        mse += m
        l1.append(sum(abs(value) for value in h))
        if dead is None or not any(dead):
            kept.append(None)
            continue
        chosen = [j for j in range(len(pre)) if dead[j]]
        g = [sum(math.exp(pre[j]) * p["W_dec"][j, i] for j in chosen) for i in range(len(z))]
        if frozen is None:
            r = [a - b for a, b in zip(z, z_hat)]
            scale = length(r) / (2 * length(g) + 1e-6)
        else:
            r, scale, weights = frozen[n]
        g = [scale * value for value in g]
        q = [(a - b) ** 2 / length(r) for a, b in zip(g, r)]
        if frozen is None:
            weights = [a / (b + 1e-6) for a, b in zip(m, q)]
        kept.append((r, scale, weights))
        ghost += [a * b for a, b in zip(q, weights)]
    return (sum(mse) / len(mse), lam * sum(l1) / len(l1), sum(ghost) / len(ghost) if ghost else 0.0), kept


def twin_loss(p, tokens, lam, dead):
    """The same with autograd: one token at a time, ``detach`` exactly where the formula says sg."""
    mse, l1, ghost = [], [], []
    for z in tokens:
        pre = (z - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        h = torch.where(pre > 0, pre, torch.zeros_like(pre))
        z_hat = h @ p["W_dec"] + p["b_dec"]
        m = (z_hat - z) ** 2 / (z**2).sum().sqrt()
        mse.append(m)
        l1.append(h.abs().sum())
        if dead is not None and bool(dead.any()):
            r = (z - z_hat).detach()
            g = torch.exp(pre[dead]) @ p["W_dec"][dead]
            g = g * ((r**2).sum().sqrt() / (2 * (g**2).sum().sqrt() + 1e-6)).detach()
            q = (g - r) ** 2 / (r**2).sum().sqrt()
            ghost.append(q * (m / (q + 1e-6)).detach())
    return (
        torch.stack(mse).mean() + lam * torch.stack(l1).mean() + (torch.stack(ghost).mean() if ghost else 0.0)
    )


def make(seed=0, n=7, d=5, s=9, n_dead=3):
    rng = np.random.default_rng(100 + seed)
    dead = np.zeros(s, bool)
    dead[rng.choice(s, n_dead, replace=False)] = True
    return random_sae(d, s, seed), torch.from_numpy(rng.normal(size=(n, d)) * 2 + 0.5), torch.from_numpy(dead)


def set_sae(sae, **values):
    with torch.no_grad():
        for name, value in values.items():
            getattr(sae, name).copy_(torch.as_tensor(value))
    return sae


# Encode and decode --------------------------------------------------------------------------------------


def test_encode_and_decode_equal_loops(double):
    sae, z, _ = make()
    h, p = sae.encode(z), numbers_of(sae)
    for n in range(len(z)):
        _, expected, z_hat = loop_forward(p, z[n].tolist())
        np.testing.assert_allclose(h[n].detach(), expected, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(sae.decode(h)[n].detach(), z_hat, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(sae(z), sae.decode(sae.encode(z)))


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 3)])
def test_any_number_of_leading_dimensions(lead):
    sae, z = random_sae(6, 10), torch.randn(*lead, 6)
    h = sae.encode(z)
    assert h.shape == (*lead, 10) and sae.decode(h).shape == (*lead, 6) and bool((h >= 0).all())
    torch.testing.assert_close(h.reshape(-1, 10), sae.encode(z.reshape(-1, 6)))


def test_new_autoencoder():
    first, again, other = (
        SparseAutoencoder(8, 24, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    shapes = {"W_enc": (8, 24), "b_enc": (24,), "W_dec": (24, 8), "b_dec": (8,)}
    assert {name: tuple(p.shape) for name, p in first.named_parameters()} == shapes
    assert all(torch.equal(getattr(first, n), getattr(again, n)) for n in NAMES)
    assert not torch.equal(first.W_enc, other.W_enc)
    torch.testing.assert_close(first.W_dec.norm(dim=1), torch.ones(24))
    assert not first.b_enc.any()
    assert not torch.allclose(first.W_dec, first.W_enc.T)  # drawn independently


def test_normalise_decoder_keeps_directions():
    sae = random_sae(6, 10)
    before = sae.W_dec.detach().clone()
    sae.normalise_decoder()
    torch.testing.assert_close(sae.W_dec.detach(), before / before.pow(2).sum(1, keepdim=True).sqrt())


def test_parallel_gradient_is_removed_and_nothing_else():
    sae, z, dead = make(seed=5)
    sae, z = sae.float(), z.float()
    sae.normalise_decoder()
    sae_loss(sae, z, dead=dead).total.backward()
    gradient, rows = sae.W_dec.grad.clone().double(), sae.W_dec.detach().double()
    others = {name: getattr(sae, name).grad.clone() for name in ("W_enc", "b_enc", "b_dec")}
    sae.remove_parallel_gradient()
    for j in range(len(rows)):
        along = float(gradient[j] @ rows[j])
        torch.testing.assert_close(
            sae.W_dec.grad[j].double(), gradient[j] - along * rows[j], rtol=1e-5, atol=1e-8
        )
    assert float((sae.W_dec.grad * sae.W_dec.detach()).sum(1).abs().max()) < 1e-6 * float(
        gradient.abs().max()
    )
    assert all(torch.equal(getattr(sae, name).grad, value) for name, value in others.items())


# The loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_every_term_equals_the_loop(double, seed):
    sae, z, dead = make(seed)
    losses = sae_loss(sae, z, l1=0.03, dead=dead)
    (mse, l1, ghost), _ = loop_loss(numbers_of(sae), z.tolist(), 0.03, dead.tolist())
    np.testing.assert_allclose(
        [losses.mse.item(), losses.l1.item(), losses.ghost.item()], [mse, l1, ghost], rtol=1e-12
    )
    assert losses.total.item() == pytest.approx(mse + l1 + ghost, rel=1e-12)
    torch.testing.assert_close(losses.h, sae.encode(z))
    torch.testing.assert_close(losses.z_hat, sae.decode(losses.h))


def test_tokens_count_alike_however_they_are_grouped(double):
    sae, z, dead = make(n=12)
    flat = sae_loss(sae, z, l1=0.1, dead=dead)
    images = sae_loss(sae, z.view(3, 4, 5), l1=0.1, dead=dead)
    for name in ("mse", "l1", "ghost", "total"):
        assert getattr(flat, name).shape == ()
        torch.testing.assert_close(getattr(images, name), getattr(flat, name), rtol=1e-12, atol=0)
    assert images.z_hat.shape == (3, 4, 5) and images.h.shape == (3, 4, 9)


def test_no_dead_latents_no_ghost(double):
    sae, z, dead = make()
    for none in (None, torch.zeros_like(dead)):
        losses = sae_loss(sae, z, l1=0.01, dead=none)
        assert losses.ghost.item() == 0.0
        assert losses.total.item() == pytest.approx(losses.mse.item() + losses.l1.item(), rel=1e-14)
        losses.total.backward()
    assert sae_loss(sae, z, dead=dead).ghost.item() > 0


def test_all_latents_may_be_dead(double):
    sae, z, _ = make()
    losses = sae_loss(sae, z, l1=0.01, dead=torch.ones(9, dtype=torch.bool))
    (_, _, ghost), _ = loop_loss(numbers_of(sae), z.tolist(), 0.01, [True] * 9)
    assert losses.ghost.item() == pytest.approx(ghost, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_equal_central_differences(double, seed):
    sae, z, dead = make(seed, n=4, d=3, s=6, n_dead=2)
    p, tokens, step = numbers_of(sae), z.tolist(), 1e-5
    smallest = min(abs(v) for token in tokens for v in loop_forward(p, token)[0])
    assert smallest > 1e-3, "a pre-activation this close to the kink would spoil the differences"
    sae_loss(sae, z, l1=0.05, dead=dead).total.backward()
    _, frozen = loop_loss(p, tokens, 0.05, dead.tolist())
    for name in NAMES:
        analytic = getattr(sae, name).grad.numpy()
        for at in np.ndindex(p[name].shape):
            value, sides = p[name][at], []
            for sign in (1, -1):
                p[name][at] = value + sign * step
                sides.append(sum(loop_loss(p, tokens, 0.05, dead.tolist(), frozen)[0]))
            p[name][at] = value
            assert analytic[at] == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-6, abs=1e-9), (
                name,
                at,
            )


@pytest.mark.parametrize("dead_as", ["none", "some", "all"])
def test_gradients_equal_the_twins_autograd(double, dead_as):
    sae, z, dead = make(seed=8, n=15)
    dead = {"none": None, "some": dead, "all": torch.ones_like(dead)}[dead_as]
    sae_loss(sae, z.view(3, 5, 5), l1=0.02, dead=dead).total.backward()
    p = {name: getattr(sae, name).detach().clone().requires_grad_() for name in NAMES}
    twin_loss(p, z, 0.02, dead).backward()
    for name in NAMES:
        torch.testing.assert_close(getattr(sae, name).grad, p[name].grad, rtol=1e-10, atol=1e-13)


def test_ghost_moves_dead_latents_and_no_others(double):
    sae, z, dead = make(seed=2)
    sae_loss(sae, z, dead=dead).ghost.backward()
    assert sae.W_enc.grad[:, dead].abs().min() > 0 and sae.W_dec.grad[dead].abs().min() > 0
    assert (
        not sae.W_enc.grad[:, ~dead].any()
        and not sae.b_enc.grad[~dead].any()
        and not sae.W_dec.grad[~dead].any()
    )


def test_ghost_uses_the_pre_activation_not_the_activation(double):
    """After the relu every silent latent would weigh exp(0) = 1."""
    sae, z, dead = make(seed=3)
    before = sae_loss(sae, z, dead=dead)
    first = int(dead.nonzero()[0])
    with torch.no_grad():
        sae.b_enc[dead] -= 50
        sae.b_enc[first] += 7  # still silent, but louder than the others by far
    after = sae_loss(sae, z, dead=dead)
    assert not after.h[:, dead].any() and before.h.shape == after.h.shape
    after.ghost.backward()
    strength = sae.W_dec.grad[dead].norm(dim=1)
    assert strength.argmax() == 0 and strength[0] > 5 * strength[1:].max()


def test_mse_divides_by_the_norm_not_its_square(double):
    sae = set_sae(
        random_sae(2, 1),
        W_enc=torch.zeros(2, 1),
        b_enc=torch.zeros(1),
        W_dec=torch.ones(1, 2),
        b_dec=torch.zeros(2),
    )
    z = torch.tensor([[3.0, 4.0], [0.0, 2.0]])  # norms 5 and 2; nothing is reconstructed
    assert sae_loss(sae, z).mse.item() == pytest.approx((9 / 5 + 16 / 5 + 0 + 4 / 2) / 4, rel=1e-14)


def test_l1_is_linear_in_lambda_and_a_sum_over_latents(double):
    sae, z, _ = make()
    one, two = sae_loss(sae, z, l1=0.1), sae_loss(sae, z, l1=0.2)
    assert two.l1.item() == pytest.approx(2 * one.l1.item(), rel=1e-14) and two.mse.item() == one.mse.item()
    assert one.l1.item() == pytest.approx(0.1 * one.h.sum().item() / len(z), rel=1e-13)
    assert sae_loss(sae, z, l1=0.0).l1.item() == 0.0
    assert sae_loss(sae, z).l1.item() == pytest.approx(8e-4 * one.l1.item(), rel=1e-12)  # the default is 8e-5


def test_scaling_tokens_biases_and_loss_together(double):
    """Twice the tokens and biases: twice the latents and errors, so mse (error^2 / norm) and l1 double."""
    sae, z, _ = make()
    small = sae_loss(sae, z, l1=0.1)
    set_sae(sae, b_enc=2 * sae.b_enc, b_dec=2 * sae.b_dec)
    large = sae_loss(sae, 2 * z, l1=0.1)
    assert large.mse.item() == pytest.approx(2 * small.mse.item(), rel=1e-12)
    assert large.l1.item() == pytest.approx(2 * small.l1.item(), rel=1e-12)


def test_a_token_reconstructed_exactly_gives_no_nan():
    sae = set_sae(
        random_sae(3, 4),
        W_enc=torch.eye(3, 4),
        b_enc=[0.0, 0, 0, -5],
        W_dec=torch.eye(4, 3),
        b_dec=torch.zeros(3),
    )
    set_sae(sae, W_dec=torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]))
    z = torch.tensor([[1.0, 2.0, 4.0], [1.0, -2.0, 4.0]])
    dead = torch.tensor([False, False, False, True])
    for tokens in (z[:1], z):
        sae.zero_grad()
        losses = sae_loss(sae, tokens, l1=0.1, dead=dead)
        assert torch.equal(losses.z_hat[0], z[0])
        losses.total.backward()
        assert all(math.isfinite(getattr(losses, name).item()) for name in ("mse", "l1", "ghost", "total"))
        assert all(bool(torch.isfinite(getattr(sae, name).grad).all()) for name in NAMES)
    (mse, _, ghost), _ = loop_loss(numbers_of(sae), z[1:].tolist(), 0.1, dead.tolist())
    assert losses.mse.item() == pytest.approx(mse / 2, rel=1e-6)  # the exact token counts, with 0
    assert losses.ghost.item() == pytest.approx(ghost / 2, rel=1e-5)


# b_dec and explained variance ---------------------------------------------------------------------------


def median_by_search(points):
    """Minimiser of the sum of distances: a general optimiser from several starts, or a data point."""

    def cost(at):
        return float(np.sqrt(((points - at) ** 2).sum(1)).sum())

    starts = [points.mean(0), np.median(points, 0), points[0] + 0.1]
    found = [
        minimize(cost, s, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 20000}).x
        for s in starts
    ]
    best = min([*found, *points], key=cost)
    return best, cost


def clouds():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(30, 2))
    return {
        "normal": normal,
        "three dimensions": rng.normal(size=(21, 3)) * [1, 5, 0.2],
        "outliers": np.concatenate([normal, [[1e3, 1e3], [900, 1e3], [-50, 2e3]]]),
        "far away": normal + 500,
        "duplicates": np.concatenate([normal[:6], np.repeat([[0.3, -0.2]], 5, 0)]),
        "majority at one point": np.concatenate(
            [rng.normal(size=(4, 2)) + 3, np.repeat([[0.25, 0.5]], 7, 0)]
        ),
        "mean is a data point": np.array([[0.0, 0], [1, 0], [-1, 0], [0, 2], [0, -2]]),
        "the same at the origin": np.array([[0.0, 0], [4, 0], [-1, 0.5], [-1, -0.5], [-2, 0.0]]),
        "a data point that is the mean, not the median": np.array(
            [[10.0, 10], [14, 10], [9, 10.5], [9, 9.5], [8, 10]]
        ),
        "two points": np.array([[0.0, 0], [2, 2]]),
        "one point": np.array([[3.0, -1]]),
        "all equal": np.full((5, 2), 1.5),
    }


@pytest.mark.parametrize("name", clouds())
def test_geometric_median_minimises_the_sum_of_distances(name):
    points = clouds()[name]
    found = geometric_median(torch.from_numpy(points)).numpy()
    best, cost = median_by_search(points)
    assert np.isfinite(found).all()
    spread = max(1e-12, cost(points.mean(0)))
    assert cost(found) <= cost(best) + 1e-4 * spread
    if name in ("normal", "three dimensions", "outliers", "far away"):
        np.testing.assert_allclose(found, best, atol=1e-2)


def test_geometric_median_of_a_batch_is_each_ones_own():
    points = torch.randn(4, 3, 25, 2, generator=torch.Generator().manual_seed(0))
    together = geometric_median(points)
    assert together.shape == (4, 3, 2)
    for at in np.ndindex(4, 3):
        torch.testing.assert_close(together[at], geometric_median(points[at]), rtol=1e-3, atol=1e-3)


def test_initial_b_dec():
    z = torch.randn(9, 4, 3, generator=torch.Generator().manual_seed(1)) + torch.arange(4.0)[:, None]
    torch.testing.assert_close(initial_b_dec(z, "mean"), z.double().mean((0, 1)).float())
    assert torch.equal(initial_b_dec(z, "zeros"), torch.zeros(3))
    best, _ = median_by_search(z.reshape(-1, 3).double().numpy())
    np.testing.assert_allclose(initial_b_dec(z, "geometric_median"), best, atol=1e-3)
    by_position = np.mean([median_by_search(z[:, t].double().numpy())[0] for t in range(4)], 0)
    np.testing.assert_allclose(initial_b_dec(z, "geometric_median_by_position"), by_position, atol=1e-3)
    assert not np.allclose(best, by_position, atol=1e-2)
    with pytest.raises(ValueError) as error:
        initial_b_dec(z, "median")
    assert one_sentence(error.value)


def naive_explained(z, z_hat):
    z, z_hat = (t.reshape(-1, t.shape[-1]).double().numpy() for t in (z, z_hat))
    return 1 - ((z - z_hat) ** 2).sum() / ((z - z.mean(0)) ** 2).sum()


def explained(z, z_hat, chunks=1):
    variance = Variance()
    for a, b in zip(z.chunk(chunks), z_hat.chunk(chunks)):
        variance.add(a, b)
    return float(variance.explained())


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
def test_explained_variance_equals_its_definition(offset):
    numbers = torch.Generator().manual_seed(2)
    z = torch.randn(60, 5, 4, generator=numbers) + offset * torch.tensor([1.0, -1, 0.5, 0])
    z_hat = z + 0.3 * torch.randn(z.shape, generator=numbers)
    expected = naive_explained(z, z_hat)
    assert 0.8 < expected < 0.97
    for chunks in (1, 7, 60):
        assert explained(z, z_hat, chunks) == pytest.approx(expected, rel=1e-9)


def test_explained_variance_of_a_constant_and_of_a_perfect_prediction():
    z = torch.randn(50, 3, generator=torch.Generator().manual_seed(3)) + 7
    mean = z.double().mean(0)
    assert explained(z, mean.expand(50, 3)) == pytest.approx(0, abs=1e-12)
    assert explained(z, z.clone()) == 1.0
    assert explained(z, (mean + 1).expand(50, 3)) < -0.5
    assert explained(z, torch.zeros(50, 3)) < -10


# Files --------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    sae = random_sae(5, 8)
    sae.save_pretrained(tmp_path / "new" / "folder")
    again = SparseAutoencoder.from_pretrained(tmp_path / "new" / "folder")
    assert all(torch.equal(getattr(sae, n), getattr(again, n)) for n in NAMES)
    assert sae.fingerprint() == again.fingerprint()
    assert {p.suffix for p in (tmp_path / "new" / "folder").iterdir()} == {".safetensors", ".json"}
    for name in NAMES:
        other = SparseAutoencoder.from_pretrained(str(tmp_path / "new" / "folder"))
        with torch.no_grad():
            getattr(other, name).view(-1)[-1] += 1e-3
        assert other.fingerprint() != sae.fingerprint(), name


def damaged(folder, how):
    weights = folder / "sae.safetensors"
    if how == "cut short":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif how == "no weights":
        weights.unlink()
    elif how == "config is not json":
        (folder / "config.json").write_text("{")
    elif how == "empty config":
        (folder / "config.json").write_text("{}")
    elif how == "not a number":
        sae = random_sae(5, 8)
        set_sae(sae, b_enc=[math.nan] * 8)
        sae.save_pretrained(folder)
    elif how == "no folder":
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    elif how == "other shapes":
        random_sae(5, 9).save_pretrained(folder.parent / "other")
        weights.write_bytes((folder.parent / "other" / "sae.safetensors").read_bytes())


@pytest.mark.parametrize(
    "how",
    [
        "cut short",
        "no weights",
        "config is not json",
        "empty config",
        "other shapes",
        "not a number",
        "no folder",
    ],
)
def test_damaged_folder_is_one_sentence(tmp_path, how):
    folder = tmp_path / "sae"
    random_sae(5, 8).save_pretrained(folder)
    damaged(folder, how)
    with pytest.raises((ValueError, OSError)) as error:
        SparseAutoencoder.from_pretrained(folder)
    assert one_sentence(error.value)
