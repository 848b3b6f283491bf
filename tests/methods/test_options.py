"""Checks of options: what they take, what they return, and what they say of the rest."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from detente.methods.options import by_task, number, one_of, whole, whole_or_none

BOUNDS: list[tuple[dict[str, float], list[float], list[float], str]] = [
    ({}, [-1e300, 0.0, 2.5], [], "a finite number"),
    ({"above": 0}, [1e-300, 3.0], [0.0, -1.0], "a finite number > 0"),
    ({"least": 1}, [1.0, 3.0], [0.999], "a finite number >= 1"),
    ({"below": 1}, [0.999, -5.0], [1.0], "a finite number < 1"),
    ({"most": 2}, [2.0, -5.0], [2.001], "a finite number <= 2"),
    ({"least": 0, "below": 1}, [0.0, 0.999], [1.0, -1e-9], "a number in [0, 1)"),
    ({"above": 0, "most": 1}, [1e-9, 1.0], [0.0, 1.001], "a number in (0, 1]"),
    ({"above": 0, "below": 1}, [0.5], [0.0, 1.0], "a number in (0, 1)"),
    ({"least": 0, "most": 1}, [0.0, 1.0], [-0.1, 1.1], "a number in [0, 1]"),
]


@pytest.mark.parametrize(("bounds", "inside", "outside", "words"), BOUNDS, ids=lambda value: str(value))
def test_a_number_lies_within_its_bounds(
    bounds: dict[str, float], inside: list[float], outside: list[float], words: str
) -> None:
    for value in inside:
        assert number("rate", value, **bounds) == value
    for value in (*outside, math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError) as raised:
            number("rate", value, **bounds)
        assert str(raised.value) == f"option rate is {value}; give {words}."


@pytest.mark.parametrize(
    "value", [3, np.float32(3), np.int64(3), torch.tensor(3.0), torch.tensor([3]), np.array(3.0)]
)
def test_numbers_of_other_libraries_become_floats(value: Any) -> None:
    found = number("rate", value, least=0)
    assert type(found) is float and found == 3.0


@pytest.mark.parametrize(
    "value", [None, True, np.True_, "3", 1j, [3.0], torch.ones(2), torch.ones(1, 1), torch.tensor(True)]
)
def test_what_is_no_number_is_of_the_wrong_type_and_value(value: Any) -> None:
    for error in (TypeError, ValueError):
        with pytest.raises(error, match=r"option rate is .*; give a number > 1\.$"):
            number("rate", value, above=1)


def test_whole_numbers() -> None:
    assert whole("steps", np.int64(4), least=1) == 4 and type(whole("steps", np.int64(4))) is int
    assert whole("seed", -3) == -3
    assert whole_or_none("steps", None, least=1) is None and whole_or_none("steps", 2, least=1) == 2
    for bad in (0, -1, 2.0, 2.5, True, np.True_, "2", None, math.nan):
        with pytest.raises(ValueError, match=r"option steps is .*; give a whole number >= 1\."):
            whole("steps", bad, least=1)
    with pytest.raises(ValueError, match=r"option seed is 1\.0; give a whole number\."):
        whole_or_none("seed", 1.0)


def test_one_of_the_choices() -> None:
    assert one_of("form", "b", ("a", "b")) == "b"
    with pytest.raises(ValueError, match="option form is 'c'; choose one of 'a', 'b'"):
        one_of("form", "c", ("a", "b"))


def test_numbers_by_task() -> None:
    given = {"a": 1, 2: 0.5}
    assert by_task("ideal", given) == {"a": 1.0, "2": 0.5}
    assert by_task("ideal", np.array([1, -2])) == (1.0, -2.0)
    assert by_task("ideal", torch.tensor([0.5])) == (0.5,)
    with pytest.raises(ValueError, match=r"option ideal of task '1' is -2; give a finite number >= 0"):
        by_task("ideal", [1, -2], least=0)
    with pytest.raises(TypeError, match="option ideal of task 'a' is None; give a number"):
        by_task("ideal", {"a": None})
    for odd in ("12", b"12", 3.0, {0.1}, (x for x in (1, 2)), np.ones((2, 2)), torch.ones(1, 1)):
        with pytest.raises(TypeError, match=r"(?s)option ideal is .*; give one number for each task"):
            by_task("ideal", odd)  # type: ignore[arg-type]
