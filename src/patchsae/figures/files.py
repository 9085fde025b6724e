"""Figures and their numbers as files: a png, a pdf, and the csv of what is plotted."""

import os
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from patchsae import config
from patchsae.figures.canvas import png
from patchsae.weights.files import write_atomically


def save(figure: Figure, profile, name: str, table: pd.DataFrame) -> None:
    """Write ``<name>.png``, ``.pdf`` and ``.csv`` (the numbers plotted) into the profile's figures folder.

    The same figure gives the same bytes: no file holds a date or a version. Where the environment variable
    ``PATCHSAE_MANIFEST`` names a file, the paths written are appended to it, one a line.
    """
    nothing = dict.fromkeys(("CreationDate", "Creator", "Producer"))
    _written(write_atomically(profile.figures_dir / f"{name}.png", lambda path: path.write_bytes(png(figure))))
    _written(write_atomically(profile.figures_dir / f"{name}.pdf", lambda path: figure.savefig(
        path, format="pdf", metadata=nothing)))
    save_table(profile, name, table)


def save_table(profile, name: str, table: pd.DataFrame) -> None:
    """Write ``<name>.csv`` into the profile's figures folder, numbers to six digits."""
    _written(write_atomically(profile.figures_dir / f"{name}.csv", lambda path: table.to_csv(
        path, index=False, float_format="%.6g", lineterminator="\n")))


def _written(path: Path) -> None:
    """Append a path to the manifest that the environment variable names, if it does."""
    if manifest := os.environ.get("PATCHSAE_MANIFEST"):
        inside = path.relative_to(config.ROOT) if path.is_relative_to(config.ROOT) else path
        with open(manifest, "a", encoding="utf-8") as lines:
            lines.write(f"{inside.as_posix()}\n")
