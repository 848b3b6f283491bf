"""Options of parameter groups: which values they may have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from detente.methods.options import number, one_of

Role = Literal["shared", "task-specific"]
ROLES: tuple[Role, Role] = ("shared", "task-specific")


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that every group has and that are out of range.

    Raises:
        ValueError: one is; it is named. Also where it is no number.
        TypeError: ``betas`` is no pair.

    Example:
        >>> check_options({"lr": -1.0})
        Traceback (most recent call last):
        ...
        ValueError: option lr is -1.0; give a finite number >= 0.
    """
    for name in ("lr", "eps", "weight_decay"):
        number(name, options.get(name, 0.0), least=0)
    betas = options.get("betas", (0.0, 0.0))
    if not isinstance(betas, (tuple, list)):
        raise TypeError(f"option betas is {betas!r}; give two numbers in [0, 1).")
    if len(betas) != 2:
        raise ValueError(f"option betas is {betas}; give two numbers in [0, 1).")
    for beta in betas:
        number("betas", beta, least=0, below=1)
    one_of("role", options.get("role", ROLES[0]), ROLES)
