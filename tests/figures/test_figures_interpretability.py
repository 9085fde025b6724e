"""Figures of measured interpretability show the numbers of their tables."""

import drawn
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from patchsae.figures import interpretability
from patchsae.figures.canvas import BLUE, GREY

RNG = np.random.default_rng(0)
KINDS = ("together", "noun", "colour", "texture", "background")
METHODS = ("autoencoder", "k-means", "neurons", "linear probe")
WORDS = [("noun", f"noun {i}") for i in range(50)] + [("colour", "red"), ("background", "sky")]
CONCEPTS = pd.DataFrame([(*word, m, RNG.random()) for m in METHODS[:3] for word in WORDS],
                        columns=["kind", "concept", "method", "auprc"])
MOVED = pd.DataFrame({"task": ["sketches"] * 3 + ["colours"] * 2, "kind": ["noun", "noun", "text", "colour", "noun"],
                      "home": 0.8, "there": [0.9, 0.2, 0.7, 0.6, 0.1]})


def recovery():
    rows = pd.DataFrame([(m, kind) for m in METHODS for kind in KINDS], columns=["method", "kind"])
    share = RNG.uniform(0.2, 0.8, len(rows))
    return rows.assign(share=share, low=share - 0.1, high=share + 0.05)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_shares_recovered_lie_in_rows_with_their_intervals():
    # A bootstrap's interval need not hold the estimate; it is drawn as it is.
    table = recovery()
    table.loc[table["method"] == "neurons", ["low", "high"]] = 0.9, 0.95
    figure = interpretability.recovery_dots(table)
    for panel, kind in zip(figure.axes, KINDS):
        mine = table[table["kind"] == kind]
        places, intervals = drawn.dots(panel)
        assert np.allclose(places, np.stack([mine["share"], range(len(METHODS))], 1)) and panel.get_title() == kind
        assert np.allclose(intervals, mine[["low", "high"]])
    labels = figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels if label.get_fontweight() == "bold"] == ["autoencoder"]


def test_concepts_are_sorted_within_their_kind_and_keep_their_numbers():
    figure = interpretability.concept_dots(CONCEPTS, 0.6)
    own = CONCEPTS[CONCEPTS["method"] == "autoencoder"].set_index("concept")["auprc"]
    order = [*own[:50].sort_values(ascending=False).index, "red", "sky"]
    assert [label.get_text() for panel in figure.axes for label in panel.get_xticklabels()] == order
    by_place = CONCEPTS.assign(place=CONCEPTS["concept"].map(order.index))
    shown = np.concatenate([drawn.offsets(panel) + (48 * strip, 0) for strip, panel in enumerate(figure.axes)])
    expected = by_place[["place", "auprc"]].to_numpy()
    assert np.allclose(shown[np.lexsort(shown.T[::-1])], expected[np.lexsort(expected.T[::-1])])
    assert drawn.legend(figure) == ["noun", "colour", "background", "k-means", "neurons"]


def test_width_curves_have_a_line_a_method():
    table = pd.DataFrame({"method": ["autoencoder"] * 3 + ["k-means"] * 3, "candidates": [112.0, 448, 224] * 2,
                          "share": np.linspace(0.2, 0.7, 6)}).assign(low=lambda t: t["share"] - 0.1,
                                                                     high=lambda t: t["share"] + 0.1)
    panel = interpretability.width_curves(table, 0.98).axes[0]
    for curve, band, (_, rows) in zip(drawn.curves(panel), drawn.bands(panel), table.groupby("method", sort=False)):
        rows = rows.sort_values("candidates")
        assert np.allclose(curve, rows[["candidates", "share"]])
        assert np.allclose(list(band.values()), rows[["low", "high"]])
    assert panel.lines[-1].get_ydata()[0] == 0.98


def test_the_scatter_says_how_many_latents_a_region_has():
    table = pd.DataFrame({"latent": range(60), "frequency": RNG.uniform(0.01, 1, 60), "mean_activation": 0.1,
                          "precision": RNG.random(60)})
    means = pd.DataFrame({"region": ["a", "b"], "latents": [7, 1], "precision": [0.3, 0.9], "low": [0.2, 0.9],
                          "high": [0.4, 0.9]})
    terms = pd.DataFrame({"term": ["x", "y", "all"], "coefficient": [0.5, -0.2, np.nan], "low": [0.4, -0.3, np.nan],
                          "high": [0.6, -0.1, np.nan], "alone": [0.1, 0.2, 0.28]})
    boxes = {"a": (-1, -0.5, -2, 0), "b": (-0.2, 0, -2, 0)}
    left, middle, right, *_ = interpretability.interpretability_scatter(table, "precision", boxes, means, terms).axes
    assert np.allclose(left.collections[1].get_array(), table["precision"])
    assert [(box.get_x(), box.get_width()) for box in left.patches] == [(-1, 0.5), (-0.2, 0.2)]
    assert [label.get_text() for label in middle.get_yticklabels()] == ["a\n(n = 7)", "b\n(n = 1)"]
    for panel, rows, value in ((middle, means, "precision"), (right, terms[:2], "coefficient")):
        places, intervals = drawn.dots(panel)
        assert np.allclose(places[:, 0], rows[value]) and np.allclose(intervals, rows[["low", "high"]])
    assert "0.28" in right.get_xlabel()


def test_histograms_are_shares_and_mark_medians():
    values = {"monosemanticity": {"trained": RNG.random(30), "untrained": np.append(RNG.random(9), np.nan)},
              "coherence": {"trained": RNG.random(30), "untrained": RNG.random(30)}}
    figure = interpretability.latent_histograms(values)
    for panel, methods in zip(figure.axes, values.values()):
        medians = [line.get_xdata()[0] for line in panel.lines if line.get_label().startswith("median")]
        assert medians == pytest.approx([np.nanmedian(v) for v in methods.values()])
        # The last one is drawn first.
        for steps, numbers in zip(drawn.curves(panel), reversed(methods.values())):
            known = numbers[~np.isnan(numbers)]
            edges = steps[:, 0] + np.linspace(-1e-9, 1e-9, 31)
            assert np.allclose(steps[:-1, 1], np.histogram(known, edges)[0] / len(known))
        colours = [to_hex(line.get_color()) for line in panel.lines]
        assert colours[:2] == colours[:1:-1] == [GREY, BLUE]
    assert set(drawn.legend(figure)) == {"trained", "untrained", "median, trained", "median, untrained"}


def test_transfer_says_what_share_is_kept():
    figure = interpretability.transfer_dots(MOVED, 0.6)
    assert [panel.get_title() for panel in figure.axes] == ["sketches: 67% kept", "colours: 50% kept"]
    assert drawn.offsets(figure.axes[0]).tolist() == [[0.8, 0.9], [0.8, 0.2], [0.8, 0.7]]
    assert set(drawn.legend(figure)) == {"noun", "text", "colour"}


def test_name_curves_have_an_interval_where_there_is_one():
    table = pd.DataFrame({"confidence": [0, 0.5], "named": [1, 0.6], "right": [0.7, 0.9], "low": 0.6, "high": 1.0})
    panel = interpretability.name_curves(table).axes[0]
    right, named = drawn.curves(panel)
    assert right.tolist() == [[0, 0.7], [0.5, 0.9]] and named.tolist() == [[0, 1], [0.5, 0.6]]
    assert drawn.bands(panel)[0] == {0: (0.6, 1), 0.5: (0.6, 1)}


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="no column 'high'"):
        interpretability.recovery_dots(recovery().drop(columns="high"))
