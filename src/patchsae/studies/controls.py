"""What concept recovery is compared with: other candidates for concepts, made without labels, and a probe with them."""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2

from patchsae.activations import pixel_batches, token_batches
from patchsae.clip import Clip
from patchsae.data.datasets import Subset
from patchsae.fast.pools import training_rows
from patchsae.studies.recovery import Directions, Split, latent_directions
from patchsae.studies.study import Study
from patchsae.train import Training, new_saes
from patchsae.world.probes import fit_readout

#: Tokens that k-means and the principal components are computed from, and images that are shuffled, at most.
MOST_TOKENS, MOST_IMAGES = 2**17, 4096


def _both_ways(centre: torch.Tensor, directions: torch.Tensor) -> Directions:
    """Every direction ``[D,S]`` and its opposite: 2S candidates."""
    weight = torch.cat([directions, -directions], 1)
    return Directions(centre, weight, torch.zeros(weight.shape[1]), sparse=False)


def _some(split: Split, seed: int) -> torch.Tensor:
    """At most ``MOST_TOKENS`` patch tokens, drawn at random."""
    order = np.random.default_rng(seed).permutation(len(split.patches))
    return split.patches[torch.from_numpy(order[:MOST_TOKENS])]


def _first(ds, n: int) -> Subset:
    """The first images of a data set."""
    return Subset(ds, range(len(ds.class_names)), range(min(n, len(ds))))


def neurons(split: Split) -> Directions:
    """The D coordinates of the residual stream, high and low: 2D candidates; or of what else the split holds as z."""
    mean = split.patches.mean(0)
    return _both_ways(mean, torch.eye(len(mean)))


@torch.no_grad()
def hidden_neurons(clip: Clip, ds, layer: int, split: Split) -> Split:
    """The split with the hidden neurons of block ``layer``'s perceptron in the place of its residual stream."""
    i, hidden = clip.block(layer), []
    block = clip.blocks[i]
    for batch in pixel_batches(clip, _first(ds, len(split.z))):
        z = clip.below(batch.pixels, i - 1) if i else clip.embed(batch.pixels)
        z = z + block.self_attn(block.layer_norm1(z))[0]
        hidden.append(block.mlp.activation_fn(block.mlp.fc1(block.layer_norm2(z))).cpu())
    return split._replace(z=torch.cat(hidden))


def principal_components(split: Split, seed: int) -> Directions:
    """The D principal components of patch tokens, both ways: 2D candidates."""
    z = _some(split, seed)
    return _both_ways(z.mean(0), torch.linalg.svd(z - z.mean(0), full_matrices=False).Vh.T)


def clusters(split: Split, n: int, seed: int) -> Directions:
    """k-means centroids of patch tokens; the score is the cosine of token and centroid, both less the mean token.

    Of the scores we tried (cosine, minus the distance) this is the stronger one by far. There are as many centroids
    as tokens at most.
    """
    z = _some(split, seed)
    n = min(n, len(z))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a centroid that lost all its tokens stays where it was
        centroids, _ = kmeans2(z.numpy(), n, iter=50, minit="points", rng=seed)
    mean = z.mean(0)
    weight = F.normalize(torch.from_numpy(centroids) - mean, dim=1).T
    return Directions(mean, weight, torch.zeros(n), sparse=False, unit=True)


def random_autoencoder(study: Study) -> Directions:
    """The latents of the autoencoder before training: a sum of random directions, cut at 0."""
    return latent_directions(new_saes([study.profile], study.clip, study.train)[0])


def shuffled_autoencoder(study: Study) -> Directions:
    """The latents of an autoencoder trained on shuffled patches.

    Each coordinate of the tokens is permuted over the tokens of the first ``MOST_IMAGES`` training images on its own,
    which keeps the distribution of every coordinate and leaves nothing of what they are together; then training as
    the profile says.
    """
    clip, s, seed = study.clip, study.profile.sae, study.profile.seed
    first = _first(study.train, MOST_IMAGES)
    tokens = torch.cat([batch.z[:, :clip.n_tokens].cpu() for batch in token_batches(clip, first, study.layer)])
    numbers, flat = torch.Generator().manual_seed(seed), tokens.flatten(0, 1)
    order = torch.stack([torch.randperm(len(flat), generator=numbers) for _ in range(flat.shape[1])], 1)
    shuffled = flat.gather(0, order).view_as(tokens)
    sae = new_saes([study.profile], clip, study.train)[0]
    training = Training(sae, s.learning_rate, s.l1, s.warmup, s.dead_after, s.ghost)
    for step in range(s.steps):
        rows = torch.from_numpy(training_rows(len(tokens), step, s.batch_images, seed))
        training.step(shuffled[rows].to(clip.device))
    return latent_directions(training.sae)


def probe(split: Split) -> Directions:
    """A supervised ceiling: logistic regression of every concept on single patch tokens, one candidate a concept."""
    readout = fit_readout(split.patches, torch.from_numpy(split.positives).float(), 1e-5, iterations=80)
    return Directions(*readout, sparse=False)
