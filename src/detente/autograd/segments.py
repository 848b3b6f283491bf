"""A graph cut into a few consecutive pieces, so that little is held at once.

The nodes are put in an order in which every node comes after all that feed gradients into it; a segment is a run of
that order. While T gradients are carried through a segment, there are the rows of its parameters, those of parameters
that earlier segments began, and the gradients that wait at the edges that cross its ends. The cuts are those with which
the most that is held at once is least; among these, as few as possible.

A parameter that is used throughout (the weight of a recurrent network) has its rows held from its first use to its
last, so that a cut in between saves nothing and costs what waits there.

Every segment takes T calls of autograd. Where many small layers follow one another, a segment may therefore hold an
eighth of all T rows, or one row, whichever is less: the gradients that the step ends with take as much.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Any, TypeAlias

import torch
from torch.autograd.graph import Node

from detente.autograd.graph import Edge, gradient_edge

# Into how many parts T rows are split at least where that is easy.
_PARTS = 8

Span: TypeAlias = tuple[int, int, int]
"""The first and the last node that feeds a parameter, and the bytes of its rows."""


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
    losses: Sequence[torch.Tensor], sizes: Mapping[torch.Tensor, int], tasks: int
) -> list[Segment]:
    """Cut the graph of the losses where T gradients and T rows take the least memory.

    Args:
        losses: scalars with their graph.
        sizes: the parameters that count, with the bytes of one row's entries; 0 where no rows are kept. Other leaves
            are ignored.
        tasks: T, the number of rows.
    """
    order, leaves_of = _ordered(losses, sizes)
    allowed = sum(sizes.values()) * tasks // max(tasks, _PARTS)
    least, cuts = _cuts(_spans(order, leaves_of, sizes, tasks), _waiting(losses, order), allowed)
    if sum(map(len, leaves_of.values())) > len({leaf for fed in leaves_of.values() for leaf in fed}):
        # Where every task runs the trunk on inputs of its own, its layers are to be passed side by side.
        abreast = _abreast(order)
        found = _cuts(_spans(abreast, leaves_of, sizes, tasks), _waiting(losses, abreast), allowed)
        if found[0] < least:
            order, (_, cuts) = abreast, found
    last = {leaf: number for number, node in enumerate(order) for leaf in leaves_of.get(node, ())}
    place = {node: number for number, stop in enumerate(cuts[1:]) for node in order[cuts[number] : stop]}
    segments = []
    for number, (start, stop) in enumerate(pairwise(cuts)):
        leaving: dict[Edge, None] = {}
        leaves: dict[torch.Tensor, None] = {}
        for node in order[start:stop]:
            leaves.update(dict.fromkeys(leaves_of.get(node, ())))
            for child, output in node.next_functions:
                if child is not None and place.get(child, number) > number:
                    leaving[child, output] = None
        complete = tuple(leaf for leaf in leaves if last[leaf] < stop)
        segments.append(Segment(frozenset(order[start:stop]), tuple(leaving), tuple(leaves), complete))
    return segments


def _spans(
    order: Sequence[Node],
    leaves_of: Mapping[Node, Sequence[torch.Tensor]],
    sizes: Mapping[torch.Tensor, int],
    tasks: int,
) -> list[Span]:
    uses: dict[torch.Tensor, list[int]] = {}
    for number, node in enumerate(order):
        for leaf in leaves_of.get(node, ()):
            uses.setdefault(leaf, []).append(number)
    return [(times[0], times[-1], tasks * sizes[leaf]) for leaf, times in uses.items() if sizes[leaf]]


def _cuts(spans: Sequence[Span], waiting: Sequence[int], allowed: int) -> tuple[float, list[int]]:
    """The least that can be held at once, in bytes, and where to cut the order for that, its two ends included.

    Args:
        spans: of the parameters.
        waiting: bytes of the gradients that wait before each node, and 0 behind the last.
        allowed: bytes that may be held although less would do.
    """
    # Rows begin and end at a few nodes only: between two of these, a cut is best where least waits.
    events = sorted({number for first, last, _ in spans for number in (first, last)})
    places = [0, *(min(range(a + 1, b + 1), key=waiting.__getitem__) for a, b in pairwise(events))]
    places.append(len(waiting) - 1)
    waits = [waiting[place] for place in places]
    begun, ended = ([0] * len(places) for _ in range(2))
    for first, last, size in spans:
        begun[bisect_right(places, first)] += size
        ended[bisect_right(places, last)] += size
    begun, ended = list(accumulate(begun)), list(accumulate(ended))  # before each place

    # Rows begun before count twice in a segment: they are added up until they are put together.
    open_at = [one - other for one, other in zip(begun, ended, strict=True)]

    # The least there can be at the worst moment, up to each place. Reaching further back only adds rows.
    infinite = float("inf")
    least = [0.0] + [infinite] * (len(places) - 1)
    for stop in range(1, len(places)):
        for start in range(stop - 1, -1, -1):
            rows = begun[stop] - ended[start]
            if rows >= least[stop]:
                break
            worst = rows + open_at[start] + max(waits[start], waits[stop])
            least[stop] = min(least[stop], max(least[start], worst))
    # The fewest segments that keep to it, or to what is allowed.
    limit = max(least[-1], allowed)
    fewest = [(0.0, 0)] + [(infinite, 0)] * (len(places) - 1)
    for stop in range(1, len(places)):
        for start in range(stop - 1, -1, -1):
            rows = begun[stop] - ended[start]
            if rows > limit:
                break
            if rows + open_at[start] + max(waits[start], waits[stop]) <= limit:
                fewest[stop] = min(fewest[stop], (fewest[start][0] + 1, start))
    cuts = [len(places) - 1]
    while cuts[-1]:
        cuts.append(fewest[cuts[-1]][1])
    return least[-1], [places[cut] for cut in reversed(cuts)]


def _waiting(losses: Sequence[torch.Tensor], order: Sequence[Node]) -> list[int]:
    """Bytes of the gradients that wait before each node, all losses together; 0 behind the last."""
    place = {node: number for number, node in enumerate(order)}
    masks: dict[Node, int] = {}
    for bit, loss in enumerate(losses):
        node = gradient_edge(loss)[0]
        masks[node] = masks.get(node, 0) | 1 << bit
    begins: dict[Edge, int] = {}  # where the first gradient arrives at each edge
    carried: dict[Edge, int] = {}
    for number, node in enumerate(order):
        mask = masks[node]
        for child, output in node.next_functions:
            if child is not None and child in place:
                masks[child] = masks.get(child, 0) | mask
                begins.setdefault((child, output), number)
                carried[child, output] = carried.get((child, output), 0) | mask
    change = [0] * (len(order) + 1)
    for edge, begin in begins.items():
        size = carried[edge].bit_count() * _bytes(edge)
        change[begin + 1] += size
        change[place[edge[0]] + 1] -= size
    return list(accumulate(change))


def _bytes(edge: Edge) -> int:
    """Of the gradient that flows along an edge."""
    node, number = edge
    metadata: Any = node._input_metadata[number]
    if metadata.is_nested_tensor:  # has no shape to tell beforehand
        return 0
    size: int = prod(metadata.shape) * metadata.dtype.itemsize
    return size


def _abreast(order: Sequence[Node]) -> list[Node]:
    """The same nodes by their distance from the losses, which begin so that all end together."""
    place = {node: number for number, node in enumerate(order)}
    children = [[place[child] for child, _ in node.next_functions if child in place] for node in order]
    heights = [0] * len(order)
    for number in range(len(order) - 1, -1, -1):
        heights[number] = 1 + max((heights[child] for child in children[number]), default=0)
    depths = [max(heights) - height for height in heights]  # of a loss; of the others the distance counts
    inner = {child for below in children for child in below}
    for child in inner:
        depths[child] = 0
    for number, below in enumerate(children):
        for child in below:
            depths[child] = max(depths[child], depths[number] + 1)
    return [order[number] for number in sorted(range(len(order)), key=depths.__getitem__)]


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
