"""One function per figure of the paper, ``data -> Figure``; :func:`save` writes a figure and its numbers.

Drawings of the method are in ``schematics``, figures made of pictures in ``sheets``; both can be called
from here.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from patchsae import config
from patchsae.figures.canvas import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PAGE,
    PALE,
    RED,
    filled,
    halo,
    need,
    new_figure,
    use_style,
)
from patchsae.figures.schematics import schematic_ablation, schematic_autoencoder, schematic_overview
from patchsae.figures.sheets import (
    LayerLatent,
    MaskRow,
    Row,
    StyleLatent,
    image_rows,
    layers_grid,
    mask_rows,
    style_pair,
)
from patchsae.weights.files import write_atomically

__all__ = [
    "LayerLatent", "MaskRow", "Row", "StyleLatent", "image_rows", "latent_scatter", "layers_grid",
    "mask_rows", "pretraining_curves", "probe_table", "save", "save_table", "scatter_panels",
    "schematic_ablation", "schematic_autoencoder", "schematic_overview", "style_pair", "sweep",
    "training_curves", "use_style",
]


def save(figure: Figure, profile, name: str, table: pd.DataFrame) -> None:
    """Write ``<name>.png``, ``.pdf`` and ``.csv`` (the numbers plotted) into the profile's figures folder.

    The same figure gives the same bytes: no file holds a date or a version. Where the environment variable
    ``PATCHSAE_MANIFEST`` names a file, the paths written are appended to it, one a line.
    """
    nothing = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Creator": None, "Producer": None}}
    written = [
        write_atomically(profile.figures_dir / f"{name}.{kind}", lambda path, kind=kind: figure.savefig(
            path, format=kind, metadata=nothing[kind]))
        for kind in nothing
    ]
    _note(written)
    save_table(profile, name, table)


def save_table(profile, name: str, table: pd.DataFrame) -> None:
    """Write ``<name>.csv`` into the profile's figures folder, numbers to six digits."""
    _note([write_atomically(profile.figures_dir / f"{name}.csv", lambda path: table.to_csv(
        path, index=False, float_format="%.6g", lineterminator="\n"))])


def _note(written: Sequence[Path]) -> None:
    """Append paths to the manifest that the environment variable names, if it does."""
    if manifest := os.environ.get("PATCHSAE_MANIFEST"):
        inside = [p.relative_to(config.ROOT) if p.is_relative_to(config.ROOT) else p for p in written]
        with open(manifest, "a", encoding="utf-8") as lines:
            lines.writelines(f"{path.as_posix()}\n" for path in inside)


# Curves and dots ----------------------------------------------------------------------------------------


def training_curves(log: pd.DataFrame) -> Figure:
    """How the autoencoder was trained (sec. 3.1): loss terms, L0, share of dead latents, explained variance.

    ``log``: columns step, mse, l1, ghost, total, l0, dead (share), ev; one row a logged step.
    """
    need(log, "training log", "step", "mse", "l1", "ghost", "total", "l0", "dead", "ev")
    figure = new_figure(PAGE, 1.75)
    axes = figure.subplots(1, 4)
    terms = (("total", "total", INK), ("mse", "MSE", BLUE), ("l1", "$L_1$", ORANGE),
             ("ghost", "ghost", GREEN))
    for term, label, colour in terms:
        axes[0].plot(log["step"], log[term].where(log[term] > 0), color=colour, label=label)
    axes[0].set_yscale("log")
    axes[0].set_ylim(top=8 * log["total"].max())
    axes[0].legend(ncols=2, columnspacing=0.9, loc="upper right")
    for panel, column in zip(axes[1:], ("l0", "dead", "ev")):
        panel.plot(log["step"], log[column], color=BLUE)
    axes[1].set_ylim(bottom=0)
    axes[2].yaxis.set_major_formatter(PercentFormatter(1))
    axes[2].yaxis.set_major_locator(MaxNLocator(4))
    axes[2].set_ylim(0, max(0.02, 1.08 * log["dead"].max()))
    axes[3].set_ylim(max(-0.05, log["ev"].min() - 0.05), 1)
    titles = ("loss terms", "active latents ($L_0$)", "dead latents", "explained variance")
    for panel, title in zip(axes, titles):
        panel.set(title=title, xlabel="training step")
        panel.xaxis.set_major_locator(MaxNLocator(3))
        panel.grid(axis="y")
    return figure


