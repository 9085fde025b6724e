"""The sparse autoencoder and its loss, to be read beside the paper (sec. 3.1, eq. 1-2, A.1).

What is here is the paper's own: relu and an L1 penalty. Other activations change a method or two each, in ``variants``.
"""

import warnings
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from patchsae.data import checks
from patchsae.weights.formats import OWN_FORMAT, read_sae, sae_hash, write_folder
from patchsae.weights.hub import autoencoder_folder

#: Largest exponent of a ghost gradient.
GHOST_EXPONENT = 20


class SparseAutoencoder(nn.Module, PyTorchModelHubMixin):
    """A sparse autoencoder of residual-stream tokens (eq. 1).

        h     = relu((z - b_dec) W_enc + b_enc)
        z_hat = h W_dec + b_dec

    ``W_enc [D,S]``, ``b_enc [S]``, ``W_dec [S,D]`` with rows of unit length, ``b_dec [D]``.

    ``activation``: "relu", or the name of one of ``variants``, of which an object is made then; ``k``: active latents
    per token of those that fix it.
    """

    activation, k = "relu", 0
    #: Whether a training step may look at the active latents alone (see ``fast.sparse``).
    steps_sparsely = True
    #: What the L1 norm counts for; 0 where the number of active latents is fixed.
    l1_counts = 1.0

    def __new__(cls, *arguments, **named):
        activation = named.get("activation", arguments[3] if len(arguments) > 3 else "relu")
        if cls is SparseAutoencoder and activation != "relu":
            from patchsae.variants import KINDS  # which are made of this class

            if not isinstance(activation, str) or activation not in KINDS:
                raise ValueError(f"There is no activation {activation!r}; choose one of {', '.join(KINDS)}.")
            cls = KINDS[activation]
        return super().__new__(cls, *arguments, **named)

    def __init__(self, d_model: checks.Natural, n_latents: checks.Natural, generator: torch.Generator | None = None,
                 activation: str = "relu", k: checks.Whole = 0):
        super().__init__()
        self.d_model, self.n_latents = d_model, n_latents
        self.W_enc = nn.Parameter(_kaiming(d_model, n_latents, generator))
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.W_dec = nn.Parameter(_kaiming(n_latents, d_model, generator))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.prepare(k)
        self.normalise_decoder()

    # Equation 1 -----------------------------------------------------------------------------------------

    def encode(self, z: checks.Tokens) -> torch.Tensor:
        """Tokens to latents: ``[...,D] -> [...,S]``."""
        return self.activate(self.pre_activations(z))

    def decode(self, h: checks.Latents) -> torch.Tensor:
        """Latents to tokens: ``[...,S] -> [...,D]``."""
        return h @ self.W_dec + self.b_dec

    def forward(self, z: checks.Tokens) -> torch.Tensor:
        """Reconstruct tokens: ``[...,D] -> [...,D]``."""
        return self.decode(self.encode(z))

    def pre_activations(self, z: checks.Tokens) -> torch.Tensor:
        """What the activation is applied to: ``[...,D] -> [...,S]``."""
        return (z - self.b_dec) @ self.W_enc + self.b_enc

    def encode_some(self, z: checks.Tokens, latents: checks.Indices) -> torch.Tensor:
        """Some of the latents alone, an index or several: ``[...,D] -> [...]`` or ``[...,n]``."""
        latents = torch.from_numpy(checks.indices(latents, self.n_latents, "latents"))
        return self.activate((z - self.b_dec) @ self.W_enc[:, latents] + self.b_enc[latents], latents)

    # What another activation changes --------------------------------------------------------------------

    def prepare(self, k: checks.Whole) -> None:
        """Make what the activation has of its own, thresholds for instance; relu has nothing."""

    def activate(self, pre: checks.Floats, latents=slice(None)) -> torch.Tensor:
        """Pre-activations to latents, each token by itself: ``[...,n] -> [...,n]`` of these latents."""
        return torch.relu(pre)

    def activate_in_training(self, pre: checks.Latents) -> torch.Tensor:
        """The same as the loss has it: ``[...,S] -> [...,S]``."""
        return self.activate(pre)

    def error(self, z: checks.Tokens, h: checks.Latents, m: checks.Tokens) -> torch.Tensor:
        """The reconstruction term of the loss, a scalar, from its elements ``m [...,D]``."""
        return m.mean()

    def sparsity(self, pre: checks.Latents, h: checks.Latents) -> torch.Tensor:
        """What lambda weighs, a scalar: the mean over tokens of ||h||_1."""
        return self.l1_counts * h.sum(-1).mean()

    def revive(self, z: checks.Tokens, z_hat: checks.Tokens, m: checks.Tokens, pre: checks.Latents,
               latents: checks.SomeOf, dead: checks.Chosen) -> torch.Tensor:
        """What wakes dead latents, a scalar; ``dead``: bool ``[K]``, which of the K ``latents`` are. Here the published
        ghost gradients."""
        return ghost_loss(z, z_hat, m, pre[..., latents], self.W_dec[latents], dead)

    def after_step(self, h: checks.Latents) -> None:
        """Remember what a training step with latents ``[...,S]`` tells."""

    # Training -------------------------------------------------------------------------------------------

    def losses(self, z: checks.Tokens, l1: checks.NotNegative, dead: checks.OfLatents | None = None,
               candidates: checks.SomeOf | None = None) -> "Losses":
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

    # Files ----------------------------------------------------------------------------------------------

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
    def from_pretrained(cls, path: str | Path, device: checks.Device = "cpu",
                        revision: str | None = None) -> "SparseAutoencoder":
        """Read an autoencoder in our own or another's format (see ``weights.formats``): a local path or a name on the
        hub.

        What was found in the file stands in ``sae.report``.
        """
        tensors, report = read_sae(path if Path(path).exists() else autoencoder_folder(str(path), revision), device)
        sae = SparseAutoencoder(*tensors["W_enc"].shape, activation=report["activation"], k=report["k"]).to(device)
        sae.load_state_dict(tensors)
        sae.report = report
        if not report["verified"] and report["format"] != OWN_FORMAT:
            warnings.warn(f"{path} is unverified, since no hash of it is known; its sha256 is {report['sha256']}.",
                          stacklevel=2)
        return sae


