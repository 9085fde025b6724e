"""Figures of measured interpretability: concepts recovered, what a scatter tells, names, places, other tasks."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from patchsae.figures.canvas import BLUE, GREEN, GREY, INK, ORANGE, PAGE, PALE, PURPLE, RED, need, new_figure
from patchsae.figures.charts import Look, colour_bar, intervals, lines, one_legend, panels, percent
from patchsae.figures.latents import mark, scatter

#: Kind of concept -> colour.
KIND_LOOKS = {"noun": BLUE, "colour": ORANGE, "texture": GREEN, "background": PURPLE, "style": GREY, "text": RED}
#: Concepts in a strip of :func:`concept_dots`.
STRIP = 48


def recovery_dots(table: pd.DataFrame, first: str = "autoencoder") -> Figure:
    """Share of concepts recovered by every method, together and by kind, with intervals.

    ``table``: columns method, kind, share, low, high; kinds are panels, and ``first`` is highlighted.
    """
    need(table, "recovery", "method", "kind", "share", "low", "high")
    figure, axes = panels(table["kind"], 0.4 + 0.17 * table["method"].nunique(), sharey=True)
    for kind, panel in axes.items():
        intervals(panel, table[table["kind"] == kind], "share", "method", KIND_LOOKS.get(kind, INK), first)
        panel.set(xlabel="", xlim=(-0.06, 1.06), xticks=(0, 0.5, 1))
        percent(panel.xaxis)
    figure.supxlabel("share of concepts recovered", fontsize=7)
    return figure


def concept_dots(table: pd.DataFrame, bar: float) -> Figure:
    """Every concept: its average precision under several methods, sorted within its kind, in two or more strips.

    ``table``: columns kind, concept, method, auprc; the first method is filled and decides the order.
    """
    need(table, "concept", "kind", "concept", "method", "auprc")
    means = table.groupby(["method", "kind", "concept"], sort=False)["auprc"].mean().reset_index()
    first, *others = means["method"].unique()
    own = means[means["method"] == first].assign(rank=lambda rows: rows["kind"].map(list(rows["kind"].unique()).index))
    own = own.sort_values(["rank", "auprc"], ascending=[True, False], kind="stable", ignore_index=True)
    places = own.reset_index(names="place")[["kind", "concept", "place"]]
    means = means.merge(places)
    kinds = [kind for kind in KIND_LOOKS if kind in set(own["kind"])]
    strips = -(-len(own) // STRIP)
    figure = new_figure(PAGE, 1.55 * strips + 0.2)
    for strip, panel in enumerate(figure.subplots(strips, 1, squeeze=False)[:, 0]):
        shown, names = (t[t["place"] // STRIP == strip] for t in (means, places))
        sns.scatterplot(shown[shown["method"] == first], x="place", y="auprc", hue="kind", hue_order=kinds,
                        palette=KIND_LOOKS, s=14, linewidth=0, zorder=3, ax=panel)
        sns.scatterplot(shown[shown["method"] != first], x="place", y="auprc", style="method", color=GREY, s=14,
                        style_order=others, markers=["_", "x"][:len(others)], linewidth=0.9, ax=panel)
        panel.axhline(bar, color=INK, lw=0.6, ls=(0, (3, 2)))
        panel.set_xticks(names["place"], names["concept"], rotation=90, fontsize=6)
        panel.set(xlim=(strip * STRIP - 0.8, (strip + 1) * STRIP - 0.2), ylim=(0, 1.03), xlabel="",
                  ylabel="average precision")
        panel.tick_params(axis="x", length=0)
        panel.grid(axis="y")
    one_legend(figure, loc="outside upper right", ncols=9, columnspacing=0.8, handletextpad=0.1)
    return figure


def width_curves(table: pd.DataFrame, reference: float | None = None) -> Figure:
    """Share recovered against the number of candidates, a line per method with its interval.

    ``table``: columns method, candidates, share, low, high; ``reference``: the share of the supervised probe.
    """
    need(table, "width", "method", "candidates", "share", "low", "high")
    figure = new_figure(3.6, 2.3)
    panel = figure.subplots()
    series = zip(dict.fromkeys(table["method"]), (BLUE, ORANGE), "os")
    lines(panel, table.sort_values("candidates"), "candidates", "share", "method",
          {method: Look(method, colour, marker) for method, colour, marker in series})
    if reference is not None:
        panel.axhline(reference, color=GREY, lw=0.8, ls=(0, (3, 2)), label="linear probe")
    ticks = sorted(set(table["candidates"].astype(int)))
    panel.set(xscale="log", ylabel="share of concepts recovered", ylim=(0, 1.03))
    panel.set_xticks(ticks, [f"{t:,}" for t in ticks])
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
    need(table, "latent", "latent", "frequency", "mean_activation", target)
    figure = new_figure(PAGE, 2.5)
    axes = figure.subplots(1, 3, width_ratios=(1.7, 0.8, 1))
    points = scatter(axes[0], table, target, 1, area=9)
    colour_bar(figure, points, axes[0], "average precision of its concept")
    names = [f"{name}\n(n = {n:,})" for name, n in zip(means["region"], means["latents"])]
    intervals(axes[1], means.assign(region=names), target, "region", INK)
    axes[1].set(xlim=(0, 1), title="mean by region", xlabel="average precision")
    intervals(axes[2], terms[terms["coefficient"].notna()], "coefficient", "term", INK)
    axes[2].axvline(0, color=INK, lw=0.6)
    axes[2].set(title="coefficients", xlabel=f"all four: $r^2$ = {terms['alone'].iloc[-1]:.2f}")
    mark(axes[0], table, boxes, {})
    return figure


def latent_histograms(values: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Distributions of measures of single latents, a panel a measure, a line a method; medians are dashed.

    ``values``: measure -> method -> one number a latent.
    """
    figure, axes = panels(values, 1.65)
    for measure, panel in axes.items():
        table = pd.concat({name: pd.Series(np.asarray(v)) for name, v in values[measure].items()}, names=["method"])
        table = table.rename("value").reset_index(level=0).dropna(ignore_index=True)
        colours = dict(zip(values[measure], (BLUE, GREY, ORANGE)))
        sns.histplot(table, x="value", hue="method", palette=colours, bins=30, stat="proportion", common_norm=False,
                     element="step", fill=False, linewidth=1, ax=panel)
        for name, median in table.groupby("method", sort=False)["value"].median().items():
            panel.axvline(median, color=colours[name], lw=0.8, ls=(0, (3, 2)), label=f"median, {name}")
        panel.set(xlabel="", ylabel="", yticks=())
        panel.spines["left"].set_visible(False)
    next(iter(axes.values())).set_ylabel("share of latents")
    one_legend(figure, ncols=6)
    return figure


