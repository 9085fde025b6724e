"""Figures of training: curves, what linear probes read from each layer, and a sweep of settings."""

from collections.abc import Mapping

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from patchsae.figures.canvas import BLUE, GREEN, GREY, INK, ORANGE, PAGE, PALE, need, new_figure
from patchsae.figures.charts import on_rows, one_legend, panels, percent

#: Term of a loss -> colour.
TERMS = {"total": INK, "MSE": BLUE, "$L_1$": ORANGE, "ghost": GREEN}
CONTRASTS = {"heads": INK, "caption": ORANGE, "phrase": BLUE, "patch": GREEN}
#: Values of a sweep below this are arrows at the left edge.
LEAST_SHOWN = -0.1


def training_curves(log: pd.DataFrame) -> Figure:
    """How the autoencoder was trained (sec. 3.1): loss terms, L0, share of dead latents, explained variance.

    ``log``: columns step, mse, l1, ghost, total, l0, dead (share), ev; one row a logged step.
    """
    need(log, "training log", "step", "mse", "l1", "ghost", "total", "l0", "dead", "ev")
    titles = {"loss terms": "", "active latents ($L_0$)": "l0", "dead latents": "dead", "explained variance": "ev"}
    figure, axes = panels(titles, 1.45)
    for panel, column in zip(axes.values(), titles.values()):
        if column:
            sns.lineplot(log, x="step", y=column, estimator=None, color=BLUE, ax=panel)
        else:
            _terms(panel, log.rename(columns={"mse": "MSE", "l1": "$L_1$"}), TERMS)
        panel.set(xlabel="training step", ylabel="")
        panel.xaxis.set_major_locator(MaxNLocator(3))
        panel.grid(axis="y")
    _, l0, dead, ev = axes.values()
    l0.set_ylim(bottom=0)
    dead.set_ylim(0, max(0.01, 1.08 * log["dead"].max()))
    dead.yaxis.set_major_locator(MaxNLocator(4))
    percent(dead.yaxis, None)
    ev.set_ylim(max(-0.05, log["ev"].min() - 0.05), 1)
    return figure


def _terms(panel: Axes, log: pd.DataFrame, colours: Mapping[str, str]) -> None:
    """Terms of a loss against the step, where they are not zero."""
    terms = log.melt("step", list(colours), var_name="term").query("value > 0")
    sns.lineplot(terms, x="step", y="value", hue="term", palette=dict(colours), estimator=None, ax=panel)
    panel.set(yscale="log")
    panel.legend()
    panel.grid(axis="y")


def pretraining_curves(log: pd.DataFrame) -> Figure:
    """How the mini CLIP was trained, for its data card: the warm-up's loss, then the three contrasts.

    ``log``: columns stage ("warm-up" or "contrasts"), step, heads, caption, phrase, patch.
    """
    need(log, "pre-training log", "stage", "step", *CONTRASTS)
    figure, axes = panels(("warm-up", "contrasts"), 1.6)
    for stage, panel in axes.items():
        _terms(panel, log[log["stage"] == stage], CONTRASTS)
        panel.set(xlabel="training step", ylabel="loss")
    return figure


def sweep(table: pd.DataFrame) -> Figure:
    """Table 2 of the paper as dots: one line a configuration, one dot a seed.

    ``table``: columns configuration, seed, mse, l0, l1, ev_patch, ev_cls, dead, accuracy_original and
    accuracy_spliced, shares in [0, 1]. "default" is highlighted; "random" is grey and gives the floor.
    """
    need(table, "sweep", "configuration", "seed", "mse", "l0", "l1", "ev_patch", "ev_cls", "dead",
         "accuracy_original", "accuracy_spliced")
    figure = new_figure(PAGE, 0.95 + 0.17 * table["configuration"].nunique())
    axes = figure.subplots(1, 4, sharey=True, width_ratios=(1.3, 1, 1, 1.3))
    for panel, series, title in (
        (axes[0], {"ev_patch": "patch tokens", "ev_cls": "class token"}, "explained variance"),
        (axes[1], {"l0": ""}, "active latents ($L_0$)"),
        (axes[2], {"dead": ""}, "dead latents"),
        (axes[3], {"accuracy_spliced": "spliced", "accuracy_original": "original"}, "zero-shot accuracy"),
    ):
        _seeds(panel, table, series)
        panel.set_xlabel(title)
    axes[0].set_xlim(LEAST_SHOWN - 0.02, 1.04)
    axes[1].set_xscale("log")
    axes[3].set_xlim(-0.04, 1.04)
    for panel in axes[2:]:
        percent(panel.xaxis)
        panel.set_xlim(left=min(0, panel.get_xlim()[0]))
    return figure


def _seeds(panel: Axes, table: pd.DataFrame, series: Mapping[str, str]) -> None:
    """Dots of one panel of :func:`sweep`; what lies left of the axis is an arrow at its edge."""
    random, order = table["configuration"] == "random", table["configuration"].unique()
    for (column, label), colour, marker in zip(series.items(), (BLUE, ORANGE), "od"):
        beyond = table[column] < LEAST_SHOWN
        for shape, rows in ((marker, table[~beyond]), ("<", table[beyond].assign(**{column: LEAST_SHOWN}))):
            sns.stripplot(rows, x=column, y="configuration", order=order, hue=random, marker=shape, jitter=False,
                          orient="y", palette={False: colour, True: "#9a9a9a"}, size=4.2, legend=False, ax=panel)
        if label:
            panel.plot([], [], marker, color=colour, ms=4.2, label=label)
            panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, columnspacing=0.8, handletextpad=0.1)
        if column in ("ev_patch", "accuracy_spliced") and (table[column][random] > LEAST_SHOWN).any():
            panel.axvline(table[column][random].mean(), color=PALE, lw=0.7, ls=(0, (2, 2)), zorder=1)
    on_rows(panel, list(order), "default")


def probe_table(table: pd.DataFrame) -> Figure:
    """What linear probes read from each layer, a panel per concept.

    ``table``: columns layer, concept, tokens ("patch" or "class"), accuracy, chance (shares); several rows of
    one point, such as seeds, are averaged.
    """
    need(table, "probe", "layer", "concept", "tokens", "accuracy", "chance")
    table = table.replace({"tokens": {"patch": "patch tokens", "class": "class token"}})
    figure, axes = panels(table["concept"], 1.65, sharey=True)
    for concept, panel in axes.items():
        rows = table[table["concept"] == concept]
        sns.lineplot(rows, x="layer", y="accuracy", hue="tokens", style="tokens", markers=["o", "s"], dashes=False,
                     palette={"patch tokens": BLUE, "class token": ORANGE}, errorbar=None, ax=panel)
        sns.lineplot(rows, x="layer", y="chance", color=GREY, ls=(0, (3, 2)), errorbar=None, label="chance", ax=panel)
        panel.set(ylabel="probe accuracy", ylim=(0, 1.02))
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.grid(axis="y")
        percent(panel.yaxis)
    one_legend(figure, loc="outside upper right", ncols=3)
    return figure
