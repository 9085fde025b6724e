"""Speed at the paper's dimensions against the published algorithms: ``make bench``, ``make bench-gpu``.

A CLIP of ViT-B/16's size with random weights, an autoencoder 768 -> 49,152 whose b_enc is shifted until a token has 150
latents on average, 2 % of them dead, and drawn images of noise. Every side of a comparison is a process of its own that
reads the same files and works on the same threads; what it compares with stands in ``tools/bench_plain.py``. Both sides
must agree, or the command fails.
"""

import argparse
import copy
import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parent))
import bench_plain  # noqa: E402
import bench_table  # noqa: E402
from bench_ablation import peak_memory, sparse_sae  # noqa: E402

from patchsae.activations import read_pixels  # noqa: E402
from patchsae.clip import Clip  # noqa: E402
from patchsae.data.datasets import ArrayDataset  # noqa: E402
from patchsae.fast import onednn  # noqa: E402
from patchsae.latents import collect_latents  # noqa: E402
from patchsae.sae import SparseAutoencoder  # noqa: E402
from patchsae.train import LOOK_EVERY, Training  # noqa: E402
from patchsae.weights.files import load_tensors, save_tensors  # noqa: E402

LAYER, TAU, K, DEAD_AFTER, L1 = -2, 0.2, 10, 64, 8e-5


@dataclass(frozen=True)
class Size:
    """What is measured: ``images`` in all and ``batch`` at a time, ``steps`` timed training steps on all images,
    dimensions of the towers, latents and classes."""

    images: int = 16
    batch: int = 8
    steps: int = 2
    width: int = 768
    blocks: int = 12
    side: int = 224
    text_width: int = 512
    vocabulary: int = 49_408
    latents: int = 49_152
    classes: int = 1000


@dataclass(frozen=True)
class Inputs:
    """What every side reads: ``images [N,H,W,3]`` uint8, ``pixels [N,3,H,W]``, ``labels [N]``, ``quiet [S]``."""

    clip: Clip
    sae: SparseAutoencoder
    images: torch.Tensor
    pixels: torch.Tensor
    labels: torch.Tensor
    quiet: torch.Tensor
    size: Size

    def data_set(self, images: torch.Tensor) -> ArrayDataset:
        """Images or pixels as our code takes them."""
        labels = self.labels[:len(images)].tolist()
        return ArrayDataset(images.cpu(), labels, class_names=tuple(map(str, range(self.size.classes))))

    @torch.no_grad()
    def tokens(self) -> torch.Tensor:
        """The tokens of all images, ``[N,T,D]``."""
        return torch.cat([self.clip.below(part, LAYER) for part in self.pixels.split(self.size.batch)])


