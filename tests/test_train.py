"""Training steps against a plain loop with its own Adam; interrupted runs against one that was not."""

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SIDE, one_sentence, random_clip_model, random_sae
from test_sae import NAMES, twin_loss

import patchsae.sae
import patchsae.train
import patchsae.weights.formats
from patchsae import ArrayDataset, SparseAutoencoder, train_steps
from patchsae.__main__ import main
from patchsae.activations import token_batches
from patchsae.clip import Clip
from patchsae.config import Profile, load_profile
from patchsae.data.images import Images
from patchsae.fast.pools import TrainingTokens, epoch_rows, training_rows
from patchsae.studies.study import committed_folder, committed_log, run_folder, trained_sae
from patchsae.train import LOG_COLUMNS, Training, new_saes, train_sae


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def twin_training(start, batches, lr, l1, warmup, dead_after, ghost=True):
    """Plain steps on a dict of parameters: history, final parameters, latents dead at each step."""
    p = {name: value.clone() for name, value in start.items()}
    first = {name: torch.zeros_like(value) for name, value in p.items()}
    second = {name: torch.zeros_like(value) for name, value in p.items()}
    fired_at = {j: -1 for j in range(len(p["b_enc"]))}  # last step at which a latent fired, -1 for never
    history, dead_at = [], []
    for step, z in enumerate(batches):
        z = z.reshape(-1, z.shape[-1])
        for j in range(len(p["W_dec"])):
            p["W_dec"][j] = p["W_dec"][j] / (p["W_dec"][j] ** 2).sum().sqrt()
        dead = torch.tensor([step - 1 - fired_at[j] > dead_after for j in fired_at])
        leaves = {name: value.clone().requires_grad_() for name, value in p.items()}
        wanted = dead if ghost else None
        total = twin_loss(leaves, z, l1, wanted)
        total.backward()
        with torch.no_grad():
            zero = twin_loss(leaves, z, 0.0, None)
            plain = twin_loss(leaves, z, l1, None)
            history.append([zero, plain - zero, total.detach() - plain, total.detach()])
        gradient = {name: leaf.grad for name, leaf in leaves.items()}
        for j in range(len(p["W_dec"])):
            gradient["W_dec"][j] -= (gradient["W_dec"][j] @ p["W_dec"][j]) * p["W_dec"][j]
        rate = lr if step + 1 >= warmup else lr * (step + 1) / warmup
        before = dict(p)
        for name in p:
            first[name] = 0.9 * first[name] + 0.1 * gradient[name]
            second[name] = 0.999 * second[name] + 0.001 * gradient[name] ** 2
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            p[name] = p[name] - rate * mean / (square.sqrt() + 1e-8)
        dead_at.append(dead)
        for token in z:
            pre = (token - before["b_dec"]) @ before["W_enc"] + before["b_enc"]
            for j in fired_at:
                if pre[j] > 0:
                    fired_at[j] = step
    return torch.tensor(history), p, torch.stack(dead_at)


def sleepy_sae(dtype, seed=0):
    """16 latents: four asleep for good, four that fire now and then, eight awake."""
    sae = random_sae(6, 16, seed, dtype=dtype)
    with torch.no_grad():
        sae.b_enc[:4], sae.b_enc[4:8] = -6, -2.0
    return sae


