"""Figures made of pictures show the pictures, maps and numbers they are given."""

import drawn
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from patchsae.figures import sheets
from patchsae.figures.canvas import BLUE, ORANGE

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 255, (9, 16, 16, 3), dtype=np.uint8)
HEAT = RNG.random((4, 4))
TRUTH = np.arange(256).reshape(16, 16) % 16 > 7
MASK = sheets.MaskRow("latent 3", IMAGES[0], HEAT, IMAGES[1], TRUTH, "IoU 0.7")
PAIR = pd.DataFrame({"image": ["photo", "photo", "sketch"], "latent": [3, 4, 3], "activation": [0.5, 0.2, 0.4]})


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def shown(figure):
    """Arrays of all pictures and maps."""
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.images]


def inside(figure):
    return all(0 <= edge <= 1.001 for axes in figure.axes for edge in axes.get_position().extents)


def same(arrays, expected):
    return len(arrays) == len(expected) and all(np.array_equal(*pair) for pair in zip(arrays, expected))


def test_image_rows_show_their_images_in_order():
    figure = sheets.image_rows([sheets.Row("latent 3", IMAGES[:3], "frequency 0.12, entropy 0.3"),
                                 sheets.Row("latent 5", IMAGES[3:5])])
    assert same(shown(figure), IMAGES[:5]) and inside(figure)
    assert drawn.texts(figure) == ["latent 3", "frequency 0.12", "entropy 0.3", "latent 5"]
    tops = [axes.get_position().y1 for axes in figure.axes]
    assert tops[0] == tops[2] > tops[3] == tops[4]


def test_rows_wider_than_a_page_shrink():
    assert sheets.image_rows([sheets.Row("a", np.repeat(IMAGES, 3, 0))]).get_figwidth() <= 6.76


def test_mask_rows_show_image_heat_and_mask_with_the_truth_on_both():
    figure = sheets.mask_rows([MASK, MASK._replace(image=None, truth=None)], columns=2)
    assert same(shown(figure), [IMAGES[0], HEAT, IMAGES[1], HEAT, IMAGES[1]]) and inside(figure)
    heats = [axes.images[0] for axes in figure.axes if axes.images and axes.images[0].get_array().ndim == 2][:2]
    assert all(heat.get_clim() == (0, HEAT.max()) for heat in heats)
    outlined = [bool(axes.findobj(lambda a: "ContourSet" in type(a).__name__)) for axes in figure.axes]
    assert outlined[:5] == [False, True, True, False, False]
    assert drawn.texts(figure).count("image") == 1


def test_heat_and_truth_without_differences_are_drawn():
    sheets.mask_rows([MASK._replace(heat=np.zeros((4, 4)), truth=np.zeros((16, 16), bool))], 1).canvas.draw()


def test_style_pair_shows_activations_and_tells_shared_latents():
    chosen = {3: sheets.Row("latent 3, shared", IMAGES[:6])}
    figure = sheets.style_pair(PAIR, {"photo": IMAGES[6], "sketch": IMAGES[7]}, chosen)
    panels = [axes for axes in figure.axes if axes.patches]
    heights = [[bar.get_height() for bar in axes.patches if bar.get_width()] for axes in panels]
    assert sorted(h for h in heights[0] if h) == [0.2, 0.5] and [h for h in heights[1] if h] == [0.4]
    colours = {bar.get_height(): plt.matplotlib.colors.to_hex(bar.get_facecolor()) for bar in panels[0].patches}
    assert colours[0.5] == BLUE and colours[0.2] == ORANGE
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["3", "4"]
    assert drawn.texts(figure).count("a") == 2  # the chosen latent's letter, over its bar in both images
    pictures = [array for array in shown(figure) if array.shape == (16, 16, 3)]
    assert len(pictures) == 8 and inside(figure)


def test_layers_grid_has_a_map_and_references_for_every_latent():
    layers = {"block 4": [sheets.Row("latent 7", IMAGES[:4], heat=HEAT)],
              "block 2": [sheets.Row("latent 8", IMAGES[4:8], heat=1 - HEAT)]}
    figure = sheets.layers_grid(IMAGES[8], (1, 2), layers)
    assert same(shown(figure), [IMAGES[8], HEAT, *IMAGES[:4], 1 - HEAT, *IMAGES[4:8]]) and inside(figure)
    frames = [axes.patches[0].get_bbox() for axes in figure.axes if axes.patches]
    assert [(box.x0, box.y0, box.width) for box in frames] == [(8, 4, 4)] * 3
    assert {"token (1, 2)", "block 4", "block 2", "latent 7", "latent 8"} <= set(drawn.texts(figure))


def test_a_pair_needs_two_images_and_its_columns():
    with pytest.raises(ValueError, match="needs two images"):
        sheets.style_pair(PAIR, {"photo": IMAGES[0]}, {})
    with pytest.raises(ValueError, match="has no column 'activation'"):
        sheets.style_pair(PAIR.drop(columns="activation"), {}, {})
