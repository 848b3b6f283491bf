"""The rows of a Jacobian as they are taken, one task after the other: here, or spread over several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch.autograd.graph import Node

from detente.autograd.flat import Layout
from detente.autograd.partition import Memory
from detente.autograd.ranks import Ranks

# Entries of a leaf from which on its gradient is handed over as it comes. A smaller one is not worth the call.
_LARGE = 1 << 14


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

    def row(self, task: int) -> torch.Tensor:
        """[P] where the gradients of a task are to be laid before it is :meth:`filled`."""
        return self.jacobian[task]

    def filled(self, task: int) -> None:
        """The row of a task holds its gradients."""

    def write(self, task: int, gradients: Sequence[torch.Tensor | None]) -> None:
        """Take in a task's gradients, one for each tensor of the layout."""
        self.layout.write(self.row(task), gradients)
        self.filled(task)

    def whole(self, direction: torch.Tensor) -> torch.Tensor:
        """[P] from a combination of the rows that are kept here."""
        return direction


class SummedRows(Rows):
    """Rows of the whole batch, complete on every rank."""

    def __init__(self, layout: Layout, tasks: int, memory: Memory, ranks: Ranks) -> None:
        super().__init__(layout, tasks, memory)
        self.ranks = ranks

    def filled(self, task: int) -> None:
        """Add the gradients of the other ranks."""
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

    def row(self, task: int) -> torch.Tensor:
        """[P] for the gradients of one task at a time."""
        return self._row[: self.layout.columns]

    def filled(self, task: int) -> None:
        """Add the gradients of the other ranks, keep this rank's part."""
        self.ranks.scatter_sum(self._row, self.jacobian[task])

    def write_row(self, task: int, row: torch.Tensor) -> None:
        """The same for gradients that lie in a row [P] already."""
        self.row(task).copy_(row)
        self.filled(task)

    def whole(self, direction: torch.Tensor) -> torch.Tensor:
        """[P] from the parts of all ranks."""
        return self.ranks.gather(direction)[: self.layout.columns]


class Arrivals:
    """Hands over the gradient of each leaf the moment autograd has it whole, so that no backward holds them all.

    A hook on the leaf lets a zero that takes no memory go on in place of the gradient. Hooks of the caller's were there
    before, so that they run first, and what they return is what is handed over. What is left for autograd to return
    (a small or a sparse gradient; everything, where the backward begins at a leaf) is told by :attr:`taken`.

    Args:
        leaves: the leaf tensors; those that require no gradient are passed over.

    Attributes:
        taken: positions of the leaves whose gradients were handed over in the current backward.
    """

    def __init__(self, leaves: Sequence[torch.Tensor]) -> None:
        self.taken: set[int] = set()
        self._leaves, self._backward = leaves, -1
        self._receive: Callable[[int, torch.Tensor], None] = lambda place, gradient: None

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """While this lasts the leaves have their hooks."""
        handles = [
            leaf.register_hook(partial(self._arrived, place))  # type: ignore[no-untyped-call]
            for place, leaf in enumerate(self._leaves)
            if leaf.requires_grad and leaf.numel() >= _LARGE
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def of_backward(
        self, nodes: Iterable[Node], receive: Callable[[int, torch.Tensor], None]
    ) -> Iterator[None]:
        """Around one backward that begins at these nodes: ``receive`` gets the position of a leaf and its gradient.

        An operation of the graph may run a backward of its own inside it and meet the same leaves: only gradients of
        the backward that passed one of the nodes are ours.
        """
        self.taken.clear()
        self._backward, self._receive = -1, receive
        handles = [node.register_prehook(self._begin) for node in nodes]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, gradients: tuple[torch.Tensor, ...]) -> None:
        self._backward = torch._C._current_graph_task_id()

    def _arrived(self, place: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        if (
            gradient is None
            or gradient.layout is not torch.strided
            or torch._C._current_graph_task_id() != self._backward
        ):
            return None
        self._receive(place, gradient)
        self.taken.add(place)
        return gradient.new_zeros(()).expand(gradient.shape)
