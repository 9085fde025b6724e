"""The paper's drawings of the method (figs. 1, 2a, 5a): blocks, arrows and text. One unit is one inch."""

from collections.abc import Sequence

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from patchsae.figures import canvas
from patchsae.figures.canvas import BLUE, GREEN, GREY, INK, ORANGE, PAGE, PALE, PURPLE, RED
from patchsae.figures.sheets import LARGE, SMALL

#: Pale fills that go with the colours of the lines.
FILL = {BLUE: "#dcebf5", ORANGE: "#fbeed6", PURPLE: "#f6e4f1", GREY: "#f0f0f0"}
#: A sparse row of latents.
SPARSE = (0, 0, 0.9, 0, 0, 0, 0.45, 0, 0, 0.7, 0, 0)


def schematic_overview(images: Sequence[np.ndarray]) -> Figure:
    """Fig. 1: an autoencoder reads every token of a layer; adaptation maps the same concepts to classes anew.

    ``images``: uint8 ``[H, W, 3]``: a scene, four reference images of one latent and the scene's soft mask for it.
    """
    scene, *below = images
    axes = _sheet(3.5)
    _label(axes, 0.05, 3.45, "a  What a layer of CLIP has learnt", ha="left", weight="bold", fontsize=8)
    _chain(axes, 0.14, 2.61, [
        (_image, LARGE, LARGE, "image, in patches", scene, 4), (_arrow, 0.2),
        (_block, 0.72, 0.92, "", "CLIP\nblocks\n1 to $\\ell$", GREY), (_arrow, 0.2),
        (_tokens, 0.28, 0.92, "tokens $z$", 5), (_arrow, 0.22, 0, "", BLUE),
        (_block, 0.5, 0.92, "", "encode", BLUE, 0.45), (_latents, 1.12, 0.92, "", 5, (2,)),
        (_block, 0.5, 0.92, "", "decode", BLUE, 1, 0.45), (_arrow, 0.22, 0, "", BLUE),
        (_block, 0.72, 0.92, "", "CLIP\nblocks\n$\\ell$+1 to $L$", GREY), (_arrow, 0.2)])
    _label(axes, 6.52, 2.61, "class", va="center", rotation=90)
    _label(axes, 3.97, 3.11, "sparse autoencoder", va="bottom", color=BLUE)
    _label(axes, 4.2, 2.07, "sparse latents $h$")
    _arrow(axes, (3.643, 2.11, 0, -0.25), RED)
    _label(axes, 3.06, 1.6, "one latent,\none concept", ha="right", va="center", color=RED)
    for x, image in zip((3.14, 3.72, 4.3, 4.88, 5.7), below):
        _image(axes, (x, 1.3, SMALL, SMALL), image)
    _label(axes, 4.28, 1.26, "its reference images")
    _label(axes, 5.97, 1.26, "where it fires")
    _label(axes, 0.05, 1.2, "b  What adaptation changes", ha="left", weight="bold", fontsize=8)
    _mapping(axes, 0.1, "CLIP", ((0, 0), (1, 0), (1, 1), (2, 1), (2, 2)))
    _label(axes, 3.375, 0.54, "same concepts", va="center")
    _arrow(axes, (3.0, 0.42, 0.75, 0))
    _label(axes, 3.375, 0.3, "new mapping", va="center", color=GREEN)
    _mapping(axes, 3.75, "adapted", ((0, 0), (1, 0), (2, 1), (2, 2)), new=((0, 2), (1, 2)))
    return axes.figure


