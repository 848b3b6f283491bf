"""The vector nearest to the mean in half-spaces: scipy's non-negative least squares and plain definitions as judges."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import nnls

from detente.geometry import pivoting
from detente.geometry.dual_cone import (
    conflict_averse,
    directed,
    dual_cone_projection,
    dual_cone_projections,
)
from detente.geometry.gramian import unit_rows
from detente.geometry.simplex import minimum_norm_point

SHAPES = ((1, 3), (2, 2), (3, 5), (5, 3), (8, 20), (14, 9), (30, 60))


def gradients(seed: int, tasks: int, columns: int) -> np.ndarray:
    return np.random.default_rng([seed, tasks]).normal(size=(tasks, columns))


@pytest.mark.parametrize("tasks, columns", SHAPES)
def test_projections_against_nnls(tasks: int, columns: int) -> None:
    """π(g) = g + Jᵀx with x ≥ 0 the non-negative least-squares solution of Jᵀx ≈ −g."""
    for seed in range(4):
        rows = gradients(seed, tasks, columns)
        gramian = rows @ rows.T
        weights, _ = dual_cone_projections(gramian)
        mean = rows.mean(axis=0)
        found = dual_cone_projection(gramian, np.full(tasks, 1 / tasks)).weights @ rows
        np.testing.assert_allclose(found, mean + nnls(rows.T, -mean)[0] @ rows, atol=1e-11)
        for row, weight in zip(rows, weights, strict=True):
            np.testing.assert_allclose(weight @ rows, row + nnls(rows.T, -row)[0] @ rows, atol=1e-10)
        assert (weights - np.eye(tasks) >= 0).all()


def test_dependent_gradients_one_at_a_time_and_all_together_agree() -> None:
    rows = gradients(0, 12, 5) + 0.4
    rows[3] = rows[0]
    rows[7] = 2 * rows[1]
    gramian = rows @ rows.T
    weights, vanishes = dual_cone_projections(gramian)
    for task in range(12):
        alone = dual_cone_projection(gramian, np.eye(12)[task])
        np.testing.assert_allclose(weights[task] @ rows, alone.weights @ rows, atol=1e-11)
    assert vanishes == all(dual_cone_projection(gramian, row).vanishes for row in np.eye(12))


def test_what_vanishes() -> None:
    u, v = gradients(1, 2, 4)
    both = np.stack([u, -3 * u])
    assert dual_cone_projections(both @ both.T)[1]
    assert dual_cone_projection(both @ both.T, [0.5, 0.5]).vanishes
    third = np.stack([u, -3 * u, v])
    assert not dual_cone_projections(third @ third.T)[1]
    assert dual_cone_projection(third @ third.T, [0.5, 0.5, 0.0]).vanishes
    assert not dual_cone_projection(third @ third.T, [0.5, 0.5, 1e-9]).vanishes
    assert dual_cone_projections(np.zeros((2, 2)))[1]
    assert dual_cone_projection(np.zeros((2, 2)), [1, 1]).vanishes


def test_equal_gradients_share() -> None:
    """Of all weights that give the direction the evenest are taken, whatever the order of the tasks."""
    u, v = gradients(2, 2, 6)
    v = v - 2 * (v @ u) / (u @ u) * u if v @ u > 0 else v  # make them conflict
    rows = np.stack([u, v, u, u])
    weights = dual_cone_projection(rows @ rows.T, [0.0, 1.0, 0.0, 0.0]).weights
    assert weights[0] > 0
    np.testing.assert_allclose(weights[[2, 3]], weights[0], rtol=1e-10)
    averse = conflict_averse(rows @ rows.T, np.full(4, 0.25), 0.5).weights
    np.testing.assert_allclose(averse[[2, 3]], averse[0], rtol=1e-10)


@pytest.mark.parametrize("tasks, columns", SHAPES)
@pytest.mark.parametrize("radius", [0.0, 0.2, 0.9, 3.0])
def test_nothing_near_the_mean_helps_the_last_task_more(tasks: int, columns: int, radius: float) -> None:
    """CAGrad's optimum beats random points of the ball, and is as good as it says."""
    random = np.random.default_rng(0)
    rows = gradients(3, tasks, columns) + 0.3
    mean = rows.mean(axis=0)
    reach = radius * np.linalg.norm(mean)
    found = conflict_averse(rows @ rows.T, np.full(tasks, 1 / tasks), radius)
    d = found.weights @ rows
    assert np.linalg.norm(d - mean) <= reach * (1 + 1e-10) + 1e-12
    value = (rows @ d).min()
    assert value == pytest.approx(found.level, rel=1e-9, abs=1e-10)
    steps = random.normal(size=(300, columns))
    steps *= reach / np.linalg.norm(steps, axis=1, keepdims=True)
    for start in (mean, d):
        others = start + steps * 0.05 if start is d else start + steps
        inside = np.linalg.norm(others - mean, axis=1) <= reach
        assert ((others @ rows.T).min(axis=1)[inside] <= value + 1e-10).all()


