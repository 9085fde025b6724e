"""The repository itself: the lock, the Makefile, the stored notebooks, and what make decides to run."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from notebook_key import notebook_key, used_files  # noqa: E402
from run_notebook import MACHINE, output_texts  # noqa: E402

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
#: Code cells of a notebook, lines of a code cell and characters of a line, at most.
CELLS, LINES, COLUMNS = 25, 20, 110
#: What torch brings along on CUDA machines only; it pins these exactly itself.
CUDA_ONLY = ("nvidia", "triton", "cuda")


# Lock

def direct_dependencies() -> list[Requirement]:
    """Every dependency that pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(line) for lines in lists for line in lines]


def locked_lines() -> list[str]:
    """Every line of the lock that is no comment."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def locked_versions() -> dict[str, str]:
    """Name and version of every line of the lock."""
    lines = locked_lines()
    loose = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)]
    assert not loose, f"requirements.lock may hold only name==version, not {loose}"
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}


def imported_packages(path: Path) -> set[str]:
    """Top-level names that a file imports from outside its own package."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names}


def test_lock_pins_every_direct_dependency_within_its_bounds():
    locked = locked_versions()
    for dependency in direct_dependencies():
        version = locked.get(canonicalize_name(dependency.name))
        assert version, f"requirements.lock lacks {dependency.name}, which pyproject.toml names"
        assert dependency.specifier.contains(version), f"{dependency} excludes the locked version {version}"


