"""Where the graph is cut for memory="low": least memory first, then fewest segments, against every way to cut."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from detente.autograd.segments import Segment, _cuts, segments_of


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Spans of parameters over a few nodes, and what waits before each node."""
    nodes = draw(st.integers(1, 7))
    ends = st.tuples(st.integers(0, nodes - 1), st.integers(0, nodes - 1)).map(sorted)
    spans = draw(st.lists(st.tuples(ends, st.integers(1, 9)), max_size=5))
    waiting = draw(st.lists(st.integers(0, 9), min_size=nodes - 1, max_size=nodes - 1))
    return [(first, last, size) for (first, last), size in spans], [0, *waiting, 0]


def worst(cuts: tuple[int, ...], spans: list[tuple[int, int, int]], waiting: list[int]) -> int:
    """The most that is held in any segment, said in the plainest way."""
    found = []
    for start, stop in pairwise(cuts):
        rows = sum(size for first, last, size in spans if first < stop and last >= start)
        rows += sum(size for first, last, size in spans if first < start <= last)
        found.append(rows + max(waiting[start], waiting[stop]))
    return max(found)


@settings(max_examples=300)
@given(chains(), st.integers(0, 20))
def test_no_way_to_cut_is_better(chain: tuple[list[tuple[int, int, int]], list[int]], allowed: int) -> None:
    spans, waiting = chain
    nodes = len(waiting) - 1
    every = [(0, *inner, nodes) for count in range(nodes) for inner in combinations(range(1, nodes), count)]
    least, cuts = _cuts(spans, waiting, allowed)
    assert cuts[0] == 0 and cuts[-1] == nodes and cuts == sorted(set(cuts))
    best = min(worst(way, spans, waiting) for way in every)
    limit = max(best, allowed)
    assert least == best and worst(tuple(cuts), spans, waiting) <= limit
    assert len(cuts) == min(len(way) for way in every if worst(way, spans, waiting) <= limit)


def cut(losses: list[torch.Tensor], parameters: list[nn.Parameter], tasks: int) -> list[Segment]:
    return segments_of(losses, {p: 4 * p.numel() for p in parameters}, tasks)


def linear_layers(count: int, width: int = 16) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))


def test_a_layer_is_a_segment_where_little_waits() -> None:
    trunk = linear_layers(6)
    z = trunk(torch.ones(2, 16))
    segments = cut([z.sum(), z.square().sum()], list(trunk.parameters()), 2)
    assert [len(segment.leaves) for segment in segments] == [1] * 6
    assert [segment.leaves for segment in segments] == [segment.complete for segment in segments]
    assert [segment.leaves[0] for segment in segments] == list(trunk.parameters())[::-1]


def test_nothing_is_cut_where_more_waits_than_a_cut_saves() -> None:
    trunk = linear_layers(6)
    z = trunk(torch.ones(200, 16))
    assert len(cut([z.sum(), z.square().sum()], list(trunk.parameters()), 2)) == 1


def test_small_layers_go_together() -> None:
    trunk = nn.Sequential(linear_layers(1, 64), nn.Linear(64, 8), linear_layers(9, 8), linear_layers(1, 8))
    z = trunk(torch.ones(1, 64))
    segments = cut([z.sum(), z.square().sum()], list(trunk.parameters()), 2)
    assert len(segments) == 2 and len(segments[0].complete) == 12


@pytest.mark.parametrize(("tasks", "count"), [(2, 8), (8, 8), (40, 40)])
def test_many_layers_are_a_few_segments(tasks: int, count: int) -> None:
    """Forty layers: an eighth of all rows at once, or one row."""
    trunk = linear_layers(40)
    z = trunk(torch.ones(1, 16))
    segments = cut([z.sum() * task for task in range(tasks)], list(trunk.parameters()), tasks)
    assert count <= len(segments) <= count * 1.4


def test_a_recurrent_network_is_one_segment() -> None:
    cells = nn.GRU(4, 16, batch_first=True)
    z = cells(torch.ones(2, 40, 4))[1][0]
    assert len(cut([z.sum(), z.square().sum()], list(cells.parameters()), 2)) == 1


def test_a_trunk_run_for_every_task_is_passed_side_by_side() -> None:
    """Each task has inputs of its own, and heads of different depth."""
    trunk = linear_layers(6)
    losses = []
    for task in range(3):
        z = trunk(torch.ones(1, 16))
        for _ in range(task):
            z = z.tanh() * 2
        losses.append(z.sum())
    segments = cut(losses, list(trunk.parameters()), 3)
    assert len(segments) == 6
    assert [segment.complete for segment in segments] == [(p,) for p in list(trunk.parameters())[::-1]]


@pytest.mark.parametrize("seen", [1, 2])
def test_what_waits_counts_for_each_loss_that_reaches_it(seen: int) -> None:
    """32 entries wait between two layers of 40: for one task a cut saves 8 of 80, for two losses on one side none."""
    first, second = nn.Linear(8, 5, bias=False), nn.Linear(5, 8, bias=False)
    hidden = first(torch.ones(6, 8))
    z = second(hidden)
    losses = [z.sum(), z.sin().sum()][:seen]
    segments = cut(losses, [first.weight, second.weight], tasks=1)
    assert len(segments) == (2 if seen == 1 else 1)
