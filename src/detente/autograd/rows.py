"""The rows of a Jacobian as they are taken, one task after the other: here, or spread over several processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from detente.autograd.flat import Layout
from detente.autograd.partition import Memory
from detente.autograd.ranks import Ranks


class Rows:
    """The rows of a Jacobian [T, P], written task by task.

    Args:
        layout: the P columns.
        tasks: T.
        memory: lends the buffer.
    """

    partial = False

    def __init__(self, layout: Layout, tasks: int, memory: Memory) -> None:
        self.layout = layout
        self.jacobian = memory.buffer(tasks, layout.columns, layout.like)

    def write(self, task: int, gradients: Sequence[torch.Tensor | None]) -> None:
        """Take in a task's gradients, one for each tensor of the layout."""
        self.layout.write(self.jacobian[task], gradients)

    def whole(self, direction: torch.Tensor) -> torch.Tensor:
        """[P] from a combination of the rows that are kept here."""
        return direction


class SummedRows(Rows):
    """Rows of the whole batch, complete on every rank."""

    def __init__(self, layout: Layout, tasks: int, memory: Memory, ranks: Ranks) -> None:
        super().__init__(layout, tasks, memory)
        self.ranks = ranks

    def write(self, task: int, gradients: Sequence[torch.Tensor | None]) -> None:
        """Take in a task's gradients and add those of the other ranks."""
        super().write(task, gradients)
        self.ranks.sum(self.jacobian[task])

    def write_row(self, task: int, row: torch.Tensor) -> None:
        """The same for gradients that lie in a row [P] already."""
        self.ranks.sum(self.jacobian[task].copy_(row))


class ScatteredRows(Rows):
    """Rows of the whole batch, of which each rank keeps one part of R: T P / R numbers and one row of P."""

    partial = True

    def __init__(self, layout: Layout, tasks: int, memory: Memory, ranks: Ranks) -> None:
        self.layout, self.ranks = layout, ranks
        width = -(-layout.columns // ranks.size)
        like = layout.like
        held = memory.buffer(1, tasks * width + ranks.size * width, like)[0]
        self.jacobian = held[: tasks * width].view(tasks, width)
        self._row = held[tasks * width :]
        self._row[layout.columns :].zero_()

    def write(self, task: int, gradients: Sequence[torch.Tensor | None]) -> None:
        """Take in a task's gradients, add those of the other ranks, keep this rank's part."""
        self.layout.write(self._row[: self.layout.columns], gradients)
        self.ranks.scatter_sum(self._row, self.jacobian[task])

    def write_row(self, task: int, row: torch.Tensor) -> None:
        """The same for gradients that lie in a row [P] already."""
        self._row[: self.layout.columns] = row
        self.ranks.scatter_sum(self._row, self.jacobian[task])

    def whole(self, direction: torch.Tensor) -> torch.Tensor:
        """[P] from the parts of all ranks."""
        return self.ranks.gather(direction)[: self.layout.columns]
