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
from detente.autograd.exact import Pass
from detente.autograd.flat import Gradients, Layout, gradients_of, present, seeds_of
from detente.autograd.partition import Edge, Memory, Partition, gradient_edge
from detente.autograd.reduction import Reduction
from detente.autograd.rows import Arrivals
from detente.autograd.segments import Segment, segments_of


@dataclass
class LowPass(Pass):
    """Inner products of task gradients that are not kept.

    Attributes:
        gramian: [T, T] float64; on several processes what this rank's columns contribute.
        segments: how many pieces the graph was cut into; on several processes in how many the rows were sent.
    """

    partition: Partition = field(kw_only=True)
    gramian: torch.Tensor = field(kw_only=True)
    segments: int = field(kw_only=True)
    retain_graph: bool = field(kw_only=True)

    def products(self, sizes: Sequence[int] | None) -> torch.Tensor:
        """[T, T]; methods that look at blocks are refused before."""
        assert sizes is None
        return self.gramian

    def unscale(self, factor: torch.Tensor) -> None:
        """Take it back from the inner products; the weighted backward starts from the multiplied losses."""
        self.factor = factor
        self.gramian = self.gramian / factor.to(self.gramian).square()

    def shared_by_weights(self, weights: torch.Tensor) -> Gradients:
        """The weighted backward."""
        reached = [t for t, mask in zip(self.partition.shared, self.partition.reached, strict=True) if mask]
        seeds = seeds_of(self.losses, weights)
        found = present(reached, gradients_of(self.losses, reached, seeds, retain_graph=self.retain_graph))
        return found if self.reduction is None else self.reduction.gradients(self.reduction.shared, found)


def low_pass(
    losses: Sequence[torch.Tensor],
    partition: Partition,
    memory: Memory,
    *,
    retain_graph: bool,
    reduction: Reduction | None = None,
) -> LowPass:
    """Take the inner products of T tasks' gradients with respect to ``partition.shared``, and own gradients.

    Args:
        losses: T scalars with their graph; on several processes without one where a task is absent here.
        partition: who owns what.
        memory: lends room for the rows of a segment.
        retain_graph: keep the graph after the weighted backward.
        reduction: on several processes, what makes the whole of the ranks' parts.
    """
    tasks, layout = len(losses), Layout(partition.shared)
    sizes = dict(zip(partition.shared, layout.widths, strict=True))
    counted = {tensor: 0 for tensors in partition.own for tensor in tensors}
    bytes_each = layout.like.element_size()
    counted |= {tensor: bytes_each * size for tensor, size in sizes.items()}
    here = [loss for loss in losses if loss.requires_grad]
    segments = segments_of(here, counted, tasks) if here else []
    endings = [[leaf for leaf in segment.complete if leaf in sizes] for segment in segments]
    groups = [ending for ending in endings if ending]
    if reduction is not None:
        groups = in_common_order(groups, partition.shared, sizes, max(sizes.values()), reduction.ranks)
    known = {leaf for ending in endings for leaf in ending}
    buckets = Buckets(groups, known, tasks, memory, None if reduction is None else reduction.ranks)
    # What waits at the edges: for each task the gradients that have left the segments done so far.
    waiting: list[dict[Edge, torch.Tensor]] = [
        {gradient_edge(loss): torch.ones_like(loss)} if loss.requires_grad else {} for loss in losses
    ]
    left = _Left(partition.own, tasks, buckets)
    for segment, ending in zip(segments, endings, strict=True):
        arrivals, ends = Arrivals(segment.leaves), frozenset(ending)
        with _held_at(segment.leaving), arrivals.awaited():
            for task in range(tasks):
                receive = partial(left.receive, task, segment.leaves, ends)
                for place, gradient in _carry(segment, waiting[task], arrivals, receive):
                    receive(place, gradient)
                left.close(task, ending)
        buckets.complete(ending)
    own = [
        [(tensor, held[tensor]) for tensor in tensors if tensor in held]
        for tensors, held in zip(partition.own, left.own, strict=True)
    ]
    return LowPass(
        losses,
        "exact",
        own=own,
        columns=partition.shared,
        reduction=reduction,
        partial=reduction is not None,
        reached=left.touched | {tensor for task in own for tensor, _ in task},
        partition=partition,
        gramian=buckets.gramian.to(losses[0].device),
        segments=len(segments) if reduction is None else len(groups),
        retain_graph=retain_graph,
    )


class _Left:
    """What the tasks' gradients leave in the leaves of the segments.

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
        """The gradient of one of the leaves of a segment; ``ends`` are those that no later segment feeds."""
        leaf = leaves[place]
        if leaf in ends and leaf not in self._begun[task]:
            # At once, so that no task's gradients are held twice.
            self.touched.add(leaf)
            self._buckets.take(task, leaf, gradient)
            return
        held = self.own[task] if leaf in self._owned[task] else self._begun[task]
        held[leaf] = held[leaf] + gradient if leaf in held else gradient

    def close(self, task: int, ending: Sequence[torch.Tensor]) -> None:
        """A task is through the last segment that feeds these."""
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
    """One task's gradient through one segment, from the edges where it waits to those by which it leaves.

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
