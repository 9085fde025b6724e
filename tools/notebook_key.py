"""What a notebook's results depend on, found without running it, and its hash: the notebook's key.

The key covers the code cells (never the prose), the rooms of ``src/patchsae`` the code imports, directly or
through other rooms, the package's data files those rooms name, the profile, the lock, the committed data, and
the keys of the notebooks that have to run before.
"""

import ast
import hashlib
import json
import os
import subprocess
from pathlib import Path

PACKAGE = "patchsae"
#: Most notebooks use the autoencoder that this one trains.
FIRST_NOTEBOOK = "01_train_sae"


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_notebook(path: Path) -> dict:
    """A notebook as plain JSON; nbformat is not needed to look at sources."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"There is no notebook {path}; give the path of one in notebooks/.") from None
    except ValueError as error:
        raise SystemExit(f"{path} is not a valid notebook ({error}); restore it with git checkout.") from None


def code_cells(notebook: dict) -> list[str]:
    """Sources of the code cells that hold anything."""
    sources = ("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    return [source for source in sources if source.strip()]


def plain_python(source: str) -> str:
    """A cell without the lines that only IPython understands."""
    magic = ("%", "!", "?")
    return "\n".join("" if line.startswith(magic) else line for line in source.splitlines())


# Rooms

def room_names(package: Path) -> frozenset[str]:
    """All rooms of the package: its modules without ``__init__``."""
    return frozenset(path.stem for path in package.glob("*.py")) - {"__init__"}


def exports(package: Path) -> dict[str, str]:
    """Which room each name comes from that ``__init__`` passes on."""
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (module := inside_package(node)):
            found |= {alias.asname or alias.name: module for alias in node.names}
    return found


def inside_package(node: ast.ImportFrom) -> str | None:
    """Where ``from ... import`` looks: a room, "" for the package itself, None for another package."""
    if node.level:
        return node.module or ""
    first, _, rest = node.module.partition(".")
    return rest if first == PACKAGE else None


def rooms_of(node: ast.AST, package: Path) -> set[str]:
    """Rooms that one import statement loads; what cannot be told counts as all of them."""
    everything = set(room_names(package))
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE]
        wanted = [module.partition(".")[2] for module in modules]
    elif isinstance(node, ast.ImportFrom) and (module := inside_package(node)) is not None:
        origin = exports(package) | {room: room for room in everything}
        wanted = [module] if module else [origin.get(alias.name, "") for alias in node.names]
    else:
        return set()
    return set().union(*({room} if room in everything else everything for room in wanted))


def imported_rooms(source: str, package: Path) -> set[str]:
    """Rooms that a piece of code imports, inside functions too."""
    # Most nodes import nothing: what an import may mean is looked up for those alone that are one.
    imports = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom))
    return set().union(*(rooms_of(node, package) for node in imports))


def used_rooms(code: str, package: Path) -> set[str]:
    """Rooms that code imports, and the rooms that those import, and so on."""
    pending, used = imported_rooms(code, package), set()
    while pending:
        room = pending.pop()
        used.add(room)
        source = (package / f"{room}.py").read_text(encoding="utf-8")
        pending |= imported_rooms(source, package) - used
    return used


# Files

def package_data(code: str, rooms: set[str], package: Path) -> list[Path]:
    """Data files of the package that the code or its rooms name; one that no room names counts always."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(package.glob("*.py"))}
    mine = [code, *(texts[room] for room in sorted(rooms))]
    files = [p for p in sorted(package.iterdir()) if p.is_file() and p.suffix != ".py" and p.name[0] != "."]
    return [p for p in files
            if any(p.name in text for text in mine) or not any(p.name in text for text in texts.values())]


def profile_file(profile: str, package: Path) -> Path:
    """The TOML file of a profile."""
    path = package / "profiles" / f"{profile}.toml"
    if not path.is_file():
        known = " or ".join(sorted(p.stem for p in path.parent.glob("*.toml")))
        raise SystemExit(f"src/{PACKAGE}/profiles has no profile {profile!r}; set PROFILE to {known}.")
    return path


def committed_data(profile: str, root: Path) -> list[Path]:
    """Files of ``data/<profile>`` and published tables that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard",
               "--", f"data/{profile}", "data/*.csv"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if listed.returncode == 0:
        paths = {root / name for name in listed.stdout.split("\0") if name}
    else:  # an unpacked archive without git: all but what notebooks write
        folder = root / "data" / profile
        paths = {path for path in folder.rglob("*") if folder / "run" not in path.parents}
        paths |= set(root.glob("data/*.csv"))
    return sorted(path for path in paths if path.is_file())


# Key

def runs_after(notebook: dict, name: str, root: Path) -> list[str]:
    """Notebooks that have to run before this one: ``metadata.patchsae.after``, or the one that trains."""
    declared = notebook["metadata"].get("patchsae", {}).get("after")
    if declared is not None:
        return list(declared)
    first_exists = (root / "notebooks" / f"{FIRST_NOTEBOOK}.ipynb").is_file()
    return [FIRST_NOTEBOOK] if first_exists and name != FIRST_NOTEBOOK else []


def notebook_key(name: str, profile: str, root: Path, chain: tuple[str, ...] = ()) -> str:
    """Hash of all that decides what ``notebooks/<name>.ipynb`` computes under a profile."""
    if name in chain:
        circle = " -> ".join([*chain, name])
        raise SystemExit(f"{circle} wait for each other; mend metadata.patchsae.after in one of them.")
    package = root / "src" / PACKAGE
    notebook = read_notebook(root / "notebooks" / f"{name}.ipynb")
    cells = code_cells(notebook)
    code = "\n".join(map(plain_python, cells))
    try:
        rooms = used_rooms(code, package)
    except SyntaxError as error:
        raise SystemExit(f"notebooks/{name}.ipynb or a room it imports is not valid Python at "
                         f"{(error.text or '?').strip()!r}; mend that line.") from None
    files = [*(package / f"{room}.py" for room in rooms), *package_data(code, rooms, package),
             profile_file(profile, package), root / "requirements.lock", *committed_data(profile, root)]
    parts = {
        "code": cells,
        "files": {path.relative_to(root).as_posix(): file_hash(path) for path in files},
        "after": {other: notebook_key(other, profile, root, (*chain, name))
                  for other in runs_after(notebook, name, root)},
        "figures": os.environ.get("PATCHSAE_FIGURES", ""),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
