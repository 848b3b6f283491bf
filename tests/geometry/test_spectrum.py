"""Eigenvalues, rank and condition number against 50-digit arithmetic and the closed forms of Senushkin et al."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detente.geometry.spectrum import condition_number, spectrum

Generator = np.random.Generator


def spread(rng: Generator, tasks: int) -> np.ndarray:
    exponents = rng.uniform(-6, 0, (tasks, 1))
    exponents[[0, -1], 0] = -6, 0
    return 10.0 ** rng.permutation(exponents)


KINDS: dict[str, Callable[[Generator, int], np.ndarray]] = {
    "gaussian": lambda rng, t: rng.standard_normal((t, 50)),
    "correlated": lambda rng, t: rng.standard_normal((t, 50)) + 3 * rng.standard_normal(50),
    "norm ratio 1e6": lambda rng, t: rng.standard_normal((t, 50)) * spread(rng, t),
    "correlated, norm ratio 1e6": lambda rng, t: (rng.standard_normal((t, 50)) + 2) * spread(rng, t),
    "two groups 1e6 apart": lambda rng, t: (
        (rng.standard_normal((t, 50)) + 1) * np.where(np.arange(t) % 2, 1, 1e-6)[:, None]
    ),
}


def to_50_digits(gramian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, largest first, and V diag(values)^(-1/2) Vᵀ, the matrix of Aligned-MTL."""
    with mpmath.workdps(50):
        values, vectors = mpmath.eigsy(mpmath.matrix(gramian.tolist()))
        scaled = vectors * mpmath.diag([1 / mpmath.sqrt(value) for value in values])
        root = scaled * vectors.T
        return (
            np.array([float(value) for value in values])[::-1],
            np.array([[float(x) for x in row] for row in root.tolist()]),
        )


