"""``patchsae reset``: data and figures of a profile as they were committed, and nothing left of its runs."""

import contextlib
import shutil
import subprocess

from patchsae.config import ROOT, load_profile
from patchsae.project.ask import agreed


def _git(*arguments: str) -> list[str] | None:
    """The paths that a command of git names, from the project folder; None where it is no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return [name for name in done.stdout.split("\0") if name] if done.returncode == 0 else None


def run(name: str | None, yes: bool) -> str:
    """List what would be put back and removed, ask, and do it; returns what was done.

    Committed files are put back as git has them. New files beside them, the run folder, ``build/`` and, where none are
    committed, the figures are removed: the notebooks make them again. Images and masks stay.
    """
    profile = load_profile(name)
    figures, places = ROOT / "figures" / profile.name, (f"data/{profile.name}", f"figures/{profile.name}")
    back = _git("ls-files", "-z", "--modified", "--deleted", "--", *places)
    new = _git("ls-files", "-z", "--others", "--exclude-standard", "--", *places)
    gone = [profile.run_dir, ROOT / "build" / profile.name, *(ROOT / name for name in new or ())]
    gone += [figures] if back is not None and not _git("ls-files", "-z", "--", places[1]) else []
    gone, back = [path for path in gone if path.exists()], sorted(set(back or ()))
    if not gone and not back:
        return f"The profile {profile.name} is as it was; nothing was changed."
    print("\n".join([*(f"  put back {name}" for name in back), *(f"  remove {profile.short(path)}" for path in gone)]))
    if not yes and not agreed(f"Put back {len(back)} files and remove the rest?"):
        return "Nothing was changed."
    if back:
        subprocess.run(["git", "checkout", "-q", "--", *back], cwd=ROOT, check=True)
    for path in gone:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something is left in it
        profile.data_dir.rmdir()
    return f"{len(back)} files are put back, {len(gone)} files and folders removed."
