"""Imports run one way: read from the syntax trees, and tried in a fresh interpreter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "patchsae"
FOLDERS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
CARRY = {"config", "top", "data", "weights", "fast"}
#: Folder ("top" is the top level, "config" its one module without model code) -> where its modules may import from,
#: inside functions too. That ``data`` draws scenes only when it is asked to is tested below.
MAY_IMPORT = {"top": CARRY, "data": CARRY | {"world"}, "weights": CARRY, "fast": CARRY, "world": CARRY | {"world"},
              "studies": CARRY | {"world", "studies", "figures"}, "figures": {"config", "weights", "figures"},
              "app": (FOLDERS | CARRY) - {"project"}, "project": (FOLDERS | CARRY) - {"app"}}


def imported(path: Path) -> set[str]:
    """Where in the package a file imports from."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
    rooms = {name.split(".")[1] for name in names if name.startswith("patchsae.")}
    return {room if room in FOLDERS | {"config"} else "top" for room in rooms}


@pytest.mark.parametrize("folder", sorted(FOLDERS | {"top"}))
def test_imports_run_one_way(folder):
    files = (PACKAGE if folder == "top" else PACKAGE / folder).glob("*.py")
    for path in set(files) - {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}:
        assert imported(path) <= MAY_IMPORT[folder], f"{path} imports {sorted(imported(path) - MAY_IMPORT[folder])}"


#: Time an import after those of torch and transformers, and name what is loaded of what should not be.
ASK = """
import importlib, sys, time
for module in sys.argv[2].split():
    importlib.import_module(module)
start = time.monotonic()
exec(sys.argv[1])
print(round(time.monotonic() - start, 3), *(set(sys.argv[3].split()) & set(sys.modules)))
"""


@pytest.mark.parametrize("statement, after, never", [
    ("import patchsae", "", "torch transformers pandas scipy matplotlib seaborn ipywidgets fonticon_mdi7 patchsae.sae"),
    ("from patchsae import *", "torch transformers.models.clip.modeling_clip",
     "matplotlib seaborn ipywidgets fonticon_mdi7 peft patchsae.figures patchsae.world patchsae.app patchsae.project")])
def test_nothing_is_loaded_before_it_is_used(statement, after, never):
    done = subprocess.run([sys.executable, "-c", ASK, statement, after, never], capture_output=True, text=True)
    seconds, *loaded = done.stdout.split()
    print(f"{statement}{after and ' after '}{after}: {seconds} s")
    assert not loaded, done.stderr