def test_directed_between_minimum_norm_and_mean() -> None:
    rows = gradients(4, 5, 9)
    gramian, mean = rows @ rows.T, np.full(5, 0.2)
    np.testing.assert_allclose(directed(gramian, mean, 1e-12), minimum_norm_point(gramian), atol=1e-9)
    # As λ grows, only ⟨g_w, g₀⟩ counts: the vertex with the smallest one.
    vertex = np.zeros(5)
    vertex[(gramian @ mean).argmin()] = 1.0
    np.testing.assert_allclose(directed(gramian, mean, 1e6), vertex, atol=1e-12)


def test_directed_where_the_hull_holds_zero() -> None:
    """u and -u cancel, and v is needed only as far as it takes part in the mean: d = 0 is not in reach."""
    rows = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    weights = directed(rows @ rows.T, np.full(3, 1 / 3), 0.3)
    np.testing.assert_allclose(weights, [0.5, 0.5, 0.0], atol=1e-12)
    zero = np.array([[1.0, 0.0], [0.0, 0.0], [-1.0, 1.0]])
    weights = directed(zero @ zero.T, np.full(3, 1 / 3), 0.3)
    total = (weights + 0.1) @ zero
    assert (zero @ total >= weights @ zero @ total - 1e-15).all() and weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("solver", ["pivot", "one by one", "together"])
def test_the_solvers_behind_agree(solver: str) -> None:
    for seed, (tasks, columns) in enumerate(((2, 4), (6, 12), (20, 24), (40, 50))):
        rows = gradients(seed, tasks, columns)
        _, cosines = unit_rows(rows @ rows.T)
        linears = np.random.default_rng(seed).normal(size=(5, tasks)) @ cosines
        sizes = np.ones_like(linears)
        for linear, size in zip(linears, sizes, strict=True):
            factor = np.linalg.cholesky(cosines).T
            expected = nnls(factor, np.linalg.solve(factor.T, -linear))[0]
            if solver == "pivot":
                found = pivoting.pivot(cosines, linear, size, np.ones(tasks, dtype=bool))
            elif solver == "one by one":
                found = pivoting.add_one_by_one(cosines, linear, size)
            else:
                found = pivoting.nonnegative_minimisers(cosines, linear[None], size[None], regular=True)[0]
            assert found is not None
            np.testing.assert_allclose(found, expected, atol=1e-9)
            assert pivoting.residual(cosines, linear, size, found) <= 1e-12


def test_no_minimiser_is_reported() -> None:
    """½xᵀCx + qᵀx falls for ever along (1, 1) if C does not see it and q does."""
    opposite = np.array([[1.0, -1.0], [-1.0, 1.0]])
    assert pivoting.add_one_by_one(opposite, np.array([-1.0, -1.0]), np.ones(2)) is None
    with pytest.raises(ValueError, match="not positive semidefinite"):
        pivoting.nonnegative_minimiser(opposite, np.array([-1.0, -1.0]), np.ones(2))


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda g: dual_cone_projection(g, [1.0]), "preference"),
        (lambda g: dual_cone_projection(g, [1.0, -1.0]), "preference"),
        (lambda g: conflict_averse(g, [0.5, 0.5], -1.0), "radius"),
        (lambda g: conflict_averse(g, [0.5, 0.5], np.inf), "radius"),
        (lambda g: directed(g, [0.5, 0.5], np.nan), "strength"),
        (lambda g: dual_cone_projections(np.stack([g, g])), "one Gramian"),
        (lambda g: dual_cone_projections(g * np.nan), "NaN"),
    ],
)
def test_bad_input_is_named(call: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call(np.eye(2))  # type: ignore[operator]
