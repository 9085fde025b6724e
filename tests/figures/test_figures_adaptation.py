"""Figures of masking and adaptation: every one draws what its table says, and refuses what it cannot draw."""

import itertools

import drawn
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import one_sentence

from patchsae.figures import ablation, adaptation

TASKS = ("nouns", "textures", "counting", "aerial")
HALVES = ("base", "novel")
SIDES = ("clip", "adapted")
KS = (1, 10, 100)


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def table(**columns):
    """All combinations of the columns, with an accuracy and an interval each."""
    rows = pd.DataFrame(itertools.product(*columns.values()), columns=list(columns))
    value = np.random.default_rng(0).uniform(0.1, 0.9, len(rows))
    return rows.assign(accuracy=value, low=value - 0.05, high=value + 0.2)


def assert_lines(panel, rows, column, values, ks=KS):
    """A line and its band for each value of a column, at the places of k in order."""
    curves, bands = drawn.curves(panel), drawn.bands(panel)
    for value, curve, band in zip(values, curves, bands):
        mine = rows[rows[column] == value].set_index("k").loc[list(ks)]
        assert np.allclose(curve, np.stack([np.arange(len(ks)), mine["accuracy"]], 1))
        assert np.allclose([band[i] for i in range(len(ks))], mine[["low", "high"]])
    assert len(curves) == len(bands) == len(values)


def test_masking_curves_have_a_line_a_selection_with_its_interval():
    selections = ("random", "class", "matched")
    rows = table(selection=selections, mode=("on", "off"), k=KS[::-1])
    levels = pd.DataFrame({"selection": "class", "mode": ["original", "spliced"], "k": [0, 100],
                           "accuracy": [0.95, 0.92], "low": 0.9, "high": 0.97})
    figure = ablation.masking_curves(pd.concat([rows, levels]), chance=0.1)
    for panel, mode in zip(figure.axes, ("on", "off")):
        assert_lines(panel, rows[rows["mode"] == mode], "selection", ("class", "matched", "random"))
        assert [t.get_text() for t in panel.get_xticklabels()] == ["1", "10", "all"]
        rules = {line.get_label(): line.get_ydata()[0] for line in drawn.rules(panel)}
        assert rules == {"original": 0.95, "spliced": 0.92, "chance": 0.1}
    assert drawn.legend(figure) == ["class-level", "random, matched", "random", "original", "spliced", "chance"]


def test_differences_have_a_line_a_control():
    rows = table(selection=("matched", "dataset"), mode=("on", "off"), k=KS)
    tables = rows.rename(columns={"accuracy": "difference"}).groupby("selection")
    figure = ablation.masking_differences({name: own.drop(columns="selection") for name, own in tables})
    for panel, mode in zip(figure.axes, ("on", "off")):
        assert_lines(panel, rows[rows["mode"] == mode], "selection", ("dataset", "matched"))


def test_two_rows_for_one_point_are_refused():
    rows = table(selection=("class",), mode=("on", "off", "original", "spliced"), k=KS)
    with pytest.raises(ValueError, match="several rows for one point") as error:
        ablation.masking_curves(pd.concat([rows, rows]), 0.1)
    assert one_sentence(error.value)


def test_prediction_maps_show_probabilities_and_winners():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (2, 4, 9)).astype(np.float32)
    rows = pd.DataFrame([(f"image {i}", 3 + i, "original" if j == 0 else "on", k, logits[i, j])
                         for i in range(2) for j, k in enumerate((0, *KS))], columns="id label mode k logits".split())
    pictures = {f"image {i}": rng.integers(0, 255, (8, 8, 3), dtype=np.uint8) for i in range(2)}
    figure = ablation.prediction_maps(rows, pictures, [f"class {c}" for c in range(9)])
    for i, (image, heat) in enumerate(np.reshape(figure.axes[:4], (2, 2))):
        share = torch.softmax(torch.from_numpy(logits[i]), 1).numpy()
        classes = [int(label.get_text().split()[1]) for label in heat.get_yticklabels()]
        assert classes[0] == 3 + i and len(classes) == len(set(classes)) == 6
        assert np.allclose(heat.collections[0].get_array(), share.T[classes], atol=1e-6)
        dots = [line.get_xydata()[0] for line in heat.lines if line.get_marker() == "o"]
        winners = {column: classes[int(row)] for column, row in (np.floor(dot) for dot in dots)}
        assert winners == dict(enumerate(share.argmax(1)))
        assert np.array_equal(image.images[0].get_array(), pictures[f"image {i}"])
        assert [label.get_text() for label in heat.get_xticklabels()] == ["original", "1", "10", "all"]


