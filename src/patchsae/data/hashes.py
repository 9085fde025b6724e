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
#: Threads that read files, files that one of them takes at a time, and files after which the notes are written.
THREADS, SLICE, SAVED_EVERY = 16, 256, 100_000
#: A file that changed less than so many nanoseconds ago may change again without another time of change: 2 s.
SETTLED = 2 * 10**9


def file_hashes(root: Path, files: Iterable[Path]) -> dict[Path, str]:
    """Hash of every file's bytes, 64 hexadecimal digits; "" for one that cannot be read.

    ``root``: the folder that keeps the notes, by paths seen from there; what was noted before an interruption stays.
    """
    files, place = list(dict.fromkeys(files)), notes_place(root)
    noted, hashes = _load(place), {}

    def look(paths: list[Path]) -> list[tuple[str, list]]:
        names = [Path(os.path.relpath(path, root)).as_posix() for path in paths]
        return [(name, _note(path, noted.get(name))) for name, path in zip(names, paths)]

    with ThreadPoolExecutor(THREADS) as pool, tqdm(total=len(files), desc="hashes of the files", delay=1) as bar:
        for start in range(0, len(files), SAVED_EVERY):
            some, new, now = files[start:start + SAVED_EVERY], {}, time.time_ns()
            slices = [some[i:i + SLICE] for i in range(0, len(some), SLICE)]
            for paths, notes in zip(slices, pool.map(look, slices)):
                hashes |= {path: note[2] for path, (_, note) in zip(paths, notes)}
                new |= {name: note for name, note in notes if note != noted.get(name) and 0 < note[1] < now - SETTLED}
                bar.update(len(paths))
            if new:
                _save(place, new)
    return hashes


def notes_place(root: Path) -> Path:
    """The file that holds the notes of a folder."""
    if os.access(root, os.W_OK):
        return root / NOTES
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "patchsae" / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]}{NOTES}"


def _note(path: Path, noted: list | None) -> list:
    """Size, time of change and hash of a file; what was noted of it where it is still the same file."""
    try:
        stat = path.stat()
        if noted and noted[:2] == [stat.st_size, stat.st_mtime_ns]:
            return noted
        return [stat.st_size, stat.st_mtime_ns, file_sha256(path)]
    except OSError:
        return [0, 0, ""]


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
