"""What charts have in common: panels, values with their intervals, named rows, percent, colour bars, one legend."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from patchsae.figures.canvas import PAGE, PALE, filled, new_figure


class Look(NamedTuple):
    """How one of several series is drawn; ``dashes``: lengths of strokes and gaps, none for a full line."""

    label: str
    colour: str
    marker: str = "o"
    dashes: tuple | str = ""


def panels(names: Iterable[str], height: float, columns: int = 0, **sharing) -> tuple[Figure, dict[str, Axes]]:
    """A figure across the page with a titled panel for every name, in rows of ``columns``.

    ``height``: inches of a row; ``sharing``: what ``Figure.subplots`` takes. What is over in the last row stays empty.
    """
    names = filled(list(dict.fromkeys(names)), "panels")
    columns = min(columns or len(names), len(names))
    lines = -(-len(names) // columns)
    figure = new_figure(PAGE, 0.3 + height * lines)
    axes = figure.subplots(lines, columns, squeeze=False, **sharing).ravel()
    for panel in axes[len(names):]:
        panel.axis("off")
    for panel, name in zip(axes, names):
        panel.set_title(name)
    return figure, dict(zip(names, axes))


def given(table: pd.DataFrame, value: str) -> dict:
    """Options with which seaborn draws every row's value with its own interval, columns low and high.

    seaborn estimates both from repeated rows; so each row comes three times, and the estimators read off the three.
    """
    ends = (table[end].fillna(table[value]) for end in (value, "low", "high"))
    return {"data": pd.concat([table.assign(**{value: end}) for end in ends], ignore_index=True),
            "estimator": lambda three: _three(three)[0], "errorbar": lambda three: _three(three)[1:]}


def _three(values: pd.Series) -> tuple[float, ...]:
    if len(values) != 3:
        raise ValueError("The table of a figure has several rows for one point; average them first.")
    return tuple(values)


def _named(table: pd.DataFrame, column: str, looks: Mapping[str, Look]) -> tuple[pd.DataFrame, list[Look]]:
    """The table with labels for the values of a column, and the looks of those it has; it loses the others."""
    used = {name: look for name, look in looks.items() if name in set(table[column])}
    kept = table[table[column].isin(list(used))]
    return kept.assign(**{column: [used[name].label for name in kept[column]]}), list(used.values())


def lines(panel: Axes, table: pd.DataFrame, x: str, y: str, column: str, looks: Mapping[str, Look]) -> None:
    """Values against ``x`` in the order of the rows, with bands from low to high: a line for each value of a column."""
    table, used = _named(table, column, looks)
    labels, colours, markers, dashes = zip(*used)
    sns.lineplot(**given(table, y), x=x, y=y, hue=column, hue_order=labels, palette=list(colours), style=column,
                 style_order=labels, markers=list(markers), dashes=list(dashes), sort=False, markersize=3.5,
                 markeredgewidth=0, err_kws={"lw": 0, "alpha": 0.18}, ax=panel)
    panel.grid(axis="y")


def dots(panel: Axes, table: pd.DataFrame, x: str, y: str, column: str, looks: Mapping[str, Look]) -> None:
    """A row for each value of ``y``, in it a dot and its interval for each value of a column, thin lines between."""
    table, used = _named(table, column, looks)
    labels, colours, markers, _ = zip(*used)
    sns.pointplot(**given(table, x), x=x, y=y, hue=column, hue_order=labels, palette=list(colours),
                  markers=list(markers), dodge=0.11 * (len(used) - 1), linestyle="none", markersize=3.5,
                  markeredgewidth=1, err_kws={"linewidth": 0.9}, ax=panel)
    between_rows(panel, table[y].nunique())


def between_rows(panel: Axes, rows: int) -> None:
    """Thin lines between the rows of a panel."""
    for row in range(rows - 1):
        panel.axhline(row + 0.5, color=PALE, lw=0.4, zorder=0)
    panel.tick_params(axis="y", length=0)
    panel.set_ylabel("")
    panel.grid(axis="x")


def intervals(panel: Axes, table: pd.DataFrame, x: str, y: str, colour: str, bold: str = "") -> None:
    """A row for each value of ``y``, in it a dot and its interval; one row may be highlighted."""
    sns.pointplot(**given(table, x), x=x, y=y, color=colour, linestyle="none", markersize=3.5, ax=panel,
                  err_kws={"linewidth": 1.3})
    on_rows(panel, list(dict.fromkeys(table[y])), bold)


def on_rows(panel: Axes, names: list[str], bold: str) -> None:
    """A light line through every named row of a panel; one row may be highlighted."""
    panel.grid(axis="y")
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    panel.set_ylabel("")
    if bold in names:
        row = names.index(bold)
        panel.axhspan(row - 0.5, row + 0.5, color="#e8f1f8", lw=0, zorder=0)
    for label in panel.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == bold else "normal")


def percent(axis: Axis, decimals: int | None = 0) -> None:
    """Shares as percent along an axis; ``decimals=None``: as many as tell the ticks apart."""
    axis.set_major_formatter(PercentFormatter(1, decimals))


def colour_bar(figure: Figure, shown, axes, label: str) -> None:
    """The colours of something drawn, beside these axes."""
    figure.colorbar(shown, ax=axes, label=label, aspect=28, pad=0.01).outline.set_visible(False)


def one_legend(figure: Figure, **options) -> None:
    """One legend outside the panels, in the place of each panel's own: below them, if nothing else is said."""
    handles = {}
    for panel in figure.axes:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels())))
        if legend := panel.get_legend():
            handles |= dict(zip((text.get_text() for text in legend.texts), legend.legend_handles))
            legend.remove()
    figure.legend(handles.values(), handles.keys(), **{"loc": "outside lower center"} | options)
