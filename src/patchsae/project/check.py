"""What a profile needs and what it will cost, before anything is computed: ``make check``."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import constants, try_to_load_from_cache

from patchsae.config import ROOT, Profile, device, load_profile
from patchsae.data.benchmarks import TABLE, missing, where_from
from patchsae.data.masked import READERS, SOURCE, masks_folder
from patchsae.studies.recovery_sweep import MATCH_IMAGES
from patchsae.weights.files import load_json
from patchsae.weights.formats import file_sha256
from patchsae.world.scenes import class_names

#: ViT-B/16, which is assumed until the model's own configuration is there: width, blocks, tokens, text embedding.
VIT_B16 = {"width": 768, "blocks": 12, "tokens": 197}
#: Where the autoencoders of the paper are.
RELEASED = "https://github.com/dynamical-inference/patchsae, or hyesulim/fastsae-models on the hub"
#: Share of the measured matrix rate that a whole pass reaches, and images that one worker decodes in a second.
EFFICIENCY, DECODED = 0.4, 400
#: Selections that notebook 05 masks with, seeds counted, plain and with the error added; values of k, on and off.
ARMS, CONDITIONS = 19, 22
#: Images that notebook 04 looks at: those on which a class is recognised, and references.
READ_04 = 64
#: Notebook 06: combinations of who selects and who classifies, and values of k, on and off; steps of a linear readout.
GRID, GRID_CONDITIONS, READOUT_STEPS = 4, 18, 100
#: Tokens of a class prompt that the text tower computes, its width and its blocks (ViT-B/16).
TEXT = {"tokens": 12, "width": 512, "blocks": 12}
#: Notebook 07: passes over the scores of all candidates, and scores that are ranked in a second on a processor core.
PASSES, RANKED = 8, 1e8
#: Images with masks for the scores of notebook 07, at most: those of ADE20K's validation part.
MASKED = 2000


class Need(NamedTuple):
    """One thing that has to be there, and the command or link that gets it."""

    name: str
    there: bool
    get: str


class Cost(NamedTuple):
    """What a notebook takes: arithmetic, images read, GB written, GB of memory, and scores ranked on the processor."""

    flops: float
    images: int
    disk: float
    memory: float
    ranked: float = 0.0


def needs(profile: Profile) -> list[Need]:
    """Weights and images that the notebooks of a profile read."""
    return [Need(f"weights {profile.model.name}", model_file(profile.model.name) is not None,
                 profile.model.get),
            *(_images(profile, task) for task in read_tasks(profile)), *_masks(profile), *_given(profile)]


def read_tasks(profile: Profile) -> list[str]:
    """Every task whose images some notebook reads, once."""
    return list(dict.fromkeys((profile.data.task, *profile.data.transfer, *profile.adaptation.tasks)))


def _masks(profile: Profile) -> list[Need]:
    """Images with masks for notebook 07, where the profile's own have no ground truth."""
    if profile.data.source == "scenes":
        return []
    folder, found = profile.data_dir / "segmentation", masks_folder(profile)
    get = profile.data.get if profile.data.source == "folders" else SOURCE
    return [Need(f"masks in {_short(folder)}/ ({', '.join(READERS)}: one of them)" if found is None else
                 f"masks in {_short(found)}/", found is not None, get)]


def _given(profile: Profile) -> list[Need]:
    """The autoencoder that a profile names instead of training one; a name of the hub is asked for when it is read."""
    name = profile.sae.weights
    there = (ROOT / name).exists() or (name.count("/") == 1 and not Path(name).suffix)
    return [Need(f"autoencoder {name}", there, RELEASED)] if name else []


def model_file(name: str) -> Path | None:
    """The file of weights of a local folder or file, or of a model of the hub in its cache on this machine, if any."""
    path = ROOT / name
    if path.is_file() or (path / "config.json").is_file():
        weights = path if path.is_file() else path / "model.safetensors"
        return weights if weights.is_file() else None
    repository, _, revision = name.partition("@")
    if repository.count("/") != 1:
        return None
    found = [try_to_load_from_cache(repository, file, revision=revision or None) for file in
             ("config.json", "preprocessor_config.json", "model.safetensors", "pytorch_model.bin")]
    weights = [Path(file) for file in found[2:] if isinstance(file, str)]
    return weights[0] if weights and all(isinstance(file, str) for file in found[:2]) else None


