"""Top-k masking at the paper's dimensions, against its slow twin: ``make bench-ablation``.

A random ViT-B/16 CLIP, an autoencoder 768 -> 49,152 whose b_enc is shifted until a token has 150 latents on average
and 2 % of all latents are dead, ten values of k, on and off, and the original: 21 conditions per image. The twin
(``tests/ablation_twin.py``) runs the whole model once per condition, with a dense mask and a dense decode. Each side
is a process of its own that reads the same files, works in float32 on the same threads, and is timed from pixels to
logits; its peak memory is that of the process from then on, weights, statistics and images included.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from ablation_twin import slow_masking  # noqa: E402

from patchsae.ablation import class_order, topk_masking  # noqa: E402
from patchsae.clip import Clip  # noqa: E402
from patchsae.data.datasets import ArrayDataset  # noqa: E402
from patchsae.latents import LatentStatistics, collect_latents  # noqa: E402
from patchsae.sae import SparseAutoencoder  # noqa: E402
from patchsae.weights.files import load_tensors, save_tensors  # noqa: E402

KS = (1, 2, 5, 10, 50, 100, 500, 1000, 2000)  # and all
LAYER, L0, DEAD, N_LATENTS, CLASSES = -2, 150, 0.02, 49_152, 1000


def paper_clip() -> CLIPModel:
    """A ViT-B/16 CLIP with random weights and a text tower of one block, which nothing here uses."""
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
              "image_size": 224, "patch_size": 16}
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
            "vocab_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=512))
    torch.nn.init.constant_(model.logit_scale, np.log(100.0))
    return model


@torch.no_grad()
def sparse_sae(z: torch.Tensor, n_latents: int) -> SparseAutoencoder:
    """An autoencoder with mean L0 150 on these tokens ``[N,D]``: each latent but the dead ones fires at least once."""
    sae = SparseAutoencoder(z.shape[1], n_latents, torch.Generator().manual_seed(0))
    sae.b_dec.data = z.mean(0)
    rng = np.random.default_rng(0)
    alive = torch.from_numpy(rng.permutation(n_latents) >= DEAD * n_latents)
    weight = rng.lognormal(sigma=1.5, size=n_latents)
    more = L0 * n_latents / 49_152 * len(z) / alive.sum().item() - 1
    fires = torch.from_numpy(1 + rng.poisson(more * weight / weight.mean())).clamp(max=len(z) // 2)
    for part in torch.arange(n_latents).split(4096):
        ranked = ((z - sae.b_dec) @ sae.W_enc[:, part]).sort(0, descending=True).values
        at = torch.stack([fires[part] - 1, fires[part]])
        sae.b_enc[part] = -ranked.gather(0, at).mean(0)
    sae.b_enc[~alive] = -1e3
    return sae


def build(folder: Path, images: int, batch: int) -> None:
    """Write what both sides read."""
    clip = Clip(paper_clip())
    numbers = torch.Generator().manual_seed(1)
    pixels = torch.randn(images, 3, 224, 224, generator=numbers)
    text = torch.nn.functional.normalize(torch.randn(CLASSES, 512, generator=numbers), dim=-1)
    with torch.no_grad():
        z = clip.below(pixels, LAYER)
    sae = sparse_sae(z.flatten(0, 1), N_LATENTS)
    lat = collect_latents(clip, sae, data_set(pixels), LAYER, tau=0.0, batch_images=2)
    lat.save(folder)
    sae.save_pretrained(folder)
    clip.model.save_pretrained(folder / "clip")
    save_tensors(folder / "inputs.safetensors", {"pixels": pixels, "text": text})
    l0 = lat.class_counts.sum() / (images * clip.n_tokens)
    print(f"mean L0 {l0:.1f}, dead latents {(lat.frequency == 0).float().mean():.2%}, {images} images, "
          f"{batch} at a time, {torch.get_num_threads()} threads, float32", flush=True)


def data_set(pixels: torch.Tensor) -> ArrayDataset:
    """The images, each of a class of its own out of 1000."""
    return ArrayDataset(pixels, np.arange(len(pixels)), class_names=tuple(map(str, range(CLASSES))))


def peak_memory() -> float:
    """Most memory the process has held since the peak was last forgotten, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def run_side(side: str, folder: Path, batch: int) -> None:
    """Time one side and write its logits ``[21,B,C]``."""
    inputs = load_tensors(folder / "inputs.safetensors")
    clip, sae = Clip(CLIPModel.from_pretrained(folder / "clip")), SparseAutoencoder.from_pretrained(folder)
    lat, pixels, text = LatentStatistics.load(folder), inputs["pixels"], inputs["text"]
    # The fast side is over so soon that one run would measure what else the machine was doing.
    work, repeats = {"fast": (fast, 3), "twin": (twin, 1)}[side]
    for tensor in (*clip.model.parameters(), *sae.parameters(), *vars(lat).values()):
        torch.is_tensor(tensor) and tensor.sum()  # what is mapped from a file counts as memory once it was read
    work(clip, sae, lat, pixels[:1], text, ks=(1,), batch=1)  # starts threads and loads libraries
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        logits = work(clip, sae, lat, pixels, text, ks=(*KS, N_LATENTS), batch=batch)
        seconds.append(time.perf_counter() - start)
    numbers = torch.tensor([np.median(seconds), peak_memory()])
    save_tensors(folder / f"{side}.safetensors", {"logits": logits, "numbers": numbers})


