"""Kills trainings at random moments and compares what their continuations leave with an undisturbed one, byte by byte.

Each training of a small autoencoder on a random CLIP runs in a process of its own, which gets SIGKILL: nothing is
saved on the way out. Dense and sparse steps, whole images and shuffled tokens take turns.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import random_clip_model  # noqa: E402

import patchsae.fast.pools  # noqa: E402
from patchsae import ArrayDataset  # noqa: E402
from patchsae.clip import Clip  # noqa: E402
from patchsae.config import load_profile  # noqa: E402
from patchsae.train import train_sae  # noqa: E402

#: What takes turns: settings of the autoencoder, and whether its steps are sparse.
KINDS = [({}, False), ({"shuffle": "tokens"}, True), ({"activation": "batchtopk", "k": 4}, False),
         ({"activation": "topk", "k": 4, "shuffle": "tokens"}, True)]
STEPS = 60


def train(kind: int, folder: Path) -> None:
    """One training to its end, or from where it stands."""
    changes, sparse = KINDS[kind]
    patchsae.fast.pools.POOL_IMAGES, patchsae.fast.pools.MEMORY = 7, 0
    if sparse:
        patchsae.train.WIDE, patchsae.train.SPARSE_BELOW = 0, {"cpu": 2.0}
    settings = {"expansion": 4, "batch_images": 4, "steps": STEPS, "save_every": 3, "warmup": 5, "dead_after": 2,
                "l1": 0.1}
    profile = load_profile("mini").with_sae(**settings | changes)
    pixels = torch.randn(23, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    train_sae(profile, Clip(random_clip_model()), ArrayDataset(pixels, np.arange(23) % 5), folder)


def child(kind: int, folder: Path) -> int:
    """Start a training in a process of its own; its number."""
    sys.stdout.flush()
    number = os.fork()
    if number == 0:
        status = 1
        try:
            train(kind, folder)
            status = 0
        finally:
            os._exit(status)
    return number


def finish(kind: int, folder: Path) -> float:
    """Run a training to its end; seconds."""
    start = time.monotonic()
    _, status = os.waitpid(child(kind, folder), 0)
    if status:
        raise SystemExit("A training failed of itself; run `make test`.")
    return time.monotonic() - start


def kill(kind: int, folder: Path, after: float) -> bool:
    """Start a training and kill it after so many seconds; whether it was still at work."""
    number = child(kind, folder)
    time.sleep(after)
    if os.waitpid(number, os.WNOHANG)[0]:
        return False
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    return True


def files(folder: Path) -> dict[str, bytes]:
    """Name -> bytes; what a killed process was writing under a temporary name is left aside."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


def kills(n: int, folder: Path, seed: int = 0) -> int:
    """Kill n trainings, each at a random moment, continue them, and count those that end as if nothing had been."""
    numbers, identical, done = random.Random(seed), 0, 0
    whole = [folder / f"whole-{kind}" for kind in range(len(KINDS))]
    seconds = [finish(kind, path) for kind, path in enumerate(whole)]
    while done < n:
        kind, path = done % len(KINDS), folder / f"killed-{done}"
        path.mkdir(exist_ok=True)
        if not kill(kind, path, numbers.uniform(0.05, 0.95) * seconds[kind]):
            continue  # it had ended before; again, at another moment
        finish(kind, path)
        identical += files(path) == files(whole[kind])
        done += 1
    return identical


def main() -> None:
    """Kill, continue, count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        identical = kills(arguments.kills, Path(folder))
    print(f"BENCH training-kills {identical} of {arguments.kills} identical")
    if identical < arguments.kills:
        raise SystemExit("A continued training differs; mend src/patchsae/steps.py or train.py.")


if __name__ == "__main__":
    main()
