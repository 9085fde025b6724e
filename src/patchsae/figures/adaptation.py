"""Figures of adaptation (sec. 4.2): accuracies, swapped sides, latents before and after, what can be read from them."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from patchsae.figures.ablation import k_axis, line
from patchsae.figures.canvas import BLUE, GREEN, GREY, INK, ORANGE, PAGE, PALE, RED, filled, need, new_figure

#: Method -> name, colour and marker.
METHOD_LOOKS = {"zero-shot": ("zero-shot", INK, "|"), "maple": ("MaPLe", BLUE, "o"), "coop": ("CoOp", "#56b4e9", "D"),
                "lora": ("LoRA", ORANGE, "s"), "linear probe": ("linear probe", GREEN, "^"),
                "fine-tuning": ("fine-tuning", RED, "v"), "untrained prompts": ("untrained prompts", PALE, "X")}
PART_LOOKS = {"image": ORANGE, "text": BLUE, "interaction": PALE}
GROUP_LOOKS = {"high": GREEN, "high to low": ORANGE, "low to high": BLUE}
READ_LOOKS = {"zero-shot": ("zero-shot", INK, "|"), "adapted": ("MaPLe", BLUE, "o"),
              "before": ("readable before", GREEN, "<"), "after": ("readable after", ORANGE, ">"),
              "untrained": ("readable, untrained prompts", GREY, "x")}
#: Points of a scatter that are drawn though they are equal.
MOST_POINTS = 10**6
#: Classes whose names fit beside a matrix.
MOST_NAMED = 60
SIDE_NAMES = {"clip": "CLIP", "adapted": "MaPLe"}


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


def _dot_rows(table: pd.DataFrame, column: str, looks: Mapping[str, tuple]) -> Figure:
    """A row a task, a panel a half: a dot and its interval for each value of ``column``, as ``looks`` has it."""
    need(table, column, "task", "half", column, "accuracy", "low", "high")
    tasks = list(dict.fromkeys(table["task"]))
    figure = new_figure(PAGE, 0.75 + 0.36 * len(tasks))
    axes = figure.subplots(1, 2, sharey=True)
    for panel, half in zip(axes, ("base", "novel")):
        rows = table[table["half"] == half]
        for i, name in enumerate(name for name in looks if name in set(rows[column])):
            mine = rows[rows[column] == name].set_index("task")
            at = np.array([tasks.index(task) for task in mine.index]) + 0.1 * (i - (len(looks) - 1) / 2)
            _dots(panel, mine, at, *looks[name])
        panel.set(title=f"{half} classes", xlabel="accuracy", yticks=range(len(tasks)), yticklabels=tasks)
        _percent_rows(panel, len(tasks))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(looks), columnspacing=1)
    return figure


def _dots(panel: Axes, rows: pd.DataFrame, at: np.ndarray, label: str, colour: str, marker: str) -> None:
    """One method's accuracies with their intervals, at heights ``at``."""
    panel.hlines(at, rows["low"], rows["high"], color=colour, lw=0.9)
    size = 6 if marker == "|" else 3.4
    panel.plot(rows["accuracy"], at, marker, color=colour, ms=size, mew=1.2, ls="none", label=label)


def _percent_rows(panel: Axes, n: int) -> None:
    """Rows from the top, thin lines between them, percent along the bottom."""
    panel.set(ylim=(n - 0.5, -0.5), xlim=(-0.02, 1.02))
    panel.hlines(np.arange(n - 1) + 0.5, -0.02, 1.02, color=PALE, lw=0.4)
    panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x")


