"""The exact Gramian without a T×P matrix: the gradients of all tasks, one segment of the graph after the other.

Each task's gradient is carried backward through a segment, the inner products of what it leaves in the segment's
parameters are added to the Gramian, and the rows are let go. Once the weights are known, one weighted backward gives
the gradients. Work: T + 1 backwards instead of T. Memory beside the graph: T rows of one segment's parameters, of the
largest one at least, and the T gradients that wait at the edges between two segments.

On several processes the rows of a few parameters are added over the ranks before their inner products are taken, in an
order of the parameters that all ranks agree on; each rank takes the products of its part of the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, Node

from detente.autograd.buckets import Buckets, in_common_order
from detente.autograd.entries import sum_of
from detente.autograd.graph import Edge, gradient_edge
from detente.autograd.jacobian import Arrivals, Pass, weighted_shared
from detente.autograd.layout import Gradients, Layout
from detente.autograd.segments import Segment, segments_of
from detente.autograd.step import Step


@dataclass(frozen=True)
class LowPass(Pass):
    """Hold inner products of task gradients that are not kept.

    Attributes:
        gramian: [T, T] float64; on several processes what this rank's columns contribute.
        segments: how many pieces the graph was cut into; on several processes in how many the rows were sent.
    """

    gramian: torch.Tensor = field(kw_only=True)
    segments: int = field(kw_only=True)

    def products(self, sizes: Sequence[int] | None) -> torch.Tensor:
        """Return [T, T]; methods that look at blocks are refused before."""
        assert sizes is None
        return self.gramian

    def carry(self, direction: torch.Tensor | None, weights: torch.Tensor | None) -> Gradients:
        """Take the weighted backward."""
        assert weights is not None, "checked before"
        return weighted_shared(self.step, weights)


def low_pass(step: Step) -> LowPass:
    """Take the inner products of T tasks' gradients with respect to the shared parameters, and own gradients.

    On several processes a loss is without a graph where its task is absent.
    """
    roles, losses, reduction = step.roles, step.scaled, step.reduction
    tasks, layout = len(losses), Layout(roles.shared)
    sizes = dict(zip(roles.shared, layout.widths, strict=True))
    counted = {tensor: 0 for tensors in roles.own for tensor in tensors}
    counted |= {tensor: layout.dtype.itemsize * size for tensor, size in sizes.items()}
    here = [loss for loss in losses if loss.requires_grad]
    segments = segments_of(here, counted, tasks) if here else []
    endings = [[leaf for leaf in segment.complete if leaf in sizes] for segment in segments]
    groups = [ending for ending in endings if ending]
    if reduction is not None:
        groups = in_common_order(groups, roles.shared, sizes, max(sizes.values()), reduction.ranks)
    known = {leaf for ending in endings for leaf in ending}
    buckets = Buckets(groups, known, tasks, step.memory, None if reduction is None else reduction.ranks)
    # What waits at the edges: for each task the gradients that have left the segments done so far.
    waiting: list[dict[Edge, torch.Tensor]] = [
        {gradient_edge(loss): torch.ones_like(loss)} if loss.requires_grad else {} for loss in losses
    ]
    left = _Left(roles.own, tasks, buckets)
    with step.recomputation as recomputation:
        for segment, ending in zip(segments, endings, strict=True):
            arrivals, ends = Arrivals(segment.leaves), frozenset(ending)
            with _held_at(segment.leaving), arrivals.awaited():
                for task in range(tasks):
                    receive = partial(left.receive, task, segment.leaves, ends)
                    for place, gradient in _carry(segment, waiting[task], arrivals, receive):
                        receive(place, gradient)
                    left.close(task, ending)
                    recomputation.next()
            buckets.complete(ending)
    own: tuple[Gradients, ...] = tuple(
        [(tensor, held[tensor]) for tensor in tensors if tensor in held]
        for tensors, held in zip(roles.own, left.own, strict=True)
    )
    gramian = buckets.gramian.to(losses[0].device)
    if step.factor is not None:  # the weighted backward starts from the multiplied losses
        gramian = gramian / step.factor.to(gramian).square()
    if len(step.inside) < tasks:
        gramian = gramian[list(step.inside)][:, list(step.inside)]
    return LowPass(
        step,
        None,
        own,
        roles.shared,
        frozenset(left.touched) | {tensor for task in own for tensor, _ in task},
        reduction is not None,
        gramian=gramian,
        segments=len(segments) if reduction is None else len(groups),
    )


class _Left:
    """Collect what the tasks' gradients leave in the leaves of the segments.

    Args:
        owned: for each task its own parameters.
        tasks: T.
        buckets: where the rows of shared parameters are put together.

    Attributes:
        own: for each task the gradients of its own parameters.
        touched: shared parameters that some task has a gradient for.
    """

    def __init__(self, owned: Sequence[Sequence[torch.Tensor]], tasks: int, buckets: Buckets) -> None:
        self.own: list[dict[torch.Tensor, torch.Tensor]] = [{} for _ in range(tasks)]
        self.touched: set[torch.Tensor] = set()
        self._owned, self._buckets = [set(tensors) for tensors in owned], buckets
        # Gradients of parameters that several segments feed, until the last of these is done.
        self._begun: list[dict[torch.Tensor, torch.Tensor]] = [{} for _ in range(tasks)]

    def receive(
        self,
        task: int,
        leaves: Sequence[torch.Tensor],
        ends: frozenset[torch.Tensor],
        place: int,
        gradient: torch.Tensor,
    ) -> None:
        """Take the gradient of one of the leaves of a segment; ``ends`` are those that no later segment feeds."""
        leaf = leaves[place]
        if leaf in ends and leaf not in self._begun[task]:
            # At once, so that no task's gradients are held twice.
            self.touched.add(leaf)
            self._buckets.take(task, leaf, gradient)
            return
        held = self.own[task] if leaf in self._owned[task] else self._begun[task]
        held[leaf] = sum_of(held[leaf], gradient) if leaf in held else gradient

    def close(self, task: int, ending: Sequence[torch.Tensor]) -> None:
        """Note that a task is through the last segment that feeds these."""
        for leaf in ending:
            if leaf in self._begun[task]:
                self.touched.add(leaf)
                self._buckets.take(task, leaf, self._begun[task].pop(leaf))


def _carry(
    segment: Segment,
    waiting: dict[Edge, torch.Tensor],
    arrivals: Arrivals,
    receive: Callable[[int, torch.Tensor], None],
) -> list[tuple[int, torch.Tensor]]:
    """Carry one task's gradient through one segment, from the edges where it waits to those by which it leaves.

    Returns:
        Places and gradients of those of the segment's leaves that ``receive`` did not get.
    """
    entering = [edge for edge in waiting if edge[0] in segment.nodes]
    wanted: list[Any] = [*(GradientEdge(*edge) for edge in segment.leaving), *segment.leaves]
    if not entering or not wanted:
        return []
    seeds = [waiting.pop(edge) for edge in entering]
    with arrivals.of_backward([node for node, _ in entering], receive):
        found = torch.autograd.grad(
            [GradientEdge(*edge) for edge in entering], wanted, seeds, retain_graph=True, allow_unused=True
        )
    for edge, gradient in zip(segment.leaving, found, strict=False):
        if gradient is not None:
            waiting[edge] = waiting[edge] + gradient if edge in waiting else gradient
    return [
        (place, gradient)
        for place, gradient in enumerate(found[len(segment.leaving) :])
        if gradient is not None and place not in arrivals.taken
    ]


@contextmanager
def _held_at(edges: Sequence[Edge]) -> Iterator[None]:
    """While this lasts no gradient flows into the nodes behind these edges: one may lead to another."""
    nodes: dict[Node, None] = dict.fromkeys(node for node, _ in edges)
    handles = [node.register_prehook(lambda gradients: tuple(None for _ in gradients)) for node in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
