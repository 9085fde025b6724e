"""Figures of measured interpretability: concepts recovered, what a scatter tells, names, places, other tasks."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from patchsae.figures.autoencoder import mark, scatter
from patchsae.figures.canvas import BLUE, DASHES, GREEN, GREY, INK, ORANGE, PAGE, PALE, PURPLE, RED, needs, new_figure
from patchsae.figures.charts import Look, colour_bar, intervals, lines, one_legend, panels, percent

#: Kind of concept -> colour.
KIND_LOOKS = {"noun": BLUE, "colour": ORANGE, "texture": GREEN, "background": PURPLE, "style": GREY, "text": RED}
#: Concepts in a strip of :func:`concept_dots`.
STRIP = 48


@needs("method", "kind", "share", "low", "high")
def recovery_dots(table: pd.DataFrame, first: str = "autoencoder") -> Figure:
    """Share of concepts recovered by every method, a panel a kind, with intervals; ``first`` is highlighted."""
    figure, axes = panels(table["kind"], 0.4 + 0.17 * table["method"].nunique(), sharey=True)
    for kind, panel in axes.items():
        intervals(panel, table[table["kind"] == kind], "share", "method", KIND_LOOKS.get(kind, INK), first)
        panel.set(xlabel="", xlim=(-0.06, 1.06), xticks=(0, 0.5, 1))
        percent(panel.xaxis)
    figure.supxlabel("share of concepts recovered", fontsize=7)
    return figure


@needs("kind", "concept", "method", "auprc")
def concept_dots(table: pd.DataFrame, bar: float) -> Figure:
    """Every concept: its average precision under several methods, in strips.

    The table's first method is filled and decides the order within each kind; ``bar`` is a dashed line.
    """
    first, *others = table["method"].unique()
    means = table.pivot_table("auprc", ["kind", "concept"], "method", sort=False)
    means = pd.concat([rows.sort_values(first, ascending=False) for _, rows in means.groupby(level=0, sort=False)])
    strips = -(-len(means) // STRIP)
    figure = new_figure(PAGE, 1.55 * strips + 0.2)
    for strip, panel in enumerate(figure.subplots(strips, 1, squeeze=False)[:, 0]):
        rows = means[strip * STRIP:(strip + 1) * STRIP].reset_index().rename_axis("place")
        sns.scatterplot(rows, x="place", y=first, hue="kind", hue_order=list(means.index.unique("kind")),
                        palette=KIND_LOOKS, s=14, linewidth=0, zorder=3, ax=panel)
        for method, marker in zip(others, "_x"):
            panel.scatter(rows.index, rows[method], color=GREY, marker=marker, s=14, lw=0.9, label=method)
        panel.axhline(bar, color=INK, lw=0.6, ls=DASHES)
        panel.set_xticks(rows.index, rows["concept"], rotation=90, fontsize=6)
        panel.set(xlim=(-0.8, STRIP - 0.2), ylim=(0, 1.03), xlabel="", ylabel="average precision")
        panel.tick_params(axis="x", length=0)
        panel.grid(axis="y")
    one_legend(figure, loc="outside upper right", ncols=9, columnspacing=0.8, handletextpad=0.1)
    return figure


@needs("method", "candidates", "share", "low", "high")
def width_curves(table: pd.DataFrame, reference: float) -> Figure:
    """Share recovered against the number of candidates, a line per method; ``reference``: that of the probe."""
    figure = new_figure(3.6, 2.3)
    panel = figure.subplots()
    series = zip(table["method"].unique(), (BLUE, ORANGE), "os")
    looks = {method: Look(method, colour, marker) for method, colour, marker in series}
    lines(panel, table.sort_values("candidates"), "candidates", "share", "method", looks)
    panel.axhline(reference, color=GREY, lw=0.8, ls=DASHES, label="linear probe")
    panel.set(xscale="log", ylabel="share of concepts recovered", ylim=(0, 1.03))
    ticks = sorted(set(table["candidates"].astype(int)))
    panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    panel.minorticks_off()
    percent(panel.yaxis)
    panel.legend(loc="lower right")
    return figure


def interpretability_scatter(table: pd.DataFrame, target: str, boxes: Mapping, means: pd.DataFrame,
                             terms: pd.DataFrame) -> Figure:
    """Does the scatter of fig. 3 tell interpretable latents from others?

    Left: frequency against activation, coloured by ``target``, with the regions ``boxes`` (log10 units); middle: mean
    of ``target`` in each region (``means``: region, latents, ``target``, low, high); right: coefficients (``terms``:
    term, coefficient, low, high) of the regression.
    """
    figure = new_figure(PAGE, 2.5)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.7, 0.8, 1))
    points = scatter(left, table, target, area=9)
    points.set_clim(0, 1)
    colour_bar(figure, points, left, "average precision of its concept")
    names = [f"{name}\n(n = {n:,})" for name, n in zip(means["region"], means["latents"])]
    intervals(middle, means.assign(region=names), target, "region", INK)
    middle.set(xlim=(0, 1), title="mean by region", xlabel="average precision")
    intervals(right, terms[terms["coefficient"].notna()], "coefficient", "term", INK)
    right.axvline(0, color=INK, lw=0.6)
    right.set(title="coefficients", xlabel=f"all four: $r^2$ = {terms['alone'].iloc[-1]:.2f}")
    mark(left, table, boxes, {})
    return figure


def latent_histograms(values: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Distributions of ``values``, measure (panel) -> method (line) -> a number a latent; medians are dashed."""
    figure, axes = panels(values, 1.65)
    for measure, panel in axes.items():
        shown = {method: pd.Series(np.asarray(numbers)).dropna() for method, numbers in values[measure].items()}
        colours = dict(zip(shown, (BLUE, GREY)))
        sns.histplot(shown, palette=colours, bins=30, stat="proportion", common_norm=False, element="step", fill=False,
                     linewidth=1, ax=panel)
        for method, numbers in shown.items():
            panel.axvline(numbers.median(), color=colours[method], lw=0.8, ls=DASHES, label=f"median, {method}")
        panel.set(xlabel="", ylabel="", yticks=())
        panel.spines["left"].set_visible(False)
    figure.axes[0].set_ylabel("share of latents")
    one_legend(figure, ncols=6)
    return figure


