"""What the explorer knows: one image, a choice of patches and latents, and everything that follows from them.

There are no widgets here; ``explorer_widgets`` shows what this room computes. An image goes through the model once
and is kept; statistics, reference images and class counts come from ``saved_latents`` and are only looked up.
"""

import functools
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from patchsae.activations import load_pixels
from patchsae.app.state import CELLS, LISTED, UPLOAD, State
from patchsae.clip import Clip, class_prototypes
from patchsae.config import Profile
from patchsae.data.datasets import templates
from patchsae.latents import LatentStatistics
from patchsae.masks import soft_mask
from patchsae.sae import SparseAutoencoder
from patchsae.studies.adapt import Adapted, Recipe, adapted_model, kept_folder
from patchsae.studies.gallery import strongest
from patchsae.studies.names import latent_names, reference_concepts
from patchsae.studies.study import Study


class View(NamedTuple):
    """An image as the model sees it, uint8 ``[H,W,3]``, its label (-1: unknown), its tokens ``z [1,T,D]`` and their
    latents ``h [T,S]``; the same of the adapted tower, prompt tokens left out of its latents, or None."""

    image: np.ndarray
    label: int
    z: torch.Tensor
    h: torch.Tensor
    adapted_z: torch.Tensor | None = None
    adapted_h: torch.Tensor | None = None


class References(NamedTuple):
    """Reference images of a latent ``[k,H,W,3]`` uint8, strongest first, its activation on their patches ``[k,g,g]``
    and their labels ``[k]``."""

    images: np.ndarray
    heats: np.ndarray
    labels: list[int]


# Pictures -----------------------------------------------------------------------------------------------

