"""``patchsae new NAME --images DIR``: looks at somebody's images and model, and writes a profile that fits them."""

import json
import math
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from tqdm.auto import tqdm

from patchsae.activations import MEMORY
from patchsae.clip import Clip, load_clip
from patchsae.config import PROFILES, ROOT, device, resolve
from patchsae.data.datasets import split_files, split_folders
from patchsae.data.images import IMAGE_ENDINGS, Unreadable, in_turn, read_image
from patchsae.data.reading import MOST_UNREADABLE
from patchsae.project.ask import agreed
from patchsae.weights.files import write_atomically

#: Share of the images that are kept for tests where the folder has no splits.
TEST_SHARE = 0.2
#: Images that are read to see whether they can be, at most; and those whose tokens are measured.
LOOKED_AT, MEASURED = 20_000, 64
#: Constants of the rules for lambda, the learning rate and k, and the spread of mini's tokens, for which tau is 0.2.
L1, RATE, ACTIVE, SPREAD = 2.15, 57.0, 0.086, 36.7
#: Rates of adaptation at width 128, mini's; those of the paper at width 768 are about a sixth.
RATES = {"maple": 0.02, "coop": 0.02, "lora": 2e-3, "fine_tuning": 3e-4}


class Pictures(NamedTuple):
    """What a folder of images holds. ``root``: the folder that the profile names; ``train`` and ``test``: how many
    images every class has; ``sizes``: width and height of those that were read; ``unreadable``: file -> reason;
    ``left_out``: sentences on what else lies there; ``some``: a few files."""

    root: Path
    class_names: tuple[str, ...]
    train: list[int]
    test: list[int]
    split_by: str
    sizes: list[tuple[int, int]]
    unreadable: dict[Path, str]
    left_out: list[str]
    some: list[Path]


class Tower(NamedTuple):
    """What matters of a model. ``text_blocks``: 0 without text; ``length``: mean length of a token at the cut;
    ``spread``: the same once the mean token is taken off."""

    width: int
    n_tokens: int
    blocks: int
    text_blocks: int
    image_size: int
    layer: int
    length: float
    spread: float


# Looking -------------------------------------------------------------------------------------------------

def look_at_images(folder: Path) -> Pictures:
    """Classes, splits, counts and sizes of a folder of images; what cannot be used is one sentence."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; name one that holds a folder of images per class.")
    places = split_folders(folder)
    root = next(iter(places.values())) if len(places) == 1 else folder
    (train, names), (test, _) = (split_files(root, split, TEST_SHARE) for split in ("train", "test"))
    if len(names) < 2:
        raise ValueError(f"{root} has one class alone, {names[0]!r}; put images of at least two classes there.")
    files = [path for path, _ in (*train, *test)]
    sizes, unreadable = _read(files[::math.ceil(len(files) / LOOKED_AT)])
    if len(unreadable) > max(1, MOST_UNREADABLE * len(files)):
        raise ValueError(f"{len(unreadable)} of {len(files)} images cannot be read, {min(unreadable)} among them; "
                         "replace or remove them.")
    counted = [Counter(label for path, label in split if path not in unreadable) for split in (train, test)]
    counts = [[of_class[label] for label in range(len(names))] for of_class in counted]
    for split, of_class in zip(("train", "test"), counts):
        if 0 in of_class:
            raise ValueError(f"The class {names[of_class.index(0)]!r} in {root} has no image to {split} on; put at "
                             "least two different images into every class.")
    split_by = "content" if len(places) < 2 else f"the folders {places['train'].name} and {places['test'].name}"
    some = [path for path, _ in in_turn(train, MEASURED) if path not in unreadable]
    return Pictures(root, names, *counts, split_by, sizes, unreadable, _left_out(folder, root, files), some)


def _read(files: list[Path]) -> tuple[list[tuple[int, int]], dict[Path, str]]:
    """Width and height of the images that can be read, and file -> reason of the others."""
    def look(path: Path) -> tuple[int, int] | str:
        try:
            return read_image(path, path).shape[1::-1]
        except Unreadable as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(tqdm(pool.map(look, files), total=len(files), desc="looking at the images", delay=1))
    return ([size for size in found if not isinstance(size, str)],
            {path: reason for path, reason in zip(files, found) if isinstance(reason, str)})


def _left_out(folder: Path, root: Path, files: list[Path]) -> list[str]:
    """Sentences on files that lie in a folder and are not used."""
    used = set(files)
    others = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "." and path not in used]
    images = [path for path in others if path.suffix.lower() in IMAGE_ENDINGS]
    kinds = sorted({path.suffix.lower() or path.name for path in set(others) - set(images)})
    said = [] if root == folder else [f"{root} is the one split there is, and is divided."]
    if images:
        said.append(f"Left out, for want of a folder of their class: {len(images)}, such as {min(images)}.")
    if kinds:
        said.append(f"Left out, as no images that are read here: {len(others) - len(images)} ({', '.join(kinds)}).")
    return said


@torch.no_grad()
def look_at_model(clip: Clip, images: list[Path]) -> Tower:
    """The shape of a model, and how long its tokens are on a few images."""
    layer = -min(2, len(clip.blocks))
    z = torch.cat([clip.below(clip.pixels(read_image(path, path)), layer) for path in images]).flatten(0, 1)
    text = clip.model.config.text_config.num_hidden_layers if clip.tokenizer is not None else 0
    return Tower(clip.width, clip.n_tokens, len(clip.blocks), text, clip.image_size, layer, z.norm(dim=1).mean().item(),
                 (z - z.mean(0)).norm(dim=1).mean().item())


# Rules ---------------------------------------------------------------------------------------------------

def starting_l1(width: int, spread: float, length: float) -> float:
    """lambda to start from, for tokens of this width and mean length, and of this ``spread`` about their mean.

    Both terms of equation 1 grow alike with z, so that its length alone does not matter. A latent of unit direction
    pays where its activation a is above lambda D ||z|| / 2, the a at which the mean of (z_hat - z)^2 / ||z|| falls as
    fast as lambda a grows. Where k latents share the spread of a token, each has about spread / sqrt(k); with k a fixed
    share of D, the same part of every activation is lost at

        lambda = L1 * spread / length * D^(-3/2)

    L1 lies between mini's lambda (1.3e-3, D = 128) and the paper's (8e-5, D = 768), if the tokens of CLIP ViT-B/16 vary
    by mini's share of their length, 0.83.
    """
    return L1 * spread / length * width**-1.5


def starting_rate(width: int, steps: int) -> float:
    """Adam's learning rate to start from: mini's (5e-3 over 8,000 steps) and about the paper's (4e-4 over 20,480)."""
    return min(RATE / (width * math.sqrt(steps)), 5e-3)


