"""Which points no other dominates, and the volume that a set of points dominates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Hypervolume", "hypervolume", "non_dominated"]

Array = NDArray[np.float64]

# Up to so many cells a grid over all coordinates is quicker than cutting the problem into slices.
GRID = 20_000
# In three objectives it always is; this many points then take 32 MB.
MOST_POINTS = 2_000


@dataclass(frozen=True)
class Hypervolume:
    """The volume of what some points dominate.

    Attributes:
        volume: in the product of the objectives' units.
        reference: the reference point; without it the volume means nothing.
        outside: indices of the points that are not better than the reference in every objective; they add
            nothing.

    Example:
        >>> hypervolume([[1.0, 2.0], [5.0, 0.5]], reference=[3.0, 3.0], higher_is_better=[False, False])
        Hypervolume(volume=2.0, reference=(3.0, 3.0), outside=(1,))
    """

    volume: float
    reference: tuple[float, ...]
    outside: tuple[int, ...]


def non_dominated(points: ArrayLike, higher_is_better: Sequence[bool]) -> tuple[int, ...]:
    """Indices of the points that no other point dominates, in the order given.

    A point dominates another when it is at least as good in every objective and better in one; of equal
    points, all stay.

    Args:
        points: [n, T], a row for each point.
        higher_is_better: [T] direction of each objective.

    Raises:
        ValueError: wrong shapes, or values that are not finite, by row and column.

    Example:
        >>> non_dominated([[0.9, 2.0], [0.8, 1.0], [0.7, 1.5]], [True, False])
        (0, 1)
    """
    costs = -_upwards(points, higher_is_better)
    at_least = (costs[:, None] <= costs[None]).all(axis=2)
    dominated = (at_least & ~at_least.T).any(axis=0)
    return tuple(int(i) for i in np.flatnonzero(~dominated))


def hypervolume(
    points: ArrayLike,
    reference: Sequence[float],
    higher_is_better: Sequence[bool],
    *,
    max_slices: int = 100_000,
) -> Hypervolume:
    """The exact volume of the region between a reference point and a set of points, in any number of objectives.

    It is the measure of all points that are better than the reference and that some given point dominates or
    equals. It depends on the reference and on the units of every objective: state both, and compare only
    volumes with the same ones.

    The points are taken in the order of the last objective; each adds its own box less the part that the
    points above it dominate too, a volume with one objective less (While, Bradstreet & Barone 2012). What is
    small enough is summed over the grid of all coordinates. Time grows quickly with the number of objectives:
    a front of 100 points takes a millisecond for three, a third of a second for six and minutes
    for ten.

    Args:
        points: [n, T], a row for each point; no point at all has volume 0.
        reference: [T], a point worse than what is to be measured.
        higher_is_better: [T] direction of each objective.
        max_slices: give up after so many slices, of about half a millisecond each.

    Raises:
        ValueError: wrong shapes, values that are not finite, more than 2 000 points, or more work than ``max_slices``.

    Example:
        >>> points = [[2.0, 1.0], [1.0, 2.0]]
        >>> hypervolume(points, reference=[0.0, 0.0], higher_is_better=[True, True]).volume
        3.0
        >>> hypervolume(points, reference=[3.0, 3.0], higher_is_better=[False, False]).volume
        3.0
    """
    origin = _upwards([list(reference)], higher_is_better, "the reference")
    gains = _upwards(points, higher_is_better) - origin
    inside = (gains > 0).all(axis=1)
    outside = tuple(int(i) for i in np.flatnonzero(~inside))
    if len(gains) > MOST_POINTS:
        raise ValueError(
            f"{len(gains)} points: the exact hypervolume is for up to {MOST_POINTS}; drop dominated or similar ones"
        )
    work = _Work(max_slices, int(inside.sum()), gains.shape[1])
    volume = _volume(_front(gains[inside]), work) if inside.any() else 0.0
    return Hypervolume(volume, tuple(float(value) for value in reference), outside)


class _Work:
    """Counts slices and gives up by name."""

    def __init__(self, limit: int, points: int, objectives: int) -> None:
        self.left, self.limit, self.points, self.objectives = limit, limit, points, objectives

    def slice(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise ValueError(
                f"the exact hypervolume of {self.points} points in {self.objectives} objectives needs more than "
                f"{self.limit} slices: take fewer objectives or points, or raise max_slices"
            )


def _volume(front: Array, work: _Work) -> float:
    """Volume of the union of the boxes from the origin to each of the points, which are all positive."""
    count, objectives = front.shape
    if count == 1 or objectives == 1:
        return float(front.prod(axis=1).max())
    if objectives <= 3 or count ** (objectives - 1) <= GRID:
        return _on_grid(front)
    front = front[np.argsort(front[:, -1], kind="stable")]
    parts = [float(front[-1].prod())]
    for i in range(count - 1):
        work.slice()
        shared = np.minimum(front[i, :-1], front[i + 1 :, :-1])
        parts.append(float(front[i].prod()) - float(front[i, -1]) * _volume(_front(shared), work))
    return math.fsum(parts)


def _on_grid(front: Array) -> float:
    """Sum over the grid of all coordinates but the last: base of a cell times the highest point above it."""
    count, objectives = front.shape
    heights = np.zeros((count,) * (objectives - 1))
    places = np.argsort(np.argsort(front[:, :-1], axis=0), axis=0)
    heights[tuple(places.T)] = front[:, -1]
    for axis in range(objectives - 1):
        heights = np.flip(np.maximum.accumulate(np.flip(heights, axis), axis=axis), axis)
    for axis in reversed(range(objectives - 1)):
        heights = heights @ np.diff(np.sort(front[:, axis]), prepend=0.0)
    return float(heights)


def _front(gains: Array) -> Array:
    """The points that no other dominates, one of equals."""
    at_least = (gains[:, None] >= gains[None]).all(axis=2)
    # Of two equal points the first keeps the second out.
    beaten = at_least & (~at_least.T | np.tri(len(gains), k=-1, dtype=bool).T)
    return gains[~beaten.any(axis=0)]


def _upwards(points: ArrayLike, higher_is_better: Sequence[bool], owner: str = "") -> Array:
    """[n, T] float64 with higher values better, or an error that names what is wrong."""
    for objective, direction in enumerate(higher_is_better):
        if not isinstance(direction, bool):
            raise ValueError(f"higher_is_better[{objective}] is {direction!r}: expected True or False")
    objectives = len(higher_is_better)
    if not objectives:
        raise ValueError("higher_is_better is empty: give the direction of at least one objective")
    values = np.asarray(points, dtype=np.float64)
    if values.size == 0:
        return np.zeros((0, objectives))
    if values.ndim != 2 or values.shape[1] != objectives:
        raise ValueError(
            f"points and reference need one value for each of the {objectives} objectives of "
            f"higher_is_better; the shape is {list(values.shape)}"
        )
    if not np.isfinite(values).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise ValueError(
            f"{owner or f'point {row}'}, objective {column}: {values[row, column]} is no finite number"
        )
    return np.where(np.array(higher_is_better), values, -values)