@pytest.mark.parametrize(("column", "looks", "least"), [
    ("method", adaptation.METHODS, 0), ("what", adaptation.READINGS, 0), ("part", adaptation.PARTS, -1)])
def test_dots_lie_in_the_rows_of_their_tasks_and_intervals_end_where_shares_do(column, looks, least):
    rows = table(task=TASKS, half=HALVES, **{column: list(looks)})
    rows["low"] -= 0.4
    figure = adaptation.half_dots(rows, column)
    assert drawn.legend(figure) == [look.label for look in looks.values()]
    for panel, half in zip(figure.axes, HALVES):
        mine = rows[rows["half"] == half]
        places, intervals = drawn.dots(panel)
        order = mine.assign(rank=mine[column].map(list(looks).index)).sort_values("rank", kind="stable")
        assert np.allclose(places[:, 0], order["accuracy"])
        assert [round(y) for y in places[:, 1]] == [TASKS.index(task) for task in order["task"]]
        assert np.allclose(intervals, np.stack([order["low"].clip(least), order["high"].clip(upper=1)], 1))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(TASKS)


def test_tasks_of_known_truth_are_named_with_it_and_sorted_by_it():
    rows = table(task=TASKS, images=("all", "shots"), method=list(adaptation.METHODS))
    rows["truth"] = rows["task"].map(dict(zip(TASKS, ("new", "remap", "mixed", "remap"))))
    figure = adaptation.truth_dots(rows, "method")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "textures: known concepts", "aerial: known concepts", "counting: both", "nouns: something new"]
    for panel, images in zip(figure.axes, ("shots", "all")):
        places, _ = drawn.dots(panel)
        mine = rows[rows["images"] == images].set_index(["method", "task"])["accuracy"]
        order = itertools.product(adaptation.METHODS, ("textures", "aerial", "counting", "nouns"))
        assert np.allclose(places[:, 0], mine.loc[list(order)])


def test_areas_have_a_row_a_measure_and_a_rule_at_chance():
    rows = table(measure=("R", "ranks"), method=("lora", "fine-tuning")).rename(columns={"accuracy": "area"})
    figure = adaptation.area_dots(rows)
    places, intervals = drawn.dots(figure.axes[0])
    order = rows.assign(rank=rows["method"].map(["lora", "fine-tuning"].index)).sort_values("rank", kind="stable")
    assert np.allclose(places[:, 0], order["area"]) and np.allclose(intervals, order[["low", "high"]])
    assert [0.5, 0.5] in [list(line.get_xdata()) for line in figure.axes[0].lines]
    assert drawn.legend(figure) == ["LoRA", "fine-tuning"]


@pytest.mark.parametrize(("by", "first", "words"), [
    ("task", "selects", "latents of MaPLe, classified by CLIP"),
    ("mode", "autoencoder", "autoencoder of MaPLe, classified by CLIP")])
def test_side_curves_have_a_line_per_pair_of_sides(by, first, words):
    values = {"task": TASKS, "mode": ("on", "off")}[by]
    rows = table(**{"mode": ["on"]} | {by: values, first: SIDES, "classifies": SIDES, "k": KS})
    figure = ablation.side_curves(rows, by, first)
    pairs = [f"{one}, {two}" for two in SIDES for one in SIDES]
    assert len(figure.axes) == len(values)
    for panel, value in zip(figure.axes, values):
        mine = rows[rows[by] == value]
        assert_lines(panel, mine.assign(pair=mine[first] + ", " + mine["classifies"]), "pair", pairs)
        assert panel.get_title() == ablation.MODES.get(value, value)
    assert drawn.legend(figure)[1] == words


def test_side_curves_have_a_third_arm_where_there_is_one():
    rows = table(mode=["on"], task=TASKS, selects=SIDES, classifies=(*SIDES, "mean prompts"), k=KS)
    figure = ablation.side_curves(rows, "task", "selects")
    assert len(drawn.legend(figure)) == 6 and drawn.legend(figure)[-1].endswith("MaPLe, prompts of no image")


def test_of_many_points_equal_ones_are_drawn_once(monkeypatch):
    counts = torch.tensor([[0, 0, 3, 3, 7], [0, 0, 3, 3, 1]])
    for most, many in ((10, 10), (9, 4)):
        monkeypatch.setattr(adaptation, "MOST_POINTS", most)
        points = drawn.curves(adaptation.activation_scatter({"task": (counts, counts)}, {"task": ""}).axes[0])[0]
        assert len(points) == many
        assert {tuple(p) for p in points.tolist()} == {(1, 1), (4, 4), (8, 8), (2, 2)}


