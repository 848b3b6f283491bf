"""Hypervolume by hand, by inclusion and exclusion, by counting unit cubes, by chance, and its laws."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import detente.statistics
from detente.statistics import hypervolume, non_dominated

# The package's name `hypervolume` is the function.
MODULE = sys.modules["detente.statistics.hypervolume"]


@pytest.fixture
def slices(monkeypatch):
    """Small problems are summed on a grid; with this they are cut into slices all the way to three objectives."""
    monkeypatch.setattr(MODULE, "GRID", 0)


def by_inclusion_and_exclusion(points, reference):
    """Higher is better. The slow twin: the boxes, less the pairs, plus the triples, ..."""
    gains = np.array(points, dtype=float) - np.array(reference)
    gains = gains[(gains > 0).all(axis=1)]
    total = 0.0
    for size in range(1, len(gains) + 1):
        for chosen in itertools.combinations(range(len(gains)), size):
            total -= (-1) ** size * float(np.prod(np.min(gains[list(chosen)], axis=0)))
    return total


def sphere(count: int, objectives: int, seed: int = 0) -> np.ndarray:
    """Points of which none dominates another, most of them."""
    points = np.abs(np.random.default_rng(seed).normal(size=(count, objectives)))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def test_two_objectives_by_hand():
    # Minimised, reference (6, 6): a staircase of 5·2, 3·1 and 2·2 (widths 5, 3, 2; heights 2, 1, 2).
    found = hypervolume([[1, 4], [3, 3], [4, 1]], [6, 6], [False, False])
    assert found.volume == 5 * 2 + 3 * 1 + 2 * 2
    # Accuracy up, error down.
    mixed = hypervolume([[0.9, 2.0], [0.8, 1.0]], [0.5, 4.0], [True, False])
    assert mixed.volume == pytest.approx(0.4 * 2 + 0.3 * 1)
    assert mixed.reference == (0.5, 4.0)


def test_three_objectives_by_hand():
    # Three boxes 1·1·2 turned three ways: 2 each, less the unit cube they share counted twice too often.
    assert hypervolume([[1, 1, 2], [1, 2, 1], [2, 1, 1]], [0, 0, 0], [True] * 3).volume == 4.0


@pytest.mark.parametrize("objectives", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("seed", range(4))
def test_inclusion_and_exclusion(objectives, seed, request):
    if seed % 2:
        request.getfixturevalue("slices")
    points = np.vstack(
        [sphere(7, objectives, seed), np.random.default_rng(seed).normal(0.3, 0.4, (3, objectives))]
    )
    reference = [-0.1] * objectives
    expected = by_inclusion_and_exclusion(points, reference)
    assert hypervolume(points, reference, [True] * objectives).volume == pytest.approx(expected, rel=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 4).flatmap(
        lambda t: st.lists(st.lists(st.integers(0, 4), min_size=t, max_size=t), min_size=1, max_size=12)
    )
)
def test_counting_unit_cubes(points):
    """Whole numbers from 0 to 4: many equal coordinates, equal points, and points on the reference."""
    corners = itertools.product(range(4), repeat=len(points[0]))
    expected = sum(
        any(all(p > c for p, c in zip(point, corner, strict=True)) for point in points) for corner in corners
    )
    zero, up = [0] * len(points[0]), [True] * len(points[0])
    assert hypervolume(points, zero, up).volume == pytest.approx(expected, abs=1e-9)
    before = MODULE.GRID
    MODULE.GRID = 0
    try:
        assert hypervolume(points, zero, up).volume == pytest.approx(expected, abs=1e-9)
    finally:
        MODULE.GRID = before


@pytest.mark.parametrize("objectives", [3, 4, 5, 6])
def test_by_chance(objectives):
    """60 points, more than the other twins can take."""
    points = sphere(60, objectives)
    draws = np.random.default_rng(1).uniform(size=(40_000, objectives))
    hits = np.zeros(len(draws), dtype=bool)
    for point in points:
        hits |= (draws <= point).all(axis=1)
    share = hits.mean()
    error = 5 * math.sqrt(share * (1 - share) / len(draws))
    assert hypervolume(points, [0] * objectives, [True] * objectives).volume == pytest.approx(
        share, abs=error
    )


CLOUD = st.integers(2, 5).flatmap(
    lambda t: st.tuples(
        st.lists(st.lists(st.integers(-20, 20), min_size=t, max_size=t), min_size=1, max_size=9),
        st.lists(st.booleans(), min_size=t, max_size=t),
        st.integers(0, 2**32 - 1),
    )
)


@settings(max_examples=60, deadline=None)
@given(CLOUD)
def test_laws(cloud):
    points, higher, seed = np.array(cloud[0], dtype=float), cloud[1], cloud[2]
    rng = np.random.default_rng(seed)
    objectives = points.shape[1]
    signs = np.where(higher, 1.0, -1.0)
    reference = -8.0 * signs
    volume = hypervolume(points, list(reference), higher).volume
    same = pytest.approx(volume, rel=1e-9, abs=1e-6)

    # The order of points and of objectives does not matter.
    rows, columns = rng.permutation(len(points)), rng.permutation(objectives)
    assert (
        hypervolume(points[rows][:, columns], list(reference[columns]), [higher[c] for c in columns]).volume
        == same
    )
    # A flipped axis with a flipped direction, a shift, and a change of units.
    assert hypervolume(-points, list(-reference), [not h for h in higher]).volume == same
    assert hypervolume(points + 3.5, list(reference + 3.5), higher).volume == same
    assert hypervolume(points * 2.0, list(reference * 2.0), higher).volume / 2.0**objectives == same
    # Dominated points and copies add nothing; a better point adds.
    worse = points[rng.integers(len(points))] - signs * rng.integers(0, 5, objectives)
    assert hypervolume(np.vstack([points, worse, points]), list(reference), higher).volume == same
    better = signs * 30.0
    assert hypervolume(np.vstack([points, better]), list(reference), higher).volume > volume
    # The front is enough.
    front = points[list(non_dominated(points, higher))]
    assert hypervolume(front, list(reference), higher).volume == same


@settings(max_examples=60, deadline=None)
@given(CLOUD)
def test_non_dominated_by_its_definition(cloud):
    points, higher, _ = cloud

    def dominates(p, q):
        gains = [(a - b) if up else (b - a) for a, b, up in zip(p, q, higher, strict=True)]
        return min(gains) >= 0 and max(gains) > 0

    expected = tuple(i for i, q in enumerate(points) if not any(dominates(p, q) for p in points))
    assert non_dominated(points, higher) == expected


def test_points_outside_are_told_and_add_nothing():
    found = hypervolume([[1, 1], [5, 0], [0, 5], [2, 2]], [0, 0], [True, True])
    assert (found.volume, found.outside) == (4.0, (1, 2))
    nothing = hypervolume([[-1, 4]], [0, 0], [True, True])
    assert (nothing.volume, nothing.outside) == (0.0, (0,))
    assert hypervolume([], [0, 0], [True, True]).volume == 0.0
    assert non_dominated([], [True]) == ()


def test_a_hundred_points_in_six_objectives():
    """Quick enough to be called from a table, and equal to the sum with another size of grid."""
    points = sphere(100, 6)
    found = hypervolume(points, [0] * 6, [True] * 6).volume
    assert 0.0 < found < 1.0
    assert hypervolume(points[:, ::-1], [0] * 6, [True] * 6).volume == pytest.approx(found, rel=1e-10)


def test_what_would_take_forever_is_refused():
    with pytest.raises(
        ValueError, match="hypervolume of 40 points in 10 objectives needs more than 100 slices"
    ):
        hypervolume(sphere(40, 10), [0] * 10, [True] * 10, max_slices=100)
    with pytest.raises(ValueError, match="2001 points: the exact hypervolume is for up to 2000"):
        hypervolume(np.ones((2001, 2)), [0, 0], [True, True])


def test_bad_input_is_named():
    for points, reference, higher, message in [
        ([[1.0, 2.0]], [0.0], [True, True], "one value for each of the 2 objectives"),
        ([[1.0]], [0.0, 0.0], [True, True], "one value for each of the 2 objectives"),
        ([1.0, 2.0], [0.0, 0.0], [True, True], "one value for each of the 2 objectives"),
        ([[1.0, 2.0], [1.0, math.nan]], [0.0, 0.0], [True, True], "point 1, objective 1: nan"),
        ([[1.0, 2.0]], [0.0, math.inf], [True, True], "reference, objective 1: inf"),
        ([[1.0, 2.0]], [0.0, 0.0], [True, 1], r"higher_is_better\[1\] is 1"),
        ([[1.0, 2.0]], [0.0, 0.0], [], "higher_is_better is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            hypervolume(points, reference, higher)


def test_the_names_are_offered():
    assert detente.statistics.hypervolume is hypervolume
