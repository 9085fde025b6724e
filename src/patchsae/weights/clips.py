"""CLIP weights: a folder in the layout of transformers, or a file in OpenAI's own, a state dict or a scripted model."""

import re
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from patchsae.weights.files import checked_weights, first_line, load_json, model_files
from patchsae.weights.foreign import read_state_dict

#: OpenAI's names -> those of transformers, outside the blocks and, without the tower and the number, in them.
TOWERS = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight", "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias", "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight", "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight", "logit_scale": "logit_scale"}
BLOCK = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1",
         "mlp.c_proj": "mlp.fc2"}
#: What transformers has as layers without bias, turned.
TURNED = ("visual.proj", "text_projection")
#: Names in a block: its tower and number, and what is in it; attention is one matrix there and three in transformers.
IN_A_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.([^.]*)\.(?:attn\.in_proj_(weight|bias)|(.+)\.(\w+))")
#: Numbers that stand among the tensors and follow from their shapes.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")


def read_clip(path: Path) -> CLIPModel:
    """A CLIP vision transformer in float32, from a folder (``config.json`` and files of weights) or OpenAI's file."""
    if path.is_file():
        tensors = read_state_dict(path)
        return openai_clip({name: tensor for name, tensor in tensors.items() if name not in NOT_WEIGHTS}, path)
    settings, files = path / "config.json", model_files(path)
    if not settings.is_file() or not files:
        lacking = "files of weights" if settings.is_file() else settings.name
        raise FileNotFoundError(f"There is no CLIP in {path}, which has no {lacking}; fetch it with all of its files.")
    content = load_json(settings)
    if content.get("model_type", "clip") != "clip":
        raise ValueError(f"{path} holds a model of the type {content['model_type']!r}; give a CLIP.")
    try:
        config = CLIPConfig.from_dict(content)
    except Exception as error:  # there is no end to what may be wrong in a configuration
        raise ValueError(f"{settings} is damaged ({first_line(error)}); fetch it again.") from error
    return build_clip(config, {name: tensor for file in files for name, tensor in read_state_dict(file).items()}, path)


def openai_clip(tensors: dict[str, torch.Tensor], where: str | Path) -> CLIPModel:
    """The CLIP that tensors in OpenAI's layout make; ``where`` they are from."""
    if missing := [name for name in TOWERS if name not in tensors]:
        raise ValueError(f"{where} lacks {missing[0]}, so it is not a CLIP vision transformer in OpenAI's layout; give "
                         "such a file, or a folder in the layout of transformers.")
    try:
        config = shape_of(tensors)
    except (RuntimeError, ValueError, KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{where} has shapes that make no CLIP ({first_line(error)}); fetch it again.") from error
    return build_clip(config, renamed(tensors, where), where)


def build_clip(config: CLIPConfig, tensors: dict[str, torch.Tensor], where: str | Path) -> CLIPModel:
    """The model of a configuration, in float32: every tensor has a place, every place a tensor, and all are numbers."""
    try:
        with torch.device("meta"):
            shapes = {name: list(place.shape) for name, place in CLIPModel(config).state_dict().items()}
    except Exception as error:  # there is no end to what may be wrong in a configuration
        raise ValueError(f"{where} is configured as no CLIP can be ({first_line(error)}); fetch it again.") from error
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}
    if wrong := sorted(shapes.keys() ^ tensors.keys()):
        said = "lacks the weight" if wrong[0] in shapes else "is configured without a place for its weight"
        raise ValueError(f"{where} {said} {wrong[0]}; fetch it again.")
    return CLIPModel.from_pretrained(None, config=config, state_dict=checked_weights(tensors, shapes, where),
                                     dtype=torch.float32)


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


def renamed(tensors: dict[str, torch.Tensor], where: str | Path) -> dict[str, torch.Tensor]:
    """The same tensors under the names of a ``CLIPModel``; a name that OpenAI's layout does not have is refused."""
    places = {}
    for name, tensor in tensors.items():
        match = IN_A_BLOCK.fullmatch(name)
        visual, number, joined, part, kind = match.groups() if match else (None,) * 5
        block = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}."
        if name in TOWERS:
            places[TOWERS[name]] = tensor.movedim(0, -1) if name in TURNED else tensor
        elif joined:
            thirds = zip("qkv", torch.atleast_1d(tensor).chunk(3))
            places |= {f"{block}self_attn.{letter}_proj.{joined}": third for letter, third in thirds}
        elif part in BLOCK:
            places[f"{block}{BLOCK[part]}.{kind}"] = tensor
        else:
            raise ValueError(f"{where} has {name}, which is in no CLIP of OpenAI's layout; give the file of one.")
    return places