def as_seen(clip: Clip, pixels: torch.Tensor) -> np.ndarray:
    """Preprocessed pixels ``[B,3,H,W]`` as images again: the crop the patches lie on, uint8 ``[B,H,W,3]``."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (clip.processor.image_mean, clip.processor.image_std))
    image = (pixels.cpu() * std + mean) * 255
    return image.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def masked_image(image: np.ndarray, heat: np.ndarray, threshold: float) -> np.ndarray:
    """The soft mask of an image (fig. 2) whose patches below a share of the strongest are black."""
    low, high = heat.min(), heat.max()
    return soft_mask(image, np.where(heat - low >= threshold * (high - low), heat, low))


# The explorer -------------------------------------------------------------------------------------------

class Explorer:
    """Everything the explorer shows, computed when asked for and kept.

    ``stats`` were taken of the data set ``references``. ``datasets``: name -> images to choose from; ``prompts``:
    name -> prompt templates; ``adapted``: name -> a model adapted to the task, where there is one to compare with.
    """

    def __init__(self, clip: Clip, sae: SparseAutoencoder, stats: LatentStatistics, references, layer: int,
                 datasets: dict, prompts: dict[str, list[str]], adapted: dict[str, Adapted] | None = None):
        self.clip, self.sae, self.stats, self.references, self.layer = clip, sae, stats, references, layer
        self.datasets, self.prompts, self.adapted = datasets, prompts, adapted or {}
        self.uploaded: np.ndarray | None = None
        self.found = (stats.reference_rows >= 0).sum(1).numpy()
        self.concepts, self.counts = reference_concepts(stats, references)
        self.names = latent_names(self.concepts, self.counts, self.found)
        self.places = _places(stats)
        # An image of the paper's size has 39 MB of latents, so few are kept.
        self.view = functools.lru_cache(4)(self._view)
        self.text = functools.lru_cache(16)(self._text)
        self.reference_views = functools.lru_cache(256)(self._reference_views)
        self.thumbnail = functools.lru_cache(1024)(self._thumbnail)

    def first_state(self) -> State:
        """Where the explorer starts: the first image, the patch on which its label's own latent is strongest."""
        name = next(iter(self.datasets))
        view = self.view(name, 0)
        counts = self.stats.class_counts
        own = counts[view.label] - counts.sum(0) / len(counts) if view.label < len(counts) else view.h.mean(0).cpu()
        latent = int(own.argmax())
        row, column = divmod(int(view.h[1:self.clip.n_tokens, latent].argmax()), self.clip.grid)
        place = np.nan_to_num(self.places[latent]).astype(int).tolist()
        return State(name, 0, (row, column, row, column), label=max(view.label, 0), latent=latent, anchor=latent,
                     box=(*place, *place))

    def take(self, picture: np.ndarray) -> None:
        """Make a picture of one's own, uint8 ``[H,W,3]``, image 0 of ``UPLOAD``, in the place of the last one."""
        self.uploaded = picture
        self.view.cache_clear()

    def task(self, dataset: str) -> str:
        """The data set whose classes and adapted model an image gets: its own, or the first for one's own picture."""
        return next(iter(self.datasets)) if dataset == UPLOAD else dataset

    def class_names(self, dataset: str) -> tuple[str, ...]:
        """The classes that an image is told apart by."""
        return self.datasets[self.task(dataset)].class_names

    def _text(self, task: str) -> list[torch.Tensor]:
        """Class prompts of a data set, ``[C,P]``: CLIP's and, where there is one, the adapted model's."""
        names = self.class_names(task)
        own = class_prototypes(self.clip, names, self.prompts[task]).to(self.clip.device)
        return [own, self.adapted[task].text(names)] if task in self.adapted else [own]

    @torch.no_grad()
    def _view(self, dataset: str, row: int) -> View:
        """Look at an image: everything below the cut happens here."""
        if dataset == UPLOAD:
            pixels, label = self.clip.pixels(self.uploaded).to(self.clip.device), -1
        else:
            batch = load_pixels(self.clip, self.datasets[dataset], [row])
            pixels, label = batch.pixels, int(batch.labels[0])
        z = self.clip.below(pixels, self.layer)
        view = View(as_seen(self.clip, pixels)[0], label, z, self.sae.encode(z[0]))
        if (task := self.task(dataset)) not in self.adapted:
            return view
        z = self.adapted[task].tower.below(pixels, self.layer)
        return view._replace(adapted_z=z, adapted_h=self.sae.encode(z[0, :self.clip.n_tokens]))

    def tokens(self, region) -> list[int]:
        """Places in z of the patches of a region."""
        top, left, bottom, right = region
        return [1 + r * self.clip.grid + c for r in range(top, bottom + 1) for c in range(left, right + 1)]

    def heat(self, state: State) -> np.ndarray:
        """The chosen latent on every patch of the image: ``[g,g]``."""
        return self.patches(self.view(state.dataset, state.image).h, state.latent)

    def patches(self, h: torch.Tensor, latent: int) -> np.ndarray:
        """One latent of ``h [T,S]`` on the patches: ``[g,g]``."""
        return h[1:self.clip.n_tokens, latent].unflatten(0, (self.clip.grid, self.clip.grid)).cpu().numpy()

    # Lists of latents

    def listed(self, state: State) -> pd.DataFrame:
        """The latents of a scope, columns latent and value, first first; the values' meaning depends on the scope."""
        view = self.view(state.dataset, state.image)
        scopes = {"patch": lambda: view.h[self.tokens(state.region)].mean(0), "image": lambda: view.h.mean(0),
                  "class": lambda: self.stats.class_counts[state.label].float(),
                  "similar": lambda: self.similarity(state.anchor), "words": lambda: self.said(state.query),
                  "scatter": lambda: self.near(state.box), "changed": lambda: self.change(view)}
        value = scopes[state.scope]().cpu()
        order = value.abs() if state.scope == "changed" else value
        latents = [s for s in strongest(order, LISTED) if order[s] > 0]
        return pd.DataFrame({"latent": latents, "value": value[latents].numpy()})

    @torch.no_grad()
    def similarity(self, latent: int) -> torch.Tensor:
        """Cosine between the decoder row of a latent and every row: ``[S]``; itself comes first."""
        rows = self.sae.W_dec
        return (rows @ rows[latent]) / (rows.norm(dim=1) * rows[latent].norm())

    def said(self, query: str) -> torch.Tensor:
        """Share of each latent's reference images that show a concept whose name holds the words: ``[S]``.

        A number stands for the latent of that number.
        """
        words = query.lower().split()
        parts = [name.lower().replace("(", " ").split() for name in self.concepts]
        columns = [i for i, part in enumerate(parts)
                   if words and all(any(p.startswith(word) for p in part) for word in words)]
        best = self.counts[:, columns].max(1, initial=0) / np.maximum(self.found, 1)
        called = np.isin(self.names, [self.concepts[i] for i in columns])
        best = best + 1e-6 * (called & (best > 0))  # among equals those of that name come first
        if query.strip().isdigit() and int(query) < len(best):
            best[int(query)] = 1
        return torch.from_numpy(best)

    def near(self, box) -> torch.Tensor:
        """Latents of a box of the scatter, those nearest its middle first; all of them if the box is one cell.

        ``[S]``: 1 at the middle, falling with the distance in cells, 0 outside.
        """
        top, left, bottom, right = box
        y, x = self.places.T
        inside = (y >= top) & (y < bottom + 1) & (x >= left) & (x < right + 1) | ((top, left) == (bottom, right))
        distance = np.hypot(y - (top + bottom + 1) / 2, x - (left + right + 1) / 2)
        return torch.from_numpy(np.where(inside & np.isfinite(distance), 1 / (1 + distance), 0.0))

    def change(self, view: View) -> torch.Tensor:
        """Image-level activation with the adapted tower less that with CLIP: ``[S]``; 0 where there is none."""
        if view.adapted_h is None:
            return torch.zeros(self.sae.n_latents)
        return view.adapted_h.mean(0) - view.h.mean(0)

    # One latent

    @torch.no_grad()
    def _reference_views(self, latent: int) -> References:
        """Look at the reference images of a latent, checked by their ids."""
        n, g = int(self.found[latent]), self.clip.grid
        if n == 0:
            size = self.clip.image_size
            return References(np.zeros((0, size, size, 3), np.uint8), np.zeros((0, g, g), np.float32), [])
        batch = load_pixels(self.clip, self.references, self.stats.reference_rows[latent, :n].tolist())
        if batch.ids != self.stats.reference_ids[latent][:n].tolist():
            raise ValueError(f"The reference images of latent {latent} are other images in this data set; use the "
                             "data set that the statistics were taken of.")
        z = self.clip.below(batch.pixels, self.layer)[:, 1:self.clip.n_tokens]
        heats = self.sae.encode_some(z, latent).unflatten(1, (g, g)).cpu().numpy()
        return References(as_seen(self.clip, batch.pixels), heats, batch.labels.tolist())

    def _thumbnail(self, latent: int) -> np.ndarray:
        """The strongest image of a latent, uint8 ``[H,W,3]``; grey if there is none."""
        if self.found[latent] == 0:
            return np.full((self.clip.image_size, self.clip.image_size, 3), 208, np.uint8)
        row = int(self.stats.reference_rows[latent, 0])
        return as_seen(self.clip, load_pixels(self.clip, self.references, [row]).pixels)[0]

    def label_histogram(self, latent: int) -> pd.Series:
        """How many of the reference images have each label: class name -> count, most first."""
        labels = self.stats.reference_labels[latent][:int(self.found[latent])].tolist()
        return pd.Series([self.references.class_names[label] for label in labels], dtype=object).value_counts()

    def top_classes(self, latent: int, k: int = 5) -> pd.Series:
        """Classes by the share of the latent's active tokens that lie on their images (eq. 5)."""
        counts = self.stats.class_counts[:, latent].double()
        top = [c for c in strongest(counts, k) if counts[c] > 0]
        names = [self.references.class_names[c] for c in top]
        return pd.Series((counts[top] / counts.sum()).numpy(), index=names)

    # Switching latents off

    def edited(self, z: torch.Tensor, h: torch.Tensor, factors) -> torch.Tensor:
        """Scale latents on every image token, the error of the autoencoder added back: ``[1,T,D] -> [1,T,D]``.

        z' = z + sum over s of (factor_s - 1) h_s W_dec[s]; without factors it is z bit for bit.
        """
        if not factors:
            return z
        latents = [latent for latent, _ in factors]
        less = torch.tensor([factor for _, factor in factors], device=h.device) - 1
        return torch.cat([z[:, :len(h)] + (less * h[:, latents]) @ self.sae.W_dec[latents], z[:, len(h):]], 1)

    @torch.no_grad()
    def probabilities(self, state: State) -> pd.DataFrame:
        """Zero-shot probabilities of the data set's classes, before and after the factors.

        Columns class, before, after; with an adapted model also adapted_before and adapted_after.
        """
        view, (text, *adapted) = self.view(state.dataset, state.image), self.text(self.task(state.dataset))
        table = {"class": self.class_names(state.dataset)} | self._before_after(self.clip, view.z, view.h, text, state)
        if adapted:
            tower = self.adapted[self.task(state.dataset)].tower
            both = self._before_after(tower, view.adapted_z, view.adapted_h, adapted[0], state)
            table |= {f"adapted_{name}": value for name, value in both.items()}
        return pd.DataFrame(table)

    def _before_after(self, tower, z, h, text, state: State) -> dict[str, np.ndarray]:
        """Probabilities of one tower from z as it is and edited.

        One by one: in a batch equal images may get sums that are rounded differently.
        """
        both = {"before": z, "after": self.edited(z, h, state.factors)}
        return {name: tower.logits(tower.above(tokens, self.layer), text).softmax(1)[0].cpu().numpy()
                for name, tokens in both.items()}

    def table(self, state: State) -> pd.DataFrame:
        """What is listed with everything known of it, for a csv file."""
        listed = self.listed(state)
        own = self.stats.table().set_index("latent").loc[listed["latent"]].reset_index(drop=True)
        names = [self.names[s] for s in listed["latent"]]
        factors = listed["latent"].map(dict(state.factors)).fillna(1.0)
        return pd.concat([listed.assign(name=names, factor=factors), own], axis=1)