def schematic_autoencoder() -> Figure:
    """Fig. 2a: from tokens to latents and back, and the terms of the loss (eqs. 1 and 2)."""
    axes = _sheet(1.85)
    _chain(axes, 0.3, 1.27, [
        (_tokens, 0.28, 0.95, "tokens $z$\n$[B, T, D]$", 6), (_arrow, 0.2),
        (_block, 0.6, 0.35, "", "$-\\; b_{dec}$", ORANGE), (_arrow, 0.2),
        (_block, 0.62, 0.95, "$+\\; b_{enc}$", "$W_{enc}$", BLUE, 0.5), (_arrow, 0.2),
        (_block, 0.45, 0.35, "", "relu", GREY), (_arrow, 0.2),
        (_latents, 1.2, 0.95, "latents $h$   $[B, T, S]$", 6, ()),
        (_block, 0.62, 0.95, "", "$W_{dec}$", BLUE, 1, 0.5), (_arrow, 0.2),
        (_block, 0.5, 0.35, "", "$+\\; b_{dec}$", ORANGE), (_arrow, 0.2), (_tokens, 0.28, 0.95, "$\\hat z$", 6)])
    axes.plot((0.3, 6.5), (0.46, 0.46), color=PALE, lw=0.7)
    for x, formula, name, colour in ((0.55, "loss  =", "", INK), (2.6, "+", "", INK), (4.5, "+", "", INK),
                                     (1.35, "$\\|\\hat z - z\\|^2 / \\|z\\|$", "reconstruction", INK),
                                     (3.6, "$\\lambda\\,\\|h\\|_1$", "sparsity", BLUE),
                                     (5.5, "dead latents fit $z - \\hat z$", "ghost gradients", GREY)):
        _label(axes, x, 0.3, formula, va="center", color=colour, fontsize=8)
        _label(axes, x, 0.14, name, va="center", fontsize=6)
    return axes.figure


def schematic_ablation(images: Sequence[np.ndarray]) -> Figure:
    """Fig. 5a: keep or remove a class's top k latents, then finish the forward pass; the first image is classified."""
    axes = _sheet(2.1)
    _chain(axes, 0.02, 1.22, [
        (_image, LARGE, LARGE, "", images[0], 4), (_arrow, 0.14),
        (_block, 0.62, 0.65, "", "blocks\n1 to $\\ell$,\nencode", GREY), (_arrow, 0.16),
        (_latents, 0.95, 0.65, "latents $h$", 1, ())])
    top = (2, 9)
    for y, name, keep, colour in ((1.65, "on: keep only top $k$", True, GREEN),
                                  (0.7, "off: remove top $k$", False, RED)):
        _arrow(axes, (2.97, 1.22, 0.2, y - 1.22), colour)
        values = [value * ((i in top) == keep) for i, value in enumerate(SPARSE)]
        _latents(axes, (3.22, y - 0.2, 0.95, 0.4), 1, top, values, colour)
        _label(axes, 3.69, y + 0.37, name, color=colour)
        _arrow(axes, (4.22, y, 0.2, 1.22 - y), colour)
    _label(axes, 3.69, 0.37, "top $k$ of class $c$, counted on training images", fontsize=6)
    _chain(axes, 4.47, 1.22, [(_block, 0.78, 0.65, "", "decode,\nblocks\n$\\ell$+1 to $L$", GREY), (_arrow, 0.16)])
    _label(axes, 5.5, 1.72, "zero-shot classes", ha="left")
    for y, name, share, colour in ((1.445, "cat", 0.78, BLUE), (1.225, "dog", 0.3, PALE), (1.005, "boat", 0.12, PALE)):
        axes.add_patch(Rectangle((5.8, y - 0.065), share, 0.13, fc=colour, lw=0))
        _label(axes, 5.76, y, name, ha="right", va="center")
    return axes.figure


def _sheet(height: float) -> Axes:
    axes = canvas.new_figure(PAGE, height, layout=None).add_axes((0, 0, 1, 1), xlim=(0, PAGE), ylim=(0, height))
    axes.axis("off")
    return axes


def _chain(axes: Axes, x: float, y: float, things: Sequence[tuple]) -> None:
    """Things side by side, centred on one height: what draws each, its width and height, a text below, and the rest."""
    for draw, width, *rest in things:
        height, text, *options = rest or (0, "")
        draw(axes, (x, y - height / 2, width, height), *options)
        _label(axes, x + width / 2, y - height / 2 - 0.08, text)
        x += width + 0.05