def pretraining_curves(log: pd.DataFrame) -> Figure:
    """How the mini CLIP was trained, for its data card: the warm-up's loss, then the three contrasts.

    ``log``: columns stage ("warm-up" or "contrasts"), step, heads, caption, phrase, patch.
    """
    need(log, "pre-training log", "stage", "step", "heads", "caption", "phrase", "patch")
    figure = new_figure(PAGE, 1.9)
    axes = figure.subplots(1, 2)
    terms = {"warm-up": {"heads": INK}, "contrasts": {"caption": ORANGE, "phrase": BLUE, "patch": GREEN}}
    for panel, (stage, colours) in zip(axes, terms.items()):
        rows = log[log["stage"] == stage]
        for term, colour in colours.items():
            panel.plot(rows["step"], rows[term], color=colour, label=term)
        panel.set(title=stage, xlabel="training step", ylabel="loss", yscale="log")
        panel.grid(axis="y")
        panel.legend()
    return figure


def sweep(table: pd.DataFrame) -> Figure:
    """Table 2 of the paper as dots: one line a configuration, one dot a seed.

    ``table``: columns configuration, seed, mse, l0, l1, ev_patch, ev_cls, dead, accuracy_original and
    accuracy_spliced, shares in [0, 1]. "default" is highlighted; "random" is grey and gives the floor.
    """
    need(table, "sweep", "configuration", "seed", "mse", "l0", "l1", "ev_patch", "ev_cls", "dead",
          "accuracy_original", "accuracy_spliced")
    names = list(dict.fromkeys(table["configuration"]))
    figure = new_figure(PAGE, 0.95 + 0.17 * len(names))
    axes = figure.subplots(1, 4, sharey=True, width_ratios=(1.3, 1, 1, 1.3))
    for panel, series, title in (
        (axes[0], {"ev_patch": "patch tokens", "ev_cls": "class token"}, "explained variance"),
        (axes[1], {"l0": ""}, "active latents ($L_0$)"),
        (axes[2], {"dead": ""}, "dead latents"),
        (axes[3], {"accuracy_spliced": "spliced", "accuracy_original": "original"}, "zero-shot accuracy"),
    ):
        _dots(panel, table, names, series)
        panel.set_xlabel(title)
    axes[0].set_xlim(-0.12, 1.04)
    axes[1].set_xscale("log")
    axes[3].set_xlim(-0.04, 1.04)
    for panel in axes[2:]:
        panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel.set_xlim(left=min(0, panel.get_xlim()[0]))
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    for label in axes[0].get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == "default" else "normal")
    return figure


def _dots(panel: Axes, table: pd.DataFrame, names: list[str], series: Mapping[str, str]) -> None:
    """Dots of one panel of :func:`sweep`; what lies left of the axis is an arrow at its edge."""
    rows = table["configuration"].map(names.index)
    random = table["configuration"] == "random"
    for (column, label), colour, hollow in zip(series.items(), (BLUE, ORANGE), (False, True)):
        colours = np.where(random, "#9a9a9a", colour)
        shown = table[column].clip(lower=-0.1)
        for marker, part in (("o", table[column] >= -0.1), ("<", table[column] < -0.1)):
            panel.scatter(shown[part], rows[part], s=15, marker=marker, linewidths=0.9, zorder=3 - hollow,
                          facecolors="none" if hollow else colours[part], edgecolors=colours[part])
        if label:
            face = "none" if hollow else colour
            panel.scatter([], [], s=15, facecolors=face, edgecolors=colour, label=label)
        if column in ("ev_patch", "accuracy_spliced") and (table[column][random] > -0.1).any():
            panel.axvline(shown[random].mean(), color=PALE, lw=0.7, ls=(0, (2, 2)), zorder=1)
    if "default" in names:
        row = names.index("default")
        panel.axhspan(row - 0.5, row + 0.5, color="#e8f1f8", lw=0, zorder=0)
    if len(series) > 1:
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, columnspacing=0.8,
                     handletextpad=0.1)
    panel.grid(axis="y")
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)


