"""The sparse autoencoder, its loss and its metrics (sec. 3.1, eq. 1-2)."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from patchsae import variants
from patchsae.weights.formats import OWN_FORMAT, WEIGHT_ENDINGS, read_sae, sae_hash, write_folder

#: Largest exponent of a ghost gradient.
GHOST_EXPONENT = 20
#: Weight of the auxiliary loss.
AUXILIARY = 1 / 32


class SparseAutoencoder(nn.Module, PyTorchModelHubMixin):
    """A sparse autoencoder of residual-stream tokens (eq. 1).

        h     = relu((z - b_dec) W_enc + b_enc)
        z_hat = h W_dec + b_dec

    ``W_enc [D,S]``, ``b_enc [S]``, ``W_dec [S,D]`` with rows of unit length, ``b_dec [D]``.

    ``activation``: what stands in the place of relu, one of ``variants``; ``k``: active latents per token of those that
    fix it. Jumprelu has thresholds ``exp(log_threshold [S])``; batchtopk and matryoshka one ``threshold []``, which
    training estimates.
    """

    def __init__(self, d_model: int, n_latents: int, generator: torch.Generator | None = None,
                 activation: str = "relu", k: int = 0):
        super().__init__()
        self.d_model, self.n_latents = d_model, n_latents
        self.activation, self.k = activation, variants.checked_k(activation, k, n_latents)
        self.W_enc = nn.Parameter(_kaiming(d_model, n_latents, generator))
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.W_dec = nn.Parameter(_kaiming(n_latents, d_model, generator))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        if activation == "jumprelu":
            self.log_threshold = nn.Parameter(torch.full((n_latents,), variants.FIRST_THRESHOLD).log())
        if activation in variants.BATCHED:
            self.register_buffer("threshold", torch.zeros(()))
        self.normalise_decoder()

    def pre_activations(self, z: torch.Tensor) -> torch.Tensor:
        """What the activation is applied to: ``[...,D] -> [...,S]``."""
        if z.shape[-1] != self.d_model:
            raise ValueError(f"Tokens have width {z.shape[-1]}, but this autoencoder was made for {self.d_model}; "
                             "use one trained on this model.")
        return (z - self.b_dec) @ self.W_enc + self.b_enc

    def encode(self, z: torch.Tensor) -> torch.Tensor:
        """Tokens to latents: ``[...,D] -> [...,S]``."""
        return self.activate(self.pre_activations(z))

    def encode_some(self, z: torch.Tensor, latents) -> torch.Tensor:
        """Some of the latents alone, an index or several: ``[...,D] -> [...]`` or ``[...,n]``."""
        if self.activation == "topk":  # whether a latent is among the k largest depends on all of them
            return self.encode(z)[..., latents]
        return self._cut((z - self.b_dec) @ self.W_enc[:, latents] + self.b_enc[latents], latents)

    def activate(self, pre: torch.Tensor) -> torch.Tensor:
        """Pre-activations to latents, each token by itself, in training mode as well: ``[...,S] -> [...,S]``."""
        return variants.top_k(pre, self.k) if self.activation == "topk" else self._cut(pre)

    def activate_in_training(self, pre: torch.Tensor) -> torch.Tensor:
        """The same as the loss has it: batchtopk and matryoshka choose the k N largest of all N tokens ``[...,S]``."""
        return variants.batch_top_k(pre, self.k) if self.activation in variants.BATCHED else self.activate(pre)

    def _cut(self, pre: torch.Tensor, latents=slice(None)) -> torch.Tensor:
        """What is above 0 and, but for relu, above the latents' thresholds: ``[...,n] -> [...,n]``."""
        if self.activation == "relu":
            return torch.relu(pre)
        if self.activation == "jumprelu":
            return variants.JumpReLU.apply(pre, self.log_threshold[latents].exp())
        return variants.JumpReLU.apply(pre, self.threshold)

    def decode(self, h: torch.Tensor) -> torch.Tensor:
        """Latents to tokens: ``[...,S] -> [...,D]``."""
        return h @ self.W_dec + self.b_dec

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Reconstruct tokens: ``[...,D] -> [...,D]``."""
        return self.decode(self.encode(z))

    def losses(self, z: torch.Tensor, l1: float, dead: torch.Tensor | None = None,
               candidates: torch.Tensor | None = None) -> "Losses":
        """``sae_loss`` as a method, before which weights that are sharded over devices are put together."""
        return sae_loss(self, z, l1, dead, candidates)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Give every row of W_dec unit length."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Remove from W_dec's gradient its component along each row, which could only change the row's length."""
        along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
        self.W_dec.grad -= along * self.W_dec

    @torch.no_grad()
    def update_threshold(self, h: torch.Tensor) -> None:
        """After a training step with latents ``[...,S]``: batchtopk and matryoshka remember the smallest one kept."""
        if self.activation in variants.BATCHED:
            self.threshold.copy_(variants.moved_threshold(self.threshold, h))

    def fingerprint(self) -> str:
        """Hash of all weights, and of another activation than relu; statistics carry it."""
        return sae_hash(self.state_dict(), self.activation, self.k)

    def save_pretrained(self, folder: str | Path, **push) -> None:
        """Write ``config.json`` and then ``sae.safetensors``, which makes the pair complete, to a folder.

        ``push_to_hub("user/name")`` comes here with arguments of its own, and wants a model card beside the two.
        """
        write_folder(folder, self.state_dict(), self.activation, self.k)
        if push:
            self.generate_model_card().save(Path(folder) / "README.md")

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str = "cpu", revision: str | None = None) -> "SparseAutoencoder":
        """Read an autoencoder in our own or another's format (see ``formats``): a local path or a name on the hub.

        What was found in the file stands in ``sae.report``.
        """
        tensors, report = read_sae(path if Path(path).exists() else _from_hub(str(path), revision), device)
        sae = cls(*tensors["W_enc"].shape, activation=report["activation"], k=report["k"]).to(device)
        sae.load_state_dict(tensors)
        sae.report = report
        if not report["verified"] and report["format"] != OWN_FORMAT:
            warnings.warn(f"{path} is unverified, since no hash of it is known; its sha256 is {report['sha256']}.",
                          stacklevel=2)
        return sae


