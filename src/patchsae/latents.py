"""Statistics of every latent in one pass (sec. 3.2, eq. 3-5): frequency, strength, reference images, classes."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from patchsae.activations import token_batches
from patchsae.checkpoints import load_json, load_tensors, save_json, save_tensors
from patchsae.clip import Clip
from patchsae.sae import SparseAutoencoder

#: With fewer reference images than this, entropy and deviation of their labels are not defined (A.1).
MIN_REFERENCE = 10


@dataclass(frozen=True)
class LatentStatistics:
    """What one pass over a data set says of every latent; S latents, k reference images, C classes.

    ``frequency [S]``: share of images on which the latent is positive on any token.
    ``mean_activation [S]``: image-level activation (mean over image tokens, class token included), averaged over
    the images where it is positive; NaN where there is none.
    ``label_entropy [S]``: entropy in nats of the labels of the reference images, weighted by activation;
    ``label_std [S]``: standard deviation of those labels; both NaN with fewer than 10 reference images.
    ``reference_ids, reference_rows, reference_labels, reference_values [S,k]``: content ids, positions, labels and
    image-level activations of the strongest images, strongest first, ties by lowest position; "" , -1, -1 and 0
    where there are fewer than k.
    ``class_counts [C,S]``: tokens above ``tau``, summed over the images of each class (eq. 5).
    ``n_images``: images that were read; ``n_unreadable``: images that could not be, and are in nothing of this.
    ``sae_hash``: fingerprint of the autoencoder.
    """

    frequency: torch.Tensor
    mean_activation: torch.Tensor
    label_entropy: torch.Tensor
    label_std: torch.Tensor
    reference_ids: np.ndarray
    reference_rows: torch.Tensor
    reference_labels: torch.Tensor
    reference_values: torch.Tensor
    class_counts: torch.Tensor
    n_images: int
    tau: float
    sae_hash: str
    n_unreadable: int = 0

    def table(self) -> pd.DataFrame:
        """One row a latent: latent, frequency, mean_activation, label_entropy, label_std."""
        columns = ("frequency", "mean_activation", "label_entropy", "label_std")
        return pd.DataFrame({"latent": range(len(self.frequency))} | {c: getattr(self, c).numpy() for c in columns})

    def save(self, folder: Path) -> None:
        """Write ``latents.safetensors`` and then ``latents.json``, which makes the pair complete."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        save_tensors(folder / "latents.safetensors", {k: v for k, v in fields.items() if torch.is_tensor(v)})
        rest = {k: v for k, v in fields.items() if not torch.is_tensor(v)}
        save_json(folder / "latents.json", rest | {"reference_ids": self.reference_ids.tolist()})

    @classmethod
    def load(cls, folder: Path) -> "LatentStatistics":
        """Read what ``save`` wrote."""
        rest = load_json(folder / "latents.json", "reference_ids", "n_images", "tau", "sae_hash")
        tensors = load_tensors(folder / "latents.safetensors")
        return cls(**tensors, **(rest | {"reference_ids": np.array(rest["reference_ids"], dtype=object)}))


def collect_latents(clip: Clip, sae: SparseAutoencoder, ds, layer: int, tau: float = 0.2, n_reference: int = 10,
                    batch_images: int = 64, tokens: str = "all", title: str = "") -> LatentStatistics:
    """Statistics, reference images and class counts in one pass.

    ``tokens``: "all" image tokens, "cls" for the class token alone, or "all and prompts", which counts an adapted
    tower's prompt tokens as if they were patches, as the published code does.
    """
    running = _Running(sae.n_latents, len(ds.class_names), n_reference, tau, clip.device)
    ids, labels, rows = [], [], []
    with torch.no_grad():
        for batch in token_batches(clip, ds, layer, batch_images, title):
            # What follows the image tokens in z (an adapted tower's prompts) is not part of the image.
            z = batch.z[:, :{"cls": 1, "all": clip.n_tokens, "all and prompts": batch.z.shape[1]}[tokens]]
            running.add(sae.encode(z), batch.labels.to(clip.device))
            ids += batch.ids
            labels.append(batch.labels)
            rows.append(torch.from_numpy(batch.rows))
    return running.finish(np.array(ids, dtype=object), torch.cat(labels), torch.cat(rows), sae.fingerprint(),
                          len(getattr(ds, "unreadable", ())))


def saved_latents(folder: Path, clip: Clip, sae: SparseAutoencoder, ds, layer: int, tau: float = 0.2,
                  n_reference: int = 10, batch_images: int = 64, tokens: str = "all") -> LatentStatistics:
    """``collect_latents``, kept in ``folder`` under a key of the model, the autoencoder, the data set and the code."""
    # A kept result must not outlive a change of what computes it.
    rooms = ("latents.py", "activations.py", "sae.py", "clip.py")
    code = [Path(__file__).with_name(name).read_text() for name in rooms]
    key = [clip.fingerprint(), sae.fingerprint(), ds.fingerprint(), clip.block(layer), tau, n_reference, tokens, *code]
    folder = folder / f"latents-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    if not (folder / "latents.json").is_file():
        title = f"latents of {len(ds)} images"
        collect_latents(clip, sae, ds, layer, tau, n_reference, batch_images, tokens, title).save(folder)
    return LatentStatistics.load(folder)


