"""The options of a search, and the checks of what it is given."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar

from torch import nn

from detente.linesearch.armijo import ROUNDING
from detente.linesearch.engine import as_tensors
from detente.linesearch.moments import KINDS, Kind
from detente.methods import Method
from detente.methods.options import one_of

P = ParamSpec("P")
R = TypeVar("R")


def in_range(
    option: str, value: float, *, above: float = 0.0, below: float = math.inf, least: float | None = None
) -> float:
    """Give ``value`` back as a finite number in (above, below), or in [least, below).

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
    """Give ``value`` back as a whole number >= ``least``.

    Raises:
        ValueError: it is none; the option is named.

    Example:
        >>> whole("max_trials", 20, least=1)
        20
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"option {option} is {value!r}; give a whole number >= {least}.")
    return int(value)


@dataclass(frozen=True)
class SearchOptions:
    """Set what a search does beside dividing a length: at the cap, without a descent, between steps.

    Attributes:
        on_cap: what follows when no trial was accepted. ``skip``: the parameters stay, the record says ``capped``;
            ``error``.
        on_no_descent: what follows when some loss does not fall along the direction. ``error``, or ``small-step``: a
            step of length ``small_step``, unsearched (ours).
        small_step: that length, > 0; its losses must be finite.
        lower_ub: ours: ``cap``: divide the first length by γ after ``patience`` searches in a row that ended at the
            cap; ``divided``: that needed more than one trial. None never. ``search.lowered`` counts the divisions
            beside ``lr_ub``, so that a schedule does not undo them; ``search.lowered = 0`` does.
        patience: how many, >= 1.
        modules: whose buffers stand still during a search. None: modules among ``shared`` and ``task_specific``, and
            every module that runs in the closure's first pass, found by a temporary hook. A model compiled with
            ``torch.compile`` warns of such hooks: name it here.
        check_steps: in the first so many steps the closure is run once more before the first trial, and must give the
            same losses. 0 never.
        rounding: machine epsilons of a loss that count as rounding, >= 0.
        precondition: for :class:`Backtracking`; ours, after the paper's outlook: the shared direction and the heads'
            gradients are divided by the running moments of ``adam``, ``rmsprop`` or ``adagrad`` (torch's constants),
            and so are the slopes. What is a descent for all tasks need not stay one: see ``on_no_descent``.
        check_true: for :class:`FastBacktracking`. False; True: run the network once more after every accepted step and
            record whether the condition holds for it, one forward pass more; a number k: after every k-th step.

    Raises:
        ValueError: an option is out of range, or two contradict each other; both are named.
        TypeError: ``modules`` holds something that is no module.

    Example:
        >>> SearchOptions(on_no_descent="small-step", small_step=1e-3).on_cap
        'skip'
        >>> SearchOptions(small_step=1e-3)
        Traceback (most recent call last):
        ...
        ValueError: options on_no_descent='small-step' and small_step= belong together: give both, or neither.
    """

    on_cap: Literal["skip", "error"] = "skip"
    on_no_descent: Literal["error", "small-step"] = "error"
    small_step: float | None = None
    lower_ub: Literal["cap", "divided"] | None = None
    patience: int = 10
    modules: nn.Module | Iterable[nn.Module] | None = None
    check_steps: int = 1
    rounding: float = ROUNDING
    precondition: Kind | None = None
    check_true: bool | int = False

    def __post_init__(self) -> None:
        one_of("on_cap", self.on_cap, ("skip", "error"))
        one_of("on_no_descent", self.on_no_descent, ("error", "small-step"))
        if (self.on_no_descent == "small-step") != (self.small_step is not None):
            raise ValueError(
                "options on_no_descent='small-step' and small_step= belong together: give both, or neither."
            )
        if self.small_step is not None:
            in_range("small_step", self.small_step)
        one_of("lower_ub", self.lower_ub, (None, "cap", "divided"))
        if self.lower_ub == "cap" and self.on_cap == "error":
            raise ValueError(
                "option lower_ub='cap' counts searches that end at the cap: use on_cap='skip' with it."
            )
        whole("patience", self.patience, least=1)
        whole("check_steps", self.check_steps, least=0)
        in_range("rounding", self.rounding, least=0)
        one_of("precondition", self.precondition, (None, *KINDS))
        if not isinstance(self.check_true, bool):
            whole("check_true", self.check_true, least=1)
        if self.modules is not None:  # read once: it may be a generator
            named = (self.modules,) if isinstance(self.modules, nn.Module) else tuple(self.modules)
            for entry in named:
                if not isinstance(entry, nn.Module):
                    raise TypeError(f"modules= takes modules, got {type(entry).__name__}.")
            object.__setattr__(self, "modules", named)

    @property
    def named_modules(self) -> tuple[nn.Module, ...]:
        """The modules of ``modules``; none where it is None."""
        assert self.modules is None or isinstance(self.modules, tuple), "see __post_init__"
        return self.modules or ()

    def plain(self) -> dict[str, Any]:
        """Map every option that is no module to its value.

        Example:
            >>> SearchOptions(patience=3).plain()["patience"]
            3
        """
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "modules"}

    def refuse(self, lacking: Mapping[str, str], kind: str) -> None:
        """Refuse every option that a search does not have.

        Args:
            lacking: such options, each with the sentence that says why.
            kind: the search, for the message.

        Raises:
            ValueError: one of them differs from its default.

        Example:
            >>> SearchOptions(check_true=True).refuse({"check_true": "Leave it out."}, "Backtracking")
            Traceback (most recent call last):
            ...
            ValueError: Backtracking has no option check_true, here True. Leave it out.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in lacking and value != field.default:
                raise ValueError(f"{kind} has no option {field.name}, here {value!r}. {lacking[field.name]}")


DEFAULTS = SearchOptions()
"""The options of a search that is given none."""


def keywords_moved_to(options: type, argument: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a constructor name the new place of keywords that became fields of an options object.

    Args:
        options: the dataclass that holds them now.
        argument: the constructor's argument that takes it.

    Example:
        >>> class Thing:
        ...     @keywords_moved_to(SearchOptions, "options")
        ...     def __init__(self, options=DEFAULTS): ...
        >>> Thing(on_cap="error")
        Traceback (most recent call last):
        ...
        TypeError: Thing takes on_cap as a field of SearchOptions: options=SearchOptions(on_cap='error').
    """

    def decorate(constructor: Callable[P, R]) -> Callable[P, R]:
        accepted = inspect.signature(constructor).parameters
        moved = [field.name for field in fields(options) if field.name not in accepted]

        @wraps(constructor)
        def construct(*args: P.args, **kwargs: P.kwargs) -> R:
            given = {name: kwargs[name] for name in moved if name in kwargs}
            if given:
                written = ", ".join(f"{name}={value!r}" for name, value in given.items())
                raise TypeError(
                    f"{type(args[0]).__name__} takes {', '.join(given)} as "
                    f"{'a field' if len(given) == 1 else 'fields'} of {options.__name__}: "
                    f"{argument}={options.__name__}({written})."
                )
            return constructor(*args, **kwargs)

        return construct

    return decorate


def check_method(method: Any, space: str) -> Method:
    """Give the method back if it can be solved where the search is.

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


def read_once(parameters: Any) -> Any:
    """Read every iterable among parameters once: some are generators, and each step reads them."""
    if isinstance(parameters, Mapping):
        return {name: read_once(entry) for name, entry in parameters.items()}
    if hasattr(parameters, "shape") or isinstance(parameters, (nn.Module, str, bytes)):
        return parameters
    return [read_once(entry) for entry in parameters] if isinstance(parameters, Iterable) else parameters


def modules_in(parameters: Any) -> list[nn.Module]:
    """List the modules among parameters."""
    if isinstance(parameters, nn.Module):
        return [parameters]
    if isinstance(parameters, Mapping):
        parameters = list(parameters.values())
    return (
        [module for entry in parameters for module in modules_in(entry)]
        if isinstance(parameters, list)
        else []
    )


def check_roles(shared: Any, task_specific: Any) -> None:
    """Refuse parameters that are both shared and a task's own.

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