def gain_bars(table: pd.DataFrame) -> Figure:
    """What the gain is made of when image towers and text sides are swapped: bars with intervals over seeds.

    ``table``: columns task, half, part ("image", "text", "interaction", "gain"), points, low, high.
    """
    need(table, "gain", "task", "half", "part", "points", "low", "high")
    tasks = list(dict.fromkeys(table["task"]))
    figure = new_figure(PAGE, 0.75 + 0.34 * len(tasks))
    axes = figure.subplots(1, 2, sharey=True)
    for panel, half in zip(axes, ("base", "novel")):
        rows = table[table["half"] == half]
        for i, (part, colour) in enumerate(PART_LOOKS.items()):
            mine = rows[rows["part"] == part].set_index("task").reindex(tasks)
            at = np.arange(len(tasks)) + 0.22 * (i - 1)
            panel.barh(at, mine["points"], 0.2, color=colour, label=f"{part} part" if part != "interaction" else part)
            panel.hlines(at, mine["low"], mine["high"], color=INK, lw=0.7)
        gain = rows[rows["part"] == "gain"].set_index("task").reindex(tasks)
        panel.plot(gain["points"], range(len(tasks)), "|", color=INK, ms=13, mew=1.4, ls="none", label="whole gain")
        panel.axvline(0, color=INK, lw=0.6)
        panel.set(title=f"{half} classes", xlabel="change of accuracy", yticks=range(len(tasks)), yticklabels=tasks,
                  ylim=(len(tasks) - 0.5, -0.5))
        panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="x")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def masking_panels(table: pd.DataFrame, mode: str, columns: int = 3) -> Figure:
    """Figs. 5c, 15 and 16: accuracy against k, a panel per task, a line per (selected with, classified by).

    ``table``: columns task, selects, classifies, mode, k, accuracy, low, high; ``mode``: "on" or "off".
    """
    need(table, "masking", "task", "selects", "classifies", "mode", "k", "accuracy", "low", "high")
    tasks = list(dict.fromkeys(table["task"]))
    figure, axes = _panels(len(filled(tasks, "tasks")), columns, 1.5)
    for panel, task in zip(axes, tasks):
        rows = table[(table["task"] == task) & (table["mode"] == mode)]
        for classifies, colour in (("clip", ORANGE), ("adapted", BLUE)):
            for selects, dashes, marker in (("clip", "-", "o"), ("adapted", (0, (3, 1.5)), "s")):
                mine = rows[(rows["selects"] == selects) & (rows["classifies"] == classifies)]
                line(panel, mine, "accuracy", f"latents of {SIDE_NAMES[selects]}, classified by "
                     f"{SIDE_NAMES[classifies]}", colour, marker, dashes)
        k_axis(panel, rows["k"])
        panel.tick_params(axis="x", labelrotation=90)
        panel.set(title=task, ylim=(0, 1.02))
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for panel in axes[::columns]:
        panel.set_ylabel("accuracy")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def activation_scatter(panels: Mapping[str, tuple[torch.Tensor, torch.Tensor]], notes: Mapping[str, str],
                       members: Mapping[str, dict[str, torch.Tensor]] | None = None, columns: int = 3) -> Figure:
    """Figs. 7, 17 and 20: activation counts before against after, a point per latent (or per class and latent).

    ``panels``: title -> counts before and after, of one shape; ``notes``: title -> a few words in the corner;
    ``members``: title -> group -> bool of the same shape, drawn in colour.
    """
    figure, axes = _panels(len(filled(panels, "panels")), columns, 1.95)
    for panel, (title, (before, after)) in zip(axes, panels.items()):
        x, y = (1 + np.asarray(c).ravel().astype(float) for c in (before, after))
        panel.plot([1, max(x.max(), y.max())], [1, max(x.max(), y.max())], color=GREY, lw=0.6)
        # Of many points the equal ones are drawn once; as complex numbers they are found in seconds.
        pairs = x + 1j * y if len(x) <= MOST_POINTS else np.unique(x + 1j * y)
        panel.plot(pairs.real, pairs.imag, "o", ms=1.6, mew=0, color="#b5b5b5", alpha=0.5, rasterized=True)
        for group, colour in GROUP_LOOKS.items() if members else ():
            mine = np.asarray(members[title][group]).ravel()
            panel.plot(x[mine], y[mine], "o", ms=2.6, mew=0, color=colour, label=group, alpha=0.9, rasterized=True)
        panel.set(xscale="log", yscale="log", title=title, aspect="equal")
        panel.text(0.04, 0.96, notes[title], transform=panel.transAxes, va="top", fontsize=6, color=GREY)
    for panel in axes[::columns]:
        panel.set_ylabel("1 + active tokens, MaPLe")
    for panel in axes[-columns:]:
        panel.set_xlabel("1 + active tokens, CLIP")
    if members:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, markerscale=1.6)
    return figure


