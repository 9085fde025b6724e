"""Choosing latents by rule and gathering what a picture of them shows: what notebooks 02 to 04 have in common."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from patchsae.activations import load_pixels, read_pixels
from patchsae.data.images import Images
from patchsae.figures.sheets import MaskRow, Row
from patchsae.latents import LatentStatistics
from patchsae.masks import heat_maps, soft_mask
from patchsae.studies.study import Study


def describe(stats: LatentStatistics, latent: int) -> str:
    """The three numbers under a row of reference images, as in fig. 10."""
    entropy = float(stats.label_entropy[latent])
    return (f"frequency {stats.frequency[latent]:.3f}, activation {stats.mean_activation[latent]:.3f}, "
            + ("too few for an entropy" if np.isnan(entropy) else f"entropy {entropy:.2f}"))


def references(stats: LatentStatistics, ds: Images, latent: int, k: int | None = None) -> list[np.ndarray]:
    """The strongest images of a latent: up to ``k`` uint8 ``[H,W,3]``, looked up by position and checked by id."""
    rows, ids = stats.reference_rows[latent][:k].tolist(), stats.reference_ids[latent][:k]
    items = [(ds[row], name) for row, name in zip(rows, ids) if row >= 0]
    if wrong := [name for item, name in items if item.id != name]:
        raise ValueError(f"Image {wrong[0]} of the statistics is another image in this data set; use the data set the "
                         "statistics were taken of.")
    return [item.image for item, _ in items]


def reference_row(stats: LatentStatistics, ds: Images, latent: int, title: str, k: int | None = None) -> Row:
    """A row of reference images with its three numbers."""
    return Row(title, references(stats, ds, latent, k), describe(stats, latent))


def class_rows(ds: Images, n_classes: int, k: int) -> list[Row]:
    """Of the first k images those that can be read, of classes spread over the label order, a row each."""
    labels = range(0, len(ds.class_names), max(1, len(ds.class_names) // n_classes))[:n_classes]
    return [Row(ds.class_names[c], [item.image for _, item in ds.readable(np.flatnonzero(ds.labels == c)[:k])])
            for c in labels]


def regions(table: pd.DataFrame) -> dict[str, tuple[float, float, float, float]]:
    """Three regions of the scatter by quantiles of log10 frequency and log10 activation: (x0, x1, y0, y1).

    The corners hold the lowest and the highest quarter in both; "between" is around the two medians.
    """
    alive = table[(table["frequency"] > 0) & table["label_entropy"].notna()]
    logs = np.log10(alive[["frequency", "mean_activation"]])
    ends = {"rare, weak": (0, 0.25), "between": (0.375, 0.625), "frequent, strong": (0.75, 1)}
    return {name: tuple(logs.quantile(list(shares)).to_numpy().T.ravel()) for name, shares in ends.items()}


def pick_latents(table: pd.DataFrame, boxes: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """From every region its latents of lowest and of highest label entropy: columns region, which, latent."""
    x, y = np.log10(table["frequency"]), np.log10(table["mean_activation"])
    picked = []
    for name, (x0, x1, y0, y1) in boxes.items():
        inside = table[x.between(x0, x1) & y.between(y0, y1) & table["label_entropy"].notna()]
        order = inside.sort_values(["label_entropy", "latent"])["latent"]
        if len(order):
            picked += [(name, "lowest entropy", int(order.iloc[0])), (name, "highest entropy", int(order.iloc[-1]))]
    return pd.DataFrame(picked, columns=["region", "which", "latent"])


def distinctive_latents(stats: LatentStatistics) -> torch.Tensor:
    """For every class the latent active on most tokens of that class beyond the mean of the others: ``[C]``."""
    counts = stats.class_counts.double()
    others = (counts.sum(0) - counts) / max(1, len(counts) - 1)
    return (counts - others).argmax(1)


def top_latent(stats: LatentStatistics, exclude: Iterable[int]) -> int:
    """The latent active on most tokens of the data set (eq. 5), ties by lowest index, leaving out ``exclude``."""
    counts = stats.class_counts.sum(0)
    counts[list(exclude)] = -1
    return int(counts.argmax())


@torch.no_grad()
def token_latents(study: Study, ds: Images, row: int) -> torch.Tensor:
    """Latents of every token of one image, without prompt tokens: ``[T,S]``."""
    z = study.clip.below(load_pixels(study.clip, ds, [row]).pixels, study.layer)
    return study.sae.encode(z[0, :study.clip.n_tokens]).cpu()


def strongest(activation: torch.Tensor, k: int) -> list[int]:
    """The k latents of highest activation ``[S]``, ties by lowest index."""
    return activation.sort(descending=True, stable=True).indices[:k].tolist()


def masked(study: Study, ds: Images, row: int, latents: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each latent its heat map ``[g,g]`` and the softly masked image, on one image of a data set."""
    pixels = load_pixels(study.clip, ds, [row]).pixels
    heats = heat_maps(study.clip, study.sae, pixels, study.layer, list(latents))[0].cpu().numpy()
    return [(heat, soft_mask(ds[row].image, heat)) for heat in heats]