def test_every_imported_package_is_a_named_dependency():
    """What only comes along with another package may be gone with its next version."""
    named = {canonicalize_name(dependency.name) for dependency in direct_dependencies()}
    providers = importlib.metadata.packages_distributions()
    files = [path for folder in ("src", "tools", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    # Triton comes with torch's builds for GPUs, which pin it, and is imported on a GPU alone.
    known = sys.stdlib_module_names | {"patchsae", "triton"} | {path.stem for path in files}
    for path in files:
        for package in sorted(imported_packages(path) - known):
            candidates = {canonicalize_name(name) for name in providers.get(package, [package])}
            assert candidates & named, f"{path.name} imports {package}, which pyproject.toml does not name"


def test_each_dependency_is_named_once():
    names = [canonicalize_name(dependency.name) for dependency in direct_dependencies()]
    assert len(names) == len(set(names))


def test_lock_has_one_line_a_package_and_nothing_for_one_machine_only():
    names = [canonicalize_name(line.split("==")[0]) for line in locked_lines()]
    assert names and len(names) == len(set(names))
    assert not [name for name in names if name.startswith(CUDA_ONLY)]


def installed_as_locked() -> list[importlib.metadata.Distribution]:
    """Installed packages in their locked versions; an interpreter given by PYTHON= may hold others."""
    locked = locked_versions()
    found = importlib.metadata.distributions()
    return [d for d in found if locked.get(canonicalize_name(d.metadata["Name"])) == d.version.split("+")[0]]


def test_lock_is_complete():
    """Whatever the locked packages need is locked too; followed through the installed packages."""
    locked = locked_versions()
    for package in installed_as_locked():
        needed = [Requirement(line) for line in package.requires or []]
        needed = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
        missing = [r.name for r in needed if canonicalize_name(r.name) not in locked]
        missing = [name for name in missing if not name.startswith(CUDA_ONLY)]
        assert not missing, f"{package.metadata['Name']} needs {missing}"


def test_lock_serves_every_python_that_pyproject_allows():
    """Some packages ask for a late bug-fix release of Python 3.11, which not every system has."""
    for package in installed_as_locked():
        allowed = package.metadata["Requires-Python"] or ""
        assert SpecifierSet(allowed).contains("3.11.0"), f"{package.metadata['Name']} needs Python {allowed}"


# Makefile

def make(*arguments: str) -> str:
    """Output of make in the repository, as a user sees it."""
    # Without what an outer make passes on: its options would change the output of this one.
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    result = subprocess.run(["make", *arguments], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_help_lists_every_command():
    phony = re.findall(r"^\.PHONY: ([a-z].*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    commands = {name for line in phony for name in line.split()}
    listed = set(re.findall(r"^  make (\S+)  +\S", make("help"), flags=re.MULTILINE))
    assert commands and listed == commands


def test_figures_visits_every_notebook_and_the_first_one_first():
    commands = make("-n", "figures", f"PYTHON={sys.executable}")
    plan = re.findall(r"run_notebook\.py notebooks/(\S+)\.ipynb", commands)
    expected = [path.stem for path in NOTEBOOKS if path.stem[0].isdigit() or path.stem == "explorer"]
    assert sorted(plan) == expected and plan[:1] == expected[:1]


# Stored notebooks

def sources(notebook: dict, kind: str) -> list[str]:
    """Sources of the cells of one kind that hold anything."""
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]
    return [source for source in cells if source.strip()]


def parametrized_by_notebook(test):
    """Run a test once for each stored notebook, given as parsed JSON."""
    return pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)(test)


@parametrized_by_notebook
def test_notebook_was_run_from_top_to_bottom(path):
    notebook = json.loads(path.read_text())
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    assert cells and [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert kinds and "error" not in kinds


@parametrized_by_notebook
def test_notebook_shows_nothing_of_one_machine(path):
    notebook = json.loads(path.read_text())
    texts = ["".join(cell["source"]) for cell in notebook["cells"]]
    texts += [text for cell in notebook["cells"] for text in output_texts(cell)]
    assert not [trace for text in texts for trace in MACHINE.findall(text)]


@parametrized_by_notebook
def test_notebook_metadata(path):
    metadata = json.loads(path.read_text())["metadata"]
    assert metadata["kernelspec"]["name"] == "python3"
    assert set(metadata) <= {"kernelspec", "language_info", "patchsae"}
    assert set(metadata["language_info"]) == {"name"}
    assert path.stat().st_size < 3_000_000


@parametrized_by_notebook
def test_notebook_code(path):
    cells = sources(json.loads(path.read_text()), "code")
    assert len(cells) <= CELLS, "divide the notebook, it has more than one subject"
    assert not [cell for cell in cells if len(cell.splitlines()) > LINES]
    assert not [line for cell in cells for line in cell.splitlines() if len(line) > COLUMNS]
    assert not [cell for cell in cells if cell.rstrip().endswith(";")]
    assert not [cell for cell in cells if re.search(r"^\s*[!%]+\s*(pip|conda)\b", cell, flags=re.MULTILINE)]
    assert any(re.search(r"^\s*assert\b", cell, flags=re.MULTILINE) for cell in cells)


@parametrized_by_notebook
def test_notebook_begins_with_a_title(path):
    first = json.loads(path.read_text())["cells"][0]
    assert first["cell_type"] == "markdown" and "".join(first["source"]).startswith("# ")


# What is run again: a small repository with two notebooks and rooms in folders

ROOMS = {
    "__init__": "TYPE_CHECKING = False\nif TYPE_CHECKING:\n    from patchsae.maple import MaPLe\n"
                "_ROOMS = {'ROOT': 'config', 'Autoencoder': 'sae',\n          'MaPLe': 'maple'}\n"
                "def __getattr__(name):\n    from importlib import import_module\n    if name not in _ROOMS:\n"
                "        raise AttributeError(name)\n"
                "    return getattr(import_module(f'patchsae.{_ROOMS[name]}'), name)\n",
    "config": "from pathlib import Path\nROOT = Path(__file__).resolve().parents[2]\n",
    "sae": "from patchsae import config\nAutoencoder = config.ROOT\n",
    "maple": "def words():\n    from patchsae.data.words import WORDS\n",
    "data/__init__": "",
    "data/words": "WORDS = 'words.json'\n",
    "figures/__init__": "from patchsae.figures.plots import *\n",
    "figures/plots": "import patchsae.sae\n",
    "figures/sheets": "",
}
SETUP = """import os
from patchsae import Autoencoder, ROOT
def save(name, text):
    path = ROOT / "figures" / "mini" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    with open(os.environ["PATCHSAE_MANIFEST"], "a") as file:
        file.write(f"figures/mini/{name}\\n")
"""


def write_notebook(root: Path, name: str, *code: str, title: str = "# Title", metadata=None) -> Path:
    """Store a notebook with one text cell and some code cells, never executed."""
    empty = {"cell_type": "code", "execution_count": None, "outputs": [], "metadata": {}}
    cells = [{"cell_type": "markdown", "metadata": {}, "source": title, "id": "title"}]
    cells += [empty | {"source": source, "id": f"code-{i}"} for i, source in enumerate(code)]
    content = {"cells": cells, "metadata": metadata or {}, "nbformat": 4, "nbformat_minor": 5}
    path = root / "notebooks" / f"{name}.ipynb"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A repository of the same shape as this one, with nothing in it to compute."""
    monkeypatch.delenv("PATCHSAE_FIGURES", raising=False)
    sources = {f"src/patchsae/{name}.py": source for name, source in ROOMS.items()}
    data = ("data/words.json", "figures/style.mplstyle", "profiles/mini.toml", "profiles/paper.toml")
    sources |= dict.fromkeys((f"src/patchsae/{file}" for file in data), "")
    sources |= dict.fromkeys(("requirements.lock", "data/mini/model.json", "data/mini/run/cache.json"), "")
    for file, source in sources.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(source)
    (tmp_path / "notebooks").mkdir()
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    write_notebook(tmp_path, "01_train_sae", SETUP, "save('losses.png', 'falling')")
    write_notebook(tmp_path, "02_statistics", SETUP, "save('scatter.png', 'points')")
    return tmp_path


def append(path: Path, text: str = "\n") -> None:
    """Change a file a little."""
    path.write_text(path.read_text() + text)


def key(root: Path) -> str:
    """Key of the second notebook."""
    return notebook_key("02_statistics", "mini", root)


def test_files_are_found_through_the_package_and_each_other(repository):
    package = repository / "src" / "patchsae"

    def used(code: str) -> set[str]:
        return {path.relative_to(package).as_posix().removesuffix(".py") for path in used_files(code, package)}

    base, words = {"__init__", "sae", "config"}, {"data/__init__", "data/words", "data/words.json"}
    figures = {"figures/__init__", "figures/plots", "figures/style.mplstyle"}
    assert used("from patchsae import Autoencoder") == base == used("import patchsae.sae as s")
    assert used("def f():\n    from patchsae.maple import MaPLe as M") == {"__init__", "maple"} | words
    assert used("from patchsae import figures\nimport numpy") == base | figures
    assert used("from patchsae.figures.sheets import a, b") == base | figures | {"figures/sheets"}
    assert used("import patchsae") == base | {"maple"} | words
    assert used("import patchsaeother, torch") == used("1 +") == set()


@pytest.mark.parametrize("file", [
    "src/patchsae/sae.py", "src/patchsae/config.py", "src/patchsae/__init__.py", "src/patchsae/profiles/mini.toml",
    "requirements.lock", "data/mini/model.json"])
def test_key_changes_with_what_the_notebook_uses(repository, file):
    before = key(repository)
    append(repository / file)
    assert key(repository) != before


@pytest.mark.parametrize("file", [
    "src/patchsae/maple.py", "src/patchsae/figures/plots.py", "src/patchsae/data/words.json",
    "src/patchsae/profiles/paper.toml", "src/patchsae/figures/style.mplstyle", "data/mini/run/cache.json"])
def test_key_stays_when_something_else_changes(repository, file):
    before = key(repository)
    append(repository / file)
    assert key(repository) == before


def test_key_follows_a_profile_of_the_project_and_what_it_names(repository, tmp_path_factory, monkeypatch):
    """Weights count by content, images by name and size, wherever they lie."""
    home, pets = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("pets")
    monkeypatch.setenv("PATCHSAE_HOME", str(home))
    for file, content in ((home / "out.pt", "weights"), (pets / "cat" / "run" / "1.jpg", "image")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    (home / "profiles").mkdir()
    (home / "profiles" / "pets.toml").write_text(f"[data]\nimages = '{pets}'\n[sae]\nweights = 'out.pt'\n")
    keys = [notebook_key("02_statistics", "pets", repository)]
    assert keys[0] == notebook_key("02_statistics", str(home / "profiles" / "pets.toml"), repository)
    (home / "out.pt").write_text("WEIGHTS")
    keys.append(notebook_key("02_statistics", "pets", repository))
    (pets / "cat" / "run" / "1.jpg").rename(pets / "cat" / "run" / ".1.jpg")
    keys.append(notebook_key("02_statistics", "pets", repository))
    append(home / "profiles" / "pets.toml")
    keys.append(notebook_key("02_statistics", "pets", repository))
    assert len(set(keys)) == 4
    with pytest.raises(SystemExit, match="no profile 'dogs'; set PROFILE to one of mini, paper, pets"):
        notebook_key("02_statistics", "dogs", repository)


def test_key_reads_code_and_not_prose(repository):
    before = key(repository)
    write_notebook(repository, "02_statistics", SETUP, "save('scatter.png', 'points')", title="# New")
    assert key(repository) == before
    write_notebook(repository, "02_statistics", SETUP, "save('scatter.png', 'lines')")
    assert key(repository) != before


def test_key_follows_the_notebooks_before(repository):
    before = key(repository)
    write_notebook(repository, "01_train_sae", SETUP, "save('losses.png', 'rising')")
    assert key(repository) != before
    alone = {"patchsae": {"after": []}}
    write_notebook(repository, "02_statistics", "1", metadata=alone)
    before = key(repository)
    write_notebook(repository, "01_train_sae", SETUP)
    assert key(repository) == before


def test_notebooks_that_wait_for_each_other_are_refused(repository):
    write_notebook(repository, "01_train_sae", "1", metadata={"patchsae": {"after": ["02_statistics"]}})
    with pytest.raises(SystemExit, match="02_statistics -> 01_train_sae -> 02_statistics wait"):
        key(repository)


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Call the runner of a repository for its second notebook."""
    command = [sys.executable, "tools/run_notebook.py", *arguments, "notebooks/02_statistics.ipynb"]
    environment = {key: value for key, value in os.environ.items() if key != "PROFILE"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def test_runner_executes_what_changed_and_nothing_else(repository):
    stored = (repository / "notebooks/02_statistics.ipynb").read_bytes()
    first = run(repository)
    lines = r"01_train_sae: \d+ s, 1 figures\n02_statistics: \d+ s, 1 figures\n"
    assert re.fullmatch(lines, first.stdout), first.stderr
    assert (repository / "notebooks/02_statistics.ipynb").read_bytes() == stored
    assert run(repository).stdout == "02_statistics: up to date\n"
    (repository / "figures/mini/scatter.png").write_text("spoilt")
    assert re.fullmatch(r"02_statistics: \d+ s, 1 figures\n", run(repository).stdout)
    assert (repository / "figures/mini/scatter.png").read_text() == "points"


def test_runner_fails_loudly_and_leaves_no_stamp(repository):
    write_notebook(repository, "02_statistics", "save = 1", "raise ValueError('too few images')")
    result = run(repository)
    assert result.returncode != 0 and "too few images" in result.stderr
    assert not (repository / "build/mini/02_statistics.json").exists()


def test_notebooks_are_stored_clean_and_the_same_each_time(repository):
    noisy = "import sys\nfrom tqdm.auto import tqdm\nprint([*tqdm(range(2))])\nprint('slow', file=sys.stderr)"
    same_python = f"sys.executable == {sys.executable!r}"
    path = write_notebook(repository, "02_statistics", noisy, "", same_python)
    assert run(repository, "--in-place").returncode == 0
    stored = path.read_bytes()
    first, empty, last = json.loads(stored)["cells"][1:]
    assert first["outputs"] == [{"name": "stdout", "output_type": "stream", "text": ["[0, 1]\n"]}]
    assert last["outputs"][0]["data"] == {"text/plain": ["True"]} and len(last["outputs"]) == 1
    assert [cell["execution_count"] for cell in (first, empty, last)] == [1, None, 2]
    assert last["outputs"][0]["execution_count"] == 2
    assert run(repository, "--in-place").returncode == 0 and path.read_bytes() == stored


def test_outputs_of_one_machine_are_not_stored(repository):
    path = write_notebook(repository, "02_statistics", "import os\nos.getcwd()")
    stored = path.read_bytes()
    result = run(repository, "--in-place")
    assert result.returncode != 0 and "print relative paths" in result.stderr
    assert path.read_bytes() == stored
