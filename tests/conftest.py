"""Small things to test with: a random CLIP of four blocks, a word-level tokenizer, tiny data sets."""

import contextlib
import os
import sys

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
if sys.platform == "linux":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # processes of one test meet on this machine, whatever its name
# Read when Triton is imported: the kernels for GPUs are tested without one, and by make test-gpu with one.
os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from patchsae import ArrayDataset, SparseAutoencoder
from patchsae.clip import Clip
from patchsae.config import load_profile
from patchsae.world.pretrain import build_tokenizer

SIDE, WIDTH, LAYER = 16, 12, -2  # pixels, model width and cut of the tiny model


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Sums over other numbers of threads round differently."""
    torch.set_num_threads(1)


def random_clip_model(seed=0, blocks=4, attention="eager", vocabulary=600):
    """A ``CLIPModel`` with random weights, large enough that no two tokens look alike."""
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_attention_heads": 3,
        "projection_dim": 8,
        "num_hidden_layers": blocks,
    }
    text = shape | {
        "vocab_size": vocabulary,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 3,
    }
    config = CLIPConfig(
        text_config=text,
        vision_config=shape | {"image_size": SIDE, "patch_size": 8},
        projection_dim=8,
        attn_implementation=attention,
    )
    torch.manual_seed(seed)
    model = CLIPModel(config)
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    torch.nn.init.constant_(model.logit_scale, 2.5)
    return model


def tiny_processor():
    """CLIP's preprocessing at the tiny model's size."""
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


@pytest.fixture(scope="session")
def clip():
    """A random CLIP: 4 blocks of width 12, 16-pixel images, 5 tokens."""
    tokenizer = build_tokenizer()
    return Clip(random_clip_model(vocabulary=len(tokenizer)), tokenizer, tiny_processor())


@pytest.fixture
def pixel_data():
    """23 preprocessed images of 5 classes."""
    numbers = torch.Generator().manual_seed(11)
    return ArrayDataset(torch.randn(23, 3, SIDE, SIDE, generator=numbers), np.arange(23) % 5)


@pytest.fixture
def image_data():
    """14 uint8 images of 3 classes."""
    images = np.random.default_rng(12).integers(0, 256, (14, SIDE, SIDE, 3), dtype=np.uint8)
    return ArrayDataset(images, np.arange(14) % 3, class_names=("cat", "dog", "pig"))


@pytest.fixture
def profile():
    """The mini profile with everything made tiny."""
    return load_profile("mini").with_sae(
        expansion=3,
        batch_images=4,
        steps=12,
        save_every=4,
        warmup=5,
        dead_after=2,
        l1=0.02,
        learning_rate=0.01,
    )


def random_sae(d_model=WIDTH, n_latents=20, seed=0, bias=0.0, dtype=None):
    """A sparse autoencoder none of whose parameters is special: no zero bias, no unit rows."""
    dtype = dtype or torch.get_default_dtype()
    numbers = np.random.default_rng(seed)
    sae = SparseAutoencoder(d_model, n_latents).to(dtype)
    values = {
        "W_enc": numbers.normal(size=(d_model, n_latents)) / d_model**0.5,
        "b_enc": numbers.normal(size=n_latents) * 0.3 + bias,
        "W_dec": numbers.normal(size=(n_latents, d_model)),
        "b_dec": numbers.normal(size=d_model) * 0.5,
    }
    with torch.no_grad():
        for name, value in values.items():
            getattr(sae, name).copy_(torch.from_numpy(value))
    return sae


def one_sentence(error: BaseException) -> bool:
    """What every error a user can cause must be: a sentence on one line."""
    text = str(error)
    return "\n" not in text and text.endswith(".") and len(text.split()) > 5


@contextlib.contextmanager
def refused(words: str | None = None, kind=(ValueError, OSError)):
    """What is done inside must end in an error of one sentence, in which these words are found."""
    with pytest.raises(kind, match=words) as error:
        yield error
    assert one_sentence(error.value), error.value


def picture(seed: int = 0, shape=(6, 5, 3)) -> np.ndarray:
    """A photograph of nothing: uint8 of a shape."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_picture(path, image: np.ndarray) -> None:
    """Write an image file, and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def damaged(content: bytes, numbers: np.random.Generator, cut: bool = False, flips: int = 1) -> bytes:
    """A file cut short somewhere, or with a few bits flipped."""
    if cut:
        return content[:int(numbers.integers(len(content)))]
    bad = bytearray(content)
    for place in numbers.integers(0, len(content), flips):
        bad[place] ^= 1 << int(numbers.integers(8))
    return bytes(bad)
