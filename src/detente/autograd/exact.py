"""Gradients of each task with respect to the shared parameters themselves, or to a layer of them.

One backward through the trunk per task, each head walked once, the graph freed with the last task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from detente.autograd.blocks import block_gramians
from detente.autograd.flat import Gradients, Layout, gradients_of, lay, present, seeds_of
from detente.autograd.gramian import gramian
from detente.autograd.partition import Memory, Partition, gradient_edge
from detente.autograd.reduction import Reduction
from detente.autograd.rows import Arrivals, Rows
from detente.values import Space


@dataclass
class Pass:
    """The task gradients of one step, and how a direction becomes gradients of the parameters.

    Attributes:
        losses: T scalars with their graph.
        space: where the gradients were taken.
        jacobian: [T, P] or None if none were taken.
        own: for each task the gradients of its own parameters, not weighted.
        activations: [P] the flattened representation, if the space is ``features``.
        columns: the parameters in the order of the Jacobian's columns; empty if the space is ``features``.
        reduction: on several processes, what makes the whole of the ranks' parts.
        partial: True if this rank holds a part of each row, so that Gramians are to be added over the ranks.
        reached: parameters, shared and own, that this rank's losses have gradients for; on several processes.
        factor: what a gradient scaler multiplied the losses by. The Jacobian is that of the losses themselves; what
            goes to the parameters is multiplied by it, as ``scaler.scale(loss).backward()`` would.
    """

    losses: Sequence[torch.Tensor]
    space: Space
    jacobian: torch.Tensor | None = None
    own: list[Gradients] = field(default_factory=list)
    activations: torch.Tensor | None = None
    columns: tuple[torch.Tensor, ...] = field(default=(), kw_only=True)
    reduction: Reduction | None = field(default=None, kw_only=True)
    partial: bool = field(default=False, kw_only=True)
    reached: set[torch.Tensor] = field(default_factory=set, kw_only=True)
    factor: torch.Tensor | None = field(default=None, kw_only=True)

    def unscale(self, factor: torch.Tensor) -> None:
        """Take back what a gradient scaler multiplied the losses by."""
        assert self.jacobian is not None
        self.factor = factor
        self.jacobian.mul_((1 / factor).to(device=self.jacobian.device, dtype=self.jacobian.dtype))

    def times_factor(self, values: torch.Tensor) -> torch.Tensor:
        """``values``, to which the scaler's factor belongs once they become gradients of the parameters."""
        if self.factor is None:
            return values
        return values * self.factor.to(device=values.device, dtype=values.dtype)

    def own_gradients(self, weights: torch.Tensor | None = None) -> Gradients:
        """Gradients of the tasks' own parameters, times the task's weight [T] where weights are given."""
        factors = [1.0] * len(self.own) if weights is None else weights.tolist()
        found = [
            (tensor, gradient if factor == 1.0 else gradient * factor)
            for factor, task in zip(factors, self.own, strict=True)
            for tensor, gradient in task
        ]
        return found if self.reduction is None else self.reduction.gradients(self.reduction.own, found)

    def products(self, sizes: Sequence[int] | None) -> torch.Tensor:
        """Inner products of the task gradients [T, T] in float64; [B, T, T] for blocks of columns of these sizes."""
        assert self.jacobian is not None
        return gramian(self.jacobian) if sizes is None else block_gramians(self.jacobian, sizes)

    def length(self, direction: torch.Tensor) -> torch.Tensor:
        """Norm of a direction in this pass's space, a float64 scalar on its device."""
        length: torch.Tensor = torch.linalg.vector_norm(direction, dtype=torch.float64)
        if self.reduction is None or not self.partial:
            return length
        return self.reduction.ranks.sum(length * length).sqrt()

    def shared(self, direction: torch.Tensor, weights: torch.Tensor | None) -> Gradients:
        """Gradients of the shared parameters, for a direction [P] in this pass's space.

        ``weights`` [T] are those of the direction (its length included), where it has any.
        """
        raise AssertionError("the passes below define it")

    def shared_by_weights(self, weights: torch.Tensor) -> Gradients:
        """The same for the direction of ``weights`` [T]."""
        assert self.jacobian is not None
        on_device = weights.to(device=self.jacobian.device, dtype=self.jacobian.dtype)
        return self.shared(on_device @ self.jacobian, weights)


