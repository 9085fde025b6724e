"""What concept recovery is compared with: other candidates for concepts, made without labels, and a probe with them."""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2

from patchsae.activations import token_batches, training_rows, training_tokens
from patchsae.clip import Clip
from patchsae.config import Profile
from patchsae.studies.recovery import Directions, Split, latent_directions
from patchsae.train import Training, new_sae

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


def neurons(split: Split) -> Directions:
    """The D coordinates of the residual stream, high and low: 2D candidates; or of what else the split holds as z."""
    mean = split.patches.mean(0)
    return _both_ways(mean, torch.eye(len(mean)))


@torch.no_grad()
def hidden_neurons(clip: Clip, ds, layer: int, split: Split) -> Split:
    """The split with the hidden neurons of block ``layer``'s perceptron in the place of its residual stream."""
    block, some = clip.blocks[clip.block(layer)], torch.utils.data.Subset(ds, range(len(split.z)))
    parts = []
    for batch in token_batches(clip, some, clip.block(layer) - 1):
        x = batch.z + block.self_attn(block.layer_norm1(batch.z))[0]
        parts.append(block.mlp.activation_fn(block.mlp.fc1(block.layer_norm2(x))).cpu())
    return split._replace(z=torch.cat(parts))


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


def random_autoencoder(profile: Profile, clip: Clip, ds) -> Directions:
    """The latents of the autoencoder before training: a sum of random directions, cut at 0."""
    return latent_directions(new_sae(profile, clip, ds))


def shuffled_autoencoder(profile: Profile, clip: Clip, ds) -> Directions:
    """The latents of an autoencoder trained on shuffled patches.

    Each coordinate of the tokens is permuted over the tokens of the first ``MOST_IMAGES`` training images on its own,
    which keeps the distribution of every coordinate and leaves nothing of what they are together; then training as
    the profile says.
    """
    rows, s = np.arange(min(len(ds), MOST_IMAGES)), profile.sae
    batches = np.array_split(rows, -(-len(rows) // 64))
    tokens = torch.cat([z.cpu() for z in training_tokens(clip, ds, profile.model.layer).batches(batches)])
    numbers, flat = torch.Generator().manual_seed(profile.seed), tokens.flatten(0, 1)
    order = torch.stack([torch.randperm(len(flat), generator=numbers) for _ in range(flat.shape[1])], 1)
    shuffled = flat.gather(0, order).view_as(tokens)
    training = Training(new_sae(profile, clip, ds), s.learning_rate, s.l1, s.warmup, s.dead_after, s.ghost)
    for step in range(s.steps):
        rows = torch.from_numpy(training_rows(len(tokens), step, s.batch_images, profile.seed))
        training.step(shuffled[rows].to(clip.device))
    return latent_directions(training.sae)


def probe(split: Split, decay: float = 1e-5) -> Directions:
    """A supervised ceiling: logistic regression of every concept on single patch tokens, one candidate a concept."""
    z, y = split.patches, torch.from_numpy(split.positives).float()
    mean, std = z.mean(0), z.std(0)
    weight = torch.zeros(z.shape[1] + 1, y.shape[1], requires_grad=True)
    optimizer, x = torch.optim.LBFGS([weight], max_iter=80, line_search_fn="strong_wolfe"), (z - mean) / std

    def loss():
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(x @ weight[:-1] + weight[-1], y, reduction="sum") / len(y)
        (value + decay * weight[:-1].square().sum()).backward()
        return value.detach() + decay * weight[:-1].detach().square().sum()

    optimizer.step(loss)
    found = weight.detach()
    return Directions(mean, found[:-1] / std[:, None], found[-1], sparse=False)
