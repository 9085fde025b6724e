"""Figures of measured interpretability, drawn from small made-up tables."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from patchsae.figures import interpretability as drawn
from patchsae.studies.interpretability import region_means, regression

RNG = np.random.default_rng(0)
KINDS = ("together", "noun", "colour", "texture", "background")
METHODS = ("autoencoder", "k-means", "neurons", "linear probe")
RECOVERY = pd.DataFrame([(m, kind, 0.5, 0.4, 0.6) for m in METHODS for kind in KINDS],
                        columns=["method", "kind", "share", "low", "high"])
WORDS = [("noun", f"noun {i}") for i in range(50)] + [("colour", "red"), ("background", "sky")]
CONCEPTS = pd.DataFrame([(*word, m, RNG.random()) for m in METHODS[:3] for word in WORDS],
                        columns=["kind", "concept", "method", "auprc"])
WIDTH = pd.DataFrame({"method": ["autoencoder"] * 3 + ["k-means"] * 3, "candidates": [112.0, 224, 448] * 2,
                      "share": 0.7, "low": 0.6, "high": 0.8})
LATENTS = pd.DataFrame({"frequency": RNG.uniform(0.01, 1, 60), "mean_activation": RNG.uniform(0.01, 1, 60),
                        "label_entropy": RNG.random(60), "label_std": RNG.random(60), "precision": RNG.random(60)})
BOXES = {"rare, weak": (-2, -1, -2, -1), "frequent, strong": (-0.5, 0, -0.5, 0)}
MEASURES = {"monosemanticity": {"trained": RNG.random(30), "untrained": np.append(RNG.random(9), np.nan)},
            "spatial coherence": {"trained": RNG.random(30), "untrained": RNG.random(30)}}
MOVED = pd.DataFrame({"task": ["sketches"] * 3 + ["colours"] * 2, "kind": ["noun", "noun", "text", "colour", "noun"],
                      "home": 0.8, "there": [0.9, 0.2, 0.7, 0.6, 0.1]})
NAMES = pd.DataFrame({"confidence": [0, 0.5], "named": [1, 0.6], "right": [0.7, 0.9], "low": 0.6, "high": 1.0})

PLOTS = {
    "recovery_dots": lambda: drawn.recovery_dots(RECOVERY),
    "concept_dots": lambda: drawn.concept_dots(CONCEPTS, 0.6),
    "width_curves": lambda: drawn.width_curves(WIDTH, 0.98),
    "interpretability_scatter": lambda: drawn.interpretability_scatter(
        LATENTS.assign(latent=range(len(LATENTS))), "precision", BOXES, region_means(LATENTS, "precision", BOXES, n=20),
        regression(LATENTS, "precision", n=20)),
    "latent_histograms": lambda: drawn.latent_histograms(MEASURES),
    "transfer_dots": lambda: drawn.transfer_dots(MOVED, 0.6),
    "name_curves": lambda: drawn.name_curves(NAMES),
}


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.mark.parametrize("name", PLOTS)
def test_every_figure_is_drawn_and_labelled(name, tmp_path):
    figure = PLOTS[name]()
    figure.savefig(tmp_path / "figure.png")
    assert isinstance(figure, Figure) and [t for t in figure.findobj(Text) if t.get_text()]
    assert any(axes.get_xlabel() or axes.get_ylabel() or axes.get_title() for axes in figure.axes)


def test_concepts_are_sorted_within_their_kind():
    figure = drawn.concept_dots(CONCEPTS, 0.6)
    shown = [label.get_text() for axes in figure.axes for label in axes.get_xticklabels()]
    own = CONCEPTS[(CONCEPTS["method"] == "autoencoder") & (CONCEPTS["kind"] == "noun")].set_index("concept")["auprc"]
    assert len(shown) == len(WORDS)
    nouns = [name for name in shown if name.startswith("noun")]
    assert nouns == list(own.sort_values(ascending=False).index)


def test_transfer_says_what_share_is_kept():
    titles = [axes.get_title() for axes in drawn.transfer_dots(MOVED, 0.6).axes]
    assert titles[:2] == ["sketches: 67% kept", "colours: 50% kept"]


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="no column 'high'"):
        drawn.recovery_dots(RECOVERY.drop(columns="high"))
