"""How figures become files: pictures keep their pixels, files are small, the same figure gives the same bytes."""

import io
import os
import subprocess
import sys
from types import SimpleNamespace

import drawn
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from patchsae import config, figures
from patchsae.figures import canvas
from patchsae.world.dataset import SceneDataset

TABLE = pd.DataFrame({"latent": [1], "value": [1 / 3]})


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def scenes():
    ds = SceneDataset("nouns", "train", 72)
    return [ds[i].image for i in range(72)]


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def save(figure, folder, name="figure"):
    figures.save(figure, SimpleNamespace(figures_dir=folder), name, TABLE)
    return [(folder / f"{name}.{kind}").read_bytes() for kind in ("png", "pdf", "csv")]


def test_pixels_of_a_drawn_image_are_two_dots_in_a_file_and_one_in_a_notebook(scenes):
    figure = figures.sheets.image_rows([figures.sheets.Row("a", scenes[:3]), figures.sheets.Row("b", scenes[3:6])])
    for smaller, dots in ((1, 2), (canvas.NOTEBOOK, 1)):
        page = pixels(canvas.png(figure, smaller))
        for axes, image in zip(figure.axes, scenes):
            box = axes.get_window_extent()
            left, top = round(box.x0 / smaller), len(page) - round(box.y1 / smaller)
            side = 64 * dots
            expected = image.repeat(dots, 0).repeat(dots, 1)
            assert np.abs(page[top:top + side, left:left + side] - expected).max() <= canvas.PALETTE_ERROR


@pytest.mark.parametrize(("size", "asked", "dots"), [(64, 128, 128), (64, 122, 128), (64, 100, 100), (224, 128, 128)])
def test_a_picture_takes_whole_dots_or_is_resampled(size, asked, dots):
    image = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    axes = canvas.picture(canvas.new_figure(2, 2, layout=None), 0.1, 0.1, asked / canvas.SHEET_DPI, image)
    box = axes.get_window_extent()
    assert box.width == pytest.approx(dots) and box.x0 == pytest.approx(round(box.x0))
    assert len(axes.images[0].get_array()) == (size if dots % size == 0 else dots)
    assert axes.images[0].get_extent() == [0, size, size, 0]


def test_sheets_are_small_and_hold_each_picture_once(scenes, tmp_path):
    figure = figures.sheets.image_rows([figures.sheets.Row(f"row {i}", scenes[8 * i:8 * i + 8], "frequency 0.12")
                                        for i in range(9)])
    png, pdf, _ = save(figure, tmp_path)
    assert len(png) < 400_000 and len(pdf) < 400_000 and len(canvas.png(figure, canvas.NOTEBOOK)) < 250_000
    assert pdf.count(b"/Subtype /Image") == pdf.count(b"/Width 64") == 72


def test_a_palette_is_used_only_where_it_cannot_be_seen():
    y, x = np.mgrid[:240, :240]
    every = np.stack([x, y, (x + y) // 2], -1).astype(np.uint8)
    for image, mode in ((every, "RGB"), (every // 64 * 64, "P")):
        figure = canvas.new_figure(1, 1, layout=None)
        canvas.picture(figure, 0, 0, 1, image)
        data = canvas.png(figure)
        figure.savefig(plain := io.BytesIO(), format="png")
        assert Image.open(io.BytesIO(data)).mode == mode
        assert np.abs(pixels(data) - pixels(plain.getvalue())).max() <= canvas.PALETTE_ERROR


def test_files_know_their_size_in_inches(tmp_path):
    figure = figures.schematics.schematic_autoencoder()
    for smaller in (1, canvas.NOTEBOOK):
        image = Image.open(io.BytesIO(canvas.png(figure, smaller)))
        assert np.divide(image.size, image.info["dpi"]) == pytest.approx(figure.get_size_inches(), rel=1e-3)


DRAW = """
import sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pandas as pd
from patchsae import figures
profile, image = SimpleNamespace(figures_dir=Path(sys.argv[1])), np.arange(768, dtype=np.uint8).reshape(16, 16, 3)
log = pd.DataFrame({"step": [0, 10], "mse": 1, "l1": 0.1, "ghost": 0, "total": 1, "l0": 9, "dead": 0, "ev": 0.5})
for name, figure in (("sheet", figures.sheets.image_rows([figures.sheets.Row("a", [image])])),
                     ("drawing", figures.schematics.schematic_autoencoder()), ("chart", figures.training_curves(log))):
    figures.save(figure, profile, name, log)
"""


def test_same_bytes_from_another_process(tmp_path):
    for seed in ("1", "2"):
        changed = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(config.ROOT / "src"), "MPLBACKEND": "agg"}
        subprocess.run([sys.executable, "-c", DRAW, str(tmp_path / seed)], check=True, env=os.environ | changed)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(names) == 9
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_files_hold_neither_date_nor_version_and_the_table_is_plain_csv(tmp_path):
    png, pdf, csv = save(figures.schematics.schematic_autoencoder(), tmp_path)
    assert b"CreationDate" not in pdf and b"atplotlib v" not in pdf + png
    assert csv == b"latent,value\n1,0.333333\n"


def test_notebook_shows_a_figure_once(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    figure = figures.schematics.schematic_autoencoder()
    figure._ipython_display_()
    assert not plt.fignum_exists(figure.number)
    assert shown[0].data == canvas.png(figure, canvas.NOTEBOOK)


def test_manifest_lists_what_was_written(tmp_path, monkeypatch):
    manifest = tmp_path / "manifest"
    monkeypatch.setenv("PATCHSAE_MANIFEST", str(manifest))
    monkeypatch.setattr(config, "ROOT", tmp_path / "root")
    for folder in (tmp_path / "root" / "figures", tmp_path / "outside"):
        save(figures.schematics.schematic_autoencoder(), folder, "a")
    inside = [f"figures/a.{kind}" for kind in ("png", "pdf", "csv")]
    outside = [(tmp_path / "outside" / f"a.{kind}").as_posix() for kind in ("png", "pdf", "csv")]
    assert manifest.read_text().splitlines() == inside + outside


def test_figures_import_no_model_code():
    code = "import sys, patchsae.figures; print(*sorted(m for m in sys.modules if m.startswith('patchsae.')))"
    environment = os.environ | {"PYTHONPATH": str(config.ROOT / "src"), "MPLBACKEND": "agg"}
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    rooms = {name.split(".")[1] for name in loaded.stdout.split()}
    assert rooms <= {"figures", "config", "weights", "profiles"}


def test_an_empty_list_is_one_sentence():
    with pytest.raises(ValueError, match="no rows of images to draw"):
        figures.sheets.image_rows([])


def test_texts_of_drawings_stay_inside_the_sheet(scenes):
    overview = figures.schematics.schematic_overview(scenes[:6])
    for figure in (overview, figures.schematics.schematic_autoencoder(),
                   figures.schematics.schematic_ablation(scenes[:1])):
        figure.draw_without_rendering()
        for text in figure.findobj(lambda artist: hasattr(artist, "get_text") and artist.get_text()):
            assert figure.bbox.padded(1).count_contains(text.get_window_extent().corners()) == 4, text.get_text()
    shown = [axes.images[0].get_array() for axes in overview.axes if axes.images]
    assert all(np.array_equal(array, image) for array, image in zip(shown, scenes)) and len(shown) == 6
    assert "its reference images" in drawn.texts(overview)
