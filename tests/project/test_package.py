"""The package installed like any other: a wheel, used from another folder, without the extras."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import random_clip_model, tiny_processor

import patchsae

ROOT = Path(__file__).resolve().parents[2]
#: What a user of the library does. The packages that only extras bring cannot be imported here.
SCRIPT = """
import os, sys
from pathlib import Path
sys.modules |= dict.fromkeys(sys.argv[3].split())
import numpy as np, torch
import patchsae
from patchsae import *
from patchsae import config
from patchsae.fast import processes

installed, folder = map(Path, sys.argv[1:3])
assert Path(patchsae.__file__).is_relative_to(installed), patchsae.__file__
clip = load_clip(folder)
images = ArrayDataset(np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8), np.arange(12) % 3)
cache = write_cache(clip, images, -2, "activations")
assert cache[[5, 3]].shape == open_cache("activations")[[5, 3]].shape == (2, clip.n_tokens, clip.width)
sae = SparseAutoencoder(clip.width, 24)
history = train_steps(sae, (cache[rows].float() for rows in ([0, 1, 2], [3, 4, 5])), warmup=1)
assert history.shape == (2, 4) and history.isfinite().all()
sae.save_pretrained("sae")
sae = SparseAutoencoder.from_pretrained("sae")
latents = collect_latents(clip, sae, images, -2, tau=0.0, n_reference=2)
text = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
table = topk_masking(clip, sae, images, latents, text, -2, ks=[1, 2])
assert len(table) == 3 * len(['original', 'spliced', 1, 2, -1, -2]), table
assert load_profile("mini").run_dir == Path.cwd() / "data" / "mini" / "run" == config.ROOT / "data" / "mini" / "run"
processes.join()
os.environ["WORLD_SIZE"] = "2"
try:
    processes.join()
except OSError as error:
    assert str(error).endswith("pip install 'patchsae[scale]'.")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built beside it."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(folder))
    return next(folder.glob("patchsae-*.whl"))


def pip(*arguments: str) -> None:
    """Run pip, which needs no network here."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_wheel_holds_every_file_of_the_package(wheel):
    files = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "patchsae").rglob("*")
             if path.is_file() and path.suffix != ".pyc"}
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert files <= packed and "patchsae/py.typed" in packed
    assert wheel.name.startswith(f"patchsae-{patchsae.__version__}-")


def test_the_installed_package_works_in_another_folder_without_extras(wheel, tmp_path):
    installed, model = tmp_path / "installed", tmp_path / "model"
    pip("install", "--no-deps", "--no-index", "--target", str(installed), str(wheel))
    random_clip_model().save_pretrained(model)
    tiny_processor().save_pretrained(model)
    extras = ("accelerate anywidget datasets fonticon_mdi7 ipywidgets IPython matplotlib peft seaborn "
              "voila")
    clean = {k: v for k, v in os.environ.items() if k not in ("PROFILE", "PATCHSAE_HOME")}
    clean |= {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "elsewhere").mkdir()
    used = subprocess.run([sys.executable, "-c", SCRIPT, str(installed), str(model), extras],
                          cwd=tmp_path / "elsewhere", env=clean, capture_output=True, text=True)
    assert used.returncode == 0, used.stderr
    asked = subprocess.run([installed / "bin" / "patchsae", "--help"], env=clean, capture_output=True, text=True)
    assert asked.returncode == 0 and "train" in asked.stdout, asked.stderr


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project and "version" not in (ROOT / "CITATION.cff").read_text().replace("cff-version", "")
    assert (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").count(f"\n## {patchsae.__version__}\n") == 1


def test_an_interpreter_that_lacks_packages_is_told_so(tmp_path):
    venv.create(tmp_path / "bare")
    for python, status, said in ((sys.executable, 0, ""), (tmp_path / "bare/bin/python", 2, "lacks torch>=2.6"),
                                 (tmp_path / "none", 2, "is no interpreter")):
        done = subprocess.run(["make", "env", f"PYTHON={python}"], cwd=ROOT, capture_output=True, text=True)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
        assert done.returncode == status and len(lines) <= 1 and said in done.stderr, done.stderr
