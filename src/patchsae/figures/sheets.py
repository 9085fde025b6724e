"""Figures made of pictures: reference images, heat maps and masks in rows and grids.

They are placed in inches from the top left: a layout engine would give each picture its own size.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from patchsae.figures import canvas
from patchsae.figures.canvas import BLUE, CAPTION_LINE, GAP, GREEN, GREY, ORANGE, PAGE, filled, needs, picture, write

#: Inches: a small picture and a large one, two and three dots to each of 64 pixels.
SMALL, LARGE = 128 / 240, 192 / 240


class Row(NamedTuple):
    """Images ``[H, W, 3]`` uint8 after a title, for a layer's latent with its heat map ``[P, P]``."""

    title: str
    images: Sequence[np.ndarray]
    caption: str = ""
    heat: np.ndarray | None = None


class MaskRow(NamedTuple):
    """A latent on an image: image and soft mask ``[H, W, 3]`` uint8, heat ``[P, P]``, truth ``[H, W]`` bool.

    ``image=None`` leaves its place free: the image of the row above.
    """

    title: str
    image: np.ndarray | None
    heat: np.ndarray
    masked: np.ndarray
    truth: np.ndarray | None = None
    caption: str = ""


def image_rows(rows: Sequence[Row]) -> Figure:
    """Reference images (figs. 3 right, 10, 13, 14): a latent a row, its title and caption at the left."""
    figure, size, places = _rows(rows, max(len(row.images) for row in filled(rows, "rows of images")), SMALL)
    for row, (left, top) in zip(rows, places):
        for column, image in enumerate(row.images):
            picture(figure, left + column * (size + GAP), top, size, image)
    return figure


def mask_rows(rows: Sequence[MaskRow], columns: int) -> Figure:
    """Patch heat maps and soft masks (figs. 2, 4, 9): a latent a row, in ``columns`` blocks side by side.

    Each heat map has its own scale, from 0 to its maximum; the outline is the ground truth.
    """
    figure, size, places = _rows(filled(rows, "rows of masks"), 3, LARGE, columns, (0.185, 0.295))
    for row, (left, top) in zip(rows, places):
        lefts = [left + column * (size + GAP) for column in range(3)]
        for at, heading in zip(lefts, ("image", "patch activations", "soft mask")):
            if top == places[0][1] and (heading != "image" or row.image is not None):
                write(figure, at + size / 2, 0.19, heading, ha="center", va="bottom", color=GREY)
        if row.image is not None:
            picture(figure, left, top, size, row.image)
        heat, masked = (picture(figure, at, top, size, row.masked) for at in lefts[1:])
        canvas.heat_map(heat, row.heat)
        if row.truth is not None:
            canvas.outline(heat, row.truth)
            canvas.outline(masked, row.truth)
    canvas.heat_key(figure, places[0][0] + size + GAP, size, figure.get_figheight() - 0.23)
    return figure