def fitting(tower: Tower, n_train: int, n_test: int, gpu: bool) -> dict[str, float]:
    """Settings that follow from the size of data and model: a training of about a minute on two cores, or of the
    paper's size on a GPU where there is as much data."""
    tokens, most_latents, most_steps, work = (25_216, 64, 20_480, 2e17) if gpu else (1024, 8, 3000, 3e12)
    # On the CPU as many images as have their tokens kept in memory: the model is then passed once.
    train = n_train if gpu else min(n_train, 4096, MEMORY // (4 * tower.n_tokens * tower.width))
    batch = max(4, round(tokens / tower.n_tokens))
    expansion = min(most_latents, 2 ** max(1, round(math.log2(train * tower.n_tokens / (64 * tower.width)))))
    latents = expansion * tower.width
    affordable = max(500, work / (12 * batch * tower.n_tokens * tower.width * latents))
    steps = int(min(most_steps, affordable, max(3000, 2 * train / batch)))
    return {"train_images": train, "test_images": n_test if gpu else min(n_test, 1024), "n_latents": latents,
            "pass_images": min(64, max(4, 2**26 // (tower.n_tokens * latents))), "batch_images": batch,
            "expansion": expansion, "steps": steps, "warmup": min(500, steps // 10), "save_every": max(100, steps // 8),
            "dead_after": 64 if steps >= 2000 else 16, "k": max(1, round(ACTIVE * tower.width)),
            "l1": _short(starting_l1(tower.width, tower.spread, tower.length)),
            "learning_rate": _short(starting_rate(tower.width, steps)), "tau": _short(0.2 * tower.spread / SPREAD)}


def judgement(log: pd.DataFrame, width: int) -> str:
    """What a training came to, from the end of its log, and which way lambda should be turned.

    The paper's autoencoder has about width / 5 active latents per token, mini's width / 12.
    """
    last = log.tail(max(1, len(log) // 10))[["l0", "ev"]].mean()
    advice = "which is in the usual range"
    if last["l0"] > width / 3:
        advice = "which is much: raise sae.l1 for fewer, sharper ones"
    elif last["l0"] < width / 40 or last["ev"] < 0.5:
        advice = "which keeps little: lower sae.l1"
    return f"{last['l0']:.1f} latents are active per token and {last['ev']:.0%} of the variance is explained, {advice}."


def _short(value: float) -> float:
    """Two digits that count."""
    return float(f"{value:.1e}")


# The profile ---------------------------------------------------------------------------------------------

def profile_text(name: str, model: str, masks: Path | None, pictures: Pictures, tower: Tower) -> str:
    """The profile as TOML, with comments."""
    n_train, n_test, classes = sum(pictures.train), sum(pictures.test), len(pictures.class_names)
    there = [n + len(pictures.unreadable) for n in (n_train, n_test)]
    numbers, cut = fitting(tower, *there, device() == "cuda"), tower.blocks + tower.layer
    paths = {"model": model, "images": _place(pictures.root), "masks": _place(masks) if masks else ""}
    values = tower._asdict() | numbers | {
        "name": name, "n_classes": classes, "n_train": n_train, "n_test": n_test, "split_by": pictures.split_by,
        "test_share": TEST_SHARE, "threads": min(8, os.cpu_count() or 1), "share": tower.spread / tower.length,
        "other_layers": sorted({cut // 3, 2 * cut // 3} - {cut}), "n_tokens": numbers["train_images"] * tower.n_tokens,
        "step_tokens": numbers["batch_images"] * tower.n_tokens, "shots": min(16, *pictures.train),
        "tasks": json.dumps([name] if _adapts(tower, classes) else []), "adapted_images": min(1024, n_train),
        "depth": max(1, round(0.75 * min(tower.blocks, tower.text_blocks)))}
    values |= {method: _short(min(1, 128 / tower.width) * rate) for method, rate in RATES.items()}
    values |= {key: json.dumps(value, ensure_ascii=False) for key, value in paths.items()}
    template = Path(__file__).with_name("template.toml").read_text(encoding="utf-8")
    lines = [line.partition("  #") for line in template.format(**values).splitlines()]
    return "".join(f"{code.rstrip():<36} #{comment}\n" if mark else f"{code}\n" for code, mark, comment in lines)


def _adapts(tower: Tower, classes: int) -> bool:
    """Whether the model can be adapted to one half of the classes and tried on the other."""
    return tower.text_blocks > 0 and classes >= 4


def _place(path: Path) -> str:
    """A path as a profile names it: from the project folder where it is inside."""
    return str(path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path.resolve())


def description(model: str, pictures: Pictures, tower: Tower, masks: Path | None) -> str:
    """What was found, and what the notebooks will show of it."""
    low, high = ([f(size[i] for size in pictures.sizes) for i in (0, 1)] for f in (min, max))
    classes, text = len(pictures.class_names), tower.text_blocks > 0
    lines = [f"{classes} classes, {sum(pictures.train)} images to train on and {sum(pictures.test)} to test on, split "
             f"by {pictures.split_by}, of {low[0]} x {low[1]} to {high[0]} x {high[1]} pixels.",
             *(f"{reason} Until then it is left out." for reason in pictures.unreadable.values()), *pictures.left_out,
             f"{model} has {tower.blocks} blocks of width {tower.width} and takes {tower.image_size} pixels a side, "
             f"{tower.n_tokens} tokens; it has {'text' if text else 'no tokenizer, so that there are no accuracies'}.",
             "", "What the notebooks show:"]
    shown = {"01_train_sae": "the training, and what the autoencoder keeps of the model",
             "02_latent_statistics": "frequency, strength and label entropy of the latents",
             "03_reference_images": "reference images; not on other tasks, of which the profile names none",
             "04_segmentation_masks": "where latents are active" if masks else
                 "where latents are active, without ground truth, for want of masks",
             "05_latent_ablation": "latents on and off in classification" if text else "nothing, for want of text",
             "06_maple_adaptation": "adaptation to one half of the classes" if _adapts(tower, classes) else
                 f"nothing, for want of {'four classes' if text else 'text'}",
             "07_before_and_after": "the latents of the adapted model beside those of the model" if
                 _adapts(tower, classes) else "nothing, for want of an adapted model",
             "08_remapping": "nothing: only drawn scenes have tasks whose truth is known",
             "09_measured_interpretability": "how well latents match the masks" if masks else
                 "nothing, for want of masks",
             "10_what_holds": "the paper's claims, as far as these tables can tell",
             "explorer": "patches, latents, and pictures of yours"}
    return "\n".join([*lines, *(f"  {notebook:<30}{what}" for notebook, what in shown.items())])


def run(name: str, images: str, model: str, masks: str, yes: bool) -> str:
    """Look, say what was found, ask, and write ``profiles/<name>.toml``; returns what is next."""
    place = ROOT / "profiles" / f"{name}.toml"
    if not re.fullmatch(r"\w[\w-]{0,99}", name):
        raise ValueError(f"{name!r} cannot name a profile; take letters, digits, - and _ alone.")
    if (PROFILES / f"{name}.toml").is_file():
        raise ValueError(f"The package has a profile {name!r} of its own; choose another name.")
    if masks and not resolve(masks).is_dir():
        raise FileNotFoundError(f"There is no folder of masks {masks}; name one, or leave --masks out.")
    pictures, clip = look_at_images(resolve(images)), load_clip(model)
    tower, folder = look_at_model(clip, pictures.some), resolve(masks) if masks else None
    model = _place(resolve(model)) if resolve(model).exists() else model
    text = profile_text(name, model, folder, pictures, tower)
    if place.is_file() and place.read_text(encoding="utf-8") != text:
        raise ValueError(f"{place} is there already and says something else; remove it or choose another name.")
    print(description(model, pictures, tower, folder), flush=True)
    if not yes and not agreed(f"Write {place}?"):
        return "Nothing was written."
    write_atomically(place, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    command = "make figures PROFILE=" if (ROOT / "Makefile").is_file() else "patchsae train --profile "
    return f"{place} is written. Next: {command}{name}"
