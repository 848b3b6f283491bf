"""Check options: one of some choices, a number in a range, a whole number. No method lives here."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch

Choice = TypeVar("Choice")


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
