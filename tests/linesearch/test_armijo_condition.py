"""The condition against what can be said by hand, and against one quadratic in closed form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detente.linesearch.armijo import (
    ascends,
    repeats,
    rounding_tolerance,
    slope_tolerance,
    sufficient_decrease,
)


@given(
    curvature=st.floats(0.01, 100),
    c=st.floats(0.001, 0.999),
    start=st.floats(0.1, 10),
    factor=st.sampled_from([0.5, 0.99, 1.01, 2.0]),
)
def test_bound_on_a_parabola(curvature: float, c: float, start: float, factor: float) -> None:
    """On a θ²/2 along its gradient aθ the condition holds exactly up to η = 2 (1 - c) / a."""
    eta = factor * 2 * (1 - c) / curvature
    slope = (curvature * start) ** 2
    before = 0.5 * curvature * start**2
    after = 0.5 * curvature * (start - eta * curvature * start) ** 2
    held = sufficient_decrease(np.array([before]), np.array([after]), np.array([slope]), eta, c)
    assert held.tolist() == [factor < 1]


def test_each_task_is_judged_by_itself() -> None:
    before, after, slopes = np.array([1.0, 1.0, 1.0]), np.array([0.9, 0.95, 1.0]), np.array([1.0, 1.0, 0.0])
    assert sufficient_decrease(before, after, slopes, 0.1, 0.9).tolist() == [True, False, True]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_holds(bad: float) -> None:
    with np.errstate(all="raise"):
        held = sufficient_decrease(
            np.ones(2), np.array([bad, 0.0]), np.ones(2), 0.1, 1e-4, np.full(2, np.inf)
        )
    assert held.tolist() == [False, True]


def test_rounding_of_float32_is_not_an_increase() -> None:
    """A step too short to show in float32 gives the same loss or its neighbour: both pass, a real rise does not."""
    epsilon = np.array([np.finfo(np.float32).eps], dtype=np.float64)
    before = np.float32(2.3)
    above = np.nextafter(before, np.float32(3))
    numbers = np.array([before], dtype=np.float64), np.array([above], dtype=np.float64)
    tolerance = rounding_tolerance(*numbers, epsilon)
    assert not sufficient_decrease(*numbers, np.array([1.0]), 1e-9, 1e-4).all()
    assert sufficient_decrease(*numbers, np.array([1.0]), 1e-9, 1e-4, tolerance).all()
    risen = numbers[0] * (1 + 1e-6)
    tolerance = rounding_tolerance(numbers[0], risen, epsilon)
    assert not sufficient_decrease(numbers[0], risen, np.array([1.0]), 1e-9, 1e-4, tolerance).all()


def test_tolerance_follows_dtype_and_size() -> None:
    epsilon = np.array([1e-7, 1e-16])
    got = rounding_tolerance(np.array([100.0, -3.0]), np.array([1.0, 5.0]), epsilon, 2.0)
    np.testing.assert_allclose(got, [2e-5, 1e-15], rtol=1e-12)


def test_a_task_that_does_not_move_is_not_held_against_the_direction() -> None:
    slopes, moved = np.array([0.0, 0.0, -1e-9, np.nan]), np.array([False, True, True, True])
    assert ascends(slopes, moved).tolist() == [False, True, True, True]


def test_a_slope_that_is_zero_up_to_rounding_does_not_fall() -> None:
    """Of 8 · 2 · 2⁻⁵² (‖g_i‖ ‖d‖ + |own_i|), whatever the sign it came out with."""
    unit = 16 * 2.0**-52
    tolerance = slope_tolerance(np.array([3.0, 4.0]), 0.5, np.array([0.0, -1.0]))
    np.testing.assert_array_equal(tolerance, [1.5 * unit, 3 * unit])
    moved = np.array([True, True])
    for factor, expected in ((0.9, True), (-0.9, True), (1.1, False)):
        assert ascends(factor * tolerance, moved, tolerance).tolist() == [expected, expected]


def test_repeats_tells_rounding_from_another_batch() -> None:
    epsilon = np.full(5, np.finfo(np.float32).eps)
    first = np.array([1.0, 1.0, 0.0, 0.0, 1.0])
    second = np.array([1.0001, 1.001, 1e-8, 1e-3, np.nan])
    assert repeats(first, second, epsilon).tolist() == [True, False, True, False, False]
