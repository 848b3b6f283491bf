"""Bargaining and equal angles: definitions, closed forms, and what has no solution."""

from __future__ import annotations

import numpy as np
import pytest

from detente.geometry.equations import fair_residual, fair_weights, unit_direction


def gramian(seed: int, tasks: int, columns: int, common: float = 0.5, ratio: float = 1.0) -> np.ndarray:
    random = np.random.default_rng([seed, tasks])
    rows = random.normal(size=(tasks, columns)) + common * random.normal(size=columns)
    rows *= np.geomspace(1.0, ratio, tasks)[random.permutation(tasks), None]
    return rows @ rows.T


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("ratio", [1.0, 1e6])
def test_the_equation_holds(alpha: float, ratio: float) -> None:
    for tasks in (1, 2, 3, 8, 40):
        for scale in (1e-24, 1.0, 1e24):
            problem = scale * gramian(1, tasks, tasks + 20, ratio=ratio)
            weights = fair_weights(problem, alpha)
            assert weights is not None and (weights > 0).all()
            # By the definition; the terms of row i are |G_ij| w_j and w_i^(-1/α).
            wanted = weights ** (-1 / alpha)
            sizes = np.abs(problem) @ weights + wanted
            assert (np.abs(problem @ weights - wanted) / sizes).max() <= 1e-12
            assert fair_residual(problem, weights, alpha) <= 1e-12
            assert fair_residual(problem, weights * 1.001, alpha) > 1e-5


def test_orthogonal_gradients() -> None:
    lengths = np.array([0.01, 1.0, 30.0])
    for alpha in (0.5, 1.0, 3.0):
        # n² w = w^(-1/α)
        expected = lengths ** (-2 * alpha / (1 + alpha))
        np.testing.assert_allclose(fair_weights(np.diag(lengths**2), alpha), expected, rtol=1e-12)


def test_scale_follows_the_stated_power() -> None:
    problem = gramian(2, 4, 9)
    for alpha in (0.5, 1.0, 2.0):
        power = -2 * alpha / (1 + alpha)
        expected = fair_weights(problem, alpha)
        assert expected is not None
        np.testing.assert_allclose(fair_weights(1e8 * problem, alpha), expected * 1e4**power, rtol=1e-10)


def test_no_solution_where_the_hull_holds_zero() -> None:
    u, v = np.random.default_rng(3).normal(size=(2, 5))
    for rows in ([u, -u], [u, -1e3 * u, v], [u, 0 * u, v], [u, v, -0.1 * u - v]):
        matrix = np.stack(rows)
        for alpha in (0.1, 1.0, 5.0):
            assert fair_weights(matrix @ matrix.T, alpha) is None
    nearly = np.stack([u, -u + 1e-4 * v])
    assert fair_weights(nearly @ nearly.T) is not None


def test_alpha_out_of_range() -> None:
    for alpha in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="alpha"):
            fair_weights(np.eye(2), alpha)


def test_unit_direction_by_its_definition() -> None:
    """On the gradients themselves: pinv of the unit rows times ones, normalised, times the projections' sum."""
    for seed, (tasks, columns) in enumerate(((1, 3), (2, 5), (5, 9), (4, 4), (7, 3))):
        rows = np.random.default_rng(seed).normal(size=(tasks, columns)) * np.linspace(0.1, 5, tasks)[:, None]
        unit = np.linalg.pinv(rows / np.linalg.norm(rows, axis=1, keepdims=True)) @ np.ones(tasks)
        unit /= np.linalg.norm(unit)
        direction = unit_direction(rows @ rows.T)
        weights, vanishes = direction.weights, direction.vanishes
        assert direction.residual <= 1e-14
        np.testing.assert_allclose(weights @ rows, (rows @ unit).sum() * unit, rtol=1e-9, atol=1e-11)
        assert not vanishes


def test_unit_direction_never_normalises_rounding() -> None:
    u, v = np.random.default_rng(5).normal(size=(2, 5))
    opposite = np.stack([u, -2 * u])
    assert unit_direction(opposite @ opposite.T).vanishes
    assert unit_direction(np.zeros((2, 2))).vanishes
    third = np.stack([u, -2 * u, 0 * u, v - (v @ u) / (u @ u) * u])
    direction = unit_direction(third @ third.T)
    weights, vanishes = direction.weights, direction.vanishes
    np.testing.assert_allclose(weights @ third, third[3], atol=1e-12)
    assert not vanishes and weights[2] == 0