def random_clip(size: Size) -> CLIPModel:
    """A whole CLIP with random weights."""
    vision = {"hidden_size": size.width, "intermediate_size": 4 * size.width, "num_hidden_layers": size.blocks,
              "num_attention_heads": max(1, size.width // 64), "image_size": size.side, "patch_size": 16}
    text = {"hidden_size": size.text_width, "intermediate_size": 4 * size.text_width, "num_hidden_layers": size.blocks,
            "num_attention_heads": max(1, size.text_width // 64), "vocab_size": size.vocabulary, "pad_token_id": 0,
            "bos_token_id": size.vocabulary - 2, "eos_token_id": size.vocabulary - 1}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=512))


def build(folder: Path, size: Size, device: str) -> None:
    """Write what all sides read, and say what it is."""
    clip, numbers = Clip(random_clip(size).to(device)), torch.Generator().manual_seed(1)
    clip.processor = image_processor(size)
    images = torch.randint(256, (size.images, size.side, size.side, 3), dtype=torch.uint8, generator=numbers)
    pixels = clip.pixels(images).to(device)
    labels = torch.randint(size.classes, (size.images,), generator=numbers)
    with torch.no_grad():
        z = torch.cat([clip.below(part, LAYER) for part in pixels.split(size.batch)]).flatten(0, 1)
    sae, fired = awake(sparse_sae(z.cpu(), size.latents), z.cpu())
    quiet = torch.where(fired > 0, 0, DEAD_AFTER + 1)
    sae.save_pretrained(folder)
    clip.model.save_pretrained(folder / "clip")
    tensors = {"images": images, "pixels": pixels.cpu(), "labels": labels, "quiet": quiet}
    save_tensors(folder / "inputs.safetensors", tensors)
    print(f"mean L0 {fired.sum() / len(z):.1f}, dead latents {(fired == 0).float().mean():.2%}, {size.images} images, "
          f"{size.batch} at a time, {torch.get_num_threads()} threads, {device}", flush=True)


@torch.no_grad()
def awake(sae: SparseAutoencoder, z: torch.Tensor) -> tuple[SparseAutoencoder, torch.Tensor]:
    """Dead latents that are just below firing on ``z [N,D]``, where ghost gradients are numbers that count; and on how
    many tokens each latent fires, ``[S]``."""
    fired = torch.zeros(sae.n_latents)
    for part in torch.arange(sae.n_latents).split(4096):
        pre = (z - sae.b_dec) @ sae.W_enc[:, part]
        dead = sae.b_enc[part] < -999
        sae.b_enc[part] = torch.where(dead, -1.1 * pre.max(0).values.clamp_min(0) - 0.1, sae.b_enc[part])
        fired[part] = (pre + sae.b_enc[part] > 0).sum(0).float()
    return sae, fired


def image_processor(size: Size) -> CLIPImageProcessorPil:
    """CLIP's preprocessing."""
    return CLIPImageProcessorPil(size={"shortest_edge": size.side}, crop_size={"height": size.side, "width": size.side})


def read(folder: Path, size: Size, device: str) -> Inputs:
    """What ``build`` wrote, on the device."""
    tensors = load_tensors(folder / "inputs.safetensors")
    clip = Clip(CLIPModel.from_pretrained(folder / "clip").to(device), None, image_processor(size))
    sae = SparseAutoencoder.from_pretrained(folder, device)
    on_device = {name: tensors[name].to(device) for name in ("pixels", "labels", "quiet")}
    return Inputs(clip, sae, tensors["images"], size=size, **on_device)


def clock(device: str) -> float:
    """Seconds, when everything that was asked for is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(device: str, work, times: int = 1) -> tuple[float, object]:
    """Median seconds of some calls of ``work``, and what the last one gives."""
    seconds = []
    for _ in range(times):
        start = clock(device)
        result = work()
        seconds.append(clock(device) - start)
    return float(np.median(seconds)), result


# Statistics ------------------------------------------------------------------------------------------------------


def statistics_ours(x: Inputs, device: str) -> dict:
    """One pass, as anybody calls it."""
    def work(n):
        return collect_latents(x.clip, x.sae, x.data_set(x.pixels[:n]), LAYER, TAU, K, x.size.batch)

    work(1)  # starts threads and loads libraries
    seconds, lat = timed(device, lambda: work(len(x.pixels)))
    return {"seconds": seconds, "frequency": lat.frequency, "mean_activation": lat.mean_activation,
            "entropy": lat.label_entropy, "rows": lat.reference_rows, "values": lat.reference_values,
            "class_counts": lat.class_counts}


def statistics_plain(x: Inputs, device: str) -> dict:
    """The two published programs."""
    clip, sae = bench_plain.HookedClip(x.clip.model, LAYER), bench_plain.PlainSae(x.sae)

    def work(n):
        common = clip, sae, x.pixels[:n], x.labels[:n], x.size.classes
        return (bench_plain.statistics(*common, k=K, batch=x.size.batch)
                | {"class_counts": bench_plain.class_counts(*common, tau=TAU, batch=x.size.batch)})

    work(1)
    seconds, found = timed(device, lambda: work(len(x.pixels)))
    return {"seconds": seconds} | {name: value.cpu() for name, value in found.items()}


def statistics_differ(ours: dict, plain: dict) -> str:
    """Where the two sides differ by more than the rounding of a sum, or nothing."""
    n = plain["frequency"].numel()
    # A pre-activation within rounding of 0 or of tau may fall on either side.
    for name, tolerance in (("frequency", 0.0), ("class_counts", 0.0), ("mean_activation", 1e-4), ("values", 1e-4)):
        a, b = ours[name].double().nan_to_num(0), plain[name].double().nan_to_num(0)
        apart = ((a - b).abs() > tolerance * b.abs() + 1e-6).sum().item()
        if apart > 1e-3 * n:
            return f"{name} differs in {apart} places"
    known = ours["rows"] >= 0
    swapped = known & (ours["rows"] != plain["rows"])
    if (known & ~swapped).sum() < 0.99 * known.sum():
        return "reference images differ"
    return ""


# Training step ---------------------------------------------------------------------------------------------------


def steps(x: Inputs, device: str, step) -> dict:
    """Time some steps on the same tokens, after those that ours takes before it goes by the active latents alone, and
    note the loss of each."""
    z = x.tokens()
    losses = [float(step(z).detach()) for _ in range(LOOK_EVERY[device])]
    seconds = []
    for _ in range(x.size.steps):
        took, loss = timed(device, lambda: step(z))
        seconds.append(took)
        losses.append(float(loss.detach()))
    return {"seconds": float(np.median(seconds)), "losses": losses, "tokens": z.shape[0] * z.shape[1],
            "memory": torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_memory()}


def step_ours(x: Inputs, device: str) -> dict:
    """``Training`` as the profile's training calls it; on a GPU in the precision of the paper's profile."""
    training = our_training(x, device)
    return steps(x, device, lambda z: training.step(z).total)


def our_training(x: Inputs, device: str) -> Training:
    """``Training`` with some latents dead from the start."""
    precision = "bf16" if device == "cuda" else "float32"
    training = Training(copy.deepcopy(x.sae), l1=L1, dead_after=DEAD_AFTER, precision=precision)
    training.quiet = x.quiet.clone()
    training.candidates = training.dead.nonzero()[:, 0]
    return training


def step_plain(x: Inputs, device: str) -> dict:
    """The published step."""
    training = bench_plain.PlainTraining(x.sae, x.quiet, dead_after=DEAD_AFTER)
    return steps(x, device, lambda z: training.step(z)["total"])


def installed(name: str):
    """A library that need not be there; whatever goes wrong when it is imported counts as its absence."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # among them attributes that newer versions of its own dependencies lack
        raise NotInstalled(str(error).splitlines()[0]) from error


class NotInstalled(Exception):
    """A library that cannot be imported, and why."""


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> torch.Tensor:
    """Backwards and one step; the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def step_overcomplete(x: Inputs, device: str) -> dict:
    """A step of the plain autoencoder of ``overcomplete``: L1, no ghost gradients, no unit rows."""
    library = installed("overcomplete.sae")
    model = library.SAE(x.size.width, nb_concepts=x.size.latents, device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-4)

    def step(z):
        tokens = z.flatten(0, 1)
        _, h, z_hat = model(tokens)
        return descend(optimizer, (z_hat - tokens).square().mean() + L1 * h.abs().sum(-1).mean())

    return steps(x, device, step)


def step_sae_lens(x: Inputs, device: str) -> dict:
    """A step of the standard autoencoder of ``sae-lens``, from our weights: L1, no ghost gradients."""
    library, data = installed("sae_lens.saes.standard_sae"), installed("sae_lens.saes.sae").TrainStepInput
    model = library.StandardTrainingSAE(library.StandardTrainingSAEConfig(
        d_in=x.size.width, d_sae=x.size.latents, l1_coefficient=L1, device=device))
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            getattr(model, name).copy_(getattr(x.sae, name))
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-4)
    dead = x.quiet > DEAD_AFTER

    def step(z):
        known = inspect.signature(data).parameters
        values = {"sae_in": z.flatten(0, 1), "coefficients": {"l1": L1}, "dead_neuron_mask": dead,
                  "n_training_steps": 0, "is_logging_step": False}
        given = data(**{name: value for name, value in values.items() if name in known})
        return descend(optimizer, model.training_forward_pass(given).loss)

    return steps(x, device, step)


def losses_differ(ours: dict, plain: dict) -> str:
    """Where the losses of the same steps are further apart than rounding, or nothing."""
    tolerance = 1e-4 if ours["device"] == "cpu" else 2e-2
    apart = max(abs(a - b) / abs(b) for a, b in zip(ours["losses"], plain["losses"]))
    return f"losses differ by {apart:.1e} of themselves" if apart > tolerance else ""


# Tower and everything from images --------------------------------------------------------------------------------


@torch.no_grad()
def tower_ours(x: Inputs, device: str) -> dict:
    """Tokens below the cut, as the statistics pass computes them."""
    with onednn.Linears(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        x.clip.below(x.pixels[:1], LAYER)
        seconds, z = timed(device, x.tokens, 2)
    return {"seconds": seconds, "z": z.float().cpu()}


@torch.no_grad()
def tower_plain(x: Inputs, device: str) -> dict:
    """The whole CLIP with a hook."""
    clip = bench_plain.HookedClip(x.clip.model, LAYER)
    clip(x.pixels[:1])
    seconds, z = timed(device, lambda: torch.cat([clip(part) for part in x.pixels.split(x.size.batch)]), 2)
    return {"seconds": seconds, "z": z.float().cpu()}


def tokens_differ(ours: dict, plain: dict) -> str:
    """Where tokens are further apart than rounding, or nothing."""
    apart = (ours["z"] - plain["z"]).norm() / plain["z"].norm()
    return f"tokens differ by {apart:.1e} of their norm" if apart > (1e-4 if ours["device"] == "cpu" else 5e-2) else ""


def images_ours(x: Inputs, device: str, autoencoders: int = 1) -> dict:
    """A training step from uint8 images: crop, normalise on the device, tokens below the cut, one step of each of some
    autoencoders."""
    several = [our_training(x, device) for _ in range(autoencoders)]
    ds, rows = x.data_set(x.images), np.array_split(np.arange(len(x.images)), -(-len(x.images) // x.size.batch))

    def work():
        with torch.no_grad():
            z = torch.cat([x.clip.below(batch.pixels, LAYER) for batch in read_pixels(x.clip, ds, rows)])
        return [training.step(z).total for training in several][-1]

    return _from_images(x, device, work)


def images_two(x: Inputs, device: str) -> dict:
    """Two autoencoders in one pass."""
    return images_ours(x, device, 2)


def images_plain(x: Inputs, device: str) -> dict:
    """The same as published: the library's image processor, the whole CLIP with a hook, the dense step."""
    training = bench_plain.PlainTraining(x.sae, x.quiet, dead_after=DEAD_AFTER)
    clip, processor = bench_plain.HookedClip(x.clip.model, LAYER), x.clip.processor

    def work():
        parts = []
        for images in x.images.split(x.size.batch):
            pixels = processor(images=list(images.numpy()), return_tensors="pt")["pixel_values"].to(device)
            with torch.no_grad():
                parts.append(clip(pixels))
        return training.step(torch.cat(parts))["total"]

    return _from_images(x, device, work)


def _from_images(x: Inputs, device: str, work) -> dict:
    losses = [float(work().detach()) for _ in range(LOOK_EVERY[device])]
    seconds, loss = timed(device, work)
    return {"seconds": seconds, "losses": [*losses, float(loss.detach())], "tokens": len(x.images) * x.clip.n_tokens}


# Roofline --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def roofline(x: Inputs, device: str) -> dict:
    """What this machine reaches: GFLOP/s of a product of the autoencoder's shape, GB/s of a copy."""
    tokens, width, n = x.size.batch * x.clip.n_tokens, x.size.width, min(4096, x.size.latents)
    kinds = {"float32": torch.float32} | ({"bfloat16": torch.bfloat16} if device == "cuda" else {})
    found = {}
    for name, dtype in kinds.items():
        a, b = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((tokens, width), (n, width)))
        plain = min(timed(device, lambda a=a, b=b: a @ b.T)[0] for _ in range(6))
        best = min(plain, *(timed(device, lambda a=a, b=b: onednn.linear(a, b))[0] for _ in range(6)))
        found |= {f"{name}-library": 2e-9 * tokens * width * n / plain, name: 2e-9 * tokens * width * n / best}
    source = torch.ones(2**26 if x.size.width >= 512 else 2**16, device=device)
    target = torch.empty_like(source)
    copy = min(timed(device, lambda: target.copy_(source))[0] for _ in range(4))
    return found | {"bandwidth": 8e-9 * source.numel() / copy}