def _panels(n: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with ``n`` panels in rows of ``columns``; what is over stays empty."""
    rows = -(-n // columns)
    figure = new_figure(PAGE, 0.45 + height * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in axes[n:]:
        panel.axis("off")
    return figure, list(axes[:n])


def group_curves(table: pd.DataFrame) -> Figure:
    """How many latents per class each group has, against where "high" ends, a line per rank where "low" begins.

    ``table``: columns upper, lower, group, mean, low, high.
    """
    need(table, "group", "upper", "lower", "group", "mean", "low", "high")
    figure = new_figure(PAGE, 1.9)
    axes = figure.subplots(1, 3)
    for panel, (group, colour) in zip(axes, GROUP_LOOKS.items()):
        for (lower, rows), dashes in zip(table[table["group"] == group].groupby("lower"), ("-", "--", ":", "-.")):
            panel.fill_between(rows["upper"], rows["low"], rows["high"], color=colour, alpha=0.15, lw=0)
            panel.plot(rows["upper"], rows["mean"], color=colour, marker="o", ms=2.5, ls=dashes,
                       label=f"low: rank > {lower}")
        panel.set(title=group, xlabel="high: rank at most", ylim=(0, None))
        panel.grid(axis="y")
    axes[0].set_ylabel("latents per class")
    axes[2].legend(loc="upper left")
    return figure


def confusions(before: np.ndarray, after: np.ndarray, class_names: Sequence[str], titles: Sequence[str]) -> Figure:
    """Fig. 21: confusion matrices ``[C,C]`` before and after, rows true classes, each row summing to 1."""
    n = len(class_names)
    named = list(class_names) if n <= MOST_NAMED else [""] * n
    figure = new_figure(PAGE, 1.1 + min(0.24 * n, 2.6))
    axes = figure.subplots(1, 2, sharey=True)
    for panel, counts, title in zip(axes, (before, after), titles):
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        shown = panel.imshow(share, vmin=0, vmax=1)
        panel.set(title=title, xlabel="predicted", xticks=range(n), yticks=range(n), yticklabels=named)
        panel.set_xticks(range(n), named, rotation=90)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    axes[0].set_ylabel("true class")
    figure.colorbar(shown, ax=axes, label="share of the class", aspect=25, pad=0.01).outline.set_visible(False)
    return figure


def concept_maps(before: pd.DataFrame, after: pd.DataFrame, titles: Sequence[str]) -> Figure:
    """What each concept (column) does to the logit of each class (row), before, after, and the difference."""
    limit = float(max(before.abs().to_numpy().max(), after.abs().to_numpy().max()))
    figure = new_figure(PAGE, 1.0 + 0.19 * len(before))
    axes = figure.subplots(1, 3, sharey=True)
    for panel, values, title in zip(axes, (before, after, after - before), (*titles, "difference")):
        shown = panel.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        panel.set_xticks(range(values.shape[1]), values.columns, rotation=90)
        panel.set(title=title, yticks=range(len(values)), yticklabels=values.index)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    axes[0].set_ylabel("class")
    bar = figure.colorbar(shown, ax=axes, label="change of the logit", aspect=25, pad=0.01)
    bar.outline.set_visible(False)
    return figure


def sides_curves(table: pd.DataFrame) -> Figure:
    """Fig. 11: masking curves with an autoencoder trained on CLIP and one trained on the adapted model.

    ``table``: columns autoencoder, classifies, mode, k, accuracy, low, high.
    """
    need(table, "masking", "autoencoder", "classifies", "mode", "k", "accuracy", "low", "high")
    figure = new_figure(PAGE, 2.4)
    axes = figure.subplots(1, 2, sharey=True)
    looks = {("clip", "clip"): (ORANGE, "o", "-"), ("adapted", "clip"): (ORANGE, "s", (0, (3, 1.5))),
             ("clip", "adapted"): (BLUE, "o", "-"), ("adapted", "adapted"): (BLUE, "s", (0, (3, 1.5)))}
    for panel, mode in zip(axes, ("on", "off")):
        rows = table[table["mode"] == mode]
        for (trained, classifies), look in looks.items():
            mine = rows[(rows["autoencoder"] == trained) & (rows["classifies"] == classifies)]
            line(panel, mine, "accuracy", f"autoencoder of {SIDE_NAMES[trained]}, classified by "
                 f"{SIDE_NAMES[classifies]}", *look)
        k_axis(panel, rows["k"])
        panel.set_title({"on": "only the top k latents kept", "off": "the top k latents removed"}[mode])
    axes[0].set(ylabel="accuracy", ylim=(0, 1.02))
    axes[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
