"""Choosing latents by rule and gathering what a picture of them shows: what notebooks 02 to 04 have in common."""

import numpy as np
import pandas as pd
import torch

from patchsae.activations import load_pixels, read_pixels
from patchsae.clip import Clip
from patchsae.figures.sheets import LayerLatent, MaskRow, Row, StyleLatent
from patchsae.latents import LatentStatistics
from patchsae.masks import heat_maps, soft_mask
from patchsae.sae import SparseAutoencoder


def describe(stats: LatentStatistics, latent: int) -> str:
    """The three numbers under a row of reference images, as in fig. 10."""
    entropy = float(stats.label_entropy[latent])
    return (f"frequency {stats.frequency[latent]:.3f}, activation {stats.mean_activation[latent]:.3f}, "
            + ("too few for an entropy" if np.isnan(entropy) else f"entropy {entropy:.2f}"))


def references(stats: LatentStatistics, ds, latent: int, k: int | None = None) -> list[np.ndarray]:
    """The strongest images of a latent: up to ``k`` uint8 ``[H,W,3]``, looked up by position and checked by id."""
    rows, ids = stats.reference_rows[latent][:k].tolist(), stats.reference_ids[latent][:k]
    items = [(ds[row], name) for row, name in zip(rows, ids) if row >= 0]
    if wrong := [name for item, name in items if item.id != name]:
        raise ValueError(f"Image {wrong[0]} of the statistics is another image in this data set; use the data set the "
                         "statistics were taken of.")
    return [item.image for item, _ in items]


def reference_row(stats: LatentStatistics, ds, latent: int, title: str = "", k: int | None = None) -> Row:
    """A row of reference images with its three numbers."""
    return Row(title or f"latent {latent}", references(stats, ds, latent, k), describe(stats, latent))


def class_rows(ds, n_classes: int, k: int) -> list[Row]:
    """Images of classes spread over the label order, a row each; classes come in turn in every data set here."""
    many = len(ds.class_names)
    rows = []
    for label in range(0, many, max(1, many // n_classes))[:n_classes]:
        items = [item for _, item in ds.readable(range(label, min(len(ds), many * k), many))]
        rows.append(Row(ds.class_names[label], [item.image for item in items if item.label == label]))
    return rows


def regions(table: pd.DataFrame, share: float = 0.25) -> dict[str, tuple[float, float, float, float]]:
    """Three regions of the scatter by quantiles of log10 frequency and log10 activation: (x0, x1, y0, y1).

    The corners hold the lowest and the highest ``share`` in both; "between" is around the two medians.
    """
    alive = table[(table["frequency"] > 0) & table["label_entropy"].notna()]
    x, y = np.log10(alive["frequency"]), np.log10(alive["mean_activation"])

    def box(low, high):
        return x.quantile(low), x.quantile(high), y.quantile(low), y.quantile(high)

    middle = box(0.5 - share / 2, 0.5 + share / 2)
    return {"rare, weak": box(0, share), "between": middle, "frequent, strong": box(1 - share, 1)}


def pick_latents(table: pd.DataFrame, boxes: dict) -> pd.DataFrame:
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


def top_latent(stats: LatentStatistics, exclude=()) -> int:
    """The latent active on most tokens of the data set (eq. 5), ties by lowest index, leaving out ``exclude``."""
    counts = stats.class_counts.sum(0).clone()
    counts[list(exclude)] = -1
    return int(counts.argmax())


@torch.no_grad()
def image_activations(clip: Clip, sae: SparseAutoencoder, ds, row: int, layer: int) -> torch.Tensor:
    """Image-level activation of every latent on one image: ``[S]``, the mean over its tokens (sec. 3.2)."""
    return sae.encode(clip.below(load_pixels(clip, ds, [row]).pixels, layer)[0, :clip.n_tokens]).mean(0).cpu()


def strongest(activation: torch.Tensor, k: int) -> list[int]:
    """The k latents of highest activation ``[S]``, ties by lowest index."""
    return activation.sort(descending=True, stable=True).indices[:k].tolist()


def masked(clip: Clip, sae: SparseAutoencoder, ds, row: int, layer: int, latents) -> list[tuple]:
    """For each latent its heat map ``[g,g]`` and the softly masked image, on one image of a data set."""
    heat = heat_maps(clip, sae, load_pixels(clip, ds, [row]).pixels, layer, list(latents))[0].cpu().numpy()
    return [(h, soft_mask(ds[row].image, h)) for h in heat]


def truth(ds, row: int, kind: str, name: str) -> np.ndarray | None:
    """Ground-truth mask of a concept, bool ``[H,W]``; None where the data set has none."""
    return ds.scene(row).mask(kind, name) if ds.concepts else None


def mask_rows_of(clip: Clip, sae: SparseAutoencoder, stats: LatentStatistics, ds, row: int, layer: int,
                 latents) -> list[MaskRow]:
    """Rows of masks of several latents on one image; the image stands beside the first."""
    shown = masked(clip, sae, ds, row, layer, latents)
    return [MaskRow(f"latent {latent}", ds[row].image if i == 0 else None, heat, image, None, describe(stats, latent))
            for i, (latent, (heat, image)) in enumerate(zip(latents, shown))]


def pair_latents(activations: dict[str, torch.Tensor], entropy: torch.Tensor, k: int) -> dict[str, int]:
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


def style_latent(clip: Clip, sae: SparseAutoencoder, stats: LatentStatistics, train, latent: int, title: str,
                 layer: int, images: list[tuple]) -> StyleLatent:
    """What fig. 4 shows of one latent; ``images``: (data set, row) of each of the two."""
    shown = [masked(clip, sae, ds, row, layer, [latent])[0][1] for ds, row in images]
    return StyleLatent(latent, title, shown, references(stats, train, latent, 4))


def layer_latents(clip: Clip, sae: SparseAutoencoder, stats: LatentStatistics, ds, row: int, train, layer: int,
                  token: tuple[int, int], k: int = 3) -> list[LayerLatent]:
    """The k strongest latents of one patch of one image at one layer (fig. 9)."""
    place = 1 + token[0] * clip.grid + token[1]
    with torch.no_grad():
        h = sae.encode(clip.below(load_pixels(clip, ds, [row]).pixels, layer)[0])
    top = strongest(h[place].cpu(), k)
    heats = h[1:clip.n_tokens, top].T.unflatten(1, (clip.grid, clip.grid)).cpu().numpy()
    return [LayerLatent(f"latent {s}", heat, references(stats, train, s, 4)) for s, heat in zip(top, heats)]


def first_correct(clip: Clip, ds, label: int, text_features: torch.Tensor) -> int:
    """Position of the first image of a class that zero-shot classification gets right, else of the class's first."""
    rows = np.flatnonzero(np.asarray(ds.labels) == label)
    if not len(rows):
        raise ValueError(f"The data set has no image of class {label}; choose a class it has.")
    for batch in read_pixels(clip, ds, np.array_split(rows, -(-len(rows) // 8))):
        right = clip.logits(clip.above(clip.below(batch.pixels, -1), -1), text_features).argmax(1).cpu() == label
        if right.any():
            return int(batch.rows[right.numpy()][0])
    return int(rows[0])
