"""Equal projections: the definition itself, with exact arithmetic as the judge of what exists."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest

from detente.geometry.imtl import equal_projections


def projections(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Inner products of Σ weight × row with the unit rows, in 50 digits."""
    with mpmath.workdps(50):
        exact = [[mpmath.mpf(float(x)) for x in row] for row in rows]
        d = [mpmath.fdot(list(map(float, weights)), column) for column in zip(*exact, strict=True)]
        norms = [mpmath.sqrt(mpmath.fdot(row, row)) for row in exact]
        return np.array([float(mpmath.fdot(d, row) / n) for row, n in zip(exact, norms, strict=True)])


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e6])
def test_independent_gradients(scale: float, ratio: float) -> None:
    random = np.random.default_rng(0)
    for tasks in (1, 2, 3, 8, 40):
        rows = random.normal(size=(tasks, tasks + 20)) * np.geomspace(1, ratio, tasks)[:, None] * scale
        found = equal_projections(rows @ rows.T)
        assert found.kind == "found" and abs(found.weights.sum() - 1) < 1e-9
        equal = projections(rows, found.weights)
        terms = (np.abs(found.weights) * np.linalg.norm(rows, axis=1)).sum()
        assert np.ptp(equal) <= 1e-10 * terms and abs(equal[0]) > 0


def test_where_the_affine_hull_holds_zero() -> None:
    random = np.random.default_rng(1)
    u, v = random.normal(size=(2, 6))
    signed = np.stack([u, v, (1.5 * u - 0.8 * v) / 0.3])  # weights 1.5, -0.8, -0.3 sum to 0.4
    for rows in (
        np.stack([u, -u]),
        np.stack([u, -1000 * u]),
        np.stack([u, 3 * u]),
        np.stack([u, np.zeros(6), v]),
        np.zeros((2, 3)),
        signed,
        random.normal(size=(7, 3)),
        np.stack([u, -2 * u, 1e-6 * v]),
    ):
        found = equal_projections(rows @ rows.T)
        assert found.kind == "zero" and abs(found.weights.sum() - 1) < 1e-9
        largest = (np.abs(found.weights)[:, None] * np.abs(rows)).max()
        assert np.abs(found.weights @ rows).max() <= 1e-9 * max(largest, 1e-300)


def test_dependent_gradients_whose_affine_hull_misses_zero() -> None:
    u, v = np.random.default_rng(2).normal(size=(2, 6))
    for rows in (np.stack([u, u, u]), np.stack([u, v, u]), np.stack([u, 1e-3 * v, u])):
        found = equal_projections(rows @ rows.T)
        assert found.kind == "found"
        equal = projections(rows, found.weights)
        assert np.ptp(equal) <= 1e-10 * np.abs(equal).max()


def test_where_no_vector_has_equal_projections() -> None:
    # Inside a plane that misses 0, four unit vectors that no cone has in common: only 0 projects equally on them.
    angles = np.array([0.1, 0.5, 1.0])
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    rows = directions / directions[:, :1]  # first coordinate 1: the affine hull is that line, without 0
    found = equal_projections(rows @ rows.T)
    assert found.kind == "none" and np.isfinite(found.weights).all()