def tokens(steps, dtype, seed=1, images=3):
    return list(
        torch.randn(steps, images, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 1.5
    )


@pytest.mark.parametrize("ghost", [True, False])
def test_forty_steps_equal_the_plain_loop(dtype, ghost):
    sae, batches = sleepy_sae(dtype), tokens(40, dtype)
    start = {name: getattr(sae, name).detach().clone() for name in NAMES}
    settings = {"lr": 0.002, "l1": 0.02, "warmup": 10, "dead_after": 3, "ghost": ghost}
    expected, final, dead = twin_training(start, batches, **settings)
    woke = (dead[:-1] & ~dead[1:]).any(0)
    assert dead[4:].any(1).all() and woke.any() and dead[-1].any(), (
        "the comparison must have ghosts that come and go"
    )
    history = train_steps(sae, batches, **settings)
    assert history.shape == (40, 4) and not history.requires_grad
    exact = {torch.float64: {"rtol": 1e-9, "atol": 1e-12}, torch.float32: {"rtol": 2e-4, "atol": 2e-5}}[dtype]
    torch.testing.assert_close(history, expected.to(dtype), **exact)
    for name in NAMES:
        torch.testing.assert_close(getattr(sae, name).detach(), final[name], **exact)


def test_a_latent_is_dead_after_more_than_dead_after_silent_steps():
    for dead_after in (0, 1, 3):
        history = train_steps(
            sleepy_sae(torch.float32), tokens(8, torch.float32), lr=1e-6, dead_after=dead_after
        )
        assert not history[: dead_after + 1, 2].any() and bool((history[dead_after + 1 :, 2] > 0).all())


def test_one_token_is_enough_to_count_as_fired():
    sae = random_sae(6, 16)
    with torch.no_grad():
        sae.b_enc[:] = -1000.0
        sae.b_enc[5] = 0.0
        sae.W_enc[:, 5] = torch.tensor([1000.0, 0, 0, 0, 0, 0])
        sae.b_dec[:] = 0
    z = -torch.rand(4, 7, 6) - 0.1
    z[2, 3, 0] = 0.5  # the only token on which latent 5 fires
    training = Training(sae, lr=1e-9, dead_after=2, warmup=1)
    for step in range(5):
        training.step(z)
        assert training.dead.tolist() == [step + 1 > 2 and j != 5 for j in range(16)]


def test_warm_up():
    """Adam's first step is lr * sign(gradient), so its size is the rate of a fresh optimiser's first step."""
    z = tokens(1, torch.float64)[0]
    for warmup, rate in ((1, 1.0), (2, 0.5), (4, 0.25), (500, 1 / 500)):
        sae = sleepy_sae(torch.float64)
        before = sae.b_dec.detach().clone()
        train_steps(sae, [z], lr=0.01, l1=0.02, warmup=warmup)
        torch.testing.assert_close(
            (sae.b_dec.detach() - before).abs(), torch.full_like(before, 0.01 * rate), rtol=1e-5, atol=0
        )


def test_no_warm_up():
    sae, other, batches = sleepy_sae(torch.float32), sleepy_sae(torch.float32), tokens(3, torch.float32)
    assert torch.equal(train_steps(sae, batches, warmup=0), train_steps(other, batches, warmup=1))


def test_rows_are_unit_at_the_loss_and_the_gradient_is_perpendicular_at_the_update(monkeypatch):
    sae, seen = sleepy_sae(torch.float64), []
    loss, step = patchsae.sae.sae_loss, torch.optim.Adam.step

    def checked_loss(sae, *args, **kwargs):
        torch.testing.assert_close(sae.W_dec.detach().norm(dim=1), torch.ones(16, dtype=torch.float64))
        return loss(sae, *args, **kwargs)

    def checked_step(self, *args, **kwargs):
        along = (sae.W_dec.grad * sae.W_dec.detach()).sum(1).abs().max()
        seen.append(bool(along < 1e-14) and bool(sae.W_dec.grad.abs().max() > 1e-4))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(patchsae.sae, "sae_loss", checked_loss)
    monkeypatch.setattr(torch.optim.Adam, "step", checked_step)
    train_steps(sae, tokens(12, torch.float64), lr=0.05, warmup=1, dead_after=2)
    assert seen == [True] * 12


def test_batches_may_come_from_a_generator_and_must_exist():
    first, second, batches = sleepy_sae(torch.float32), sleepy_sae(torch.float32), tokens(4, torch.float32)
    assert torch.equal(train_steps(first, batches), train_steps(second, (z.flatten(0, 1) for z in batches)))
    with pytest.raises(ValueError) as error:
        train_steps(first, [])
    assert one_sentence(error.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_tokens_that_are_not_finite(bad):
    batches = tokens(3, torch.float32)
    batches[1][2, 1, 0] = bad
    with pytest.raises(ValueError) as error:
        train_steps(sleepy_sae(torch.float32), batches)
    assert one_sentence(error.value) and "step 1" in str(error.value)


# Which images a step sees -------------------------------------------------------------------------------


@pytest.mark.parametrize("n, batch", [(10, 3), (10, 10), (7, 16), (1, 4), (12, 4)])
def test_training_rows_use_every_image_once_an_epoch(n, batch):
    rows = np.concatenate([training_rows(n, step, batch, seed=5) for step in range(3 * n)])
    assert len(rows) == 3 * n * batch
    for epoch in range(len(rows) // n):
        assert sorted(rows[epoch * n : (epoch + 1) * n]) == list(range(n))
        np.testing.assert_array_equal(rows[epoch * n : (epoch + 1) * n], epoch_rows(n, epoch, 5))


def test_training_rows_depend_on_their_arguments_alone():
    again = [training_rows(50, 3, 8, 0) for _ in range(2) if np.random.seed(1) is None]
    np.testing.assert_array_equal(*again)
    assert not np.array_equal(again[0], training_rows(50, 3, 8, 1))
    assert not np.array_equal(epoch_rows(50, 0, 0), epoch_rows(50, 1, 0))


@pytest.mark.parametrize("batch", [1, 4, 23, 100])
def test_token_batches_cover_every_image_in_order(clip, pixel_data, batch):
    rows, ids, labels = [], [], []
    for b in token_batches(clip, pixel_data, -2, batch):
        assert len(b.z) == len(b.ids) == len(b.labels) == len(b.rows) <= batch
        assert torch.is_grad_enabled() and not b.z.requires_grad
        torch.testing.assert_close(
            b.z, clip.below(torch.stack([pixel_data[int(i)].image for i in b.rows]), -2)
        )
        rows, ids, labels = rows + b.rows.tolist(), ids + list(b.ids), labels + b.labels.tolist()
    assert rows == list(range(23))
    assert ids == [pixel_data[i].id for i in range(23)] and labels == [pixel_data[i].label for i in range(23)]


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, torch.float64, torch.float32])
def test_tokens_of_any_float_pixels(clip, kind):
    pixels = np.random.default_rng(0).normal(size=(4, 3, SIDE, SIDE))
    given = torch.from_numpy(pixels).to(kind) if isinstance(kind, torch.dtype) else pixels.astype(kind)
    (batch,) = token_batches(clip, ArrayDataset(given, [0, 1, 0, 1]), -2)
    expected = clip.below(torch.from_numpy(pixels).float(), -2)
    torch.testing.assert_close(batch.z, expected, rtol=0.02, atol=0.02)


def test_images_are_preprocessed_and_pixels_are_not(clip, image_data):
    (batch,) = token_batches(clip, image_data, -2)
    pixels = torch.cat([clip.pixels([image_data[i].image]) for i in range(len(image_data))])
    torch.testing.assert_close(batch.z, clip.below(pixels, -2))
    (again,) = token_batches(clip, ArrayDataset(pixels, image_data.labels), -2)
    torch.testing.assert_close(again.z, batch.z)


def test_training_tokens_are_the_same_whether_kept_or_not(clip, pixel_data, monkeypatch):
    rows = training_rows(23, 5, 6, 3)
    expected = clip.below(pixel_data.pixels[torch.from_numpy(rows)], -2)
    computed = TrainingTokens(clip, pixel_data, [-2])
    monkeypatch.setattr("patchsae.fast.pools.MEMORY", 2**20)
    kept = TrainingTokens(clip, pixel_data, [-2])
    assert kept.kept is not None and computed.kept is None
    for tokens in (kept, computed):
        torch.testing.assert_close(tokens[rows], [expected])
        assert torch.equal(*tokens[rows], *tokens[rows])


@pytest.mark.parametrize(
    "read",
    [
        lambda clip, ds: list(token_batches(clip, ds, -2)),
        lambda clip, ds: training_rows(len(ds), 0, 4, 0),
    ],
)
def test_no_images_is_one_sentence(clip, read):
    with pytest.raises(ValueError) as error:
        read(clip, ArrayDataset(torch.zeros(0, 3, SIDE, SIDE), []))
    assert one_sentence(error.value)


# Whole runs ---------------------------------------------------------------------------------------------


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(clip, tmp_path_factory):
    """One run without interruption: its settings, its data, its files."""
    profile = load_profile("mini").with_sae(
        expansion=3, batch_images=4, steps=12, save_every=4, warmup=5, dead_after=2, l1=0.5, learning_rate=0.1
    )
    ds = ArrayDataset(
        torch.randn(23, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(11)), np.arange(23) % 5
    )
    folder = tmp_path_factory.mktemp("whole")
    sae, log = train_sae(profile, clip, ds, folder)
    return profile, ds, folder, sae, log


def assert_same_run(whole, folder, sae, log):
    _, _, reference, expected, expected_log = whole
    for name in NAMES:
        assert torch.equal(getattr(sae, name), getattr(expected, name)), name
    pd.testing.assert_frame_equal(log, expected_log, check_exact=True)
    assert files(folder) == files(reference)


def test_a_run_is_the_same_bytes_again_and_leaves_no_scraps(whole, clip, tmp_path):
    profile, ds, folder, sae, log = whole
    assert_same_run(whole, tmp_path, *train_sae(profile, clip, ds, tmp_path))
    assert set(files(folder)) == {"log.csv", "sae.safetensors", "config.json"}
    assert list(log.columns) == LOG_COLUMNS and log["step"].tolist() == list(range(1, 13))
    loaded = SparseAutoencoder.from_pretrained(folder)
    assert all(torch.equal(getattr(loaded, name), getattr(sae, name)) for name in NAMES)


def test_a_run_is_train_steps_on_the_steps_tokens(whole, clip):
    profile, ds, _, sae, log = whole
    batches = [TrainingTokens(clip, ds, [-2])[training_rows(len(ds), step, 4, profile.seed)][0] for step in range(12)]
    twin, s = new_saes([profile], clip, ds)[0], profile.sae
    history = train_steps(twin, batches, s.learning_rate, s.l1, s.warmup, s.dead_after)
    twin.normalise_decoder()  # what is saved has rows of unit length
    assert all(torch.equal(getattr(twin, name), getattr(sae, name)) for name in NAMES)
    np.testing.assert_allclose(log[["mse", "l1", "ghost", "total"]], history, atol=1e-6)
    assert log["ghost"].max() > 0 and log["l0"].between(0, 36).all() and log["dead"].between(0, 1).all()


def test_new_autoencoder_starts_at_the_median_of_the_first_eight_batches(whole, clip):
    profile, ds = whole[:2]
    tokens = TrainingTokens(clip, ds, [-2])
    first = torch.cat([tokens[training_rows(len(ds), step, 4, profile.seed)][0] for step in range(8)])
    sae = new_saes([profile.with_sae(b_dec="geometric_median")], clip, ds)[0]
    assert tuple(sae.W_enc.shape) == (12, 36)
    points = first.flatten(0, 1).double()
    distances = (points - sae.b_dec.detach().double()).norm(dim=1)
    directions = ((points - sae.b_dec.detach().double()) / distances[:, None]).sum(0)
    assert directions.norm() < 1e-2  # at the median the unit vectors towards the points cancel
    mean = new_saes([profile.with_sae(b_dec="mean")], clip, ds)[0]
    torch.testing.assert_close(mean.b_dec.detach(), points.mean(0).float())
    assert torch.equal(mean.W_enc, sae.W_enc)


@pytest.fixture(autouse=True, scope="module")
def _read_images_as_they_are_needed():
    """Tokens are not kept in memory here, so that an interruption can come between any two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("patchsae.fast.pools.MEMORY", 0)
        yield


class Stops(Exception):
    """Stands for a crash."""


class Interrupted(Images):
    """A data set that raises at the n-th image it is asked for."""

    def __init__(self, ds, after, error):
        super().__init__(ds.labels, ds.class_names)
        self.ds, self.left, self.error = ds, after, error

    def __getitem__(self, i):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.ds[i]


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stops])
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 7, 11])
def test_resumed_after_an_interruption_between_steps(whole, clip, tmp_path, steps, error):
    profile, ds = whole[:2]
    with pytest.raises(error):
        train_sae(profile, clip, Interrupted(ds, 32 + 4 * steps + 2, error), tmp_path)  # 32 images set b_dec
    assert_same_run(whole, tmp_path, *train_sae(profile, clip, ds, tmp_path))


def test_resumed_after_every_single_step(whole, clip, tmp_path):
    profile, ds = whole[0].with_sae(save_every=1), whole[1]
    for attempt in range(11):
        with pytest.raises(KeyboardInterrupt):
            train_sae(profile, clip, Interrupted(ds, 4 + 32 * (attempt == 0), KeyboardInterrupt), tmp_path)
    assert_same_run(whole, tmp_path, *train_sae(profile, clip, ds, tmp_path))


def interrupt_once(monkeypatch, owner, name, at, after=False):
    """Raise KeyboardInterrupt before (or after) the ``at``-th call of a function, once."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == at and not after:
            raise KeyboardInterrupt
        result = original(*args, **kwargs)
        if len(calls) == at and after:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize(
    "owner, name, after",
    [
        (patchsae.sae, "sae_loss", False),
        (torch.Tensor, "backward", True),
        (torch.optim.Adam, "step", False),
        (torch.optim.Adam, "step", True),
        (patchsae.train, "_log_row", False),
        (patchsae.train, "_log_row", True),
        (patchsae.train, "save_tensors", False),
        (patchsae.train, "save_tensors", True),
        (patchsae.train, "save_json", False),
        (patchsae.train, "write_atomically", True),
    ],
)
@pytest.mark.parametrize("at", [1, 3])
def test_resumed_after_an_interruption_in_the_middle_of_a_step(
    whole, clip, tmp_path, monkeypatch, owner, name, after, at
):
    """Whatever a step had done when the interrupt came, the run goes on as if it had not been interrupted."""
    profile, ds = whole[:2]
    with monkeypatch.context() as patch:
        interrupt_once(patch, owner, name, at, after)
        with pytest.raises(KeyboardInterrupt):
            train_sae(profile, clip, ds, tmp_path)
    assert_same_run(whole, tmp_path, *train_sae(profile, clip, ds, tmp_path))


def test_a_kill_loses_only_the_steps_after_the_last_checkpoint(whole, clip, tmp_path, monkeypatch):
    """A killed process saves nothing on its way out: what is there is the checkpoint of step 4 or 8."""
    profile, ds = whole[:2]
    original = patchsae.train._Run._save

    def save(run):
        if run.training.steps_done % 4 == 0:
            original(run)

    with monkeypatch.context() as patch:
        patch.setattr(patchsae.train._Run, "_save", save)
        with pytest.raises(Stops):
            train_sae(profile, clip, Interrupted(ds, 32 + 4 * 6, Stops), tmp_path)
    assert_same_run(whole, tmp_path, *train_sae(profile, clip, ds, tmp_path))


@pytest.fixture
def home(monkeypatch, tmp_path):
    """Runs of any profile go to a temporary folder."""
    monkeypatch.setattr(Profile, "data_dir", property(lambda self: tmp_path / "data"))
    return tmp_path / "data"


def test_a_finished_run_is_read_not_trained(whole, clip, home):
    profile, ds, _, expected, _ = whole
    first = trained_sae(profile, clip, ds)
    assert_same_run(whole, run_folder(profile, clip), first, whole[4])
    again = trained_sae(profile, clip, Interrupted(ds, 0, Stops))
    assert all(torch.equal(getattr(again, name), getattr(expected, name)) for name in NAMES)
    assert run_folder(profile, clip).is_relative_to(home) and committed_folder(profile, clip).is_relative_to(
        home
    )
    run_folder(profile, clip).rename(home / "moved")
    committed_folder(profile, clip).parent.mkdir(parents=True)
    (home / "moved").rename(committed_folder(profile, clip))
    again = trained_sae(profile, clip, Interrupted(ds, 0, Stops))
    assert all(torch.equal(getattr(again, name), getattr(expected, name)) for name in NAMES)
    pd.testing.assert_frame_equal(committed_log(profile, clip), whole[4], check_exact=False)
    assert committed_log(profile.with_sae(l1=9.0), clip) is None


@pytest.mark.parametrize("name", ["save_tensors", "save_json"])
@pytest.mark.parametrize("after", [False, True])
def test_interrupted_while_the_finished_autoencoder_is_written(whole, clip, home, monkeypatch, name, after):
    profile, ds, _, expected, _ = whole
    with monkeypatch.context() as patch:
        interrupt_once(patch, patchsae.weights.formats, name, 1, after)
        with pytest.raises(KeyboardInterrupt):
            trained_sae(profile, clip, ds)
    again = trained_sae(profile, clip, ds)
    assert all(torch.equal(getattr(again, name), getattr(expected, name)) for name in NAMES)


@pytest.mark.parametrize(
    "change", [{"l1": 0.6}, {"steps": 13}, {"ghost": False}, {"b_dec": "mean"}, {"expansion": 2}]
)
def test_other_settings_in_the_folder_of_an_interrupted_run_are_refused(whole, clip, tmp_path, change):
    profile, ds = whole[:2]
    with pytest.raises(KeyboardInterrupt):
        train_sae(profile, clip, Interrupted(ds, 32 + 20, KeyboardInterrupt), tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError) as error:
        train_sae(profile.with_sae(**change), clip, ds, tmp_path)
    assert one_sentence(error.value) and str(tmp_path) in str(error.value)
    assert files(tmp_path) == before


def test_other_settings_in_the_folder_of_a_finished_run_do_not_pass_for_it(whole, clip, tmp_path):
    profile, ds = whole[0].with_sae(steps=2), whole[1]
    train_sae(profile, clip, ds, tmp_path / "a")
    other = profile.with_sae(l1=0.6)
    fresh, _ = train_sae(other, clip, ds, tmp_path / "b")
    try:
        again, _ = train_sae(other, clip, ds, tmp_path / "a")
    except ValueError as error:
        assert one_sentence(error)
    else:
        assert torch.equal(again.W_enc, fresh.W_enc) and files(tmp_path / "a") == files(tmp_path / "b")


def test_other_weights_of_the_model_are_not_mixed_with_an_old_run(whole, tmp_path):
    """The mini CLIP can be trained again under the same name; an old run must not go on with its tokens."""
    profile, ds = whole[:2]
    with pytest.raises(KeyboardInterrupt):
        train_sae(profile, Clip(random_clip_model(0)), Interrupted(ds, 32 + 20, KeyboardInterrupt), tmp_path)
    with pytest.raises(ValueError) as error:
        train_sae(profile, Clip(random_clip_model(1)), ds, tmp_path)
    assert one_sentence(error.value)


def test_a_folder_that_cannot_be_written(whole, clip, tmp_path):
    profile, ds = whole[:2]
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError) as error:
        train_sae(profile, clip, ds, tmp_path / "file" / "run")
    assert one_sentence(error.value) and "Cannot write" in str(error.value)
    assert (tmp_path / "file").read_text() == "not a folder"


