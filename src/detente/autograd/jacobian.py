"""Gradients of each task with respect to the shared parameters themselves, or to a layer of them.

One backward through the trunk per task, each head walked once, the graph freed with the last task. The rows lie here,
or are spread over several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from detente.autograd.evidence import settle
from detente.autograd.graph import gradient_edge
from detente.autograd.layout import Gradients, Layout, gradients_of, lay, present, seeds_of
from detente.autograd.numbers import block_gramians, gramian
from detente.autograd.ranks import Ranks
from detente.autograd.roles import Roles
from detente.autograd.step import Step

# Entries of a leaf from which on its gradient is handed over as it comes. A smaller one is not worth the call.
_LARGE = 1 << 14


@dataclass
class Rows:
    """Hold the rows of a Jacobian [T, P], written task by task.

    Attributes:
        layout: the P columns.
        jacobian: [T, P].
        partial: True if a process keeps a part of each row.
    """

    layout: Layout
    jacobian: torch.Tensor
    partial: ClassVar[bool] = False

    def row(self, task: int) -> torch.Tensor:
        """Return [P] where the gradients of a task are to be laid before it is :meth:`filled`."""
        return self.jacobian[task]

    def filled(self, task: int) -> None:
        """Take notice that the row of a task holds its gradients."""

    def whole(self, direction: torch.Tensor) -> torch.Tensor:
        """Return [P] from a combination of the rows that are kept here."""
        return direction


class SummedRows(Rows):
    """Hold rows of the whole batch, complete on every rank."""

    def __init__(self, layout: Layout, jacobian: torch.Tensor, ranks: Ranks) -> None:
        super().__init__(layout, jacobian)
        self.ranks = ranks

    def filled(self, task: int) -> None:
        """Add the gradients of the other ranks."""
        self.ranks.sum(self.jacobian[task])


class ScatteredRows(Rows):
    """Hold rows of the whole batch, of which each rank keeps one part of R: T P / R numbers and one row of P."""

    partial = True

    def __init__(self, layout: Layout, held: torch.Tensor, tasks: int, ranks: Ranks) -> None:
        width = -(-layout.columns // ranks.size)
        super().__init__(layout, held[: tasks * width].view(tasks, width))
        self.ranks = ranks
        self._row = held[tasks * width :]
        self._row[layout.columns :].zero_()

    def row(self, task: int) -> torch.Tensor:
        """Return [P] for the gradients of one task at a time."""
        return self._row[: self.layout.columns]

    def filled(self, task: int) -> None:
        """Add the gradients of the other ranks, keep this rank's part."""
        self.ranks.scatter_sum(self._row, self.jacobian[task])

    def whole(self, direction: torch.Tensor) -> torch.Tensor:
        """Return [P] from the parts of all ranks."""
        return self.ranks.gather(direction)[: self.layout.columns]


