"""Check options: one of some choices, a number in a range, numbers by task, a known name. No method lives here."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

import numpy as np
import torch

Choice = TypeVar("Choice")
Preference = Mapping[str, float] | Sequence[float] | None
ByTask = dict[str, float] | tuple[float, ...]


class NotANumber(TypeError, ValueError):
    """An option takes a number and was given something else.

    Example:
        >>> number("lr", "0.1", above=0)
        Traceback (most recent call last):
        ...
        detente.methods.options.NotANumber: option lr is '0.1'; give a number > 0.
    """


def one_of(option: str, value: Choice, choices: Sequence[Any]) -> Choice:
    """Return ``value`` if it is one of ``choices``.

    Raises:
        ValueError: it is not; the option and the choices are named.

    Example:
        >>> one_of("solver", "exact", ("exact", "frank-wolfe"))
        'exact'
    """
    if value not in choices:
        raise ValueError(f"option {option} is {value!r}; choose one of {', '.join(map(repr, choices))}.")
    return value


def near(name: str, known: Iterable[str]) -> str:
    """Return a question that suggests the known name nearest to an unknown one; empty where none is near.

    Example:
        >>> near("mgdaa", ["mgda", "upgrad"])
        "did you mean 'mgda'? "
    """
    close = get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def number(
    option: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> float:
    """Return ``value`` as a finite float > ``above``, >= ``least``, < ``below`` and <= ``most``; None bounds nothing.

    Args:
        option: its name, for messages.
        value: a number; also one of numpy's, or a tensor [] or [1].
        above, least: the lower bound, at most one of them.
        below, most: the upper bound, at most one of them.

    Raises:
        NotANumber: it is no number, or a truth value; the option and the bounds are named.
        ValueError: it is out of that range, or not finite; the same are named.

    Example:
        >>> number("beta", 1.0, least=0, below=1)
        Traceback (most recent call last):
        ...
        ValueError: option beta is 1.0; give a number in [0, 1).
    """
    if not is_number(value):
        raise NotANumber(
            f"option {option} is {value!r}; give a number{_range_text(above, least, below, most)}."
        )
    given = float(value)
    if (
        not math.isfinite(given)
        or (above is not None and given <= above)
        or (least is not None and given < least)
        or (below is not None and given >= below)
        or (most is not None and given > most)
    ):
        span = _range_text(above, least, below, most)
        kind = "a number" if span.startswith(" in ") else "a finite number"
        raise ValueError(f"option {option} is {value}; give {kind}{span}.")
    return given


def whole(option: str, value: Any, *, least: int | None = None) -> int:
    """Return ``value`` as an int >= ``least``; None bounds nothing.

    Raises:
        ValueError: it is none (a truth value and 5.0 are none); the option and the bound are named.

    Example:
        >>> whole("max_trials", 0, least=1)
        Traceback (most recent call last):
        ...
        ValueError: option max_trials is 0; give a whole number >= 1.
    """
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not integral or (least is not None and value < least):
        bound = "" if least is None else f" >= {least}"
        raise ValueError(f"option {option} is {value!r}; give a whole number{bound}.")
    return int(value)


def whole_or_none(option: str, value: Any, *, least: int | None = None) -> int | None:
    """Return what :func:`whole` does; None stays None.

    Raises:
        ValueError: as :func:`whole`.

    Example:
        >>> whole_or_none("epoch_steps", None, least=1) is None
        True
    """
    return None if value is None else whole(option, value, least=least)


def by_task(option: str, values: Mapping[str, Any] | Sequence[Any], *, least: float | None = None) -> ByTask:
    """Return one finite number >= ``least`` for each task, by name or by position, copied.

    Raises:
        ValueError: a number is out of range; the option and the task are named.
        TypeError: it is neither a mapping nor a sequence, or holds something that is no number; named alike.

    Example:
        >>> by_task("epsilon", {"left": 0.1, "right": -0.1}, least=0)
        Traceback (most recent call last):
        ...
        ValueError: option epsilon of task 'right' is -0.1; give a finite number >= 0.
    """
    if isinstance(values, Mapping):
        named = {str(name): value for name, value in values.items()}
        return {
            name: number(f"{option} of task {name!r}", value, least=least) for name, value in named.items()
        }
    one_axis = isinstance(values, np.ndarray | torch.Tensor) and values.ndim == 1
    if not one_axis and (not isinstance(values, Sequence) or isinstance(values, str | bytes)):
        raise TypeError(
            f"option {option} is {values!r}; give one number for each task, as a mapping by name or a sequence by "
            "position."
        )
    return tuple(
        number(f"{option} of task '{place}'", value, least=least) for place, value in enumerate(values)
    )


def check_preference(option: str, values: Preference) -> ByTask | None:
    """Return non-negative finite numbers by task, not all zero, copied; None stays None.

    Raises:
        ValueError: a number is negative or not finite, or all are zero; the option is named.
        TypeError: as :func:`by_task`.

    Example:
        >>> check_preference("preference", [1, 3])
        (1.0, 3.0)
    """
    if values is None:
        return None
    checked = by_task(option, values, least=0)
    if not any(checked.values() if isinstance(checked, dict) else checked):
        raise ValueError(f"{option} is zero for every task; at least one must be positive.")
    return checked


def weight_by_name(
    values: Mapping[str, float] | Sequence[float] | None, names: Sequence[str], option: str
) -> np.ndarray | None:
    """Return ``values`` as float64 [len(names)] in the order of ``names``; None stays None.

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


def is_number(value: Any) -> bool:
    """Tell whether ``value`` is a real number: also one of numpy's or a tensor [] or [1], but no truth value.

    Example:
        >>> is_number(torch.tensor(0.5)), is_number(True), is_number("0.5")
        (True, False, False)
    """
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.shape in ((), (1,)) and is_number(value.item())
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def _range_text(above: float | None, least: float | None, below: float | None, most: float | None) -> str:
    lower = above if least is None else least
    upper = below if most is None else most
    if lower is not None and upper is not None:
        return f" in {'(' if least is None else '['}{lower:g}, {upper:g}{')' if most is None else ']'}"
    if lower is not None:
        return f" {'>' if least is None else '>='} {lower:g}"
    return "" if upper is None else f" {'<' if most is None else '<='} {upper:g}"