def test_pixels_that_are_not_numbers_and_again_when_they_are_mended(whole, clip, tmp_path):
    profile, ds = whole[:2]
    pixels = ds.pixels.clone()
    pixels[training_rows(23, 0, 4, profile.seed)[1], 0, 3, 3] = math.nan
    with pytest.raises(ValueError) as error:
        train_sae(profile, clip, ArrayDataset(pixels, ds.labels), tmp_path)
    assert one_sentence(error.value)
    assert_same_run(whole, tmp_path, *train_sae(profile, clip, ds, tmp_path))


def test_pixels_that_are_not_numbers_later_on(whole, clip, tmp_path):
    """The bad image comes first after b_dec was set: the steps before it are kept."""
    profile, ds = whole[:2]
    profile = profile.with_sae(b_dec="zeros")
    expected, _ = train_sae(profile, clip, ds, tmp_path / "whole")
    pixels, bad = ds.pixels.clone(), training_rows(23, 3, 4, profile.seed)[2]
    pixels[bad, 0, 3, 3] = math.nan
    with pytest.raises(ValueError) as error:
        train_sae(profile, clip, ArrayDataset(pixels, ds.labels), tmp_path / "run")
    assert one_sentence(error.value) and "3" in str(error.value)
    again, log = train_sae(profile, clip, ds, tmp_path / "run")
    assert (
        all(torch.equal(getattr(again, name), getattr(expected, name)) for name in NAMES) and len(log) == 12
    )


