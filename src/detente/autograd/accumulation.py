"""Task gradients of a batch that comes in several parts, one after the other: added up before anything is decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from detente.autograd.batched import TAKE
from detente.autograd.entries import sum_of
from detente.autograd.jacobian import ExactPass, Rows, exact_pass, rows_for
from detente.autograd.layout import Layout
from detente.autograd.roles import Roles
from detente.autograd.step import Step


class Accumulation:
    """Keep sums over the micro-batches of one step, each weighted by its examples.

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
        self._inside: set[str] = set()
        self._certain: set[str] | None = None
        self._touched: set[torch.Tensor] = set()
        self._sparse: dict[torch.Tensor, list[torch.Tensor]] = {}
        self._dense: set[torch.Tensor] = set()
        self._rows: torch.Tensor | None = None
        self._roles: Roles | None = None

    def add(self, step: Step) -> None:
        """Take in a micro-batch.

        Raises:
            ValueError: nothing is shared, or other parameters are than in the micro-batches before.
        """
        roles, layout = step.roles, Layout(step.roles.shared)
        if not layout.tensors:
            raise ValueError(
                "no parameter is shared by the tasks, so there is nothing to combine: call backward() outside of "
                "accumulate()."
            )
        if self._roles is not None and list(map(id, self._roles.shared)) != list(map(id, roles.shared)):
            raise ValueError(
                f"micro-batch {self.done + 1} of {self.parts} shares other parameters than those before; name shared=, "
                "or begin with a micro-batch of all tasks."
            )
        self._roles = roles
        self._inside.update(step.names[task] for task in step.inside)
        if roles.certain >= 0:
            sure = {name for task, name in enumerate(step.names) if roles.certain >> task & 1}
            self._certain = sure | (self._certain or set())
        # Every task has a row: one that reaches nothing shared here may do so in another micro-batch.
        step = replace(step, inside=tuple(range(len(step.names))))
        places, totals = self._know(step, layout), step.totals or (1.0,) * len(step.names)
        assert self._rows is not None
        added = _AddedRows(layout, self._rows, places, totals, step)
        walked = exact_pass(replace(step, factor=None), added, TAKE[step.request.mode])
        for place, loss, total, own in zip(places, step.losses, totals, walked.own, strict=True):
            self._totals[place] += total
            self._losses[place] = self._losses[place] + total * loss.detach().to(torch.float64)
            held = self._own[place]
            for tensor, gradient in own:
                part = gradient * total
                held[tensor] = sum_of(held[tensor], part) if tensor in held else part
        for tensor in walked.reached:
            if tensor in walked.sparse:
                self._sparse.setdefault(tensor, []).append(walked.sparse[tensor])
            else:
                self._dense.add(tensor)
        self._touched |= walked.reached
        self.done += 1

    def finish(self, last: Step) -> ExactPass:
        """Return the pass of the whole batch, as if its losses had been means over all of its examples.

        Args:
            last: the last micro-batch.
        """
        assert self._rows is not None and self._roles is not None
        totals = self._rows.new_tensor(self._totals)
        self._rows.div_(totals[:, None] if last.factor is None else totals[:, None] * last.factor.to(totals))
        losses = [loss / total for loss, total in zip(self._losses, self._totals, strict=True)]
        own = tuple(
            [(tensor, gradient / total) for tensor, gradient in held.items()]
            for held, total in zip(self._own, self._totals, strict=True)
        )
        inside = tuple(task for task, name in enumerate(self._names) if name in self._inside)
        everyone = (1 << len(self._names)) - 1
        certain = -1
        if self._certain is not None:
            certain = sum(1 << task for task, name in enumerate(self._names) if name in self._certain)
        roles = replace(
            self._roles,
            tasks=everyone,
            reached=(everyone,) * len(self._roles.shared),
            own=((),) * len(self._names),
            certain=certain,
        )
        step = replace(
            last,
            names=tuple(self._names),
            losses=losses,
            scaled=losses,
            roles=roles,
            inside=inside or tuple(range(len(self._names))),
            shares=(),
        )
        kept = self._rows if len(step.inside) == len(self._names) else self._rows[list(step.inside)]
        rows = Rows(Layout(roles.shared), kept)
        if last.reduction is not None:
            spread = rows_for(step, roles.shared, len(step.inside))
            for row, held in enumerate(kept):
                spread.row(row).copy_(held)
                spread.filled(row)
            rows = spread
        return ExactPass(
            step,
            rows.jacobian,
            own,
            roles.shared,
            frozenset(self._touched),
            rows.partial,
            rows=rows,
            sparse={
                tensor: torch.unique(torch.cat(entries))
                for tensor, entries in self._sparse.items()
                if tensor not in self._dense
            },
        )

    def _know(self, step: Step, layout: Layout) -> list[int]:
        """Make room for tasks that were not in the micro-batches before; where each task of this one stands."""
        for name in step.names:
            if name not in self._names:
                self._names.append(name)
                self._totals.append(0.0)
                self._losses.append(torch.zeros((), dtype=torch.float64))
                self._own.append({})
        held = self._rows
        if held is None or len(held) < len(self._names):
            like = layout.like
            if step.factor is not None and like.dtype.itemsize < 4:
                like = like.to(torch.float32)
            self._rows = like.new_zeros(len(self._names), layout.columns)
            if held is not None:
                self._rows[: len(held)] = held
        return [self._names.index(name) for name in step.names]


class _AddedRows(Rows):
    """Add rows to others, times a factor."""

    def __init__(
        self,
        layout: Layout,
        jacobian: torch.Tensor,
        places: Sequence[int],
        factors: Sequence[float],
        step: Step,
    ) -> None:
        super().__init__(layout, jacobian)
        self.places, self.factors = places, factors
        self._row = step.memory.buffer(1, layout.columns, jacobian.dtype, jacobian.device)[0]

    def row(self, task: int) -> torch.Tensor:
        """Return [P] for the gradients of one task at a time."""
        return self._row

    def filled(self, task: int) -> None:
        """Add a task's gradients."""
        self.jacobian[self.places[task]].add_(self._row, alpha=self.factors[task])