def _kaiming(rows: int, columns: int, generator) -> torch.Tensor:
    """Kaiming-uniform ``[rows, columns]``, with the fan-in of PyTorch's convention, as published."""
    return nn.init.kaiming_uniform_(torch.empty(rows, columns), generator=generator)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = [f"*{ending}" for ending in (".json", *WEIGHT_ENDINGS)]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"There is no autoencoder at {name}: no such file or folder, and the hub does not give "
                                "it; train one in notebook 01.") from error


class Losses(NamedTuple):
    """Scalars ``mse``, ``l1`` (sparsity, weighted), ``ghost``, ``total``; ``z_hat [...,D]`` and ``h [...,S]``."""

    mse: torch.Tensor
    l1: torch.Tensor
    ghost: torch.Tensor
    total: torch.Tensor
    z_hat: torch.Tensor
    h: torch.Tensor


def sae_loss(sae: SparseAutoencoder, z: torch.Tensor, l1: float = 8e-5, dead: torch.Tensor | None = None,
             candidates: torch.Tensor | None = None) -> Losses:
    """The training loss (eq. 2), as it is coded by the authors.

        mse   = mean of (z_hat - z)^2 / ||z||_2        the token's L2 norm, not its square
        l1    = lambda * mean over tokens of ||h||_1
        total = mse + l1 + ghost

    ``z``: ``[...,D]``; ``dead``: bool ``[S]``, latents that get the ghost term; ``candidates [K]``: latents among which
    all of those are, so that nobody has to wait for the device to count them.

    Other activations than relu change the terms: ``l1`` is lambda * mean over tokens of ||h||_0 for jumprelu, and 0
    where the number of active latents is fixed. ``mse`` is for matryoshka the mean over its prefixes, of which the
    first n latents alone reconstruct z; z_hat is that of all latents. ``ghost`` is what wakes dead latents in each
    (``_dead_loss``). Nothing here changes the autoencoder: whoever trains calls ``sae.update_threshold(h)`` besides.
    """
    pre = sae.pre_activations(z)
    h = sae.activate_in_training(pre)
    z_hat = sae.decode(h)
    m = reconstruction_error(z, z_hat)
    mse, sparsity, ghost = m.mean(), l1 * _sparsity(sae, pre, h), m.new_zeros(())
    if sae.activation == "matryoshka":
        mse = (mse + sum(_prefix_errors(sae, z, h))) / len(variants.prefixes(sae.n_latents))
    if dead is not None and candidates is None:
        candidates = dead.nonzero()[:, 0]
    if candidates is not None and len(candidates):
        ghost = _dead_loss(sae, z, z_hat, m, pre, candidates, dead[candidates])
    return Losses(mse, sparsity, ghost, mse + sparsity + ghost, z_hat, h)


