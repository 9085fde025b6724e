"""The monosemanticity score in linear time, against its definition over pairs: ``make bench-mono``.

50,000 images, 4,096 latents of which 3 % are active on an image, and a judge of 512 dimensions: the size of the paper
profile's validation set. The definition needs the cosine of every pair of images, so it is timed on the first images
only, both sides on the same ones, in float64.
"""

import argparse
import time

import torch
import torch.nn.functional as F

from patchsae.studies.interpretability import monosemanticity

ACTIVE = 0.03


def quadratic(activations: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """The definition: weighted mean cosine over all pairs of different images, ``[N,S], [N,E] -> [S]``."""
    e, a = F.normalize(embeddings.double(), dim=1), activations.double()
    a = a - a.amin(0)
    cosine, pairs = (e @ e.T).fill_diagonal_(0), torch.ones(len(a), len(a), dtype=torch.double).fill_diagonal_(0)
    return ((a.T @ cosine).T * a).sum(0) / ((a.T @ pairs).T * a).sum(0)


def data(images: int, latents: int, dimensions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sparse activations ``[N,S]`` and embeddings ``[N,E]``."""
    numbers = torch.Generator().manual_seed(0)
    activations = torch.randn(images, latents, generator=numbers)
    activations -= torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - ACTIVE))
    return activations.relu_(), torch.randn(images, dimensions, generator=numbers)


def seconds(function, *inputs) -> tuple[float, torch.Tensor]:
    """How long a call took, and what it gave."""
    start = time.perf_counter()
    result = function(*inputs)
    return time.perf_counter() - start, result


def main() -> None:
    """Time the whole set, then both sides on the first images, and compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--pairs", type=int, default=5_000, help="images of the comparison with the definition")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    activations, embeddings = data(arguments.images, 4096, 512)
    whole, _ = seconds(monosemanticity, activations, embeddings)
    few = activations[:arguments.pairs].contiguous(), embeddings[:arguments.pairs].contiguous()
    fast, found = seconds(monosemanticity, *few)
    slow, expected = seconds(quadratic, *few)
    first = [x[:500] for x in few]
    difference = (monosemanticity(*first) - quadratic(*first)).nan_to_num().abs().max().item()
    print(f"{arguments.images} x 4096, {arguments.threads} threads; comparison on {arguments.pairs} images, float64")
    print(f"BENCH monosemanticity {whole:.2f} seconds")
    print(f"BENCH monosemanticity-fast {fast:.2f} seconds")
    print(f"BENCH monosemanticity-quadratic {slow:.2f} seconds")
    print(f"BENCH monosemanticity-difference {difference:.1e} on-500-images")
    print(f"RATIO monosemanticity {slow / fast:.1f} quadratic-definition")
    worst = (found - expected).nan_to_num().abs().max().item()
    if difference > 1e-6 or worst > 1e-6:
        raise SystemExit("The linear-time score and its definition disagree; mend interpretability.monosemanticity.")


if __name__ == "__main__":
    main()