@needs("task", "kind", "home", "there")
def transfer_dots(table: pd.DataFrame, bar: float) -> Figure:
    """Fig. 10 as numbers: average precision at home and on another task, a panel a task, a dot a concept."""
    figure, axes = panels(table["task"], 1.6, columns=4, sharex=True, sharey=True)
    for task, panel in axes.items():
        rows = table[table["task"] == task]
        panel.axline((0, 0), slope=1, color=PALE, lw=0.7, zorder=1)
        panel.axhline(bar, color=INK, lw=0.5, ls=DASHES, zorder=1)
        panel.axvline(bar, color=INK, lw=0.5, ls=DASHES, zorder=1)
        sns.scatterplot(rows, x="home", y="there", hue="kind", palette=KIND_LOOKS, s=7, linewidth=0, ax=panel)
        kept = (rows.loc[rows["home"] >= bar, "there"] >= bar).mean()
        panel.set(title=f"{task}: {kept:.0%} kept", xlim=(0, 1.03), ylim=(0, 1.03), xticks=(0, 0.5, 1),
                  yticks=(0, 0.5, 1), xlabel="", ylabel="")
    figure.supxlabel("average precision at home", fontsize=7)
    figure.supylabel("average precision there", fontsize=7)
    one_legend(figure, loc="outside upper center", ncols=6, handletextpad=0.1)
    return figure


@needs("confidence", "named", "right", "low", "high")
def name_curves(table: pd.DataFrame) -> Figure:
    """How far a name can be trusted: share of latents named, and right of those, against the least confidence.

    The interval is that of "right".
    """
    figure = new_figure(3.6, 2.1)
    panel = figure.subplots()
    shares = table.melt(["confidence", "low", "high"], ["right", "named"], "what", "share")
    shares.loc[shares["what"] == "named", ["low", "high"]] = np.nan
    looks = {"right": Look("of those, named as by ground truth", BLUE),
             "named": Look("latents that get a name", ORANGE, "s")}
    lines(panel, shares, "confidence", "share", "what", looks)
    panel.set(xlabel="least confidence", ylabel="share of latents", ylim=(0, 1.03))
    percent(panel.yaxis)
    panel.legend(loc="lower left")
    return figure
