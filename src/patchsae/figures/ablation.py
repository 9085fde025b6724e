"""Figures of top-k latent masking (sec. 4.1): accuracy against k, paired differences, predictions of single images."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from patchsae.figures.canvas import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PAGE,
    PURPLE,
    RED,
    SKY,
    filled,
    need,
    new_figure,
    resampled,
)
from patchsae.figures.charts import Look, colour_bar, lines, one_legend, panels, percent

#: Selection -> how it is drawn.
LOOKS = {
    "class": Look("class-level", BLUE),
    "predicted-class": Look("of the predicted class", SKY, "D"),
    "class-unshared": Look("class-level, unshared", GREEN, "^"),
    "dataset": Look("data-set-level", ORANGE, "s"),
    "wrong-class": Look("of a wrong class", PURPLE, "v"),
    "matched": Look("random, matched", RED, "X", (4, 1.5)),
    "random": Look("random", "#949494", "P", (1, 1)),
}
MODES = {"on": "only the top k latents kept", "off": "the top k latents removed"}
#: Rows of a prediction map, and dots across its image.
MOST_CLASSES, IMAGE_DOTS = 6, 192


def masking_curves(table: pd.DataFrame, chance: float | None = None) -> Figure:
    """Fig. 5b: accuracy with only the top k latents on, and with the top k off, a line per selection.

    ``table``: columns selection, mode, k, accuracy, low, high; bands are intervals. Values of k are evenly spaced.
    """
    need(table, "masking", "selection", "mode", "k", "accuracy", "low", "high")
    figure, axes = mode_panels(table, 2.4, "accuracy", "selection", LOOKS)
    original, spliced = (table.loc[table["mode"] == mode, "accuracy"].iloc[0] for mode in ("original", "spliced"))
    for panel in axes:
        panel.axhline(original, color=INK, lw=0.7, zorder=1, label="original")
        if spliced != original:
            panel.axhline(spliced, color=INK, lw=0.7, zorder=1, ls=(0, (3, 2)), label="spliced")
        if chance:
            panel.axhline(chance, color=GREY, lw=0.7, zorder=1, ls=(0, (1, 2)), label="chance")
    axes[0].set(ylabel="zero-shot accuracy", ylim=(0, None))
    one_legend(figure, ncols=4)
    return figure


def masking_differences(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Accuracy under class-level masking minus that under a control, paired by image, per k.

    ``tables``: name of the control's selection -> columns mode, k, difference, low, high.
    """
    table = pd.concat(filled(dict(tables), "controls"), names=["selection"]).reset_index(level=0)
    need(table, "difference", "mode", "k", "difference", "low", "high")
    figure, axes = mode_panels(table, 1.9, "difference", "selection", LOOKS, sharey=False)
    for panel in axes:
        panel.axhline(0, color=INK, lw=0.6)
    axes[0].set_ylabel("class-level minus control")
    one_legend(figure, ncols=4, title="control")
    return figure


def mode_panels(table: pd.DataFrame, height: float, value: str, column: str, looks: Mapping[str, Look],
                sharey: bool = True) -> tuple[Figure, list[Axes]]:
    """Two panels, latents kept and latents removed: a share against k, a line for each value of a column."""
    figure, axes = panels(MODES.values(), height, sharey=sharey)
    for panel, mode in zip(axes.values(), MODES):
        k_lines(panel, table[table["mode"] == mode], value, column, looks)
    return figure, list(axes.values())


def k_lines(panel: Axes, rows: pd.DataFrame, value: str, column: str, looks: Mapping[str, Look]) -> None:
    """A share against k, evenly spaced; the largest k is all latents."""
    rows = rows.sort_values("k", kind="stable")
    lines(panel, rows.assign(k=k_labels(rows["k"])), "k", value, column, looks)
    panel.set_ylabel("")
    percent(panel.yaxis)


def k_labels(ks: Sequence[int]) -> list[str]:
    """Numbers of latents in words."""
    return [f"{k:,}" if k < max(ks) else "all" for k in ks]


def prediction_maps(rows: pd.DataFrame, pictures: Mapping[str, np.ndarray], class_names: Sequence[str]) -> Figure:
    """Fig. 6, right: what single images are taken for with their top k latents on; first original, last all.

    ``rows``: columns id, label, mode, k, logits of one selection; ``pictures``: id -> uint8 ``[H,W,3]``. Colour is
    the class's probability, the dot is the prediction, the true class is bold.
    """
    need(rows, "prediction", "id", "label", "mode", "k", "logits")
    height = -(-len(filled(pictures, "images")) // 2)
    figure = new_figure(PAGE, 0.35 + 1.22 * height)
    axes = figure.subplots(height, 4, width_ratios=(1, 2.6, 1, 2.6), squeeze=False)
    for panel in axes.flat:
        panel.axis("off")
    for (image, heat), (id, picture) in zip(axes.reshape(-1, 2), pictures.items()):
        mine = rows[(rows["id"] == id) & rows["mode"].isin(["original", "on"])].drop_duplicates(["mode", "k"])
        image.imshow(picture if max(picture.shape) <= IMAGE_DOTS else resampled(picture, IMAGE_DOTS),
                     interpolation="none")
        _prediction_map(heat, mine.sort_values("k"), class_names)
    colour_bar(figure, heat.collections[0], axes, "probability")
    return figure


def _prediction_map(panel: Axes, rows: pd.DataFrame, class_names: Sequence[str]) -> None:
    """One image of :func:`prediction_maps`: classes that win under some k, and the true one, against k."""
    logits = np.stack(rows["logits"].to_list()).T
    share = np.exp(logits - logits.max(0)) / np.exp(logits - logits.max(0)).sum(0)
    wins, truth = share.argmax(0), int(rows["label"].iloc[0])
    classes = [truth, *dict.fromkeys(c for c in wins[::-1] if c != truth)][:MOST_CLASSES]
    others = [c for c in np.argsort(-share.max(1), kind="stable") if c not in classes]
    classes += others[:MOST_CLASSES - len(classes)]
    panel.axis("on")
    sns.heatmap(share[classes], vmin=0, vmax=1, cmap="viridis", cbar=False, rasterized=True, ax=panel,
                xticklabels=["original", *k_labels(rows["k"].iloc[1:])], yticklabels=[class_names[c] for c in classes])
    for column, winner in enumerate(wins):
        if winner in classes:
            colour = "white" if share[winner, column] < 0.6 else INK
            panel.plot(column + 0.5, classes.index(winner) + 0.5, "o", ms=2.2, mew=0, color=colour)
    panel.axvline(1, color="white", lw=1.5)
    panel.get_yticklabels()[0].set_fontweight("bold")
    panel.tick_params(length=0, rotation=0)
    panel.tick_params(axis="x", rotation=90, labelsize=5.5)
