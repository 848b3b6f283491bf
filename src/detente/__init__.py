"""Détente: train one network on several losses, and learn whether balancing them helped.

>>> import torch, detente
>>> trunk, heads = torch.nn.Linear(3, 4), [torch.nn.Linear(4, 1) for _ in range(2)]
>>> method = detente.create("mgda")
>>> z = trunk(torch.ones(1, 3))
>>> record = detente.backward([head(z).square().mean() for head in heads], method)
>>> record.accepted
True
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from detente.autograd.branches import Branches, branch
from detente.autograd.ranks import check_ranks
from detente.autograd.reduction import average_losses
from detente.methods import Declaration, Method, create, methods, register, unregister, wrappers
from detente.methods.wrappers import wrap
from detente.step import accumulate, apply, backward, combine, task_gradients
from detente.values import Combination, Conflict, MethodInfo, Option, StepRecord, TaskGradients

__version__ = "0.1.0"

__all__ = [
    "Branches",
    "Combination",
    "Conflict",
    "Declaration",
    "Method",
    "MethodInfo",
    "Option",
    "StepRecord",
    "TaskGradients",
    "accumulate",
    "apply",
    "average_losses",
    "backward",
    "branch",
    "check_ranks",
    "combine",
    "create",
    "methods",
    "register",
    "task_gradients",
    "unregister",
    "wrap",
    "wrappers",
]

# Rooms of the public contract that are imported when first named, so that `import detente` stays quick.
_LATER = ("linesearch", "metrics", "optim")

if not TYPE_CHECKING:  # for a type checker, write `import detente.optim`

    def __getattr__(name: str) -> Any:
        if name in _LATER:
            return import_module(f"detente.{name}")
        raise AttributeError(f"module 'detente' has no attribute {name!r}")