@dataclass
class ExactPass(Pass):
    """Task gradients with respect to all shared parameters.

    Attributes:
        touched: those that some loss has a gradient for; the others keep their ``.grad``.
        rows: where the Jacobian lies.
    """

    touched: set[torch.Tensor] = field(kw_only=True)
    rows: Rows = field(kw_only=True)

    def shared(self, direction: torch.Tensor, weights: torch.Tensor | None) -> Gradients:
        """The direction, cut into the shapes of the parameters."""
        return self._touched(Layout(self.columns).split(self.rows.whole(self.times_factor(direction))))

    def shared_by_weights(self, weights: torch.Tensor) -> Gradients:
        """The same without the direction as one vector."""
        assert self.jacobian is not None
        if self.partial:
            return super().shared_by_weights(weights)
        on_device = weights.to(device=self.jacobian.device, dtype=self.jacobian.dtype)
        on_device = self.times_factor(on_device)
        return self._touched(Layout(self.columns).weighted(on_device, self.jacobian))

    def _touched(self, pieces: Sequence[torch.Tensor]) -> Gradients:
        touched = self.touched if self.reduction is None else self.reduction.touched
        return [(t, piece) for t, piece in zip(self.columns, pieces, strict=True) if t in touched]


def exact_pass(
    losses: Sequence[torch.Tensor],
    partition: Partition,
    memory: Memory,
    *,
    retain_graph: bool,
    batched: bool = False,
    rows: Rows | None = None,
) -> ExactPass:
    """Take the gradients of T losses with respect to ``partition.shared`` [T, P] and to each task's own parameters.

    Args:
        losses: T scalars with their graph.
        partition: who owns what.
        memory: lends the [T, P] buffer.
        retain_graph: keep the graph after the last task.
        batched: one vectorised backward instead of T; every task then walks all heads, and every operation of the
            graph must support ``torch.vmap``.
        rows: where the Jacobian goes; None lays it into the buffer of ``memory``.
    """
    rows = Rows(Layout(partition.shared), len(losses), memory) if rows is None else rows
    if batched:
        own, touched = _batched(losses, partition, rows, retain_graph)
    else:
        own, touched = _one_by_one(losses, partition, rows, retain_graph)
    return ExactPass(
        losses, "exact", rows.jacobian, own, columns=partition.shared, touched=touched, rows=rows
    )


def _one_by_one(
    losses: Sequence[torch.Tensor], partition: Partition, rows: Rows, retain_graph: bool
) -> tuple[list[Gradients], set[torch.Tensor]]:
    own: list[Gradients] = []
    touched: set[torch.Tensor] = set()
    columns = partition.shared
    arrivals = Arrivals(columns)
    last = len(losses) - 1
    with arrivals.awaited():
        for task, loss in enumerate(losses):
            row, mine = rows.row(task), partition.own[task]
            wanted = [place for place, mask in enumerate(partition.reached) if mask >> task & 1]
            inputs = [*(columns[place] for place in wanted), *mine]
            roots = [gradient_edge(loss)[0]] if loss.requires_grad else []
            places = rows.layout.places(row)
            with arrivals.of_backward(roots, partial(_lay_one, places)):
                found = gradients_of([loss], inputs, None, retain_graph=retain_graph or task < last)
            left = dict(zip(wanted, found, strict=False))
            touched |= {columns[place] for place in wanted if left[place] is not None}
            if arrivals.taken:
                for place, piece in enumerate(places):
                    if place not in arrivals.taken:
                        lay(piece, left.get(place))
            else:
                rows.layout.write(row, [left.get(place) for place in range(len(columns))])
            rows.filled(task)
            own.append(present(mine, found[len(wanted) :]))
            del found, left  # their memory serves the next task's gradients
    return own, touched


