"""What the explorer knows: one image, a choice of patches and latents, and everything that follows from them.

There are no widgets here; ``explorer_widgets`` shows what this room computes. An image goes through the model once
and is kept; statistics, reference images and class counts come from ``saved_latents`` and are only looked up.
"""

import functools
import io
import warnings
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple
from urllib.parse import parse_qsl, urlencode

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps

from patchsae.activations import load_pixels
from patchsae.clip import Clip, class_prototypes, load_clip
from patchsae.config import Profile, device
from patchsae.datasets import open_dataset, templates
from patchsae.gallery import strongest
from patchsae.latents import LatentStatistics, saved_latents
from patchsae.masks import soft_mask
from patchsae.names import latent_names, reference_concepts
from patchsae.sae import SparseAutoencoder
from patchsae.train import trained_sae

#: The data set that holds nothing but the picture a user gave.
UPLOAD = "your picture"
#: What an uploaded picture may be at most; both are checked before a pixel is decoded.
MAX_BYTES, MAX_PIXELS = 8 * 2**20, 24_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
#: Which latents are listed, in the order of the explorer's choices.
SCOPES = {"patch": "selected patches", "image": "whole image", "class": "a class", "words": "words",
          "similar": "similar ones", "scatter": "the scatter", "changed": "changed by adaptation"}
#: How many latents a list has; cells of the scatter, down and across, in which places are counted.
LISTED, CELLS = 12, (40, 60)


@dataclass(frozen=True)
class State:
    """What the explorer shows, and all a link to it holds.

    ``region``: patches from (top, left) to (bottom, right), ends included; ``label``: class whose latents are listed;
    ``anchor``: latent that others are compared with; ``box``: cells of the scatter, as ``region``;
    ``factors``: (latent, factor) pairs that scale latents, 0 switching one off; ``threshold``: share of a latent's
    highest patch below which its mask is black.
    """

    dataset: str = ""
    image: int = 0
    region: tuple[int, ...] = (0, 0, 0, 0)
    scope: str = "patch"
    label: int = 0
    query: str = ""
    anchor: int = 0
    box: tuple[int, ...] = (0, 0, 0, 0)
    latent: int = 0
    factors: tuple[tuple[int, float], ...] = ()
    mask: bool = False
    threshold: float = 0.0

    def link(self) -> str:
        """The state as the query of an address: ``image=8&region=3_4_3_4&factors=412x0``."""
        values = {k: v for k, v in asdict(self).items() if v != getattr(State, k)}
        values |= {k: "_".join(map(str, v)) for k, v in values.items() if k in ("region", "box")}
        if self.factors:
            values["factors"] = "_".join(f"{latent}x{factor:g}" for latent, factor in self.factors)
        return urlencode(values | ({"mask": 1} if self.mask else {}), safe="/,")

    @classmethod
    def from_link(cls, link: str) -> "State":
        """Read what ``link`` wrote; other keys are left to others."""
        known = {f.name: f for f in fields(cls)}
        given = {k: v for k, v in parse_qsl(link.rpartition("?")[2]) if k in known}
        try:
            return cls(**{k: _read(k, known[k].default, v) for k, v in given.items()})
        except ValueError:
            raise ValueError(f"The link {link[:80]!r} cannot be read; copy all of it again.") from None


def _read(name: str, default, text: str):
    """One value of a link, of the type of its default."""
    if name == "factors":
        return tuple((int(s), float(f)) for s, f in (pair.split("x") for pair in text.split("_")))
    if isinstance(default, tuple):
        return tuple(map(int, text.split("_")))
    return text == "1" if isinstance(default, bool) else type(default)(text)


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


class Adapted(NamedTuple):
    """An adapted tower (``below``, ``above``, ``text_features``, ``logits``), the classes it tells apart, its name."""

    tower: object
    class_names: tuple[str, ...]
    name: str = "MaPLe"


# Pictures -----------------------------------------------------------------------------------------------

