"""MaPLe the slow way, from its description: OpenAI-style towers of plain tensors, 77 text tokens, nothing shared
with the package. Weights are a state dict with the names of official checkpoints."""

import math

import torch


def state_dict(depth=3, n=2, text_width=64, vision_width=128, blocks=4, text_blocks=4, patch=8, side=32, projection=24,
               words=100, classes=5, seed=0):
    """Random weights in the format of MultiModalPromptLearner's model.pth.tar, and the token embedding it lacks."""
    numbers = torch.Generator().manual_seed(seed)

    def random(*shape, scale=None):
        scale = 1 / math.sqrt(shape[-1]) if scale is None else scale
        return torch.randn(*shape, generator=numbers) * scale

    tokens = (side // patch) ** 2 + 1
    state = {"logit_scale": torch.tensor(3.0)}
    learner = {"ctx": random(n, text_width, scale=0.5), "token_prefix": random(classes, 1, text_width),
               "token_suffix": random(classes, 76 - n, text_width),
               "proj.weight": random(vision_width, text_width), "proj.bias": random(vision_width, scale=0.3)}
    for k in range(depth - 1):
        learner |= {f"compound_prompts_text.{k}": random(n, text_width, scale=0.5),
                    f"compound_prompt_projections.{k}.weight": random(vision_width, text_width),
                    f"compound_prompt_projections.{k}.bias": random(vision_width, scale=0.3)}
    state |= {f"prompt_learner.{k}": v for k, v in learner.items()}
    state |= {"image_encoder.class_embedding": random(vision_width, scale=0.3),
              "image_encoder.positional_embedding": random(tokens, vision_width, scale=0.3),
              "image_encoder.conv1.weight": random(vision_width, 3, patch, patch, scale=0.1),
              "image_encoder.proj": random(vision_width, projection, scale=0.2),
              "text_encoder.positional_embedding": random(77, text_width, scale=0.3),
              "text_encoder.text_projection": random(text_width, projection, scale=0.2)}
    for name, width in (("image_encoder.ln_pre", vision_width), ("image_encoder.ln_post", vision_width),
                        ("text_encoder.ln_final", text_width)):
        state |= {f"{name}.weight": 1 + random(width, scale=0.1), f"{name}.bias": random(width, scale=0.1)}
    for tower, width, count in (("image_encoder", vision_width, blocks), ("text_encoder", text_width, text_blocks)):
        for i in range(count):
            here = f"{tower}.transformer.resblocks.{i}."
            for part, shape in (("attn.in_proj_", (3 * width, width)), ("attn.out_proj.", (width, width)),
                                ("mlp.c_fc.", (4 * width, width)), ("mlp.c_proj.", (width, 4 * width))):
                state |= {f"{here}{part}weight": random(*shape), f"{here}{part}bias": random(shape[0], scale=0.1)}
            for norm in ("ln_1", "ln_2"):
                state |= {f"{here}{norm}.weight": 1 + random(width, scale=0.1),
                          f"{here}{norm}.bias": random(width, scale=0.1)}
    return state, random(words, text_width, scale=0.3)


def _norm(x, state, name):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def _block(x, state, name, causal):
    """One residual attention block, head by head."""
    width, normed = x.shape[-1], _norm(x, state, f"{name}.ln_1")
    q, k, v = (normed @ state[f"{name}.attn.in_proj_weight"].T + state[f"{name}.attn.in_proj_bias"]).split(width, -1)
    heads = []
    for h in range(width // 64):
        part = slice(64 * h, 64 * (h + 1))
        scores = q[..., part] @ k[..., part].transpose(-1, -2) / 8.0
        if causal:
            later = torch.ones(scores.shape[-2:]).triu(1).bool()
            scores = scores.masked_fill(later, float("-inf"))
        heads.append(scores.softmax(-1) @ v[..., part])
    mixed = torch.cat(heads, -1)
    x = x + mixed @ state[f"{name}.attn.out_proj.weight"].T + state[f"{name}.attn.out_proj.bias"]
    inner = _norm(x, state, f"{name}.ln_2") @ state[f"{name}.mlp.c_fc.weight"].T + state[f"{name}.mlp.c_fc.bias"]
    inner = inner * torch.sigmoid(1.702 * inner)
    return x + inner @ state[f"{name}.mlp.c_proj.weight"].T + state[f"{name}.mlp.c_proj.bias"]


def _depth(state):
    return 1 + sum("compound_prompts_text" in key for key in state)


def _count(state, tower):
    return len({key.split(".")[3] for key in state if key.startswith(f"{tower}.transformer.resblocks.")})


def image_states(state, pixels):
    """The residual stream after every block ``[blocks][B,T+n,D]``, one image at a time, and the embedding ``[B,P]``."""
    learner = {k[15:]: v for k, v in state.items() if k.startswith("prompt_learner.")}
    all_states, embeddings = [], []
    for image in pixels:
        conv = torch.nn.functional.conv2d(image[None], state["image_encoder.conv1.weight"],
                                          stride=state["image_encoder.conv1.weight"].shape[-1])
        x = torch.cat([state["image_encoder.class_embedding"][None], conv[0].flatten(1).T])
        x = x + state["image_encoder.positional_embedding"]
        x = torch.cat([x, learner["ctx"] @ learner["proj.weight"].T + learner["proj.bias"]])
        x, states = _norm(x, state, "image_encoder.ln_pre"), []
        n = len(learner["ctx"])
        for i in range(_count(state, "image_encoder")):
            if 1 <= i < _depth(state):
                deep = learner[f"compound_prompts_text.{i - 1}"]
                new = (deep @ learner[f"compound_prompt_projections.{i - 1}.weight"].T
                       + learner[f"compound_prompt_projections.{i - 1}.bias"])
                x = torch.cat([x[:-n], new])
            x = _block(x[None], state, f"image_encoder.transformer.resblocks.{i}", causal=False)[0]
            states.append(x)
        all_states.append(states)
        embeddings.append(_norm(x[0], state, "image_encoder.ln_post") @ state["image_encoder.proj"])
    return [torch.stack(level) for level in zip(*all_states)], torch.stack(embeddings)


def text_embeddings(state, table, token_ids):
    """Unit text embeddings ``[C,P]`` of 77-token prompts, one class at a time, nothing cut off."""
    learner = {k[15:]: v for k, v in state.items() if k.startswith("prompt_learner.")}
    n, found = len(learner["ctx"]), []
    for ids in token_ids:
        words = table[ids]
        x = torch.cat([words[:1], learner["ctx"], words[1 + n:]]) + state["text_encoder.positional_embedding"]
        for i in range(_count(state, "text_encoder")):
            if 1 <= i < _depth(state):
                x = torch.cat([x[:1], learner[f"compound_prompts_text.{i - 1}"], x[1 + n:]])
            x = _block(x[None], state, f"text_encoder.transformer.resblocks.{i}", causal=True)[0]
        end = _norm(x[ids.argmax()], state, "text_encoder.ln_final") @ state["text_encoder.text_projection"]
        found.append(end / end.norm())
    return torch.stack(found)