def test_an_empty_data_set(whole, clip, tmp_path):
    with pytest.raises(ValueError) as error:
        train_sae(whole[0], clip, ArrayDataset(torch.zeros(0, 3, SIDE, SIDE), []), tmp_path)
    assert one_sentence(error.value)


@pytest.mark.parametrize(
    "name, damage",
    [
        ("checkpoint.safetensors", lambda b: b[:-9]),
        ("checkpoint.safetensors", None),
        ("checkpoint.safetensors", "no quiet"),
        ("training.json", lambda b: b"{"),
        ("training.json", lambda b: b"{}"),
        ("log.csv", None),
        ("log.csv", lambda b: b""),
    ],
)
def test_a_damaged_run_is_one_sentence(whole, clip, tmp_path, name, damage):
    profile, ds = whole[:2]
    with pytest.raises(KeyboardInterrupt):
        train_sae(profile, clip, Interrupted(ds, 32 + 20, KeyboardInterrupt), tmp_path)
    path = tmp_path / name
    if damage is None:
        path.unlink()
    elif damage == "no quiet":
        from safetensors.torch import load_file, save_file

        save_file({k: v for k, v in load_file(path).items() if k != "quiet"}, path)
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises((ValueError, OSError)) as error:
        train_sae(profile, clip, ds, tmp_path)
    assert one_sentence(error.value)


