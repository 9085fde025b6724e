"""Figures of an autoencoder: its training, sweeps of settings, and how often against how strongly latents fire."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from patchsae.figures import canvas
from patchsae.figures.canvas import BLUE, DASHES, GREEN, GREY, INK, ORANGE, PAGE, PALE, RED, needs
from patchsae.figures.charts import colour_bar, name_rows, panels, percent

#: Term of a loss -> colour.
TERMS = {"total": INK, "MSE": BLUE, "$L_1$": ORANGE, "ghost": GREEN}
CONTRASTS = {"heads": INK, "caption": ORANGE, "phrase": BLUE, "patch": GREEN}
#: Values of a sweep below this are arrows at the left edge.
LEAST_SHOWN = -0.1


@needs("step", "mse", "l1", "ghost", "total", "l0", "dead", "ev")
def training_curves(log: pd.DataFrame) -> Figure:
    """How the autoencoder was trained (sec. 3.1): loss terms, L0, share of dead latents, explained variance."""
    figure, axes = panels(("loss terms", "active latents ($L_0$)", "dead latents", "explained variance"), 1.45)
    terms, l0, dead, ev = axes.values()
    _terms(terms, log.rename(columns={"mse": "MSE", "l1": "$L_1$"}), TERMS)
    for panel, column in ((l0, "l0"), (dead, "dead"), (ev, "ev")):
        sns.lineplot(log, x="step", y=column, estimator=None, color=BLUE, ax=panel)
        panel.grid(axis="y")
    for panel in axes.values():
        panel.set(xlabel="training step", ylabel="")
        panel.xaxis.set_major_locator(MaxNLocator(3))
    l0.set_ylim(bottom=0)
    dead.set_ylim(0, max(0.01, 1.08 * log["dead"].max()))
    dead.yaxis.set_major_locator(MaxNLocator(4))
    percent(dead.yaxis, None)
    ev.set_ylim(max(-0.05, log["ev"].min() - 0.05), 1)
    return figure


@needs("stage", "step", *CONTRASTS)
def pretraining_curves(log: pd.DataFrame) -> Figure:
    """How the mini CLIP was trained, for its data card: the warm-up's loss, then the three contrasts."""
    figure, axes = panels(("warm-up", "contrasts"), 1.6)
    for stage, panel in axes.items():
        _terms(panel, log[log["stage"] == stage], CONTRASTS)
    return figure


def _terms(panel: Axes, log: pd.DataFrame, colours: Mapping[str, str]) -> None:
    """Terms of a loss against the step, where they are not zero."""
    terms = log.melt("step", list(colours), var_name="term").query("value > 0")
    sns.lineplot(terms, x="step", y="value", hue="term", palette=dict(colours), estimator=None, ax=panel)
    panel.set(yscale="log", xlabel="training step", ylabel="loss")
    panel.legend()
    panel.grid(axis="y")


@needs("configuration", "l0", "ev_patch", "ev_cls", "dead", "accuracy_original", "accuracy_spliced")
def sweep(table: pd.DataFrame) -> Figure:
    """Table 2 of the paper: a row a configuration, a dot a seed; "default" is highlighted, "random" is the floor."""
    figure = canvas.new_figure(PAGE, 0.95 + 0.17 * table["configuration"].nunique())
    ev, l0, dead, accuracy = figure.subplots(1, 4, sharey=True, width_ratios=(1.3, 1, 1, 1.3))
    _seeds(ev, table, {"ev_patch": "patch tokens", "ev_cls": "class token"}, "explained variance")
    _seeds(l0, table, {"l0": ""}, "active latents ($L_0$)")
    _seeds(dead, table, {"dead": ""}, "dead latents")
    _seeds(accuracy, table, {"accuracy_spliced": "spliced", "accuracy_original": "original"}, "zero-shot accuracy")
    ev.set_xlim(LEAST_SHOWN - 0.02, 1.04)
    l0.set_xscale("log")
    dead.set_xlim(left=min(0, dead.get_xlim()[0]))
    accuracy.set_xlim(-0.04, 1.04)
    percent(dead.xaxis)
    percent(accuracy.xaxis)
    return figure


def _seeds(panel: Axes, table: pd.DataFrame, series: Mapping[str, str], title: str) -> None:
    """Dots of one panel of :func:`sweep`; what lies left of the axis is an arrow at its edge."""
    table = table.assign(random=table["configuration"] == "random")
    order = list(table["configuration"].unique())
    for (column, label), colour, marker in zip(series.items(), (BLUE, ORANGE), "od"):
        beyond = table[column] < LEAST_SHOWN
        for shape, rows in ((marker, table[~beyond]), ("<", table[beyond].assign(**{column: LEAST_SHOWN}))):
            sns.stripplot(rows, x=column, y="configuration", order=order, hue="random", marker=shape, jitter=False,
                          orient="y", palette={False: colour, True: "#9a9a9a"}, size=4.2, legend=False, ax=panel)
        if label:
            panel.plot([], [], marker, color=colour, ms=4.2, label=label)
            panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, columnspacing=0.8, handletextpad=0.1)
        if column in ("ev_patch", "accuracy_spliced") and (table[column][table["random"]] > LEAST_SHOWN).any():
            panel.axvline(table[column][table["random"]].mean(), color=PALE, lw=0.7, ls=DASHES, zorder=1)
    panel.set_xlabel(title)
    name_rows(panel, order, "default")


