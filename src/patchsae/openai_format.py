"""CLIP weights as OpenAI, CoOp and MaPLe name them, turned into a ``transformers`` model.

There linear layers are stored transposed where they are bare matrices (``proj``, ``text_projection``), and queries,
keys and values are one matrix (``in_proj_weight``). Shapes say everything about the model but the number of attention
heads, which is one per 64 dimensions of width.
"""

import torch
from transformers import CLIPConfig, CLIPModel

#: Outside the blocks: name there -> name in transformers. Names ending in "proj" are transposed.
_NAMES = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_NORMS = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm",
          "ln_final": "text_model.final_layer_norm"}
_NAMES |= {f"{a}.{kind}": f"{b}.{kind}" for a, b in _NORMS.items() for kind in ("weight", "bias")}
_TOWERS = {"visual.transformer.resblocks.": "vision_model.encoder.layers.",
           "transformer.resblocks.": "text_model.encoder.layers."}
_PARTS = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
          "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


def to_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename and split the weights of a CLIP in OpenAI's format; float32. An unknown key is refused by its name."""
    found = {}
    for key, value in state.items():
        value = value.detach().float()
        if key in _NAMES:
            found[_NAMES[key]] = value.T if key in ("visual.proj", "text_projection") else value
        else:
            found |= _block_weights(key, value)
    return found


def _block_weights(key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """One weight of a transformer block; the three parts of ``in_proj`` are in the order query, key, value."""
    tower = next((name for name in _TOWERS if key.startswith(name)), None)
    index, _, part = key[len(tower):].partition(".") if tower else ("", "", "")
    name, _, kind = part.rpartition(".")
    if part in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = part.rpartition("_")[2]
        parts = zip("qkv", value.chunk(3))
        return {f"{_TOWERS[tower]}{index}.self_attn.{letter}_proj.{kind}": piece for letter, piece in parts}
    if name not in _PARTS or kind not in ("weight", "bias") or not index.isdigit():
        raise ValueError(f"The checkpoint has the unknown key {key}; give one in OpenAI's, CoOp's or MaPLe's format.")
    return {f"{_TOWERS[tower]}{index}.{_PARTS[name]}.{kind}": value}


def clip_model(state: dict[str, torch.Tensor]) -> CLIPModel:
    """The ``transformers.CLIPModel`` of weights in OpenAI's format, all of whose names and shapes must fit."""
    weights = to_transformers(state)
    if missing := sorted(set(_NAMES.values()) - set(weights)):
        name = next(a for a, b in _NAMES.items() if b == missing[0])
        raise ValueError(f"The checkpoint lacks the key {name}; fetch it again.")
    model = CLIPModel(_config(weights))
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items() if "position_ids" not in name}
    for name in sorted(wanted.keys() | weights.keys(), key=lambda key: (key in weights, key)):
        shape = tuple(weights[name].shape) if name in weights else "missing"
        if shape != wanted.get(name):
            raise ValueError(f"The checkpoint's weight {name} is {shape}, but the others ask for "
                             f"{wanted.get(name, 'none')}; fetch it again.")
    model.load_state_dict(weights, strict=False)
    return model.eval()


def _config(weights: dict[str, torch.Tensor]) -> CLIPConfig:
    """Read the model's shape off its weights."""
    patch = weights["vision_model.embeddings.patch_embedding.weight"]
    tokens = weights["vision_model.embeddings.position_embedding.weight"].shape[0]
    words = weights["text_model.embeddings.token_embedding.weight"]
    projection = weights["visual_projection.weight"].shape[0]

    def shape(tower: str, width: int) -> dict:
        layers = {name.split(".")[3] for name in weights if name.startswith(f"{tower}.encoder.layers.")}
        inner = weights.get(f"{tower}.encoder.layers.0.mlp.fc1.bias", torch.empty(4 * width)).shape[0]
        return {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": len(layers),
                "num_attention_heads": max(1, width // 64), "projection_dim": projection}

    vision = shape("vision_model", patch.shape[0]) | {
        "patch_size": patch.shape[-1], "image_size": patch.shape[-1] * round((tokens - 1) ** 0.5)}
    # The end token is the largest id of a prompt: what transformers does for 2, and OpenAI's code always.
    text = shape("text_model", words.shape[1]) | {
        "vocab_size": len(words), "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1,
        "max_position_embeddings": len(weights["text_model.embeddings.position_embedding.weight"])}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)
