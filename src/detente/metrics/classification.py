"""Accuracy of classification, exact over a whole data set."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RunningAccuracy", "accuracy", "correct"]


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Tell which rows are classified correctly.

    The class with the largest logit is the prediction. A row that contains NaN is wrong, whatever its
    label, so that a network that has diverged does not score by chance.

    Args:
        logits: float [N, C].
        labels: whole numbers [N] from 0 to C - 1.

    Returns:
        bool [N].

    Raises:
        ValueError: the shapes do not fit, or the labels are no whole numbers.

    Example:
        >>> import torch
        >>> correct(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
        tensor([ True, False])
    """
    if logits.ndim != 2 or logits.shape[1] == 0 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}: "
            "expected [N, C] and [N]"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels have type {labels.dtype}: expected whole numbers")
    return (logits.argmax(dim=1) == labels) & ~logits.isnan().any(dim=1)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of correctly classified rows, a fraction from 0 to 1.

    Args:
        logits: float [N, C].
        labels: whole numbers [N] from 0 to C - 1.

    Raises:
        ValueError: there are no rows, the shapes do not fit, or the labels are no whole numbers.

    Example:
        >>> import torch
        >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
        0.5
    """
    running = RunningAccuracy()
    running.update(logits, labels)
    return running.compute()


class RunningAccuracy:
    """Accuracy over a data set seen in batches, as exact as in one piece: it adds up counts, not shares.

    Attributes:
        hits: correctly classified rows so far, a whole number in a tensor on the device of the batches.
        total: rows so far.

    Example:
        >>> import torch
        >>> running = RunningAccuracy()
        >>> running.update(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
        >>> running.update(torch.tensor([[2.0, 1.0]]), torch.tensor([1]))
        >>> round(running.compute(), 4)
        0.3333
    """

    def __init__(self) -> None:
        self.hits: Tensor | None = None
        self.total = 0

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits [N, C] and labels [N]."""
        found = correct(logits, labels).sum()
        self.hits = found if self.hits is None else self.hits + found
        self.total += len(labels)

    def compute(self) -> float:
        """Give the accuracy so far; ``ValueError`` when no row was added."""
        if self.hits is None or self.total == 0:
            raise ValueError("accuracy of no rows: add at least one row before")
        return int(self.hits) / self.total
