"""Adapting CLIP to a task from a few images per class: MaPLe, and four other ways to ask what is special about it.

Every way ends in the same thing: a tower with ``below`` and ``above``, and text features of class names. Training
sees the base half of the classes; the novel half is only tested on.
"""

import copy
import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from patchsae.activations import load_pixels
from patchsae.clip import Clip, class_prototypes
from patchsae.config import MethodSettings
from patchsae.data.datasets import ArrayDataset, Subset, own_template
from patchsae.data.images import Images
from patchsae.maple import MaPLe, new_maple
from patchsae.studies.study import Study
from patchsae.weights.files import load_tensors, result_key, save_tensors
from patchsae.world.probes import image_embeddings, logistic_weights

METHODS = ("maple", "coop", "lora", "linear probe", "fine-tuning")
#: The control: MaPLe's prompts as they are before training.
UNTRAINED = "untrained prompts"
#: Raised when training gives other models from the same settings.
VERSION = 1
#: What of a method's settings decides its training, once those of its protocol are chosen.
TRAINED_BY = ("learning_rate", "epochs", "least_steps", "batch_images")
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


class Recipe(NamedTuple):
    """What an adapted model is made of, besides the settings, the CLIP and the images of ``study``.

    ``method``: one of ``METHODS``, ``UNTRAINED``, or "zero-shot", which is CLIP as it is. ``seed``: of the shots, the
    start and the order. ``classes``: the shots are of the "base" half of the task's classes, or of "all". ``images``: a
    few "shots" of each class, as many as the profile says, or "all" training images.
    """

    study: Study
    task: str
    method: str
    seed: int = 0
    classes: str = "base"
    images: str = "shots"

    @property
    def train(self) -> Images:
        """The images that shots are drawn from."""
        return self.study.images(self.task, "train")

    @property
    def settings(self) -> MethodSettings:
        """The profile's section of the method, with the values for this task and these classes."""
        profile, transfer = self.study.profile, self.classes == "all"
        s = getattr(profile, self.method.replace(" ", "_").replace("-", "_"))
        epochs = s.own_task_epochs if self.task == profile.data.task else 0
        return dataclasses.replace(s, epochs=(s.transfer_epochs if transfer else 0) or epochs or s.epochs,
                                   learning_rate=(s.transfer_learning_rate if transfer else 0) or s.learning_rate)

    @property
    def depth(self) -> int:
        """Blocks that MaPLe's prompts enter."""
        s = self.study.profile.adaptation
        return (s.transfer_depth if self.classes == "all" else 0) or s.depth

    def shots(self) -> Images:
        """The images that are learned from; of those in files, what can be read, decoded once.

        They are as the model takes them, or whole where training crops them at random: a crop of a crop would never
        show the margins.
        """
        augment = self.study.profile.adaptation.augment and self.method != "linear probe"
        train = self.train.uncropped() if augment else self.train
        classes = range(len(train.class_names)) if self.classes == "all" else halves(train)[self.classes]
        shots = Subset(train, classes) if self.images == "all" else few_shots(
            train, classes, self.study.profile.adaptation.shots, self.seed)
        if not shots.from_files or self.images == "all":
            return shots
        read = [item for _, item in shots.readable(range(len(shots)))]
        return ArrayDataset([item.image for item in read], [item.label for item in read], [item.id for item in read],
                            shots.class_names)


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


def unadapted(study: Study, task: str) -> Adapted:
    """CLIP as it is, classes in the task's own wording."""
    return Adapted(study.clip, lambda names: class_prototypes(study.clip, names, [own_template(study.profile, task)]))


def adapt(recipe: Recipe) -> Adapted:
    """Train one method on the few shots of its task."""
    if recipe.method not in METHODS:
        raise ValueError(f"There is no method {recipe.method!r}; choose one of {', '.join(METHODS)}.")
    if recipe.method == "linear probe":
        return _linear_probe(recipe)
    return as_adapted(train_prompts(recipe)) if recipe.method in ("maple", "coop") else _tuned(recipe)


def adaptation_key(recipe: Recipe) -> str:
    """What an adapted model is kept under: everything that decides it."""
    s = recipe.study.profile.adaptation
    shared = {"shots": "all" if recipe.images == "all" else s.shots, "n_prompts": s.n_prompts, "depth": recipe.depth,
              "augment": s.augment and "whole images"}
    trained = recipe.method not in ("linear probe", "zero-shot", UNTRAINED)
    return result_key(VERSION, clip=recipe.study.clip_key, images=recipe.train.fingerprint(), task=recipe.task,
                      method=recipe.method, seed=recipe.seed, classes=recipe.classes, adaptation=shared,
                      settings={name: getattr(recipe.settings, name) for name in TRAINED_BY} if trained else {})


def kept_folder(recipe: Recipe) -> Path | None:
    """Where an adapted model is that was committed or trained before, if it was."""
    profile, key = recipe.study.profile, adaptation_key(recipe)
    files = [folder / "adapted" / key / f"{what}.safetensors" for folder in (profile.data_dir, profile.run_dir)
             for what in ("prompts", "tower")]
    return next((file.parent for file in files if file.is_file()), None)