def test_log_is_read_back_exactly(tmp_path):
    """A resumed log is written again from what was read, so reading must give the same numbers."""
    numbers = np.random.default_rng(0)
    rows = [
        (i + 1, *(round(float(v), 7) for v in numbers.gamma(1.0, 10.0 ** numbers.integers(-5, 3, 7))))
        for i in range(2000)
    ]
    pd.DataFrame(rows, columns=LOG_COLUMNS).to_csv(tmp_path / "log.csv", index=False)
    assert patchsae.train._read_log(tmp_path / "log.csv", 2000) == rows
    assert len(patchsae.train._read_log(tmp_path / "log.csv", 17)) == 17


def test_class_tokens_only(whole, clip, tmp_path):
    profile, ds = whole[:2]
    profile = profile.with_sae(tokens="cls", steps=3)
    sae, _ = train_sae(profile, clip, ds, tmp_path)
    twin, s = new_saes([profile], clip, ds)[0], profile.sae
    rows = [training_rows(len(ds), step, 4, profile.seed) for step in range(3)]
    batches = [z[:, :1] for z, in TrainingTokens(clip, ds, [-2]).batches(rows)]
    train_steps(twin, batches, s.learning_rate, s.l1, s.warmup, s.dead_after)
    twin.normalise_decoder()
    assert all(torch.equal(getattr(twin, name), getattr(sae, name)) for name in NAMES)


