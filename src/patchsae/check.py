"""What a profile needs and what it will cost, before anything is computed: ``make check``."""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import constants, try_to_load_from_cache

from patchsae.benchmarks import TABLE, missing, where_from
from patchsae.config import ROOT, Profile, device, load_profile

#: ViT-B/16, which is assumed until the model's own configuration is there: width, blocks, tokens, text embedding.
VIT_B16 = {"width": 768, "blocks": 12, "tokens": 197}
#: Share of the measured matrix rate that a whole pass reaches, and images that one worker decodes in a second.
EFFICIENCY, DECODED = 0.4, 400
#: Selections that notebook 05 masks with, seeds counted, plain and with the error added; values of k, on and off.
ARMS, CONDITIONS = 19, 22


class Need(NamedTuple):
    """One thing that has to be there, and the command or link that gets it."""

    name: str
    there: bool
    get: str


class Cost(NamedTuple):
    """What a notebook takes: arithmetic, images read, GB written and GB of memory on the device."""

    flops: float
    images: int
    disk: float
    memory: float


def needs(profile: Profile) -> list[Need]:
    """Weights and images that the notebooks of a profile read."""
    tasks = dict.fromkeys((profile.data.task, *profile.data.transfer))
    return [Need(f"weights {profile.model.name}", has_model(profile.model.name), profile.model.get),
            *(_images(profile, task) for task in tasks)]


def has_model(name: str) -> bool:
    """Whether a local folder or file is there, or a model of the hub in its cache on this machine."""
    path = ROOT / name
    if path.is_file() or (path / "config.json").is_file():
        return path.is_file() or (path / "model.safetensors").is_file()
    repository, _, revision = name.partition("@")
    if repository.count("/") != 1:
        return False
    found = [isinstance(try_to_load_from_cache(repository, file, revision=revision or None), str)
             for file in ("config.json", "preprocessor_config.json", "model.safetensors", "pytorch_model.bin")]
    return all(found[:2]) and any(found[2:])


def _images(profile: Profile, task: str) -> Need:
    root = profile.data_dir / "images"
    if profile.data.source == "scenes":
        return Need(f"images of {task}", True, profile.data.get)
    if profile.data.source == "folders":
        needed = [root / task / split for split in (("train", "test") if task == profile.data.task else ("test",))]
        return Need(f"images of {task} in {_short(root / task)}/", all(p.is_dir() for p in needed), profile.data.get)
    row, absent = TABLE[task], missing(root, task)
    title = f"{row['title']} ({task}), {row['gigabytes']} GB"
    if "hub" not in row:
        return Need(f"{title}: {_short(absent[0] if absent else root / row['folder'])}", not absent, where_from(task))
    cached = (Path(constants.HF_HOME) / "datasets" / row["hub"]["id"].replace("/", "___").lower()).is_dir()
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


def costs(profile: Profile) -> dict[str, Cost]:
    """Notebook -> cost, by counting multiplications and additions; autoencoders that are there are not made again."""
    T, D, blocks = (shape(profile)[k] for k in ("tokens", "width", "blocks"))
    S, d, s = round(profile.sae.expansion * D), profile.data, profile.sae
    tower, product = blocks * (24 * T * D * D + 4 * T * T * D), 2 * T * D * S
    others, trained = len(profile.model.other_layers), s.steps * s.batch_images
    weights, dense = 4 * 2 * D * S / 1e9, 4 * T * S / 1e9
    there = len([*profile.data_dir.glob("sae/*/sae.safetensors"), *profile.run_dir.glob("sae/*/sae.safetensors")])
    training = trained * (tower + 6 * product)
    more, train, test = (0 if there > 1 + others else 1 + others), d.train_images, d.test_images
    tasks, layers = len(d.transfer), 2 + others
    saved = 8 * S * min(1000, d.train_images) / 1e9
    passes = {  # arithmetic, images read, autoencoders and statistics written
        "01_train_sae": (training + 2 * test * (tower + 2 * product), trained + 2 * test, 3, 0),
        "02_latent_statistics": (more * training + layers * train * (tower + product), more * trained + layers * train,
                                 1 + others, layers),
        "03_reference_images": (tasks * test * (tower + product), tasks * test, 0, tasks),
        "04_segmentation_masks": (d.batch_images * (tower + product), d.batch_images, 0, 0),
        "05_latent_ablation": (test * (4 * tower + (3 + ARMS) * product + ARMS * CONDITIONS * tower / blocks),
                               3 * test, 0, 0)}
    memory = 4 * weights + 5 * max(s.batch_images, d.batch_images) * dense + 0.6
    return {name: Cost(flops, images, weights * written + saved * kept, memory)
            for name, (flops, images, written, kept) in passes.items()}


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
    """Time of a notebook: its arithmetic or its reading, whichever takes longer."""
    return max(cost.flops / (EFFICIENCY * measured), cost.images / (DECODED * workers)) / 3600


# Reports

def missing_lines(profile: Profile) -> list[str]:
    """What is missing, a line each with what gets it."""
    return [f"  {need.name}\n      get it: {need.get}" for need in needs(profile) if not need.there]


def report(profile: Profile) -> str:
    """Everything: what is there, what is missing, this machine, and what each notebook will take."""
    lines = [f"Profile {profile.name}", *(f"  {'there  ' if n.there else 'MISSING'}  {n.name}" for n in needs(profile))]
    work, measured, workers = costs(profile), rate(), os.cpu_count() or 1
    disk, free = sum(c.disk for c in work.values()), shutil.disk_usage(ROOT).free / 1e9
    need = max(c.memory for c in work.values())
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    lines += [f"Disk: {disk:.1f} GB will be written, {free:.0f} GB are free{_warn(disk > free)}",
              f"Memory: about {need:.1f} GB are needed on the {device()}; this machine has {have:.0f} GB"
              + (_gpu(need) if device() == "cuda" else f" and no GPU{_warn(need > have)}"),
              f"Measured: {measured / 1e9:,.0f} GFLOP/s in float32, {workers} cores", "",
              f"  {'Notebook':<24}{'hours':>10}{'GB disk':>10}{'GB memory':>11}"]
    lines += [f"  {name:<24}{hours(c, measured, workers):>10.2f}{c.disk:>10.1f}{c.memory:>11.1f}"
              for name, c in work.items()]
    return "\n".join(lines)


def _gpu(need: float) -> str:
    total = torch.cuda.get_device_properties(0).total_memory / 1e9
    return f", {torch.cuda.get_device_name(0)} {total:.0f} GB{_warn(need > total)}"


def _warn(short: bool) -> str:
    return "  <- NOT ENOUGH" if short else ""


def main() -> None:
    """Print the report, or with ``--quiet`` only what is missing; the exit status is 1 where anything is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quiet", action="store_true", help="print nothing unless something is missing")
    quiet = parser.parse_args().quiet
    try:
        profile = load_profile()
        lines = missing_lines(profile)
        if not quiet:
            print(report(profile))
    except ValueError as error:
        sys.exit(str(error))
    if lines:
        sys.exit("\n".join([f"The profile {profile.name} cannot run: this is missing.", *lines,
                            "Nothing was computed or written."]))


if __name__ == "__main__":
    main()
