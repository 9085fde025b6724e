"""What files hold, whatever they are called and whenever they were written: SHA-256 of their bytes, computed once.

The hashes are noted beside the files in ``.patchsae-hashes.json``, as path -> size, time of change in nanoseconds and
hash, or in the user's cache folder where nothing can be written there. Size and time say only whether a note is still
of that file: in a copied folder they differ, the files are read again, and their hashes are the same.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm

from patchsae.weights.files import file_sha256, write_atomically

NOTES = ".patchsae-hashes.json"
#: Threads that read files, and files after which the notes are written.
THREADS, SAVED_EVERY = 16, 50_000
#: A file that changed less than so many nanoseconds ago may change again without another time of change: 2 s.
SETTLED = 2 * 10**9


def file_hashes(root: Path, files: Iterable[Path]) -> dict[Path, str]:
    """Hash of every file's bytes, 64 hexadecimal digits; "" for one that cannot be read.

    ``root``: the folder that keeps the notes, by paths seen from there; what was noted before an interruption stays.
    """
    place, prefix, hashes, unknown = notes_place(root), f"{root}{os.sep}", {}, {}
    noted = _load(place)
    for path in dict.fromkeys(files):
        name, state = str(path), _state(path)
        name = name.removeprefix(prefix) if name.startswith(prefix) else os.path.relpath(path, root)
        if name in noted and noted[name][:2] == state:
            hashes[path] = noted[name][2]
        else:
            unknown[path] = name, state
    with ThreadPoolExecutor(THREADS) as pool, tqdm(total=len(unknown), desc="hashes of the files", delay=1) as bar:
        for start in range(0, len(unknown), SAVED_EVERY):
            now, paths = time.time_ns(), list(unknown)[start:start + SAVED_EVERY]
            new = {}
            for path, digest in zip(paths, pool.map(_digest, paths)):
                hashes[path], (name, state) = digest, unknown[path]
                if digest and state and state[1] < now - SETTLED:
                    new[name] = [*state, digest]
                bar.update()
            _save(place, new)
    return hashes


def notes_place(root: Path) -> Path:
    """The file that holds the notes of a folder."""
    if os.access(root, os.W_OK):
        return root / NOTES
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "patchsae" / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]}{NOTES}"


def _state(path: Path) -> list[int]:
    """Size and time of change of a file; nothing where it is missing."""
    try:
        stat = os.stat(path)
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns]


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError:
        return ""


def _load(place: Path) -> dict[str, list]:
    """The notes that are there; what is no note is left out."""
    try:
        content = json.loads(place.read_bytes())
        return {name: note for name, note in content.items() if isinstance(note, list) and len(note) == 3}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _save(place: Path, new: dict[str, list]) -> None:
    """Add notes to those that are there by now; where they cannot be kept, the files are read again another time."""
    with contextlib.suppress(OSError):
        write_atomically(place, lambda temporary: temporary.write_text(json.dumps(_load(place) | new)))
