"""The exact Gramian without a T×P matrix: the gradients of all tasks, one segment of the graph after the other.

Each task's gradient is carried backward through a segment, the inner products of what it leaves in the segment's
parameters are added to the Gramian, and the rows are let go. Once the weights are known, one weighted backward gives
the gradients. Work: T + 1 backwards instead of T. Memory beside the graph: T rows of the largest parameter, and the T
gradients that wait at the edges between two segments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, Node

from detente.autograd.exact import Pass
from detente.autograd.flat import Gradients, Layout, gradients_of, present, seeds_of
from detente.autograd.gramian import gramian
from detente.autograd.partition import Edge, Memory, Partition, gradient_edge
from detente.autograd.segments import Segment, segments_of


@dataclass
class LowPass(Pass):
    """Inner products of task gradients that are not kept.

    Attributes:
        blocks: one [T, T] float64 for each shared parameter.
        segments: how many pieces the graph was cut into.
    """

    partition: Partition = field(kw_only=True)
    blocks: list[torch.Tensor] = field(kw_only=True)
    segments: int = field(kw_only=True)
    retain_graph: bool = field(kw_only=True)

    def products(self, sizes: Sequence[int] | None) -> torch.Tensor:
        """[T, T], or [B, T, T] for one block per parameter."""
        stacked = torch.stack(self.blocks)
        return stacked.sum(dim=0) if sizes is None else stacked

    def unscale(self, factor: torch.Tensor) -> None:
        """Take it back from the inner products; the weighted backward starts from the multiplied losses."""
        self.factor = factor
        square = factor.to(torch.float64).square()
        self.blocks = [block / square.to(block.device) for block in self.blocks]

    def shared_by_weights(self, weights: torch.Tensor) -> Gradients:
        """The weighted backward."""
        reached = [t for t, mask in zip(self.partition.shared, self.partition.reached, strict=True) if mask]
        seeds = seeds_of(self.losses, weights)
        return present(reached, gradients_of(self.losses, reached, seeds, retain_graph=self.retain_graph))


def low_pass(
    losses: Sequence[torch.Tensor], partition: Partition, memory: Memory, *, retain_graph: bool
) -> LowPass:
    """Take the inner products of T tasks' gradients with respect to ``partition.shared``, and own gradients.

    Args:
        losses: T scalars with their graph.
        partition: who owns what.
        memory: lends room for the rows of a segment.
        retain_graph: keep the graph after the weighted backward.
    """
    tasks = len(losses)
    sizes = {tensor: Layout((tensor,)).columns for tensor in partition.shared}
    mine: list[dict[torch.Tensor, torch.Tensor]] = [{} for _ in losses]
    owned = [set(tensors) for tensors in partition.own]
    own_sizes = {tensor: 0 for tensors in partition.own for tensor in tensors if tensor not in sizes}
    segments = segments_of(losses, {**sizes, **own_sizes}, max(sizes.values()))
    device = losses[0].device
    blocks = {t: torch.zeros(tasks, tasks, dtype=torch.float64, device=t.device) for t in partition.shared}
    # What waits at the edges: for each task the gradients that have left the segments done so far.
    waiting: list[dict[Edge, torch.Tensor]] = [
        {gradient_edge(loss): torch.ones_like(loss)} for loss in losses
    ]
    # Gradients of parameters that several segments feed, until the last of these is done.
    partial: list[dict[torch.Tensor, torch.Tensor]] = [{} for _ in losses]
    for segment in segments:
        ending = tuple(leaf for leaf in segment.complete if leaf in sizes)
        layout = Layout(ending)
        matrix = torch.empty(0)
        if ending:
            matrix = memory.buffer(tasks, layout.columns, layout.like)
        with _held_at(segment.leaving):
            for task in range(tasks):
                found = _carry(segment, waiting[task])
                for leaf, gradient in found.items():
                    held = mine[task] if leaf in owned[task] else partial[task]
                    held[leaf] = held[leaf] + gradient if leaf in held else gradient
                del found
                if ending:  # at once into one matrix, so that no gradient is held twice
                    layout.write(matrix[task], [partial[task].pop(leaf, None) for leaf in ending])
        for leaf, columns in zip(ending, layout.split_columns(matrix) if ending else (), strict=True):
            blocks[leaf] = gramian(columns)
    own = [
        [(tensor, held[tensor]) for tensor in tensors if tensor in held]
        for tensors, held in zip(partition.own, mine, strict=True)
    ]
    return LowPass(
        losses,
        "exact",
        own=own,
        columns=partition.shared,
        partition=partition,
        blocks=[block.to(device) for block in blocks.values()],
        segments=len(segments),
        retain_graph=retain_graph,
    )


def _carry(segment: Segment, waiting: dict[Edge, torch.Tensor]) -> dict[torch.Tensor, torch.Tensor]:
    """One task's gradient through one segment, from the edges where it waits to those by which it leaves.

    Returns:
        The gradients it leaves in the segment's leaves.
    """
    entering = [edge for edge in waiting if edge[0] in segment.nodes]
    wanted: list[Any] = [*(GradientEdge(*edge) for edge in segment.leaving), *segment.leaves]
    if not entering or not wanted:
        return {}
    seeds = [waiting.pop(edge) for edge in entering]
    found = torch.autograd.grad(
        [GradientEdge(*edge) for edge in entering], wanted, seeds, retain_graph=True, allow_unused=True
    )
    for edge, gradient in zip(segment.leaving, found, strict=False):
        if gradient is not None:
            waiting[edge] = waiting[edge] + gradient if edge in waiting else gradient
    return dict(present(segment.leaves, found[len(segment.leaving) :]))


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
