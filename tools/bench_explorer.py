"""Time the explorer's interactions and the dashboard at 4,096 latents, on the mini CLIP with made-up weights."""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from patchsae.activations import token_batches
from patchsae.app.dashboard import chosen_latents, write_dashboard
from patchsae.app.explorer import Explorer
from patchsae.app.widget import ExplorerWidget
from patchsae.latents import collect_latents
from patchsae.sae import SparseAutoencoder
from patchsae.studies.study import open_study

N_LATENTS, L0 = 4096, 60


@torch.no_grad()
def made_up_sae(clip, ds, layer: int) -> SparseAutoencoder:
    """Random directions, with biases that let a latent fire on a share of tokens that differs a hundredfold."""
    sae = SparseAutoencoder(clip.width, N_LATENTS, torch.Generator().manual_seed(0))
    z = next(iter(token_batches(clip, ds, layer, 64))).z.flatten(0, 1)
    sae.b_dec.data = z.mean(0)
    share = np.random.default_rng(0).lognormal(sigma=1.5, size=N_LATENTS)
    share = np.minimum(share / share.mean() * L0 / N_LATENTS, 0.9)
    ranked = ((z - sae.b_dec) @ sae.W_enc).sort(0, descending=True).values
    at = torch.from_numpy((share * len(z)).astype(np.int64)).clamp(max=len(z) - 1)
    sae.b_enc.data = -ranked.gather(0, at[None])[0]
    return sae


def steps(widget: ExplorerWidget):
    """Everything a user can do, as traits to set."""
    for image in range(1, 7):
        yield "image", image
        yield "region", [1, 2, 3, 4]
        yield "latent", widget.rows[-1]["latent"]
        yield from (("mask", True), ("threshold", 0.3), ("factors", [[widget.latent, 0]]), ("hover", [2, image]))
        yield from (("scope", scope) for scope in ("image", "class", "words", "similar", "scatter", "patch"))
        yield from (("query", "car"), ("label", image), ("anchor", widget.latent), ("box", [image, image, 20, 30]))
        yield from (("mask", False), ("factors", []), ("dataset", list(widget.sizes)[image]))


def main() -> None:
    """Build, click through everything, write the dashboard."""
    study = open_study()
    study.sae = made_up_sae(study.clip, study.train, study.layer)
    study.stats = collect_latents(study.clip, study.sae, study.train, study.layer)
    explorer = Explorer(study)
    widget, times = ExplorerWidget(explorer), {}
    for name, value in steps(widget):
        begin = time.perf_counter(), time.process_time()
        setattr(widget, name, value)
        taken = time.perf_counter() - begin[0], time.process_time() - begin[1]
        times.setdefault(name, []).append([1000 * seconds for seconds in taken])
    for name, found in times.items():
        print(f"BENCH explorer-{name} {max(found)[0]:.0f} ms")
    # Where other work shares the processors, the second says what this work takes.
    for kind, column in (("slowest", 0), ("slowest-processor-time", 1)):
        print(f"BENCH explorer-{kind} {max(taken[column] for found in times.values() for taken in found):.0f} ms",
              flush=True)
    with tempfile.TemporaryDirectory() as folder:
        begin, target = time.perf_counter(), Path(folder) / "dashboard"
        write_dashboard(explorer, target, "made-up weights", chosen_latents(explorer))
        files = [path for path in target.rglob("*") if path.is_file()]
        print(f"BENCH dashboard {time.perf_counter() - begin:.0f} seconds")
        print(f"BENCH dashboard-size {sum(path.stat().st_size for path in files) / 2**20:.0f} MiB")
        print(f"BENCH dashboard-disk {sum(path.stat().st_blocks for path in files) / 2**11:.0f} MiB")


if __name__ == "__main__":
    main()
