"""CLIP weights in OpenAI's own layout: a state dict, or the scripted model that OpenAI publishes."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from patchsae.weights.files import load_tensors
from patchsae.weights.foreign import Record, read_foreign

#: Parts of a block: OpenAI's name -> transformers' name. Attention is one matrix there and three here.
BLOCK = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1",
         "mlp.c_proj": "mlp.fc2"}
#: Single tensors: OpenAI's name -> (transformers' name, whether it is transposed).
TOWERS = {
    "visual.conv1.weight": ("vision_model.embeddings.patch_embedding.weight", False),
    "visual.class_embedding": ("vision_model.embeddings.class_embedding", False),
    "visual.positional_embedding": ("vision_model.embeddings.position_embedding.weight", False),
    "visual.ln_pre.weight": ("vision_model.pre_layrnorm.weight", False),
    "visual.ln_pre.bias": ("vision_model.pre_layrnorm.bias", False),
    "visual.ln_post.weight": ("vision_model.post_layernorm.weight", False),
    "visual.ln_post.bias": ("vision_model.post_layernorm.bias", False),
    "visual.proj": ("visual_projection.weight", True),
    "token_embedding.weight": ("text_model.embeddings.token_embedding.weight", False),
    "positional_embedding": ("text_model.embeddings.position_embedding.weight", False),
    "ln_final.weight": ("text_model.final_layer_norm.weight", False),
    "ln_final.bias": ("text_model.final_layer_norm.bias", False),
    "text_projection": ("text_projection.weight", True),
    "logit_scale": ("logit_scale", False)}
#: Numbers that stand among the tensors and follow from their shapes.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")


def read_openai(path: str | Path) -> CLIPModel:
    """A CLIP vision transformer from a file in OpenAI's layout, in float32."""
    path = Path(path)
    content = load_tensors(path) if path.suffix == ".safetensors" else read_foreign(path)
    return clip_model({k: v for k, v in flat(content.get("state_dict", content)).items() if k not in NOT_WEIGHTS}, path)


def clip_model(tensors: dict[str, torch.Tensor], path: str | Path) -> CLIPModel:
    """The CLIP that tensors in OpenAI's layout make, every one of which is needed and has a place; ``path``: whence."""
    if missing := [name for name in TOWERS if name not in tensors]:
        raise ValueError(f"{path} lacks {missing[0]}, so it is not a CLIP vision transformer in OpenAI's layout; give "
                         "such a file, or a folder in the layout of transformers.")
    try:
        model = CLIPModel(shape_of(tensors))
        model.load_state_dict(renamed(tensors))
    except (RuntimeError, ValueError, KeyError, IndexError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ValueError(f"{path} has weights that do not make a CLIP ({reason}); fetch it again.") from error
    return model


def flat(content: dict, before: str = "") -> dict[str, torch.Tensor]:
    """The tensors of nested records by their dotted names, as a state dict has them."""
    found = {}
    for name, value in content.items():
        if torch.is_tensor(value):
            found[f"{before}{name}"] = value
        elif isinstance(value, Record):
            found |= flat(value, f"{before}{name}.")
    return found


def shape_of(tensors: dict[str, torch.Tensor]) -> CLIPConfig:
    """The configuration that tensors in OpenAI's layout imply; heads are of width 64, as in all it published."""
    def tower(width: int, before: str) -> dict:
        blocks = {name.removeprefix(before).split(".")[0] for name in tensors if name.startswith(before)}
        wide = tensors[f"{before}0.mlp.c_fc.weight"].shape[0]
        return {"hidden_size": width, "intermediate_size": wide, "num_hidden_layers": len(blocks),
                "num_attention_heads": max(1, width // 64), "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}

    width, _, _, patch = tensors["visual.conv1.weight"].shape
    grid = round((len(tensors["visual.positional_embedding"]) - 1) ** 0.5)
    vision = tower(width, "visual.transformer.resblocks.") | {"patch_size": patch, "image_size": patch * grid}
    words, text_width = tensors["token_embedding.weight"].shape
    # An end token of 2 makes transformers read the embedding where the id is largest, as OpenAI's code does.
    text = tower(text_width, "transformer.resblocks.") | {
        "vocab_size": words, "max_position_embeddings": len(tensors["positional_embedding"]), "eos_token_id": 2,
        "bos_token_id": 0, "pad_token_id": 1}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=tensors["text_projection"].shape[1])


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of a ``CLIPModel``, float32: every tensor has a place, and every place a tensor."""
    found = {}
    for name, tensor in tensors.items():
        tensor, (side, block, rest) = tensor.float(), _block(name)
        if block is None:
            place, transposed = TOWERS[name]
            found[place] = tensor.T.contiguous() if transposed else tensor
        elif rest.startswith("attn.in_proj_"):
            for part, own in zip("qkv", tensor.chunk(3)):
                found[f"{side}.encoder.layers.{block}.self_attn.{part}_proj.{rest.removeprefix('attn.in_proj_')}"] = own
        else:
            part, kind = rest.rsplit(".", 1)
            found[f"{side}.encoder.layers.{block}.{BLOCK[part]}.{kind}"] = tensor
    return found


def _block(name: str) -> tuple:
    """Tower, number of the block, and the name inside it; no number outside the blocks."""
    for before, side in (("visual.transformer.resblocks.", "vision_model"), ("transformer.resblocks.", "text_model")):
        if name.startswith(before):
            block, rest = name.removeprefix(before).split(".", 1)
            return side, block, rest
    return None, None, name
