"""Adapting CLIP to a task from a few images per class: MaPLe, and four other ways to ask what is special about it.

Every way ends in the same thing: a tower with ``below`` and ``above``, and text features of class names. Training
sees the base half of the classes; the novel half is only tested on.
"""

import copy
import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from PIL import Image
from tqdm.auto import tqdm

from patchsae.activations import load_pixels
from patchsae.clip import Clip, class_prototypes
from patchsae.config import AdaptationSettings, MethodSettings, Profile
from patchsae.data.datasets import Subset, own_template
from patchsae.maple import MaPLe, new_maple
from patchsae.weights.files import load_tensors, save_tensors
from patchsae.world.probes import linear_weights

METHODS = ("maple", "coop", "lora", "linear probe", "fine-tuning")
#: The control: MaPLe's prompts as they are before training.
UNTRAINED = "untrained prompts"
#: CoOp learns the four words "a photo of a".
COOP_WORDS = 4
#: Rate of the first epoch of prompt training, and its momentum and weight decay, as published.
WARM_UP_RATE, MOMENTUM, DECAY = 1e-5, 0.9, 5e-4
#: LoRA: rank, and which layers of every block it changes.
RANK, LORA_LAYERS = 4, ["q_proj", "k_proj", "v_proj", "out_proj"]
#: Linear probe: weight of the sum of squared weights.
PENALTY = 1e-3


class Adapted(NamedTuple):
    """An adapted model: the image tower, and how it embeds class names, ``list[str] -> [C,P]``."""

    tower: Clip
    text: Callable[[Sequence[str]], torch.Tensor]