def weights_line(profile: Profile) -> str:
    """The hash of the weights and whether it is the one that was verified when they were fetched."""
    file, noted = model_file(profile.model.name), profile.data_dir / "fetched.json"
    if file is None:
        return "Weights: none"
    known = load_json(noted).get(file.name) if noted.is_file() else None
    digest = file_sha256(file)
    if known not in (None, digest):
        raise ValueError(f"{file} is not what was fetched, its hash has changed; remove it and {profile.model.get}.")
    return f"Weights: {file.name}, sha256 {digest}, {'verified' if known else 'unverified, no hash of it is known'}"


def _images(profile: Profile, task: str) -> Need:
    root = profile.data_dir / "images"
    if profile.data.source == "scenes":
        return Need(f"images of {task}", True, profile.data.get)
    if profile.data.source == "folders":
        trained = task in (profile.data.task, *profile.adaptation.tasks)
        needed = [root / task / split for split in (("train", "test") if trained else ("test",))]
        return Need(f"images of {task} in {_short(root / task)}/", all(p.is_dir() for p in needed), profile.data.get)
    row, absent = TABLE[task], missing(root, task)
    title = f"{row['title']} ({task}), {row['gigabytes']} GB"
    if "hub" not in row:
        return Need(f"{title}: {_short(absent[0] if absent else root / row['folder'])}", not absent, where_from(task))
    cached = (Path(constants.HF_HOME) / "datasets" / row["hub"]["id"].replace("/", "___")).is_dir()
    return Need(title, not absent or cached, " or ".join(dict.fromkeys((profile.data.get, where_from(task)))))


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


# Costs