def probe_table(table: pd.DataFrame) -> Figure:
    """What linear probes read from each layer, a panel per concept.

    ``table``: columns layer, concept, tokens ("patch" or "class"), accuracy, chance (shares); several rows of
    one point, such as seeds, are averaged.
    """
    need(table, "probe", "layer", "concept", "tokens", "accuracy", "chance")
    concepts = list(dict.fromkeys(table["concept"]))
    figure = new_figure(PAGE, 1.95)
    axes = figure.subplots(1, len(concepts), sharey=True, squeeze=False)[0]
    for panel, concept in zip(axes, concepts):
        means = table[table["concept"] == concept].groupby(["tokens", "layer"])[["accuracy", "chance"]].mean()
        for tokens, label, colour, marker in (("patch", "patch tokens", BLUE, "o"),
                                              ("class", "class token", ORANGE, "s")):
            if tokens in means.index:
                line = means.loc[tokens, "accuracy"]
                panel.plot(line.index, line, color=colour, marker=marker, ms=3, label=label)
        chance = means["chance"].groupby("layer").mean()
        panel.plot(chance.index, chance, color=GREY, lw=0.9, ls=(0, (3, 2)), label="chance")
        panel.set(title=concept, xlabel="layer")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.grid(axis="y")
    axes[0].set(ylabel="probe accuracy", ylim=(0, 1.02))
    axes[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure


# Scatters of latents ------------------------------------------------------------------------------------

_STATISTICS = ("latent", "frequency", "mean_activation", "label_entropy", "label_std")


def latent_scatter(stats: pd.DataFrame, regions: Mapping[str, Sequence[float]] | None = None,
                   picked: Mapping[int, str] | None = None) -> Figure:
    """Fig. 3, left: every latent by log10 frequency and log10 mean activation, coloured by label entropy.

    ``stats``: columns latent, frequency, mean_activation, label_entropy, label_std; light grey = no entropy.
    ``regions``: name -> (x0, x1, y0, y1) in log10 units. ``picked``: latent -> letter.
    """
    need(stats, "latent statistics", *_STATISTICS)
    figure = new_figure(4.2, 3.6)
    axes = figure.subplot_mosaic([["top", ".", "."], ["main", "right", "bar"]], width_ratios=(5, 0.8, 0.2),
                                 height_ratios=(0.8, 5))
    main, alive = axes["main"], _alive(stats)
    points = _points(main, stats, stats["label_entropy"].max())
    for side, column, orientation in (("top", "x", "vertical"), ("right", "y", "horizontal")):
        axes[side].hist(alive[column], bins=50, color="#9fb8c9", orientation=orientation)
        axes[side].axis("off")
    axes["top"].sharex(main)
    axes["right"].sharey(main)
    figure.colorbar(points, cax=axes["bar"], label="label entropy").outline.set_visible(False)
    for name, (x0, x1, y0, y1) in (regions or {}).items():
        main.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=INK, lw=0.8, ls=(0, (3, 2))))
        main.annotate(name, (x0, y1), (2, -2), textcoords="offset points", va="top", fontsize=6.5, **halo())
    _letters(main, alive, picked or {})
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
        points = _points(panel, stats, highest, area=7 if len(panels) < 3 else 2.5)
        panel.set_title(title)
        panel.label_outer()
    figure.colorbar(points, ax=axes, label="label entropy", aspect=28, pad=0.01).outline.set_visible(False)
    return figure


def _alive(stats: pd.DataFrame) -> pd.DataFrame:
    """Latents that ever fire, with their place in the scatter."""
    alive = stats[(stats["frequency"] > 0) & (stats["mean_activation"] > 0)]
    return alive.assign(x=np.log10(alive["frequency"]), y=np.log10(alive["mean_activation"]))


def _points(axes: Axes, stats: pd.DataFrame, highest: float, area: float = 7):
    """Draw the latents as points of at most this area; those without an entropy lie below the others."""
    alive = _alive(stats)
    size, known = float(np.clip(9000 / max(1, len(alive)), 0.1 * area, area)), alive["label_entropy"].notna()
    # Rasterised: tens of thousands of vector points make a pdf of megabytes.
    common = {"s": size, "linewidths": 0, "rasterized": True}
    axes.scatter(alive["x"][~known], alive["y"][~known], color=PALE, **common)
    shown = alive[known]
    points = axes.scatter(shown["x"], shown["y"], c=shown["label_entropy"], vmin=0, vmax=highest, **common)
    axes.set(xlabel="$\\log_{10}$ frequency", ylabel="$\\log_{10}$ mean activation")
    if silent := len(stats) - len(alive):
        axes.text(0.02, 0.99, f"{silent:,} of {len(stats):,} never fire", transform=axes.transAxes,
                  va="top", fontsize=6, color=GREY)
    return points


def _letters(axes: Axes, alive: pd.DataFrame, picked: Mapping[int, str]) -> None:
    """Ring the picked latents and write their letters beside them."""
    places = alive.set_index("latent")[["x", "y"]]
    for latent, letter in picked.items():
        if latent not in places.index:
            raise ValueError(f"Latent {latent} cannot be marked: it never fires; pick one that does.")
        at = tuple(places.loc[latent])
        axes.plot(*at, "o", ms=5, mfc="none", mec=RED, mew=1.1)
        axes.annotate(letter, at, (4, 3), textcoords="offset points", weight="bold", color=RED, fontsize=8,
                      **halo())
