"""Several autoencoders in one pass over the images: the same bytes as each has alone, and every image read once."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import SIDE, refused
from test_train import Interrupted, Stops, files

import patchsae.train
from patchsae import ArrayDataset
from patchsae.activations import tokens_at
from patchsae.config import load_profile
from patchsae.data.images import Images
from patchsae.fast.pools import TrainingTokens
from patchsae.train import new_saes, rides, run_key, train_sae, train_saes


class Counted(Images):
    """Counts the images that are read."""

    def __init__(self, ds):
        super().__init__(ds.labels, ds.class_names)
        self.ds, self.read = ds, 0

    def __getitem__(self, i):
        self.read += 1
        return self.ds[i]


@pytest.fixture(autouse=True)
def _read_images_as_they_are_needed(monkeypatch):
    monkeypatch.setattr("patchsae.fast.pools.MEMORY", 0)


@pytest.fixture
def ds():
    pixels = torch.randn(23, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(11))
    return ArrayDataset(pixels, np.arange(23) % 5)


@pytest.fixture
def several(profile):
    """Other layers, another seed in the same order, another activation, width and length, the class token alone."""
    first = profile.with_sae(one_order=True)
    return [first, first.at_layer(0), first.at_layer(-1), dataclasses.replace(first, seed=first.seed + 1),
            first.with_sae(activation="topk", k=4), first.with_sae(expansion=2, steps=9, save_every=2),
            first.with_sae(tokens="cls", b_dec="geometric_median")]


def assert_as_alone(profiles, clip, ds, folder, found):
    for i, (profile, (sae, log)) in enumerate(zip(profiles, found)):
        alone, own = train_sae(profile, clip, ds, folder / f"alone-{i}")
        assert sae.fingerprint() == alone.fingerprint() and own.equals(log) and len(log) == profile.sae.steps
        assert files(folder / f"alone-{i}") == files(folder / f"together-{i}")


def together(folder, profiles):
    return [folder / f"together-{i}" for i in range(len(profiles))]


def test_every_autoencoder_has_the_bytes_that_it_has_alone_and_images_are_read_once(clip, ds, several, tmp_path):
    counted, calls = Counted(ds), []
    through = clip._through
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "_through", lambda z, first, end: calls.append(end - first) or through(z, first, end))
        found = train_saes(several, clip, counted, together(tmp_path, several))
    assert counted.read == (8 + 12) * 4  # the batches that b_dec is set from, and the steps
    assert sum(calls) == (8 + 12) * len(clip.blocks), "a block was computed twice"
    assert len({sae.fingerprint() for sae, _ in found}) == len(several)
    assert_as_alone(several, clip, ds, tmp_path, found)


def test_tokens_shuffled_over_many_images_and_tokens_that_are_kept(clip, ds, several, tmp_path, monkeypatch):
    loose = [profile.with_sae(shuffle="tokens") for profile in several[:4]]
    found = train_saes(loose, clip, ds, together(tmp_path / "loose", loose))
    assert_as_alone(loose, clip, ds, tmp_path / "loose", found)
    monkeypatch.setattr("patchsae.fast.pools.MEMORY", 2**20)
    counted = Counted(ds)
    found = train_saes(several, clip, counted, together(tmp_path / "kept", several))
    assert counted.read == 23
    assert_as_alone(several, clip, ds, tmp_path / "kept", found)


def test_tokens_at_several_layers_are_those_below_each(clip, ds):
    pixels, layers = ds.pixels[:3], [2, -4, -1, 2]
    for z, layer in zip(tokens_at(clip, pixels, layers), layers):
        assert torch.equal(z, clip.below(pixels, layer))
    assert torch.equal(clip.between(clip.below(pixels, 1), 1, 3), clip.below(pixels, 3))
    with refused("comes before"):
        clip.between(clip.below(pixels, 1), 1, 0)
    found = TrainingTokens(clip, ds, layers)[np.array([4, 1])]
    assert all(torch.equal(z, clip.below(ds.pixels[[4, 1]], layer)) for z, layer in zip(found, layers))


@pytest.mark.parametrize("at", [3, 17, 33, 50, 62, 79])
def test_an_interrupted_pass_goes_on_to_the_same_bytes(clip, ds, several, tmp_path, at):
    with pytest.raises(Stops):
        train_saes(several, clip, Interrupted(ds, at, Stops), together(tmp_path, several))
    assert_as_alone(several, clip, ds, tmp_path, train_saes(several, clip, ds, together(tmp_path, several)))


def test_a_pass_goes_on_where_each_of_its_runs_is(clip, ds, several, tmp_path):
    """One has not begun, one is at step 4, one at step 8: those that are ahead wait."""
    folders = together(tmp_path, several)
    for i, steps in ((0, 5), (3, 9)):
        with pytest.raises(Stops):
            train_sae(several[i], clip, Interrupted(ds, 4 * (8 + steps), Stops), folders[i])
    counted = Counted(ds)
    found = train_saes([several[0], several[3]], clip, counted, [folders[0], folders[3]])
    assert counted.read == 4 * 8  # steps 5 to 12
    found = [found[0], *train_saes(several[1:3], clip, ds, folders[1:3]), found[1]]
    assert_as_alone(several[:4], clip, ds, tmp_path, found)


def test_one_that_had_too_little_room_goes_back_alone(clip, ds, several, tmp_path, monkeypatch):
    look, rooms = patchsae.train.Training.look, []

    def overflow(self):
        if self.steps_done == 7 and self.sae.activation == "topk" and len(rooms) < 2:
            rooms.append(self.room)
            raise patchsae.train.TooManyActive
        look(self)

    with monkeypatch.context() as patch:
        patch.setattr(patchsae.train.Training, "look", overflow)
        counted = Counted(ds)
        found = train_saes(several, clip, counted, together(tmp_path, several))
    assert rooms == [3, 6] and counted.read == 4 * (8 + 7 + 3 + 8)  # twice back to the checkpoint of step 4
    assert_as_alone(several, clip, ds, tmp_path, found)


@pytest.mark.parametrize("change", [{"one_order": True}, {"batch_images": 5}, {"shuffle": "tokens"},
                                    {"precision": "bf16"}])
def test_other_images_or_another_order_do_not_ride(clip, ds, profile, tmp_path, change):
    profile = dataclasses.replace(profile, seed=3)
    other = profile.with_sae(**change)
    assert rides(other) != rides(profile) == rides(profile.at_layer(0).with_sae(l1=1, steps=3, tokens="cls"))
    with refused("in one pass"):
        train_saes([profile, other], clip, ds, [tmp_path / "a", tmp_path / "b"])
    assert not list(tmp_path.iterdir())


def test_the_order_is_the_seeds_own_unless_there_is_one_for_all(clip, ds, profile):
    second = dataclasses.replace(profile, seed=profile.seed + 1)
    assert "one_order" not in load_profile("mini").sae_settings()["sae"] and rides(profile) != rides(second)
    both = [p.with_sae(one_order=True) for p in (profile, second)]
    assert rides(both[0]) == rides(both[1]) and run_key(both[1], clip) != run_key(second, clip)
    first, other = new_saes([p.with_sae(b_dec="mean") for p in both], clip, ds)
    assert torch.equal(first.b_dec, other.b_dec) and not torch.equal(first.W_enc, other.W_enc)
