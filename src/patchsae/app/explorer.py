"""What the explorer knows: one image, a choice of patches and latents, and everything that follows from them.

There are no widgets here; ``widget`` shows what this room computes. An image goes through the model once and is kept;
statistics, reference images and class counts come from the study and are only looked up.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from patchsae.app.state import CELLS, LISTED, UPLOAD, State
from patchsae.clip import Clip, class_prototypes
from patchsae.data.datasets import templates
from patchsae.data.images import Item
from patchsae.latents import LatentStatistics
from patchsae.masks import soft_mask
from patchsae.studies.adapt import Adapted, Recipe, adapted_model, kept_folder
from patchsae.studies.gallery import references, strongest
from patchsae.studies.names import latent_names, reference_concepts
from patchsae.studies.study import Study, fingerprint
from patchsae.weights.files import load_tensors, result_key, save_tensors

NO_TEXT = "This model has no text tower here, so it tells no classes apart; latents and their maps need none."


class Tower(NamedTuple):
    """A model that images are classified with: ``text [C,P]`` of the data set's classes, None without a text tower."""

    name: str
    model: Clip
    text: torch.Tensor | None


class View(NamedTuple):
    """An image as the model sees it, uint8 ``[H,W,3]``, its label (-1: unknown), and of each tower, CLIP first, its
    tokens ``z [1,T,D]`` and the latents of its image tokens ``h [T,S]``."""

    image: np.ndarray
    label: int
    towers: list[Tower]
    z: list[torch.Tensor]
    h: list[torch.Tensor]


class References(NamedTuple):
    """Reference images of a latent ``[k,H,W,3]`` uint8, strongest first, its activation on their patches ``[k,g,g]``
    and their labels ``[k]``; nothing of a latent that never fires."""

    images: Sequence[np.ndarray]
    heats: Sequence[np.ndarray]
    labels: list[int]


def seen(clip: Clip, images: Sequence[np.ndarray]) -> tuple[np.ndarray, torch.Tensor]:
    """Images ``[H,W,3]`` as the model sees them: the crops that patches lie on, uint8 ``[B,S,S,3]``, and pixels."""
    crops = np.stack([clip.crop(image) for image in images])
    return crops, clip.normalise(torch.from_numpy(crops).to(clip.device))


def masked_image(image: np.ndarray, heat: np.ndarray, threshold: float) -> np.ndarray:
    """The soft mask of an image (fig. 2) whose patches below a share of the strongest are black."""
    low, high = heat.min(), heat.max()
    return soft_mask(image, np.where(heat - low >= threshold * (high - low), heat, low))


