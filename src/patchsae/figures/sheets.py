"""Figures made of pictures: reference images, heat maps and masks in rows and grids.

They are placed in inches from the top left: a layout engine would give each picture its own size.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from patchsae.figures.canvas import (
    BLUE,
    CAPTION_LINE,
    GAP,
    GREEN,
    GREY,
    ORANGE,
    PAGE,
    filled,
    frame_patch,
    heat_key,
    heat_map,
    mark,
    need,
    new_figure,
    paragraph,
    picture,
    place,
    text_width,
    write,
)


class Row(NamedTuple):
    """Images ``[H, W, 3]`` uint8 after a title.

    ``marks``: per image None, a bool mask ``[H, W]`` to outline, or the colour of a frame.
    """

    title: str
    images: Sequence[np.ndarray]
    caption: str = ""
    marks: Sequence | None = None


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


class StyleLatent(NamedTuple):
    """A latent of :func:`style_pair`: ``masked`` has a soft mask ``[H, W, 3]`` per image, in their order."""

    latent: int
    title: str
    masked: Sequence[np.ndarray]
    references: Sequence[np.ndarray]


class LayerLatent(NamedTuple):
    """A latent of :func:`layers_grid`: its heat map ``[P, P]`` and four reference images ``[H, W, 3]``."""

    title: str
    heat: np.ndarray
    references: Sequence[np.ndarray]


def image_rows(rows: Sequence[Row], size: float = 0.62) -> Figure:
    """Reference images (figs. 3 right, 10, 13, 14): a latent a row, its title and caption at the left.

    ``size``: side of an image in inches; it shrinks where a row would be wider than the page.
    """
    left = _title_column(filled(rows, "rows of images"))
    many = max(len(row.images) for row in rows)
    size = min(size, (PAGE - left) / many - GAP)
    pitch = _pitch(rows, size)
    figure = new_figure(left + many * (size + GAP), len(rows) * pitch, layout=None)
    for index, row in enumerate(rows):
        top = index * pitch + 0.035
        write(figure, 0.02, top, row.title, weight="bold")
        paragraph(figure, 0.02, top + 0.14, row.caption)
        for column, image in enumerate(row.images):
            axes = picture(figure, left + column * (size + GAP), top, size, image)
            mark(axes, image, row.marks[column] if row.marks is not None else None)
    return figure


def _title_column(rows: Sequence) -> float:
    """Inches that the titles and captions of rows take."""
    captions = [part for row in rows for part in row.caption.split(", ")]
    return 0.12 + max(text_width([row.title for row in rows], 7, "bold"), text_width(captions, 6))


def _pitch(rows: Sequence, size: float) -> float:
    """Inches from row to row: titles and captions need their height, however small the pictures are."""
    lines = max(row.caption.count(", ") + 1 if row.caption else 0 for row in rows)
    return max(size, 0.18 + CAPTION_LINE * lines) + 0.07


def mask_rows(rows: Sequence[MaskRow], columns: int = 1, size: float = 0.85) -> Figure:
    """Patch heat maps and soft masks (figs. 2, 4, 9): a latent a row, in ``columns`` blocks side by side.

    Each heat map has its own scale, from 0 to its maximum; the outline is the ground truth.
    """
    headings = ("image", "patch activations", "soft mask")
    height = -(-len(filled(rows, "rows of masks")) // columns)
    left = _title_column(rows)
    size = min(size, (PAGE / columns - left) / 3 - GAP)
    block, pitch = left + 3 * (size + GAP) + 0.1, _pitch(rows, size)
    figure = new_figure(columns * block - 0.1, 0.22 + height * pitch + 0.26, layout=None)
    for index, row in enumerate(rows):
        start, top = index // height * block, 0.22 + index % height * pitch
        write(figure, start + 0.02, top + 0.02, row.title, weight="bold")
        paragraph(figure, start + 0.02, top + 0.16, row.caption)
        places = [start + left + i * (size + GAP) for i in range(3)]
        shown = headings if row.image is not None else ("", *headings[1:])
        for at, heading in zip(places, shown if index % height == 0 else ()):
            write(figure, at + size / 2, 0.19, heading, ha="center", va="bottom", color=GREY)
        if row.image is not None:
            picture(figure, places[0], top, size, row.image)
        heat_map(picture(figure, places[1], top, size, row.masked), row.heat)
        for axes in (figure.axes[-1], picture(figure, places[2], top, size, row.masked)):
            mark(axes, row.masked, row.truth)
    heat_key(figure, left + size + GAP, size, 0.22 + height * pitch + 0.03)
    return figure


def style_pair(table: pd.DataFrame, images: Mapping[str, np.ndarray],
               latents: Sequence[StyleLatent]) -> Figure:
    """Fig. 4: one noun in two styles; which latents they share, and what three of them look at.

    ``table``: columns image, latent, activation: the strongest latents of each image, strongest first.
    ``images``: two names -> uint8 ``[H, W, 3]``. ``latents``: the chosen ones, with four references each.
    """
    need(table, "style pair", "image", "latent", "activation")
    if len(images) != 2 or not set(images) <= set(table["image"]):
        raise ValueError(f"The pair needs two images named in the table's column image, not {list(images)}.")
    figure = new_figure(PAGE, max(2.62, 0.2 + 0.82 * len(latents)), layout=None)
    of = {name: table[table["image"] == name] for name in images}
    shared = set.intersection(*(set(rows["latent"]) for rows in of.values()))
    letters = {chosen.latent: chr(ord("a") + i) for i, chosen in enumerate(latents)}
    for index, ((name, image), colour) in enumerate(zip(images.items(), (ORANGE, GREEN))):
        top = 0.2 + index * 1.3
        write(figure, 0.02, top - 0.16, name, weight="bold", color=colour)
        picture(figure, 0.02, top, 0.92, image)
        _bars(place(figure, 1.42, top, 1.85, 0.72), of[name], shared, colour, letters)
        write(figure, 3.27, top, "in both", color=BLUE, ha="right")
        write(figure, 3.27, top + 0.13, f"{name} only", color=colour, ha="right")
    for column, heading in ((0, list(images)[0]), (1, list(images)[1]), (2.2, "reference images")):
        write(figure, 3.55 + column * 0.52, 0.04, heading, color=GREY)
    for index, chosen in enumerate(latents):
        top = 0.36 + index * 0.82
        write(figure, 3.55, top - 0.15, f"{letters[chosen.latent]}  {chosen.title}", weight="bold")
        for column, image in enumerate([*chosen.masked, *chosen.references[:4]]):
            picture(figure, 3.55 + (column + 0.2 * (column > 1)) * 0.52, top, 0.48, image)
    return figure


def _bars(axes: Axes, rows: pd.DataFrame, shared: set, colour: str, letters: Mapping[int, str]) -> None:
    """Bars of one image of :func:`style_pair`, shared latents in blue, chosen ones with their letters."""
    slots, values = np.arange(len(rows)), rows["activation"].to_numpy()
    colours = [BLUE if latent in shared else colour for latent in rows["latent"]]
    axes.bar(slots, values, 0.72, color=colours)
    axes.set_xticks(slots, rows["latent"], rotation=90, fontsize=6)
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.set_ylabel("activation", labelpad=2)
    axes.set_ylim(0, 1.15 * values.max())
    for x, latent, value in zip(slots, rows["latent"], values):
        if latent in letters:
            axes.annotate(letters[latent], (x, value), (0, 1.5), textcoords="offset points", ha="center",
                          weight="bold")


def layers_grid(image: np.ndarray, token: tuple[int, int],
                layers: Mapping[str, Sequence[LayerLatent]]) -> Figure:
    """Fig. 9: the strongest latents of one token of one image, layer by layer.

    ``image``: uint8 ``[H, W, 3]``; ``token``: row and column of its patch; ``layers``: name -> latents,
    the deepest layer first.
    """
    many = max(len(latents) for latents in filled(layers, "layers").values())
    left = 1.55
    size = min(0.9, (PAGE - left) / many / 2 - 0.09)
    small, pitch = (size - GAP) / 2, size + 0.27
    figure = new_figure(left + many * (2 * size + 0.18) - 0.14, len(layers) * pitch, layout=None)
    grid = len(next(iter(layers.values()))[0].heat)
    write(figure, 0.02, 0.04, f"token ({token[0]}, {token[1]})", weight="bold")
    frame_patch(picture(figure, 0.02, 0.2, 1.0, image), image, token, grid)
    for row, (name, latents) in enumerate(layers.items()):
        top = row * pitch + 0.2
        write(figure, left - 0.12, top + size / 2, name, rotation=90, ha="right", va="center", weight="bold")
        for column, latent in enumerate(latents):
            start = left + column * (2 * size + 0.18)
            write(figure, start, top - 0.15, latent.title)
            axes = picture(figure, start, top, size, image)
            heat_map(axes, latent.heat)
            frame_patch(axes, image, token, grid)
            for i, reference in enumerate(latent.references[:4]):
                across, down = start + size + GAP + i % 2 * (small + GAP), top + i // 2 * (small + GAP)
                picture(figure, across, down, small, reference)
    return figure
