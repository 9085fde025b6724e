"""What every figure is made of: the style, how it becomes files, and pictures and texts placed in inches.

Importing this room sets the style, so a notebook's own plots look like its figures.
"""

import functools
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.textpath import TextPath
from PIL import Image, ImageChops, ImageOps

from patchsae import config
from patchsae.weights.files import write_atomically

#: Inches: the width of a page (a column is 3.25), and the space between two pictures.
PAGE, GAP = 6.75, 0.04
CAPTION_LINE = 0.11
#: Dots per inch of the files of charts, and of sheets of pictures, where a drawn image of 64 pixels fills 0.53 inches
#: with two dots a pixel; and how many times fewer a notebook has, which git has to carry.
CHART_DPI, SHEET_DPI, NOTEBOOK = 200, 240, 2
#: How far a colour of a palette may be from the one it stands for, of 256 levels: less than an eye sees.
PALETTE_ERROR = 10
BLUE, ORANGE, GREEN, RED, PURPLE, *_, SKY = sns.color_palette("colorblind").as_hex()
INK, GREY, PALE = "#222222", "#777777", "#d0d0d0"
DASHES = 0, (3, 2)

# seaborn's "paper" has letters of 9.6 points; on a page of this width they are 7.
sns.set_theme({name: 7 / 9.6 * size for name, size in sns.plotting_context("paper").items()}, "ticks", "colorblind",
              font="DejaVu Sans", rc={
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#555555", "axes.titlesize": 8,
    "grid.color": "#e6e6e6", "legend.frameon": False, "legend.handlelength": 1.8, "image.cmap": "viridis",
    "image.composite_image": False,  # pictures that share axes stay as they are in a pdf
    "lines.linewidth": 1, "pdf.fonttype": 42, "xtick.color": "#555555", "ytick.color": "#555555",
    "xtick.labelcolor": "#333333", "ytick.labelcolor": "#333333"})


def png(figure: Figure, smaller: int = 1) -> bytes:
    """The figure as a png file, with a palette of 256 colours where an eye cannot tell them from its own.

    ``smaller``: how many dots each way become one. The same figure gives the same bytes: they hold no date or version.
    """
    drawn, file = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", pil_kwargs={"compress_level": 0})
    picture = Image.open(drawn).convert("RGB").reduce(smaller)
    reduced = picture.quantize(256, Image.Quantize.MAXCOVERAGE)
    error = max(most for _, most in ImageChops.difference(picture, reduced.convert("RGB")).getextrema())
    (reduced if error <= PALETTE_ERROR else picture).save(file, "png", optimize=True, dpi=2 * (figure.dpi / smaller,))
    return file.getvalue()


class _NotebookFigure(Figure):
    """A figure that a notebook shows once, as the last expression of a cell as well as at the end of one."""

    def _ipython_display_(self) -> None:
        from IPython.display import Image, display

        plt.close(self)  # or the inline backend shows it again at the end of the cell
        display(Image(png(self, NOTEBOOK)))


def new_figure(width: float, height: float, layout: str | None = "constrained") -> Figure:
    """An empty figure of this size in inches; without a layout it is a sheet, on which things are placed by hand."""
    dpi = CHART_DPI if layout else SHEET_DPI
    size = [NOTEBOOK * np.ceil(side * dpi / NOTEBOOK - 1e-6) / dpi for side in (width, height)]
    return plt.figure(figsize=size, dpi=dpi, layout=layout, FigureClass=_NotebookFigure)


def save(figure: Figure, profile: config.Profile, name: str, table: pd.DataFrame) -> None:
    """Write ``<name>.png``, ``.pdf`` and ``.csv`` (the numbers plotted) into the profile's figures folder.

    The same figure gives the same bytes: no file holds a date or a version. Where the environment variable
    ``PATCHSAE_MANIFEST`` names a file, the paths written are appended to it, one a line.
    """
    nothing = dict.fromkeys(("CreationDate", "Creator", "Producer"))
    _write_file(profile, f"{name}.png", lambda path: path.write_bytes(png(figure)))
    _write_file(profile, f"{name}.pdf", lambda path: figure.savefig(path, format="pdf", metadata=nothing))
    save_table(profile, name, table)


def save_table(profile: config.Profile, name: str, table: pd.DataFrame) -> None:
    """Write ``<name>.csv`` into the profile's figures folder, numbers to six digits."""
    _write_file(profile, f"{name}.csv", lambda path: table.to_csv(
        path, index=False, float_format="%.6g", lineterminator="\n"))


