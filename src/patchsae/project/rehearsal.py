"""The rehearsal: random weights and drawn images in the paper's dimensions, and what the notebooks took with them."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from patchsae.config import ROOT, Profile, load_profile
from patchsae.project.check import read_tasks
from patchsae.project.stamps import estimate, record
from patchsae.world.pretrain import build_tokenizer
from patchsae.world.scenes import CONCEPTS, KINDS, NONE, Scene, class_names, draw_scene

SIDE, VOCABULARY, CLASSES = 224, 49_408, 4
#: Seeds of scenes, as the mini profile's splits have them.
SPLITS = {"train": 0, "test": 1}
#: Images with masks, in ADE20K's folders.
MASKED = {"training": 24, "validation": 16}


def make_weights(folder: Path, seed: int) -> None:
    """A ViT-B/16 CLIP with random weights in half precision (300 MB), its processor, and a tokenizer of CLIP's size."""
    torch.manual_seed(seed)
    text = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={"patch_size": 16, "image_size": SIDE}))
    for name, weight in model.vision_model.named_parameters():
        if name.endswith("weight") and weight.ndim == 2:
            # The usual start leaves all images alike; this much spread sets their tokens apart.
            torch.nn.init.normal_(weight, std=0.05)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"[unused {i}]" for i in range(VOCABULARY - len(tokenizer))])
    tokenizer.model_max_length = 77
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)


def draw_images(profile: Profile) -> int:
    """Scenes at 224 pixels in folders of classes, as many as the profile reads; returns how many there are."""
    root, wanted = profile.data_dir / "images", {(profile.data.task, "train"): profile.data.train_images}
    wanted |= {(task, "test"): profile.data.test_images for task in read_tasks(profile)}
    for task in profile.adaptation.tasks:
        wanted.setdefault((task, "train"), max(profile.adaptation.images, CLASSES * profile.adaptation.shots))
    for (task, split), n in wanted.items():
        names = class_names(task)
        for i, scene in _scenes(task, SPLITS[split], n):
            _save(scene.image, root / task / split / names[scene.label].replace(" ", "_") / f"{i:06}.png")
    return sum(wanted.values())


def draw_masks(profile: Profile) -> int:
    """Scenes with the noun or else the background of every pixel, packed as ADE20K is; returns how many there are."""
    folder, names = profile.data_dir / "segmentation" / "ade20k", [*CONCEPTS["noun"], *CONCEPTS["background"]]
    labels = []
    for seed, (part, n) in enumerate(MASKED.items()):
        for i, scene in _scenes("nouns", seed, n):
            nouns, grounds = (scene.maps[KINDS.index(kind)].astype(int) for kind in ("noun", "background"))
            ground = np.where(grounds != NONE, grounds + len(CONCEPTS["noun"]), NONE)
            numbers = np.where(nouns != NONE, nouns, ground) + 1
            labels.append(f"{part}_{i:06} {class_names('nouns')[scene.label]}")
            _save(scene.image, folder / "images" / part / f"{part}_{i:06}.jpg")
            _save(numbers.astype(np.uint8), folder / "annotations" / part / f"{part}_{i:06}.png")
    lines = ["Idx\tName", *(f"{i + 1}\t{name}" for i, name in enumerate(names))]
    (folder / "objectInfo150.txt").write_text("\n".join(lines))
    (folder / "sceneCategories.txt").write_text("\n".join(labels))
    return len(labels)


def _scenes(task: str, seed: int, n: int) -> Iterator[tuple[int, Scene]]:
    """Scenes of the first classes of a task, which take turns, with their numbers."""
    scenes = ((i, draw_scene(task, seed, i)) for i in itertools.count())
    for k in range(n):
        yield next((i, scene) for i, scene in scenes if scene.label == k % CLASSES)


def _save(image: np.ndarray, path: Path) -> None:
    """Enlarge a scene or its map to the size of the model's images and write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.NEAREST).save(path)


def report(profile: Profile, real: Profile) -> str:
    """What each notebook took in the last run, which is recorded, and what the real profile would take on this machine.

    Processor seconds are those of all cores together: on a machine that does other things too they say more. Passes are
    those over the training images, as the reader counted them.
    """
    took = record(profile).set_index("notebook")
    table = took.join(estimate(real, took.reset_index(), took["gflops"].iloc[0]))
    table.loc["all"] = table.agg({"seconds": "sum", "processor_seconds": "sum", "peak_bytes": "max", "hours": "sum",
                                  "passes": "sum"})
    head = (f"  {'Notebook':<30}{'seconds':>9}{'processor':>11}{'peak GB':>10}{'passes':>9}"
            f"{f'hours of {real.name}, at most':>26}")
    return "\n".join([head, *(f"  {row.Index:<30}{row.seconds:>9.0f}{row.processor_seconds:>11.0f}"
                              f"{row.peak_bytes / 1e9:>10.1f}{row.passes:>9.2f}{row.hours:>26,.0f}"
                              for row in table.itertuples())])


def made() -> str:
    """Make the weights and images."""
    profile = load_profile("rehearsal")
    if not (ROOT / profile.model.name / "preprocessor_config.json").is_file():
        make_weights(ROOT / profile.model.name, profile.seed)
    images, masked = draw_images(profile), draw_masks(profile)
    return f"{images} drawn images, {masked} with masks and a random ViT-B/16 are in data/{profile.name}/"


def reported() -> str:
    """What the notebooks took."""
    return report(load_profile("rehearsal"), load_profile("paper"))