class Explorer:
    """Everything the explorer shows of a study, computed when asked for and kept.

    ``datasets``: name -> test images to choose from, those of the study's own task first; ``absent``: tasks of the
    profile whose images are not on this machine; ``places``: see :func:`scatter`.
    """

    def __init__(self, study: Study):
        self.study, self.layer, self.clip, self.sae = study, study.layer, study.clip, study.sae
        self.references, self.stats = study.train, study.stats
        self.datasets, self.absent = {f"{study.profile.data.task}/test": study.test}, []
        for task in study.profile.data.transfer:
            try:
                self.datasets[f"{task}/test"] = study.images(task, "test")
            except FileNotFoundError:
                self.absent.append(task)
        self.uploaded: np.ndarray | None = None
        self.n_references = (self.stats.reference_rows >= 0).sum(1).numpy()
        self.concepts, self.counts = reference_concepts(self.stats, self.references)
        self.names = latent_names(self.concepts, self.counts, self.n_references)
        self.places = scatter(self.stats)[0]
        # An image of the paper's size has 39 MB of latents, so few are kept.
        self.view = functools.lru_cache(4)(self._view)
        self.towers = functools.lru_cache(16)(self._towers)
        self.reference_views = functools.lru_cache(256)(self._reference_views)
        self.thumbnail = functools.lru_cache(1024)(self._thumbnail)

    def first_state(self) -> State:
        """Where the explorer starts: the first image, the patch on which its label's own latent is strongest."""
        name = next(iter(self.datasets))
        view, counts = self.view(name, 0), self.stats.class_counts
        known = 0 <= view.label < len(counts)
        activity = counts[view.label] - counts.sum(0) / len(counts) if known else view.h[0].mean(0)
        latent = int(activity.argmax())
        row, column = divmod(int(self.heat(State(name, 0, latent=latent)).argmax()), self.clip.grid)
        place = np.nan_to_num(self.places[latent]).astype(int).tolist()
        return State(name, 0, (row, column, row, column), label=view.label if known else 0, latent=latent,
                     anchor=latent, box=(*place, *place))

    def warm(self) -> None:
        """Compute what all visitors share."""
        self.probabilities(self.first_state())
        for dataset in self.datasets:
            self.towers(self.task(dataset))

    def take(self, picture: np.ndarray) -> None:
        """Make a picture of one's own, uint8 ``[H,W,3]``, image 0 of ``UPLOAD``, in the place of the last one."""
        self.uploaded = self.clip.crop(picture)
        self.view.cache_clear()

    def task(self, dataset: str) -> str:
        """The task whose classes and adapted model an image gets: its own, or the study's for one's own picture."""
        return self.study.profile.data.task if dataset == UPLOAD else dataset.removesuffix("/test")

    def class_names(self, dataset: str) -> tuple[str, ...]:
        """The classes that an image is told apart by."""
        return self.datasets[f"{self.task(dataset)}/test"].class_names

    def _towers(self, task: str) -> list[Tower]:
        """CLIP and, where it was trained before, the model adapted to a task."""
        if self.clip.tokenizer is None:
            return [Tower("CLIP", self.clip, None)]
        names, adapted = self.class_names(task), trained_before(self.study, task)
        towers = [Tower("CLIP", self.clip, self._text(names, templates(self.study.profile, task)))]
        return towers + ([Tower("MaPLe", adapted.tower, adapted.text(names))] if adapted else [])

    def _text(self, names: tuple[str, ...], wordings: list[str]) -> torch.Tensor:
        """Text features of classes ``[C,P]``, kept in the profile's run folder: ImageNet's are of 80,000 prompts."""
        key = result_key(1, model=fingerprint(self.clip), classes=names, wordings=wordings)
        path = self.study.profile.run_dir / "text" / f"{key}.safetensors"
        if not path.is_file():
            save_tensors(path, {"text": class_prototypes(self.clip, names, wordings)})
        return load_tensors(path, self.clip.device)["text"]

    @torch.no_grad()
    def _view(self, dataset: str, row: int) -> View:
        """Look at an image: everything below the cut happens here."""
        item = Item(self.uploaded, -1, UPLOAD) if dataset == UPLOAD else self.datasets[dataset][row]
        crops, pixels = seen(self.clip, [item.image])
        towers = self.towers(self.task(dataset))
        z = [tower.model.below(pixels, self.layer) for tower in towers]
        # An adapted tower's prompt tokens, the last ones, are not part of the image.
        h = [self.sae.encode(tokens[0, :self.clip.n_tokens]) for tokens in z]
        return View(crops[0], item.label, towers, z, h)

    def heat(self, state: State, tower: int = 0) -> np.ndarray:
        """The chosen latent on every patch of the image: ``[g,g]``."""
        h = self.view(state.dataset, state.image).h[tower][1:, state.latent]
        return h.unflatten(0, (self.clip.grid, self.clip.grid)).cpu().numpy()

    # Lists of latents

    def listed(self, state: State) -> pd.DataFrame:
        """The latents of a scope, columns latent and value, first first; the values' meaning depends on the scope."""
        top, left, bottom, right = state.region
        h, grid = self.view(state.dataset, state.image).h, self.clip.grid
        patches = [1 + row * grid + column for row in range(top, bottom + 1) for column in range(left, right + 1)]
        scopes = {"patch": lambda: h[0][patches].mean(0), "image": lambda: h[0].mean(0),
                  "class": lambda: self.stats.class_counts[state.label].float(),
                  "similar": lambda: self.similarity(state.anchor), "words": lambda: self.said(state.query),
                  "scatter": lambda: self.near(state.box), "changed": lambda: h[-1].mean(0) - h[0].mean(0)}
        value = scopes[state.scope]().cpu()
        order = value.abs() if state.scope == "changed" else value
        latents = [s for s in strongest(order, LISTED) if order[s] > 0]
        return pd.DataFrame({"latent": latents, "value": value[latents].numpy()})

    @torch.no_grad()
    def similarity(self, latent: int) -> torch.Tensor:
        """Cosine between the decoder row of a latent and every row: ``[S]``; itself comes first."""
        return torch.cosine_similarity(self.sae.W_dec, self.sae.W_dec[latent:latent + 1])

    def said(self, query: str) -> torch.Tensor:
        """Share of each latent's reference images that show a concept whose name holds the words: ``[S]``.

        A number stands for the latent of that number.
        """
        words = query.lower().split()
        parts = [name.lower().replace("(", " ").split() for name in self.concepts]
        columns = [i for i, part in enumerate(parts)
                   if words and all(any(p.startswith(word) for p in part) for word in words)]
        share = self.counts[:, columns].max(1, initial=0) / np.maximum(self.n_references, 1)
        called = np.isin(self.names, [self.concepts[i] for i in columns])
        share = share + 1e-6 * (called & (share > 0))  # among equals those of that name come first
        if query.strip().isdecimal() and len(query) < 20 and int(query) < len(share):
            share[int(query)] = 1
        return torch.from_numpy(share)

    def near(self, box) -> torch.Tensor:
        """Latents of a box of the scatter, those nearest its middle first; all of them if the box is one cell.

        ``[S]``: 1 at the middle, falling with the distance in cells, 0 outside.
        """
        top, left, bottom, right = box
        y, x = self.places.T
        inside = (y >= top) & (y < bottom + 1) & (x >= left) & (x < right + 1) | ((top, left) == (bottom, right))
        distance = np.hypot(y - (top + bottom + 1) / 2, x - (left + right + 1) / 2)
        return torch.from_numpy(np.where(inside & np.isfinite(distance), 1 / (1 + distance), 0.0))

    # One latent

    @torch.no_grad()
    def _reference_views(self, latent: int) -> References:
        """Look at the reference images of a latent, checked by their ids."""
        images, grid = references(self.stats, self.references, latent), self.clip.grid
        if not images:
            return References([], [], [])
        crops, pixels = seen(self.clip, images)
        z = self.clip.below(pixels, self.layer)[:, 1:self.clip.n_tokens]
        heats = self.sae.encode_some(z, latent).unflatten(1, (grid, grid)).cpu().numpy()
        return References(crops, heats, self.stats.reference_labels[latent, :len(images)].tolist())

    def _thumbnail(self, latent: int) -> np.ndarray:
        """The strongest image of a latent, uint8 ``[H,W,3]``; grey if there is none."""
        if self.n_references[latent] == 0:
            return np.full((self.clip.image_size, self.clip.image_size, 3), 208, np.uint8)
        return self.clip.crop(self.references[int(self.stats.reference_rows[latent, 0])].image)

    def label_bars(self, latent: int) -> list[tuple[str, float, str]]:
        """How many of the reference images have each label, most first: class name, share, the share in words."""
        n, names = int(self.n_references[latent]), self.references.class_names
        labels = pd.Series(self.stats.reference_labels[latent][:n].tolist(), dtype=int)
        return [(names[label], count / n, f"{count} of {n}") for label, count in labels.value_counts().items()]

    def class_bars(self, latent: int, k: int) -> list[tuple[str, float, str]]:
        """The k classes on whose images most of the latent's active tokens lie (eq. 5): class name, tokens in multiples
        of the first's, their share of all in words."""
        counts, names = self.stats.class_counts[:, latent].double(), self.references.class_names
        return [(names[c], float(counts[c] / counts.max()), f"{counts[c] / counts.sum():.1%}")
                for c in strongest(counts, k) if counts[c] > 0]

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

        Columns class, before, after; with an adapted model also adapted_before and adapted_after; no rows without a
        text tower.
        """
        view = self.view(state.dataset, state.image)
        if view.towers[0].text is None:
            return pd.DataFrame(columns=["class", "before", "after"])
        table = {"class": self.class_names(state.dataset)}
        for prefix, tower, z, h in zip(("", "adapted_"), view.towers, view.z, view.h):
            # One by one: in a batch equal images may get sums that are rounded differently.
            for name, tokens in (("before", z), ("after", self.edited(z, h, state.factors))):
                logits = tower.model.logits(tower.model.above(tokens, self.layer), tower.text)
                table[prefix + name] = logits.softmax(1)[0].cpu().numpy()
        return pd.DataFrame(table)

    def table(self, state: State) -> pd.DataFrame:
        """What is listed with everything known of it, for a csv file."""
        listed = self.listed(state)
        statistics = self.stats.table().set_index("latent").loc[listed["latent"]].reset_index(drop=True)
        names = [self.names[s] for s in listed["latent"]]
        factors = listed["latent"].map(dict(state.factors)).fillna(1.0)
        return pd.concat([listed.assign(name=names, factor=factors), statistics], axis=1)


def scatter(stats: LatentStatistics) -> tuple[np.ndarray, list[float]]:
    """Where latents lie in the scatter of log10 frequency and log10 activation, in cells from the top left, ``[S,2]``:
    NaN where they never fire; and the limits of the scatter: frequency from and to, activation from and to."""
    logs = torch.stack([stats.frequency, stats.mean_activation]).double().log10().numpy()
    alive = logs[:, np.isfinite(logs).all(0)]
    low, high = (alive.min(1) - 0.1, alive.max(1) + 0.1) if alive.size else (np.full(2, -1.0), np.zeros(2))
    x, y = (logs - low[:, None]) / (high - low)[:, None]
    place = np.stack([(1 - y) * CELLS[0], x * CELLS[1]], 1)
    return np.where(np.isfinite(place), place, np.nan), [low[0], high[0], low[1], high[1]]


def trained_before(study: Study, task: str) -> Adapted | None:
    """MaPLe on the base classes of a task, if it was trained before: nobody waits for that here."""
    if task not in study.profile.adaptation.tasks:
        return None
    recipe = Recipe(study, task, "maple", study.profile.adaptation.seeds[0])
    with contextlib.suppress(FileNotFoundError):  # there may be no training images of a task that one looks at
        return adapted_model(recipe) if kept_folder(recipe) else None