def halves(ds) -> dict[str, range]:
    """Labels of the base half (the first, and the larger one) and of the novel half of a data set's classes."""
    n, middle = len(ds.class_names), -(-len(ds.class_names) // 2)
    return {"base": range(middle), "novel": range(middle, n)}


def few_shots(ds, classes: range, shots: int, seed: int) -> Subset:
    """``shots`` images of each of these classes, as CoOp draws them from the same files with the same seed.

    All classes draw from one random stream, in the order in which the source first names them; a class with fewer
    images gives all of them and draws nothing.
    """
    by_class: dict[int, list[int]] = {label: [] for label in ds.label_order}
    for row, label in enumerate(ds.labels.tolist()):
        by_class.setdefault(label, []).append(row)
    stream = random.Random(seed)
    drawn = [stream.sample(rows, shots) if len(rows) >= shots else rows for rows in by_class.values()]
    return Subset(ds, classes, [row for rows in drawn for row in rows])


def unadapted(profile: Profile, clip: Clip, task: str) -> Adapted:
    """CLIP as it is, classes in the task's own wording."""
    return Adapted(clip, lambda names: class_prototypes(clip, names, [own_template(profile, task)]))


def adapt(profile: Profile, clip: Clip, task: str, method: str, seed: int, ds, part: str = "base",
          title: str = "") -> Adapted:
    """Train one method on the few shots of a task's training split ``ds``: of the base half, or of "all" classes."""
    if method not in METHODS:
        raise ValueError(f"There is no method {method!r}; choose one of {', '.join(METHODS)}.")
    classes = range(len(ds.class_names)) if part == "all" else halves(ds)[part]
    shots = few_shots(ds, classes, profile.adaptation.shots, seed)
    if method in ("maple", "coop"):
        start = new_prompts(profile, clip, shots.class_names, method, seed)
        return as_adapted(train_prompts(profile, start, shots, method, seed, title))
    if method == "linear probe":
        return _linear_probe(profile, clip, task, shots)
    return _tuned(profile, clip, task, shots, method, seed, title)


@functools.lru_cache(maxsize=16)
def _fingerprint(model_or_data) -> str:
    """Its hash, computed once: that of a ViT-B/16 takes a second, that of ImageNet's files several."""
    return model_or_data.fingerprint()


def adaptation_key(profile: Profile, clip: Clip, task: str, method: str, seed: int, ds, part: str = "base") -> str:
    """Hash of everything that decides an adapted model."""
    left_out = ("tasks", "seeds", "images")
    shared = {k: v for k, v in dataclasses.asdict(profile.adaptation).items() if k not in left_out}
    untuned = method in ("linear probe", "zero-shot", UNTRAINED)
    own = {} if untuned else dataclasses.asdict(method_settings(profile, method))
    key = [_fingerprint(clip), _fingerprint(ds), task, method, seed, part, shared, own]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def adapted_model(profile: Profile, clip: Clip, task: str, method: str, seed: int, ds, part: str = "base",
                  title: str = "") -> Adapted:
    """The adapted model of the profile's settings: committed or trained before, else trained now and kept.

    Prompts are kept as prompts, the methods that change weights as the image tower's weights. ``method`` may also be
    ``UNTRAINED``.
    """
    if method == UNTRAINED:
        return as_adapted(new_prompts(profile, clip, ds.class_names, "maple", seed))
    if method == "linear probe":
        return adapt(profile, clip, task, method, seed, ds, part)
    key = adaptation_key(profile, clip, task, method, seed, ds, part)
    for folder in (profile.data_dir / "adapted" / key, kept := profile.run_dir / "adapted" / key):
        if (folder / "prompts.safetensors").is_file():
            return as_adapted(MaPLe.load(folder, clip, ds.class_names))
        if (folder / "tower.safetensors").is_file():
            tower = _with_tower(clip, load_tensors(folder / "tower.safetensors"))
            return Adapted(tower, unadapted(profile, clip, task).text)
    found = adapt(profile, clip, task, method, seed, ds, part, title)
    if isinstance(found.tower, MaPLe):
        found.tower.save(kept)
    else:
        save_tensors(kept / "tower.safetensors", found.tower.model.vision_model.state_dict())
    return found


def _with_tower(clip: Clip, weights: dict[str, torch.Tensor]) -> Clip:
    """The CLIP with other weights in its image tower."""
    model = copy.deepcopy(clip.model)
    model.vision_model.load_state_dict(weights)
    return Clip(model, clip.tokenizer, clip.processor)


def as_adapted(model: MaPLe) -> Adapted:
    """Prompts as an adapted model."""
    return Adapted(model, lambda names: model.for_classes(names).text_features())


def new_prompts(profile: Profile, clip: Clip, class_names, method: str, seed: int) -> MaPLe:
    """Untrained prompts of MaPLe or CoOp, as the profile has them."""
    s = profile.adaptation
    n, depth = (s.n_prompts, s.depth) if method == "maple" else (COOP_WORDS, 1)
    return new_maple(clip, class_names, n, depth, method == "maple", seed)


# Training -----------------------------------------------------------------------------------------------

def train_prompts(profile: Profile, model: MaPLe, shots, method: str, seed: int, title: str = "") -> MaPLe:
    """Learn prompts by SGD, one rate per epoch: a constant first one, then a cosine (CoOp, MaPLe)."""
    s = method_settings(profile, method)
    optimizer = torch.optim.SGD(model.prompts.parameters(), WARM_UP_RATE, MOMENTUM, weight_decay=DECAY)

    def loss(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model.logits(embeddings, model.text(model.token_ids)), labels)

    rates = [WARM_UP_RATE, *_cosine(s.learning_rate, s.epochs_of(len(shots)))[:-1]]
    _train(profile.adaptation, s, model, shots, optimizer, rates, loss, seed, title, fixed=method == "coop")
    return model


def _tuned(profile: Profile, clip: Clip, task: str, shots, method: str, seed: int, title: str) -> Adapted:
    """LoRA, or all weights of the image tower, by AdamW; text features stay those of CLIP."""
    torch.manual_seed(seed)
    s, tower = method_settings(profile, method), Clip(copy.deepcopy(clip.model), clip.tokenizer, clip.processor)
    model = tower.model
    if method == "lora":  # puts its layers into the tower, and lets them alone have gradients
        lora = get_peft_model(model.vision_model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LORA_LAYERS))
    else:
        model.vision_model.requires_grad_(True)
    text = unadapted(profile, clip, task).text
    features = text(shots.class_names)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.01)
    _train(profile.adaptation, s, tower, shots, optimizer, _cosine(s.learning_rate, s.epochs_of(len(shots))),
           lambda embeddings, labels: F.cross_entropy(tower.logits(embeddings, features), labels), seed, title)
    if method == "lora":
        model.vision_model = lora.merge_and_unload()
    return Adapted(Clip(model, clip.tokenizer, clip.processor), text)