def test_activation_scatter_colours_the_members():
    rng = np.random.default_rng(1)
    pairs = {task: tuple(torch.from_numpy(rng.poisson(20, (3, 50))) for _ in range(2)) for task in TASKS}
    members = {task: {name: torch.from_numpy(rng.random((3, 50)) < 0.1) for name in adaptation.GROUP_LOOKS}
               for task in TASKS}
    figure = adaptation.activation_scatter(pairs, dict.fromkeys(TASKS, "a note"), members)
    assert drawn.legend(figure) == list(adaptation.GROUP_LOOKS)
    for panel, task in zip(figure.axes, TASKS):
        all_points, *groups = drawn.curves(panel)
        counts = 1 + torch.stack(pairs[task], -1).flatten(0, 1).numpy()
        assert np.array_equal(all_points, counts)
        assert all(np.array_equal(points, counts[mask.flatten().numpy()])
                   for points, mask in zip(groups, members[task].values()))
    assert not adaptation.activation_scatter(pairs, dict.fromkeys(TASKS, "")).legends


def test_group_curves_draw_high_once():
    sizes = table(upper=(5, 10, 80), lower=(50, 100), group=list(adaptation.GROUP_LOOKS))
    sizes = sizes[sizes["upper"] <= sizes["lower"]].rename(columns={"accuracy": "mean"})
    figure = adaptation.group_curves(sizes)
    assert [[len(curve) for curve in drawn.curves(panel)] for panel in figure.axes] == [[3], [2, 3], [2, 3]]
    for panel, group in zip(figure.axes[1:], ("high to low", "low to high")):
        for curve, lower in zip(drawn.curves(panel), (50, 100)):
            mine = sizes[(sizes["lower"] == lower) & (sizes["group"] == group)]
            assert np.allclose(curve, mine[["upper", "mean"]])
    high = sizes[sizes["group"] == "high"].drop_duplicates("upper")
    assert np.allclose(drawn.curves(figure.axes[0])[0], high[["upper", "mean"]])


def test_confusions_are_shares_and_name_classes_where_names_fit():
    counts = np.array([[3, 1, 0], [0, 0, 0], [2, 2, 4]])
    first, second, _ = adaptation.confusions(counts, 4 * np.eye(3), ["cat", "dog", "pig"], ["CLIP", "MaPLe"]).axes
    assert np.allclose(first.collections[0].get_array(), [[0.75, 0.25, 0], [0, 0, 0], [0.25, 0.25, 0.5]])
    assert np.allclose(second.collections[0].get_array(), np.eye(3))
    assert [t.get_text() for t in first.texts][:3] == ["75%", "25%", "0%"]
    for n, name in ((3, ["class 0", "class 1", "class 2"]), (adaptation.MOST_NAMED + 1, [])):
        panel = adaptation.confusions(np.eye(n), np.eye(n), [f"class {i}" for i in range(n)], ["a", "b"]).axes[0]
        assert [label.get_text() for label in panel.get_yticklabels()][:3] == name


def test_concept_maps_show_before_after_and_difference():
    names = ("cat", "dog", "pig")
    frame = pd.DataFrame(np.diag([1.0, 2.0, 3.0]), index=names, columns=names)
    maps = [axes.collections[0] for axes in adaptation.concept_maps(frame, 2 * frame, ["CLIP", "MaPLe"]).axes[:3]]
    assert [np.diag(shown.get_array()).tolist() for shown in maps] == [[1, 2, 3], [2, 4, 6], [1, 2, 3]]
    assert {shown.get_clim() for shown in maps} == {(-6, 6)}


@pytest.mark.parametrize("draw", [
    adaptation.half_dots, adaptation.truth_dots, adaptation.area_dots, adaptation.group_curves, ablation.side_curves,
    ablation.masking_curves, ablation.prediction_maps])
def test_a_table_without_its_columns_is_one_sentence(draw):
    with pytest.raises(ValueError, match=f"table for {draw.__name__} has no column") as error:
        draw(pd.DataFrame({"something": [1]}))
    assert one_sentence(error.value)
    assert str(error.value).split("it needs ")[1].rstrip(".") in draw.__doc__
    with pytest.raises(ValueError, match="no controls to draw"):
        ablation.masking_differences({})


def test_every_selection_has_a_look_of_its_own():
    assert len({(look.colour, look.marker) for look in ablation.LOOKS.values()}) == len(ablation.LOOKS)
