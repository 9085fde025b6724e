"""The paper's drawings of the method (figs. 1, 2a, 5a): boxes, arrows and text. One unit is one inch."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

from patchsae.figures.canvas import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PAGE,
    PALE,
    PURPLE,
    RED,
    new_figure,
    patch_lines,
    picture,
)
from patchsae.figures.sheets import LARGE, SMALL

#: Pale fills that go with the colours of the lines.
FILL = {BLUE: "#dcebf5", ORANGE: "#fbeed6", PURPLE: "#f6e4f1", GREY: "#f0f0f0"}
#: A sparse row of latents: where it is not zero.
SPARSE = (0, 0, 0.9, 0, 0, 0, 0.45, 0, 0, 0.7, 0, 0)
#: The latent that the overview follows.
CHOSEN = 2


def schematic_overview(images: Sequence[np.ndarray]) -> Figure:
    """Fig. 1: an autoencoder reads every token of a layer; adaptation maps the same concepts to classes anew.

    ``images``: uint8 ``[H, W, 3]``, in this order: the scene to look at, up to four reference images of one
    latent and the scene's soft mask for it.
    """
    scene, *references, mask = images
    figure, axes = _sheet(PAGE, 3.5)
    _heading(axes, 0.05, 3.45, "a", "What a layer of CLIP has learnt")
    _image(axes, 0.14, 2.21, LARGE, scene, grid=4)
    _label(axes, 0.54, 2.07, "image, in patches")
    _arrow(axes, (1.05, 2.61), (1.25, 2.61))
    _box(axes, 1.3, 2.15, 0.72, 0.92, "CLIP\nblocks\n1 to $\\ell$", GREY)
    _arrow(axes, (2.06, 2.61), (2.26, 2.61))
    _tokens(axes, 2.32, 2.15, 5, 0.92, "tokens $z$")
    _arrow(axes, (2.66, 2.61), (2.9, 2.61), BLUE)
    _funnel(axes, 2.95, 2.61, 0.5, 0.4, 0.92, "encode")
    _latents(axes, 3.52, 2.15, 1.12, 0.92, 5)
    _label(axes, 4.25, 2.07, "sparse latents $h$")
    _label(axes, 4.08, 3.11, "sparse autoencoder", va="bottom", color=BLUE)
    _funnel(axes, 4.71, 2.61, 0.5, 0.92, 0.4, "decode")
    _arrow(axes, (5.25, 2.61), (5.45, 2.61), BLUE)
    _box(axes, 5.5, 2.15, 0.72, 0.92, "CLIP\nblocks\n$\\ell$+1 to $L$", GREY)
    _arrow(axes, (6.26, 2.61), (6.46, 2.61))
    _label(axes, 6.58, 2.61, "class", va="center", rotation=90)
    column = 3.52 + (CHOSEN + 0.5) * 1.12 / len(SPARSE)
    _frame(axes, column - 0.055, 2.13, 0.11, 0.96, RED)
    _arrow(axes, (column, 2.11), (column, 1.86), RED)
    _label(axes, 3.06, 1.6, "one latent,\none concept", ha="right", va="center", color=RED)
    for i, image in enumerate(references[:4]):
        _image(axes, 3.14 + 0.58 * i, 1.3, SMALL, image)
    _image(axes, 5.7, 1.3, SMALL, mask)
    _label(axes, 4.28, 1.26, "its reference images")
    _label(axes, 5.97, 1.26, "where it fires")
    _heading(axes, 0.05, 1.2, "b", "What adaptation changes")
    before = (0, 0), (1, 0), (1, 1), (2, 1), (2, 2)
    _mapping(axes, 0.1, 0.0, "CLIP", before, before)
    _label(axes, 3.375, 0.54, "same concepts", va="center")
    _arrow(axes, (3.0, 0.42), (3.75, 0.42))
    _label(axes, 3.375, 0.3, "new mapping", va="center", color=GREEN)
    _mapping(axes, 3.75, 0.0, "adapted", ((0, 0), (0, 2), (1, 0), (2, 1), (2, 2), (1, 2)), before)
    return figure


def schematic_autoencoder() -> Figure:
    """Fig. 2a: from tokens to latents and back, and the terms of the loss (eqs. 1 and 2)."""
    figure, axes = _sheet(PAGE, 1.85)
    _tokens(axes, 0.3, 0.8, 6, 0.95, "tokens $z$", "$[B, T, D]$")
    _arrow(axes, (0.66, 1.27), (0.9, 1.27))
    _box(axes, 0.95, 1.1, 0.62, 0.35, "$-\\; b_{dec}$", ORANGE)
    _arrow(axes, (1.61, 1.27), (1.81, 1.27))
    _funnel(axes, 1.86, 1.27, 0.62, 0.45, 0.95, "$W_{enc}$")
    _label(axes, 2.17, 0.72, "$+\\; b_{enc}$")
    _arrow(axes, (2.52, 1.27), (2.72, 1.27))
    _box(axes, 2.77, 1.1, 0.45, 0.35, "relu", GREY)
    _arrow(axes, (3.26, 1.27), (3.44, 1.27))
    _latents(axes, 3.5, 0.8, 1.2, 0.95, 6)
    _label(axes, 4.1, 0.72, "latents $h$   $[B, T, S]$")
    _funnel(axes, 4.78, 1.27, 0.62, 0.95, 0.45, "$W_{dec}$")
    _arrow(axes, (5.44, 1.27), (5.6, 1.27))
    _box(axes, 5.65, 1.1, 0.5, 0.35, "$+\\; b_{dec}$", ORANGE)
    _arrow(axes, (6.19, 1.27), (6.33, 1.27))
    _tokens(axes, 6.38, 0.8, 6, 0.95, "$\\hat z$")
    terms = (("reconstruction", "$\\|\\hat z - z\\|^2 / \\|z\\|$", 1.35, INK),
             ("sparsity", "$\\lambda\\,\\|h\\|_1$", 3.7, BLUE),
             ("ghost gradients", "dead latents fit $z - \\hat z$", 5.5, GREY))
    axes.plot((0.3, 6.6), (0.46, 0.46), color=PALE, lw=0.7)
    _label(axes, 0.3, 0.25, "loss  =", ha="left", va="center", weight="bold")
    for name, formula, x, colour in terms:
        _label(axes, x, 0.3, formula, va="center", color=colour, fontsize=8)
        _label(axes, x, 0.14, name, va="center", fontsize=6)
    for x in (2.6, 4.5):
        _label(axes, x, 0.27, "+", va="center", fontsize=9)
    return figure


def schematic_ablation(images: Sequence[np.ndarray]) -> Figure:
    """Fig. 5a: keep or remove the k latents most often active for a class, then finish the forward pass.

    ``images``: uint8 ``[H, W, 3]``, the first is the scene to classify.
    """
    figure, axes = _sheet(PAGE, 2.1)
    _image(axes, 0.02, 0.82, LARGE, images[0], grid=4)
    _arrow(axes, (0.84, 1.22), (0.98, 1.22))
    _box(axes, 1.02, 0.9, 0.62, 0.65, "blocks\n1 to $\\ell$,\nencode", GREY)
    _arrow(axes, (1.68, 1.22), (1.84, 1.22))
    _latents(axes, 1.9, 0.9, 0.95, 0.65, 1)
    _label(axes, 2.37, 0.82, "latents $h$")
    top = (2, 9)
    branches = ((1.45, "on: keep only top $k$", True, GREEN), (0.5, "off: remove top $k$", False, RED))
    for y, name, keep, colour in branches:
        values = tuple(v if (i in top) == keep else 0 for i, v in enumerate(SPARSE))
        _arrow(axes, (2.9, 1.22), (3.12, y + 0.2), colour)
        _latents(axes, 3.18, y, 0.95, 0.4, 1, values, colour)
        _label(axes, 3.65, y + 0.57, name, color=colour)
        for i in top:
            x = 3.18 + (i + 0.5) * 0.95 / len(SPARSE)
            _frame(axes, x - 0.045, y - 0.02, 0.09, 0.44, colour)
        _arrow(axes, (4.18, y + 0.2), (4.4, 1.22), colour)
    _label(axes, 3.65, 0.37, "top $k$ of class $c$, counted on training images", fontsize=6)
    _box(axes, 4.45, 0.9, 0.78, 0.65, "decode,\nblocks\n$\\ell$+1 to $L$", GREY)
    _arrow(axes, (5.27, 1.22), (5.43, 1.22))
    _label(axes, 5.5, 1.72, "zero-shot classes", ha="left")
    for i, (name, share) in enumerate((("cat", 0.78), ("dog", 0.3), ("boat", 0.12))):
        axes.add_patch(Rectangle((5.8, 1.38 - 0.22 * i), share, 0.13, fc=BLUE if i == 0 else PALE, lw=0))
        _label(axes, 5.76, 1.445 - 0.22 * i, name, ha="right", va="center")
    return figure


def _sheet(width: float, height: float) -> tuple[Figure, Axes]:
    figure = new_figure(width, height, layout=None)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def _label(axes: Axes, x: float, y: float, text: str, **options) -> None:
    axes.text(x, y, text, **{"ha": "center", "va": "top", "color": INK, "linespacing": 1.25} | options)


def _heading(axes: Axes, x: float, y: float, letter: str, text: str) -> None:
    _label(axes, x, y, letter, ha="left", weight="bold", fontsize=9)
    _label(axes, x + 0.16, y - 0.015, text, ha="left", weight="bold", fontsize=7.5)


def _arrow(axes: Axes, start, end, colour: str = GREY) -> None:
    style = {"arrowstyle": "-|>,head_length=3,head_width=1.6", "shrinkA": 0, "shrinkB": 0, "lw": 0.9}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, **style))


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    style = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, fc=FILL[colour], ec=colour, lw=0.8))
    _label(axes, x + width / 2, y + height / 2, text, va="center")


def _frame(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, fill=False, ec=colour, lw=0.8, ls=(0, (2, 1.5))))


def _funnel(axes: Axes, x: float, y: float, width: float, left: float, right: float, text: str) -> None:
    """A trapezium centred on height ``y``: a map between widths."""
    corners = ((x, y - left / 2), (x, y + left / 2), (x + width, y + right / 2), (x + width, y - right / 2))
    axes.add_patch(Polygon(corners, fc=FILL[BLUE], ec=BLUE, lw=0.8, joinstyle="round"))
    _label(axes, x + width / 2, y, text, va="center")


def _tokens(axes: Axes, x: float, y: float, count: int, height: float, name: str, shape: str = "") -> None:
    """A column of tokens, the class token on top."""
    pitch = height / count
    for i in range(count):
        colour = PURPLE if i == count - 1 else GREY
        corner = x, y + i * pitch + 0.02
        axes.add_patch(Rectangle(corner, 0.28, pitch - 0.04, fc=FILL[colour], ec=colour, lw=0.7))
    _label(axes, x + 0.14, y - 0.08, name)
    _label(axes, x + 0.14, y - 0.21, shape, fontsize=6)


def _latents(axes: Axes, x: float, y: float, width: float, height: float, rows: int,
             values: Sequence[float] = SPARSE, colour: str = ORANGE) -> None:
    """Rows of latents, one a token: mostly empty cells, some full ones."""
    pitch, cell = height / rows, width / len(values)
    for row in range(rows):
        for i in range(len(values)):
            value = values[(i + 5 * row) % len(values)]
            if i == CHOSEN and rows > 1:
                value = (0.2, 0.9, 0.6, 0, 0, 0)[row]
            corner = (x + i * cell + 0.008, y + row * pitch + 0.02)
            size = cell - 0.016, pitch - 0.04
            axes.add_patch(Rectangle(corner, *size, fc="#f4f4f4", ec="#dddddd", lw=0.4))
            axes.add_patch(Rectangle(corner, *size, fc=colour, lw=0, alpha=value))


def _image(axes: Axes, x: float, y: float, side: float, image: np.ndarray, grid: int = 1) -> None:
    """A picture, with the lines between its patches."""
    shown = picture(axes.figure, x, axes.get_ylim()[1] - y - side, side, image)
    patch_lines(shown, grid, 1.2)


def _mapping(axes: Axes, x: float, y: float, name: str, edges: Sequence[tuple[int, int]],
             before: Sequence[tuple[int, int]]) -> None:
    """Concepts at the left, classes at the right, and which speaks for which; green is new."""
    _label(axes, x + 1.4, y + 0.97, name, weight="bold")
    heights = [y + 0.72 - 0.3 * i for i in range(3)]
    for concept, label in edges:
        colour, width = (GREEN, 1.8) if (concept, label) not in before else (PALE, 1.6)
        axes.plot((x + 0.9, x + 2.05), (heights[concept], heights[label]), color=colour, lw=width, zorder=1)
    for i, height in enumerate(heights):
        axes.plot(x + 0.9, height, "o", ms=9, mfc=FILL[ORANGE], mec=ORANGE)
        axes.plot(x + 2.05, height, "s", ms=9, mfc=FILL[BLUE], mec=BLUE)
        _label(axes, x + 0.74, height, f"concept {i + 1}", ha="right", va="center")
        _label(axes, x + 2.21, height, f"class {'ABC'[i]}", ha="left", va="center")
