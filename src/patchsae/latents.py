"""Statistics of every latent in one pass (sec. 3.2, eq. 3-5): frequency, strength, reference images, classes."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch

from patchsae.activations import finite_tokens, pixel_batches
from patchsae.clip import Clip
from patchsae.data.adapters import as_images
from patchsae.data.checks import Layer, Natural, NotNegative, Whole, guard
from patchsae.data.images import Images
from patchsae.fast import onednn, processes
from patchsae.fast.encoder import Encoder
from patchsae.fast.share import Share
from patchsae.sae import SparseAutoencoder
from patchsae.weights.files import load_json, load_tensors, result_key, save_json, save_tensors

#: With fewer reference images than this, entropy and deviation of their labels are not defined (A.1).
MIN_REFERENCE = 10
#: What is counted of an image.
TOKENS = ("all", "cls", "all and prompts")
PerLatent = Annotated[torch.Tensor, "S"]
#: Raised whenever what is computed here changes: statistics that were kept before are then computed anew.
VERSION = 1


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
    ``block``: the last one below the cut; ``class_names``: of the rows of ``class_counts``; ``sae_hash``: fingerprint
    of the autoencoder.
    """

    #: What statistics of another kind must have to rank latents by.
    needs = ("class_counts",)

    frequency: PerLatent
    mean_activation: PerLatent
    label_entropy: PerLatent
    label_std: PerLatent
    reference_ids: np.ndarray
    reference_rows: Annotated[torch.Tensor, "int S,k"]
    reference_labels: Annotated[torch.Tensor, "int S,k"]
    reference_values: Annotated[torch.Tensor, "S,k"]
    class_counts: Annotated[torch.Tensor, "int C,S"]
    n_images: Whole
    tau: NotNegative
    block: Whole
    class_names: tuple[str, ...]
    sae_hash: str
    n_unreadable: Whole = 0

    def table(self) -> pd.DataFrame:
        """One row a latent: latent, frequency, mean_activation, label_entropy, label_std."""
        columns = ("frequency", "mean_activation", "label_entropy", "label_std")
        return pd.DataFrame({"latent": range(len(self.frequency))} | {c: getattr(self, c).numpy() for c in columns})

    def save(self, folder: Path) -> None:
        """Write ``latents.safetensors`` and then ``latents.json``, which makes the pair complete."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        save_tensors(folder / "latents.safetensors", {k: v for k, v in fields.items() if torch.is_tensor(v)})
        facts = {k: v for k, v in fields.items() if not torch.is_tensor(v)}
        save_json(folder / "latents.json", facts | {"reference_ids": self.reference_ids.tolist()})

    @classmethod
    def load(cls, folder: Path) -> "LatentStatistics":
        """Read what ``save`` wrote; what does not belong together is refused."""
        path = folder / "latents.json"
        facts = load_json(path, "reference_ids", "n_images", "tau", "block", "class_names", "sae_hash", "n_unreadable")
        tensors = load_tensors(folder / "latents.safetensors")
        facts |= {"reference_ids": np.array(facts["reference_ids"], dtype=object),
                  "class_names": tuple(facts["class_names"])}
        try:
            statistics = cls(**tensors, **facts)
            n, k = statistics.reference_values.shape
            shapes = [(n,)] * 4 + [(n, k)] * 4 + [(len(statistics.class_names), n)]
            fields = [getattr(statistics, f.name) for f in dataclasses.fields(cls)[:len(shapes)]]
            if [tuple(field.shape) for field in fields] == shapes:
                return statistics
        except (TypeError, AttributeError, ValueError):
            pass
        raise ValueError(f"{folder} holds statistics whose parts do not go together; remove it, and they are computed "
                         "again.")


@dataclass(frozen=True)
class Question:
    """What statistics are of: the tokens of a tower at a layer, and an autoencoder; ``tokens``: see
    ``collect_latents``."""

    clip: Clip
    sae: SparseAutoencoder
    layer: Layer
    tokens: Literal[*TOKENS] = "all"


def collect_latents(clip: Clip, sae: SparseAutoencoder, ds, layer: Layer, tau: NotNegative = 0.2,
                    n_reference: Natural = 10, batch_images: Natural = 64,
                    tokens: Literal[*TOKENS] = "all") -> LatentStatistics:
    """Statistics, reference images and class counts in one pass over ``ds``: an ``Images``, a torch data set of
    (image, label), or a ``DataLoader`` of one.

    ``tokens``: "all" image tokens, "cls" for the class token alone, or "all and prompts", which counts an adapted
    tower's prompt tokens as if they were patches, as the published code does. Processes that were launched together
    share the batches, and each of them returns the statistics of the whole.
    """
    return collect_many([Question(clip, sae, layer, tokens)], ds, tau, n_reference, batch_images)[0]


def collect_many(questions: Sequence[Question], ds, tau: NotNegative = 0.2, n_reference: Natural = 10,
                 batch_images: Natural = 64, title: str = "") -> list[LatentStatistics]:
    """What ``collect_latents`` answers to each of some questions, in one pass over ``ds``: every image is read once,
    and every block of a tower computed once. Towers must agree about what happens to an image before the first block.
    """
    if len({question.clip.preprocessing() for question in questions}) != 1:
        raise ValueError(f"{len(questions)} questions are about models that do not preprocess images alike; ask about "
                         "those that do in one pass, and about at least one.")
    ds, ids, labels, rows = as_images(ds), [], [], []
    mine, towers = Share(ds, batch_images), {question.clip: [] for question in questions}
    running = [_Running(question, len(ds.class_names), n_reference, tau) for question in questions]
    for answer in running:
        towers[answer.asked.clip].append(answer)
    with torch.no_grad(), onednn.Linears():
        # A process beyond the last batch has nothing to do; a data set without images is an error all the same.
        for batch in (pixel_batches(questions[0].clip, mine, batch_images, title) if len(mine) or not len(ds) else ()):
            for clip, answers in towers.items():
                found = finite_tokens(clip, batch, [answer.asked.layer for answer in answers])
                for answer, z in zip(answers, found):
                    answer.look_at(z, batch.labels.to(clip.device))
            ids += batch.ids
            labels += batch.labels.tolist()
            rows += mine.places(batch.rows)
    for answer in running:
        answer.merge()
    ids, labels, rows = (sum(lists, []) for lists in zip(*processes.gathered((ids, labels, rows))))
    mine.tell_unreadable()
    return [answer.finish(np.array(ids, dtype=object), torch.tensor(labels), torch.tensor(rows),
                          class_names=ds.class_names, n_unreadable=len(ds.unreadable)) for answer in running]


def saved_latents(folder: Path, questions: Sequence[Question], ds: Images, tau: NotNegative = 0.2,
                  n_reference: Natural = 10, batch_images: Natural = 64) -> list[LatentStatistics]:
    """``collect_many``, each answer kept in ``folder`` under a key of all that decides it; one pass finds what is not
    there.

    Of processes that were launched together the first one writes, and all of them read what it wrote.
    """
    places = [folder / f"latents-{_key(question, ds, tau, n_reference)}" for question in questions]
    asked = dict(zip(places, questions))
    # The first process's answer, since the others may look when it has just been written.
    new = processes.gathered([place for place in asked if not (place / "latents.json").is_file()])[0]
    if new:
        found = collect_many([asked[place] for place in new], ds, tau, n_reference, batch_images,
                             f"latents of {len(ds)} images")
        if processes.rank() == 0:
            for place, statistics in zip(new, found):
                statistics.save(place)
        processes.wait()
    return list(map(LatentStatistics.load, places))


def _key(asked: Question, ds: Images, tau: float, n_reference: int) -> str:
    """Everything that decides the answer to a question."""
    return result_key(VERSION, model=asked.clip.fingerprint(), preprocessing=asked.clip.preprocessing(),
                      autoencoder=asked.sae.fingerprint(), images=ds.fingerprint(), block=asked.clip.block(asked.layer),
                      tau=tau, n_reference=n_reference, tokens=asked.tokens)


class _Running:
    """Sums and strongest images of the pass so far, for one question."""

    def __init__(self, asked: Question, n_classes: int, k: int, tau: float):
        self.asked, self.encoder, self.tau, self.n_images = asked, Encoder(asked.sae), tau, 0
        n_latents, device = asked.sae.n_latents, asked.clip.device
        self.active = torch.zeros(n_latents, dtype=torch.long, device=device)
        self.strength = torch.zeros(n_latents, dtype=torch.double, device=device)
        self.values = torch.zeros(n_latents, k, device=device)
        self.rows = torch.full((n_latents, k), -1, dtype=torch.long, device=device)
        self.class_counts = torch.zeros(n_classes, n_latents, dtype=torch.long, device=device)

    def look_at(self, z: torch.Tensor, labels: torch.Tensor) -> None:
        """Count the tokens ``[B,T,D]`` of images with labels ``[B]``."""
        # What follows the image tokens in z (an adapted tower's prompts) is not part of the image.
        counted = {"cls": 1, "all": self.asked.clip.n_tokens, "all and prompts": z.shape[1]}[self.asked.tokens]
        self.add(*self.encoder.image_level(z[:, :counted], self.tau), labels)

    def add(self, strength: torch.Tensor, counts: torch.Tensor, labels: torch.Tensor) -> None:
        """Count image-level activations and tokens above tau ``[B,S]`` of images with labels ``[B]``."""
        self.active += (strength > 0).sum(0)
        self.strength += strength.sum(0, dtype=torch.double)
        self.class_counts.index_add_(0, labels, counts)
        # An equal value comes later in the data set, so it does not displace: only larger ones do.
        changed = (strength.max(0).values > self.values[:, -1]).nonzero()[:, 0]
        rows = torch.arange(self.n_images, self.n_images + len(strength), device=strength.device)
        self._keep_strongest(changed, strength.T[changed], rows.expand(len(changed), -1))
        self.n_images += len(strength)

    def _keep_strongest(self, latents, values: torch.Tensor, rows: torch.Tensor) -> None:
        """Merge later images' activations and rows ``[n,B]`` into the strongest k of some latents ``[n]``."""
        values, rows = torch.cat([self.values[latents], values], 1), torch.cat([self.rows[latents], rows], 1)
        order = values.sort(dim=1, descending=True, stable=True).indices[:, :self.values.shape[1]]
        self.values[latents], self.rows[latents] = values.gather(1, order), rows.gather(1, order)

    def merge(self) -> None:
        """Add what the processes beside this one have seen; every one of them has the whole afterwards.

        Their images follow each other in the order of the data set, so that ties are broken as in one process. Sums of
        float32 are held in float64, so that nothing of the order they were added in is left in their first 24 bits.
        """
        for total in (self.active, self.strength, self.class_counts):
            processes.add_up(total)
        seen = processes.gathered((self.n_images, self.values.cpu(), self.rows.cpu()))
        self.n_images, device = 0, self.values.device
        self.values, self.rows = torch.zeros_like(self.values), torch.full_like(self.rows, -1)
        for n_images, values, rows in seen:
            rows = torch.where(rows >= 0, rows + self.n_images, -1)
            self._keep_strongest(slice(None), values.to(device), rows.to(device))
            self.n_images += n_images

    def finish(self, ids: np.ndarray, labels: torch.Tensor, positions: torch.Tensor, **known) -> LatentStatistics:
        """Divide, and look up what the reference images are among those that were read, ``[N]`` each in the order of
        the pass; ``known``: fields that are not summed here."""
        rows, values = self.rows.cpu(), self.values.cpu()
        if not self.strength.isfinite().all():
            raise ValueError("The autoencoder gives latents that are not finite; check its weights.")
        filled = rows >= 0
        reference_labels = torch.where(filled, labels[rows.clamp_min(0)], -1)
        enough = filled.sum(1) >= min(MIN_REFERENCE, rows.shape[1])
        nothing = torch.full((len(rows),), float("nan"))
        entropy = label_entropy(reference_labels, values, len(self.class_counts))
        return LatentStatistics(
            frequency=(self.active / self.n_images).float().cpu(),
            mean_activation=(self.strength / self.active).float().cpu(),
            label_entropy=torch.where(enough, entropy, nothing),
            label_std=torch.where(enough, _masked_std(reference_labels.double(), filled).float(), nothing),
            reference_ids=np.where(filled.numpy(), ids[rows.clamp_min(0).numpy()], ""),
            reference_rows=torch.where(filled, positions[rows.clamp_min(0)], -1),
            reference_labels=reference_labels, reference_values=values, class_counts=self.class_counts.cpu(),
            n_images=self.n_images, tau=self.tau, block=self.asked.clip.block(self.asked.layer),
            sae_hash=self.asked.sae.fingerprint(), **known)


