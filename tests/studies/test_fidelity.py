"""Quality of an autoencoder at its known extremes and against a loop over single images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LAYER, WIDTH, random_sae

from patchsae import SparseAutoencoder
from patchsae.studies.fidelity import measure


@pytest.fixture
def text():
    return F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(1)), dim=-1)


def perfect_sae():
    """relu(x) - relu(-x) = x: an autoencoder that changes nothing."""
    sae, eye = SparseAutoencoder(WIDTH, 2 * WIDTH), torch.eye(WIDTH)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(torch.cat([eye, -eye], 0))
    return sae


def mean_sae(clip, ds):
    """An autoencoder that says the mean patch token whatever it sees."""
    sae = SparseAutoencoder(WIDTH, 4)
    with torch.no_grad():
        z = clip.below(torch.stack([torch.as_tensor(ds[i].image) for i in range(len(ds))]), LAYER)
        sae.b_enc.fill_(-1e6)
        sae.b_dec.copy_(z[:, 1:].flatten(0, 1).mean(0))
    return sae


def test_a_perfect_autoencoder_changes_nothing(clip, pixel_data, text):
    quality = measure(clip, perfect_sae(), pixel_data, text, LAYER, batch_images=7)
    assert quality["ev_patch"] == pytest.approx(1) and quality["ev_cls"] == pytest.approx(1)
    assert quality["mse"] == pytest.approx(0, abs=1e-10)
    assert quality["accuracy_spliced"] == quality["accuracy_original"]
    assert quality["contrastive_spliced"] == pytest.approx(quality["contrastive_original"], rel=1e-5)
    assert quality["l0"] == WIDTH


def test_a_constant_predictor_explains_nothing(clip, pixel_data, text):
    quality = measure(clip, mean_sae(clip, pixel_data), pixel_data, text, LAYER, batch_images=4)
    assert quality["ev_patch"] == pytest.approx(0, abs=1e-6)
    assert quality["dead"] == 1 and quality["l0"] == 0 and quality["l1"] == 0


def test_every_number_against_single_images(clip, pixel_data, text):
    sae = random_sae(WIDTH, 20)
    quality = measure(clip, sae, pixel_data, text, LAYER, batch_images=5)
    mse, l0, l1, hits, fired = [], [], [], {"original": 0, "spliced": 0, "ablated": 0}, set()
    for i in range(len(pixel_data)):
        with torch.no_grad():
            z = clip.below(pixel_data[i].image[None], LAYER)
            h = torch.relu((z - sae.b_dec) @ sae.W_enc + sae.b_enc)
            z_hat = h @ sae.W_dec + sae.b_dec
            for name, edited in (("original", z), ("spliced", z_hat), ("ablated", 0 * z)):
                scores = F.normalize(clip.above(edited, LAYER), dim=-1) @ text.T
                hits[name] += int(scores.argmax()) == pixel_data[i].label
        for token, own, latents in zip(z[0], z_hat[0], h[0]):
            mse.append(float(((own - token) ** 2).mean() / token.norm()))
            l0.append(int((latents > 0).sum()))
            l1.append(float(latents.sum()))
            fired |= set(latents.nonzero().flatten().tolist())
    expected = {"mse": np.mean(mse), "l0": np.mean(l0), "l1": np.mean(l1), "dead": 1 - len(fired) / 20}
    expected |= {f"accuracy_{name}": n / len(pixel_data) for name, n in hits.items()}
    for name, value in expected.items():
        assert quality[name] == pytest.approx(value, rel=1e-5), name


def test_class_token_alone_leaves_the_patches_as_they_are(clip, pixel_data, text):
    quality = measure(clip, mean_sae(clip, pixel_data), pixel_data, text, LAYER, tokens="cls", batch_images=5)
    assert np.isnan(quality["ev_patch"]) and quality["l0"] == 0
    with torch.no_grad():
        z = clip.below(torch.stack([pixel_data[i].image for i in range(23)]), LAYER)
        z[:, 0] = 0
        right = (clip.above(z, LAYER) @ text.T).argmax(1).numpy() == pixel_data.labels
    assert quality["accuracy_ablated"] == pytest.approx(right.mean())
