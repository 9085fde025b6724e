"""Tables of many runs: only what is missing is computed, and a killed run ends in the bytes of one that was not."""

import numpy as np
import pandas as pd
import pytest
from conftest import one_sentence

from patchsae import open_study
from patchsae.studies import adaptation_sweep, recovery_sweep, sweep
from patchsae.studies.adapt import adapted_model, kept_folder
from patchsae.studies.study import committed_folder
from patchsae.studies.tables import Group, fill, read
from patchsae.weights.files import result_key


class Killed(Exception):
    """Stands for a process that ends at once."""


def groups_of(names, asked, version=1, dies_at=None):
    """One group of rows in two files for each name; floats, text that looks like numbers, and what is not there."""
    def rows(i, name):
        if len(asked) == dies_at:
            raise Killed
        asked.append(name)
        first = pd.DataFrame({"value": [i / 3, np.nan], "text": ["01", "a, b"]})
        return [first if i else first.drop(columns="text"), pd.DataFrame({str(k): [k + i / 7] for k in range(3)})]

    return [Group({"name": name, "seed": i}, result_key(version, name=name), lambda i=i, name=name: rows(i, name))
            for i, name in enumerate(names)]


@pytest.fixture
def files(tmp_path):
    return [tmp_path / "one.csv", tmp_path / "two.csv"]


def test_only_missing_groups_are_computed_and_others_dropped(files):
    asked = []
    fill(files, groups_of("abc", asked))
    whole = [path.read_bytes() for path in files]
    assert asked == ["a", "b", "c"] and len(pd.read_csv(files[0])) == 6
    fill(files, groups_of("abc", asked))
    assert asked == ["a", "b", "c"] and whole == [path.read_bytes() for path in files]
    fill(files, groups_of("abcd", asked)[1:])
    assert asked == ["a", "b", "c", "d"] and set(pd.read_csv(files[1])["name"]) == {"b", "c", "d"}
    fill(files, groups_of("abc", asked, version=2))
    assert asked[4:] == ["a", "b", "c"]
    table = pd.read_csv(files[0], dtype=str)
    assert table.columns.tolist() == ["name", "seed", "key", "value", "text"]
    assert table["text"].dropna().tolist() == ["01", "a, b"] * 2


@pytest.mark.parametrize("dies_at", range(4))
def test_a_killed_run_goes_on_to_the_same_bytes(files, tmp_path, dies_at):
    whole = [tmp_path / "whole" / path.name for path in files]
    fill(whole, groups_of("abcd", []))
    with pytest.raises(Killed):
        fill(files, groups_of("abcd", [], dies_at=dies_at))
    asked = []
    fill(files, groups_of("abcd", asked))
    assert asked == list("abcd")[dies_at:]
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in whole]


@pytest.mark.parametrize("written", range(6))
def test_a_run_killed_between_its_files_goes_on_to_the_same_bytes(files, tmp_path, monkeypatch, written):
    from patchsae.studies import tables

    whole, count, write = [tmp_path / "whole" / path.name for path in files], [], tables.write_atomically
    fill(whole, groups_of("abc", []))

    def dying(path, content):
        if len(count) == written:
            raise Killed
        count.append(path)
        write(path, content)

    monkeypatch.setattr(tables, "write_atomically", dying)
    with pytest.raises(Killed):
        fill(files, groups_of("abc", []))
    monkeypatch.setattr(tables, "write_atomically", write)
    fill(files, groups_of("abc", []))
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in whole]


def test_what_is_read_says_whether_it_is_of_these_settings(files):
    for table in read(files, groups_of("abc", []), "this makes it"):
        assert table.empty and table.attrs == {"current": False, "note": "There is no one.csv here; this makes it."}
    asked = []
    fill(files, groups_of("abc", asked))
    for table in read(files, groups_of("abc", asked), "this makes it"):
        assert len(table) and table.attrs == {"current": True, "note": ""}
    changed = [*groups_of("abc", asked)[:1], *groups_of("abc", asked, version=2)[1:]]
    before = [path.read_bytes() for path in files]
    shown = read(files, changed, "this makes it")[0]
    assert not shown.attrs["current"] and "2 of its 3 runs" in shown.attrs["note"] and one_sentence(shown.attrs["note"])
    assert asked == ["a", "b", "c"] and before == [path.read_bytes() for path in files]


def test_a_damaged_table_is_one_sentence(files):
    for path, content in zip(files, ("", "other,columns\n1,2\n")):
        path.write_text(content)
    with pytest.raises(ValueError, match="cannot be read") as error:
        fill(files, groups_of("a", []))
    assert one_sentence(error.value)


def test_the_committed_tables_and_models_are_those_of_the_mini_profile():
    """What is committed is found under its keys: with these settings nothing is computed or trained again."""
    study = open_study("mini")
    shown = [*recovery_sweep.tables(study), *adaptation_sweep.tables(study).values()]
    shown.append(sweep.table2(study, pd.DataFrame()))
    assert [table.attrs for table in shown] == [{"current": True, "note": ""}] * 7
    small = [recipe for recipe in adaptation_sweep.recipes(study)["accuracy"] if recipe.method in adaptation_sweep.KEPT]
    assert len(small) == 54 and all(kept_folder(recipe).parent.parent == study.profile.data_dir for recipe in small)
    far = adapted_model(small[0]._replace(task="aerial")).tower
    for profile, clip in [(study.profile, study.clip), (study.next_seed().profile, study.clip), (study.profile, far)]:
        assert (committed_folder(profile, clip) / "sae.safetensors").is_file()