def _linear_probe(profile: Profile, clip: Clip, task: str, shots) -> Adapted:
    """Logistic regression on the image embeddings; classes it was not trained on keep CLIP's text features."""
    zero_shot = unadapted(profile, clip, task).text
    embeddings = F.normalize(image_embeddings(clip, shots), dim=-1)
    labels = torch.as_tensor(shots.labels, device=clip.device)
    weights = linear_weights(embeddings * clip.logit_scale, labels, len(shots.class_names), PENALTY)
    known = dict(zip(shots.class_names, weights))
    return Adapted(clip, lambda names: torch.stack(
        [known[name] if name in known else feature for name, feature in zip(names, zero_shot(names))]))


@torch.no_grad()
def image_embeddings(clip: Clip, ds, batch_images: int = 64, layer: int = -2) -> torch.Tensor:
    """Image embeddings of a data set: ``[N,P]``, not normalised."""
    parts = np.array_split(np.arange(len(ds)), -(-len(ds) // batch_images))
    return torch.cat([clip.above(clip.below(load_pixels(clip, ds, part).pixels, layer), layer) for part in parts])


def _train(shared: AdaptationSettings, s: MethodSettings, tower: Clip, shots, optimizer, rates: Sequence[float],
           loss_of, seed: int, title: str, fixed: bool = False) -> None:
    """Train for one epoch per rate. ``fixed``: the tower does not change, so that it runs once per image."""
    rng, labels = np.random.default_rng(seed), torch.as_tensor(shots.labels, device=tower.device)
    kept = image_embeddings(tower, shots) if fixed and not shared.augment else None
    pixels = None if shared.augment or fixed else load_pixels(tower, shots, range(len(shots))).pixels
    for rate in tqdm(rates, desc=title, disable=not title, mininterval=1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for rows in _batches(len(shots), s.batch_images, rng):
            with torch.autocast(tower.device.type, torch.bfloat16, enabled=tower.device.type == "cuda"):
                if kept is not None:
                    embeddings = kept[rows]
                else:
                    batch = augmented(tower, shots, rows, rng) if pixels is None else pixels[rows]
                    embeddings = tower.above(tower.below(batch, -2), -2)
                loss = loss_of(embeddings.float(), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _batches(n: int, size: int, rng) -> list[np.ndarray]:
    """One epoch in random order; the last, smaller batch is dropped, unless it is the only one."""
    order = rng.permutation(n)
    return [order[i:i + size] for i in range(0, max(n - size, 0) + 1, size)]


def _cosine(rate: float, epochs: int) -> list[float]:
    """Rates of ``epochs`` epochs: from ``rate`` towards 0 along half a cosine."""
    return [rate * (1 + np.cos(np.pi * epoch / epochs)) / 2 for epoch in range(epochs)]


def augmented(clip: Clip, ds, rows, rng) -> torch.Tensor:
    """Random crops (8 to 100 % of the area, sides 3:4 to 4:3) at the model's size, half of them mirrored."""
    size, images = (clip.image_size, clip.image_size), []
    for row in rows:
        image = Image.fromarray(np.asarray(ds[int(row)].image))
        image = image.resize(size, Image.Resampling.BICUBIC, box=_crop(*image.size, rng))
        images.append(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image)
    return clip.pixels(images).to(clip.device)


def _crop(width: int, height: int, rng) -> tuple[float, float, float, float]:
    """A random box of an image; the first of ten that fits, else the whole."""
    for _ in range(10):
        area, ratio = rng.uniform(0.08, 1) * width * height, np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    return 0, 0, width, height


def method_settings(profile: Profile, method: str) -> MethodSettings:
    """The profile's section of a method."""
    return getattr(profile, method.replace(" ", "_").replace("-", "_"))
