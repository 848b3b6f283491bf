"""Options of parameter groups: which values they may have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, Literal

import torch

from detente.methods.arguments import one_of

Role = Literal["shared", "task-specific"]
ROLES: tuple[Role, Role] = ("shared", "task-specific")


def check_options(options: Mapping[str, Any]) -> None:
    """See that the options every group has are in range.

    Raises:
        ValueError: one is not; it is named.
        TypeError: one is no number; it is named.

    Example:
        >>> check_options({"lr": -1.0})
        Traceback (most recent call last):
        ...
        ValueError: option lr is -1.0; give a finite number >= 0.
    """
    for name in ("lr", "eps", "weight_decay"):
        value = number(name, options.get(name, 0.0))
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"option {name} is {options[name]}; give a finite number >= 0.")
    betas = options.get("betas", (0.0, 0.0))
    if not isinstance(betas, (tuple, list)):
        raise TypeError(f"option betas is {betas!r}; give two numbers in [0, 1).")
    if len(betas) != 2 or not all(0 <= number("betas", beta) < 1 for beta in betas):
        raise ValueError(f"option betas is {betas}; give two numbers in [0, 1).")
    one_of("role", options.get("role", ROLES[0]), ROLES)


def number(option: str, value: Any) -> float:
    """``value`` as a float; a tensor of one entry is a number too.

    Raises:
        TypeError: it is none; the option is named.

    Example:
        >>> number("lr", torch.tensor(0.5))
        0.5
    """
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"option {option} is {value!r}; give a number.")
    return float(value)
