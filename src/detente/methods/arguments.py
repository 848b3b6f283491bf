"""Names of tasks, numbers by task, choices: what a method is given, checked; no method lives here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from detente.methods.options import one_of as one_of

Preference = Mapping[str, float] | Sequence[float] | None


@cache
def positional(tasks: int) -> tuple[str, ...]:
    """The names of unnamed tasks: their positions.

    Example:
        >>> positional(2)
        ('0', '1')
    """
    return tuple(str(position) for position in range(tasks))


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
        ValueError: there are none, or one occurs twice.

    Example:
        >>> check_names(["left", "right"])
        ('left', 'right')
    """
    names = tuple(str(name) for name in names)
    if not names:
        raise ValueError("no tasks: give at least one task name or loss.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"task {twice!r} occurs twice; task names must differ.")
    return names


def check_preference(option: str, values: Preference) -> dict[str, float] | tuple[float, ...] | None:
    """A mapping or sequence of non-negative finite numbers, not all zero, copied; None stays None.

    Raises:
        ValueError: a number is negative or not finite, or all are zero; the option is named.

    Example:
        >>> check_preference("preference", [1, 3])
        (1.0, 3.0)
    """
    if values is None:
        return None
    checked: dict[str, float] | tuple[float, ...]
    if isinstance(values, Mapping):
        checked = {str(name): float(value) for name, value in values.items()}
        numbers = list(checked.items())
    else:
        checked = tuple(float(value) for value in values)
        numbers = [(str(position), value) for position, value in enumerate(checked)]
    for name, value in numbers:
        if not np.isfinite(value) or value < 0:
            raise ValueError(f"{option} of task {name!r} is {value}; it must be a finite number >= 0.")
    if not any(value > 0 for _, value in numbers):
        raise ValueError(f"{option} is zero for every task; at least one must be positive.")
    return checked


def weight_by_name(
    values: Mapping[str, float] | Sequence[float] | None, names: Sequence[str], option: str
) -> np.ndarray | None:
    """[len(names)] float64 of ``values`` in the order of ``names``; None stays None.

    Raises:
        ValueError: a task has no value, a value has no task, or the count differs.

    Example:
        >>> weight_by_name({"a": 1.0, "b": 2.0}, ("b", "a"), "preference")
        array([2., 1.])
    """
    if values is None:
        return None
    if isinstance(values, Mapping):
        missing = [name for name in names if name not in values]
        unknown = [name for name in values if name not in names]
        if missing:
            raise ValueError(
                f"{option} names no value for task {missing[0]!r}; it names {', '.join(values)}."
            )
        if unknown:
            raise ValueError(
                f"{option} names the unknown task {unknown[0]!r}; the tasks are {', '.join(names)}."
            )
        return np.array([values[name] for name in names], dtype=np.float64)
    if len(values) != len(names):
        raise ValueError(f"{option} has {len(values)} values for {len(names)} tasks ({', '.join(names)}).")
    return np.array(values, dtype=np.float64)