def shape(profile: Profile) -> dict[str, int]:
    """Width, blocks and tokens of the model: its own where it is here, else ViT-B/16."""
    path = ROOT / profile.model.name / "config.json"
    if not path.is_file():
        return VIT_B16
    vision = json.loads(path.read_text())["vision_config"]
    return {"width": vision["hidden_size"], "blocks": vision["num_hidden_layers"],
            "tokens": (vision["image_size"] // vision["patch_size"]) ** 2 + 1}


class Units(NamedTuple):
    """What counting is done in. Arithmetic for an image of the tower, of one product with the autoencoder, and of
    training on it; GB of the autoencoder's weights, of CLIP's image tower, and of an image's latents; and sizes."""

    tower: float
    product: float
    training: float
    weights: float
    clip: float
    dense: float
    latents: int
    tokens: int
    width: int
    blocks: int


def units(profile: Profile) -> Units:
    """The units of a profile's model and autoencoder."""
    T, D, blocks = (shape(profile)[k] for k in ("tokens", "width", "blocks"))
    S = round(profile.sae.expansion * D)
    tower, product = blocks * (24 * T * D * D + 4 * T * T * D), 2 * T * D * S
    return Units(tower, product, tower + 6 * product, 4 * 2 * D * S / 1e9, 4 * 12 * D * D * blocks / 1e9,
                 4 * T * S / 1e9, S, T, D, blocks)


def costs(profile: Profile, anew: bool = False) -> dict[str, Cost]:
    """Notebook -> cost, by counting multiplications and additions.

    Autoencoders and tables of adaptation that are there are not made again, unless everything is counted ``anew``.
    """
    u, d, s = units(profile), profile.data, profile.sae
    others, trained = len(profile.model.other_layers), s.steps * s.batch_images
    there = len([*profile.data_dir.glob("sae/*/sae.safetensors"), *profile.run_dir.glob("sae/*/sae.safetensors")])
    more, train, test = (0 if there > 1 + others and not anew else 1 + others), d.train_images, d.test_images
    tasks, layers, seen = len(d.transfer), 2 + others, u.tower + u.product
    saved = 8 * u.latents * min(1000, d.train_images) / 1e9
    passes = {  # arithmetic, images read, autoencoders and statistics written
        "01_train_sae": (trained * u.training + 2 * test * (seen + u.product), trained + 2 * test, 3, 0),
        "02_latent_statistics": (more * trained * u.training + layers * train * seen, more * trained + layers * train,
                                 1 + others, layers),
        "03_reference_images": (tasks * test * seen, tasks * test, 0, tasks),
        "04_segmentation_masks": (READ_04 * seen, READ_04, 0, 0),
        "05_latent_ablation": (test * (4 * u.tower + (3 + ARMS) * u.product + ARMS * CONDITIONS * u.tower / u.blocks),
                               3 * test, 0, 0)}
    memory = 4 * u.weights + 5 * max(s.batch_images, d.batch_images) * u.dense + 0.6
    found = {name: Cost(flops, images, u.weights * written + saved * kept, memory)
             for name, (flops, images, written, kept) in passes.items()}
    return found | {"06_maple_adaptation": _adaptation(profile, u, memory, anew),
                    "07_measured_interpretability": _interpretability(profile, u, memory),
                    "explorer": Cost(min(64, test) * (seen + 6 * u.tower / u.blocks), min(64, test), 0, memory)}


# Notebook 06

def classes_of(profile: Profile, task: str) -> int:
    """How many classes a task has; 1 where its folders are not there."""
    if profile.data.source == "benchmarks":
        return TABLE[task]["classes"]
    if profile.data.source == "scenes":
        return len(class_names(task))
    folder = profile.data_dir / "images" / task / "test"
    return max(1, sum(path.is_dir() for path in folder.iterdir())) if folder.is_dir() else 1


def images_of(profile: Profile, task: str) -> tuple[int, int]:
    """How many training and test images of a task notebook 06 measures on."""
    counts = TABLE[task]["counts"] if profile.data.source == "benchmarks" else {}
    train = min(profile.adaptation.images, profile.data.train_images)
    return min(train, counts.get("train", train)), min(profile.data.test_images, counts.get("test", 10**9))


def training_cost(profile: Profile, u: Units, method: str, n_classes: int) -> tuple[float, int]:
    """Arithmetic and images of adapting by one method to so many classes.

    Backwards costs once the tower where it changes nothing but prompts or low ranks, twice where it changes weights;
    prompts pass the text tower, forwards and backwards, with every class in every step. CoOp leaves images alone.
    """
    s, shots = getattr(profile, method), n_classes * profile.adaptation.shots
    steps = s.epochs_of(shots) * max(1, shots // s.batch_images)
    passes = {"maple": 2, "coop": 1, "lora": 2, "fine_tuning": 3}[method]
    text = n_classes * TEXT["blocks"] * 24 * TEXT["tokens"] * TEXT["width"] ** 2
    images = steps * min(s.batch_images, shots)
    return images * passes * u.tower + steps * 2 * text * (method in ("maple", "coop")), images


def _adaptation(profile: Profile, u: Units, memory: float, anew: bool) -> Cost:
    """The tables of adaptation, what the notebook looks at besides, and the autoencoder of one adapted tower."""
    a, own, flops, images, largest = profile.adaptation, profile.data.task, 0.0, 0.0, 0
    made = (profile.data_dir / "adapted" / "latents.csv").is_file() and not anew
    again, disk = (0 if made else profile.sae.steps * profile.sae.batch_images), 0.0
    for task in a.tasks:
        (more, read), (train, test) = _tables(profile, u, task), images_of(profile, task)
        # Counts of both towers on training images, and masking by either model's.
        flops += 2 * train * (u.tower + u.product) + (0 if made else more)
        flops += GRID * min(test, a.images // 2) * (u.tower + u.product + GRID_CONDITIONS * u.tower / u.blocks)
        images, largest = images + 2 * train + 2 * test + (0 if made else read), max(largest, train // 2)
    if not made:
        carried = [training_cost(profile, u, m, classes_of(profile, own)) for m in ("maple", "coop")]
        tests = 2 * len(a.seeds) * sum(images_of(profile, task)[1] for task in a.tasks)
        flops += len(a.seeds) * sum(f for f, _ in carried) + tests * u.tower
        images += len(a.seeds) * sum(i for _, i in carried) + tests
        disk = u.weights + 2 * len(a.seeds) * len(a.tasks) * u.clip
    readout = 3 * 4 * largest * u.latents / 1e9
    return Cost(flops + again * u.training, round(images + again), disk,
                max(memory, 2 * u.clip + readout + 2 * u.weights + 1))


def _tables(profile: Profile, u: Units, task: str) -> tuple[float, float]:
    """Arithmetic and images of one task's rows: five methods and a control with every seed, and their latents.

    Latents are read of CLIP, of MaPLe with every seed, and once of the control, LoRA and fine-tuning.
    """
    n, (train, test), seeds = classes_of(profile, task), images_of(profile, task), len(profile.adaptation.seeds)
    trained = [training_cost(profile, u, m, -(-n // 2)) for m in ("maple", "coop", "lora", "fine_tuning")]
    readout = 3 * READOUT_STEPS * train * u.latents * n / 2
    latents = (train + test) * (u.tower + u.product) + test / 2 * (4 * u.tower + 2 * u.product) + readout
    flops = seeds * sum(f for f, _ in trained) + (6 * seeds + 1) * test * u.tower
    images = seeds * sum(i for _, i in trained) + (6 * seeds + 1) * test + (4 + seeds) * (train + 1.5 * test)
    return flops + (4 + seeds) * latents + train * (u.tower + u.product), images


# Notebook 07

def _interpretability(profile: Profile, u: Units, memory: float) -> Cost:
    """A second autoencoder, scores of all candidates on images with masks, and names from reference images.

    Controls that need no training have twice as many candidates as the autoencoder, most of them an untrained one.
    """
    d, s, folder = profile.data, profile.sae, masks_folder(profile)
    masked = min(MATCH_IMAGES, d.train_images) + min(MASKED, d.test_images)
    masked = masked if folder is None else min(masked, sum(1 for _ in (folder / "images").rglob("*.jpg")))
    named = min(u.latents * profile.latents.n_reference, d.train_images)
    patches, again = masked * (u.tokens - 1), s.steps * s.batch_images
    flops = masked * (3 * u.tower + (2 + PASSES) * u.product) + again * u.training
    flops += named * (u.tower + u.product + 2 * u.tower / u.blocks) + 4 * u.latents**2 * u.width
    tokens = 4 * masked * u.tokens * u.width / 1e9
    return Cost(flops, 2 * masked + again + named, u.weights, max(memory, 3 * u.weights + 2 * tokens + 2),
                PASSES * patches * u.latents)


def rate(seconds: float = 0.5) -> float:
    """Multiplications and additions a second of float32 matrix products, measured on this machine's device."""
    a = torch.randn(1024, 1024, device=device())
    a @ a
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            a @ a
        if a.is_cuda:
            torch.cuda.synchronize()
        done += 4
    return done * 2 * len(a) ** 3 / (time.perf_counter() - start)


def hours(cost: Cost, measured: float, workers: int) -> float:
    """Time of a notebook: its arithmetic or its reading, whichever takes longer, and what it ranks."""
    return (max(cost.flops / (EFFICIENCY * measured), cost.images / (DECODED * workers)) + cost.ranked / RANKED) / 3600


# Reports

def missing_lines(profile: Profile) -> list[str]:
    """What is missing, a line each with what gets it."""
    return [f"  {need.name}\n      get it: {need.get}" for need in needs(profile) if not need.there]


def report(profile: Profile) -> str:
    """Everything: what is there, what is missing, this machine, and what each notebook will take."""
    lines = [f"Profile {profile.name}", *(f"  {'there  ' if n.there else 'MISSING'}  {n.name}" for n in needs(profile))]
    if profile.data.source == "benchmarks":
        rest = (_images(profile, task) for task in TABLE if task not in read_tasks(profile))
        lines += [f"  {'there  ' if n.there else 'absent '}  {n.name} (not read by this profile)" for n in rest]
    work, measured, workers = costs(profile), rate(), os.cpu_count() or 1
    disk, free = sum(c.disk for c in work.values()), shutil.disk_usage(ROOT).free / 1e9
    need = max(c.memory for c in work.values())
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    lines += [weights_line(profile),
              f"Disk: {disk:.1f} GB will be written, {free:.0f} GB are free{_warn(disk > free)}",
              f"Memory: about {need:.1f} GB are needed on the {device()}; this machine has {have:.0f} GB"
              + (_gpu(need) if device() == "cuda" else f" and no GPU{_warn(need > have)}"),
              f"Measured: {measured / 1e9:,.0f} GFLOP/s in float32, {workers} cores", "",
              f"  {'Notebook':<30}{'hours':>10}{'GB disk':>10}{'GB memory':>11}"]
    lines += [f"  {name:<30}{hours(c, measured, workers):>10.2f}{c.disk:>10.1f}{c.memory:>11.1f}"
              for name, c in work.items()]
    return "\n".join(lines)


def _gpu(need: float) -> str:
    total = torch.cuda.get_device_properties(0).total_memory / 1e9
    return f", {torch.cuda.get_device_name(0)} {total:.0f} GB{_warn(need > total)}"


def _warn(short: bool) -> str:
    return "  <- NOT ENOUGH" if short else ""


def run(name: str | None, quiet: bool) -> str:
    """The report, or where ``quiet`` nothing; what is missing is an error."""
    profile = load_profile(name)
    lines, said = missing_lines(profile), "" if quiet else report(profile)
    if lines:
        print(said, end="\n" * bool(said))
        raise FileNotFoundError("\n".join([f"The profile {profile.name} cannot run: this is missing.", *lines,
                                           "Nothing was computed or written."]))
    return said
