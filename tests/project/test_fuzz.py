"""Some of the cases of ``make fuzz``, and what arguments are checked for."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
import torch
from conftest import refused

from patchsae.data.checks import Layer, Natural, Pixels, SomeOf, Template, Words, checked, indices

TOOL = Path(__file__).parents[2] / "tools" / "fuzz.py"


def test_some_cases_end_well():
    done = subprocess.run([sys.executable, TOOL, "--part", "150", "--seed", "3"], capture_output=True, text=True)
    assert re.search(r"^FUZZ 150 cases, \d+ answers, \d+ sentences, 0 failures$", done.stdout, re.M), (
        done.stdout + done.stderr[-1000:])


@pytest.mark.parametrize("kind, good, bad", [
    (Natural, [1, np.int64(3)], [0, -1, 1.0, True, "1", None, 10**13, [1]]),
    (Layer, [-2, 0], [64, -65, 0.5]),
    (float, [0, 0.5, np.float32(1)], [float("nan"), float("inf"), True, "0.5"]),
    (bool, [True], [1, "yes", None]),
    (Path, ["a/b", Path("a")], ["", "a\0b", "x" * 300, 3, b"a"]),
    (Words, [["a"], ("a", "b")], ["a", [], ["a", 3], b"a", {"a": 1}]),
    (Template, ["a {}."], ["a", "{}{}", "{x}"]),
    (Literal["all", "cls"], ["all"], ["none", "", 1, None]),
    (int | None, [3], ["3", 3.5]),
    (Sequence[int], [[1, 2], range(3)], ["12", [1.5], [True]]),
    (Pixels, [torch.zeros(2, 3, 4, 4)], [torch.zeros(2, 3, 4, 5), torch.zeros(3, 4, 4), torch.zeros(0, 3, 4, 4),
                                         torch.zeros(2, 3, 4, 4).int(), np.zeros((2, 3, 4, 4), np.float32)]),
    (Annotated[np.ndarray, "uint8 L,L"], [np.zeros((2, 2), np.uint8)], [np.zeros((2, 2)), np.zeros((2, 3), np.uint8)])])
def test_arguments_are_of_the_kind_that_is_named(kind, good, bad):
    def same(x):
        return x

    same.__annotations__["x"] = kind
    same = checked(same)
    for value in good:
        found = same(value)
        assert str(found) == str(value) if kind is Path else np.all(np.asarray(found) == np.asarray(value))
    for value in bad:
        with refused("argument x of "):
            same(value)


def test_letters_are_one_number_throughout_a_call_and_that_of_the_model():
    class Model:
        """Knows its sizes."""

        n_latents = 4

        def fingerprint(self):
            """Models have one."""

    @checked
    def use(model: Model, some: SomeOf, a: Annotated[torch.Tensor, "B,K"], b: Annotated[torch.Tensor, "...,B"]):
        return True

    assert use(Model(), torch.tensor([0, 3]), torch.zeros(3, 2), torch.zeros(5, 3))
    for wrong in ((torch.tensor([0, 4]), torch.zeros(3, 2), torch.zeros(5, 3)),
                  (torch.tensor([0, 3]), torch.zeros(3, 3), torch.zeros(5, 3)),
                  (torch.tensor([0, 3]), torch.zeros(3, 2), torch.zeros(5, 2)),
                  (torch.tensor([0, 3]), torch.zeros(3, 2), torch.zeros(5, 3).double())):
        with refused("argument "):
            use(Model(), *wrong)


def test_arrays_of_negative_strides_are_the_same_array():
    @checked
    def strides(x: np.ndarray):
        return torch.from_numpy(x)

    assert strides(np.arange(3)[::-1]).tolist() == [2, 1, 0]


@pytest.mark.parametrize("values", [[-1], [5], [1.5], [True, 0], "12", [[1]], [None], None, [float("nan")]])
def test_positions_that_are_not_there_are_refused(values):
    with refused("positions"):
        indices(values, 5, "positions")
    assert indices([4, 0], 5, "positions").tolist() == [4, 0] and indices(3, 5, "positions") == 3
    assert indices(slice(3), 5, "positions").tolist() == [0, 1, 2] and len(indices([], 5, "positions")) == 0
