"""Figures of adaptation (sec. 4.2): accuracies, swapped sides, latents before and after, what can be read from them."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from patchsae.figures.canvas import BLUE, GREEN, GREY, INK, ORANGE, PAGE, PALE, RED, SKY, needs
from patchsae.figures.charts import Look, colour_bar, dots, lines, one_legend, panels, percent

#: Method, what is read from latents, and part of a gain -> how it is drawn.
METHODS = {"zero-shot": Look("zero-shot", INK, "|"), "maple": Look("MaPLe", BLUE), "coop": Look("CoOp", SKY, "D"),
           "lora": Look("LoRA", ORANGE, "s"), "linear probe": Look("linear probe", GREEN, "^"),
           "fine-tuning": Look("fine-tuning", RED, "v"), "untrained prompts": Look("untrained prompts", PALE, "X")}
READINGS = {"zero-shot": METHODS["zero-shot"], "adapted": METHODS["maple"],
            "before": Look("readable before", GREEN, "<"), "after": Look("readable after", ORANGE, ">"),
            "untrained": Look("readable, untrained prompts", GREY, "x")}
PARTS = {"below": Look("image tokens", ORANGE), "above": Look("what reads them", GREEN, "D"),
         "text": Look("text", BLUE, "s"), "gain": Look("whole gain", INK, "|")}
TRUTHS = {"remap": "known concepts", "mixed": "both", "new": "something new"}
GROUP_LOOKS = {"high": GREEN, "high to low": ORANGE, "low to high": BLUE}
#: Points of a scatter that are drawn though they are equal.
MOST_POINTS = 10**6
#: Classes whose names fit beside a matrix, and classes whose shares fit into it.
MOST_NAMED, MOST_WRITTEN = 60, 12


@needs("task", "half", "accuracy", "low", "high")
def half_dots(table: pd.DataFrame, column: str) -> Figure:
    """Base and novel classes of every task: a dot with its interval for each value of a column.

    ``column``: "method" (table 1), "what" (what can be read from the latents beside what is recognised) or "part" (the
    share in the gain of each part of the model: image tokens, the blocks and prompts that read them, the text).
    """
    return _task_dots(table, column, "half", {"base": "base classes", "novel": "novel classes"})


@needs("task", "truth", "images", "accuracy", "low", "high")
def truth_dots(table: pd.DataFrame, column: str) -> Figure:
    """Tasks of known truth, named with it: a dot with its interval for each value of a column.

    Panels: learned from a few images of each class, and from all of them. ``column``: as in ``half_dots``.
    """
    order = [truth for truth in TRUTHS if truth in set(table["truth"])]
    table = pd.concat([table[table["truth"] == truth] for truth in order])
    named = table["task"] + ": " + table["truth"].map(TRUTHS)
    titles = {"shots": "a few images a class", "all": "all images"}
    return _task_dots(table.assign(task=named), column, "images", titles)


def _task_dots(table: pd.DataFrame, column: str, by: str, titles: Mapping[str, str]) -> Figure:
    """A row for every task, a panel for each value of ``by``, a look for each value of ``column``."""
    looks = {"method": METHODS, "what": READINGS, "part": PARTS}[column]
    table = table.assign(low=table["low"].clip(-1 if column == "part" else 0), high=table["high"].clip(upper=1))
    height = 0.45 + 0.36 * table["task"].nunique()
    figure, axes = panels(titles.values(), height, sharey=True)
    for value, panel in zip(titles, axes.values()):
        dots(panel, table[table[by] == value], "accuracy", "task", column, looks)
        percent(panel.xaxis)
        if column == "part":
            panel.axvline(0, color=INK, lw=0.6, zorder=1)
            panel.set_xlabel("change of accuracy")
        else:
            panel.set_xlim(-0.02, 1.02)
    one_legend(figure, ncols=len(looks), columnspacing=1)
    return figure


@needs("measure", "method", "area", "low", "high")
def area_dots(table: pd.DataFrame) -> Figure:
    """How well each measure tells tasks that take something new from others: area under the ROC curve, by method."""
    figure, axes = panels([""], 0.4 + 0.24 * table["measure"].nunique(), width=0.8 * PAGE)
    dots(axes[""], table, "area", "measure", "method", METHODS)
    axes[""].axvline(0.5, color=INK, lw=0.6, zorder=1)
    axes[""].set(xlim=(-0.02, 1.02), xlabel="area under the ROC curve: new above remapped")
    one_legend(figure, ncols=4)
    return figure


def activation_scatter(pairs: Mapping[str, tuple], notes: Mapping[str, str],
                       members: Mapping[str, Mapping] | None = None) -> Figure:
    """Figs. 7, 17 and 20: activation counts before against after, a point per latent (or per class and latent).

    ``pairs``: title -> counts before and after, arrays of one shape; ``notes``: title -> a few words in the corner;
    ``members``: title -> group -> bool of the same shape, drawn in colour.
    """
    figure, axes = panels(pairs, 1.95, columns=3)
    for title, panel in axes.items():
        x, y = (1 + np.asarray(counts).ravel().astype(float) for counts in pairs[title])
        panel.axline((1, 1), (10, 10), color=GREY, lw=0.6)
        # Of many points the equal ones are drawn once; as complex numbers they are found in seconds.
        points = x + 1j * y if len(x) <= MOST_POINTS else np.unique(x + 1j * y)
        panel.plot(points.real, points.imag, "o", ms=1.6, mew=0, alpha=0.5, rasterized=True,
                   color="#b5b5b5" if members else BLUE)
        for group, colour in GROUP_LOOKS.items() if members else ():
            mine = np.asarray(members[title][group]).ravel()
            panel.plot(x[mine], y[mine], "o", ms=2.6, mew=0, color=colour, label=group, alpha=0.9, rasterized=True)
        panel.set(xscale="log", yscale="log", aspect="equal")
        panel.text(0.04, 0.96, notes[title], transform=panel.transAxes, va="top", fontsize=6, color=GREY)
    for panel in list(axes.values())[::3]:
        panel.set_ylabel("1 + active tokens, MaPLe")
    for panel in list(axes.values())[-3:]:
        panel.set_xlabel("1 + active tokens, CLIP")
    if members:
        one_legend(figure, ncols=3, markerscale=1.6)
    return figure


@needs("upper", "lower", "group", "mean", "low", "high")
def group_curves(table: pd.DataFrame) -> Figure:
    """How many latents per class each group has, against where "high" ends, a line per rank where "low" begins."""
    figure, axes = panels(GROUP_LOOKS, 1.6)
    dashes = dict(zip(sorted(set(table["lower"])), itertools.cycle(("", (3, 1.5), (1, 1), (3, 1, 1, 1)))))
    table = table.sort_values(["lower", "upper"])
    for group, panel in axes.items():
        looks = {lower: Look(f"low: rank > {lower}", GROUP_LOOKS[group], "o", dash) for lower, dash in dashes.items()}
        rows = table[table["group"] == group]
        if group == "high":  # it is the same wherever "low" begins
            rows = rows.drop_duplicates("upper").assign(lower=min(dashes))
        lines(panel, rows, "upper", "mean", "lower", looks)
        panel.set(xlabel="high: rank at most", ylabel="", ylim=(0, None))
        panel.get_legend().remove()
    axes["high"].set_ylabel("latents per class")
    panel.legend(loc="upper left")
    return figure


def confusions(before: np.ndarray, after: np.ndarray, class_names: Sequence[str], titles: Sequence[str]) -> Figure:
    """Fig. 21: confusion matrices ``[C,C]`` before and after, rows true classes, each row summing to 1."""
    n = len(class_names)
    shares = [pd.DataFrame(counts / np.maximum(counts.sum(1, keepdims=True), 1), class_names, class_names)
              for counts in (before, after)]
    return _maps(dict(zip(titles, shares)), (2.2 + 0.7 * n, 0.8 + min(0.34 * n, 2.6)), "predicted", "true class",
                 "share of the class", vmin=0, vmax=1, cmap="viridis", square=True, annot=n <= MOST_WRITTEN, fmt=".0%",
                 annot_kws={"size": 6})


def concept_maps(before: pd.DataFrame, after: pd.DataFrame, titles: Sequence[str]) -> Figure:
    """What each concept (column) does to the logit of each class (row), before, after, and the difference."""
    limit = float(max(before.abs().to_numpy().max(), after.abs().to_numpy().max()))
    return _maps(dict(zip((*titles, "difference"), (before, after, after - before))), (PAGE, 0.8 + 0.19 * len(before)),
                 "concept in the image", "class", "change of the logit", vmin=-limit, vmax=limit, cmap="RdBu_r")


def _maps(tables: Mapping[str, pd.DataFrame], size: tuple[float, float], columns: str, rows: str, values: str,
          **options) -> Figure:
    """Tables as maps of colours side by side, with the names of what their columns, rows and colours are."""
    figure, axes = panels(tables, size[1], width=size[0], sharey=True)
    for title, panel in axes.items():
        named = max(tables[title].shape) <= MOST_NAMED
        sns.heatmap(tables[title], cbar=False, rasterized=True, ax=panel, xticklabels=named, yticklabels=named,
                    **options)
        panel.set(xlabel=columns, ylabel=rows)
        panel.label_outer(remove_inner_ticks=False)
        panel.tick_params(length=0)
    colour_bar(figure, panel.collections[0], list(axes.values()), values)
    return figure