def decode_picture(data: bytes) -> np.ndarray:
    """A picture that a user gave, uint8 ``[H,W,3]``, upright; size and format are checked before it is decoded."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"The picture has {len(data) / 2**20:.1f} MB, the limit is {MAX_BYTES // 2**20} MB; "
                         "choose a smaller file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, higher limit
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
    except Image.DecompressionBombError:
        width = height = MAX_PIXELS
        image = None
    except Exception:  # a hostile file can make a decoder fail in any way
        raise ValueError(f"The file is not a picture that can be read; choose a {', '.join(FORMATS)} file.") from None
    if width * height > MAX_PIXELS:
        size = f" of {width:,} x {height:,} pixels" if image else ""
        raise ValueError(f"The picture{size} is above the limit of {MAX_PIXELS // 10**6} megapixels; make it smaller.")
    try:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception:
        raise ValueError("The picture is damaged and cannot be decoded; choose another file.") from None


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
    name -> prompt templates; ``adapted``: a tower to compare with, or None.
    """

    def __init__(self, clip: Clip, sae: SparseAutoencoder, stats: LatentStatistics, references, layer: int,
                 datasets: dict, prompts: dict[str, list[str]], adapted: Adapted | None = None):
        self.clip, self.sae, self.stats, self.references, self.layer = clip, sae, stats, references, layer
        self.datasets, self.prompts, self.adapted = datasets, prompts, adapted
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
        counts = self.stats.class_counts.double()
        own = counts[view.label] - counts.mean(0) if view.label < len(counts) else view.h.mean(0).cpu()
        latent = int(own.argmax())
        row, column = divmod(int(view.h[1:self.clip.n_tokens, latent].argmax()), self.clip.grid)
        return State(name, 0, (row, column, row, column), label=max(view.label, 0), latent=latent, anchor=latent)

    def take(self, picture: np.ndarray) -> None:
        """Make a picture of one's own, uint8 ``[H,W,3]``, image 0 of ``UPLOAD``, in the place of the last one."""
        self.uploaded = picture
        self.view.cache_clear()

    def class_names(self, dataset: str) -> tuple[str, ...]:
        """Classes of a data set; a picture of one's own gets those of the first."""
        return self.datasets.get(dataset, next(iter(self.datasets.values()))).class_names

    def _text(self, dataset: str) -> torch.Tensor:
        """Class prompts of a data set: ``[C,P]``."""
        prompts = self.prompts.get(dataset, next(iter(self.prompts.values())))
        return class_prototypes(self.clip, self.class_names(dataset), prompts).to(self.clip.device)

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
        if self.adapted is None:
            return view
        z = self.adapted.tower.below(pixels, self.layer)
        return view._replace(adapted_z=z, adapted_h=self.sae.encode(z[0, :self.clip.n_tokens]))

    def tokens(self, region) -> list[int]:
        """Places in z of the patches of a region."""
        top, left, bottom, right = region
        return [1 + r * self.clip.grid + c for r in range(top, bottom + 1) for c in range(left, right + 1)]

    def heat(self, state: State) -> np.ndarray:
        """The chosen latent on every patch of the image: ``[g,g]``."""
        h = self.view(state.dataset, state.image).h[1:self.clip.n_tokens, state.latent]
        return h.unflatten(0, (self.clip.grid, self.clip.grid)).cpu().numpy()

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
        """Image-level activation with the adapted tower less that with CLIP: ``[S]``."""
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
        pre = (z - self.sae.b_dec) @ self.sae.W_enc[:, latent] + self.sae.b_enc[latent]
        heats = torch.relu(pre).unflatten(1, (g, g)).cpu().numpy()
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
        for latent, factor in factors:
            change = (factor - 1) * h[:, latent, None] * self.sae.W_dec[latent]
            z = torch.cat([z[:, :len(h)] + change, z[:, len(h):]], 1)
        return z

    @torch.no_grad()
    def probabilities(self, state: State) -> pd.DataFrame:
        """Zero-shot probabilities of the data set's classes, before and after the factors, largest change first.

        Columns class, before, after; with an adapted tower that tells the same classes apart also adapted_before
        and adapted_after.
        """
        view, names = self.view(state.dataset, state.image), self.class_names(state.dataset)
        table = {"class": names} | self._before_after(self.clip, view.z, view.h, self.text(state.dataset), state)
        if self.adapted and tuple(self.adapted.class_names) == tuple(names):
            tower, text = self.adapted.tower, self.adapted_text
            adapted = self._before_after(tower, view.adapted_z, view.adapted_h, text, state)
            table |= {f"adapted_{name}": value for name, value in adapted.items()}
        return pd.DataFrame(table)

    @functools.cached_property
    def adapted_text(self) -> torch.Tensor:
        """Class prompts of the adapted tower: ``[C,P]``."""
        return self.adapted.tower.text_features()

    def _before_after(self, tower, z, h, text, state: State) -> dict[str, np.ndarray]:
        """Probabilities of one tower from z as it is and edited, finished together."""
        both = torch.cat([z, self.edited(z, h, state.factors)])
        share = tower.logits(tower.above(both, self.layer), text).softmax(1).cpu().numpy()
        return {"before": share[0], "after": share[1]}

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


def open_explorer(profile: Profile, adapted: Adapted | None = None) -> Explorer:
    """The explorer of a profile: its model, autoencoder and statistics, and its tasks' test images to choose from."""
    clip = load_clip(profile.model.name, device())
    train = open_dataset(profile, profile.data.task, "train")
    sae = trained_sae(profile, clip, train)
    stats = saved_latents(profile.run_dir, clip, sae, train, profile.model.layer, profile.latents.tau,
                          profile.latents.n_reference, profile.data.batch_images)
    tasks = (profile.data.task, *profile.data.transfer)
    datasets = {f"{task}/test": open_dataset(profile, task, "test") for task in tasks}
    prompts = {f"{task}/test": templates(profile, task) for task in tasks}
    return Explorer(clip, sae, stats, train, profile.model.layer, datasets, prompts, adapted)