def _lay_one(places: Sequence[torch.Tensor], number: int, gradient: torch.Tensor) -> None:
    lay(places[number], gradient)


def _batched(
    losses: Sequence[torch.Tensor],
    partition: Partition,
    rows: Rows,
    retain_graph: bool,
) -> tuple[list[Gradients], set[torch.Tensor]]:
    mine = [tensor for tensors in partition.own for tensor in tensors]
    shared = [tensor for tensor, mask in zip(partition.shared, partition.reached, strict=True) if mask]
    stacked = torch.stack([loss.reshape(()) for loss in losses])
    seeds = torch.eye(len(losses), dtype=stacked.dtype, device=stacked.device)
    if not stacked.requires_grad:  # all tasks are absent on this rank
        for task in range(len(losses)):
            rows.write(task, [None] * len(partition.shared))
        return [[] for _ in losses], set()
    try:
        found = torch.autograd.grad(
            stacked,
            [*shared, *mine],
            seeds,
            retain_graph=retain_graph,
            allow_unused=True,
            is_grads_batched=True,
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            "memory='batched' takes the gradients of all tasks in one vectorised backward, and some operation of this "
            "graph does not support that (a compiled part, or an autograd function without vmap). Use memory='fast'."
        ) from error
    by_tensor = dict(present([*shared, *mine], found))
    own: list[Gradients] = []
    for task in range(len(losses)):
        rows.write(
            task, [None if (g := by_tensor.get(tensor)) is None else g[task] for tensor in partition.shared]
        )
        own.append(
            [(tensor, by_tensor[tensor][task]) for tensor in partition.own[task] if tensor in by_tensor]
        )
    return own, by_tensor.keys() & set(shared)


@dataclass
class LayerPass(Pass):
    """Task gradients with respect to some shared parameters; one weighted backward serves all the others."""

    partition: Partition = field(kw_only=True)
    retain_graph: bool = field(kw_only=True)

    def shared(self, direction: torch.Tensor, weights: torch.Tensor | None) -> Gradients:
        """The weighted backward through heads and trunk."""
        assert weights is not None
        reached = [t for t, mask in zip(self.partition.shared, self.partition.reached, strict=True) if mask]
        seeds = seeds_of(self.losses, weights)
        found = present(reached, gradients_of(self.losses, reached, seeds, retain_graph=self.retain_graph))
        return found if self.reduction is None else self.reduction.gradients(self.partition.shared, found)


def layer_pass(
    losses: Sequence[torch.Tensor],
    partition: Partition,
    layer: Sequence[torch.Tensor],
    rows: Rows,
    *,
    retain_graph: bool,
) -> LayerPass:
    """Take the gradients of T losses with respect to ``layer`` [T, P] and to each task's own parameters."""
    own = []
    for task, loss in enumerate(losses):
        mine = partition.own[task]
        found = gradients_of([loss], [*layer, *mine], None, retain_graph=True)
        rows.write(task, found[: len(layer)])
        own.append(present(mine, found[len(layer) :]))
    return LayerPass(
        losses,
        "layer",
        rows.jacobian,
        own,
        columns=rows.layout.tensors,
        partition=partition,
        retain_graph=retain_graph,
    )


def check_layer(layer: Sequence[torch.Tensor], partition: Partition) -> None:
    """See that every parameter to solve on is shared.

    Raises:
        ValueError: one is not.
    """
    shared = set(partition.shared)
    for position, tensor in enumerate(layer):
        if tensor not in shared:
            raise ValueError(
                f"parameter {position} of solve_on= (shape {tuple(tensor.shape)}) is not shared by the tasks; "
                "name parameters that two or more losses reach, such as the last shared layer."
            )
