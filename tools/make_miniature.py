"""Write everything that ``PROFILE=paper`` reads, in its own formats and in miniature, into a folder:

    python tools/make_miniature.py FOLDER

CoOp's folders and split files for every task, images with trimaps, a CLIP in the cache layout of the hub, the authors'
``out.pt``, and two profiles that read all this: ``miniature`` trains its autoencoder, ``given`` takes the authors'. The
pictures are drawn scenes and the weights random numbers; the same files, byte for byte, come out every time (1 MB).
Use it with PATCHSAE_HOME=FOLDER and HF_HOME=FOLDER/huggingface.
"""

import hashlib
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from patchsae import SparseAutoencoder
from patchsae.config import PROFILES
from patchsae.data.benchmarks import CLASS_NAMES, TABLE
from patchsae.weights.formats import write_official
from patchsae.world.pretrain import build_tokenizer
from patchsae.world.scenes import draw_scene

#: The CLIP's name on the hub, and the only revision of it.
MODEL, REVISION = "miniature/clip", hashlib.sha1(b"miniature").hexdigest()
SIDE, WIDTH, BLOCKS, EXPANSION = 32, 32, 4, 8
#: Six of ImageNet's classes, three of each half: WordNet id -> label and name.
IMAGENET = {"n01440764": (0, "tench"), "n01443537": (1, "goldfish"), "n01484850": (2, "great white shark"),
            "n01514859": (8, "hen"), "n07753592": (954, "banana"), "n07920052": (967, "espresso")}
#: Images of each class and split; of ImageNet so many more are for training that latents have ten reference images.
COUNTS, MANY = {"train": 4, "val": 1, "test": 3}, {"train": 10, "test": 4}
SIZES = ((40, 40), (60, 40), (40, 60), (90, 45))
#: Settings of the profile "paper" that are other ones here.
CHANGED = {
    "name": f'"{MODEL}@{REVISION}"', "other_layers": "[0]", "threads": "1", "train_images": "60", "test_images": "24",
    "batch_images": "12", "subset": "true", "expansion": str(EXPANSION), "steps": "40", "save_every": "20",
    "warmup": "5", "dead_after": "8", "learning_rate": "4e-3", "shots": "2", "seeds": "[1]", "depth": "3",
    "transfer_depth": "2", "epochs": "2", "own_task_epochs": "1", "transfer_epochs": "1", "images": "16"}


class Kind(NamedTuple):
    """One kind of file that data sets have: how a picture is changed and saved."""

    mode: str = "RGB"
    form: str = "JPEG"
    options: dict = {}


