"""The order of training: every token once an epoch, by the seed alone, from wherever the tokens come."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import one_sentence

import patchsae.fast.pools
from patchsae import ArrayDataset
from patchsae.config import load_profile
from patchsae.data.images import Unreadable
from patchsae.fast.pools import TrainingTokens, epoch_rows, pool_spans, shuffled_tokens
from patchsae.train import training_batches


@pytest.mark.parametrize("n, per_image, size", [(10, 3, 7), (5, 1, 12), (8, 4, 32), (9, 2, 1)])
def test_spans_walk_through_all_pools_of_all_epochs(monkeypatch, n, per_image, size):
    monkeypatch.setattr(patchsae.fast.pools, "POOL_IMAGES", 4)
    seen = [span for step in range(40) for span in pool_spans(step * size, (step + 1) * size, n, per_image)]
    assert sum(stop - start for *_, start, stop in seen) == 40 * size
    place = (0, 0, 0)  # epoch, pool, and how far in it
    for epoch, pool, start, stop in seen:
        full = min(4, n - pool * 4) * per_image
        assert (epoch, pool, start) == place and start < stop <= full
        last_pool = (pool + 1) * 4 >= n
        place = (epoch, pool, stop) if stop < full else (epoch + 1, 0, 0) if last_pool else (epoch, pool + 1, 0)


@pytest.fixture
def marked(clip, monkeypatch):
    """Tokens that say which image and place they are of: ``image + place / 100`` in every coordinate."""
    monkeypatch.setattr(patchsae.fast.pools, "POOL_IMAGES", 6)
    monkeypatch.setattr(patchsae.fast.pools, "FILL_IMAGES", 4)
    ds = ArrayDataset(torch.zeros(23, 3, 16, 16), np.zeros(23, int))
    tokens = TrainingTokens(clip, ds, [-2])
    numbers = torch.arange(23)[:, None, None] + torch.arange(clip.n_tokens)[None, :, None] / 100
    tokens.kept, tokens.place = [numbers.expand(-1, -1, clip.width).contiguous()], np.arange(23)
    return tokens


@pytest.mark.parametrize("cls", [False, True])
def test_every_token_is_used_once_an_epoch_and_far_from_its_image(marked, cls):
    per_image = 1 if cls else marked.clip.n_tokens
    stream = torch.cat([z for z, in shuffled_tokens(marked, range(46), 4, 7, cls)])[:, 0]
    assert len(stream) == 46 * 4 * per_image
    epoch = 23 * per_image
    everything = sorted(marked.kept[0][:, :per_image, 0].flatten().tolist())
    for k in range(len(stream) // epoch):
        assert sorted(stream[k * epoch:(k + 1) * epoch].tolist()) == everything
    orders = [stream[k * epoch:(k + 1) * epoch].tolist() for k in range(2)]
    assert orders[0] != orders[1]
    if not cls:
        assert (stream.diff().abs() >= 1).float().mean() > 0.7, "neighbours in the stream should be of other images"


def test_any_step_can_be_the_first(marked):
    whole = list(shuffled_tokens(marked, range(20), 4, 3))
    for start in (1, 7, 12, 19):
        for (a,), (b,) in zip(shuffled_tokens(marked, range(start, 20), 4, 3), whole[start:]):
            assert torch.equal(a, b)
    assert not torch.equal(*next(shuffled_tokens(marked, range(1), 4, 4)), *whole[0])


class Damaged(ArrayDataset):
    """A data set of which some images cannot be read."""

    unreadable: dict

    def __getitem__(self, i):
        if i in (3, 11):
            raise Unreadable(f"Image {i} cannot be read; replace it.")
        return super().__getitem__(i)


@pytest.mark.parametrize("kept", [True, False])
def test_tokens_of_unreadable_images_are_left_out(clip, monkeypatch, kept):
    monkeypatch.setattr(patchsae.fast.pools, "POOL_IMAGES", 6)
    monkeypatch.setattr("patchsae.data.reading.MOST_UNREADABLE", 1)
    if not kept:
        monkeypatch.setattr(patchsae.fast.pools, "MEMORY", 0)
    pixels = torch.randn(23, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ds = Damaged(pixels, np.zeros(23, int))
    ds.unreadable = {}
    stream = torch.cat([z for z, in shuffled_tokens(TrainingTokens(clip, ds, [-2]), range(1), 23, 0)])
    good = [i for i in range(23) if i not in (3, 11)]
    expected = clip.below(pixels[good], -2).flatten(0, 1)
    assert stream.shape == expected.shape
    torch.testing.assert_close(stream[stream[:, 0].argsort()], expected[expected[:, 0].argsort()])


def test_a_training_on_shuffled_tokens_resumes_to_the_same_bytes(clip, tmp_path, monkeypatch):
    from test_train import Interrupted, files

    from patchsae.train import train_sae

    monkeypatch.setattr(patchsae.fast.pools, "POOL_IMAGES", 5)
    monkeypatch.setattr(patchsae.fast.pools, "MEMORY", 0)
    profile = load_profile("mini").with_sae(
        expansion=3, batch_images=4, steps=12, save_every=4, warmup=5, dead_after=2, shuffle="tokens"
    )
    ds = ArrayDataset(torch.randn(23, 3, 16, 16, generator=torch.Generator().manual_seed(1)), np.arange(23) % 5)
    train_sae(profile, clip, ds, tmp_path / "whole")
    for after in (33, 50, 61):
        with pytest.raises(KeyboardInterrupt):
            train_sae(profile, clip, Interrupted(ds, after, KeyboardInterrupt), tmp_path / str(after))
        train_sae(profile, clip, ds, tmp_path / str(after))
        assert files(tmp_path / str(after)) == files(tmp_path / "whole")


def test_batches_of_whole_images_and_of_shuffled_tokens_have_as_many_tokens(clip, pixel_data):
    profile = load_profile("mini").with_sae(batch_images=5)
    whole = list(training_batches([profile], clip, pixel_data, range(3)))
    loose = list(training_batches([profile.with_sae(shuffle="tokens")], clip, pixel_data, range(3)))
    assert [z.shape for z, in whole] == [(5, clip.n_tokens, clip.width)] * 3
    assert [z.shape for z, in loose] == [(5 * clip.n_tokens, clip.width)] * 3


def test_a_batch_that_cannot_be_shared_is_one_sentence(clip, pixel_data, monkeypatch):
    monkeypatch.setattr(patchsae.fast.pools.processes, "count", lambda: 3)
    with pytest.raises(ValueError) as error:
        next(training_batches([load_profile("mini")], clip, pixel_data, range(2)))
    assert one_sentence(error.value) and "3" in str(error.value)


def test_orders_are_kept_and_cannot_be_changed():
    assert epoch_rows(50, 0, 0) is epoch_rows(50, 0, 0)
    with pytest.raises(ValueError):
        epoch_rows(50, 0, 0)[0] = 1


@pytest.mark.parametrize("shuffle", ["images", "tokens"])
def test_a_training_reads_the_cache_that_its_profile_names(clip, tmp_path, monkeypatch, shuffle):
    from patchsae import cache as cache_room
    from patchsae import train as train_room
    from patchsae.config import Profile

    monkeypatch.setattr(Profile, "data_dir", property(lambda self: tmp_path))
    profile = load_profile("mini").with_sae(expansion=3, batch_images=4, steps=4, save_every=4, shuffle=shuffle)
    cached = dataclasses.replace(profile, data=dataclasses.replace(profile.data, cache="float16"))
    ds = ArrayDataset(torch.randn(23, 3, 16, 16, generator=torch.Generator().manual_seed(1)), np.arange(23) % 5)
    assert train_room.run_key(cached, clip) != train_room.run_key(profile, clip)
    with pytest.raises((OSError, ValueError)) as error:
        train_room.train_sae(cached, clip, ds, tmp_path / "none")
    assert one_sentence(error.value) and "make cache" in str(error.value)
    folder = cache_room.cache_folder(cached, clip, ds)
    cache_room.write_cache(clip, ds, -2, folder)
    assert cache_room.profile_cache(profile, clip, ds) is None
    for (a,), (b,) in zip(*(training_batches([p], clip, ds, range(9)) for p in (profile, cached))):
        assert not torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    train_room.train_sae(cached, clip, ds, tmp_path / "run")
    other = dataclasses.replace(profile, data=dataclasses.replace(profile.data, cache="bfloat16"))
    with pytest.raises(ValueError) as error:
        cache_room.profile_cache(other, clip, ds)
    assert one_sentence(error.value) and "float16" in str(error.value)