SIDES = {"roofline": roofline, "statistics-ours": statistics_ours, "statistics-plain": statistics_plain,
         "sae-step-ours": step_ours, "sae-step-plain": step_plain, "sae-step-overcomplete": step_overcomplete,
         "sae-step-sae-lens": step_sae_lens, "tower-ours": tower_ours, "tower-plain": tower_plain,
         "from-images-ours": images_ours, "from-images-two": images_two,
         "from-images-plain": images_plain}
CHECKS = {"statistics": statistics_differ, "sae-step": losses_differ, "tower": tokens_differ,
          "from-images": losses_differ}


def run_side(side: str, folder: Path, size: Size, device: str) -> None:
    """Do the work of one side and write what it found; a library that is not there writes that."""
    try:
        found = SIDES[side](read(folder, size, device), device) | {"device": device}
    except NotInstalled as error:
        found = {"missing": str(error)}
    tensors = {name: value.contiguous() for name, value in found.items() if torch.is_tensor(value)}
    save_tensors(folder / f"{side}.safetensors", tensors | {"nothing": torch.zeros(1)})
    rest = {name: value for name, value in found.items() if not torch.is_tensor(value)}
    (folder / f"{side}.json").write_text(json.dumps(rest))


def found_by(side: str, folder: Path) -> dict:
    """What ``run_side`` wrote."""
    return load_tensors(folder / f"{side}.safetensors") | json.loads((folder / f"{side}.json").read_text())