@pytest.mark.parametrize("tasks", [2, 3, 8, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_small_eigenvalues_are_as_accurate_as_large_ones(kind: str, tasks: int) -> None:
    for seed in range(3):
        gradients = KINDS[kind](np.random.default_rng([seed, tasks]), tasks)
        gramian = gradients @ gradients.T
        values, root = to_50_digits(gramian)
        found = spectrum(gramian)
        assert found.rank == tasks
        np.testing.assert_allclose(found.values, values, rtol=1e-12)
        np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(tasks), atol=1e-13)
        ours = (found.vectors / np.sqrt(found.values)) @ found.vectors.T
        # Entry by entry, each relative to its own row and column.
        size = np.sqrt(np.outer(np.diagonal(root), np.diagonal(root)))
        assert np.abs((ours - root) / size).max() <= 1e-12
        ratio = math.sqrt(values[0] / values[-1])
        assert condition_number(gramian) == pytest.approx(ratio, rel=1e-12)


def test_an_ordinary_routine_would_not_pass() -> None:
    """The reason for the factorisation; if this fails, `eigh` would do."""
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(20):
        gradients = KINDS["two groups 1e6 apart"](rng, 8)
        gramian = gradients @ gradients.T
        values, _ = to_50_digits(gramian)
        worst = max(worst, float(np.abs(np.linalg.eigvalsh(gramian)[::-1] / values - 1).max()))
    assert worst > 1e-6


@pytest.mark.parametrize("scale", [1e-24, 1e-12, 1.0, 1e12, 1e24, 1e150])
def test_scale_changes_nothing_but_the_values(scale: float) -> None:
    gradients = KINDS["norm ratio 1e6"](np.random.default_rng(5), 4)
    gramian = gradients @ gradients.T
    plain, scaled = spectrum(gramian), spectrum(gramian * scale)
    assert scaled.rank == plain.rank == 4
    np.testing.assert_allclose(scaled.values, plain.values * scale, rtol=1e-13)
    assert condition_number(gramian * scale) == pytest.approx(condition_number(gramian), rel=1e-12)


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize(("tasks", "rank"), [(2, 1), (3, 2), (4, 2), (8, 5), (20, 10), (40, 10), (40, 39)])
def test_rank_of_dependent_gradients(tasks: int, rank: int, graded: bool) -> None:
    rng = np.random.default_rng([tasks, rank])
    for _ in range(20):
        gradients = rng.standard_normal((tasks, rank)) @ rng.standard_normal((rank, 300))
        if graded:
            gradients = gradients * 10.0 ** rng.uniform(-1, 0, (tasks, 1))
        gramian = gradients @ gradients.T
        found = spectrum(gramian)
        assert found.rank == rank
        rebuilt = (found.vectors * found.values) @ found.vectors.T
        norms = np.sqrt(np.diagonal(gramian))
        assert np.abs((rebuilt - gramian) / np.outer(norms, norms)).max() <= 1e-12
        assert condition_number(gramian) == math.inf


def test_dependent_gradients_of_very_different_length() -> None:
    # Exact products: integers times powers of two. The two long ones and the two short ones span the same plane.
    rng = np.random.default_rng(2)
    for _ in range(20):
        gradients = rng.integers(-9, 10, (4, 2)) + 20 * np.eye(4)[:, :2]
        gradients[2:] = gradients[:2] @ np.array([[2, 1], [1, -1]]) * 2.0**-20
        gramian = gradients @ gradients.T
        with mpmath.workdps(50):
            exact = mpmath.eigsy(mpmath.matrix(gramian.tolist()), eigvals_only=True)
            values = sorted(float(value) for value in exact)
        found = spectrum(gramian)
        assert found.rank == 2
        np.testing.assert_allclose(found.values[:2], values[:1:-1], rtol=1e-12)
        assert condition_number(gramian) == math.inf


def test_dependent_long_gradients_beside_independent_short_ones() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        gradients = rng.integers(-9, 10, (4, 5)).astype(float)
        gradients[1] = 3 * gradients[0]
        gradients[2:] *= 2.0**-20
        gramian = gradients @ gradients.T
        with mpmath.workdps(50):
            exact = mpmath.eigsy(mpmath.matrix(gramian.tolist()), eigvals_only=True)
            values = sorted((float(value) for value in exact), reverse=True)
        found = spectrum(gramian)
        assert found.rank == 3
        np.testing.assert_allclose(found.values[:3], values[:3], rtol=1e-12)


def test_rounding_in_long_dependent_gradients_is_not_taken_for_a_short_one() -> None:
    rng = np.random.default_rng(6)
    for _ in range(20):
        first, second, short = rng.standard_normal((3, 300))
        gradients = np.stack([first, second, 0.3 * first + 0.6 * second, 1e-10 * short])
        plane = np.linalg.qr(np.stack([first, second], axis=1))[0]
        beside = short - plane @ (plane.T @ short)
        values = spectrum(gradients @ gradients.T).values
        assert values[2] == pytest.approx(1e-20 * (beside @ beside), rel=1e-9, abs=0)


def test_zero_matrix_and_zero_rows() -> None:
    found = spectrum(np.zeros((3, 3)))
    assert found.rank == 0
    assert found.values.tolist() == [0, 0, 0]
    np.testing.assert_array_equal(found.vectors, np.eye(3))
    assert condition_number(np.zeros((3, 3))) == math.inf
    found = spectrum(np.diag([4.0, 0.0, 9.0]))
    assert found.rank == 2
    np.testing.assert_allclose(found.values, [9, 4, 0], rtol=1e-15)
    np.testing.assert_allclose(np.abs(found.vectors), np.eye(3)[:, [2, 0, 1]], atol=1e-15)
    assert condition_number(np.diag([4.0, 0.0, 9.0])) == math.inf


def test_rank_tolerance_is_relative_to_the_largest_eigenvalue() -> None:
    gramian = np.diag([1e-3, 1.0, 1e-7, 1e-14]) * 1e20
    assert spectrum(gramian).rank == 4
    assert spectrum(gramian, rank_tolerance=0.0).rank == 4
    assert spectrum(gramian, rank_tolerance=1e-10).rank == 3
    assert spectrum(gramian, rank_tolerance=4 * float(np.finfo(np.float32).eps)).rank == 2
    assert spectrum(gramian, rank_tolerance=0.5).rank == 1
    # The default is T machine epsilons of float64: 8.9e-16 here.
    assert spectrum(np.diag([1.0, 1.0, 1.0, 9e-16])).rank == 4
    assert spectrum(np.diag([1.0, 1.0, 1.0, 8e-16])).rank == 3


def test_single_task() -> None:
    assert spectrum([[4.0]]).values.tolist() == [4.0]
    assert condition_number([[4.0]]) == 1.0
    assert condition_number([[0.0]]) == math.inf


@given(first=st.floats(1e-12, 1e12), ratio=st.floats(1.0, 1e9))
def test_orthogonal_gradients(first: float, ratio: float) -> None:
    """Senushkin et al. 2023, Corollary 1: κ is the ratio of the norms."""
    second = first * ratio
    expected = max(first / second, second / first)
    assert condition_number([[first**2, 0.0], [0.0, second**2]]) == pytest.approx(expected, rel=1e-12)


@given(angle=st.floats(0.01, math.pi - 0.01), norm=st.floats(1e-12, 1e12))
def test_equal_norms_at_an_angle(angle: float, norm: float) -> None:
    """Senushkin et al. 2023, Corollary 2: κ is the tangent or cotangent of half the angle."""
    cosine = math.cos(angle)
    gramian = norm**2 * np.array([[1.0, cosine], [cosine, 1.0]])
    tangent = math.tan(angle / 2)
    assert condition_number(gramian) == pytest.approx(max(tangent, 1 / tangent), rel=1e-9)


def test_inputs_stay_untouched() -> None:
    gramian = np.diag([4.0, 0.0, 9.0])
    given_ = gramian.copy()
    spectrum(gramian)
    condition_number(gramian)
    np.testing.assert_array_equal(gramian, given_)


@pytest.mark.parametrize("function", [spectrum, condition_number])
@pytest.mark.parametrize(
    ("gramian", "message"),
    [
        (np.ones((2, 3)), "shape"),
        ([[1.0, math.nan], [math.nan, 1.0]], r"entry \[0, 1\] is nan"),
        ([[1.0, 0.5], [0.2, 1.0]], "not symmetric"),
        (np.stack([np.eye(2)] * 3), r"one Gramian.*\[3, 2, 2\]"),
    ],
)
def test_bad_input(function: Callable[[object], object], gramian: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(gramian)


@pytest.mark.parametrize("tolerance", [-1e-3, 1.0, math.nan])
def test_bad_tolerance(tolerance: float) -> None:
    with pytest.raises(ValueError, match="rank_tolerance"):
        spectrum(np.eye(2), rank_tolerance=tolerance)
