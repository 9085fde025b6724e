"""A notebook's key: the hash of all that decides what it computes, found without running it.

That is its code (never the prose), the rooms of the package that the code imports, directly or through others, with the
data files beside them, the profile, whatever that names by a path, ``data/<profile>/`` without the runs, the lock, and
the code of the notebooks before. Images count by name and size, all else by its bytes; file times are never looked at.
"""

import ast
import hashlib
import json
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
#: What a profile may name by a path.
NAMED = (("model", "name"), ("sae", "weights"), ("data", "images"), ("data", "masks"))


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state(path: Path) -> str:
    """What stands for a file in a key."""
    return str(path.stat().st_size) if path.suffix.lower() in IMAGES else file_hash(path)


def read_notebook(path: Path) -> dict:
    """A notebook as plain JSON; nbformat is not needed to look at sources."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"There is no notebook {path}; give the path of one in notebooks/.") from None
    except ValueError as error:
        raise SystemExit(f"{path} is not a valid notebook ({error}); restore it with git checkout.") from None


def project_folder(root: Path) -> Path:
    """The folder of profiles, data and figures: ``PATCHSAE_HOME``, or the repository itself."""
    return Path(os.environ.get("PATCHSAE_HOME") or root).expanduser().resolve()


def runs_after(notebook: dict, name: str) -> list[str]:
    """Notebooks that have to run before this one: ``metadata.patchsae.after``, or the one that trains."""
    otherwise = [] if name == "01_train_sae" else ["01_train_sae"]
    return notebook["metadata"].get("patchsae", {}).get("after", otherwise)


def imported(source: str, package: Path) -> set[Path]:
    """Files of the package that code loads when its import statements run, those inside functions too."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:
        return set()  # running it says where
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {f"{node.module}.{alias.name}" for node in nodes if isinstance(node, ast.ImportFrom)
              for alias in node.names}
    # Public names come from rooms that are imported when the name is first used; who imports all may use each.
    table = re.search(r"^_ROOMS = (\{.*?\})", (package / "__init__.py").read_text(encoding="utf-8"), re.S | re.M)
    rooms = {f"{package.name}.{name}": f"{package.name}.{room}" for name, room in ast.literal_eval(table[1]).items()}
    names |= set(rooms.values()) if package.name in names else set()
    steps = [rooms.get(name, name).split(".") for name in names if name.split(".")[0] == package.name]
    stems = {package.parent.joinpath(*way[:end]) for way in steps for end in range(1, len(way) + 1)}
    return {path for stem in stems for path in (stem / "__init__.py", stem.with_suffix(".py")) if path.is_file()}


def used_files(code: str, package: Path) -> set[Path]:
    """Files that code imports, those that these import, and so on, and the data files in the folders of them all."""
    waiting, used = imported(code, package), set()
    while waiting:
        used.add(path := waiting.pop())
        # What the package's own __init__ imports, it imports for type checkers alone.
        if path != package / "__init__.py":
            waiting |= imported(path.read_text(encoding="utf-8"), package) - used
    beside = {file for path in used for file in path.parent.iterdir() if file.is_file()}
    return used | {file for file in beside if file.suffix not in (".py", ".pyc") and file.name[0] != "."}


def code_state(name: str, root: Path, chain: tuple[str, ...] = ()) -> list:
    """The code of a notebook, the files it imports, and the same of the notebooks before it."""
    if name in chain:
        circle = " -> ".join([*chain, name])
        raise SystemExit(f"{circle} wait for each other; mend metadata.patchsae.after in one of them.")
    notebook = read_notebook(root / "notebooks" / f"{name}.ipynb")
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    lines = [line for cell in cells for line in cell.splitlines() if not line.startswith(("%", "!", "?"))]
    files = [[str(path.relative_to(root)), state(path)]
             for path in sorted(used_files("\n".join(lines), root / "src" / "patchsae"))]
    return [cells, files, [code_state(other, root, (*chain, name)) for other in runs_after(notebook, name)]]


def profile_files(profile: str, root: Path) -> Iterator[Path]:
    """A profile's file and all files of its data and of what it names by a path, in the order of their names."""
    home = project_folder(root)
    folders = (home / "profiles", root / "src" / "patchsae" / "profiles")
    places = [Path(profile), home / profile, *(folder / f"{profile}.toml" for folder in folders)]
    file = next((path for path in places if path.suffix == ".toml" and path.is_file()), None)
    if file is None:
        known = ", ".join(sorted(path.stem for folder in folders for path in folder.glob("*.toml")))
        raise SystemExit(f"There is no profile {profile!r}; set PROFILE to one of {known}, or to a file.")
    yield file
    settings, data = tomllib.loads(file.read_text(encoding="utf-8")), home / "data" / file.stem
    named = [home / name for section, key in NAMED if (name := settings.get(section, {}).get(key))]
    yield from (path for path in named if path.is_file())
    for top in (data, *named):
        for folder, folders, names in os.walk(top, followlinks=True):
            folders[:] = sorted(name for name in folders if Path(folder, name) != data / "run")
            yield from (path for name in sorted(names) if name[0] != "." and (path := Path(folder, name)).is_file())


def notebook_key(name: str, profile: str, root: Path) -> str:
    """Hash of all that decides what ``notebooks/<name>.ipynb`` computes under a profile."""
    code = [code_state(name, root), os.environ.get("PATCHSAE_FIGURES", "")]
    digest = hashlib.sha256(json.dumps(code).encode())
    for path in (root / "requirements.lock", *profile_files(profile, root)):
        digest.update(f"{os.path.relpath(path, root)} {state(path)}\n".encode())
    return digest.hexdigest()
