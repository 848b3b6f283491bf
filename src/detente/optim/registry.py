"""Declare the optimizers that a run may name, and make one by name."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

import torch

from detente.methods.options import near
from detente.optim.base import TaskOptimizer
from detente.optim.contributions import KINDS
from detente.optim.mao import MAO
from detente.optim.mtadam import MTAdam
from detente.values import Option

OptimizerName = Literal["sgd", "adam", "adamw", "mao", "mtadam"]
"""Every name of :func:`optimizers`."""


@dataclass(frozen=True)
class OptimizerInfo:
    """Tell what an optimizer declares, as :class:`detente.MethodInfo` does of a method.

    Attributes:
        name: the name for :func:`create`, and on the command line.
        summary: one line.
        source: paper and equation.
        options: name to :class:`detente.values.Option`, the learning rate ``lr`` included.
        per_task: True if it is given the losses and keeps moments for every task; otherwise it reads ``.grad``, which a
            method fills.
        takes_transform: True if it has the option ``transform``, a method that alters the task gradients.
        shares_updates: True if what each task contributes to its updates is known: by itself where it keeps moments of
            every task, through :class:`detente.optim.Contributions` otherwise.

    Example:
        >>> optimizers()["mao"].per_task, optimizers()["sgd"].shares_updates
        (True, False)
    """

    name: str
    summary: str
    source: str
    options: Mapping[str, Option]
    per_task: bool
    takes_transform: bool
    shares_updates: bool


@dataclass(frozen=True)
class _Row:
    """What the class of an optimizer does not tell: ``search`` maps options to the values that are tried."""

    kind: type[torch.optim.Optimizer]
    source: str
    summary: str = ""
    options: tuple[str, ...] = ()
    search: Mapping[str, Sequence[Any]] = field(default_factory=dict)


_ADAM = ("lr", "betas", "eps", "weight_decay")
_DECAY = {"weight_decay": (0.0, 1e-4, 1e-2)}
_ROWS: dict[str, _Row] = {
    "sgd": _Row(
        torch.optim.SGD,
        "Robbins and Monro (1951); Sutskever et al. (2013), momentum",
        "Follow the gradient, with momentum where asked.",
        ("lr", "momentum", "nesterov", "weight_decay"),
        {"momentum": (0.0, 0.9)},
    ),
    "adam": _Row(
        torch.optim.Adam,
        "Kingma and Ba (2015), algorithm 1",
        "Divide a running mean of the gradient by the root of that of its square.",
        _ADAM,
    ),
    "adamw": _Row(
        torch.optim.AdamW,
        "Loshchilov and Hutter (2019), algorithm 2",
        "Adam with weight decay apart from the gradient.",
        _ADAM,
        _DECAY,
    ),
    "mao": _Row(MAO, "Hervella et al. (2024), equations 8 to 12", search=_DECAY),
    "mtadam": _Row(MTAdam, "Malkiel and Wolf (2021), algorithm 1", search={"norm_beta": (0.9, 0.5, 0.99)}),
}


class UnknownOptimizer(ValueError, LookupError):
    """No optimizer of that name is declared."""


@lru_cache(maxsize=1)
def _declared() -> dict[str, OptimizerInfo]:
    return {name: _describe(name, row) for name, row in sorted(_ROWS.items())}


def optimizers() -> dict[str, OptimizerInfo]:
    """List every optimizer: name to :class:`OptimizerInfo`, sorted by name.

    Example:
        >>> {name: info.takes_transform for name, info in optimizers().items() if info.per_task}
        {'mao': True, 'mtadam': False}
        >>> optimizers()["mao"].options["variant"].choices
        ('adam', 'sgd')
    """
    return dict(_declared())


def info_of(name: str) -> OptimizerInfo:
    """Give what one optimizer declares.

    Raises:
        UnknownOptimizer: no such optimizer; close names are suggested.

    Example:
        >>> info_of("adamm")
        Traceback (most recent call last):
        ...
        detente.optim.registry.UnknownOptimizer: unknown optimizer 'adamm'; did you mean 'adam'? Declared: adam, ...
    """
    if name not in _ROWS:
        raise UnknownOptimizer(
            f"unknown optimizer {name!r}; {near(name, _ROWS)}Declared: {', '.join(sorted(_ROWS))}."
        )
    return _declared()[name]


def create(name: str, *parameters: Any, **options: Any) -> torch.optim.Optimizer:
    """Make an optimizer by name.

    Args:
        name: a declared name, see :func:`optimizers`.
        *parameters: all parameters; shared and task-specific ones for an optimizer with ``per_task``.
        **options: by name, see ``optimizers()[name].options``; for one with ``per_task`` also ``tasks``, and
            ``transform`` where it takes one.

    Raises:
        UnknownOptimizer: no such optimizer.
        TypeError: it has no such option.
        ValueError: an option is out of range.

    Example:
        >>> create("sgd", [torch.nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9).defaults["momentum"]
        0.9
    """
    info = info_of(name)
    further = {"tasks"} if info.per_task else set()
    accepted = {*info.options, *further, *(["transform"] if info.takes_transform else [])}
    for option in options:
        if option not in accepted:
            raise TypeError(
                f"optimizer {name} has no option {option!r}; it has {', '.join(sorted(accepted))}."
            )
    make: Any = _ROWS[name].kind
    optimizer: torch.optim.Optimizer = make(*parameters, **options)
    return optimizer


def _describe(name: str, row: _Row) -> OptimizerInfo:
    """Read summary and options from docstring and signature, where the row does not name them."""
    constructor: Any = row.kind.__init__
    given = inspect.signature(constructor).parameters
    per_task = issubclass(row.kind, TaskOptimizer)
    # torch's hints are not all importable; only our own choices are read.
    hints = typing.get_type_hints(constructor) if per_task else {}
    not_options = ("self", "shared", "task_specific", "tasks", "transform")
    names = row.options or tuple(option for option in given if option not in not_options)
    options = {}
    for option in names:
        hint = hints.get(option)
        choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        options[option] = Option(given[option].default, choices, tuple(row.search.get(option, ())))
    unknown = [option for option in row.search if option not in options]
    if unknown:
        raise TypeError(
            f"optimizer {name} declares a grid over {unknown[0]!r}, which is none of its options."
        )
    return OptimizerInfo(
        name,
        row.summary or (inspect.getdoc(row.kind) or "").split("\n")[0],
        row.source,
        MappingProxyType(options),
        per_task=per_task,
        takes_transform=issubclass(row.kind, TaskOptimizer) and row.kind.takes_transform,
        shares_updates=per_task or row.kind in KINDS,
    )