def _kaiming(rows: int, columns: int, generator) -> torch.Tensor:
    """Kaiming-uniform ``[rows, columns]``, with the fan-in of PyTorch's convention, as published."""
    return nn.init.kaiming_uniform_(torch.empty(rows, columns), generator=generator)


# Equation 2 ---------------------------------------------------------------------------------------------

class Losses(NamedTuple):
    """Scalars ``mse``, ``l1`` (sparsity, weighted), ``ghost``, ``total``; ``z_hat [...,D]`` and ``h [...,S]``."""

    mse: torch.Tensor
    l1: torch.Tensor
    ghost: torch.Tensor
    total: torch.Tensor
    z_hat: torch.Tensor
    h: torch.Tensor


def sae_loss(sae: SparseAutoencoder, z: checks.Tokens, l1: checks.NotNegative = 8e-5,
             dead: checks.OfLatents | None = None, candidates: checks.SomeOf | None = None) -> Losses:
    """The training loss (eq. 2), as it is coded by the authors.

        mse   = mean of (z_hat - z)^2 / ||z||_2        the token's L2 norm, not its square
        l1    = lambda * mean over tokens of ||h||_1
        total = mse + l1 + ghost

    ``z``: ``[...,D]``; ``dead``: bool ``[S]``, latents that get the ghost term; ``candidates [K]``: latents among which
    all of those are, so that nobody has to wait for the device to count them.

    Nothing here changes the autoencoder: whoever trains calls ``sae.after_step(h)`` besides.
    """
    pre = sae.pre_activations(z)
    h = sae.activate_in_training(pre)
    z_hat = sae.decode(h)
    m = reconstruction_error(z, z_hat)
    mse, sparsity, ghost = sae.error(z, h, m), l1 * sae.sparsity(pre, h), m.new_zeros(())
    if dead is not None and candidates is None:
        candidates = dead.nonzero()[:, 0]
    if candidates is not None and len(candidates):
        ghost = sae.revive(z, z_hat, m, pre, candidates, dead[candidates])
    return Losses(mse, sparsity, ghost, mse + sparsity + ghost, z_hat, h)


def reconstruction_error(z: checks.Tokens, z_hat: checks.Tokens) -> torch.Tensor:
    """m = (z_hat - z)^2 / ||z||_2 elementwise, with the norm of the token: ``[...,D]`` (eq. 2, as coded)."""
    return (z_hat - z).square() / z.norm(dim=-1, keepdim=True)


def ghost_loss(z: checks.Tokens, z_hat: checks.Tokens, m: checks.Tokens, pre: checks.Some,
               rows: Annotated[torch.Tensor, "K,D"], dead: checks.Chosen) -> torch.Tensor:
    """Ghost gradients (A.1): dead latents are asked to explain the residual, through exp of their pre-activation.

        r = sg(z - z_hat);  g = exp(pre[dead]) W_dec[dead];  g <- g sg(||r|| / (2 ||g|| + 1e-6))
        q = (g - r)^2 / ||r||_2;  ghost = mean of q sg(m / (q + 1e-6))

    ``z, z_hat, m``: ``[...,D]``; of K latents ``pre``: ``[...,K]``, ``rows`` of W_dec: ``[K,D]`` and ``dead``: bool
    ``[K]``, those that are; 0 if none is. Norms are per token.
    """
    r = (z - z_hat).detach()
    size = r.norm(dim=-1, keepdim=True)
    g = torch.exp(_of_the_dead(pre, dead)) @ rows
    g = g * (size / (2 * g.norm(dim=-1, keepdim=True) + 1e-6)).detach()
    # A token that is reconstructed exactly has r = g = 0; the clamp makes its q 0 rather than 0 / 0.
    q = (g - r).square() / size.clamp_min(torch.finfo(size.dtype).tiny)
    return (q * (m / (q + 1e-6)).detach()).mean() * dead.any()


def _of_the_dead(pre: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """Pre-activations ``[...,K]`` with minus infinity for latents that are not dead: exp of it is 0, for the values and
    for the gradients. Where one is above ``GHOST_EXPONENT``, as with topk it can be, all of that token are lowered by
    as much; that keeps exp finite and changes nothing, since g is rescaled."""
    pre = pre.masked_fill(~dead, -torch.inf)
    return pre - (pre.detach().amax(-1, keepdim=True) - GHOST_EXPONENT).clamp_min(0)


checks.guard(globals())
