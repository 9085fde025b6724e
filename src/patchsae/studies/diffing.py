"""What is different between two towers' tokens of the same images: what a dictionary leaves out, and a crosscoder.

Tokens are ``[N,T,D]`` everywhere, the class token first and without prompt tokens; ``before`` is of CLIP and ``after``
of the adapted tower. A latent of the crosscoder has one activation and two decoder rows, so that the rows' lengths say
in which of the towers it is there (Lindsey et al. 2024; with BatchTopK Minder et al. 2025).
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from patchsae.activations import token_batches
from patchsae.clip import Clip
from patchsae.config import SaeSettings
from patchsae.data.images import Images
from patchsae.fast.pools import training_rows
from patchsae.sae import SparseAutoencoder
from patchsae.studies.adapt import Adapted
from patchsae.studies.intervals import bootstrap
from patchsae.train import Training
from patchsae.variants import BatchTopK

#: Training of a crosscoder: images of a step, rate, steps of warming up, steps of silence until a latent is revived.
BATCH_IMAGES, RATE, WARM_UP, DEAD_AFTER = 8, 2e-3, 100, 64
#: A latent is of one tower alone from this relative norm on, and where the other tower has so little of it in what is
#: left of the tokens and in what is reconstructed (Minder et al. 2025).
NORM, LEFT, RECONSTRUCTED = 0.9, 0.2, 0.5
#: Planted changes: their kinds, directions of each, share of the patches that a rare one is on, and cosine from which
#: one counts as found.
KINDS, EACH, RARE, FOUND = ("added", "with its concept", "rare", "removed"), 5, 0.001, 0.7
#: Its two decoder rows differ from this on, in lengths of the longer one.
CHANGED = 0.3


class Tokens(NamedTuple):
    """Of N images: ``z [N,T,D]``, the prompt tokens beside them ``[N,n,D]``, and ``labels [N]``."""

    z: torch.Tensor
    prompts: torch.Tensor
    labels: torch.Tensor


@torch.no_grad()
def read_tokens(tower: Clip, ds: Images, layer: int) -> Tokens:
    """The tokens of all images of a data set."""
    batches = [(batch.z[:, :tower.n_tokens], batch.z[:, tower.n_tokens:], batch.labels)
               for batch in token_batches(tower, ds, layer)]
    return Tokens(*(torch.cat(parts).cpu() for parts in zip(*batches)))


@torch.no_grad()
def change_left_out(sae: SparseAutoencoder, before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """R, the share of a change of tokens that an autoencoder leaves out, and its interval over images.

        R = sum ||dz - dz_hat||^2 / sum ||dz||^2,   dz = after - before,   dz_hat = sae(after) - sae(before)

    NaN where nothing changed.
    """
    change = after - before
    sums = torch.stack([(change - (sae(after) - sae(before))).square().sum((1, 2)), change.square().sum((1, 2))], 1)
    if not sums[:, 1].any():
        return dict.fromkeys(("R", "low", "high"), np.nan)
    sums = sums.double().cpu().numpy()
    ends = bootstrap(lambda counts: np.divide(*(counts @ sums).T)[:, None], len(sums), draws=500)
    return {"R": float(np.divide(*sums.sum(0))), "low": float(ends[0][0]), "high": float(ends[1][0])}


def continued(sae: SparseAutoencoder, z: torch.Tensor, settings: SaeSettings, steps: int) -> SparseAutoencoder:
    """An autoencoder trained for so many more steps of the profile's [sae] ``settings``, on tokens ``[N,T,D]``."""
    training = Training(copy.deepcopy(sae).requires_grad_(True), settings.learning_rate, settings.l1, steps // 10,
                        settings.dead_after, settings.ghost)
    return _trained(training, z, steps, settings.batch_images, 0)


def _trained(training: Training, z: torch.Tensor, steps: int, batch_images: int, seed: int) -> SparseAutoencoder:
    for step in range(steps):
        training.step(z[torch.from_numpy(training_rows(len(z), step, batch_images, seed))])
    training.sae.normalise_decoder()
    return training.sae


# The crosscoder -----------------------------------------------------------------------------------------