@needs("latent", "frequency", "mean_activation", "label_entropy")
def latent_scatter(stats: pd.DataFrame, regions: Mapping[str, Sequence[float]],
                   picked: Mapping[int, str] | None = None) -> Figure:
    """Fig. 3, left: every latent by log10 frequency and log10 mean activation, coloured by label entropy if it has one.

    ``regions``: name -> (x0, x1, y0, y1) in log10 units. ``picked``: latent -> letter.
    """
    figure = canvas.new_figure(4.2, 3.6)
    axes = figure.subplot_mosaic([["x", "."], ["main", "y"]], width_ratios=(5, 0.8), height_ratios=(0.8, 5))
    points = scatter(axes["main"], stats, "label_entropy")
    for side in "xy":
        sns.histplot(alive(stats), **{side: side}, bins=50, color="#9fb8c9", element="step", lw=0, alpha=1,
                     ax=axes[side])
        axes[side].axis("off")
    axes["x"].sharex(axes["main"])
    axes["y"].sharey(axes["main"])
    colour_bar(figure, points, [axes["main"], axes["y"]], "label entropy")
    mark(axes["main"], stats, regions, picked or {})
    return figure


def scatter_panels(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Figs. 8 and 9: :func:`latent_scatter` of several autoencoders, by title, on the same axes and colours."""
    height, area = (2.65, 7) if len(tables) < 3 else (1.52, 2.5)
    figure, axes = panels(tables, height, width=0.9 + 2.4 * len(tables), sharex=True, sharey=True)
    shown = [scatter(panel, tables[title], "label_entropy", area) for title, panel in axes.items()]
    highest = max(stats["label_entropy"].max() for stats in tables.values())
    for panel, points in zip(axes.values(), shown):
        panel.label_outer()
        points.set_clim(0, highest)
    colour_bar(figure, shown[-1], list(axes.values()), "label entropy")
    return figure


@needs("latent", "frequency", "mean_activation")
def alive(stats: pd.DataFrame) -> pd.DataFrame:
    """Latents that ever fire, with their place in the scatter: columns x and y."""
    fire = stats[(stats["frequency"] > 0) & (stats["mean_activation"] > 0)]
    return fire.assign(x=np.log10(fire["frequency"]), y=np.log10(fire["mean_activation"]))


def scatter(axes: Axes, stats: pd.DataFrame, colour: str, area: float = 7) -> PathCollection:
    """Draw the latents as points of at most this area, coloured by a column from 0; where it is not known, below."""
    points = alive(stats)
    # Rasterised: tens of thousands of vector points make a pdf of megabytes.
    common = {"s": float(np.clip(9000 / max(1, len(points)), 0.1 * area, area)), "linewidths": 0, "rasterized": True}
    unknown, known = (points[points[colour].isna() == missing] for missing in (True, False))
    axes.scatter(unknown["x"], unknown["y"], color=PALE, **common)
    shown = axes.scatter(known["x"], known["y"], c=known[colour], vmin=0, vmax=stats[colour].max(), **common)
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
    """Write a text at a place where it covers nothing taken ``[N,2]`` (shares of the axes), else near it, with a line;
    gives what is taken then."""
    space = axes.get_position().size * axes.figure.get_size_inches()
    size = np.array([canvas.text_width([text], options["fontsize"]) + 0.05, options["fontsize"] / 72]) / space
    target = axes.transLimits.transform(at) + (0.03, -0.02) - (0, size[1])
    grids = np.meshgrid(*(np.arange(0.01, 0.99 - side, 0.015) for side in size))
    corners = np.concatenate([[target], np.stack(grids, -1).reshape(-1, 2)])
    covers = [np.all((taken > corner - 0.015) & (taken < corner + size + 0.015), 1).any() for corner in corners]
    away = np.linalg.norm(corners - target, axis=1) + 10.0 * np.array(covers)
    corner, line = corners[away.argmin()], {"arrowstyle": "-", "lw": 0.5, "color": options["color"], "shrinkB": 2}
    axes.annotate(text, at, corner, textcoords="axes fraction", va="bottom",
                  arrowprops=line if away.argmin() else None, **options)
    letters = np.stack(np.meshgrid(np.linspace(0, 1, 9), np.linspace(0, 1, 9)), -1).reshape(-1, 2)
    return np.concatenate([taken, corner + size * letters])