def rows_for(step: Step, tensors: Sequence[torch.Tensor], tasks: int) -> Rows:
    """Return room for the rows of a step, in the memory of its method.

    Args:
        step: on several processes its rows are spread over them where numbers about the gradients are all it needs.
        tensors: the columns.
        tasks: the number of rows.
    """
    layout, memory, reduction = Layout(tensors), step.memory, step.reduction
    dtype = layout.dtype
    if step.factor is not None and dtype.itemsize < 4:
        dtype = torch.float32  # a scaler's factor, or what it divides, is out of the range of float16
    if reduction is None:
        return Rows(layout, memory.buffer(tasks, layout.columns, dtype, tensors[0].device))
    ranks, device = reduction.ranks, tensors[0].device
    if step.request.whole or step.roles.space == "layer" or step.roles.unsure:
        return SummedRows(layout, memory.buffer(tasks, layout.columns, dtype, device), ranks)
    width = -(-layout.columns // ranks.size)
    held = memory.buffer(1, (tasks + ranks.size) * width, dtype, device)[0]
    return ScatteredRows(layout, held, tasks, ranks)


class Arrivals:
    """Hand over the gradient of each leaf the moment autograd has it whole, so that no backward holds them all.

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
        handles = []
        for place, leaf in enumerate(self._leaves):
            if leaf.requires_grad and leaf.numel() >= _LARGE:
                hook: Any = partial(self._arrived, place)
                handles.append(leaf.register_hook(hook))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def of_backward(
        self, nodes: Sequence[Any], receive: Callable[[int, torch.Tensor], None]
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


@dataclass(frozen=True)
class Pass:
    """Hold the task gradients of one step on this rank, and turn a direction into gradients of the parameters.

    Attributes:
        step: what they are the gradients of.
        jacobian: [T, P], one row for each task of the shared problem; None if the rows are not kept. It is that of the
            losses themselves; ``own`` and what goes to the parameters is multiplied by a gradient scaler's factor.
        own: for each task of the step the gradients of its own parameters.
        columns: the parameters in the order of the Jacobian's columns; empty on features.
        reached: parameters, shared and own, that this rank's losses have gradients for.
        partial: True if this rank holds a part of each row, so that Gramians are to be added over the ranks.
        activations: [P] the flattened representation, on features.
        complete: whether :meth:`carry` gives gradients of the whole batch, so that nothing is to be added over ranks.
    """

    complete: ClassVar[bool] = False

    step: Step
    jacobian: torch.Tensor | None
    own: tuple[Gradients, ...]
    columns: tuple[torch.Tensor, ...] = ()
    reached: frozenset[torch.Tensor] = frozenset()
    partial: bool = False
    activations: torch.Tensor | None = None

    def scaled(self, values: torch.Tensor) -> torch.Tensor:
        """Return ``values`` times the scaler's factor, as they become gradients of the parameters."""
        factor = self.step.factor
        return values if factor is None else values * factor.to(device=values.device, dtype=values.dtype)

    def products(self, sizes: Sequence[int] | None) -> torch.Tensor:
        """Return inner products of the rows [T, T] in float64; [B, T, T] for blocks of columns of these sizes."""
        assert self.jacobian is not None
        return gramian(self.jacobian) if sizes is None else block_gramians(self.jacobian, sizes)

    def carry(self, direction: torch.Tensor | None, weights: torch.Tensor | None) -> Gradients:
        """Return this rank's gradients of the shared parameters.

        Args:
            direction: [P] in this pass's space; None for that of the weights.
            weights: one for each row, those of the direction (its length included), where it has any.
        """
        raise AssertionError("the passes below define it")

    def by_weights(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the direction [P] of the weights."""
        assert self.jacobian is not None
        return weights.to(device=self.jacobian.device, dtype=self.jacobian.dtype) @ self.jacobian


@dataclass(frozen=True)
class ExactPass(Pass):
    """Hold task gradients with respect to all shared parameters.

    Attributes:
        rows: where the Jacobian lies.
        sparse: parameters whose gradients were all sparse, with the rows of theirs that have entries.
        settled_own: parameters that turned out to be a task's own; their gradients are those of the whole batch.
    """

    complete: ClassVar[bool] = True

    rows: Rows = field(kw_only=True)
    settled_own: tuple[torch.Tensor, ...] = field(default=(), kw_only=True)
    sparse: dict[torch.Tensor, torch.Tensor] = field(default_factory=dict, kw_only=True)

    def carry(self, direction: torch.Tensor | None, weights: torch.Tensor | None) -> Gradients:
        """Cut the direction into the shapes of the parameters."""
        layout = self.rows.layout
        if direction is None:
            assert weights is not None and self.jacobian is not None
            if self.partial:
                return self.carry(self.by_weights(weights), weights)
            on_device = weights.to(device=self.jacobian.device, dtype=self.jacobian.dtype)
            if self.step.factor is not None:
                on_device = self.scaled(on_device)
            pieces = layout.weighted(on_device, self.jacobian)
        else:
            pieces = layout.split(self.rows.whole(self.scaled(direction)))
        found = []
        for tensor, piece in zip(self.columns, pieces, strict=True):
            if self.sparse and (entries := self.sparse.get(tensor)) is not None:
                piece = torch.sparse_coo_tensor(
                    entries[None], piece[entries], piece.shape, is_coalesced=True, check_invariants=False
                )
            found.append((tensor, piece))
        return found

    def settled(self, blocks: np.ndarray, own_alive: np.ndarray) -> tuple[ExactPass, np.ndarray]:
        """Decide by the gradients about the parameters that the graph leaves open.

        Args:
            blocks: [1 + unsure, T, T] Gramians of the parameters that are shared for certain, and of each of the
                others.
            own_alive: [T] True for a row whose task has own parameters with a gradient that is not zero.

        Returns:
            The pass over the shared parameters, the others among the own, and its Gramian [T, T].

        Raises:
            ValueError: what is shared cannot be told; see :func:`~detente.autograd.roles.settle`.
        """
        step, roles = self.step, self.step.roles
        sizes = np.diagonal(blocks, axis1=1, axis2=2)
        roles_of_rows = roles.of_tasks(step.inside)
        if step.reduction is not None:  # what this rank's losses reach is not all
            everyone = (1 << len(step.inside)) - 1
            roles_of_rows = replace(roles_of_rows, reached=(everyone,) * len(roles.shared))
        names = [step.names[task] for task in step.inside]
        owner = settle(roles_of_rows, names, sizes[1:], sizes.any(axis=0) | own_alive, step.memory)
        first = len(roles.shared) - roles.unsure
        turned = [first + place for place, row in enumerate(owner) if row < 0]
        # Leaves that are no parameters are shared only if no parameter is, and two tasks have a gradient there.
        alone = not turned and int((sizes[0] > 0).sum()) > 1
        inputs = 0 if alone else roles.inputs
        keep = [*range(inputs, first), *turned]
        assert self.jacobian is not None
        own = [list(task) for task in self.own]
        pieces = torch.split(self.jacobian, self.rows.layout.widths, dim=1)
        for tensor, piece in zip(self.columns[:inputs], pieces[:inputs], strict=True):
            for row, task in enumerate(step.inside):
                own[task].append((tensor, Layout((tensor,)).split(self.scaled(piece[row].clone()))[0]))
        if inputs:
            roles = replace(roles, left_out=(*roles.left_out, *self.columns[:inputs]))
            step = replace(step, roles=roles)
        for place, row in enumerate(owner):
            if row >= 0:
                tensor = self.columns[first + place]
                gradient = Layout((tensor,)).split(self.scaled(pieces[first + place][row].clone()))[0]
                own[step.inside[row]].append((tensor, gradient))
        columns = tuple(self.columns[place] for place in keep)
        if keep == list(range(len(keep))):
            width = sum(self.rows.layout.widths[: len(keep)])
            jacobian = self.jacobian[:, :width]
        else:
            jacobian = torch.cat([pieces[place] for place in keep], dim=1)
        certain = blocks[0] if not inputs else np.zeros_like(blocks[0])
        gram = certain + blocks[1:][owner < 0].sum(axis=0)
        rows = Rows(Layout(columns), jacobian)
        settled = replace(
            self,
            step=step,
            jacobian=jacobian,
            own=tuple(own),
            columns=columns,
            rows=rows,
            settled_own=tuple(set(self.columns) - set(columns)),
        )
        return settled, gram


Walked = tuple[tuple[Gradients, ...], set[torch.Tensor], dict[torch.Tensor, torch.Tensor]]
"""Own gradients of each task; shared parameters with a gradient; rows with entries of those whose are all sparse."""


def exact_pass(
    step: Step, rows: Rows | None = None, take: Callable[[Step, Rows], Walked] | None = None
) -> ExactPass:
    """Take the gradients of T losses with respect to the shared parameters [T, P] and to each task's own.

    Args:
        step: the losses and who owns what.
        rows: where the Jacobian goes; None takes the memory of the method.
        take: how the rows are taken; None takes them task by task.
    """
    if rows is None:
        rows = rows_for(step, step.roles.shared, len(step.inside))
    own, touched, sparse = (take or one_by_one)(step, rows)
    if step.factor is not None:
        rows.jacobian.mul_((1 / step.factor).to(device=rows.jacobian.device, dtype=rows.jacobian.dtype))
    reached = set(touched)
    for task in own:
        for tensor, _ in task:
            reached.add(tensor)
    return ExactPass(
        step,
        rows.jacobian,
        own,
        step.roles.shared,
        frozenset(reached),
        rows.partial,
        rows=rows,
        sparse=sparse,
    )


def one_by_one(step: Step, rows: Rows) -> Walked:
    """Take the gradients task by task; each head is walked once, the graph freed with the last task."""
    roles, losses, recomputation = step.roles, step.scaled, step.recomputation
    columns, layout = roles.shared, rows.layout
    own: list[Gradients] = []
    touched: set[torch.Tensor] = set()
    entries: dict[torch.Tensor, list[torch.Tensor] | None] = {}  # None: some task's gradient is dense
    last, number = len(losses) - 1, 0
    arrivals = Arrivals(columns) if max(layout.widths, default=0) >= _LARGE else None
    with recomputation, nullcontext() if arrivals is None else arrivals.awaited():
        for task, loss in enumerate(losses):
            mine, retain = roles.own[task], step.request.retain_graph or task < last
            inputs, wanted = [], []
            if task in step.inside:
                for place, mask in enumerate(roles.reached):
                    if mask >> task & 1:
                        wanted.append(place)
                        inputs.append(columns[place])
            inputs += mine
            row = rows.row(number) if task in step.inside else rows.jacobian
            if arrivals is None or not wanted:
                found = gradients_of([loss], inputs, None, retain_graph=retain)
            else:
                places = torch.split(row, layout.widths)
                roots = [gradient_edge(loss)[0]] if loss.requires_grad else []
                with arrivals.of_backward(roots, partial(_lay_one, places)):
                    found = gradients_of([loss], inputs, None, retain_graph=retain)
            own.append(present(mine, found[len(wanted) :]))
            if task in step.inside:
                left: list[torch.Tensor | None] = [None] * len(columns)
                for place, gradient in zip(wanted, found):  # noqa: B905, own ones follow
                    left[place] = gradient
                    if gradient is None:
                        continue
                    tensor = columns[place]
                    if gradient.layout is not torch.strided and (tensor in entries or tensor not in touched):
                        _note_entries(entries, tensor, gradient)
                    elif tensor in entries:
                        entries[tensor] = None
                    touched.add(tensor)
                if arrivals is not None and arrivals.taken:
                    for place, piece in enumerate(places):
                        if place not in arrivals.taken:
                            lay(piece, left[place])
                else:
                    layout.write(row, left)
                del left
                rows.filled(number)
                number += 1
            del found  # its memory serves the next task's gradients
            recomputation.next()
    sparse = {}
    for tensor, held in entries.items():
        # On several processes the other ranks' entries lie elsewhere: the sum over the ranks is dense.
        if held and step.reduction is None:
            sparse[tensor] = torch.unique(torch.cat(held))
    return tuple(own), touched, sparse


def _note_entries(
    entries: dict[torch.Tensor, list[torch.Tensor] | None], tensor: torch.Tensor, gradient: torch.Tensor
) -> None:
    """Note which rows of a parameter a sparse gradient has entries in."""
    held = entries.setdefault(tensor, [])
    if gradient.layout is not torch.sparse_coo or gradient.sparse_dim() != 1:
        entries[tensor] = None  # laid out in another way: it is written out
    elif held is not None:
        held.append(gradient._indices()[0])


def _lay_one(places: Sequence[torch.Tensor], number: int, gradient: torch.Tensor) -> None:
    lay(places[number], gradient)


def weighted_shared(step: Step, weights: torch.Tensor) -> Gradients:
    """Return gradients of the shared parameters for the losses of the problem, weighted by one weight for each row."""
    roles = step.roles
    inside = [step.scaled[task] for task in step.inside]
    reached = [t for t, mask in zip(roles.shared, roles.reached, strict=True) if mask]
    with step.recomputation:
        found = gradients_of(
            inside, reached, seeds_of(inside, weights), retain_graph=step.request.retain_graph
        )
    return present(reached, found)


def reached_by(roles: Roles) -> set[torch.Tensor]:
    """Return the parameters, shared and own, that the losses reach."""
    reached = {tensor for tensor, mask in zip(roles.shared, roles.reached, strict=True) if mask}
    return reached | {tensor for task in roles.own for tensor in task}
