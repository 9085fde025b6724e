"""Figures of top-k latent masking (secs. 4.1, 4.2): accuracy against k, paired differences, single images."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from patchsae.figures import canvas
from patchsae.figures.canvas import BLUE, DASHES, GREEN, GREY, INK, ORANGE, PURPLE, RED, SKY, filled, needs
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


@needs("selection", "mode", "k", "accuracy", "low", "high")
def masking_curves(table: pd.DataFrame, chance: float) -> Figure:
    """Fig. 5b: accuracy with only the top k latents on, and with these off, a line per selection, beside original and
    spliced."""
    figure = _k_panels(table, "mode", "accuracy", ("selection", LOOKS), "zero-shot accuracy", height=2.4, sharey=True)
    levels = table.drop_duplicates("mode").set_index("mode")["accuracy"]
    for panel in figure.axes:
        panel.axhline(levels["original"], color=INK, lw=0.7, zorder=1, label="original")
        if levels["spliced"] != levels["original"]:
            panel.axhline(levels["spliced"], color=INK, lw=0.7, zorder=1, ls=DASHES, label="spliced")
        panel.axhline(chance, color=GREY, lw=0.7, zorder=1, ls=(0, (1, 2)), label="chance")
        panel.set_ylim(0, None)
    one_legend(figure, ncols=4)
    return figure


def masking_differences(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Accuracy under class-level masking minus that under a control, paired by image, per k.

    ``tables``: name of the control's selection -> columns mode, k, difference, low, high.
    """
    table = pd.concat(filled(dict(tables), "controls"), names=["selection"]).reset_index(level=0)
    figure = _k_panels(table, "mode", "difference", ("selection", LOOKS), "class-level minus control", height=1.9)
    for panel in figure.axes:
        panel.axhline(0, color=INK, lw=0.6)
    one_legend(figure, ncols=4, title="control")
    return figure


@needs("classifies", "mode", "k", "accuracy", "low", "high")
def side_curves(table: pd.DataFrame, by: str, first: str) -> Figure:
    """Figs. 5c, 11, 15 and 16: accuracy against k, a line per (whose latents or autoencoder, which model classifies).

    ``by``: "task" or "mode", a panel for each; ``first``: "selects" or "autoencoder". "clip" and "adapted"
    are sides; "mean prompts" is the adapted one with prompt tokens that say nothing of the image.
    """
    names = {"clip": "CLIP", "adapted": "MaPLe", "mean prompts": "MaPLe, prompts of no image"}
    what = "latents" if first == "selects" else "autoencoder"
    looks = {f"{one}, {two}": Look(f"{what} of {names[one]}, classified by {names[two]}", colour, marker, dashes)
             for two, colour in (("clip", ORANGE), ("adapted", BLUE), ("mean prompts", GREEN))
             for one, marker, dashes in (("clip", "o", ""), ("adapted", "s", (3, 1.5)))}
    table = table.assign(sides=table[first] + ", " + table["classifies"])
    height, rotation = (2.1, 0) if by == "mode" else (1.5, 90)
    figure = _k_panels(table, by, "accuracy", ("sides", looks), "accuracy", height=height, columns=3, sharey=True)
    for panel in figure.axes:
        panel.tick_params(axis="x", labelrotation=rotation)
        panel.set_ylim(0, 1.02)
    one_legend(figure, ncols=2)
    return figure


def _k_panels(table: pd.DataFrame, by: str, value: str, series: tuple[str, Mapping[str, Look]], label: str,
              **layout) -> Figure:
    """A share against k up to all latents: a panel for each value of ``by``, a line for each of a column with looks."""
    titles = MODES if by == "mode" else {name: name for name in table[by]}
    figure, axes = panels(titles.values(), **layout)
    for name, panel in zip(titles, axes.values()):
        rows = table[table[by] == name].sort_values("k", kind="stable")
        lines(panel, rows.assign(k=_in_words(rows["k"])), "k", value, *series)
        panel.set_ylabel(label if panel.get_subplotspec().is_first_col() else "")
        percent(panel.yaxis)
    return figure


def _in_words(ks: pd.Series) -> list[str]:
    return [f"{k:,}" if k < ks.max() else "all" for k in ks]


@needs("id", "label", "mode", "k", "logits")
def prediction_maps(rows: pd.DataFrame, pictures: Mapping[str, np.ndarray], class_names: Sequence[str]) -> Figure:
    """Fig. 6, right: what single images are taken for with their top k latents on; first original, last all.

    Colour is the class's probability, the dot is the prediction, the true class is bold. ``pictures``: id -> uint8
    ``[H,W,3]``.
    """
    height = -(-len(filled(pictures, "images")) // 2)
    figure = canvas.new_figure(canvas.PAGE, 0.35 + 1.22 * height)
    axes = figure.subplots(height, 4, width_ratios=(1, 2.6, 1, 2.6), squeeze=False)
    for panel in axes.flat:
        panel.axis("off")
    shown = rows[rows["mode"].isin(["original", "on"])].drop_duplicates(["id", "mode", "k"]).sort_values("k")
    for (image, heat), (id, picture) in zip(axes.reshape(-1, 2), pictures.items()):
        image.imshow(picture if max(picture.shape) <= IMAGE_DOTS else canvas.resampled(picture, IMAGE_DOTS),
                     interpolation="none")
        _prediction_map(heat, shown[shown["id"] == id], class_names)
    colour_bar(figure, heat.collections[0], axes, "probability")
    return figure


def _prediction_map(panel: Axes, rows: pd.DataFrame, class_names: Sequence[str]) -> None:
    """One image of :func:`prediction_maps`: classes that win under some k, and the true one, against k."""
    logits = np.stack(rows["logits"].to_list()).T
    share = np.exp(logits - logits.max(0))
    share /= share.sum(0)
    wins, likeliest = share.argmax(0), np.argsort(-share.max(1), kind="stable")
    classes = list(dict.fromkeys([rows["label"].iloc[0], *wins[::-1], *likeliest]))[:MOST_CLASSES]
    panel.axis("on")
    sns.heatmap(share[classes], vmin=0, vmax=1, cmap="viridis", cbar=False, rasterized=True, ax=panel,
                xticklabels=["original", *_in_words(rows["k"].iloc[1:])], yticklabels=[class_names[c] for c in classes])
    for column, winner in enumerate(wins):
        if winner in classes:
            colour = "white" if share[winner, column] < 0.6 else INK
            panel.plot(column + 0.5, classes.index(winner) + 0.5, "o", ms=2.2, mew=0, color=colour)
    panel.axvline(1, color="white", lw=1.5)
    panel.get_yticklabels()[0].set_fontweight("bold")
    panel.tick_params(length=0, rotation=0)
    panel.tick_params(axis="x", rotation=90, labelsize=5.5)