def transfer_dots(table: pd.DataFrame, bar: float) -> Figure:
    """Fig. 10 as numbers: average precision at home and on another task, a panel a task, a dot a concept.

    ``table``: columns task, kind, home, there.
    """
    need(table, "transfer", "task", "kind", "home", "there")
    figure, axes = panels(table["task"], 1.6, columns=4, sharex=True, sharey=True)
    for task, panel in axes.items():
        rows = table[table["task"] == task]
        panel.axline((0, 0), slope=1, color=PALE, lw=0.7, zorder=1)
        for line in (panel.axhline, panel.axvline):
            line(bar, color=INK, lw=0.5, ls=(0, (3, 2)), zorder=1)
        sns.scatterplot(rows, x="home", y="there", hue="kind", palette=KIND_LOOKS, s=7, linewidth=0, ax=panel)
        kept = (rows.loc[rows["home"] >= bar, "there"] >= bar).mean()
        panel.set(title=f"{task}: {kept:.0%} kept", xlim=(0, 1.03), ylim=(0, 1.03), xticks=(0, 0.5, 1),
                  yticks=(0, 0.5, 1), xlabel="", ylabel="")
    figure.supxlabel("average precision at home", fontsize=7)
    figure.supylabel("average precision there", fontsize=7)
    one_legend(figure, loc="outside upper center", ncols=6, handletextpad=0.1)
    return figure


def name_curves(table: pd.DataFrame) -> Figure:
    """How far a name can be trusted: share of latents named, and right of those, against the least confidence.

    ``table``: columns confidence, named, right, low, high; the interval is that of "right".
    """
    need(table, "name", "confidence", "named", "right", "low", "high")
    shares = pd.concat([table.assign(share=table["right"], what="right"),
                        table.assign(share=table["named"], low=table["named"], high=table["named"], what="named")])
    figure = new_figure(3.6, 2.1)
    panel = figure.subplots()
    looks = {"right": Look("of those, named as by ground truth", BLUE),
             "named": Look("latents that get a name", ORANGE, "s")}
    lines(panel, shares, "confidence", "share", "what", looks)
    panel.set(xlabel="least confidence", ylabel="share of latents", ylim=(0, 1.03))
    percent(panel.yaxis)
    panel.legend(loc="lower left")
    return figure
