"""Train the mini CLIP from scratch on captioned pictogram scenes: ``make mini-clip``.

In the warm-up linear heads on the vision tower name what an image and each of its patches show; photos of one object
come first, then everything. Then the heads are dropped and three contrasts share one text tower and one temperature:

* image against caption, as CLIP; captions name each attribute with probability 0.35 only, so that the noun has to
  matter, and equal captions count as positives of each other;
* class token against short phrases ("a photo of a cat", "a red object", "on grass", ...);
* patch token against the phrases of what its patch shows, at the last block and at the cut. Without it patch tokens
  hold little of the object they belong to.

The sparse autoencoder sees none of these labels, but the model it is trained on did: ``data/README.md`` says so.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tqdm.auto import trange
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from patchsae.clip import contrastive_loss, load_clip
from patchsae.data.datasets import TEMPLATES
from patchsae.world.probes import image_labels, patch_labels, probe_table, zero_shot_table
from patchsae.world.scenes import CLASS_NAMES, CONCEPTS, KINDS, NAMES, PATCH, SIZE, WORLD, caption, draw_scene

SEED, POOL, BATCH, LEARNING_RATE = 2, 49_152, 128, 1.5e-3
WARM_UP_STEPS, EASY_SHARE, STEPS = 2_000, 0.6, 3_000
KEEP, CUT = 0.35, -2
#: Nouns are the hard kind; the others are learned in a few hundred steps and need little weight.
WEIGHTS = {"noun": 1.0, "colour": 0.25, "texture": 0.25, "background": 0.25, "style": 0.25, "text": 0.25}
#: How the phrases of each kind are worded; nouns take a random template of the 80-template ensemble as well.
PHRASES = {"noun": "a photo of a {}.", "colour": "a {} object.", "texture": "a {} object.", "background": "on {}.",
           "style": "a {}.", "text": "the word {}."}
#: Concepts that pre-training shows; the others of their kind are kept for the tasks.
SEEN = CONCEPTS | {"texture": tuple(NAMES["textures"]), "background": tuple(NAMES["backgrounds"])}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over every word of the captions, the class names and the prompt templates."""
    texts = [name for names in (*CLASS_NAMES.values(), *CONCEPTS.values()) for name in names]
    texts += [task["template"] for task in WORLD["tasks"].values()] + list(PHRASES.values())
    texts += TEMPLATES["imagenet_ensemble_80"] + TEMPLATES["imagenet_ensemble_7"]
    texts += list(TEMPLATES["dataset_templates"].values())
    texts += [*WORLD["nouns"], "a photo of a scene and one object x with the word satellite sketch drawing"]
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text.replace("{}", " ").lower())})
    vocabulary = {word: i for i, word in enumerate(["[pad]", "[start]", "[unknown]", "[end]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unknown]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), split
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[start] $A [end]", special_tokens=[("[start]", 1), ("[end]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[pad]", bos_token="[start]",
                                   unk_token="[unknown]", eos_token="[end]", model_max_length=32)


def build_model(vocabulary: int) -> CLIPModel:
    """A CLIP of about 2 M parameters: 6 vision and 4 text blocks of width 128, patches of 8 pixels."""
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "projection_dim": 128}
    # The end token must not be 2: transformers would then pool text the way its first CLIP did.
    text = shape | {"num_hidden_layers": 4, "vocab_size": vocabulary, "max_position_embeddings": 32,
                    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
    vision = shape | {"num_hidden_layers": 6, "image_size": SIZE, "patch_size": PATCH}
    torch.manual_seed(SEED)
    # Eager attention: on a CPU the backward pass of the fused one takes half of every step.
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=128, attn_implementation="eager")
    model = CLIPModel(config)
    torch.nn.init.constant_(model.logit_scale, math.log(14.0))
    return model


def build_processor() -> CLIPImageProcessor:
    """CLIP's own preprocessing at 64 pixels."""
    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def draw_pool(n: int) -> tuple[np.ndarray, list, np.ndarray, np.ndarray]:
    """Scenes for training: images ``[n,64,64,3]``, plans, ``patch_labels [n,64,6]``, ``image_labels [n,6]``."""
    images, plans, patches = [], [], []
    for i in trange(n, desc="drawing scenes", mininterval=5):
        scene = draw_scene("pretraining", SEED, i)
        images.append(scene.image)
        plans.append(scene.plan)
        patches.append(patch_labels(scene))
    return np.stack(images), plans, np.stack(patches), np.array([image_labels(plan) for plan in plans])


def normalise(images: np.ndarray, processor: CLIPImageProcessor) -> torch.Tensor:
    """uint8 ``[N,64,64,3]`` to the model's float ``[N,3,64,64]``."""
    mean, std = np.array(processor.image_mean, np.float32), np.array(processor.image_std, np.float32)
    return torch.from_numpy((images.astype(np.float32) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def embed_tokens(model, hidden: torch.Tensor) -> torch.Tensor:
    """Project every token as CLIP projects its class token: ``[B,T,D]`` to unit ``[B,T,P]``."""
    return F.normalize(model.visual_projection(model.vision_model.post_layernorm(hidden)).float(), dim=-1)


def phrase_list(rng: np.random.Generator) -> list[str]:
    """One phrase a seen concept, kind after kind; the nouns in a template drawn anew each step."""
    noun = TEMPLATES["imagenet_ensemble_80"][int(rng.integers(80))] if rng.random() < 0.7 else PHRASES["noun"]
    wording = PHRASES | {"noun": noun}
    return [wording[kind].format(name) for kind in KINDS for name in SEEN[kind]]


def named_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Weighted cross-entropy of each kind: logits ``[N, concepts]``, kind after kind, and labels ``[N,6]``."""
    total = logits.new_zeros(())
    for k, (kind, own) in enumerate(zip(KINDS, logits.split([len(SEEN[kind]) for kind in KINDS], dim=-1))):
        there = labels[:, k] >= 0
        if there.any():
            total = total + WEIGHTS[kind] * F.cross_entropy(own[there].float(), labels[there, k])
    return total


def warm_up_loss(model, heads, pixels, patch_labels, image_labels) -> torch.Tensor:
    """Linear heads on the class token and on the patch tokens of the last block and of the cut."""
    tower = model.vision_model
    states = tower(pixels, output_hidden_states=True).hidden_states
    last, cut = tower.post_layernorm(states[-1]), tower.post_layernorm(states[CUT])
    patches = patch_labels.flatten(0, 1)
    return (named_loss(heads[0](last[:, 0]), image_labels)
            + named_loss(heads[1](last[:, 1:].flatten(0, 1)), patches) / 2
            + named_loss(heads[2](cut[:, 1:].flatten(0, 1)), patches) / 2)


def contrast_losses(model, tokenizer, pixels, captions, phrases, patch_labels, image_labels) -> tuple:
    """The three contrasts of one batch: image-caption, image-phrase, patch-phrase."""
    scale = model.logit_scale.exp().clamp(max=100)
    tokens = tokenizer(captions + phrases, padding=True, return_tensors="pt")
    text = model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    text = F.normalize(text.pooler_output.float(), dim=-1)
    states = model.vision_model(pixels, output_hidden_states=True).hidden_states
    last, cut = embed_tokens(model, states[-1]), embed_tokens(model, states[CUT])
    spoken, phrases = text[:len(captions)], scale * text[len(captions):].T
    groups = torch.tensor([{c: i for i, c in enumerate(captions)}[c] for c in captions])
    patches = patch_labels.flatten(0, 1)
    grounded = sum(named_loss(tokens[:, 1:].flatten(0, 1) @ phrases, patches) for tokens in (last, cut)) / 2
    whole = named_loss(last[:, 0] @ phrases, image_labels)
    return contrastive_loss(last[:, 0], spoken, groups, scale), whole, grounded


def optimise(parameters: list, steps: int, title: str, losses_of) -> list[tuple]:
    """AdamW with a one-cycle rate in bfloat16 autocast; ``losses_of(step)`` gives a tuple of losses to add up."""
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.15)
    log = []
    for step in (bar := trange(steps, desc=title, mininterval=10)):
        with torch.autocast("cpu", torch.bfloat16):
            losses = losses_of(step)
        optimizer.zero_grad()
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        log.append((step, *(loss.item() for loss in losses)))
        if step % 50 == 0:
            bar.set_postfix_str(" ".join(f"{v:.3f}" for v in log[-1][1:]))
    return log


def train() -> tuple[CLIPModel, PreTrainedTokenizerFast, pd.DataFrame]:
    """Train from scratch on the CPU, with float32 weights. Returns model, tokenizer and the log of both stages."""
    tokenizer, processor, rng = build_tokenizer(), build_processor(), np.random.default_rng(SEED)
    model = build_model(len(tokenizer)).train()
    heads = torch.nn.ModuleList(torch.nn.Linear(128, sum(map(len, SEEN.values()))) for _ in range(3))
    images, plans, patches, wholes = draw_pool(POOL)
    easy = np.array([i for i, p in enumerate(plans) if len(p.things) == 1 and p.style == "photo" and not p.word])

    def batch(rows):
        return (normalise(images[rows], processor), torch.from_numpy(patches[rows]), torch.from_numpy(wholes[rows]))

    def warm_up(step):
        rows = rng.integers(0, POOL, BATCH)
        rows = easy[rows % len(easy)] if step < EASY_SHARE * WARM_UP_STEPS else rows
        return (warm_up_loss(model, heads, *batch(rows)),)

    def contrasts(step):
        rows = rng.integers(0, POOL, BATCH)
        pixels, patch_labels, image_labels = batch(rows)
        spoken = [caption(plans[i], rng, KEEP) for i in rows]
        return contrast_losses(model, tokenizer, pixels, spoken, phrase_list(rng), patch_labels, image_labels)

    warm = optimise([*model.vision_model.parameters(), *heads.parameters()], WARM_UP_STEPS, "warm-up", warm_up)
    rest = optimise(list(model.parameters()), STEPS, "contrasts", contrasts)
    log = pd.concat([pd.DataFrame(warm, columns=["step", "heads"]).assign(stage="warm-up"),
                     pd.DataFrame(rest, columns=["step", "caption", "phrase", "patch"]).assign(stage="contrasts")])
    return model.eval(), tokenizer, log


def save(folder: Path, model, tokenizer, log: pd.DataFrame) -> None:
    """Write weights, tokenizer, processor and the training log (means over 20 steps)."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    means = log.assign(step=log["step"] // 20 * 20).groupby(["stage", "step"], sort=False).mean().round(4)
    means.to_csv(folder / "training_log.csv")


def report(folder: Path) -> None:
    """Write what stands beside the weights: zero-shot accuracies and linear probes."""
    clip = load_clip(folder)
    zero_shot_table(clip).to_csv(folder / "zero_shot.csv", index=False)
    probe_table(clip).to_csv(folder / "probes.csv", index=False)
