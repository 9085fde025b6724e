"""MaPLe (Khattak et al., CVPR 2023): prompts in both towers of a CLIP, learned from a few images per class.

The towers are those of ``clip``. ``J`` blocks of each get prompt tokens of their own: in the text tower they take the
place of the first words ("a photo" of "a photo of a cat."), in the image tower they follow the patches and are linear
functions of the text prompts. Without the image side and with one block this is CoOp.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from patchsae.clip import Clip
from patchsae.data.checks import BatchTokens, Natural, Pixels, Seed, Template, TokenIds, Whole, Words, guard
from patchsae.weights.files import save_json, save_tensors, tensor_hash

#: What every class is called, whatever the data set; learned tokens replace its first words.
TEMPLATE = "a photo of a {}."
#: Its words in front of the name.
WORDS = 4


class Prompts(nn.Module):
    """The learned tokens; names of parameters are those of official checkpoints.

    ``ctx [n,D_text]`` enters the first text block, ``compound_prompts_text[k] [n,D_text]`` the text block ``k + 1``;
    ``proj`` and ``compound_prompt_projections[k]`` (linear, ``D_text -> D_vision``) make the image prompts of the
    same blocks from them. ``vision_width=None``: text prompts only.
    """

    def __init__(self, n: Natural, depth: Natural, text_width: Natural, vision_width: Natural | None):
        super().__init__()
        self.n, self.depth, self.vision = n, depth, vision_width is not None
        self.ctx = nn.Parameter(torch.empty(n, text_width))
        self.compound_prompts_text = nn.ParameterList(torch.empty(n, text_width) for _ in range(depth - 1))
        if self.vision:
            self.proj = nn.Linear(text_width, vision_width)
            self.compound_prompt_projections = nn.ModuleList(
                nn.Linear(text_width, vision_width) for _ in range(depth - 1))

    @torch.no_grad()
    def initialise(self, first_words: Annotated[torch.Tensor, "n,W"], seed: Seed) -> "Prompts":
        """Start as published: ``ctx`` from the embeddings ``[n,D_text]`` of the first words, deep prompts normal
        with deviation 0.02, projections uniform and all of one depth alike."""
        if first_words.shape != self.ctx.shape:
            raise ValueError(f"The first words have the shape {list(first_words.shape)}; give {list(self.ctx.shape)}.")
        generator = torch.Generator().manual_seed(seed)
        self.ctx.copy_(first_words)
        for prompt in self.compound_prompts_text:
            prompt.copy_(0.02 * torch.randn(prompt.shape, generator=generator))
        if self.vision:
            deep = self.compound_prompt_projections
            for layers in ([self.proj], deep):
                start = [(2 * torch.rand(p.shape, generator=generator) - 1) / self.ctx.shape[1] ** 0.5
                         for p in self.proj.parameters()]
                for layer in layers:
                    for parameter, value in zip(layer.parameters(), start):
                        parameter.copy_(value)
        return self

    def text(self, block: Whole) -> torch.Tensor | None:
        """Tokens that enter a block of the text tower: ``[n,D_text]``; None where earlier ones are carried on."""
        if block >= self.depth:
            return None
        return self.ctx if block == 0 else self.compound_prompts_text[block - 1]

    def image(self, block: Whole) -> torch.Tensor | None:
        """Tokens that enter a block of the image tower: ``[n,D_vision]``, or None."""
        if not self.vision or block >= self.depth:
            return None
        project = self.proj if block == 0 else self.compound_prompt_projections[block - 1]
        return project(self.text(block))


class MaPLe(Clip):
    """A CLIP with prompts. ``below`` and ``above`` as everywhere, the n prompt tokens being the last ones of ``z``.

    ``clip``: whose weights are used, as they are; ``token_ids [C,L]``: the tokenised prompts of the classes, start
    token first, then at least ``n`` words in front of the class name. ``prompts=None`` is the plain CLIP.
    ``template``: how other classes are called, by default as published.
    """

    def __init__(self, clip: Clip, prompts: Prompts | None, token_ids: TokenIds, template: Template | None = None):
        super().__init__(clip.model, clip.tokenizer, clip.processor)
        blocks = min(len(self.blocks), len(self.model.text_model.encoder.layers))
        if prompts is not None and not 1 <= prompts.depth <= blocks:
            raise ValueError(f"Prompts of depth {prompts.depth} do not fit a CLIP whose towers share {blocks} blocks; "
                             f"choose 1 to {blocks}.")
        self.prompts = None if prompts is None else prompts.to(self.device)
        self.token_ids = token_ids.to(self.device)
        self.template = template or template_of(0 if prompts is None else prompts.n)

    # Image side -----------------------------------------------------------------------------------------

    def embed(self, pixels: Pixels) -> torch.Tensor:
        """``[B,3,H,W] -> [B,T+n,D]``: prompts get no position, but pass the first LayerNorm with the patches."""
        tower = self.model.vision_model
        z = tower.embeddings(pixels)
        return tower.pre_layrnorm(torch.cat([z, self._image_prompts(z, 0)], 1))

    def before_block(self, z: BatchTokens, i: Whole) -> torch.Tensor:
        """Put the block's own prompts in the place of those the block before has made."""
        if i == 0 or self.prompts is None or self.prompts.image(i) is None:
            return z
        return torch.cat([z[:, :self.n_tokens], self._image_prompts(z, i)], 1)

    def _image_prompts(self, z: torch.Tensor, i: int) -> torch.Tensor:
        """The image prompts of a block, for every image: ``[B,n,D]``, or ``[B,0,D]`` without any."""
        prompts = None if self.prompts is None else self.prompts.image(i)
        return z[:, :0] if prompts is None else prompts.expand(len(z), -1, -1)

    # Text side ------------------------------------------------------------------------------------------

    def text_features(self, prompts: Words | None = None, batch: Natural = 256) -> torch.Tensor:
        """Unit-length text embeddings of the classes ``[C,P]``, or of other prompts of the same form ``[N,P]``."""
        ids = self.token_ids if prompts is None else self.tokenise(prompts)["input_ids"]
        with torch.no_grad():
            return torch.cat([self.text(some) for some in ids.split(batch)])

    def text(self, ids: TokenIds) -> torch.Tensor:
        """Unit-length embeddings of tokenised prompts ``[N,L] -> [N,P]``, with gradients.

        Attention is causal, so what follows the last end token changes nothing and is cut off.
        """
        tower, ends = self.model.text_model, self._ends(ids)
        if self.prompts is not None and self.prompts.n >= int(ends.min()):
            raise ValueError(f"{self.prompts.n} learned tokens do not fit in front of the end of a prompt of "
                             f"{int(ends.min()) + 1} tokens; use longer prompts or fewer tokens.")
        ids = ids[:, :int(ends.max()) + 1]
        x = self._with_words(tower.embeddings.token_embedding(ids), 0)
        x = x + tower.embeddings.position_embedding.weight[:ids.shape[1]]
        future = torch.full((ids.shape[1],) * 2, float("-inf"), device=x.device, dtype=x.dtype).triu(1)
        for i, block in enumerate(tower.encoder.layers):
            x = block(self._with_words(x, i) if i else x, future.expand(1, 1, -1, -1))
        last = tower.final_layer_norm(x)[torch.arange(len(x), device=x.device), ends]
        return F.normalize(self.model.text_projection(last), dim=-1)

    def _with_words(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """Put a block's text prompts behind the start token of ``[N,L,D]``."""
        words = None if self.prompts is None else self.prompts.text(i)
        if words is None:
            return x
        return torch.cat([x[:, :1], words.to(x.dtype).expand(len(x), -1, -1), x[:, 1 + len(words):]], 1)

    def _ends(self, ids: torch.Tensor) -> torch.Tensor:
        """Position of the first end token: the largest id, or the one that the configuration names."""
        end = self.model.config.text_config.eos_token_id
        return ids.argmax(1) if end == 2 else (ids == end).int().argmax(1)

    # Whole ----------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Hash of CLIP's weights and the prompts."""
        learned = {} if self.prompts is None else self.prompts.state_dict()
        return tensor_hash(self.model.state_dict() | {f"prompts.{name}": value for name, value in learned.items()})

    def without_prompts(self) -> "MaPLe":
        """The same towers with the prompts switched off: the plain CLIP, by the same code."""
        return MaPLe(self, None, self.token_ids)

    def for_classes(self, class_names: Words) -> "MaPLe":
        """The same prompts with the names of other classes."""
        return MaPLe(self, self.prompts, class_tokens(self, class_names, self.template), self.template)

    def save(self, folder: Path) -> None:
        """Write ``prompts.json`` and then ``prompts.safetensors``: the prompts alone, not CLIP."""
        p = self.prompts
        other = {} if self.template == template_of(p.n) else {"template": self.template}
        save_json(Path(folder) / "prompts.json", {"n": p.n, "depth": p.depth, "vision": p.vision} | other)
        save_tensors(Path(folder) / "prompts.safetensors", p.state_dict())

    @classmethod
    def load(cls, folder: Path, clip: Clip, class_names: Words) -> "MaPLe":
        """Read what ``save`` wrote and put it on a CLIP of the same widths."""
        from patchsae.weights.maple import read_prompts  # which makes objects of these classes

        prompts, template = read_prompts(Path(folder), clip)
        return cls(clip, prompts, class_tokens(clip, class_names, template), template)

    @classmethod
    def from_official(cls, checkpoint: str | Path | dict,
                      token_embedding: torch.Tensor | np.ndarray | nn.Module | None = None,
                      token_ids: TokenIds | None = None, class_names: Words | None = None, clip: Clip | None = None,
                      depth: Natural | None = None) -> "MaPLe":
        """Read a checkpoint of the published code (``MultiModalPromptLearner/model.pth.tar-N``, or its state dict).

        It holds a whole CLIP in half precision but for the token embedding ``[V,D_text]``, which has to be given.
        ``token_ids [C,L]``: tokenised prompts, "a photo of a <class>." if it was trained with these words; with
        ``clip`` instead, its own weights, token embedding and tokenizer are used, and ``class_names`` will do, for the
        checkpoint tells which words it was trained with. ``depth``: refuse any other one.
        """
        from patchsae.weights.maple import read_official

        return read_official(checkpoint, token_embedding, token_ids, class_names, clip, depth)


def template_of(n: Whole) -> str:
    """How classes are called, as published: placeholders where more tokens are learned than the template has words."""
    return TEMPLATE if n <= WORDS else "X " * n + "{}."


def class_tokens(clip: Clip, class_names: Words, template: Template = TEMPLATE) -> torch.Tensor:
    """Token ids of the prompts of classes: ``[C,L]``."""
    return clip.tokenise([template.format(name.replace("_", " ")) for name in class_names])["input_ids"]


def new_maple(clip: Clip, class_names: Words, n: Natural, depth: Natural, vision: bool, seed: Seed) -> MaPLe:
    """Untrained prompts on a CLIP: where training starts, and a control for what it does."""
    ids = class_tokens(clip, class_names, template_of(n))
    first_words = clip.model.text_model.embeddings.token_embedding(ids[0, 1:1 + n])
    return MaPLe(clip, empty_prompts(clip, n, depth, vision).initialise(first_words, seed), ids)


def empty_prompts(clip: Clip, n: Natural, depth: Natural, vision: bool) -> Prompts:
    """Prompts of the widths of a CLIP, not yet filled."""
    text_width = clip.model.config.text_config.hidden_size
    return Prompts(n, depth, text_width, clip.width if vision else None)


guard(globals())
