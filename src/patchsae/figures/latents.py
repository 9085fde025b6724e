"""Scatters of latents (figs. 3, 8 and 9): how often against how strongly they fire."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from patchsae.figures.canvas import GREY, INK, PAGE, PALE, RED, filled, need, new_figure, text_width
from patchsae.figures.charts import colour_bar

_STATISTICS = ("latent", "frequency", "mean_activation", "label_entropy", "label_std")


def latent_scatter(stats: pd.DataFrame, regions: Mapping[str, Sequence[float]] | None = None,
                   picked: Mapping[int, str] | None = None) -> Figure:
    """Fig. 3, left: every latent by log10 frequency and log10 mean activation, coloured by label entropy.

    ``stats``: columns latent, frequency, mean_activation, label_entropy, label_std; light grey = no entropy.
    ``regions``: name -> (x0, x1, y0, y1) in log10 units. ``picked``: latent -> letter.
    """
    need(stats, "latent statistics", *_STATISTICS)
    figure = new_figure(4.2, 3.6)
    axes = figure.subplot_mosaic([["top", "."], ["main", "right"]], width_ratios=(5, 0.8), height_ratios=(0.8, 5))
    points = scatter(axes["main"], stats, "label_entropy", stats["label_entropy"].max())
    sns.histplot(alive(stats), x="x", bins=50, color="#9fb8c9", element="step", lw=0, alpha=1, ax=axes["top"])
    sns.histplot(alive(stats), y="y", bins=50, color="#9fb8c9", element="step", lw=0, alpha=1, ax=axes["right"])
    for side in ("top", "right"):
        axes[side].axis("off")
    axes["top"].sharex(axes["main"])
    axes["right"].sharey(axes["main"])
    colour_bar(figure, points, [axes["main"], axes["right"]], "label entropy")
    mark(axes["main"], stats, regions or {}, picked or {})
    return figure


def scatter_panels(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """Figs. 8 and 9: :func:`latent_scatter` of several autoencoders on the same axes and colours.

    ``panels``: title -> statistics, as for :func:`latent_scatter`.
    """
    for stats in filled(panels, "panels").values():
        need(stats, "latent statistics", *_STATISTICS)
    width = min(PAGE, 0.9 + 2.4 * len(panels))
    figure = new_figure(width, 0.65 + min(2.3, (width - 0.9) / len(panels)))
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    highest = max(stats["label_entropy"].max() for stats in panels.values())
    for panel, (title, stats) in zip(axes, panels.items()):
        points = scatter(panel, stats, "label_entropy", highest, area=7 if len(panels) < 3 else 2.5)
        panel.set_title(title)
        panel.label_outer()
    colour_bar(figure, points, axes, "label entropy")
    return figure


def alive(stats: pd.DataFrame) -> pd.DataFrame:
    """Latents that ever fire, with their place in the scatter: columns x and y."""
    fire = stats[(stats["frequency"] > 0) & (stats["mean_activation"] > 0)]
    return fire.assign(x=np.log10(fire["frequency"]), y=np.log10(fire["mean_activation"]))


def scatter(axes: Axes, stats: pd.DataFrame, colour: str, highest: float, area: float = 7) -> PathCollection:
    """Draw the latents as points of at most this area, coloured by a column from 0 to ``highest``; those of which it
    is not known lie below the others."""
    points = alive(stats)
    # Rasterised: tens of thousands of vector points make a pdf of megabytes.
    common = {"s": float(np.clip(9000 / max(1, len(points)), 0.1 * area, area)), "linewidths": 0, "rasterized": True}
    unknown, known = (points[points[colour].isna() == missing] for missing in (True, False))
    axes.scatter(unknown["x"], unknown["y"], color=PALE, **common)
    shown = axes.scatter(known["x"], known["y"], c=known[colour], vmin=0, vmax=highest, **common)
    axes.set(xlabel="$\\log_{10}$ frequency", ylabel="$\\log_{10}$ mean activation")
    if silent := len(stats) - len(points):
        axes.text(0.02, 0.99, f"{silent:,} of {len(stats):,} never fire", transform=axes.transAxes,
                  va="top", fontsize=6, color=GREY)
    return shown


def mark(axes: Axes, stats: pd.DataFrame, regions: Mapping[str, Sequence[float]], picked: Mapping[int, str]) -> None:
    """Frame the regions of a scatter and ring the picked latents, with names where they cover no point."""
    for x0, x1, y0, y1 in regions.values():
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=INK, lw=0.8, ls=(0, (3, 2))))
    axes.figure.draw_without_rendering()  # finds limits and sizes, on which places of names depend
    places = alive(stats).set_index("latent")[["x", "y"]]
    taken = axes.transLimits.transform(places)
    for name, (x0, _, _, y1) in regions.items():
        taken = _label(axes, taken, name, (x0, y1), fontsize=6.5, color=INK)
    for latent, letter in picked.items():
        if latent not in places.index:
            raise ValueError(f"Latent {latent} cannot be marked: it never fires; pick one that does.")
        at = tuple(places.loc[latent])
        axes.plot(*at, "o", ms=5, mfc="none", mec=RED, mew=1.1)
        taken = _label(axes, taken, letter, at, fontsize=8, color=RED, weight="bold")


def _label(axes: Axes, taken: np.ndarray, text: str, at: tuple[float, float], **options) -> np.ndarray:
    """Write a text where it covers nothing taken ``[N,2]`` (shares of the axes), its upper left corner at a place.

    If that is not free it is written near, with a line. Gives what is taken then.
    """
    space = axes.get_position().size * axes.figure.get_size_inches()
    size = np.array([text_width([text], options["fontsize"]) + 0.05, options["fontsize"] / 72]) / space
    target = axes.transLimits.transform(at) + (0.03, -0.02)
    corners = np.stack(np.meshgrid(*(np.arange(0.01, 0.99 - side, 0.015) for side in size)), -1).reshape(-1, 2)
    corners = np.concatenate([[target - (0, size[1])], corners])
    covers = [np.all((taken > corner - 0.015) & (taken < corner + size + 0.015), 1).any() for corner in corners]
    away = np.linalg.norm(corners + (0, size[1]) - target, axis=1) + 10.0 * np.array(covers)
    corner, line = corners[away.argmin()], {"arrowstyle": "-", "lw": 0.5, "color": options["color"], "shrinkB": 2}
    axes.annotate(text, at, corner, textcoords="axes fraction", va="bottom",
                  arrowprops=line if away.argmin() else None, **options)
    letters = np.stack(np.meshgrid(np.linspace(0, 1, 9), np.linspace(0, 1, 9)), -1).reshape(-1, 2)
    return np.concatenate([taken, corner + size * letters])
