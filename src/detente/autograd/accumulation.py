"""Task gradients of a batch that comes in several parts, one after the other: added up before anything is decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from detente.autograd.exact import ExactPass, exact_pass
from detente.autograd.flat import Layout
from detente.autograd.losses import multiplied
from detente.autograd.partition import Memory, Partition
from detente.autograd.reduce import Prepared
from detente.autograd.rows import Rows, ScatteredRows, SummedRows


class Accumulation:
    """Sums over the micro-batches of one step, each weighted by its examples.

    Holds T P numbers, as an exact step does, and the gradients of own parameters.

    Args:
        parts: micro-batches of the step.

    Attributes:
        parts, done: micro-batches of the step, and how many were taken in.
    """

    def __init__(self, parts: int) -> None:
        self.parts, self.done = parts, 0
        self._names: list[str] = []
        self._totals: list[float] = []
        self._losses: list[torch.Tensor] = []
        self._own: list[dict[torch.Tensor, torch.Tensor]] = []
        self._touched: set[torch.Tensor] = set()
        self._rows: torch.Tensor | None = None
        self._layout: Layout | None = None

    def add(
        self,
        step: Prepared,
        memory: Memory,
        factor: torch.Tensor | None,
        *,
        retain_graph: bool,
        batched: bool,
    ) -> None:
        """Take in a micro-batch.

        Args:
            step: its tasks and losses.
            memory: of the method.
            factor: of a gradient scaler.
            retain_graph, batched: as for :func:`~detente.autograd.take.take`.

        Raises:
            ValueError: nothing is shared, or other parameters are than in the micro-batches before.
        """
        assert isinstance(step.parts, Partition), "features are refused before"
        parts, layout = step.parts, Layout(step.parts.shared)
        if not layout.tensors:
            raise ValueError(
                "no parameter is shared by the tasks, so there is nothing to combine: call backward() outside of "
                "accumulate()."
            )
        if self._layout is not None and self._layout != layout:
            raise ValueError(
                f"micro-batch {self.done + 1} of {self.parts} shares other parameters than those before; name shared=, "
                "or begin with a micro-batch of all tasks."
            )
        self._layout = layout
        self._know(step.names, layout)
        assert self._rows is not None
        losses = step.losses if factor is None else multiplied(step.losses, factor)
        places = [self._names.index(name) for name in step.names]
        added = _AddedRows(layout, self._rows, places, step.totals, memory)
        graph = exact_pass(losses, parts, memory, rows=added, retain_graph=retain_graph, batched=batched)
        for place, loss, total, own in zip(places, step.losses, step.totals, graph.own, strict=True):
            self._totals[place] += total
            self._losses[place] = self._losses[place] + total * loss.detach().to(torch.float64)
            held = self._own[place]
            for tensor, gradient in own:
                part = gradient * total
                held[tensor] = held[tensor] + part if tensor in held else part
        self._touched |= graph.touched
        self.done += 1

    def finish(
        self, last: Prepared, memory: Memory, factor: torch.Tensor | None, *, whole: bool
    ) -> tuple[Prepared, ExactPass]:
        """The step of the whole batch, as if its losses had been means over all of its examples.

        Args:
            last: the last micro-batch.
            memory, factor: as for :meth:`add`.
            whole: as for :func:`~detente.autograd.take.take`.
        """
        assert self._rows is not None and self._layout is not None and isinstance(last.parts, Partition)
        totals = self._rows.new_tensor(self._totals)
        self._rows.div_(totals[:, None] if factor is None else totals[:, None] * factor.to(totals))
        losses = [loss / total for loss, total in zip(self._losses, self._totals, strict=True)]
        own = [
            [(tensor, gradient / total) for tensor, gradient in held.items()]
            for held, total in zip(self._own, self._totals, strict=True)
        ]
        rows: Rows = _HeldRows(self._layout, self._rows)
        if last.reduction is not None:
            kind = SummedRows if whole else ScatteredRows
            spread = kind(self._layout, len(losses), memory, last.reduction.ranks)
            for task, row in enumerate(self._rows):
                spread.write_row(task, row)
            rows = spread
        graph = ExactPass(
            losses,
            "exact",
            rows.jacobian,
            own,
            columns=self._layout.tensors,
            touched=self._touched,
            rows=rows,
            reduction=last.reduction,
            partial=rows.partial,
            factor=factor,
        )
        graph.reached = self._touched | {tensor for task in own for tensor, _ in task}
        return replace(last, names=tuple(self._names), losses=losses), graph

    def _know(self, names: Sequence[str], layout: Layout) -> None:
        """Make room for tasks that were not in the micro-batches before."""
        for name in names:
            if name not in self._names:
                self._names.append(name)
                self._totals.append(0.0)
                self._losses.append(torch.zeros((), dtype=torch.float64))
                self._own.append({})
        held = self._rows
        if held is None or len(held) < len(self._names):
            self._rows = layout.like.new_zeros(len(self._names), layout.columns)
            if held is not None:
                self._rows[: len(held)] = held


class _HeldRows(Rows):
    """Rows that are there already."""

    def __init__(self, layout: Layout, jacobian: torch.Tensor) -> None:
        self.layout, self.jacobian = layout, jacobian


class _AddedRows(Rows):
    """Rows that are added to others, times a factor."""

    def __init__(
        self,
        layout: Layout,
        jacobian: torch.Tensor,
        places: Sequence[int],
        factors: Sequence[float],
        memory: Memory,
    ) -> None:
        self.layout, self.jacobian, self.places, self.factors = layout, jacobian, places, factors
        self._row = memory.buffer(1, layout.columns, layout.like)[0]

    def row(self, task: int) -> torch.Tensor:
        """[P] for the gradients of one task at a time."""
        return self._row

    def filled(self, task: int) -> None:
        """Add a task's gradients."""
        self.jacobian[self.places[task]].add_(self._row, alpha=self.factors[task])