def _rows(rows: Sequence[Row] | Sequence[MaskRow], many: int, largest: float, columns: int = 1,
          margins: tuple[float, float] = (0, 0)) -> tuple[Figure, float, list[tuple[float, float]]]:
    """A sheet with titles and captions of rows of ``many`` pictures, block by block; ``margins``: above and below.

    Gives it, the side of a picture, less where a row would be wider than the page, and the corners of the rows' first.
    """
    captions = [row.caption.split(", ") for row in rows]
    left = 0.12 + max(canvas.text_width([row.title for row in rows], 7, "bold"),
                      canvas.text_width([line for lines in captions for line in lines], 6))
    size = min(largest, (PAGE / columns - left) / many - GAP)
    pitch = max(size, 0.18 + CAPTION_LINE * max(map(len, captions))) + 0.07
    block, height = left + many * (size + GAP) + 0.1, -(-len(rows) // columns)
    figure = canvas.new_figure(columns * block - 0.1, sum(margins) + height * pitch, layout=None)
    places = [(index // height * block, margins[0] + index % height * pitch + 0.035) for index in range(len(rows))]
    for row, (start, top) in zip(rows, places):
        write(figure, start + 0.02, top, row.title, weight="bold")
        canvas.paragraph(figure, start + 0.02, top + 0.14, row.caption)
    return figure, size, [(start + left, top) for start, top in places]


@needs("image", "latent", "activation")
def style_pair(table: pd.DataFrame, images: Mapping[str, np.ndarray], latents: Mapping[int, Row]) -> Figure:
    """Fig. 4: one noun in two styles; which of their strongest latents they share, and what three of them look at.

    ``images``: two names -> uint8 ``[H, W, 3]``. ``latents``: the chosen ones, each with a soft mask of either image
    and four reference images.
    """
    if len(images) != 2 or not set(images) <= set(table["image"]):
        raise ValueError(f"The pair needs two images named in the table's column image, not {list(images)}.")
    figure = canvas.new_figure(PAGE, max(2.62, 0.2 + 0.82 * len(latents)), layout=None)
    table = table.assign(shared=table["latent"].duplicated(keep=False))
    letters = dict(zip(latents, "abcdef"))
    for top, colour, (name, image) in zip((0.2, 1.5), (ORANGE, GREEN), images.items()):
        write(figure, 0.02, top - 0.16, name, weight="bold", color=colour)
        picture(figure, 0.02, top, LARGE, image)
        _bars(canvas.place(figure, 1.22, top, 1.8, 0.72), table[table["image"] == name], colour, letters)
    start, pitch = 3.22, SMALL + GAP
    for column, heading in zip((0, 1, 2.2), (*images, "reference images")):
        write(figure, start + column * pitch, 0.04, heading, color=GREY)
    for index, (latent, row) in enumerate(latents.items()):
        top = 0.36 + index * 0.82
        write(figure, start, top - 0.15, f"{letters[latent]}  {row.title}", weight="bold")
        for column, image in enumerate(row.images):
            picture(figure, start + (column + 0.2 * (column > 1)) * pitch, top, SMALL, image)
    return figure


def _bars(axes: Axes, rows: pd.DataFrame, colour: str, letters: Mapping[int, str]) -> None:
    """Activations of one image of :func:`style_pair`, blue where a latent is in both, chosen ones with letters."""
    rows = rows.reset_index(drop=True)
    name = rows["image"].iloc[0]
    for shared, label, fill in ((False, f"{name} only", colour), (True, "in both", BLUE)):
        some = rows[rows["shared"] == shared]
        bars = axes.bar(some.index, some["activation"], 0.72, color=fill, linewidth=0, label=label)
        axes.bar_label(bars, some["latent"].map(letters).fillna(""), padding=1.5, weight="bold")
    axes.legend(loc="upper right")
    axes.set_xticks(rows.index, rows["latent"], rotation=90, fontsize=6)
    axes.tick_params(axis="x", length=0)
    axes.locator_params(axis="y", nbins=3)
    axes.set(ylabel="activation", xlim=(-0.5, len(rows) - 0.5), ylim=(0, 1.15 * rows["activation"].max()))


def layers_grid(image: np.ndarray, token: tuple[int, int], layers: Mapping[str, Sequence[Row]]) -> Figure:
    """Fig. 9: the strongest latents of one token of one image, layer by layer.

    ``image``: uint8 ``[H, W, 3]``; ``token``: row and column of its patch; ``layers``: name -> latents with heat maps
    and four reference images each, the deepest layer first.
    """
    many = max(len(latents) for latents in filled(layers, "layers").values())
    grid = len(next(iter(layers.values()))[0].heat)
    step, above = SMALL + GAP, LARGE + 0.12
    block, pitch = LARGE + GAP + 2 * step + 0.08, 2 * step + 0.06
    figure = canvas.new_figure(0.2 + many * block - 0.08, above + len(layers) * pitch, layout=None)
    canvas.frame_patch(picture(figure, 0.2, 0.02, LARGE, image), image, token, grid)
    write(figure, 0.28 + LARGE, 0.03, f"token ({token[0]}, {token[1]})", weight="bold")
    for row, (name, latents) in enumerate(layers.items()):
        top = row * pitch + above
        write(figure, 0.14, top + step, name, rotation=90, ha="right", va="center", weight="bold")
        for column, latent in enumerate(latents):
            start = 0.2 + column * block
            write(figure, start, top + LARGE + 0.04, latent.title)
            axes = picture(figure, start, top, LARGE, image)
            canvas.heat_map(axes, latent.heat)
            canvas.frame_patch(axes, image, token, grid)
            for i, reference in enumerate(latent.images):
                picture(figure, start + LARGE + GAP + i % 2 * step, top + i // 2 * step, SMALL, reference)
    return figure
