"""Figures of adaptation: every one draws what its table says, and refuses what it cannot draw."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import one_sentence

from patchsae.figures import adaptation as fa

TASKS = ("nouns", "textures", "counting", "aerial")
HALVES = ("base", "novel")


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def table(**columns):
    """All combinations of the columns, with an accuracy and an interval each."""
    rows = pd.DataFrame(itertools.product(*columns.values()), columns=list(columns))
    value = np.random.default_rng(0).uniform(0.1, 0.9, len(rows))
    return rows.assign(accuracy=value, low=value - 0.05, high=value + 0.05)


def labels_of(figure):
    return {text.get_text() for legend in figure.legends for text in legend.get_texts()}


def drawn_in(panel, axis):
    """Every number that lines and collections of a panel have along an axis."""
    parts = [line.get_xydata()[:, axis] for line in panel.lines]
    parts += [np.asarray(c.get_offsets())[:, axis] for c in panel.collections if len(c.get_offsets())]
    return np.concatenate([np.asarray(part, float) for part in parts])


def all_in(expected, drawn):
    """Whether every number is drawn."""
    return all(np.isclose(drawn, number).any() for number in expected)


def values_of(panel):
    """The numbers of a heat map."""
    return (panel.images or panel.collections)[0].get_array()


def test_method_dots_show_every_method_once_a_task():
    rows = table(task=TASKS, half=HALVES, method=list(fa.METHOD_LOOKS))
    figure = fa.method_dots(rows)
    assert labels_of(figure) == {look[0] for look in fa.METHOD_LOOKS.values()}
    panel = figure.axes[0]
    assert all_in(rows[rows["half"] == "base"]["accuracy"], drawn_in(panel, 0))
    assert not all_in(rows["accuracy"] + 2, drawn_in(panel, 0))
    assert [t.get_text() for t in panel.get_yticklabels()] == list(TASKS)


def test_read_dots_show_what_is_read():
    rows = table(task=TASKS, half=HALVES, what=list(fa.READ_LOOKS))
    assert labels_of(fa.read_dots(rows)) == {look[0] for look in fa.READ_LOOKS.values()}


def test_gain_bars_are_as_long_as_the_parts():
    rows = table(task=TASKS, half=HALVES, part=["image", "text", "interaction", "gain"])
    figure = fa.gain_bars(rows.rename(columns={"accuracy": "points"}))
    widths = np.array([bar.get_width() for bar in figure.axes[0].patches])
    assert all_in(rows[(rows["half"] == "base") & (rows["part"] != "gain")]["accuracy"], widths)


def test_of_many_points_equal_ones_are_drawn_once(monkeypatch):
    counts = torch.tensor([[0, 0, 3, 3, 7], [0, 0, 3, 3, 1]])
    for most, drawn in ((10, 10), (9, 4)):
        monkeypatch.setattr(fa, "MOST_POINTS", most)
        figure = fa.activation_scatter({"task": (counts, counts)}, {"task": ""})
        points = figure.axes[0].lines[1].get_xydata()
        assert len(points) == drawn
        assert {tuple(p) for p in points.tolist()} == {(1, 1), (4, 4), (8, 8), (2, 2)}


def test_confusions_name_classes_where_names_fit():
    for n, name in ((3, "class 2"), (fa.MOST_NAMED + 1, "")):
        names = [f"class {i}" for i in range(n)]
        panel = fa.confusions(np.eye(n), np.eye(n), names, ["a", "b"]).axes[0]
        labels = [label.get_text() for label in panel.get_yticklabels()]
        assert name in labels if name else not any(labels)


def test_masking_panels_have_a_line_per_pair_of_sides():
    rows = table(task=TASKS, selects=("clip", "adapted"), classifies=("clip", "adapted"), mode=("on", "off"),
                 k=(1, 10, 100))
    figure = fa.masking_panels(rows, "on")
    assert sum(bool(axes.lines) for axes in figure.axes) == len(TASKS) and len(labels_of(figure)) == 4
    for task, panel in zip(TASKS, figure.axes):
        assert all_in(rows[(rows["task"] == task) & (rows["mode"] == "on")]["accuracy"], drawn_in(panel, 1))


def test_activation_scatter_colours_the_members():
    rng = np.random.default_rng(1)
    panels = {task: tuple(torch.from_numpy(rng.poisson(20, (3, 50))) for _ in range(2)) for task in TASKS}
    members = {task: {name: torch.from_numpy(rng.random((3, 50)) < 0.1) for name in fa.GROUP_LOOKS} for task in TASKS}
    figure = fa.activation_scatter(panels, dict.fromkeys(TASKS, "a note"), members)
    assert labels_of(figure) == set(fa.GROUP_LOOKS)
    counts = [len(line.get_xdata()) for line in figure.axes[0].lines]
    assert counts[1:] == [150, *(int(members["nouns"][name].sum()) for name in fa.GROUP_LOOKS)]
    assert not fa.activation_scatter(panels, dict.fromkeys(TASKS, "")).legends


def test_group_curves_confusions_concept_maps_and_sides_draw():
    sizes = table(upper=(5, 10, 20), lower=(50, 100), group=list(fa.GROUP_LOOKS)).rename(columns={"accuracy": "mean"})
    assert len(fa.group_curves(sizes).axes) == 3
    names = ("cat", "dog", "pig")
    figure = fa.confusions(np.eye(3) * 4, np.ones((3, 3)), names, ["CLIP", "MaPLe"])
    assert np.allclose(values_of(figure.axes[1]), 1 / 3)
    frame = pd.DataFrame(np.diag([1.0, 2.0, 3.0]), index=names, columns=names)
    maps = fa.concept_maps(frame, 2 * frame, ["CLIP", "MaPLe"])
    assert np.allclose(values_of(maps.axes[2]), frame)
    sides = table(autoencoder=("clip", "adapted"), classifies=("clip", "adapted"), mode=("on", "off"), k=(1, 10, 100))
    assert len(labels_of(fa.sides_curves(sides))) == 4


@pytest.mark.parametrize("draw", [fa.method_dots, fa.read_dots, fa.gain_bars, fa.group_curves, fa.sides_curves])
def test_a_table_without_its_columns_is_one_sentence(draw):
    with pytest.raises(ValueError, match="has no column") as error:
        draw(pd.DataFrame({"something": [1]}))
    assert one_sentence(error.value)
