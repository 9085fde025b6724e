"""Pictures of the explorer: what it shows as a figure, and the scatter that is clicked on."""

import functools
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from patchsae.app.explorer import NO_TEXT, Explorer, masked_image, scatter
from patchsae.app.state import State
from patchsae.figures import autoencoder, canvas
from patchsae.figures.canvas import BLUE, GAP, GREY, INK, PAGE, RED, new_figure, picture, place, write

#: Inches of the clickable scatter: width, height, then left, top, width and height of the axes.
SCATTER = (5.0, 3.5, 0.5, 0.06, 3.85, 2.98)
#: How many latents a sheet shows, and how many reference images of each.
SHOWN = 6


def explorer_sheet(explorer: Explorer, state: State) -> Figure:
    """What the explorer shows: the image, its latents with their maps and reference images, the probabilities."""
    view, listed = explorer.view(state.dataset, state.image), explorer.listed(state)[:SHOWN]
    size, left, start = 0.52, 1.86, 2.7
    figure = new_figure(PAGE, 0.3 + SHOWN * (size + 0.07), layout=None)
    write(figure, 0.02, 0.04, f"{state.dataset} {state.image}", weight="bold")
    shown = masked_image(view.image, explorer.heat(state), state.threshold) if state.mask else view.image
    _frame_region(picture(figure, 0.02, 0.22, 1.6, shown), view.image, state.region, explorer.clip.grid)
    _probability_bars(figure, explorer.probabilities(state), bool(state.factors))
    for at, heading in ((start, "map"), (start + size + 0.15, "reference images")):
        write(figure, at, 0.04, heading, color=GREY)
    for row, (latent, value) in enumerate(listed.itertuples(index=False)):
        top = 0.22 + row * (size + 0.07)
        colour = RED if latent == state.latent else INK
        write(figure, left, top + 0.03, f"{latent}  {value:.3g}", weight="bold", color=colour)
        canvas.paragraph(figure, left, top + 0.16, explorer.names[latent].replace(" (", ", ("))
        heat = explorer.heat(replace(state, latent=latent))
        canvas.heat_map(picture(figure, start, top, size, view.image), heat)
        seen = explorer.reference_views(latent)
        for column, (image, heat) in enumerate(zip(seen.images[:SHOWN], seen.heats)):
            image = masked_image(image, heat, state.threshold) if state.mask else image
            picture(figure, start + size + 0.15 + column * (size + GAP), top, size, image)
    return figure


def _frame_region(axes, image: np.ndarray, region, grid: int) -> None:
    """Lines between the patches, and a frame round the chosen ones."""
    top, left, bottom, right = region
    canvas.patch_lines(axes, grid, 0.3)
    if (top, left) == (bottom, right):
        canvas.frame_patch(axes, image, (top, left), grid)
    else:
        side = len(image) / grid
        x, y = [left * side, (right + 1) * side], [top * side, (bottom + 1) * side]
        axes.plot([x[0], x[1], x[1], x[0], x[0]], [y[0], y[0], y[1], y[1], y[0]], color=RED, lw=1.2)


def _probability_bars(figure: Figure, table: pd.DataFrame, edited: bool) -> None:
    """The likeliest classes, before in grey and, where latents were changed, after in blue."""
    if table.empty:
        return canvas.paragraph(figure, 0.02, 1.98, NO_TEXT.replace("; ", ", "))
    best = table.loc[table[["before", "after"]].max(axis=1).sort_values(ascending=False, kind="stable").index[:5]]
    axes = place(figure, 0.74, 2.2, 0.88, 1.3)
    places = np.arange(len(best))
    axes.barh(places - 0.2 * edited, best["before"], 0.36, color="#767676")
    if edited:
        axes.barh(places + 0.2, best["after"], 0.36, color=BLUE)
    axes.set_yticks(places, best["class"])
    axes.set(xlim=(0, 1), xticks=[0, 0.5, 1], ylim=(4.6, -0.6))
    axes.tick_params(axis="y", length=0)
    title = "grey before, blue after" if edited else "zero-shot probability"
    write(figure, 0.02, 1.98, title, color=GREY)


@functools.lru_cache(1)
def scatter_picture(explorer: Explorer) -> tuple[bytes, list[float]]:
    """All latents by frequency and activation, coloured by label entropy: a png file, and where in it the axes lie,
    as shares of its width and height (left, top, width, height)."""
    width, height, *box = SCATTER
    figure, (x0, x1, y0, y1) = new_figure(width, height, layout=None), scatter(explorer.stats)[1]
    axes, table = place(figure, *box), explorer.stats.table()
    points = autoencoder.scatter(axes, table, "label_entropy")
    axes.set(xlim=(x0, x1), ylim=(y0, y1))
    bar = place(figure, box[0] + box[2] + 0.12, box[1], 0.09, box[3])
    figure.colorbar(points, cax=bar, label="label entropy").outline.set_visible(False)
    drawn = canvas.png(figure)
    plt.close(figure)
    return drawn, [box[0] / width, box[1] / height, box[2] / width, box[3] / height]
