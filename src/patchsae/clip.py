"""CLIP, cut once.

An image tower is split after one block into ``below(pixels) -> z`` and ``above(z) -> embedding``. Everything
else in this package reads or edits ``z``; nothing uses hooks, and nothing below the cut runs twice.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel

from patchsae.config import ROOT, resolve
from patchsae.data import checks
from patchsae.data.images import Crop, hash_of, rgb
from patchsae.weights.clips import read_clip
from patchsae.weights.files import tensor_hash
from patchsae.weights.hub import model_folder
from patchsae.weights.processors import grey_levels, read_processor, read_tokenizer


class Clip:
    """A CLIP whose image tower is cut at a block.

    ``model``: a ``transformers.CLIPModel``; ``tokenizer`` and ``processor`` may be absent, ``below`` and
    ``above`` work without them.
    """

    #: What a tower of another kind must have to stand for one.
    needs = ("below", "above", "n_tokens", "width")

    def __init__(self, model: CLIPModel, tokenizer=None, processor=None):
        self.model, self.tokenizer, self.processor = model.eval().requires_grad_(False), tokenizer, processor
        vision = model.config.vision_config
        self.blocks, self.width = model.vision_model.encoder.layers, vision.hidden_size
        self.image_size, self.grid = vision.image_size, vision.image_size // vision.patch_size
        self.n_tokens, self.crop = self.grid**2 + 1, Crop(vision.image_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def logit_scale(self) -> torch.Tensor:
        """exp of the learned temperature, a scalar."""
        return self.model.logit_scale.exp()

    def block(self, layer: checks.Layer) -> int:
        """The 0-based block a layer stands for; negative layers count from the end."""
        n = len(self.blocks)
        if not -n <= layer < n:
            raise ValueError(f"Layer {layer} is not one of the {n} blocks of this model; choose {-n} to {n - 1}.")
        return layer % n

    def below(self, pixels: checks.Pixels, layer: checks.Layer) -> torch.Tensor:
        """Residual stream after block ``layer``: ``[B,3,H,W] -> [B,T,D]``, the class token first (sec. 3.1)."""
        z = self._through(self.embed(pixels.to(self.device)), 0, self.block(layer) + 1)
        assert z.ndim == 3 and z.shape[1] >= self.n_tokens, "a block returned something else than tokens"
        return z

    def between(self, z: checks.BatchTokens, layer: checks.Layer, later: checks.Layer) -> torch.Tensor:
        """Residual stream after block ``later`` from that after block ``layer``: ``[B,T,D] -> [B,T,D]``. What is looked
        at after several blocks is computed once: ``between(below(x, i), i, j)`` is ``below(x, j)``, bit for bit."""
        if self.block(later) < self.block(layer):
            raise ValueError(f"Layer {later} comes before layer {layer}; give the earlier one first.")
        return self._through(z, self.block(layer) + 1, self.block(later) + 1)

    def above(self, z: checks.BatchTokens, layer: checks.Layer) -> torch.Tensor:
        """Finish the forward pass: ``[B,T,D] -> [B,P]``, not normalised. ``above(below(x)) == model(x)``.

        Only the class token is read at the end, so the last block is computed for its query alone.
        """
        last = len(self.blocks) - 1
        z = self._through(z, self.block(layer) + 1, last)
        cut_at_end = self.block(layer) == last
        class_token = z[:, 0] if cut_at_end else _class_token(self.blocks[last], self.before_block(z, last))
        return self.model.visual_projection(self.model.vision_model.post_layernorm(class_token))

    def _through(self, z: torch.Tensor, first: int, end: int) -> torch.Tensor:
        for i in range(first, end):
            z = self.blocks[i](self.before_block(z, i), None)
        return z

    def embed(self, pixels: checks.Pixels) -> torch.Tensor:
        """What enters the first block: ``[B,3,H,W] -> [B,T,D]``. An adapted tower appends its prompt tokens here."""
        tower = self.model.vision_model
        return tower.pre_layrnorm(tower.embeddings(pixels))

    def before_block(self, z: checks.BatchTokens, i: checks.Whole) -> torch.Tensor:
        """What block ``i`` reads of ``z [B,T,D]``: all of it. An adapted tower renews its prompt tokens here."""
        return z

    def pixels(self, images: Image.Image | np.ndarray | torch.Tensor | Sequence) -> torch.Tensor:
        """Preprocess a uint8 image ``[H,W,3]`` (array, tensor or Pillow image) or several to ``[B,3,H,W]``."""
        single = isinstance(images, Image.Image) or getattr(images, "ndim", 0) == 3
        arrays = [rgb(image) if isinstance(image, Image.Image) else np.asarray(image)
                  for image in ([images] if single else images)]
        if not arrays:
            raise ValueError("There are no images; give at least one.")
        if wrong := [a for a in arrays if a.dtype != np.uint8 or a.ndim != 3 or a.shape[-1] != 3 or 0 in a.shape]:
            raise ValueError(f"An image is {wrong[0].dtype} of shape {list(wrong[0].shape)}; give uint8 [H, W, 3].")
        return self.normalise(torch.from_numpy(np.stack([self.crop(array) for array in arrays])))

    def normalise(self, crops: Annotated[torch.Tensor, "uint8 B,H,H,3"]) -> torch.Tensor:
        """Cropped uint8 images ``[B,S,S,3]``, on any device, to pixels ``[B,3,S,S]`` of CLIP's mean and deviation."""
        if self.processor is None:
            raise ValueError("This CLIP has no image processor; load it from a folder with preprocessor_config.json.")
        table = self._levels.to(crops.device)
        return torch.stack([table[channel][crops[..., channel].int()] for channel in range(3)], dim=1)

    @functools.cached_property
    def _levels(self) -> torch.Tensor:
        """What the processor makes of every grey level, ``[3,256]``: looked up, its floats are had bit for bit."""
        return grey_levels(self.processor, self.image_size)

    @torch.no_grad()
    def text_features(self, prompts: checks.Words, batch: checks.Natural = 256) -> torch.Tensor:
        """Unit-length text embeddings: ``list[str] -> [N,P]``."""
        batches = [self.tokenise(prompts[i:i + batch]) for i in range(0, len(prompts), batch)]
        features = [self.model.get_text_features(b["input_ids"], b["attention_mask"]).pooler_output for b in batches]
        return F.normalize(torch.cat(features), dim=-1)

    def tokenise(self, prompts: checks.Words) -> dict[str, torch.Tensor]:
        """Token ids and attention mask of prompts, each ``[N,L]``."""
        if self.tokenizer is None:
            raise ValueError("This CLIP has no tokenizer, so it has no text features; add one to its folder.")
        return self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(self.device)

    def logits(self, embeddings: checks.Embeddings, text: checks.Texts) -> torch.Tensor:
        """Cosine times temperature: ``[B,P], [N,P] -> [B,N]``."""
        return self.logit_scale * F.normalize(embeddings, dim=-1) @ text.T

    def fingerprint(self) -> str:
        """Hash of all weights."""
        return tensor_hash(self.model.state_dict())

    def preprocessing(self) -> str:
        """Hash of what happens to an image before the first block: its crop, and what becomes of every grey level."""
        levels = [] if self.processor is None else self._levels.flatten().tolist()
        return hash_of([self.crop.size, int(self.crop.resample), levels])