def compare(folder: Path, sides) -> list[str]:
    """What the two sides of each comparison disagree about."""
    wrong = []
    for row, check in CHECKS.items():
        if {f"{row}-ours", f"{row}-plain"} <= set(sides):
            difference = check(found_by(f"{row}-ours", folder), found_by(f"{row}-plain", folder))
            wrong += [f"{row}: {difference}"] if difference else []
    return wrong


def main() -> None:
    """Build once, run every side, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--images", type=int, help="16, or 128 on a GPU")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="names of rows, with commas between them")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("There is no CUDA device here; run make bench instead.")
        torch.backends.cuda.matmul.allow_tf32 = True
    size = Size(images=arguments.images or (128 if arguments.device == "cuda" else 16),
                batch=32 if arguments.device == "cuda" else 8, steps=10 if arguments.device == "cuda" else 2)
    if arguments.side:
        return run_side(arguments.side, arguments.folder, size, arguments.device)
    sides = [s for s in SIDES if not arguments.only or s.startswith(tuple(arguments.only.split(",")))]
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), size, arguments.device)
        quiet = os.environ | {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        for side in sides:
            print(f"... {side}", flush=True)
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", folder], check=True,
                           env=quiet)
        found = {side: found_by(side, Path(folder)) for side in sides}
        table = bench_table.rows(found, asdict(size), arguments.device)
        print(bench_table.lines(found, asdict(size)))
        bench_table.write(table, arguments.device, arguments.threads, arguments.write_docs)
        if wrong := compare(Path(folder), sides):
            raise SystemExit("The two sides disagree. " + "; ".join(wrong) + ".")


if __name__ == "__main__":
    main()