def test_global_generators_do_not_matter_and_are_left_alone(whole, clip, tmp_path):
    profile, ds = whole[:2]
    torch.manual_seed(123)
    np.random.seed(123)
    before = (
        hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        np.random.get_state()[1].sum(),
    )
    assert_same_run(whole, tmp_path, *train_sae(profile, clip, ds, tmp_path))
    after = (
        hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        np.random.get_state()[1].sum(),
    )
    assert before == after


def test_more_active_latents_than_there_was_room_for(whole, clip, tmp_path, monkeypatch):
    """What a GPU finds too late: the steps since the last checkpoint are taken again, with twice the room."""
    profile, ds = whole[:2]
    original, rooms = patchsae.train.Training.look, []

    def look(self):
        if self.steps_done == 7 and len(rooms) < 2:
            rooms.append(self.room)
            raise patchsae.train.TooManyActive
        original(self)

    monkeypatch.setattr(patchsae.train.Training, "look", look)
    assert_same_run(whole, tmp_path, *train_sae(profile, clip, ds, tmp_path))
    assert rooms == [3, 6]


def test_command_line(monkeypatch, tmp_path, capsys):
    """``python -m patchsae train --profile mini`` trains where the notebooks look for it."""
    seen, log = [], pd.DataFrame([range(8)], columns=LOG_COLUMNS)
    monkeypatch.setattr("patchsae.studies.study.train_saes",
                        lambda profiles, clip, ds, folders: seen.extend(zip(profiles, folders)) or [(None, log)])
    main(["train", "--profile", "mini"])
    (profile, folder), = seen
    said = capsys.readouterr().out
    assert profile.name == "mini" and profile.short(folder) in said and "5.0 latents are active" in said
    with pytest.raises(SystemExit) as error:
        main(["train", "--profile", "none"])
    assert one_sentence(str(error.value))


def test_killed_trainings_continue_to_the_same_bytes():
    """A few of the kills of ``make stress``."""
    tool = Path(__file__).parents[1] / "tools" / "stress_training.py"
    done = subprocess.run([sys.executable, tool, "--kills", "4"], capture_output=True, text=True)
    assert done.returncode == 0 and "4 of 4 identical" in done.stdout, done.stdout + done.stderr