def _label(axes: Axes, x: float, y: float, text: str, **options) -> None:
    axes.text(x, y, text, **{"ha": "center", "va": "top", "color": INK, "linespacing": 1.25} | options)


def _arrow(axes: Axes, box: Sequence[float], colour: str = GREY) -> None:
    x, y, width, height = box
    axes.annotate("", (x + width, y + height), (x, y), arrowprops={
        "arrowstyle": "-|>,head_length=0.42,head_width=0.22", "color": colour, "lw": 0.9, "shrinkA": 0, "shrinkB": 0})


def _block(axes: Axes, box: Sequence[float], text: str, colour: str, left: float = 1, right: float = 1) -> None:
    """A block of which the left or the right end may have a share of its height: a map between widths."""
    x, y, width, height = box
    ends = np.array([-left, left, right, -right]) * height / 2
    corners = np.stack([(x, x, x + width, x + width), y + height / 2 + ends], 1)
    axes.add_patch(Polygon(corners, fc=FILL[colour], ec=colour, lw=0.8, joinstyle="round"))
    _label(axes, x + width / 2, y + height / 2, text, va="center")


def _tokens(axes: Axes, box: Sequence[float], count: int) -> None:
    """A column of tokens, the class token on top."""
    x, y, width, height = box
    for i, colour in enumerate((count - 1) * [GREY] + [PURPLE]):
        _block(axes, (x, y + i * height / count + 0.02, width, height / count - 0.04), "", colour)


def _latents(axes: Axes, box: Sequence[float], rows: int, framed: Sequence[int], values: Sequence[float] = SPARSE,
             colour: str = ORANGE) -> None:
    """Rows of latents, one a token: mostly empty cells, some full ones; the framed ones fire together."""
    x, y, width, height = box
    cells = np.stack([np.roll(values, -5 * row) for row in range(rows)])
    if rows > 1:
        cells[:, 2] = (0.2, 0.9, 0.6, 0, 0, 0)[:rows]
    edges = np.linspace(x, x + width, len(values) + 1)
    axes.pcolormesh(edges, np.linspace(y, y + height, rows + 1), cells, vmin=0, vmax=1, edgecolors="white", lw=1.2,
                    cmap=sns.light_palette(colour, as_cmap=True))
    for latent in framed:
        axes.add_patch(Rectangle((edges[latent], y - 0.02), width / len(values), height + 0.04, fill=False, ec=RED,
                                 lw=0.8, ls=(0, (2, 1.5))))


def _image(axes: Axes, box: Sequence[float], image: np.ndarray, grid: int = 1) -> None:
    """A picture, with the lines between its patches."""
    x, y, side, _ = box
    canvas.patch_lines(canvas.picture(axes.figure, x, axes.get_ylim()[1] - y - side, side, image), grid, 1.2)


def _mapping(axes: Axes, x: float, name: str, edges: Sequence[tuple[int, int]],
             new: Sequence[tuple[int, int]] = ()) -> None:
    """Concepts at the left, classes at the right, and which speaks for which; green is new."""
    _label(axes, x + 1.4, 0.97, name, weight="bold")
    heights = np.array([0.72, 0.42, 0.12])
    for pairs, colour in ((edges, PALE), (new, GREEN)):
        for pair in pairs:
            axes.plot((x + 0.9, x + 2.05), heights[list(pair)], color=colour, lw=1.8, zorder=1)
    for height, number, letter in zip(heights, "123", "ABC"):
        axes.plot(x + 0.9, height, "o", ms=9, mfc=FILL[ORANGE], mec=ORANGE)
        axes.plot(x + 2.05, height, "s", ms=9, mfc=FILL[BLUE], mec=BLUE)
        _label(axes, x + 0.74, height, f"concept {number}", ha="right", va="center")
        _label(axes, x + 2.21, height, f"class {letter}", ha="left", va="center")
