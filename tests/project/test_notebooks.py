"""Every notebook from top to bottom, in miniature: under settings that nothing committed was made with."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
#: Runs the cells of notebooks in one process, as a kernel would; a notebook may end early with its sentence.
RUN = """
import json, pathlib, sys, matplotlib
matplotlib.use("Agg")
from IPython.core.interactiveshell import InteractiveShell
from patchsae.studies.study import LeftOut
shell = InteractiveShell.instance()
for path in sorted(pathlib.Path("notebooks").glob(sys.argv[1])):
    shell.reset(new_session=False)
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            done = shell.run_cell("".join(cell["source"]))
            if isinstance(done.error_in_exec, LeftOut):
                print("LEFT OUT:", path.stem, done.error_in_exec)
                break
            done.raise_error()
    print("DONE:", path.stem, flush=True)
"""
#: So few images and steps that all notebooks take a minute.
SMALL = {"train_images": "192", "test_images": "64", "steps": "60", "save_every": "30", "least_steps": "1",
         "epochs": "1", "images": "64", "threads": "1", "transfer": '["sketches", "textures"]',
         "tasks": '["nouns", "textures", "aerial"]'}


def changed(text: str, settings: dict[str, str]) -> str:
    """A profile with other values."""
    for name, value in settings.items():
        text, n = re.subn(rf"^{name} = (\[.*\]|\S+)", f"{name} = {value}", text, flags=re.M)
        assert n, name
    return text


def bounds_left_out(text: str) -> str:
    """The profile without what results are held to: sixty steps train nothing."""
    return re.sub(r"^\[bounds\].*?(?=^\[|\Z)", "", text, flags=re.M | re.S)


def git(folder: Path, *arguments: str) -> list[str]:
    name = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    done = subprocess.run(["git", *name, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def python(folder: Path, profile: str, *arguments: str, **variables: str) -> str:
    """What an interpreter says with the code and the data of a folder, and other variables of its environment."""
    environment = os.environ | {"PYTHONPATH": str(folder / "src"), "PROFILE": profile, "OMP_NUM_THREADS": "1"}
    environment.pop("PATCHSAE_HOME", None)
    environment |= variables
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_all(folder: Path, profile: str, which: str = "*.ipynb", left_out: tuple[str, ...] = ()) -> str:
    """Run the notebooks whose names match; only those in ``left_out`` may end early."""
    said = python(folder, profile, "-c", RUN, which)
    notebooks = sorted(path.stem for path in folder.glob(f"notebooks/{which}"))
    assert re.findall(r"^DONE: (\S+)", said, re.M) == notebooks
    assert set(re.findall(r"^LEFT OUT: (\S+)", said, re.M)) <= set(left_out)
    return said


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A repository that holds what notebooks read, all of it committed."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed.")
    folder = tmp_path_factory.mktemp("checkout")
    left_out = shutil.ignore_patterns("run", "__pycache__", "dashboard")
    for name in ("src", "data/mini", "notebooks", "figures/mini"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=left_out)
    for file in (*REPOSITORY.glob("data/*.csv"), REPOSITORY / ".gitignore", REPOSITORY / "pyproject.toml"):
        shutil.copy(file, folder / file.relative_to(REPOSITORY))
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "As committed")
    return folder


def changes(folder: Path) -> list[str]:
    """Files that git finds changed or new."""
    return [line[3:] for line in git(folder, "status", "--porcelain")]


def test_notebooks_follow_other_settings_of_a_committed_profile(checkout):
    """Lambda x 3: committed tables are shown as they are and stay; results go to the run folder and the figures."""
    file = checkout / "src/patchsae/profiles/mini.toml"
    before = file.read_text(encoding="utf-8")
    file.write_text(bounds_left_out(changed(before, SMALL | {"l1": "3.9e-3"})), encoding="utf-8")
    assert "shown as it is" in run_all(checkout, "mini", "0[16789]*.ipynb")  # those with committed tables
    assert all(name.startswith(("figures/mini/", "src/patchsae/profiles/mini.toml")) for name in changes(checkout))
    assert len(changes(checkout)) > 20
    python(checkout, "mini", "-m", "patchsae", "reset", "--yes")
    assert changes(checkout) == ["src/patchsae/profiles/mini.toml"] and not (checkout / "data/mini/run").exists()
    file.write_text(before, encoding="utf-8")


def test_notebooks_follow_a_copy_of_a_profile(checkout):
    """Lambda x 0.3, layer - 3 and width x 2 in a profile of the project's own: nothing committed is touched."""
    text = (checkout / "src/patchsae/profiles/mini.toml").read_text(encoding="utf-8")
    other = SMALL | {"l1": "4.3e-4", "layer": "-3", "expansion": "3.5"}
    (checkout / "profiles").mkdir()
    (checkout / "profiles/mine.toml").write_text(bounds_left_out(changed(text, other)), encoding="utf-8")
    run_all(checkout, "mine", left_out=("08_remapping",))  # its tables are of the mini profile alone
    assert len(list((checkout / "figures/mine").glob("*.png"))) > 40
    python(checkout, "mine", "-m", "patchsae", "reset", "--yes")
    assert not changes(checkout) and not (checkout / "figures/mine").exists() and not (checkout / "data/mine").exists()