class _Running:
    """Sums and strongest images of the pass so far."""

    def __init__(self, n_latents: int, n_classes: int, k: int, tau: float, device):
        self.tau, self.n_images = tau, 0
        self.active = torch.zeros(n_latents, dtype=torch.long, device=device)
        self.strength = torch.zeros(n_latents, dtype=torch.double, device=device)
        self.values = torch.zeros(n_latents, k, device=device)
        self.rows = torch.full((n_latents, k), -1, dtype=torch.long, device=device)
        self.class_counts = torch.zeros(n_classes, n_latents, dtype=torch.long, device=device)

    def add(self, h: torch.Tensor, labels: torch.Tensor) -> None:
        """Count the latents ``[B,T,S]`` of a batch of images with labels ``[B]``."""
        strength = h.mean(1)
        self.active += (strength > 0).sum(0)
        self.strength += strength.sum(0, dtype=torch.double)
        self.class_counts.index_add_(0, labels, (h > self.tau).sum(1))
        self._keep_strongest(strength)
        self.n_images += len(h)

    def _keep_strongest(self, strength: torch.Tensor) -> None:
        """Merge image-level activations ``[B,S]`` into the strongest k, for the latents where that changes them."""
        # An equal value comes later in the data set, so it does not displace: only larger ones do.
        changed = (strength.max(0).values > self.values[:, -1]).nonzero()[:, 0]
        rows = torch.arange(self.n_images, self.n_images + len(strength), device=strength.device)
        values = torch.cat([self.values[changed], strength.T[changed]], 1)
        rows = torch.cat([self.rows[changed], rows.expand(len(changed), -1)], 1)
        order = values.sort(dim=1, descending=True, stable=True).indices[:, :self.values.shape[1]]
        self.values[changed], self.rows[changed] = values.gather(1, order), rows.gather(1, order)

    def finish(self, ids: np.ndarray, labels: torch.Tensor, positions: torch.Tensor, sae_hash: str,
               n_unreadable: int) -> LatentStatistics:
        """Divide, and look up what is known of the reference images; ``positions``: of what was read."""
        rows, values = self.rows.cpu(), self.values.cpu()
        found = rows >= 0
        reference_labels = torch.where(found, labels[rows.clamp_min(0)], -1)
        enough = found.sum(1) >= min(MIN_REFERENCE, rows.shape[1])
        nothing = torch.full((len(rows),), float("nan"))
        entropy = label_entropy(reference_labels, values, len(self.class_counts))
        return LatentStatistics(
            frequency=(self.active / self.n_images).float().cpu(),
            mean_activation=(self.strength / self.active).float().cpu(),
            label_entropy=torch.where(enough, entropy, nothing),
            label_std=torch.where(enough, _masked_std(reference_labels.double(), found).float(), nothing),
            reference_ids=np.where(found.numpy(), ids[rows.clamp_min(0).numpy()], ""),
            reference_rows=torch.where(found, positions[rows.clamp_min(0)], -1),
            reference_labels=reference_labels, reference_values=values, class_counts=self.class_counts.cpu(),
            n_images=self.n_images, tau=self.tau, sae_hash=sae_hash, n_unreadable=n_unreadable)


def label_entropy(labels: torch.Tensor, values: torch.Tensor, n_classes: int, chunk: int = 4096) -> torch.Tensor:
    """Entropy of the labels of reference images, weighted by activation (sec. 3.2): ``[S,k], [S,k] -> [S]``, nats.

    p_c is the activation of class c over all; 0 means one class. Labels of -1 count for nothing.
    """
    result = []
    for part, value in zip(labels.split(chunk), values.double().split(chunk)):
        weight = torch.zeros(len(part), n_classes, dtype=torch.double)
        weight.scatter_add_(1, part.clamp_min(0), torch.where(part >= 0, value, 0.0))
        share = weight / weight.sum(1, keepdim=True)
        result.append(-torch.xlogy(share, share).sum(1))
    # Adding 0 turns the -0 of a single class into 0.
    return torch.cat(result).float() + 0.0


def _masked_std(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Population standard deviation of each row of ``[S,k]`` where the mask holds."""
    n = mask.sum(1, keepdim=True)
    mean = torch.where(mask, x, 0.0).sum(1, keepdim=True) / n
    return (torch.where(mask, x - mean, 0.0).square().sum(1) / n[:, 0]).sqrt()
