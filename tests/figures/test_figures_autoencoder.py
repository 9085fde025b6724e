"""Curves, sweeps and scatters of latents show the numbers of their tables."""

import drawn
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from patchsae import figures
from patchsae.figures.autoencoder import LEAST_SHOWN
from patchsae.figures.canvas import BLUE, ORANGE

STATS = pd.DataFrame({"latent": range(20), "frequency": [0, *np.linspace(0.01, 1, 19)],
                      "mean_activation": np.linspace(0.001, 0.5, 20),
                      "label_entropy": [np.nan, np.nan, *np.linspace(0, 2, 18)], "label_std": 1.0})
LOG = pd.DataFrame({"step": [0, 10], "mse": [1, 0.1], "l1": [0.2, 0.1], "ghost": [0.1, 0],
                    "total": [1.3, 0.2], "l0": [9, 5], "dead": [0, 0.1], "ev": [-0.5, 0.9]})
SWEEP = pd.DataFrame({"configuration": ["default", "default", "cls", "random"], "seed": [0, 1, 0, 0], "mse": 0.1,
                      "l0": [5, 6, 7, 90], "l1": 0.1, "ev_patch": [0.9, 0.8, np.nan, -3], "ev_cls": [0.7, 0.6, 0.5, 0],
                      "dead": [0, 0.1, 0.2, 0.5], "accuracy_original": 0.9, "accuracy_spliced": [0.8, 0.85, 0.7, 0.01]})


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_training_curves_are_the_log():
    terms, l0, dead, ev = figures.training_curves(LOG).axes
    shown = [curve.tolist() for curve in drawn.curves(terms)]
    assert shown == [[[0, 1.3], [10, 0.2]], [[0, 1], [10, 0.1]], [[0, 0.2], [10, 0.1]], [[0, 0.1]]]
    for panel, column in ((l0, "l0"), (dead, "dead"), (ev, "ev")):
        assert drawn.curves(panel)[0].tolist() == LOG[["step", column]].to_numpy().tolist()


def test_pretraining_has_a_panel_a_stage():
    log = pd.DataFrame({"stage": ["warm-up", "contrasts"], "step": [1, 2], "heads": [3, np.nan],
                        "caption": [np.nan, 4], "phrase": [np.nan, 5], "patch": [np.nan, 6]})
    warm, contrasts = figures.pretraining_curves(log).axes
    assert [c.tolist() for c in drawn.curves(warm)] == [[[1, 3]]]
    assert [c.tolist() for c in drawn.curves(contrasts)] == [[[2, 4]], [[2, 5]], [[2, 6]]]


def test_a_sweep_shows_every_seed_in_its_row():
    ev, l0, dead, accuracy = figures.sweep(SWEEP).axes
    assert sorted(map(tuple, drawn.offsets(l0))) == [(5, 0), (6, 0), (7, 1), (90, 2)]
    assert sorted(map(tuple, drawn.offsets(dead))) == [(0, 0), (0.1, 0), (0.2, 1), (0.5, 2)]
    assert sorted(drawn.offsets(accuracy)[:, 0]) == [0.01, 0.7, 0.8, 0.85, *[0.9] * 4]
    # What is not known is not drawn, and what lies beyond the axis is an arrow at its edge.
    assert sorted(drawn.offsets(ev)[:, 0]) == [LEAST_SHOWN, 0, 0.5, 0.6, 0.7, 0.8, 0.9]
    for panel, columns in ((ev, ["ev_patch", "ev_cls"]), (accuracy, ["accuracy_spliced", "accuracy_original"])):
        for column, colour in zip(columns, (BLUE, ORANGE)):
            shown = [x for dots in panel.collections for (x, _), fill in zip(dots.get_offsets(), dots.get_facecolors())
                     if to_hex(fill) == colour]
            assert sorted(shown) == sorted(SWEEP[column][:3].dropna())
    labels = ev.get_yticklabels()
    assert [label.get_text() for label in labels] == ["default", "cls", "random"]
    assert [label.get_fontweight() for label in labels] == ["bold", "normal", "normal"]


def test_latents_lie_where_their_statistics_are():
    figure = figures.latent_scatter(STATS, {})
    unknown, known = figure.axes[1].collections
    alive = STATS[1:]
    expected = np.log10(alive[["frequency", "mean_activation"]].to_numpy())
    assert np.allclose(unknown.get_offsets(), expected[:1]) and np.allclose(known.get_offsets(), expected[1:])
    assert np.allclose(known.get_array(), alive["label_entropy"][1:]) and known.get_clim() == (0, 2)
    assert "1 of 20 never fire" in drawn.texts(figure)


def test_names_in_a_scatter_cover_no_point():
    rng = np.random.default_rng(0)
    stats = STATS.loc[np.zeros(400, int)].assign(latent=range(400), frequency=10 ** rng.normal(-1, 0.3, 400),
                                                 mean_activation=10 ** rng.normal(-1, 0.3, 400), label_entropy=1)
    figure = figures.latent_scatter(stats, {"between": (-1.1, -0.9, -1.1, -0.9)}, {5: "a", 9: "b"})
    figure.draw_without_rendering()
    panel = figure.axes[1]
    points = panel.transData.transform(drawn.offsets(panel))
    names = [text for text in panel.texts if text.get_text() in ("between", "a", "b")]
    assert len(names) == 3
    for name in names:
        box = super(type(name), name).get_window_extent()
        assert not box.count_contains(points), name.get_text()
    rings = [line.get_xydata()[0] for line in panel.lines]
    assert np.allclose(rings, np.log10(stats.loc[0:0, []].join(stats).iloc[[5, 9]][["frequency", "mean_activation"]]))


def test_panels_share_axes_and_colours():
    figure = figures.scatter_panels({"a": STATS, "b": STATS.assign(label_entropy=2 * STATS["label_entropy"])})
    assert [panel.collections[1].get_clim() for panel in figure.axes[:2]] == [(0, 4)] * 2
    assert [panel.get_title() for panel in figure.axes[:2]] == ["a", "b"]
    figures.latent_scatter(STATS.assign(label_entropy=np.nan), {}).canvas.draw()


def test_a_latent_that_never_fires_cannot_be_marked():
    with pytest.raises(ValueError, match="Latent 0 cannot be marked"):
        figures.latent_scatter(STATS, {}, {0: "a"})


@pytest.mark.parametrize(("draw", "table", "column"), [
    (figures.sweep, SWEEP, "ev_cls"), (figures.training_curves, LOG, "ghost"),
    (figures.latent_scatter, STATS, "label_entropy"),
    (lambda table: figures.scatter_panels({"a": table}), STATS, "frequency"),
])
def test_missing_column_is_named(draw, table, column):
    with pytest.raises(ValueError, match=f"has no column '{column}'"):
        draw(table.drop(columns=column))
