"""Figures of top-k latent masking (sec. 4.1): accuracy against k, paired differences, predictions of single images."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from patchsae.figures.canvas import BLUE, GREEN, GREY, INK, ORANGE, PAGE, PURPLE, RED, filled, need, new_figure

#: Selection -> how it is drawn: label, colour, marker, line.
LOOKS = {
    "class": ("class-level", BLUE, "o", "-"),
    "predicted-class": ("of the predicted class", "#56b4e9", "D", "-"),
    "class-unshared": ("class-level, unshared", GREEN, "^", "-"),
    "dataset": ("data-set-level", ORANGE, "s", "-"),
    "wrong-class": ("of a wrong class", PURPLE, "v", "-"),
    "matched": ("random, matched", RED, "X", (0, (4, 1.5))),
    "random": ("random", "#949494", "P", (0, (1, 1))),
}
MODES = {"on": "only the top k latents kept", "off": "the top k latents removed"}


def masking_curves(table: pd.DataFrame, chance: float | None = None) -> Figure:
    """Fig. 5b: accuracy with only the top k latents on, and with the top k off, a line per selection.

    ``table``: columns selection, mode, k, accuracy, low, high; bands are intervals. Values of k are evenly spaced.
    """
    need(table, "masking", "selection", "mode", "k", "accuracy", "low", "high")
    figure = new_figure(PAGE, 2.7)
    axes = figure.subplots(1, 2, sharey=True)
    for panel, (mode, title) in zip(axes, MODES.items()):
        rows = table[table["mode"] == mode]
        for selection in [s for s in LOOKS if s in set(rows["selection"])]:
            line(panel, rows[rows["selection"] == selection], "accuracy", *LOOKS[selection])
        _levels(panel, table, chance)
        k_axis(panel, rows["k"])
        panel.set_title(title)
    axes[0].set(ylabel="zero-shot accuracy", ylim=(0, None))
    axes[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def masking_differences(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Accuracy under class-level masking minus that under a control, paired by image, per k.

    ``tables``: name of the control's selection -> columns mode, k, difference, low, high.
    """
    figure = new_figure(PAGE, 2.2)
    axes = figure.subplots(1, 2, sharey=True)
    for control, table in filled(tables, "controls").items():
        need(table, "difference", "mode", "k", "difference", "low", "high")
        for panel, mode in zip(axes, MODES):
            line(panel, table[table["mode"] == mode], "difference", *LOOKS[control])
    for panel, (mode, title) in zip(axes, MODES.items()):
        panel.axhline(0, color=INK, lw=0.6)
        k_axis(panel, table[table["mode"] == mode]["k"])
        panel.set_title(title)
    axes[0].set_ylabel("class-level minus control")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, title="control")
    return figure


def prediction_maps(rows: pd.DataFrame, pictures: Mapping[str, np.ndarray], class_names: Sequence[str],
                    most: int = 6) -> Figure:
    """Fig. 6, right: what single images are taken for with their top k latents on; first original, last all.

    ``rows``: columns id, label, mode, k, logits of one selection; ``pictures``: id -> uint8 ``[H,W,3]``. Colour is
    the class's probability, the dot is the prediction, the true class is bold.
    """
    need(rows, "prediction", "id", "label", "mode", "k", "logits")
    lines = -(-len(filled(pictures, "images")) // 2)
    figure = new_figure(PAGE, 0.35 + 1.22 * lines)
    axes = figure.subplots(lines, 4, width_ratios=(1, 2.6, 1, 2.6), squeeze=False)
    for panel in axes.flat:
        panel.axis("off")
    for (image, heat), (id, picture) in zip(axes.reshape(-1, 2), pictures.items()):
        mine = rows[(rows["id"] == id) & rows["mode"].isin(["original", "on"])].drop_duplicates(["mode", "k"])
        image.imshow(picture)
        shown = _prediction_map(heat, mine.sort_values("k"), class_names, most)
    figure.colorbar(shown, ax=axes, label="probability", aspect=30, pad=0.01).outline.set_visible(False)
    return figure


def _prediction_map(panel: Axes, rows: pd.DataFrame, class_names: Sequence[str], most: int):
    """One image of :func:`prediction_maps`: classes that win under some k, and the true one, against k."""
    share = torch.softmax(torch.from_numpy(np.stack(rows["logits"].to_list())), 1).numpy().T
    wins, truth = share.argmax(0), int(rows["label"].iloc[0])
    classes = [truth, *dict.fromkeys(c for c in wins[::-1] if c != truth)][:most]
    classes += [c for c in np.argsort(-share.max(1), kind="stable") if c not in classes][:most - len(classes)]
    shown = panel.imshow(share[classes], vmin=0, vmax=1, aspect="auto")
    for column, winner in enumerate(wins):
        if winner in classes:
            row = classes.index(winner)
            panel.plot(column, row, "o", ms=2.2, mew=0, color="white" if share[winner, column] < 0.6 else INK)
    panel.axis("on")
    panel.axvline(0.5, color="white", lw=1.5)
    panel.set_yticks(range(len(classes)), [class_names[c] for c in classes])
    panel.get_yticklabels()[0].set_fontweight("bold")
    panel.set_xticks(range(len(rows)), ["original", *_k_labels(rows["k"].iloc[1:])], rotation=90, fontsize=5.5)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    return shown


def line(panel: Axes, rows: pd.DataFrame, column: str, label: str, colour: str, marker: str, line) -> None:
    """Values against k, evenly spaced, with a band from low to high."""
    rows = rows.sort_values("k")
    at = range(len(rows))
    panel.fill_between(at, rows["low"], rows["high"], color=colour, alpha=0.18, lw=0)
    panel.plot(at, rows[column], color=colour, marker=marker, ms=3, lw=1, ls=line, label=label)


def _levels(panel: Axes, table: pd.DataFrame, chance: float | None) -> None:
    """Horizontal lines: the original, the spliced model, and chance."""
    original, spliced = (table.loc[table["mode"] == mode, "accuracy"].iloc[0] for mode in ("original", "spliced"))
    panel.axhline(original, color=INK, lw=0.7, zorder=1, label="original")
    if spliced != original:
        panel.axhline(spliced, color=INK, lw=0.7, zorder=1, ls=(0, (3, 2)), label="spliced")
    if chance:
        panel.axhline(chance, color=GREY, lw=0.7, zorder=1, ls=(0, (1, 2)), label="chance")


def k_axis(panel: Axes, ks: pd.Series) -> None:
    labels = _k_labels(sorted(set(ks)))
    panel.set_xticks(range(len(labels)), labels)
    panel.set_xlabel("k")
    panel.grid(axis="y")


def _k_labels(ks: Sequence[int]) -> list[str]:
    return [*(f"{k:,}" for k in list(ks)[:-1]), "all"]
