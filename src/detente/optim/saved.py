"""A saved state held against the optimizer that is to go on from it, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from detente.optim.options import ROLES

_ADVICE = "Give what state_dict() of such an optimizer returned. Nothing was changed."


def check_kind(saved: Any, kind: str) -> None:
    """Refuse what is not the state of an optimizer of the class ``kind``.

    Raises:
        TypeError: it is no mapping.
        ValueError: it is of another class, or incomplete.

    Example:
        >>> check_kind({"optimizer": "MTAdam"}, "MAO")
        Traceback (most recent call last):
        ...
        ValueError: the saved state is of MTAdam, not of MAO.
    """
    if not isinstance(saved, Mapping):
        raise TypeError(f"the saved state is a {type(saved).__name__}, not a mapping. {_ADVICE}")
    found = saved.get("optimizer")
    if found != kind:
        raise ValueError(f"the saved state is of {found or 'another optimizer'}, not of {kind}.")
    for key in ("param_groups", "state"):
        if key not in saved:
            raise ValueError(f"the saved state has no {key!r}. {_ADVICE}")


def check_moments(
    saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], name_of: Callable[[torch.Tensor], str]
) -> None:
    """Refuse other groups: they must have the same roles and sizes, every tensor the shape of its parameter.

    torch checks the sizes alone, and kernels do not look at shapes at all: moments of others would be read and written
    beyond their memory.

    Args:
        saved: a state that :func:`check_kind` let pass.
        groups: of the optimizer.
        name_of: gives a parameter's name, for messages.

    Raises:
        ValueError: something differs; it is named.
    """
    roles, ours = ([group.get("role") for group in some] for some in (saved["param_groups"], groups))
    if roles != ours:
        raise ValueError(
            f"the saved state has groups with the roles {', '.join(map(str, roles))}; this optimizer has "
            f"{', '.join(map(str, ours))}."
        )
    for number, (theirs, group) in enumerate(zip(saved["param_groups"], groups, strict=True)):
        if len(theirs["params"]) != len(group["params"]):
            raise ValueError(
                f"group {number} ({group['role']}) of the saved state has {len(theirs['params'])} parameters; this "
                f"optimizer's has {len(group['params'])}. Nothing was changed."
            )
    keys = chain.from_iterable(group["params"] for group in saved["param_groups"])
    parameters = [(parameter, group["role"]) for group in groups for parameter in group["params"]]
    for key, (parameter, role) in zip(keys, parameters, strict=True):
        kept = saved["state"].get(key, {})
        if not kept:
            continue  # no loss had reached it
        if role == ROLES[1]:
            _check_tensors(kept, ("step", "exp_avg", "exp_avg_sq"), parameter, name_of(parameter), "")
            continue
        for task, moments in kept.items():
            _check_tensors(
                moments, ("step", "exp_avg_sq"), parameter, name_of(parameter), f" of task {task!r}"
            )


def _check_tensors(
    moments: Any, needed: Sequence[str], parameter: torch.Tensor, name: str, whose: str
) -> None:
    lacking = [key for key in needed if not isinstance(moments, Mapping) or key not in moments]
    if lacking:
        raise ValueError(f"the saved state of parameter {name}{whose} has no {lacking[0]!r}. {_ADVICE}")
    for key, value in moments.items():
        if isinstance(value, torch.Tensor) and key != "norm" and value.shape != parameter.shape:
            raise ValueError(
                f"parameter {name} has the shape {list(parameter.shape)}, and its saved {key}{whose} "
                f"{list(value.shape)}: the state is of another network. Nothing was changed."
            )


def check_current(
    state: Mapping[torch.Tensor, Mapping[str, Any]],
    group_of: Mapping[torch.Tensor, Mapping[str, Any]],
    name_of: Callable[[torch.Tensor], str],
) -> None:
    """Refuse parameters of another shape or device than their moments: kernels do not look.

    Raises:
        ValueError: something differs; the parameter is named.
    """
    for parameter, group in group_of.items():
        kept = state.get(parameter, {})
        shape, device = parameter.shape, parameter.device
        for moments in [kept] if kept and group["role"] == ROLES[1] else kept.values():
            square = moments["exp_avg_sq"]
            if square.shape != shape or moments.get("exp_avg", square).shape != shape:
                raise misfit(name_of(parameter))
            if square.device != device:
                raise ValueError(
                    f"parameter {name_of(parameter)} is on {device}, and its moments on {square.device}. Let them "
                    "follow with optimizer.load_state_dict(optimizer.state_dict()). Nothing was changed."
                )


def misfit(name: str) -> ValueError:
    """Make the error of a parameter whose shape has changed."""
    return ValueError(
        f"parameter {name} has another shape than its moments or its gradient. Make a new optimizer, or delete "
        "optimizer.state[parameter], and compute the losses after the change. The parameters were not changed."
    )


def fit(parameter: torch.Tensor, moments: dict[str, Any]) -> None:
    """Lay loaded moments out as fresh ones are: the kernels walk through the memory of all of them side by side."""
    strides = torch.empty_like(parameter, device="meta").stride()
    for key, value in moments.items():
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.stride() != strides:
            moments[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
