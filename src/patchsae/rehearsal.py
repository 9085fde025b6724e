"""The rehearsal: random weights and drawn images in the paper's dimensions, and what the notebooks took with them."""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from patchsae.check import costs
from patchsae.config import ROOT, Profile, load_profile
from patchsae.pretrain import build_tokenizer
from patchsae.scenes import class_names, draw_scene

SIDE, VOCABULARY, CLASSES = 224, 49_408, 8
#: Seeds of scenes, as the mini profile's splits have them.
SPLITS = {"train": 0, "test": 1}


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
    root, made = profile.data_dir / "images", 0
    wanted = [(profile.data.task, "train", profile.data.train_images)]
    wanted += [(task, "test", profile.data.test_images) for task in (profile.data.task, *profile.data.transfer)]
    for task, split, n in wanted:
        names, chosen = class_names(task), 0
        for i in range(10**6):
            scene = draw_scene(task, SPLITS[split], i)
            if scene.label < CLASSES:
                path = root / task / split / names[scene.label].replace(" ", "_") / f"{i:06}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(scene.image).resize((SIDE, SIDE), Image.Resampling.NEAREST).save(path)
                chosen += 1
            if chosen == n:
                break
        made += chosen
    return made


def report(profile: Profile, real: Profile) -> str:
    """What each notebook took in the last run, and what the real profile would take on this machine.

    The projection multiplies the measured time by the ratio of the arithmetic of the two profiles.
    """
    work, larger, lines = costs(profile), costs(real), []
    for name, cost in work.items():
        stamp = json.loads((ROOT / "build" / profile.name / f"{name}.json").read_text())
        seconds, images = stamp["seconds"], max(1, cost.images)
        lines.append(f"  {name:<24}{seconds:>9.0f}{1000 * seconds / images:>14.0f}{stamp['peak_bytes'] / 1e9:>10.1f}"
                     f"{seconds * larger[name].flops / cost.flops / 3600:>24,.0f}")
    head = f"  {'Notebook':<24}{'seconds':>9}{'ms per image':>14}{'peak GB':>10}{f'hours of {real.name} here':>24}"
    return "\n".join([head, *lines])


def main() -> None:
    """``make``: weights and images. ``report``: what the notebooks took."""
    profile = load_profile("rehearsal")
    if sys.argv[1:] == ["report"]:
        print(report(profile, load_profile("paper")))
        return
    if not (ROOT / profile.model.name / "preprocessor_config.json").is_file():
        make_weights(ROOT / profile.model.name, profile.seed)
    print(f"{draw_images(profile)} drawn images and a random ViT-B/16 are in data/{profile.name}/")


if __name__ == "__main__":
    main()
