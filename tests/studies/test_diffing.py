"""Changes of tokens: what a dictionary leaves out, crosscoders against slow twins, and changes that were planted."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import LAYER, WIDTH, random_sae
from test_fidelity import perfect_sae

from patchsae import ArrayDataset, SparseAutoencoder, sae_loss
from patchsae.maple import new_maple
from patchsae.studies import diffing
from patchsae.studies.adapt import as_adapted
from patchsae.studies.diffing import Crosscoder, Tokens
from patchsae.studies.truth_sweep import explained
from patchsae.train import Training

D, S, K, N = 4, 24, 3, 7
NAMES = ("cat", "dog", "pig", "owl", "duck")


@pytest.fixture
def double():
    """float64 everywhere, so that a twin can be compared to 12 digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_crosscoder(seed=0, n_latents=S, d=D, threshold=0.7):
    """A crosscoder whose latents are of one tower, of the other, or of both in any proportion."""
    crosscoder = Crosscoder(2 * d, n_latents, None, "batchtopk", K)
    share = torch.rand(n_latents, 1, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, tensor in random_sae(2 * d, n_latents, seed, bias=0.3).state_dict().items():
            getattr(crosscoder, name).copy_(tensor)
        crosscoder.W_dec[:, :d] *= (2 * share).clamp(max=1)**2
        crosscoder.W_dec[:, d:] *= (2 - 2 * share).clamp(max=1)**2
        crosscoder.threshold.fill_(threshold)
    return crosscoder


def towers(n=6, t=5, d=D, seed=0):
    """Tokens before, and the same somewhat changed."""
    before = normal(n, t, d, seed=seed) * 2 + 0.3
    return before, before + 0.7 * normal(n, t, d, seed=seed + 100)


def perfect_crosscoder(d):
    """relu(x) - relu(-x) = x of both towers' tokens."""
    crosscoder, eye = Crosscoder(2 * d, 4 * d, None, "batchtopk", 1), torch.eye(2 * d)
    with torch.no_grad():
        crosscoder.W_enc.copy_(torch.cat([eye, -eye], 1))
        crosscoder.W_dec.copy_(torch.cat([eye, -eye], 0))
    return crosscoder


def blind_sae():
    """An autoencoder that says the same whatever it sees."""
    sae = random_sae()
    sae.b_enc.data.fill_(-1e6)
    return sae


# What a dictionary leaves out ---------------------------------------------------------------------------

def slow_left_out(sae, before, after):
    left, whole = 0.0, 0.0
    for i in range(len(before)):
        for j in range(before.shape[1]):
            told = (sae(after[i, j]) - sae(before[i, j])).detach()
            for d in range(before.shape[2]):
                change = float(after[i, j, d] - before[i, j, d])
                left += (change - float(told[d]))**2
                whole += change**2
    return left / whole


def test_change_left_out_equals_loops():
    sae, (before, after) = random_sae(D, S), towers()
    found = diffing.change_left_out(sae, before, after)
    assert list(found) == ["R", "low", "high"]
    assert math.isclose(found["R"], slow_left_out(sae, before, after), rel_tol=1e-4)
    assert found["low"] < found["R"] < found["high"]


def test_nothing_is_left_out_of_what_is_reproduced_and_all_of_what_is_not_seen():
    before, after = towers(d=WIDTH)
    shifted = perfect_sae()
    shifted.b_dec.data += 3  # reproduces tokens up to a constant, and so every change
    shifted.b_enc.data -= shifted.b_dec.data @ -shifted.W_enc.data
    for sae in (perfect_sae(), shifted):
        assert all(abs(value) < 1e-9 for value in diffing.change_left_out(sae, before, after).values())
    assert diffing.change_left_out(blind_sae(), before, after) == pytest.approx({"R": 1, "low": 1, "high": 1})


def test_half_a_change_seen_leaves_a_quarter_of_its_square():
    before, after = towers(d=WIDTH)
    half = perfect_sae()
    half.W_dec.data /= 2
    assert diffing.change_left_out(half, before, after) == pytest.approx({"R": 0.25, "low": 0.25, "high": 0.25})


def test_without_change_nothing_can_be_left_out():
    before, _ = towers()
    assert np.isnan(list(diffing.change_left_out(random_sae(D, S), before, before).values())).all()


def test_an_image_that_does_not_change_changes_neither_share():
    sae, (before, after) = random_sae(D, S), towers()
    more = [torch.cat([tokens, normal(1, 5, D, seed=3)]) for tokens in (before, after)]
    found = [diffing.change_left_out(sae, *tokens)["R"] for tokens in ((before, after), more)]
    assert math.isclose(*found, rel_tol=1e-6)


# Training an autoencoder on -----------------------------------------------------------------------------

@pytest.fixture
def settings(profile):
    return profile.with_sae(l1=1e-3).sae


def test_continued_training_leaves_the_given_one_and_fits_the_new_tokens(settings):
    sae, z = random_sae(), normal(20, 5, WIDTH) @ normal(WIDTH, WIDTH, seed=1) + 1
    sae.normalise_decoder()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    trained = diffing.continued(sae.requires_grad_(False), z, settings, 60)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    assert not any(parameter.requires_grad for parameter in sae.parameters())
    assert explained(trained, z) > explained(sae, z) + 0.1
    torch.testing.assert_close(trained.W_dec.norm(dim=1), torch.ones(20))
    again = diffing.continued(sae, z, settings, 60)
    assert again.fingerprint() == trained.fingerprint() != diffing.continued(sae, z, settings, 59).fingerprint()


def test_continued_training_takes_the_profiles_settings(settings, monkeypatch):
    made, sizes = [], []

    class Watched(Training):
        def __init__(self, *arguments):
            made.append(arguments[1:])
            super().__init__(*arguments)

        def step(self, z):
            sizes.append(z.shape)
            return super().step(z)

    monkeypatch.setattr(diffing, "Training", Watched)
    diffing.continued(random_sae(), normal(9, 5, WIDTH), settings, 20)
    assert made == [(settings.learning_rate, settings.l1, 2, settings.dead_after, settings.ghost)]
    assert sizes == 20 * [(settings.batch_images, 5, WIDTH)]


def test_training_on_for_no_step_changes_nothing(settings):
    sae = random_sae()
    sae.normalise_decoder()
    torch.testing.assert_close(diffing.continued(sae, normal(9, 5, WIDTH), settings, 0).state_dict(), sae.state_dict())


# The crosscoder -----------------------------------------------------------------------------------------

def length(row):
    return math.sqrt(sum(x * x for x in row))


def slow_lengths(crosscoder):
    d = crosscoder.d_model // 2
    return [length(row[:d]) + length(row[d:]) for row in crosscoder.W_dec.tolist()]


def test_decoders_are_the_halves_of_each_row():
    crosscoder = random_crosscoder()
    first, second = crosscoder.decoders()
    assert torch.equal(torch.cat([first, second], 1), crosscoder.W_dec) and first.shape == second.shape == (S, D)


def test_in_training_the_largest_of_all_pairs_by_both_lengths_are_kept(double):
    crosscoder, z = random_crosscoder(), normal(N, 2 * D) * 2
    pre, lengths = crosscoder.pre_activations(z).detach(), slow_lengths(crosscoder)
    pairs = sorted(((float(pre[n, j]) * lengths[j], n, j) for n in range(N) for j in range(S)), reverse=True)
    expected = torch.zeros(N, S)
    for value, n, j in pairs[:K * N]:
        assert value > 0
        expected[n, j] = pre[n, j]
    h = crosscoder.activate_in_training(pre)
    torch.testing.assert_close(h, expected)
    plain = SparseAutoencoder(2 * D, S, activation="batchtopk", k=K).activate_in_training(pre)
    assert ((plain > 0) != (h > 0)).any()
    assert torch.equal(crosscoder.activate_in_training(pre[None, :, None]), h[None, :, None])


def test_in_evaluation_each_latent_has_a_threshold_over_its_lengths(double):
    crosscoder, z = random_crosscoder(), normal(N, 2 * D) * 2
    pre, lengths = crosscoder.pre_activations(z).detach(), slow_lengths(crosscoder)
    expected = torch.zeros(N, S)
    for n in range(N):
        for j in range(S):
            if float(pre[n, j]) * lengths[j] > 0.7:
                expected[n, j] = pre[n, j]
    h = crosscoder.encode(z)
    torch.testing.assert_close(h, expected)
    assert ((pre > 0.7) != (h > 0)).any() and 0 < (h > 0).sum() < (pre > 0).sum()
    torch.testing.assert_close(crosscoder.encode_some(z, range(S)[::-1]), h.flip(1))
    torch.testing.assert_close(torch.cat([crosscoder.encode(token[None]) for token in z]), h)


def test_a_longer_row_with_a_smaller_latent_is_the_same_latent(double):
    crosscoder, z = random_crosscoder(), normal(N, 2 * D)
    before = crosscoder.activate_in_training(crosscoder.pre_activations(z))
    most = int((before > 0).sum(0).argmax())
    with torch.no_grad():
        crosscoder.W_dec[most] *= 5
        crosscoder.W_enc[:, most] /= 5
        crosscoder.b_enc[most] /= 5
    after = crosscoder.activate_in_training(crosscoder.pre_activations(z))
    torch.testing.assert_close(after * torch.where(torch.arange(S) == most, 5.0, 1.0), before)


def test_the_threshold_follows_the_smallest_that_is_kept():
    crosscoder, lengths = random_crosscoder(threshold=0), torch.tensor(slow_lengths(random_crosscoder()))
    first, second = (F.relu(normal(N, S, seed=seed)) for seed in (1, 2))
    least = [min(float(h[n, j] * lengths[j]) for n in range(N) for j in range(S) if h[n, j] > 0)
             for h in (first, second)]
    crosscoder.after_step(first)
    assert math.isclose(crosscoder.threshold.item(), least[0], rel_tol=1e-5)
    crosscoder.after_step(second)
    assert math.isclose(crosscoder.threshold.item(), 0.99 * least[0] + 0.01 * least[1], rel_tol=1e-5)
    crosscoder.after_step(torch.zeros(N, S))
    assert math.isclose(crosscoder.threshold.item(), 0.99 * least[0] + 0.01 * least[1], rel_tol=1e-5)


def test_gradients_are_those_of_finite_differences_where_the_same_latents_stay(double):
    crosscoder, z, step = random_crosscoder(), normal(N, 2 * D) * 2, 1e-6

    def kept():
        return crosscoder.activate_in_training(crosscoder.pre_activations(z)) > 0

    sae_loss(crosscoder, z, 0.0).total.backward()
    start, rng = kept(), np.random.default_rng(0)
    for parameter in crosscoder.parameters():
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for i in rng.choice(len(flat), min(len(flat), 12), replace=False):
            losses, here = [], float(flat[i])
            for value in (here + step, here - step):
                flat[i] = value
                losses.append(sae_loss(crosscoder, z, 0.0).total.item())
                assert torch.equal(kept(), start)
            flat[i] = here
            assert math.isclose((losses[0] - losses[1]) / (2 * step), gradient[i].item(), rel_tol=1e-5, abs_tol=1e-8)


def sparse_towers(n=40, t=5, d=8, seed=0, same=False):
    """Tokens of few of many directions; the second tower has some of them turned, unless it is the same."""
    numbers = torch.Generator().manual_seed(seed)
    h = torch.rand(n, t, 10, generator=numbers) * (torch.rand(n, t, 10, generator=numbers) < 0.2)
    rows = F.normalize(torch.randn(10, d, generator=numbers), dim=1)
    turned = torch.cat([rows[:5], F.normalize(torch.randn(5, d, generator=numbers), dim=1)])
    return 3 * h @ rows + 0.5, 3 * h @ (rows if same else turned) + 0.5


def test_training_is_a_function_of_its_seed():
    pair = sparse_towers()
    before = [tokens.clone() for tokens in pair]
    state = torch.get_rng_state()
    first, again, other = (diffing.train_crosscoder(*pair, 20, 2, 15, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state) and all(map(torch.equal, pair, before))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert isinstance(first, Crosscoder) and first.W_dec.shape == (20, 16) and first.k == 2
    assert first.threshold > 0
    torch.testing.assert_close(first.W_dec.norm(dim=1), torch.ones(20))


def test_training_starts_from_the_mean_token():
    pair = sparse_towers()
    start = diffing.train_crosscoder(*pair, 20, 2, 0, 1)
    torch.testing.assert_close(start.b_dec.data, torch.cat(pair, -1).mean((0, 1)))


@pytest.fixture
def fast(monkeypatch):
    """Large steps, so that few are enough."""
    monkeypatch.setattr(diffing, "RATE", 0.02)
    monkeypatch.setattr(diffing, "WARM_UP", 10)


def test_training_starts_with_latents_that_are_the_same_in_both_towers():
    start = diffing.train_crosscoder(*sparse_towers(), 20, 2, 0, 1)
    first, second = start.decoders()
    assert torch.equal(first, second)
    torch.testing.assert_close(start.W_enc.data, start.W_dec.data.T)
    torch.testing.assert_close(start.W_dec.norm(dim=1), torch.ones(20))


def test_trained_on_two_towers_it_reconstructs_both(fast):
    pair = sparse_towers()
    both = torch.cat(pair, -1)
    short, long = (diffing.train_crosscoder(*pair, 20, 2, steps, 1) for steps in (5, 80))
    assert explained(long, both) > max(0.8, explained(short, both))
    assert (long.encode(both) > 0).sum(-1).float().mean() < 3


def test_identical_towers_give_latents_of_both(fast):
    pair = sparse_towers(same=True)
    table = diffing.crosscoder_latents(diffing.train_crosscoder(*pair, 20, 2, 80, 0), *pair)
    active = table[table["frequency"] > 0.01]
    assert len(active) >= 8 and (active["relative_norm"] - 0.5).abs().max() < 0.1
    assert (active["specific"] == "").all() and active["change"].max() < diffing.CHANGED


@pytest.mark.parametrize("side, which", [(0, "before"), (1, "after")])
def test_a_direction_of_one_tower_has_a_latent_of_that_tower_alone(fast, side, which):
    pair, row = list(sparse_towers(same=True, d=16)), F.normalize(normal(16, seed=6), dim=0)
    on = torch.rand(40, 5, 1, generator=torch.Generator().manual_seed(5)) < 0.2
    pair[side] = pair[side] + 4 * on * row
    crosscoder = diffing.train_crosscoder(*pair, 20, 3, 150, 1)
    table = diffing.crosscoder_latents(crosscoder, *pair)
    named = table.index[table["specific"] == which]
    assert set(table["specific"]) == {"", which}
    assert F.cosine_similarity(crosscoder.decoders()[side][named[0]], row, dim=0) > 0.9


def slow_latents(crosscoder, before, after):
    """Every column latent by latent, from its formula."""
    z = [before.reshape(-1, before.shape[-1]).double().numpy(), after.reshape(-1, after.shape[-1]).double().numpy()]
    f = crosscoder.encode(torch.cat([before, after], -1)).detach().flatten(0, 1).double().numpy()
    d = [rows.detach().double().numpy() for rows in crosscoder.decoders()]
    bias = crosscoder.b_dec.detach().double().numpy().reshape(2, -1)
    z_hat = [f @ d[m] + bias[m] for m in (0, 1)]
    rows = []
    for j in range(f.shape[1]):
        lengths = [length(d[0][j]), length(d[1][j])]
        own = int(lengths[1] > lengths[0])
        row = {"frequency": (f[:, j] > 0).mean(),
               "relative_norm": (1 + (lengths[1] - lengths[0]) / max(lengths)) / 2,
               "change": length(d[1][j] - d[0][j]) / max(lengths)}
        if f[:, j].any():
            betas = {"nu_error": [], "nu_reconstruction": []}
            for m in (0, 1):
                error = z[m] - z_hat[m] + np.outer(f[:, j], d[m][j])
                for name, y in (("nu_error", error), ("nu_reconstruction", z_hat[m] - bias[m])):
                    betas[name].append(d[own][j] @ (y.T @ f[:, j]) / (length(f[:, j])**2 * length(d[own][j])**2))
            row |= {name: beta[1 - own] / beta[own] for name, beta in betas.items()}
            alone = abs(row["nu_error"]) < 0.2 and abs(row["nu_reconstruction"]) < 0.5
            one = {True: "after" if row["relative_norm"] >= 0.9 else "", False: ""}[alone]
            row["specific"] = "before" if alone and row["relative_norm"] <= 0.1 else one
        else:
            row |= {"nu_error": np.nan, "nu_reconstruction": np.nan, "specific": ""}
        rows.append(row)
    return pd.DataFrame(rows)


@pytest.mark.parametrize("seed", range(4))
def test_what_a_table_says_of_latents_equals_loops(double, seed):
    crosscoder, pair = random_crosscoder(seed, n_latents=60, d=8), towers(n=30, d=8, seed=seed)
    crosscoder.b_enc.data[:3] = -100
    found, expected = diffing.crosscoder_latents(crosscoder, *pair), slow_latents(crosscoder, *pair)
    pd.testing.assert_frame_equal(found, expected[found.columns.tolist()], rtol=1e-6, check_dtype=False)
    assert list(found.columns) == ["frequency", "relative_norm", "change", "nu_error", "nu_reconstruction", "specific"]


def test_each_condition_of_being_one_towers_alone_decides_somewhere(double):
    tables = [diffing.crosscoder_latents(random_crosscoder(seed, n_latents=60, d=8), *towers(n=30, d=8, seed=seed))
              for seed in range(8)]
    table = pd.concat(tables)
    assert set(table["specific"]) == {"", "before", "after"}
    one = (table["relative_norm"] - 0.5).abs() >= 0.4
    left, told = table["nu_error"].abs() < 0.2, table["nu_reconstruction"].abs() < 0.5
    for others, last in ((one & left, told), (one & told, left), (left & told, one)):
        assert (others & last).any() and (others & ~last).any()
        assert (table["specific"][others & ~last] == "").all()


def test_swapped_towers_swap_before_and_after_alone(double):
    crosscoder, (before, after) = random_crosscoder(2, n_latents=60), towers(n=30, seed=2)
    mirrored = random_crosscoder(2, n_latents=60)
    with torch.no_grad():
        mirrored.W_dec.copy_(torch.cat(crosscoder.decoders()[::-1], 1))
        mirrored.W_enc.copy_(torch.cat(crosscoder.W_enc.chunk(2)[::-1]))
        mirrored.b_dec.copy_(torch.cat(crosscoder.b_dec.chunk(2)[::-1]))
    table = diffing.crosscoder_latents(crosscoder, before, after)
    other = diffing.crosscoder_latents(mirrored, after, before)
    assert {"before", "after"} <= set(table["specific"])
    swapped = table.assign(relative_norm=1 - table["relative_norm"], specific=table["specific"].map(
        {"": "", "before": "after", "after": "before"}))
    pd.testing.assert_frame_equal(other, swapped)


def test_relative_norms_and_changes_at_their_known_values():
    crosscoder = perfect_crosscoder(D)
    with torch.no_grad():
        halves = torch.eye(2)[[0, 1, 0]]
        crosscoder.W_dec[:4] = 0
        crosscoder.W_dec[0, D:D + 2] = halves[0]
        crosscoder.W_dec[1, :2] = halves[1]
        crosscoder.W_dec[2, :2], crosscoder.W_dec[2, D:D + 2] = halves[2], halves[2]
        crosscoder.W_dec[3, :2], crosscoder.W_dec[3, D:D + 2] = halves[0], -halves[0] / 2
    table = diffing.crosscoder_latents(crosscoder, *towers())
    assert table["relative_norm"][:4].tolist() == [1, 0, 0.5, 0.25]
    assert table["change"][:4].tolist() == [1, 1, 0, 1.5]


# What latents carry -------------------------------------------------------------------------------------

@pytest.fixture
def adapted(clip):
    """A model with prompts that change what it says."""
    model = new_maple(clip, NAMES, n=2, depth=3, vision=True, seed=1)
    with torch.no_grad():
        for parameter in model.prompts.parameters():
            parameter += 0.8 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return as_adapted(model)


def seen_tokens(n, prompts=2):
    labels, beside = torch.zeros(n, dtype=torch.long), normal(n, prompts, WIDTH, seed=9)
    before, after = towers(n=n, d=WIDTH)
    return Tokens(before, normal(n, 0, WIDTH), labels), Tokens(after, beside, labels)


def slow_patched_share(crosscoder, model, tokens, latents):
    """Image by image and latent by latent."""
    text, kl = model.text(NAMES), [0.0, 0.0]
    for i in range(len(tokens[0].z)):
        z, z_after = tokens[0].z[i], tokens[1].z[i]
        f, patched = crosscoder.encode(torch.cat([z, z_after], -1)), z.clone()
        for j in latents:
            row = crosscoder.W_dec[j]
            patched += f[:, j, None] * (row[WIDTH:] - row[:WIDTH])
        p, *others = (model.tower.logits(model.tower.above(torch.cat([x, tokens[1].prompts[i]])[None], LAYER),
                                         text)[0].softmax(0).tolist() for x in (z_after, z, patched))
        for which, q in enumerate(others):
            kl[which] += sum(a * math.log(a / b) for a, b in zip(p, q))
    return 1 - kl[1] / kl[0]


def test_patched_share_equals_loops(adapted):
    tokens, crosscoder = seen_tokens(9), random_crosscoder(3, n_latents=40, d=WIDTH)
    for latents in (np.arange(0, 40, 3), np.array([7, 2])):
        found = diffing.patched_share(crosscoder, adapted, NAMES, tokens, LAYER, latents)
        with torch.no_grad():
            expected = slow_patched_share(crosscoder, adapted, tokens, latents)
        assert math.isclose(found, expected, rel_tol=1e-3, abs_tol=1e-5)


def test_all_latents_carry_everything_and_none_nothing(adapted):
    tokens, crosscoder = seen_tokens(70), perfect_crosscoder(WIDTH)
    every, none = np.arange(crosscoder.n_latents), np.arange(0)
    assert math.isclose(diffing.patched_share(crosscoder, adapted, NAMES, tokens, LAYER, every), 1, abs_tol=1e-5)
    assert diffing.patched_share(crosscoder, adapted, NAMES, tokens, LAYER, none) == 0


def test_images_beyond_a_batch_count_as_the_others(adapted):
    tokens, crosscoder = seen_tokens(70), random_crosscoder(3, n_latents=40, d=WIDTH)
    again = [Tokens(*(part.flip(0) for part in some)) for some in tokens]
    shares = [diffing.patched_share(crosscoder, adapted, NAMES, some, LAYER, np.arange(20)) for some in (tokens, again)]
    assert math.isclose(*shares, rel_tol=1e-5)


def test_tokens_are_read_with_prompts_apart(clip, adapted, pixel_data):
    ds = ArrayDataset(pixel_data.pixels, pixel_data.labels, class_names=NAMES)
    for tower, prompts in ((clip, 0), (adapted.tower, 2)):
        z, whole = diffing.read_tokens(tower, ds, LAYER), tower.below(pixel_data.pixels, LAYER)
        assert torch.equal(z.z, whole[:, :5]) and torch.equal(z.prompts, whole[:, 5:])
        assert z.prompts.shape == (23, prompts, WIDTH) and z.labels.tolist() == pixel_data.labels.tolist()


# Planted changes ----------------------------------------------------------------------------------------

WIDE, IMAGES, PATCHES, CONCEPTS = 32, 500, 8, 24


def planted_world(seed=0):
    """An autoencoder, tokens, concepts of patches, and what was planted."""
    sae, z = random_sae(WIDE, 40, bias=-0.5), normal(IMAGES, PATCHES + 1, WIDE) + 1
    sae.normalise_decoder()
    often = np.linspace(0.02, 0.3, CONCEPTS)
    positives = np.random.default_rng(0).random((IMAGES * PATCHES, CONCEPTS)) < often
    return sae, z, positives, diffing.plant(sae, z, positives, seed)


@pytest.fixture(scope="module")
def world():
    return planted_world()


def amounts(z, planted):
    """How much of each planted direction was put on each patch, ``[N(T-1),K]``."""
    change = (planted.after - z)[:, 1:].flatten(0, 1)
    return torch.linalg.lstsq(planted.directions.T, change.T).solution.T


def of_kind(planted, kind):
    return [i for i, name in enumerate(planted.kinds) if name == kind]


def test_planted_directions_are_five_of_each_kind_and_all_that_changed(world):
    sae, z, _, planted = world
    assert planted.kinds == [kind for kind in ("added", "with its concept", "rare", "removed") for _ in range(5)]
    torch.testing.assert_close(planted.directions.norm(dim=1), torch.ones(20))
    assert torch.equal(planted.after[:, 0], z[:, 0]) and planted.after.shape == z.shape
    change = (planted.after - z)[:, 1:].flatten(0, 1)
    torch.testing.assert_close(amounts(z, planted) @ planted.directions, change, atol=1e-4, rtol=1e-4)


def test_added_directions_are_as_long_as_half_a_distance_from_the_mean(world):
    _, z, _, planted = world
    patches = z[:, 1:].reshape(-1, WIDE)
    half = sum((patch - patches.mean(0)).norm().item() for patch in patches) / len(patches) / 2
    amount = amounts(z, planted)[:, :15]
    on = amount.abs() > 1e-3
    torch.testing.assert_close(amount[on], torch.full_like(amount[on], half), rtol=1e-3, atol=1e-3)
    assert on.any(0).all()


def test_directions_with_a_concept_are_on_its_patches_and_added_ones_on_half_of_them(world):
    _, z, positives, planted = world
    on = (amounts(z, planted).abs() > 1e-3).numpy()
    often = np.argsort(-positives.sum(0))[:20]
    owners = []
    for i in of_kind(planted, "with its concept"):
        owner, = [c for c in often if np.array_equal(on[:, i], positives[:, c])]
        owners.append(owner)
    for i in of_kind(planted, "added"):
        owner, = [c for c in often if not (on[:, i] & ~positives[:, c]).any()]
        owners.append(owner)
        assert 0.4 < on[:, i].sum() / positives[:, owner].sum() < 0.6
    assert len(set(owners)) == 10


def test_rare_directions_are_on_a_thousandth_of_all_patches(world):
    _, z, positives, planted = world
    rare = (amounts(z, planted).abs() > 1e-3)[:, of_kind(planted, "rare")]
    assert 8 <= rare.sum() <= 36 and rare.sum(0).max() <= 12  # 20 are expected of 5 times 4,000
    assert (rare.sum(0) > 0).all() and len({tuple(column) for column in rare.T.tolist()}) == 5


def test_what_strong_latents_say_is_taken_away(world):
    sae, z, _, planted = world
    h = sae.encode(z[:, 1:].reshape(-1, WIDE)).detach()
    strong = [j for _, j in sorted(((h[:, j]**2).mean().item(), j) for j in range(40))][-20:]
    amount, taken = amounts(z, planted), []
    for i in of_kind(planted, "removed"):
        latent, = [j for j in strong if torch.equal(planted.directions[i], sae.W_dec[j])]
        torch.testing.assert_close(amount[:, i], -h[:, latent], atol=1e-3, rtol=1e-3)
        taken.append(latent)
    assert len(set(taken)) == 5


def test_planting_is_a_function_of_its_seed_and_leaves_the_tokens(world):
    sae, z, positives, planted = world
    kept = z.clone()
    again, other = (diffing.plant(sae, z, positives, seed) for seed in (0, 1))
    assert torch.equal(z, kept) and torch.equal(again.after, planted.after)
    assert not torch.isclose(other.directions, planted.directions)[:15].all(1).any()
    assert not torch.equal(other.directions[15:], planted.directions[15:])


# What is found of them ----------------------------------------------------------------------------------

RULES, ROWS = ["norm", "norm and scaling", "change"], 20


def hand_made(extra=4, common=5):
    """A crosscoder that has every planted direction in a latent of its own, others that both towers have, and spare
    latents that are dead; and its table."""
    directions = torch.eye(WIDE)[:ROWS] * torch.where(torch.arange(ROWS) % 2 == 0, 1, -1)[:, None]
    kinds = [kind for kind in diffing.KINDS for _ in range(5)]
    crosscoder = Crosscoder(2 * WIDE, ROWS + common + extra, None, "batchtopk", 1)
    both = torch.eye(WIDE)[ROWS:ROWS + common]
    with torch.no_grad():
        crosscoder.W_dec[:ROWS] = torch.cat([torch.zeros(ROWS, WIDE), torch.eye(WIDE)[:ROWS]], 1)
        crosscoder.W_dec[15:ROWS] = crosscoder.W_dec[15:ROWS].roll(WIDE, 1)
        crosscoder.W_dec[ROWS:ROWS + common] = torch.cat([both, both], 1) / 2**0.5
    n = crosscoder.n_latents
    table = pd.DataFrame({"frequency": [0.1] * (ROWS + common) + [0.0] * extra,
                          "relative_norm": [1.0] * 15 + [0.0] * 5 + [0.5] * (n - ROWS),
                          "change": [1.0] * ROWS + [0.0] * (n - ROWS),
                          "specific": ["after"] * 15 + ["before"] * 5 + [""] * (n - ROWS)})
    return crosscoder, table, diffing.Planted(torch.zeros(1), directions, kinds)


def named(table, row, **values):
    """The table with one latent that is active and that every rule names."""
    table = table.copy()
    for name, value in ({"frequency": 0.1, "relative_norm": 1.0, "change": 1.0, "specific": "after"} | values).items():
        table.loc[row, name] = value
    return table


def test_what_has_a_latent_of_its_own_is_found_without_anything_false():
    found = diffing.detected(*hand_made())
    assert list(zip(found["rule"], found["kind"])) == [(rule, kind) for rule in RULES for kind in diffing.KINDS]
    assert (found["recall"] == 1).all() and (found["false_positives"] == 0).all()


def test_a_direction_without_an_active_latent_is_not_found():
    crosscoder, table, planted = hand_made()
    table.loc[12, "frequency"] = 0
    found = diffing.detected(crosscoder, table, planted).set_index("kind")["recall"]
    assert (found["rare"] == 0.8).all() and (found.drop("rare") == 1).all()


def test_each_rule_names_by_its_own_column():
    crosscoder, table, planted = hand_made()
    for rule, change in zip(RULES, (
            {"relative_norm": diffing.NORM - 0.01}, {"specific": ""}, {"change": diffing.CHANGED - 0.01})):
        other = named(table, 7, **change)
        found = diffing.detected(crosscoder, other, planted)
        missed = (found["rule"] == rule) & (found["kind"] == "with its concept")
        assert (found["recall"] == np.where(missed, 0.8, 1)).all()
    at_the_bounds = table.assign(relative_norm=table["relative_norm"].map({1: 0.9, 0: 0.1, 0.5: 0.89}),
                                 change=table["change"].map({1: diffing.CHANGED, 0: diffing.CHANGED - 0.01}))
    found = diffing.detected(crosscoder, at_the_bounds, planted)
    assert (found["recall"] == 1).all() and (found["false_positives"] == 0).all()


def test_latents_outside_of_what_was_planted_are_false():
    crosscoder, table, planted = hand_made()
    with torch.no_grad():
        crosscoder.W_dec[ROWS] = F.one_hot(torch.tensor(2 * WIDE - 1), 2 * WIDE)
    found = diffing.detected(crosscoder, named(table, ROWS), planted)
    assert np.allclose(found["false_positives"], 1 / 25) and (found["recall"] == 1).all()
    dead = diffing.detected(crosscoder, named(table, ROWS, frequency=0), planted)
    assert (dead["false_positives"] == 0).all()


@pytest.mark.parametrize("inside, false", [(0.75, 0), (0.65, 1 / 25)])
def test_mixtures_of_planted_directions_are_neither_found_nor_false(inside, false):
    crosscoder, table, planted = hand_made()
    table.loc[[3, 4], "frequency"] = 0
    table.loc[[ROWS + 5, ROWS + 6], "frequency"] = 0.1  # as many are active
    row = torch.zeros(2 * WIDE)
    row[WIDE + 3] = row[WIDE + 4] = inside / 2**0.5
    row[2 * WIDE - 1] = (1 - inside**2)**0.5
    with torch.no_grad():
        crosscoder.W_dec[ROWS] = row
        crosscoder.W_dec[ROWS + 5:] = torch.eye(2 * WIDE)[0]
    found = diffing.detected(crosscoder, named(table, ROWS), planted).set_index("kind")
    assert (found.loc["added", "recall"] == 0.6).all() and np.allclose(found["false_positives"], false)


@pytest.mark.parametrize("cosine, recall", [(0.71, 1), (0.69, 0.8)])
def test_a_direction_is_found_from_a_cosine_on(cosine, recall):
    crosscoder, table, planted = hand_made()
    with torch.no_grad():
        crosscoder.W_dec[15] = 0
        crosscoder.W_dec[15, 15], crosscoder.W_dec[15, -1] = 3 * cosine, 3 * (1 - cosine**2)**0.5
    found = diffing.detected(crosscoder, table, planted).set_index("kind")["recall"]
    assert np.allclose(found["removed"], recall) and (found.drop("removed") == 1).all()


def test_what_counts_is_the_difference_of_the_two_decoder_rows():
    crosscoder, table, planted = hand_made()
    with torch.no_grad():
        crosscoder.W_dec[7, WIDE - 1] = crosscoder.W_dec[7, -1] = 1  # and a share that both towers have
    found = diffing.detected(crosscoder, table, planted)
    assert (found["recall"] == 1).all() and (found["false_positives"] == 0).all()


def test_where_nothing_was_planted_all_that_is_named_is_false():
    crosscoder, table, _ = hand_made()
    table.loc[3, "relative_norm"], table.loc[[4, 5], "specific"], table.loc[[1, 2, 3], "change"] = 0.6, "", 0
    found = diffing.detected(crosscoder, named(table, ROWS + 7, frequency=0))
    assert found["rule"].tolist() == RULES and (found["kind"] == "nothing").all()
    assert np.allclose(found["false_positives"], np.array([19, 18, 17]) / 25)
    assert "recall" not in found
