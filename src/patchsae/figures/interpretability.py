"""Figures of measured interpretability: concepts recovered, what a scatter tells, names, places, other tasks."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from patchsae.figures.canvas import BLUE, GREEN, GREY, INK, ORANGE, PAGE, PALE, PURPLE, RED, halo, need, new_figure

#: Kind of concept -> colour.
KIND_LOOKS = {"noun": BLUE, "colour": ORANGE, "texture": GREEN, "background": PURPLE, "style": GREY, "text": RED}


def _rows(panel: Axes, names: list, bold: str = "") -> None:
    """A named row a thing, the first on top, one of them highlighted."""
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.grid(axis="y")
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    if bold in names:
        panel.axhspan(names.index(bold) - 0.5, names.index(bold) + 0.5, color="#e8f1f8", lw=0, zorder=0)
    for label in panel.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == bold else "normal")


def _bars(panel: Axes, rows: pd.DataFrame, column: str, at, colour: str) -> None:
    """Dots with their intervals, one a row of the table."""
    panel.hlines(at, rows["low"], rows["high"], color=colour, lw=1.3)
    panel.plot(rows[column], at, "o", color=colour, ms=3.6)


def recovery_dots(table: pd.DataFrame, first: str = "autoencoder") -> Figure:
    """Share of concepts recovered by every method, together and by kind, with intervals.

    ``table``: columns method, kind, share, low, high; kinds are panels, and ``first`` is highlighted.
    """
    need(table, "recovery", "method", "kind", "share", "low", "high")
    names, kinds = (list(dict.fromkeys(table[c])) for c in ("method", "kind"))
    figure = new_figure(PAGE, 0.7 + 0.17 * len(names))
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for panel, kind in zip(axes, kinds):
        rows = table[table["kind"] == kind]
        _bars(panel, rows, "share", rows["method"].map(names.index), KIND_LOOKS.get(kind, INK))
        panel.set(title=kind, xlim=(-0.06, 1.06), xticks=(0, 0.5, 1))
        panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _rows(panel, names, first)
    figure.supxlabel("share of concepts recovered", fontsize=7)
    return figure


def concept_dots(table: pd.DataFrame, bar: float, per_row: int = 48) -> Figure:
    """Every concept: its average precision under several methods, sorted within its kind, in two or more strips.

    ``table``: columns kind, concept, method, auprc; the first method is filled and decides the order.
    """
    need(table, "concept", "kind", "concept", "method", "auprc")
    methods = list(dict.fromkeys(table["method"]))
    own = table[table["method"] == methods[0]]
    means = own.groupby(["kind", "concept"], sort=False)["auprc"].mean()
    order = [name for _, rows in means.groupby(level=0, sort=False) for name in rows.sort_values(ascending=False).index]
    strips = [order[i:i + per_row] for i in range(0, len(order), per_row)]
    figure = new_figure(PAGE, 1.55 * len(strips) + 0.2)
    for panel, names in zip(figure.subplots(len(strips), 1, squeeze=False)[:, 0], strips):
        for method, marker in zip(methods, ("o", "_", "x")):
            values = table[table["method"] == method].groupby(["kind", "concept"])["auprc"].mean()
            colours = [KIND_LOOKS[kind] for kind, _ in names] if marker == "o" else GREY
            panel.scatter(range(len(names)), [values.get(n, np.nan) for n in names], c=colours, marker=marker, s=14,
                          linewidths=0.9, zorder=3 if marker == "o" else 2, label=method)
        panel.axhline(bar, color=INK, lw=0.6, ls=(0, (3, 2)))
        panel.set_xticks(range(len(names)), [name for _, name in names], rotation=90, fontsize=6)
        panel.set(xlim=(-0.8, per_row - 0.2), ylim=(0, 1.03), ylabel="average precision")
        panel.tick_params(axis="x", length=0)
        panel.grid(axis="y")
    handles, labels = panel.get_legend_handles_labels()
    kinds = [kind for kind in KIND_LOOKS if kind in set(own["kind"])]
    dots = [panel.scatter([], [], c=KIND_LOOKS[kind], s=14) for kind in kinds]
    figure.legend(handles[1:] + dots, labels[1:] + kinds, loc="outside upper right", ncols=9,
                  columnspacing=0.8, handletextpad=0.1)
    return figure


def width_curves(table: pd.DataFrame, reference: float | None = None) -> Figure:
    """Share recovered against the number of candidates, a line per method with its interval.

    ``table``: columns method, candidates, share, low, high; ``reference``: the share of the supervised probe.
    """
    need(table, "width", "method", "candidates", "share", "low", "high")
    figure = new_figure(3.6, 2.3)
    panel = figure.subplots()
    for (method, rows), colour, marker in zip(table.groupby("method", sort=False), (BLUE, ORANGE), "os"):
        rows = rows.sort_values("candidates")
        panel.fill_between(rows["candidates"], rows["low"], rows["high"], color=colour, alpha=0.18, lw=0)
        panel.plot(rows["candidates"], rows["share"], color=colour, marker=marker, ms=3.5, label=method)
    ticks = sorted(set(table["candidates"].astype(int)))
    if reference is not None:
        panel.axhline(reference, color=GREY, lw=0.8, ls=(0, (3, 2)), label="linear probe")
    panel.set(xscale="log", xlabel="candidates", ylabel="share of concepts recovered", ylim=(0, 1.03))
    panel.set_xticks(ticks, [f"{t:,}" for t in ticks])
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.grid(axis="y")
    panel.legend(loc="lower right")
    return figure


def interpretability_scatter(table: pd.DataFrame, target: str, boxes: Mapping, means: pd.DataFrame,
                             terms: pd.DataFrame) -> Figure:
    """Does the scatter of fig. 3 tell interpretable latents from others?

    Left: frequency against activation, coloured by ``target``, with the regions ``boxes`` (log10 units); middle: mean
    of ``target`` in each region (``means``: region, ``target``, low, high); right: coefficients (``terms``: term,
    coefficient, low, high) of the regression.
    """
    need(table, "latent", "frequency", "mean_activation", target)
    figure = new_figure(PAGE, 2.5)
    axes = figure.subplots(1, 3, width_ratios=(1.7, 0.8, 1))
    points = axes[0].scatter(np.log10(table["frequency"]), np.log10(table["mean_activation"]), c=table[target], s=9,
                             vmin=0, vmax=1, linewidths=0)
    figure.colorbar(points, ax=axes[0], label="average precision of its concept", aspect=30,
                    pad=0.02).outline.set_visible(False)
    for name, (x0, x1, y0, y1) in boxes.items():
        axes[0].add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=INK, lw=0.8, ls=(0, (3, 2))))
        axes[0].annotate(name, (x0, y1), (2, -2), textcoords="offset points", va="top", fontsize=6, **halo())
    axes[0].set(xlabel="$\\log_{10}$ frequency", ylabel="$\\log_{10}$ mean activation")
    _bars(axes[1], means, target, np.arange(len(means)), INK)
    _rows(axes[1], [name.replace(", ", ",\n") for name in means["region"]])
    axes[1].set(xlim=(0, 1), title="mean by region", xlabel="average precision")
    shown = terms[terms["coefficient"].notna()]
    _bars(axes[2], shown, "coefficient", np.arange(len(shown)), INK)
    axes[2].axvline(0, color=INK, lw=0.6)
    _rows(axes[2], list(shown["term"]))
    axes[2].set(title="coefficients", xlabel=f"all four: $r^2$ = {terms['alone'].iloc[-1]:.2f}")
    return figure


def latent_histograms(values: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Distributions of measures of single latents, a panel a measure, a line a method: medians as triangles.

    ``values``: measure -> method -> one number a latent.
    """
    figure = new_figure(PAGE, 1.95)
    for panel, (measure, methods) in zip(figure.subplots(1, len(values), squeeze=False)[0], values.items()):
        arrays = {name: np.asarray(v) for name, v in methods.items()}
        finite = {name: v[np.isfinite(v)] for name, v in arrays.items()}
        bins = np.linspace(min(v.min() for v in finite.values()), max(v.max() for v in finite.values()), 31)
        for (name, v), colour in zip(finite.items(), (BLUE, GREY, ORANGE)):
            panel.hist(v, bins, weights=np.full(len(v), 1 / len(v)), histtype="step", color=colour, lw=1.2, label=name)
            panel.plot(np.median(v), 0, "^", color=colour, ms=5, clip_on=False, zorder=4)
        panel.set(title=measure, xlabel="", yticks=())
        panel.spines["left"].set_visible(False)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def transfer_dots(table: pd.DataFrame, bar: float) -> Figure:
    """Fig. 10 as numbers: average precision at home and on another task, a panel a task, a dot a concept.

    ``table``: columns task, kind, home, there.
    """
    need(table, "transfer", "task", "kind", "home", "there")
    tasks = list(dict.fromkeys(table["task"]))
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = new_figure(PAGE, 0.3 + 1.6 * lines)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for panel in axes.flat[len(tasks):]:
        panel.axis("off")
    for panel, task in zip(axes.flat, tasks):
        rows = table[table["task"] == task]
        panel.plot([0, 1], [0, 1], color=PALE, lw=0.7, zorder=1)
        for line in (panel.axhline, panel.axvline):
            line(bar, color=INK, lw=0.5, ls=(0, (3, 2)), zorder=1)
        for kind, own in rows.groupby("kind", sort=False):
            panel.scatter(own["home"], own["there"], s=7, color=KIND_LOOKS[kind], linewidths=0, label=kind)
        kept = (rows.loc[rows["home"] >= bar, "there"] >= bar).mean()
        panel.set(title=f"{task}: {kept:.0%} kept", xlim=(0, 1.03), ylim=(0, 1.03))
        panel.set(xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    figure.supxlabel("average precision at home", fontsize=7)
    figure.supylabel("average precision there", fontsize=7)
    kinds = [kind for kind in KIND_LOOKS if kind in set(table["kind"])]
    handles = [axes.flat[0].scatter([], [], s=9, color=KIND_LOOKS[kind]) for kind in kinds]
    figure.legend(handles, kinds, loc="outside upper center", ncols=6, handletextpad=0.1)
    return figure


def name_curves(table: pd.DataFrame) -> Figure:
    """How far a name can be trusted: share of latents named, and right of those, against the least confidence.

    ``table``: columns confidence, named, right, low, high.
    """
    need(table, "name", "confidence", "named", "right", "low", "high")
    figure = new_figure(3.6, 2.1)
    panel = figure.subplots()
    panel.fill_between(table["confidence"], table["low"], table["high"], color=BLUE, alpha=0.18, lw=0)
    for column, colour, marker, label in (("right", BLUE, "o", "of those, named as by ground truth"),
                                          ("named", ORANGE, "s", "latents that get a name")):
        panel.plot(table["confidence"], table[column], color=colour, marker=marker, ms=3.5, label=label)
    panel.set(xlabel="least confidence", ylim=(0, 1.03))
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.grid(axis="y")
    panel.legend(loc="lower left")
    return figure