def adapted_model(recipe: Recipe) -> Adapted:
    """The adapted model: committed or trained before, else trained now and kept in the run folder.

    Prompts are kept as prompts, the methods that change weights as the image tower's weights. What takes no time (CLIP
    as it is, untrained prompts, the linear probe) is made again.
    """
    study, plain = recipe.study, unadapted(recipe.study, recipe.task)
    if recipe.method == "zero-shot":
        return plain
    if recipe.method == UNTRAINED:
        return as_adapted(new_prompts(recipe._replace(method="maple"), recipe.train.class_names))
    if recipe.method == "linear probe":
        return adapt(recipe)
    if (folder := kept_folder(recipe)) is None:
        model, folder = adapt(recipe), study.profile.run_dir / "adapted" / adaptation_key(recipe)
        if isinstance(model.tower, MaPLe):
            model.tower.save(folder)
        else:
            save_tensors(folder / "tower.safetensors", model.tower.model.vision_model.state_dict())
        return model
    if (folder / "prompts.safetensors").is_file():
        return as_adapted(MaPLe.load(folder, study.clip, recipe.train.class_names))
    tower = _copied(study.clip)
    tower.model.vision_model.load_state_dict(load_tensors(folder / "tower.safetensors"))
    return Adapted(tower, plain.text)


def _copied(clip: Clip) -> Clip:
    """The CLIP with weights of its own."""
    return Clip(copy.deepcopy(clip.model), clip.tokenizer, clip.processor)


def as_adapted(model: MaPLe) -> Adapted:
    """Prompts as an adapted model."""
    return Adapted(model, lambda names: model.for_classes(names).text_features())


def new_prompts(recipe: Recipe, class_names: Sequence[str]) -> MaPLe:
    """Untrained prompts of MaPLe or CoOp, as the profile has them."""
    s, deep = recipe.study.profile.adaptation, recipe.method == "maple"
    n, depth = (s.n_prompts, recipe.depth) if deep else (COOP_WORDS, 1)
    return new_maple(recipe.study.clip, class_names, n, depth, deep, recipe.seed)


# Training -----------------------------------------------------------------------------------------------

def train_prompts(recipe: Recipe) -> MaPLe:
    """Learn prompts by SGD, one rate per epoch: a constant first one, then a cosine (CoOp, MaPLe)."""
    shots, s = recipe.shots(), recipe.settings
    model = new_prompts(recipe, shots.class_names)
    optimizer = torch.optim.SGD(model.prompts.parameters(), WARM_UP_RATE, MOMENTUM, weight_decay=DECAY)
    rates = [WARM_UP_RATE, *_cosine(s.learning_rate, s.epochs_of(len(shots)))[:-1]]
    _train(recipe, model, shots, optimizer, rates, lambda: model.text(model.token_ids))
    return model


def _tuned(recipe: Recipe) -> Adapted:
    """LoRA, or all weights of the image tower, by AdamW; text features stay those of CLIP."""
    torch.manual_seed(recipe.seed)
    shots, s, tower = recipe.shots(), recipe.settings, _copied(recipe.study.clip)
    model = tower.model
    if recipe.method == "lora":  # puts its layers into the tower, and lets them alone have gradients
        from peft import LoraConfig, get_peft_model  # of the extra "adapt", and slow to import

        lora = get_peft_model(model.vision_model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LORA_LAYERS))
    else:
        model.vision_model.requires_grad_(True)
    text = unadapted(recipe.study, recipe.task).text
    features = text(shots.class_names)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.01)
    _train(recipe, tower, shots, optimizer, _cosine(s.learning_rate, s.epochs_of(len(shots))), lambda: features)
    if recipe.method == "lora":
        model.vision_model = lora.merge_and_unload()
    return Adapted(Clip(model, tower.tokenizer, tower.processor), text)


def _linear_probe(recipe: Recipe) -> Adapted:
    """Logistic regression on the image embeddings; classes it was not trained on keep CLIP's text features."""
    (clip, zero_shot), shots = unadapted(recipe.study, recipe.task), recipe.shots()
    embeddings = F.normalize(image_embeddings(clip, shots), dim=-1)
    labels = torch.as_tensor(shots.labels, device=clip.device)
    weights = logistic_weights(embeddings * clip.logit_scale, labels, PENALTY).T
    known = dict(zip(shots.class_names, weights))
    return Adapted(clip, lambda names: torch.stack(
        [known[name] if name in known else feature for name, feature in zip(names, zero_shot(names))]))


def _train(recipe: Recipe, tower: Clip, shots: Images, optimizer, rates: Sequence[float],
           text_features: Callable[[], torch.Tensor]) -> None:
    """Train for one epoch per rate; of CoOp the tower does not change, so that it runs once per image."""
    augment, fixed = recipe.study.profile.adaptation.augment, recipe.method == "coop"
    rng, labels = np.random.default_rng(recipe.seed), torch.as_tensor(shots.labels, device=tower.device)
    kept = image_embeddings(tower, shots) if fixed and not augment else None
    pixels = None if augment or fixed else load_pixels(tower, shots, range(len(shots))).pixels
    for rate in tqdm(rates, desc=f"{recipe.method} on {recipe.task}, seed {recipe.seed}", mininterval=1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for rows in _batches(len(shots), recipe.settings.batch_images, rng):
            with torch.autocast(tower.device.type, torch.bfloat16, enabled=tower.device.type == "cuda"):
                if kept is not None:
                    embeddings = kept[rows]
                else:
                    batch = augmented(tower, shots, rows, rng) if pixels is None else pixels[rows]
                    embeddings = tower.above(tower.below(batch, -2), -2)
                text = text_features()
            # Logits of 16 to 32 lie 0.125 apart in bfloat16.
            loss = F.cross_entropy(tower.logits(embeddings.float(), text.float()), labels[rows])
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
        # Cut before it is resized, as published: a box given to resize would let the pixels around it in.
        image = image.crop(_crop(*image.size, rng)).resize(size, Image.Resampling.BICUBIC)
        images.append(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image)
    return clip.pixels(images).to(clip.device)


def _crop(width: int, height: int, rng) -> tuple[int, int, int, int]:
    """A random box of an image; the first of ten that fits, else as much of the middle as the ratios allow."""
    for _ in range(10):
        area, ratio = rng.uniform(0.08, 1) * width * height, np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
