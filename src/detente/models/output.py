"""What every network of this package returns, and how it may branch its representation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Branching", "Output"]

Branching = Callable[[Tensor, Sequence[str]], Mapping[str, Any]]
"""Gives each task a branch of a representation of its own, as :func:`detente.branch` does."""


class Output(NamedTuple):
    """Hold the shared representation and the prediction of every task.

    Attributes:
        features: the representation Z that all heads read, [B, ...], or a branch of it for each task; what
            ``detente.backward(..., features=)`` takes.
        predictions: task name to that task's output, [B, ...].
    """

    features: Any
    predictions: dict[str, Tensor]