def _class_token(block, z: torch.Tensor) -> torch.Tensor:
    """A transformer block for the first token only: ``[B,T,D] -> [B,D]``; keys and values of all tokens."""
    attention = block.self_attn
    normed = block.layer_norm1(z)

    def heads(x):
        return x.view(*x.shape[:2], attention.num_heads, -1).transpose(1, 2)

    query, key, value = attention.q_proj(normed[:, :1]), attention.k_proj(normed), attention.v_proj(normed)
    mixed = F.scaled_dot_product_attention(heads(query), heads(key), heads(value), scale=attention.scale)
    first = z[:, 0] + attention.out_proj(mixed.transpose(1, 2).flatten(2))[:, 0]
    return first + block.mlp(block.layer_norm2(first))


def load_clip(name_or_path: str | Path | CLIPModel, device: checks.Device = "cpu",
              revision: str | None = None) -> Clip:
    """Load a CLIP from a local folder or file (as given, or else inside the project's folder) or from the hub.

    On the hub a revision may follow the name, ``"owner/name@revision"``. A folder without a tokenizer or preprocessor
    still gives ``below`` and ``above``. A file is one in OpenAI's layout; its tokenizer is looked for beside it. A
    ``CLIPModel`` is used itself, in float32 and without gradients, and has neither tokenizer nor preprocessor.
    """
    if isinstance(name_or_path, CLIPModel):
        model = name_or_path.to(device, torch.float32)
        if bad := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
            raise ValueError(f"The given CLIPModel has values that are not finite in {bad[0]}; load it again.")
        return Clip(model)
    path = _source(name_or_path, revision)
    model = read_clip(path)
    tokenizer = read_tokenizer(path, model.config.text_config.vocab_size)
    return Clip(model.to(device), tokenizer, read_processor(path, model.config.vision_config.image_size))


def _source(name_or_path: str | Path, revision: str | None) -> Path:
    """Where a name leads: a local file or folder, as given or else in the project's folder, or a folder of the hub."""
    if (path := resolve(name_or_path)).exists():
        return path
    name, _, pinned = str(name_or_path).partition("@")
    try:
        return model_folder(name, pinned or revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no CLIP called {name_or_path}: it is neither in {Path.cwd()} nor in {ROOT}, "
                                "and the hub does not give it; check the name, and for the hub the network.") from error


def class_prototypes(clip: Clip, class_names: checks.Words, templates: checks.Templates,
                     renormalise: bool = True) -> torch.Tensor:
    """Mean of the unit text embeddings of every template, per class: ``[C,P]`` (sec. 4.1).

    ``renormalise=False`` keeps the published code's mean as it is; shorter means then weigh less, which can
    change the predicted class.
    """
    prompts = [template.format(name) for name in class_names for template in templates]
    mean = clip.text_features(prompts).view(len(class_names), len(templates), -1).mean(1)
    return F.normalize(mean, dim=-1) if renormalise else mean


def contrastive_loss(images: Annotated[torch.Tensor, "B,P"], texts: Annotated[torch.Tensor, "B,P"],
                     groups: Annotated[torch.Tensor, "int B"], scale: float | torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric loss of ``[B,P]`` unit images and texts; pairs of the same group are positives as well."""
    target = (groups[:, None] == groups[None]).float()
    target = target / target.sum(1, keepdim=True)
    logits = scale * images @ texts.T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


checks.guard(globals())
