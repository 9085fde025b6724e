"""Figures: every one is drawn from small made-up data; saving twice gives the same bytes."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from patchsae import config, figures

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 255, (16, 16, 3), dtype=np.uint8)
HEAT = RNG.random((4, 4))
TRUTH = np.arange(256).reshape(16, 16) % 16 > 7
STATS = pd.DataFrame({"latent": range(20), "frequency": [0, *np.linspace(0.01, 1, 19)],
                      "mean_activation": np.linspace(0.001, 0.5, 20),
                      "label_entropy": [np.nan, np.nan, *np.linspace(0, 2, 18)], "label_std": 1.0})
LOG = pd.DataFrame({"step": [0, 10], "mse": [1, 0.1], "l1": [0.2, 0.1], "ghost": [0.1, 0],
                    "total": [1.3, 0.2], "l0": [9, 5], "dead": [0, 0.1], "ev": [-0.5, 0.9]})
SWEEP = pd.DataFrame({"configuration": ["default", "default", "random"], "seed": [0, 1, 0], "mse": 0.1,
                      "l0": [5, 6, 90], "l1": 0.1, "ev_patch": [0.9, 0.8, -3], "ev_cls": [0.9, 0.8, 0],
                      "dead": [0, 0.1, 0.5], "accuracy_original": 0.9, "accuracy_spliced": [0.8, 0.85, 0.01]})
PROBES = pd.DataFrame({"layer": [1, 2, 1, 2], "concept": "noun", "accuracy": [0.2, 0.4, 0.3, 0.6],
                       "tokens": ["patch", "patch", "class", "class"], "chance": 0.1})
PAIR = pd.DataFrame({"image": ["photo", "photo", "sketch"], "latent": [3, 4, 3],
                     "activation": [0.5, 0.2, 0.4]})
ROW = figures.Row("latent 3: red", [IMAGE] * 3, "frequency 0.12, activation 0.31")
MASK = figures.MaskRow("latent 3", IMAGE, HEAT, IMAGE, TRUTH, "IoU 0.7")
STYLE = figures.StyleLatent(3, "latent 3: shared", [IMAGE] * 2, [IMAGE] * 4)
LAYER = figures.LayerLatent("latent 3", HEAT, [IMAGE] * 4)

PLOTS = {
    "training_curves": lambda: figures.training_curves(LOG),
    "sweep": lambda: figures.sweep(SWEEP),
    "probe_table": lambda: figures.probe_table(PROBES),
    "latent_scatter": lambda: figures.latent_scatter(STATS, {"often": (-1, 0, -2, 0)}, {5: "a"}),
    "scatter_panels": lambda: figures.scatter_panels({"class token": STATS, "all tokens": STATS}),
    "style_pair": lambda: figures.style_pair(PAIR, {"photo": IMAGE, "sketch": IMAGE}, [STYLE]),
}
SHEETS = {
    "image_rows": lambda: figures.image_rows([ROW, ROW._replace(caption="")]),
    "mask_rows": lambda: figures.mask_rows([MASK, MASK._replace(image=None, truth=None)], columns=2),
    "layers_grid": lambda: figures.layers_grid(IMAGE, (1, 2), {"layer 11": [LAYER], "layer 2": [LAYER]}),
    "schematic_overview": lambda: figures.schematic_overview([IMAGE] * 6),
    "schematic_autoencoder": lambda: figures.schematic_autoencoder(),
    "schematic_ablation": lambda: figures.schematic_ablation([IMAGE] * 6),
}


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def _profile(folder: Path) -> SimpleNamespace:
    return SimpleNamespace(figures_dir=folder)


def _texts(figure: Figure) -> list[str]:
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


@pytest.mark.parametrize("name", PLOTS)
def test_plots_have_labelled_axes(name):
    figure = PLOTS[name]()
    assert isinstance(figure, Figure)
    assert any(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes)


@pytest.mark.parametrize("name", SHEETS)
def test_sheets_have_words_and_pictures(name):
    figure = SHEETS[name]()
    assert isinstance(figure, Figure)
    assert _texts(figure)
    assert all(0 <= edge <= 1.001 for axes in figure.axes for edge in axes.get_position().extents)


@pytest.mark.parametrize("name", [*PLOTS, *SHEETS])
def test_same_bytes_when_saved_twice(name, tmp_path):
    for folder in ("first", "second"):
        figures.save((PLOTS | SHEETS)[name](), _profile(tmp_path / folder), name, STATS)
    written = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert written == [f"{name}.csv", f"{name}.pdf", f"{name}.png"]
    for file in written:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


SAVE_ELSEWHERE = """
import sys
from pathlib import Path
from types import SimpleNamespace
import pandas as pd
from patchsae import figures
profile = SimpleNamespace(figures_dir=Path(sys.argv[1]))
figures.save(figures.schematic_autoencoder(), profile, "a", pd.DataFrame({"x": [1]}))
"""


def test_same_bytes_from_another_process(tmp_path):
    for seed in ("1", "2"):
        changed = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(config.ROOT / "src"), "MPLBACKEND": "agg"}
        command = [sys.executable, "-c", SAVE_ELSEWHERE, str(tmp_path / seed)]
        subprocess.run(command, check=True, env=os.environ | changed)
    for file in ("a.png", "a.pdf", "a.csv"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


def test_files_hold_neither_date_nor_version(tmp_path):
    figures.save(figures.training_curves(LOG), _profile(tmp_path), "curves", LOG)
    assert b"CreationDate" not in (tmp_path / "curves.pdf").read_bytes()
    for file in ("curves.pdf", "curves.png"):
        assert b"atplotlib v" not in (tmp_path / file).read_bytes()


def test_notebook_shows_a_figure_once():
    figure = figures.schematic_autoencoder()
    figure._ipython_display_()
    assert not plt.fignum_exists(figure.number)


def test_table_is_plain_csv(tmp_path):
    table = pd.DataFrame({"latent": [1], "value": [1 / 3]})
    figures.save(figures.training_curves(LOG), _profile(tmp_path), "curves", table)
    assert (tmp_path / "curves.csv").read_bytes() == b"latent,value\n1,0.333333\n"


def test_manifest_lists_what_was_written(tmp_path, monkeypatch):
    manifest = tmp_path / "manifest"
    monkeypatch.setenv("PATCHSAE_MANIFEST", str(manifest))
    monkeypatch.setattr(config, "ROOT", tmp_path / "root")
    figures.save(figures.training_curves(LOG), _profile(tmp_path / "root" / "figures"), "curves", LOG)
    figures.save(figures.training_curves(LOG), _profile(tmp_path / "outside"), "curves", LOG)
    inside = [f"figures/curves.{kind}" for kind in ("png", "pdf", "csv")]
    outside = [(tmp_path / "outside" / f"curves.{kind}").as_posix() for kind in ("png", "pdf", "csv")]
    assert manifest.read_text().splitlines() == inside + outside


@pytest.mark.parametrize(("draw", "table", "column"), [
    (figures.training_curves, LOG, "ghost"),
    (figures.sweep, SWEEP, "ev_cls"),
    (figures.probe_table, PROBES, "chance"),
    (figures.latent_scatter, STATS, "label_entropy"),
    (lambda table: figures.scatter_panels({"a": table}), STATS, "frequency"),
    (lambda table: figures.style_pair(table, {"photo": IMAGE, "sketch": IMAGE}, []), PAIR, "activation"),
])
def test_missing_column_is_named(draw, table, column):
    with pytest.raises(ValueError, match=f"has no column '{column}'"):
        draw(table.drop(columns=column))


def test_mistakes_are_one_sentence():
    with pytest.raises(ValueError, match="no rows of images to draw"):
        figures.image_rows([])
    with pytest.raises(ValueError, match="Latent 0 cannot be marked"):
        figures.latent_scatter(STATS, picked={0: "a"})
    with pytest.raises(ValueError, match="needs two images"):
        figures.style_pair(PAIR, {"photo": IMAGE}, [])


def test_all_missing_entropy_and_empty_masks_are_drawn():
    figures.latent_scatter(STATS.assign(label_entropy=np.nan)).canvas.draw()
    figures.mask_rows([MASK._replace(heat=np.zeros((4, 4)), truth=np.zeros((16, 16), bool))]).canvas.draw()
