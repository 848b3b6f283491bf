"""Rows of a few parameters at a time, whose inner products are all that is kept; on several processes added before.

Every rank closes the same buckets in the same order. A rank whose graph meets the parameters in another order (a task
is absent there) holds what comes early until its bucket is open; one that does not reach a parameter adds zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from detente.autograd.entries import dense, real
from detente.autograd.gramian import gramian
from detente.autograd.layout import Layout
from detente.autograd.ranks import Ranks
from detente.autograd.roles import Memory

Groups = list[list[torch.Tensor]]


class Buckets:
    """The inner products [T, T] of rows that arrive parameter by parameter.

    Args:
        groups: all parameters, in the order in which their rows are put together; a group is a bucket.
        known: those of them that will be completed here; the rows of the others are zero.
        tasks: T.
        memory: lends room for one bucket.
        ranks: None on a single process.

    Attributes:
        gramian: [T, T] float64 of the buckets closed so far; on several processes what this rank's columns contribute.
    """

    def __init__(
        self,
        groups: Groups,
        known: set[torch.Tensor],
        tasks: int,
        memory: Memory,
        ranks: Ranks | None,
    ) -> None:
        self._groups, self._tasks, self._memory, self._ranks = groups, tasks, memory, ranks
        self._missing = [sum(leaf in known for leaf in group) for group in groups]
        self._group_of = {leaf: place for place, group in enumerate(groups) for leaf in group}
        self._early: dict[torch.Tensor, dict[int, torch.Tensor]] = {}
        self._current = -1
        self.gramian = torch.zeros(tasks, tasks, dtype=torch.float64, device=groups[0][0].device)
        self._open()
        self._advance()

    def take(self, task: int, leaf: torch.Tensor, gradient: torch.Tensor) -> None:
        """The whole gradient of one task for one parameter."""
        if self._group_of[leaf] != self._current:
            self._early.setdefault(leaf, {})[task] = gradient
            return
        row = real(dense(gradient)).reshape(-1)
        start, width = self._start[leaf], self._rows.shape[2]
        stop = start + len(row)
        for part in range(start // width, -(-stop // width)):  # each rank's columns lie together
            low, high = max(start, part * width), min(stop, (part + 1) * width)
            self._rows[part, task, low - part * width : high - part * width] = row[low - start : high - start]

    def complete(self, leaves: Iterable[torch.Tensor]) -> None:
        """All tasks' gradients for these parameters have been taken."""
        for leaf in leaves:
            self._missing[self._group_of[leaf]] -= 1
        self._advance()

    def _advance(self) -> None:
        """Close every bucket whose rows are there."""
        while self._current < len(self._groups) and not self._missing[self._current]:
            rows = self._rows[0]
            if self._ranks is not None:
                self._ranks.scatter_sum(self._rows.view(-1), self._part.view(-1))
                rows = self._part
            self.gramian += gramian(rows).to(self.gramian.device)
            self._open()

    def _open(self) -> None:
        self._current += 1
        if self._current == len(self._groups):
            return
        layout = Layout(tuple(self._groups[self._current]))
        size = 1 if self._ranks is None else self._ranks.size
        width = max(1, -(-layout.columns // size))
        entries = self._tasks * width
        # The rows of all ranks' columns, and on several processes the sum of those of this rank's.
        held = self._memory.buffer(1, (size + (size > 1)) * entries, layout.like)[0]
        self._rows = held[: size * entries].view(size, self._tasks, width).zero_()
        self._part = held[size * entries :].view(-1, width)
        ends = np.cumsum([0, *(Layout((leaf,)).columns for leaf in layout.tensors)]).tolist()
        self._start = dict(zip(layout.tensors, ends, strict=False))
        for leaf in layout.tensors:
            for task, gradient in self._early.pop(leaf, {}).items():
                self.take(task, leaf, gradient)


def in_common_order(
    groups: Groups,
    shared: Sequence[torch.Tensor],
    sizes: Mapping[torch.Tensor, int],
    limit: int,
    ranks: Ranks,
) -> Groups:
    """Buckets that are the same on all ranks, in the order in which the graphs meet the parameters.

    Args:
        groups: the parameters that this rank's graph reaches, in its order.
        shared: all shared parameters, in an order that is the same on all ranks.
        sizes: their numbers of entries.
        limit: entries of a bucket; a parameter of more is one by itself.
        ranks: the processes.
    """
    place = {leaf: number for number, leaf in enumerate(leaf for group in groups for leaf in group)}
    told = [float(place.get(leaf, -1)) for leaf in shared]
    table = ranks.numbers(told, shared[0].device)
    if (table == table[0]).all():
        table = table[:1]
    orders = [[int(leaf) for leaf in np.argsort(row, kind="stable") if row[leaf] >= 0] for row in table]
    found: Groups = []
    held = limit
    for number in merged(orders):
        leaf = shared[number]
        if held + sizes[leaf] > limit:
            found.append([])
            held = 0
        found[-1].append(leaf)
        held += sizes[leaf]
    return found


def merged(orders: Sequence[Sequence[int]]) -> list[int]:
    """One order of all entries: that of the first, with what it lacks put before what follows it in the others.

    Example:
        >>> merged([[3, 1, 0], [3, 2, 1], [4, 0]])
        [3, 2, 1, 4, 0]
    """
    found: list[int] = []
    for order in orders:
        known, place = set(found), len(found)
        for entry in reversed(order):
            if entry in known:
                place = found.index(entry)
            else:
                found.insert(place, entry)
    return found
