"""Tables of many runs, filled group by group: what is there is not computed again, and a killed run goes on.

Committed tables are filled by ``make mini-artifacts`` alone; notebooks read them, and fill small ones of their own in
the profile's run folder.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from patchsae.config import Profile
from patchsae.weights.files import write_atomically


class Group(NamedTuple):
    """Rows that are computed together, in each of a study's files.

    ``names``: column -> value, what the rows are known by; ``key``: what decides them (``result_key``); ``compute``:
    gives the rows, a table a file; ``trains``: the profile whose autoencoder they are of, where it is a trained one.
    """

    names: dict[str, str | int]
    key: str
    compute: Callable[[], Sequence[pd.DataFrame]]
    trains: Profile | None = None

    @property
    def label(self) -> tuple[str, ...]:
        """Names and key as they stand in a file."""
        return (*map(str, self.names.values()), self.key)


def fill(files: Sequence[Path], groups: Sequence[Group]) -> None:
    """Compute the groups that the files lack, in order, and write the files after each; rows of others are dropped.

    What is there stays as it is written, so that a run that was killed ends in the same bytes as one that was not.
    """
    kept = _kept(files, groups)
    for place, group in enumerate(groups):
        if place not in kept:
            kept[place] = [_as_text(rows, group) for rows in group.compute()]
            _write(files, [kept[i] for i in sorted(kept)])
            print(f"{files[0].name}: {', '.join(group.label[:-1])}", flush=True)
    _write(files, [kept[i] for i in sorted(kept)])


def missing(files: Sequence[Path], groups: Sequence[Group]) -> list[Group]:
    """The groups that the files lack."""
    kept = _kept(files, groups)
    return [group for place, group in enumerate(groups) if place not in kept]


def read(files: Sequence[Path], groups: Sequence[Group], advice: str) -> list[pd.DataFrame]:
    """The tables as they are, empty where they are not there, noted as by ``noted``; ``advice``: from ``remedy``."""
    lacking, name, there = len(missing(files, groups)), files[0].name, files[0].is_file()
    what = (f"{name} is shown as it is: {lacking} of its {len(groups)} runs are of other settings than this profile's, "
            "or not made yet") if there else f"There is no {name} here"
    note = f"{what}; {advice}." if lacking else ""
    return [noted(pd.read_csv(path) if there else pd.DataFrame(), not lacking, note) for path in files]


def noted(table: pd.DataFrame, current: bool, note: str) -> pd.DataFrame:
    """The table with ``attrs["current"]``, whether all of it is of the profile's settings, and ``attrs["note"]``, a
    sentence where it is not."""
    table.attrs = {"current": current, "note": note}
    return table


def remedy(profile: Profile, minutes: float) -> str:
    """What makes a profile's committed tables, and how long that takes."""
    time = f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{max(1, round(minutes))} minutes"
    return (f"`make mini-artifacts PROFILE={profile.name}` makes it, in about {time} if its images, model and "
            "trainings are as small as those of mini")


def _kept(files: Sequence[Path], groups: Sequence[Group]) -> dict[int, list[pd.DataFrame]]:
    """Place of a group -> its rows in each file, of the groups that are in all of them."""
    if not groups or not all(path.is_file() for path in files):
        return {}
    columns = [*groups[0].names, "key"]
    try:
        rows = [_as_written(path).groupby(columns, sort=False) for path in files]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{files[0].parent} has a table that cannot be read ({error}); restore it.") from error
    return {place: [table.get_group(group.label) for table in rows] for place, group in enumerate(groups)
            if all(group.label in table.groups for table in rows)}


def _as_written(source) -> pd.DataFrame:
    """A table whose every value is the text in the file."""
    return pd.read_csv(source, dtype=str, keep_default_na=False)


def _as_text(rows: pd.DataFrame, group: Group) -> pd.DataFrame:
    """Rows as they are in a file, names and key in front."""
    labels = pd.DataFrame([{**group.names, "key": group.key}])
    return _as_written(io.StringIO(labels.merge(rows, how="cross").to_csv(index=False)))


def _write(files: Sequence[Path], kept: Sequence[Sequence[pd.DataFrame]]) -> None:
    for path, parts in zip(files, zip(*kept)):
        table = pd.concat(parts, ignore_index=True)
        write_atomically(path, lambda temporary, table=table: table.to_csv(temporary, index=False))
