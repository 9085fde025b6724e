"""What figures are made of: the style, the sizes and colours, and pictures and texts placed in inches.

Importing this room sets the style of ``style.mplstyle``, so a notebook's own plots look like its figures.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath

STYLE = Path(__file__).with_name("style.mplstyle")
#: Inches: the width of a page (a column is 3.25), and the space between two pictures.
PAGE, GAP = 6.75, 0.04
CAPTION_LINE = 0.11
BLUE, ORANGE, GREEN, RED, PURPLE = "#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc"
INK, GREY, PALE = "#222222", "#777777", "#d0d0d0"


def use_style() -> None:
    """Set the style of all figures."""
    plt.style.use(STYLE)


use_style()


#: Dots per inch of figures inside notebooks, which git has to carry; files in figures/ have more.
SCREEN = 96


class _NotebookFigure(Figure):
    """A figure that a notebook shows once, as the last expression of a cell as well as at the end of one."""

    def _ipython_display_(self) -> None:
        from IPython.display import Image, display

        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=SCREEN)
        plt.close(self)  # or the inline backend shows it again at the end of the cell
        display(Image(buffer.getvalue()))


def new_figure(width: float, height: float, layout: str | None = "constrained") -> Figure:
    """An empty figure of this size in inches."""
    return plt.figure(figsize=(width, height), layout=layout, FigureClass=_NotebookFigure)


def need(table: pd.DataFrame, what: str, *columns: str) -> None:
    """Refuse a table without these columns."""
    if missing := [c for c in columns if c not in table]:
        raise ValueError(f"The {what} table has no column {missing[0]!r}; it needs {', '.join(columns)}.")


def filled(items, what: str):
    """Refuse an empty list of things to draw."""
    if not items:
        raise ValueError(f"There are no {what} to draw; pass at least one.")
    return items


def text_width(texts: Sequence[str], size: float, weight: str = "normal") -> float:
    """Inches that the widest text takes."""
    font = {"family": "DejaVu Sans", "weight": weight}
    paths = [TextPath((0, 0), text, size=size, prop=font) for text in texts if text.strip()]
    return max((path.get_extents().width / 72 for path in paths), default=0)


def place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches from the top left."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))


def write(figure: Figure, left: float, top: float, text: str, **options) -> None:
    """Text whose upper left corner is at a place given in inches from the top left."""
    w, h = figure.get_size_inches()
    figure.text(left / w, 1 - top / h, text, **{"va": "top", "fontsize": 7, "color": INK} | options)


def paragraph(figure: Figure, left: float, top: float, caption: str) -> None:
    """Small grey text, a line per part between commas; one text of many lines would not space them evenly."""
    for line, part in enumerate(caption.split(", ")):
        baseline = top + CAPTION_LINE * (line + 1) - 0.02
        write(figure, left, baseline, part, fontsize=6, color=GREY, va="baseline")


def picture(figure: Figure, left: float, top: float, side: float, image: np.ndarray) -> Axes:
    """An image without axes, in pixel coordinates."""
    axes = place(figure, left, top, side, side)
    axes.imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
    axes.axis("off")
    return axes


def mark(axes: Axes, image: np.ndarray, mark) -> None:
    """Outline a mask, or put a frame of a colour round the image."""
    if isinstance(mark, str):
        axes.add_patch(Rectangle((0, 0), image.shape[1], image.shape[0], fill=False, ec=mark, lw=2.5))
    elif mark is not None and np.any(mark) and not np.all(mark):
        y, x = (np.arange(n) + 0.5 for n in np.shape(mark))
        axes.contour(x, y, np.asarray(mark, float), levels=[0.5], colors="white", linewidths=1.7)
        axes.contour(x, y, np.asarray(mark, float), levels=[0.5], colors=RED, linewidths=0.9)


def heat_map(axes: Axes, heat: np.ndarray) -> None:
    """Cover a picture with a patch heat map and light lines between the patches."""
    (width, height), n = (abs(np.subtract(*lim)) for lim in (axes.get_xlim(), axes.get_ylim())), len(heat)
    highest = max(float(np.max(heat)), 1e-12)
    axes.imshow(heat, extent=(0, width, height, 0), vmin=0, vmax=highest, interpolation="nearest")
    axes.vlines(np.arange(1, n) * width / n, 0, height, color="white", lw=0.3, alpha=0.45)
    axes.hlines(np.arange(1, n) * height / n, 0, width, color="white", lw=0.3, alpha=0.45)


def heat_key(figure: Figure, left: float, width: float, top: float) -> None:
    """The colours of heat maps, each of which has its own maximum."""
    axes = place(figure, left, top, width, 0.06)
    axes.imshow(np.linspace(0, 1, 64)[None], aspect="auto", extent=(0, 1, 0, 1))
    axes.set(yticks=[], xticks=[0, 1], xticklabels=["0", "maximum"])
    axes.tick_params(length=0, pad=1.5, labelsize=6)
    for label, side in zip(axes.get_xticklabels(), ("left", "right")):
        label.set_horizontalalignment(side)
    axes.spines[:].set_visible(False)


def frame_patch(axes: Axes, image: np.ndarray, token: tuple[int, int], grid: int) -> None:
    """Frame one patch of an image cut into ``grid x grid`` patches."""
    height, width = image.shape[0] / grid, image.shape[1] / grid
    for colour, line in (("white", 2.2), (RED, 1.2)):
        corner = token[1] * width, token[0] * height
        axes.add_patch(Rectangle(corner, width, height, fill=False, ec=colour, lw=line))


def halo() -> dict:
    """Keep text readable on top of points."""
    return {"bbox": {"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none", "alpha": 0.75}}
