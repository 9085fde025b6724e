"""Figures made of pictures: reference images, heat maps and masks in rows and grids.

They are placed in inches from the top left: a layout engine would give each picture its own size.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    need,
    new_figure,
    outline,
    paragraph,
    picture,
    place,
    text_width,
    write,
)

#: Inches: a small picture and a large one, two and three dots to each of 64 pixels.
SMALL, LARGE = 128 / 240, 192 / 240


class Row(NamedTuple):
    """Images ``[H, W, 3]`` uint8 after a title."""

    title: str
    images: Sequence[np.ndarray]
    caption: str = ""


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


def image_rows(rows: Sequence[Row]) -> Figure:
    """Reference images (figs. 3 right, 10, 13, 14): a latent a row, its title and caption at the left.

    They shrink where a row would be wider than the page.
    """
    left = _title_column(filled(rows, "rows of images"))
    many = max(len(row.images) for row in rows)
    size = min(SMALL, (PAGE - left) / many - GAP)
    pitch = _pitch(rows, size)
    figure = new_figure(left + many * (size + GAP), len(rows) * pitch, layout=None)
    for index, row in enumerate(rows):
        top = index * pitch + 0.035
        write(figure, 0.02, top, row.title, weight="bold")
        paragraph(figure, 0.02, top + 0.14, row.caption)
        for column, image in enumerate(row.images):
            picture(figure, left + column * (size + GAP), top, size, image)
    return figure


def _title_column(rows: Sequence) -> float:
    """Inches that the titles and captions of rows take."""
    captions = [part for row in rows for part in row.caption.split(", ")]
    return 0.12 + max(text_width([row.title for row in rows], 7, "bold"), text_width(captions, 6))


def _pitch(rows: Sequence, size: float) -> float:
    """Inches from row to row: titles and captions need their height, however small the pictures are."""
    lines = max(row.caption.count(", ") + 1 if row.caption else 0 for row in rows)
    return max(size, 0.18 + CAPTION_LINE * lines) + 0.07


def mask_rows(rows: Sequence[MaskRow], columns: int = 1) -> Figure:
    """Patch heat maps and soft masks (figs. 2, 4, 9): a latent a row, in ``columns`` blocks side by side.

    Each heat map has its own scale, from 0 to its maximum; the outline is the ground truth.
    """
    headings = ("image", "patch activations", "soft mask")
    height = -(-len(filled(rows, "rows of masks")) // columns)
    left = _title_column(rows)
    size = min(LARGE, (PAGE / columns - left) / 3 - GAP)
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
        heat, masked = (picture(figure, at, top, size, row.masked) for at in places[1:])
        heat_map(heat, row.heat)
        if row.truth is not None:
            outline(heat, row.truth)
            outline(masked, row.truth)
    heat_key(figure, left + size + GAP, size, 0.22 + height * pitch + 0.03)
    return figure


def style_pair(table: pd.DataFrame, images: Mapping[str, np.ndarray], latents: Sequence[StyleLatent]) -> Figure:
    """Fig. 4: one noun in two styles; which latents they share, and what three of them look at.

    ``table``: columns image, latent, activation: the strongest latents of each image, strongest first.
    ``images``: two names -> uint8 ``[H, W, 3]``. ``latents``: the chosen ones, with four references each.
    """
    need(table, "style pair", "image", "latent", "activation")
    if len(images) != 2 or not set(images) <= set(table["image"]):
        raise ValueError(f"The pair needs two images named in the table's column image, not {list(images)}.")
    figure = new_figure(PAGE, max(2.62, 0.2 + 0.82 * len(latents)), layout=None)
    shared = table["latent"].isin(table["latent"][table["latent"].duplicated()])
    letters = {chosen.latent: chr(ord("a") + i) for i, chosen in enumerate(latents)}
    for index, ((name, image), colour) in enumerate(zip(images.items(), (ORANGE, GREEN))):
        top = 0.2 + index * 1.3
        write(figure, 0.02, top - 0.16, name, weight="bold", color=colour)
        picture(figure, 0.02, top, LARGE, image)
        rows = table.assign(where=np.where(shared, "in both", f"{name} only"))[table["image"] == name]
        _bars(place(figure, 1.22, top, 1.8, 0.72), rows, {"in both": BLUE, f"{name} only": colour}, letters)
    start, pitch = 3.24, SMALL + GAP
    for column, heading in ((0, list(images)[0]), (1, list(images)[1]), (2.2, "reference images")):
        write(figure, start + column * pitch, 0.04, heading, color=GREY)
    for index, chosen in enumerate(latents):
        top = 0.36 + index * 0.82
        write(figure, start, top - 0.15, f"{letters[chosen.latent]}  {chosen.title}", weight="bold")
        for column, image in enumerate([*chosen.masked, *chosen.references[:4]]):
            picture(figure, start + (column + 0.2 * (column > 1)) * pitch, top, SMALL, image)
    return figure


def _bars(axes: Axes, rows: pd.DataFrame, colours: Mapping[str, str], letters: Mapping[int, str]) -> None:
    """Bars of one image of :func:`style_pair`, coloured by where a latent is found, chosen ones with their letters."""
    names = rows["latent"].astype(str)
    sns.barplot(rows.assign(latent=names), x="latent", y="activation", hue="where", palette=colours, saturation=1,
                width=0.72, order=names, ax=axes)
    axes.legend(loc="upper right")
    axes.tick_params(axis="x", length=0, rotation=90, labelsize=6)
    axes.locator_params(axis="y", nbins=3)
    axes.set(xlabel="", ylim=(0, 1.15 * rows["activation"].max()))
    for x, (latent, value) in enumerate(zip(rows["latent"], rows["activation"])):
        axes.annotate(letters.get(latent, ""), (x, value), (0, 1.5), textcoords="offset points", ha="center",
                      weight="bold")


def layers_grid(image: np.ndarray, token: tuple[int, int], layers: Mapping[str, Sequence[LayerLatent]]) -> Figure:
    """Fig. 9: the strongest latents of one token of one image, layer by layer.

    ``image``: uint8 ``[H, W, 3]``; ``token``: row and column of its patch; ``layers``: name -> latents,
    the deepest layer first.
    """
    many = max(len(latents) for latents in filled(layers, "layers").values())
    grid = len(next(iter(layers.values()))[0].heat)
    step, above = SMALL + GAP, LARGE + 0.12
    block, pitch = LARGE + GAP + 2 * step + 0.08, 2 * step + 0.06
    figure = new_figure(0.2 + many * block - 0.08, above + len(layers) * pitch, layout=None)
    frame_patch(picture(figure, 0.2, 0.02, LARGE, image), image, token, grid)
    write(figure, 0.28 + LARGE, 0.03, f"token ({token[0]}, {token[1]})", weight="bold")
    for row, (name, latents) in enumerate(layers.items()):
        top = row * pitch + above
        write(figure, 0.14, top + step, name, rotation=90, ha="right", va="center", weight="bold")
        for column, latent in enumerate(latents):
            start = 0.2 + column * block
            write(figure, start, top + LARGE + 0.04, latent.title)
            axes = picture(figure, start, top, LARGE, image)
            heat_map(axes, latent.heat)
            frame_patch(axes, image, token, grid)
            for i, reference in enumerate(latent.references[:4]):
                across = start + LARGE + GAP + i % 2 * step
                picture(figure, across, top + i // 2 * step, SMALL, reference)
    return figure