class Crosscoder(BatchTopK):
    """A BatchTopK autoencoder of the tokens of two towers side by side, ``[...,2D]``, before the change first.

    Kept are the k N largest of f_j (||d_j before|| + ||d_j after||), ``d`` being the two halves of a decoder row. Which
    those are does not depend on how long a whole row is, so that rows have unit length as in every autoencoder here.
    """

    def decoders(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoder rows of the two towers, ``[S,D]`` each."""
        return self.W_dec.chunk(2, dim=1)

    def _lengths(self) -> torch.Tensor:
        return sum(rows.norm(dim=1) for rows in self.decoders()).detach()

    def activate(self, pre: torch.Tensor, latents=slice(None)) -> torch.Tensor:
        lengths = self._lengths()[latents]
        return super().activate(pre * lengths, latents) / lengths

    def activate_in_training(self, pre: torch.Tensor) -> torch.Tensor:
        lengths = self._lengths()
        return super().activate_in_training(pre * lengths) / lengths

    def after_step(self, h: torch.Tensor) -> None:
        super().after_step(h * self._lengths())


def train_crosscoder(before: torch.Tensor, after: torch.Tensor, n_latents: int, k: int, steps: int,
                     seed: int) -> Crosscoder:
    """Train a crosscoder of ``n_latents``, k of them active per token, on the tokens of two towers.

    Both decoder rows of a latent start as one, and the encoder as the decoder, so that what training has not touched is
    the same in both towers.
    """
    z = torch.cat([before, after], -1)
    crosscoder = Crosscoder(z.shape[-1], n_latents, torch.Generator().manual_seed(seed), "batchtopk", k).to(z.device)
    crosscoder.b_dec.data = z.flatten(0, 1).mean(0)
    crosscoder.W_dec.data = F.normalize(crosscoder.decoders()[0].detach().repeat(1, 2), dim=1)
    crosscoder.W_enc.data = crosscoder.W_dec.data.T.clone()
    return _trained(Training(crosscoder, RATE, 0, WARM_UP, DEAD_AFTER), z, steps, BATCH_IMAGES, seed)


@torch.no_grad()
def crosscoder_latents(crosscoder: Crosscoder, before: torch.Tensor, after: torch.Tensor) -> pd.DataFrame:
    """One row per latent: frequency, relative_norm, change, nu_error, nu_reconstruction, specific.

        change        = ||d after - d before|| / max(||d after||, ||d before||)
        relative norm = (1 + (||d after|| - ||d before||) / max(||d after||, ||d before||)) / 2
        beta(Y, d)    = d^T (Y^T f) / (||f||^2 ||d||^2)        nu = beta(Y of the other tower) / beta(Y of its own)

    ``d`` is the decoder row of the tower in which the latent is longer, which is its own; Y is, for the error, what the
    other latents leave of a tower's tokens, and the reconstruction for the reconstruction. ``specific``: "after" or
    "before" of latents that are one tower's alone (``NORM``, ``LEFT``, ``RECONSTRUCTED``), else "".
    """
    pair, rows = torch.cat([before, after], -1).flatten(0, 1), crosscoder.decoders()
    f = crosscoder.encode(pair)
    z_hat = crosscoder.decode(f)
    left = [error.T @ f + f.square().sum(0) * d.T for error, d in zip((pair - z_hat).chunk(2, 1), rows)]
    told = [part.T @ f for part in (z_hat - crosscoder.b_dec).chunk(2, 1)]
    lengths = torch.stack([d.norm(dim=1) for d in rows])
    relative = (1 + (lengths[1] - lengths[0]) / lengths.amax(0)) / 2
    longer = (lengths[1] > lengths[0]).long()
    own = torch.where(longer[:, None] == 1, rows[1], rows[0])
    table = {"frequency": (f > 0).float().mean(0), "relative_norm": relative,
             "change": (rows[1] - rows[0]).norm(dim=1) / lengths.amax(0)}
    for name, sums in (("nu_error", left), ("nu_reconstruction", told)):
        beta = torch.stack([(own * part.T).sum(1) for part in sums])  # up to a factor that both towers share
        table[name] = beta.gather(0, 1 - longer[None])[0] / beta.gather(0, longer[None])[0]
    table = pd.DataFrame({name: values.cpu().numpy() for name, values in table.items()})
    alone = (table["nu_error"].abs() < LEFT) & (table["nu_reconstruction"].abs() < RECONSTRUCTED) & (
        table["frequency"] > 0)
    return table.assign(specific=np.select([alone & (table["relative_norm"] >= NORM),
                                            alone & (table["relative_norm"] <= 1 - NORM)], ["after", "before"], ""))


@torch.no_grad()
def patched_share(crosscoder: Crosscoder, after: Adapted, class_names: Sequence[str], tokens: Sequence[Tokens],
                  layer: int, latents: np.ndarray) -> float:
    """How much of what an adapted model makes of a change some latents of a crosscoder carry.

        1 - KL(adapted || patched) / KL(adapted || before),   patched = before + sum_j f_j (d_j after - d_j before)

    ``tokens``: of the same images before and after. The divergences are of class probabilities, means over images, all
    read by the adapted tower above the cut with its own prompt tokens beside them.
    """
    text, (before, seen), (first, second) = after.text(class_names), tokens, crosscoder.decoders()
    sums = torch.zeros(2, dtype=torch.double)
    for z, z_after, prompts in zip(*(part.split(64) for part in (before.z, seen.z, seen.prompts))):
        f = crosscoder.encode(torch.cat([z, z_after], -1))[..., latents]
        patched = z + f @ (second - first)[latents]
        told = [after.tower.logits(after.tower.above(torch.cat([part, prompts], 1), layer), text).log_softmax(1)
                for part in (z_after, z, patched)]
        sums += torch.stack([F.kl_div(other, told[0], reduction="sum", log_target=True) for other in told[1:]]).cpu()
    return float(1 - sums[1] / sums[0])


# Changes that are known ---------------------------------------------------------------------------------

class Planted(NamedTuple):
    """Tokens ``after [N,T,D]`` that differ from CLIP's in known ``directions [K,D]`` of unit length, by kind."""

    after: torch.Tensor
    directions: torch.Tensor
    kinds: list[str]


@torch.no_grad()
def plant(sae: SparseAutoencoder, z: torch.Tensor, positives: np.ndarray, seed: int) -> Planted:
    """Change the patch tokens of CLIP in ``EACH`` directions of each kind; ``positives [N(T-1),C]``: their concepts.

    "added": a random direction on half of the patches of a concept, drawn at random; "with its concept": on all of
    them; "rare": on ``RARE`` of all patches, drawn at random; each as long as half of a token's distance from the mean.
    "removed": what the autoencoder decodes of one of its strongest latents is taken away.
    """
    numbers, patches = torch.Generator().manual_seed(seed), z[:, 1:].flatten(0, 1).clone()
    length = (patches - patches.mean(0)).norm(dim=1).mean() / 2
    shown = torch.from_numpy(positives)
    often = shown.sum(0).argsort(descending=True)[:4 * EACH]
    concepts = often[torch.randperm(len(often), generator=numbers)]
    h = sae.encode(patches)
    strong = h.square().mean(0).argsort(descending=True)[:4 * EACH]
    strong = strong[torch.randperm(len(strong), generator=numbers)]
    directions, kinds = [], [kind for kind in KINDS for _ in range(EACH)]
    for i, kind in enumerate(kinds):
        if kind == "removed":
            latent = strong[i % EACH]
            direction, amount = sae.W_dec[latent], -h[:, latent]
        else:
            direction = F.normalize(torch.randn(z.shape[-1], generator=numbers), dim=0)
            chance = torch.rand(len(patches), generator=numbers)
            where = chance < RARE if kind == "rare" else shown[:, concepts[i]] & (
                chance < (0.5 if kind == "added" else 1))
            amount = length * where
        patches += amount[:, None] * direction
        directions.append(direction)
    after = torch.cat([z[:, :1], patches.view_as(z[:, 1:])], 1)
    return Planted(after, torch.stack(directions), kinds)


@torch.no_grad()
def detected(crosscoder: Crosscoder, latents: pd.DataFrame, planted: Planted | None = None) -> pd.DataFrame:
    """What three rules find of planted changes: columns rule, kind, recall, false_positives.

    "norm" and "norm and scaling" name latents that are one tower's alone, "change" those whose decoder rows differ. A
    direction is found if a latent so named has it (its difference of decoder rows, with a cosine of ``FOUND``); of the
    active latents, those are false that are named and lie outside of what was planted. Without ``planted`` all are.
    """
    alive = latents["frequency"].to_numpy() > 0
    named = {"norm": (latents["relative_norm"] - 0.5).abs() >= NORM - 0.5,
             "norm and scaling": latents["specific"] != "", "change": latents["change"] >= CHANGED}
    named = {rule: chosen.to_numpy() & alive for rule, chosen in named.items()}
    if planted is None:
        return pd.DataFrame([{"rule": rule, "kind": "nothing", "false_positives": chosen.sum() / alive.sum()}
                             for rule, chosen in named.items()])
    first, second = crosscoder.decoders()
    change, inside = F.normalize(second - first, dim=1).cpu(), torch.linalg.qr(planted.directions.T)[0]
    same = (change @ planted.directions.T).abs().numpy() >= FOUND
    outside = ((change @ inside).norm(dim=1) < FOUND).numpy()
    return pd.DataFrame([{"rule": rule, "kind": kind, "false_positives": (chosen & outside).sum() / alive.sum(),
                          "recall": same[chosen][:, np.array(planted.kinds) == kind].any(0).mean()}
                         for rule, chosen in named.items() for kind in KINDS])