def _places(stats: LatentStatistics) -> np.ndarray:
    """Where latents lie in the scatter of log10 activation and log10 frequency, in cells from the top left: ``[S,2]``.

    Latents that never fire are nowhere: NaN.
    """
    x0, x1, y0, y1 = scatter_limits(stats)
    with np.errstate(divide="ignore"):
        x, y = (np.log10(t.double().numpy()) for t in (stats.frequency, stats.mean_activation))
    place = np.stack([(y1 - y) / (y1 - y0) * CELLS[0], (x - x0) / (x1 - x0) * CELLS[1]], 1)
    return np.where(np.isfinite(place), place, np.nan)


def scatter_limits(stats: LatentStatistics) -> tuple[float, float, float, float]:
    """Limits of the scatter in log10 units: frequency from and to, activation from and to."""
    alive = (stats.frequency > 0) & (stats.mean_activation > 0)
    if not alive.any():
        return -1.0, 0.0, -1.0, 0.0
    logs = [t[alive].double().log10() for t in (stats.frequency, stats.mean_activation)]
    return tuple(float(edge) for log in logs for edge in (log.min() - 0.1, log.max() + 0.1))


def open_explorer(profile: Profile) -> Explorer:
    """The explorer of a profile: its model, autoencoder and statistics, its tasks' test images to choose from, and
    the models adapted to these tasks that were trained before."""
    study, datasets, prompts, adapted = Study(profile), {}, {}, {}
    for task in (profile.data.task, *profile.data.transfer):
        name = f"{task}/test"
        try:
            datasets[name], prompts[name] = study.images(task, "test"), templates(profile, task)
            adapted |= {name: model} if (model := _adapted(study, task)) else {}
        except FileNotFoundError:  # images of other tasks are there to choose from if they are there
            if task == profile.data.task:
                raise
    return Explorer(study.clip, study.sae, study.stats, study.train, study.layer, datasets, prompts, adapted)


def _adapted(study: Study, task: str) -> Adapted | None:
    """MaPLe on the base classes of a task, if it was trained before: nobody waits for that here."""
    if not study.profile.adaptation.seeds or study.clip.tokenizer is None:
        return None
    recipe = Recipe(study, task, "maple", study.profile.adaptation.seeds[0])
    return adapted_model(recipe) if kept_folder(recipe) else None
