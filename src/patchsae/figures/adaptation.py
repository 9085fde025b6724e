"""Figures of adaptation (sec. 4.2): accuracies, swapped sides, latents before and after, what can be read from them."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from patchsae.figures.ablation import k_lines, mode_panels
from patchsae.figures.canvas import BLUE, GREEN, GREY, INK, ORANGE, PAGE, PALE, RED, SKY, need, new_figure
from patchsae.figures.charts import Look, between_rows, colour_bar, dots, given, lines, one_legend, panels, percent

#: Method -> how it is drawn.
METHOD_LOOKS = {"zero-shot": Look("zero-shot", INK, "|"), "maple": Look("MaPLe", BLUE), "coop": Look("CoOp", SKY, "D"),
                "lora": Look("LoRA", ORANGE, "s"), "linear probe": Look("linear probe", GREEN, "^"),
                "fine-tuning": Look("fine-tuning", RED, "v"),
                "untrained prompts": Look("untrained prompts", PALE, "X")}
READ_LOOKS = {"zero-shot": METHOD_LOOKS["zero-shot"], "adapted": METHOD_LOOKS["maple"],
              "before": Look("readable before", GREEN, "<"), "after": Look("readable after", ORANGE, ">"),
              "untrained": Look("readable, untrained prompts", GREY, "x")}
PART_LOOKS = {"image": ORANGE, "text": BLUE, "interaction": PALE}
GROUP_LOOKS = {"high": GREEN, "high to low": ORANGE, "low to high": BLUE}
SIDE_NAMES = {"clip": "CLIP", "adapted": "MaPLe"}
#: Points of a scatter that are drawn though they are equal.
MOST_POINTS = 10**6
#: Classes whose names fit beside a matrix, and classes whose shares fit into it.
MOST_NAMED, MOST_WRITTEN = 60, 12


def method_dots(table: pd.DataFrame) -> Figure:
    """Table 1 as dots: accuracy of every method on the base and the novel half of every task, with intervals.

    ``table``: columns task, half, method, accuracy, low, high.
    """
    return _dot_rows(table, "method", METHOD_LOOKS)


def read_dots(table: pd.DataFrame) -> Figure:
    """What can be read from the latents beside what is recognised: per task and half, a row each.

    ``table``: columns task, half, what ("zero-shot", "adapted", "before", "after", "untrained"), accuracy, low, high.
    """
    return _dot_rows(table, "what", READ_LOOKS)


def _dot_rows(table: pd.DataFrame, column: str, looks: Mapping[str, Look]) -> Figure:
    """A row a task, a panel a half: a dot and its interval for each value of ``column``; intervals end at 0 and 1."""
    need(table, column, "task", "half", column, "accuracy", "low", "high")
    table = table.assign(low=table["low"].clip(lower=0), high=table["high"].clip(upper=1))
    figure, axes = panels(("base classes", "novel classes"), 0.45 + 0.36 * table["task"].nunique(), sharey=True)
    for half, panel in zip(("base", "novel"), axes.values()):
        dots(panel, table[table["half"] == half], "accuracy", "task", column, looks)
        panel.set_xlim(-0.02, 1.02)
        percent(panel.xaxis)
    one_legend(figure, ncols=len(looks), columnspacing=1)
    return figure


def gain_bars(table: pd.DataFrame) -> Figure:
    """What the gain is made of when image towers and text sides are swapped: bars with intervals over seeds.

    ``table``: columns task, half, part ("image", "text", "interaction", "gain"), points, low, high.
    """
    need(table, "gain", "task", "half", "part", "points", "low", "high")
    tasks = list(dict.fromkeys(table["task"]))
    figure, axes = panels(("base classes", "novel classes"), 0.45 + 0.34 * len(tasks), sharey=True)
    for half, panel in zip(("base", "novel"), axes.values()):
        rows = table[table["half"] == half]
        sns.barplot(**given(rows[rows["part"] != "gain"], "points"), x="points", y="task", hue="part", order=tasks,
                    palette=PART_LOOKS, hue_order=list(PART_LOOKS), saturation=1, width=0.66, ax=panel,
                    err_kws={"linewidth": 0.7, "color": GREY})
        sns.stripplot(rows[rows["part"] == "gain"], x="points", y="task", order=tasks, jitter=False, marker="D", size=4,
                      color=INK, label="whole gain", zorder=3, ax=panel)
        panel.axvline(0, color=INK, lw=0.6)
        panel.set_xlabel("change of accuracy")
        between_rows(panel, len(tasks))
        percent(panel.xaxis)
    one_legend(figure, ncols=4)
    return figure


def masking_panels(table: pd.DataFrame, mode: str) -> Figure:
    """Figs. 5c, 15 and 16: accuracy against k, a panel per task, a line per (selected with, classified by).

    ``table``: columns task, selects, classifies, mode, k, accuracy, low, high; ``mode``: "on" or "off".
    """
    need(table, "masking", "task", "selects", "classifies", "mode", "k", "accuracy", "low", "high")
    figure, axes = panels(table["task"], 1.5, columns=3, sharey=True)
    for task, panel in axes.items():
        rows = table[(table["task"] == task) & (table["mode"] == mode)]
        k_lines(panel, _sides(rows, "selects"), "accuracy", "sides", _side_looks("latents"))
        panel.tick_params(axis="x", labelrotation=90)
        panel.set(ylim=(0, 1.02), ylabel="accuracy")
    one_legend(figure, ncols=2)
    return figure


def sides_curves(table: pd.DataFrame) -> Figure:
    """Fig. 11: masking curves with an autoencoder trained on CLIP and one trained on the adapted model.

    ``table``: columns autoencoder, classifies, mode, k, accuracy, low, high.
    """
    need(table, "masking", "autoencoder", "classifies", "mode", "k", "accuracy", "low", "high")
    rows = _sides(table, "autoencoder")
    figure, axes = mode_panels(rows, 2.1, "accuracy", "sides", _side_looks("autoencoder"))
    axes[0].set(ylabel="accuracy", ylim=(0, 1.02))
    one_legend(figure, ncols=2)
    return figure


def _sides(table: pd.DataFrame, column: str) -> pd.DataFrame:
    return table.assign(sides=table[column] + ", " + table["classifies"])


def _side_looks(what: str) -> dict[str, Look]:
    """Whose latents or autoencoder it is (dashes and marker), and which model classifies (colour)."""
    return {f"{first}, {second}": Look(f"{what} of {SIDE_NAMES[first]}, classified by {SIDE_NAMES[second]}",
                                       colour, marker, dashes)
            for second, colour in (("clip", ORANGE), ("adapted", BLUE))
            for first, marker, dashes in (("clip", "o", ""), ("adapted", "s", (3, 1.5)))}


def activation_scatter(pairs: Mapping[str, tuple], notes: Mapping[str, str],
                       members: Mapping[str, Mapping] | None = None) -> Figure:
    """Figs. 7, 17 and 20: activation counts before against after, a point per latent (or per class and latent).

    ``pairs``: title -> counts before and after, arrays of one shape; ``notes``: title -> a few words in the corner;
    ``members``: title -> group -> bool of the same shape, drawn in colour.
    """
    figure, axes = panels(pairs, 1.95, columns=3)
    for title, panel in axes.items():
        x, y = (1 + np.asarray(counts).ravel().astype(float) for counts in pairs[title])
        panel.axline((1, 1), slope=1, color=GREY, lw=0.6)
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


def group_curves(table: pd.DataFrame) -> Figure:
    """How many latents per class each group has, against where "high" ends, a line per rank where "low" begins.

    ``table``: columns upper, lower, group, mean, low, high. The group "high" is the same wherever "low" begins.
    """
    need(table, "group", "upper", "lower", "group", "mean", "low", "high")
    figure, axes = panels(GROUP_LOOKS, 1.6)
    strokes = zip(sorted(set(table["lower"])), itertools.cycle(("", (3, 1.5), (1, 1), (3, 1, 1, 1))))
    dashes = {lower: Look(f"low: rank > {lower}", "", "o", dash) for lower, dash in strokes}
    for group, panel in axes.items():
        looks = {lower: look._replace(colour=GROUP_LOOKS[group]) for lower, look in dashes.items()}
        rows = table[table["group"] == group].sort_values(["lower", "upper"])
        if group == "high":
            rows = rows.drop_duplicates("upper").assign(lower=min(dashes))
        lines(panel, rows, "upper", "mean", "lower", looks)
        panel.set(xlabel="high: rank at most", ylabel="", ylim=(0, None))
    axes["high"].set_ylabel("latents per class")
    for group in ("high", "high to low"):
        axes[group].get_legend().remove()
    axes["low to high"].legend(loc="upper left")
    return figure


def confusions(before: np.ndarray, after: np.ndarray, class_names: Sequence[str], titles: Sequence[str]) -> Figure:
    """Fig. 21: confusion matrices ``[C,C]`` before and after, rows true classes, each row summing to 1."""
    n = len(class_names)
    named = list(class_names) if n <= MOST_NAMED else False
    figure = new_figure(min(PAGE, 2.2 + 0.7 * n), 1.1 + min(0.34 * n, 2.6))
    axes = figure.subplots(1, 2, sharey=True)
    for panel, counts, title in zip(axes, (before, after), titles):
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        sns.heatmap(share, vmin=0, vmax=1, cmap="viridis", square=True, cbar=False, xticklabels=named, ax=panel,
                    yticklabels=named, annot=n <= MOST_WRITTEN, fmt=".0%", annot_kws={"size": 6}, rasterized=True)
        panel.set(title=title, xlabel="predicted")
        panel.tick_params(length=0)
    axes[0].set_ylabel("true class")
    colour_bar(figure, axes[0].collections[0], axes, "share of the class")
    return figure


def concept_maps(before: pd.DataFrame, after: pd.DataFrame, titles: Sequence[str]) -> Figure:
    """What each concept (column) does to the logit of each class (row), before, after, and the difference."""
    limit = float(max(before.abs().to_numpy().max(), after.abs().to_numpy().max()))
    figure = new_figure(PAGE, 1.1 + 0.19 * len(before))
    axes = figure.subplots(1, 3, sharey=True)
    for panel, values, title in zip(axes, (before, after, after - before), (*titles, "difference")):
        sns.heatmap(values, cmap="RdBu_r", vmin=-limit, vmax=limit, cbar=False, xticklabels=True, rasterized=True,
                    yticklabels=True, ax=panel)
        panel.set(title=title, xlabel="concept in the image", ylabel="")
        panel.tick_params(length=0)
    axes[0].set_ylabel("class")
    colour_bar(figure, axes[0].collections[0], axes, "change of the logit")
    return figure
