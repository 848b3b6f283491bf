"""What every network of this package returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Output"]


class Output(NamedTuple):
    """The shared representation and the prediction of every task.

    Attributes:
        features: the representation Z that all heads read, [B, ...]; what ``detente.backward(...,
            features=)`` takes.
        predictions: task name to that task's output, [B, ...].
    """

    features: Tensor
    predictions: dict[str, Tensor]