def _write_file(profile: config.Profile, name: str, write: Callable[[Path], object]) -> None:
    path = write_atomically(profile.figures_dir / name, write)
    if manifest := os.environ.get("PATCHSAE_MANIFEST"):
        inside = path.relative_to(config.ROOT) if path.is_relative_to(config.ROOT) else path
        with open(manifest, "a", encoding="utf-8") as lines:
            lines.write(f"{inside.as_posix()}\n")


def needs(*columns: str) -> Callable:
    """A figure of a table without one of these columns is refused; its docstring names them."""
    def decorate(draw: Callable[..., Figure]) -> Callable[..., Figure]:
        @functools.wraps(draw)
        def checked(table: pd.DataFrame, *others, **options) -> Figure:
            if missing := [column for column in columns if column not in table]:
                raise ValueError(f"The table for {draw.__name__} has no column {missing[0]!r}; it needs "
                                 f"{', '.join(columns)}.")
            return draw(table, *others, **options)

        checked.__doc__ = f"{draw.__doc__}\n\n    Columns of the table: {', '.join(columns)}.\n    "
        return checked
    return decorate


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


def resampled(image: np.ndarray, dots: int) -> np.ndarray:
    """An image ``[H,W,3]`` uint8 whose longer side is ``dots``."""
    return np.asarray(ImageOps.contain(Image.fromarray(image), (dots, dots), Image.Resampling.LANCZOS))


def picture(figure: Figure, left: float, top: float, side: float, image: np.ndarray) -> Axes:
    """An image ``[H,W,3]`` uint8 without axes, in pixel coordinates.

    Its pixels take whole dots if that moves its edges less than a gap; else it is resampled to the dots there are, so
    that a file holds no more than can be seen.
    """
    dots, pixels, shown = round(side * figure.dpi), max(image.shape[:2]), image
    whole = pixels * max(1, round(dots / pixels))
    if abs(whole - dots) < GAP * figure.dpi:
        dots = whole
    else:
        shown = resampled(image, dots)
    left, top = (NOTEBOOK * round(at * figure.dpi / NOTEBOOK) / figure.dpi for at in (left, top))
    axes = place(figure, left, top, dots / figure.dpi, dots / figure.dpi)
    axes.imshow(shown, extent=(0, image.shape[1], image.shape[0], 0), interpolation="none")
    axes.axis("off")
    return axes


def outline(axes: Axes, mask: np.ndarray) -> None:
    """Outline a mask, bool ``[H,W]``, on a picture of its size."""
    if np.any(mask) and not np.all(mask):
        y, x = (np.arange(n) + 0.5 for n in mask.shape)
        edge = axes.contour(x, y, mask.astype(float), levels=[0.5], colors=RED, linewidths=0.9)
        edge.set_path_effects([withStroke(linewidth=1.7, foreground="white")])


def patch_lines(axes: Axes, patches: int, width: float) -> None:
    """Light lines between the patches of a picture."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.vlines(np.linspace(left, right, patches + 1)[1:-1], bottom, top, color="white", lw=width, alpha=0.6)
    axes.hlines(np.linspace(bottom, top, patches + 1)[1:-1], left, right, color="white", lw=width, alpha=0.6)


def heat_map(axes: Axes, heat: np.ndarray) -> None:
    """Turn a picture into a patch heat map ``[P,P]``, from 0 to its maximum, with lines between the patches."""
    shown = axes.images[-1]
    shown.set_data(heat)
    shown.set_clim(0, max(float(np.max(heat)), 1e-12))
    patch_lines(axes, len(heat), 0.3)


def heat_key(figure: Figure, left: float, width: float, top: float) -> None:
    """The colours of heat maps, each of which has its own maximum."""
    bar = figure.colorbar(ScalarMappable(), cax=place(figure, left, top, width, 0.06), orientation="horizontal")
    bar.set_ticks([0, 1], labels=["0", "maximum"])
    bar.ax.tick_params(length=0, pad=1.5, labelsize=6)
    bar.outline.set_visible(False)


def frame_patch(axes: Axes, image: np.ndarray, token: tuple[int, int], grid: int) -> None:
    """Frame one patch of an image cut into ``grid x grid`` patches."""
    height, width = image.shape[0] / grid, image.shape[1] / grid
    axes.add_patch(Rectangle((token[1] * width, token[0] * height), width, height, fill=False, ec=RED, lw=1.2,
                             path_effects=[withStroke(linewidth=2.2, foreground="white")]))
