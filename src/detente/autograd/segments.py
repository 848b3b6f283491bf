"""A graph cut into consecutive pieces, none of which holds many parameters.

The nodes are put in an order in which every node comes after all that feed gradients into it; a segment is a run of
that order. Between two segments gradients wait at the edges that cross.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.autograd.graph import Node

from detente.autograd.partition import Edge, gradient_edge


@dataclass(frozen=True)
class Segment:
    """A run of nodes.

    Attributes:
        nodes: in order.
        leaving: edges by which gradients leave it for later segments.
        leaves: leaf tensors that its nodes feed.
        complete: those of them that no later segment feeds.
    """

    nodes: frozenset[Node]
    leaving: tuple[Edge, ...]
    leaves: tuple[torch.Tensor, ...]
    complete: tuple[torch.Tensor, ...]


def segments_of(
    losses: Sequence[torch.Tensor], sizes: Mapping[torch.Tensor, int], limit: int
) -> list[Segment]:
    """Cut the graph of T losses so that the parameters of a segment have at most ``limit`` entries together.

    Args:
        losses: T scalars with their graph.
        sizes: the parameters that count, with their numbers of entries; other leaves are ignored.
        limit: entries of a segment; a node that feeds more by itself is a segment of its own.
    """
    order, leaves_of = _ordered(losses, sizes)
    runs: list[list[Node]] = [[]]
    held: set[torch.Tensor] = set()
    for node in order:
        fed = held | set(leaves_of.get(node, ()))
        if runs[-1] and len(fed) > len(held) and sum(sizes[leaf] for leaf in fed) > limit and held:
            runs.append([])
            fed = set(leaves_of.get(node, ()))
        runs[-1].append(node)
        held = fed
    place = {node: number for number, run in enumerate(runs) for node in run}
    last = {leaf: place[node] for node in order for leaf in leaves_of.get(node, ())}
    segments = []
    for number, run in enumerate(runs):
        leaving: dict[Edge, None] = {}
        leaves: dict[torch.Tensor, None] = {}
        for node in run:
            leaves.update(dict.fromkeys(leaves_of.get(node, ())))
            for child, output in node.next_functions:
                if child is not None and place.get(child, number) > number:
                    leaving[child, output] = None
        complete = tuple(leaf for leaf in leaves if last[leaf] == number)
        segments.append(Segment(frozenset(run), tuple(leaving), tuple(leaves), complete))
    return segments


def _ordered(
    losses: Sequence[torch.Tensor], sizes: Mapping[torch.Tensor, int]
) -> tuple[list[Node], dict[Node, list[torch.Tensor]]]:
    """The inner nodes, parents before children and otherwise last made first, and the leaves that each feeds."""
    roots = list(dict.fromkeys(gradient_edge(loss)[0] for loss in losses))
    waiting: dict[Node, int] = dict.fromkeys(roots, 0)
    children: dict[Node, list[Node]] = {}
    leaves_of: dict[Node, list[torch.Tensor]] = {}
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node in children:
            continue
        children[node] = []
        for child, _ in node.next_functions:
            if child is None:
                continue
            variable = None if child.next_functions else getattr(child, "variable", None)
            if variable is not None:
                if variable in sizes:
                    leaves_of.setdefault(node, []).append(variable)
                continue
            children[node].append(child)
            waiting[child] = waiting.get(child, 0) + 1
            todo.append(child)
    order: list[Node] = []
    ready = [(-node._sequence_nr(), number, node) for number, node in enumerate(roots) if waiting[node] == 0]
    heapq.heapify(ready)
    count = len(ready)
    while ready:
        _, _, node = heapq.heappop(ready)
        order.append(node)
        for child in children[node]:
            waiting[child] -= 1
            if waiting[child] == 0:
                count += 1
                heapq.heappush(ready, (-child._sequence_nr(), count, child))
    return order, leaves_of
