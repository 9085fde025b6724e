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


def panels(names: Iterable[str], height: float, columns: int = 9, width: float = PAGE,
           **sharing) -> tuple[Figure, dict[str, Axes]]:
    """A figure with a titled panel for every name, in rows of ``columns`` and ``height`` inches; ``sharing``: which
    axes are shared, as for ``Figure.subplots``."""
    names = filled(list(dict.fromkeys(names)), "panels")
    rows = [names[start:start + columns] for start in range(0, len(names), columns)]
    rows[-1] += (len(rows[0]) - len(rows[-1])) * ["."]
    figure = new_figure(min(PAGE, width), 0.3 + height * len(rows))
    axes = figure.subplot_mosaic(rows, **sharing)
    for name, panel in axes.items():
        panel.set_title(name)
    return figure, axes


def given(table: pd.DataFrame, value: str) -> dict:
    """Options with which seaborn draws every row's value with its own interval, columns low and high.

    seaborn estimates both from repeated rows; so each row comes three times, and the estimators read off the three.
    """
    def three(values: pd.Series) -> tuple[float, ...]:
        if len(values) != 3:
            raise ValueError("The table of a figure has several rows for one point; average them first.")
        return tuple(values)

    ends = [table.assign(**{value: table[end].fillna(table[value])}) for end in (value, "low", "high")]
    return {"data": pd.concat(ends, ignore_index=True), "estimator": lambda values: three(values)[0],
            "errorbar": lambda values: three(values)[1:]}


def _series(table: pd.DataFrame, value: str, column: str, looks: Mapping[str, Look]) -> tuple[dict, list]:
    """seaborn's options for a series with intervals for each value of a column that has a look, and their dashes."""
    used = {name: look for name, look in looks.items() if name in set(table[column])}
    table = table[table[column].isin(list(used))]
    labels, colours, markers, dashes = map(list, zip(*used.values()))
    return given(table.assign(**{column: [used[name].label for name in table[column]]}), value) | {
        "hue": column, "hue_order": labels, "palette": colours, "markers": markers, "markersize": 3.5}, dashes


def lines(panel: Axes, table: pd.DataFrame, x: str, y: str, column: str, looks: Mapping[str, Look]) -> None:
    """Values against ``x`` in the order of the rows, with bands from low to high: a line for each value of a column."""
    options, dashes = _series(table, y, column, looks)
    sns.lineplot(x=x, y=y, style=column, style_order=options["hue_order"], dashes=dashes, sort=False,
                 markeredgewidth=0, err_kws={"lw": 0, "alpha": 0.18}, ax=panel, **options)
    panel.grid(axis="y")


def dots(panel: Axes, table: pd.DataFrame, x: str, y: str, column: str, looks: Mapping[str, Look]) -> None:
    """A row for each value of ``y``, and in it a dot with its interval for each value of a column."""
    options, dashes = _series(table, x, column, looks)
    sns.pointplot(x=x, y=y, dodge=0.11 * (len(dashes) - 1), linestyle="none", markeredgewidth=1, ax=panel,
                  err_kws={"linewidth": 0.9}, **options)
    name_rows(panel, list(dict.fromkeys(table[y])))


def intervals(panel: Axes, table: pd.DataFrame, x: str, y: str, colour: str, bold: str = "") -> None:
    """A row for each row of the table, and in it a dot with its interval; one row may be highlighted."""
    sns.pointplot(**given(table, x), x=x, y=y, color=colour, linestyle="none", markersize=3.5, ax=panel,
                  err_kws={"linewidth": 1.3})
    name_rows(panel, list(table[y]), bold)


def name_rows(panel: Axes, names: list[str], bold: str = "") -> None:
    """Thin lines between the named rows of a panel; one row may be highlighted."""
    for row in range(len(names) - 1):
        panel.axhline(row + 0.5, color=PALE, lw=0.4, zorder=0)
    panel.tick_params(axis="y", length=0)
    panel.set_ylabel("")
    panel.grid(axis="x")
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