def mask_rows_of(study: Study, ds: Images, row: int, latents: Sequence[int]) -> list[MaskRow]:
    """Rows of masks of several latents on one image; the image stands beside the first."""
    return [MaskRow(f"latent {latent}", None if i else ds[row].image, heat, image, None, describe(study.stats, latent))
            for i, (latent, (heat, image)) in enumerate(zip(latents, masked(study, ds, row, latents)))]


def pair_latents(activations: Mapping[str, torch.Tensor], entropy: torch.Tensor, k: int) -> dict[str, int]:
    """Of two images' top-k latents: the shared one of lowest label entropy, and the strongest of each image alone.

    ``activations``: two names -> image-level activations ``[S]``; ``entropy [S]``: a shared latent that keeps to
    few classes says more about the noun than one that most images have.
    """
    tops = {name: strongest(activation, k) for name, activation in activations.items()}
    (first, second), chosen = tops.values(), {}
    if shared := [s for s in first if s in second and not torch.isnan(entropy[s])]:
        chosen["shared"] = min(shared, key=lambda s: float(entropy[s]))
    for name, top in tops.items():
        alone = [s for s in top if not (s in first and s in second)]
        chosen |= {f"{name} only": alone[0]} if alone else {}
    return chosen


def style_row(study: Study, latent: int, title: str, images: Iterable[tuple[Images, int]]) -> Row:
    """What fig. 4 shows of one latent: soft masks of ``images``, (data set, row) of each, and reference images."""
    shown = [masked(study, ds, row, [latent])[0][1] for ds, row in images]
    return Row(title, shown + references(study.stats, study.train, latent, 4))


def layer_latents(study: Study, ds: Images, row: int, token: tuple[int, int]) -> list[Row]:
    """The three strongest latents of one patch of one image at the study's layer (fig. 9)."""
    patches = token_latents(study, ds, row)[1:].unflatten(0, (study.clip.grid, study.clip.grid))
    return [Row(f"latent {latent}", references(study.stats, study.train, latent, 4), heat=patches[..., latent].numpy())
            for latent in strongest(patches[token], 3)]


def first_correct(study: Study, ds: Images, label: int) -> int:
    """Position of the first image of a class that zero-shot classification gets right, else of the class's first."""
    clip, rows = study.clip, np.flatnonzero(ds.labels == label)
    if not len(rows):
        raise ValueError(f"The data set has no image of class {label}; choose a class it has.")
    for batch in read_pixels(clip, ds, np.array_split(rows, -(-len(rows) // 8))):
        right = clip.logits(clip.above(clip.below(batch.pixels, -1), -1), study.text).argmax(1).cpu() == label
        if right.any():
            return int(batch.rows[right.numpy()][0])
    return int(rows[0])