def label_entropy(labels: Annotated[torch.Tensor, "int S,k"], values: Annotated[torch.Tensor, "S,k"],
                  n_classes: Natural) -> torch.Tensor:
    """Entropy of the labels of reference images, weighted by activation (sec. 3.2): ``[S,k], [S,k] -> [S]``, nats.

    p_c is the activation of class c over all; 0 means one class. Labels of -1 count for nothing.
    """
    if labels.max() >= n_classes:
        raise ValueError(f"There is a label {int(labels.max())} among {n_classes} classes; give all of them.")
    if n_classes > labels.shape[1]:
        # Of many classes each latent has at most k: a label becomes the place where it comes up first in its row.
        first = (labels.unsqueeze(2) == labels.unsqueeze(1)).byte().argmax(2)
        labels, n_classes = torch.where(labels >= 0, first, -1), labels.shape[1]
    weight = torch.zeros(len(labels), n_classes, dtype=torch.double)
    weight.scatter_add_(1, labels.clamp_min(0), torch.where(labels >= 0, values.double(), 0.0))
    share = weight / weight.sum(1, keepdim=True)
    # Adding 0 turns the -0 of a single class into 0.
    return -torch.xlogy(share, share).sum(1).float() + 0.0


def _masked_std(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Population standard deviation of each row of ``[S,k]`` where the mask holds."""
    n = mask.sum(1, keepdim=True)
    mean = torch.where(mask, x, 0.0).sum(1, keepdim=True) / n
    return (torch.where(mask, x - mean, 0.0).square().sum(1) / n[:, 0]).sqrt()


guard(globals())