def reconstruction_error(z: torch.Tensor, z_hat: torch.Tensor) -> torch.Tensor:
    """m = (z_hat - z)^2 / ||z||_2 elementwise, with the norm of the token: ``[...,D]`` (eq. 2, as coded)."""
    return (z_hat - z).square() / z.norm(dim=-1, keepdim=True)


def _sparsity(sae: SparseAutoencoder, pre: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """What lambda weighs, a mean over tokens: the L1 norm, for jumprelu the L0, or 0 where k is fixed."""
    if sae.activation in variants.FIXED:
        return h.new_zeros(())
    active = variants.Step.apply(pre, sae.log_threshold.exp()) if sae.activation == "jumprelu" else h
    return active.sum(-1).mean()


def _prefix_errors(sae: SparseAutoencoder, z: torch.Tensor, h: torch.Tensor) -> Iterator[torch.Tensor]:
    """mse of the reconstructions from the first n latents alone, for every prefix shorter than all."""
    for n in variants.prefixes(sae.n_latents)[:-1]:
        z_hat = h[..., :n] @ sae.W_dec[:n] + sae.b_dec
        yield reconstruction_error(z, z_hat).mean()


def _dead_loss(sae: SparseAutoencoder, z, z_hat, m, pre, candidates, dead: torch.Tensor) -> torch.Tensor:
    """What wakes dead latents: ghost gradients, in a form that each activation bears.

    Latents that wake at 0 have them as published. Jumprelu has exp of pre - theta, so that thresholds come down too:
    with exp of pre alone, latents jump from silence to large values on every token. With batchtopk and matryoshka ghost
    gradients diverge, since a dead latent that grows takes the places of others; they have ``auxiliary_loss``.
    """
    pre, rows = pre[..., candidates], sae.W_dec[candidates]
    if sae.activation in variants.BATCHED:
        return auxiliary_loss(z, z_hat, pre, rows, dead, sae.k)
    if sae.activation == "jumprelu":
        pre = pre - sae.log_threshold[candidates].exp()
    return ghost_loss(z, z_hat, m, pre, rows, dead)


def auxiliary_loss(z, z_hat, pre: torch.Tensor, rows: torch.Tensor, dead: torch.Tensor, k: int) -> torch.Tensor:
    """Dead latents reconstruct the residual, the k strongest of each token (after Gao et al. 2024, A.2).

        r = sg(z - z_hat);   mean of (top_k(pre[dead]) W_dec[dead] - r)^2 / ||z||_2, over 32

    Arguments as in ``ghost_loss``.
    """
    h = variants.top_k(pre.masked_fill(~dead, 0), min(k, len(dead)))
    return AUXILIARY * reconstruction_error(z, h @ rows + z_hat.detach()).mean() * dead.any()


def ghost_loss(z, z_hat, m, pre: torch.Tensor, rows: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """Ghost gradients (A.1): dead latents are asked to explain the residual, through exp of their pre-activation.

        r = sg(z - z_hat);  g = exp(pre[dead]) W_dec[dead];  g <- g sg(||r|| / (2 ||g|| + 1e-6))
        q = (g - r)^2 / ||r||_2;  ghost = mean of q sg(m / (q + 1e-6))

    ``z, z_hat, m``: ``[...,D]``; of K latents ``pre``: ``[...,K]``, ``rows`` of W_dec: ``[K,D]`` and ``dead``: bool
    ``[K]``, those that are; 0 if none is. Norms are per token. A dead latent of topk can be far above 0: where one is
    above ``GHOST_EXPONENT`` all of that token are lowered by as much, which keeps exp finite and changes nothing, since
    g is rescaled.
    """
    r = (z - z_hat).detach()
    size = r.norm(dim=-1, keepdim=True)
    # exp of minus infinity is 0, for the values and for the gradients.
    pre = pre.masked_fill(~dead, -torch.inf)
    pre = pre - (pre.detach().amax(-1, keepdim=True) - GHOST_EXPONENT).clamp_min(0)
    g = torch.exp(pre) @ rows
    g = g * (size / (2 * g.norm(dim=-1, keepdim=True) + 1e-6)).detach()
    # A token that is reconstructed exactly has r = g = 0; the clamp makes its q 0 rather than 0 / 0.
    q = (g - r).square() / size.clamp_min(torch.finfo(size.dtype).tiny)
    return (q * (m / (q + 1e-6)).detach()).mean() * dead.any()


@torch.no_grad()
def geometric_median(points: torch.Tensor, iterations: int = 100, tolerance: float = 1e-6) -> torch.Tensor:
    """The point with the least sum of distances: ``[...,N,D] -> [...,D]``.

    Weiszfeld's iteration, with Vardi and Zhang's step away from a data point that it would be caught in.
    """
    points = points.double()
    median = points.mean(-2)
    for _ in range(iterations):
        moved = _weiszfeld_step(points, median)
        done = (moved - median).norm(dim=-1).max() <= tolerance * moved.norm(dim=-1).max()
        median = moved
        if done:
            break
    return median.float()


def _weiszfeld_step(points: torch.Tensor, median: torch.Tensor) -> torch.Tensor:
    """One iteration on ``[...,N,D]`` from ``[...,D]``."""
    offset = points - median.unsqueeze(-2)
    distance = offset.norm(dim=-1, keepdim=True)
    weight = torch.where(distance > 0, 1 / distance, 0.0)
    pull, here = (weight * offset).sum(-2), (distance == 0).sum(-2)
    # The points at the median itself hold it with a force of at most their number.
    hold = (1 - here / pull.norm(dim=-1, keepdim=True).clamp_min(1e-300)).clamp_min(0)
    return median + hold * pull / weight.sum(-2).clamp_min(1e-300)


def initial_b_dec(z: torch.Tensor, how: str) -> torch.Tensor:
    """Starting value of b_dec from tokens ``[B,T,D]``: ``[D]`` (A.1).

    "geometric_median" of all tokens; "geometric_median_by_position" is the published variant (one median per
    token position, then their mean); "mean"; "zeros".
    """
    if how == "geometric_median":
        return geometric_median(z.flatten(0, 1))
    if how == "geometric_median_by_position":
        return geometric_median(z.transpose(0, 1)).mean(0)
    if how == "mean":
        return z.flatten(0, 1).mean(0)
    if how == "zeros":
        return torch.zeros(z.shape[-1], device=z.device)
    raise ValueError(f"b_dec cannot start from {how!r}; choose geometric_median, geometric_median_by_position, "
                     "mean or zeros.")


class Variance:
    """Streaming explained variance, 1 - sum ||z - z_hat||^2 / sum ||z - mean||^2, in float64.

    It is centred on the mean of ``z``: a constant prediction scores at most 0 and a perfect one 1. (The
    published training log is not centred; there a constant predictor scores 0.8.)
    """

    def __init__(self):
        self.n, self.error, self.total, self.square = 0, 0.0, 0.0, 0.0

    def add(self, z: torch.Tensor, z_hat: torch.Tensor) -> None:
        """Count tokens ``[...,D]`` and their reconstructions."""
        z, z_hat = z.reshape(-1, z.shape[-1]).double(), z_hat.reshape(-1, z.shape[-1]).double()
        if self.n == 0:
            self.shift = z.mean(0)  # sums around a point near the mean lose no digits
        self.n += len(z)
        self.error += (z - z_hat).square().sum().item()
        self.total = self.total + (z - self.shift).sum(0)
        self.square += (z - self.shift).square().sum().item()

    def explained(self) -> float:
        """Explained variance of everything counted so far."""
        if self.n == 0:
            return float("nan")
        centred = self.square - (self.total.square().sum() / self.n).item()
        return 1 - self.error / centred if centred > 0 else float("nan")