def fast(clip, sae, lat, pixels, text, ks, batch):
    """``topk_masking`` as anybody calls it."""
    rows = topk_masking(clip, sae, data_set(pixels), lat, text, LAYER, ks, per_image=True, batch_images=batch)
    logits = torch.from_numpy(np.stack(rows[rows["mode"] != "spliced"]["logits"].to_list()))
    return logits.unflatten(0, (len(pixels), -1)).transpose(0, 1)


def twin(clip, sae, lat, pixels, text, ks, batch):
    """One forward pass per condition."""
    order, parts = class_order(lat), []
    for start in range(0, len(pixels), batch):
        part = pixels[start:start + batch]
        rankings = torch.stack([order(start + i) for i in range(len(part))])
        parts.append(torch.stack(list(slow_masking(clip, sae, part, text, LAYER, rankings, ks).values())))
    return torch.cat(parts, 1)


def report(folder: Path) -> None:
    """Print times, memory, agreement and the ratio; fail where the two sides disagree."""
    fast, twin = (load_tensors(folder / f"{side}.safetensors") for side in ("fast", "twin"))
    difference = (fast["logits"] - twin["logits"]).abs().max().item()
    best = twin["logits"].topk(2).values
    differs = fast["logits"].argmax(-1) != twin["logits"].argmax(-1)
    wrong = (differs & (best[..., 0] - best[..., 1] > 1e-4)).sum().item()
    for side, found in (("fast", fast), ("twin", twin)):
        print(f"BENCH ablation-{side} {found['numbers'][0]:.2f} seconds")
    for side, found in (("fast", fast), ("twin", twin)):
        print(f"BENCH ablation-{side}-memory {found['numbers'][1]:.0f} MiB")
    print(f"BENCH ablation-difference {difference:.2e} logits")
    print(f"BENCH ablation-predictions {wrong} differ")
    print(f"RATIO ablation {twin['numbers'][0] / fast['numbers'][0]:.1f} slow-twin")
    if difference > 1e-4 or wrong:
        raise SystemExit("The fast path and its twin disagree; mend src/patchsae/ablation.py.")


def main() -> None:
    """Build once, run both sides, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8, help="2 or more")
    parser.add_argument("--batch", type=int, default=4, help="images at a time, on both sides")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=("fast", "twin"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.side:
        return run_side(arguments.side, arguments.folder, arguments.batch)
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), arguments.images, arguments.batch)
        for side in ("fast", "twin"):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", folder], check=True,
                           env=os.environ | {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
        report(Path(folder))


if __name__ == "__main__":
    main()
