"""Reading and checking what a search is given."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from detente.autograd.partition import as_tensors
from detente.methods import Method


def check_method(method: Any, space: str) -> Method:
    """The method, if it can be solved where the search is.

    Raises:
        TypeError: it is no method.
        ValueError: it cannot be solved in that space.
    """
    if not isinstance(method, Method):
        hint = f" Create it first: detente.create({method!r})." if isinstance(method, str) else ""
        raise TypeError(f"method is a {type(method).__name__}, not a detente method.{hint}")
    if space not in method.declares.spaces:
        raise ValueError(
            f"method {method.declares.name} cannot be solved in the space {space!r}, where this search needs its "
            f"direction; it runs on {', '.join(sorted(method.declares.spaces))}."
        )
    return method


def in_range(
    option: str, value: float, *, above: float = 0.0, below: float = math.inf, least: float | None = None
) -> float:
    """``value`` as a finite number in (above, below), or in [least, below).

    Raises:
        ValueError: it is not; the option is named.

    Example:
        >>> in_range("gamma", 1.0, above=1)
        Traceback (most recent call last):
        ...
        ValueError: option gamma is 1.0; give a finite number > 1.
    """
    number = not isinstance(value, bool) and isinstance(value, numbers.Real)
    if not (number and math.isfinite(value) and (value > above if least is None else value >= least)):
        bound = f"> {above:g}" if least is None else f">= {least:g}"
        upper = "" if math.isinf(below) else f" and < {below:g}"
        raise ValueError(f"option {option} is {value!r}; give a finite number {bound}{upper}.")
    if not value < below:
        raise ValueError(f"option {option} is {value!r}; give a number between {above:g} and {below:g}.")
    return float(value)


def whole(option: str, value: int, *, least: int) -> int:
    """``value`` as a whole number >= ``least``.

    Raises:
        ValueError: it is none; the option is named.

    Example:
        >>> whole("max_trials", 20, least=1)
        20
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"option {option} is {value!r}; give a whole number >= {least}.")
    return int(value)


def kept(parameters: Any) -> Any:
    """Parameters as they were given, with every iterable read once: some are generators, and each step reads them."""
    if isinstance(parameters, Mapping):
        return {name: kept(entry) for name, entry in parameters.items()}
    if hasattr(parameters, "shape") or isinstance(parameters, (nn.Module, str, bytes)):
        return parameters
    return [kept(entry) for entry in parameters] if isinstance(parameters, Iterable) else parameters


def modules_in(parameters: Any) -> list[nn.Module]:
    """The modules among parameters."""
    if isinstance(parameters, nn.Module):
        return [parameters]
    if isinstance(parameters, Mapping):
        parameters = list(parameters.values())
    return (
        [module for entry in parameters for module in modules_in(entry)]
        if isinstance(parameters, list)
        else []
    )


def check_modules(modules: Any) -> list[nn.Module]:
    """The modules whose buffers the caller names; None names none.

    Raises:
        TypeError: an entry is no module.
    """
    named = [] if modules is None else [modules] if isinstance(modules, nn.Module) else list(modules)
    for entry in named:
        if not isinstance(entry, nn.Module):
            raise TypeError(f"modules= takes modules, got {type(entry).__name__}.")
    return named


def check_roles(shared: Any, task_specific: Any) -> None:
    """See that no parameter is both.

    Raises:
        TypeError: an entry is neither a tensor nor a module; the option is named.
        ValueError: a parameter has both roles, or nothing shared is named.
    """
    trunk, own = as_tensors(shared, "shared"), as_tensors(task_specific, "task_specific")
    if not trunk:
        raise ValueError("shared= is empty; name the parameters that the tasks share.")
    both = [tensor for tensor in own if any(tensor is other for other in trunk)]
    if both:
        shape = tuple(both[0].shape)
        told = f"{len(both)} parameters (the first has shape {shape}) are"
        raise ValueError(
            f"{told if len(both) > 1 else f'a parameter of shape {shape} is'} named in shared= and in task_specific=; "
            "each has one role. Of tied weights, which several modules hold, name one side by its module and the other "
            "by the parameters that are left."
        )