def _turned() -> Image.Exif:
    """What a camera that was held upright writes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


KINDS = (Kind(), Kind(options={"progressive": True, "quality": 60}), Kind("L"), Kind("CMYK"),
         Kind(options={"exif": _turned(), "subsampling": 0}), Kind("P", "PNG"))


class Pictures:
    """Drawn pictures, a new one with every call: of a class's noun, in all sizes and kinds in turn."""

    def __init__(self):
        self.drawn = defaultdict(int)

    def save(self, path: Path, label: int) -> None:
        """Write the next picture of a class."""
        turn = self.drawn[label]
        self.drawn[label] += 1
        scene = Image.fromarray(draw_scene("nouns", 0, label % 64 + 64 * turn).image)
        kind, size = KINDS[(turn + label) % len(KINDS)], SIZES[(turn // 2 + label) % len(SIZES)]
        path.parent.mkdir(parents=True, exist_ok=True)
        scene.resize(size, Image.Resampling.BILINEAR).convert(kind.mode).save(path, kind.form, **kind.options)


def some_classes(title: str) -> list[int]:
    """Two classes of the base and two of the novel half."""
    n = len(CLASS_NAMES[title])
    return [0, 1, n - 2, n - 1]


def write_lists(folder: Path, row: dict, pictures: Pictures) -> None:
    """A data set whose images CoOp's JSON names, or the lists of FGVC-Aircraft."""
    names, lists = CLASS_NAMES[row["title"]], {}
    for part, n in COUNTS.items():
        lists[part] = []
        for label in some_classes(row["title"]):
            for i in range(n):
                stem = f"{names[label].replace(' ', '_').replace('/', '_')}_{part}_{i}"
                name = f"{stem}.jpg" if row["layout"] == "aircraft" else f"{stem.rsplit('_', 2)[0]}/{stem}.jpg"
                pictures.save(folder / row["images"] / name, label)
                lists[part].append([name, label, names[label].replace(" ", "_")])
    if row["layout"] == "coop":
        (folder / row["split"]).write_text(json.dumps(lists))
        return
    (folder / "variants.txt").write_text("\n".join(names))
    for part, rows in lists.items():
        lines = [f"{name.removesuffix('.jpg')} {names[label]}" for name, label, _ in rows]
        (folder / f"images_variant_{part}.txt").write_text("\n".join(lines))


def write_folders(folder: Path, row: dict, pictures: Pictures) -> None:
    """A data set with a folder for each class, called by its WordNet id or its number."""
    for split, place in sorted(row["splits"].items()):
        if split == "train" and place == row["splits"]["test"]:
            continue
        for wnid, (label, _) in IMAGENET.items():
            name = wnid if row["layout"] == "wnid" else str(label)
            for i in range(MANY[split]):
                pictures.save(folder / place / name / f"{name}_{i}.JPEG", label)
    if row["layout"] == "wnid":
        (folder / "classnames.txt").write_text("\n".join(f"{wnid} {name}" for wnid, (_, name) in IMAGENET.items()))


def write_trimaps(folder: Path, pictures: Pictures) -> None:
    """Oxford-IIIT Pets as its authors pack it: the middle is the animal (1), around it a border (3), the rest is 2."""
    for number, name in enumerate(("Abyssinian", "american_bulldog", "basset_hound"), 1):
        for listing, n in (("trainval", 4), ("test", 3)):
            for i in range(n):
                stem, path = f"{name}_{listing}{i}", folder / "images" / f"{name}_{listing}{i}.jpg"
                pictures.save(path, 8 * number)
                with Image.open(path) as image:
                    width, height = image.size[::-1] if image.getexif().get(0x0112) == 6 else image.size
                trimap = np.full((height, width), 2, np.uint8)
                trimap[height // 5:-height // 5, width // 5:-width // 5] = 3
                trimap[height // 4:-height // 4, width // 4:-width // 4] = 1
                (folder / "annotations" / "trimaps").mkdir(parents=True, exist_ok=True)
                Image.fromarray(trimap).save(folder / "annotations" / "trimaps" / f"{stem}.png")
                with open(folder / "annotations" / f"{listing}.txt", "a") as lines:
                    lines.write(f"{stem} {number} {1 if number == 1 else 2} 1\n")


def write_model(cache: Path) -> None:
    """A random CLIP as ``huggingface_hub`` keeps a download: content in blobs, a snapshot that links to them."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    shape = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 2,
             "num_hidden_layers": BLOCKS}
    text = shape | {"vocab_size": len(tokenizer), "max_position_embeddings": 77, "pad_token_id": 0, "bos_token_id": 1,
                    "eos_token_id": 3}
    model = CLIPModel(CLIPConfig(text_config=text, projection_dim=16,
                                 vision_config=shape | {"image_size": SIDE, "patch_size": 8}))
    for name, weight in model.named_parameters():
        if name.endswith("weight") and weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)  # the usual start leaves all images alike
    repository = cache / f"models--{MODEL.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / REVISION, repository / "blobs"
    for part in (model, tokenizer, CLIPImageProcessorPil(size={"shortest_edge": SIDE},
                                                         crop_size={"height": SIDE, "width": SIDE})):
        part.save_pretrained(snapshot)
    blobs.mkdir()
    for file in sorted(snapshot.iterdir()):
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        file.symlink_to(Path("..") / ".." / "blobs" / blob.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)


def write_profiles(folder: Path) -> None:
    """The paper's profile with other numbers, once with the authors' autoencoder, on the same images."""
    text = (PROFILES / "paper.toml").read_text(encoding="utf-8")
    for key, value in CHANGED.items():
        text, n = re.subn(rf"^{key} = (\[[^]]*\]|\S+)", f"{key} = {value}", text, flags=re.M)
        if not n:
            raise SystemExit(f"paper.toml has no key {key}; mend CHANGED in {Path(__file__).name}.")
    (folder / "profiles").mkdir()
    (folder / "profiles" / "miniature.toml").write_text(text, encoding="utf-8")
    given = re.sub(r'^weights = ""', 'weights = "out.pt"', text, flags=re.M)
    (folder / "profiles" / "given.toml").write_text(given, encoding="utf-8")
    (folder / "data" / "given").mkdir()
    for name in ("images", "segmentation"):
        (folder / "data" / "given" / name).symlink_to(Path("..") / "miniature" / name)


def main(folder: Path) -> None:
    """Write it all into a folder that is not there yet."""
    if folder.exists():
        raise SystemExit(f"{folder} is there already; name a new folder.")
    pictures, data = Pictures(), folder / "data" / "miniature"
    for row in TABLE.values():
        if row["layout"] != "hub":
            write = write_lists if row["layout"] in ("coop", "aircraft") else write_folders
            write(data / "images" / row["folder"], row, pictures)
    damaged = data / "images" / "imagenet" / "images" / "train" / "n01514859" / "n01514859_3.JPEG"
    damaged.write_bytes(damaged.read_bytes()[:200])  # one that nobody can read, as large data sets have
    write_trimaps(data / "segmentation" / "oxford-pets", pictures)
    write_model(folder / "huggingface" / "hub")
    sae = SparseAutoencoder(WIDTH, EXPANSION * WIDTH, torch.Generator().manual_seed(1))
    write_official(folder / "out.pt", sae)
    write_profiles(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
