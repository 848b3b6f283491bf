"""The vector nearest to the mean in half-spaces: scipy's non-negative least squares and plain definitions as judges."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import nnls

from detente.geometry import nonnegative
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
        weights = dual_cone_projections(gramian).transform
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
    projections = dual_cone_projections(gramian)
    for task in range(12):
        alone = dual_cone_projection(gramian, np.eye(12)[task])
        np.testing.assert_allclose(projections.transform[task] @ rows, alone.weights @ rows, atol=1e-11)
    assert projections.vanishes == all(dual_cone_projection(gramian, row).vanishes for row in np.eye(12))


def test_what_vanishes() -> None:
    u, v = gradients(1, 2, 4)
    both = np.stack([u, -3 * u])
    assert dual_cone_projections(both @ both.T).vanishes
    assert dual_cone_projection(both @ both.T, [0.5, 0.5]).vanishes
    third = np.stack([u, -3 * u, v])
    assert not dual_cone_projections(third @ third.T).vanishes
    assert dual_cone_projection(third @ third.T, [0.5, 0.5, 0.0]).vanishes
    assert not dual_cone_projection(third @ third.T, [0.5, 0.5, 1e-9]).vanishes
    assert dual_cone_projections(np.zeros((2, 2))).vanishes
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
    np.testing.assert_allclose(directed(gramian, mean, 1e-12).weights, minimum_norm_point(gramian), atol=1e-9)
    # As λ grows, only ⟨g_w, g₀⟩ counts: the vertex with the smallest one.
    vertex = np.zeros(5)
    vertex[(gramian @ mean).argmin()] = 1.0
    np.testing.assert_allclose(directed(gramian, mean, 1e6).weights, vertex, atol=1e-12)


def test_directed_where_the_hull_holds_zero() -> None:
    """u and -u cancel, and v is needed only as far as it takes part in the mean: d = 0 is not in reach."""
    rows = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    weights = directed(rows @ rows.T, np.full(3, 1 / 3), 0.3).weights
    np.testing.assert_allclose(weights, [0.5, 0.5, 0.0], atol=1e-12)
    zero = np.array([[1.0, 0.0], [0.0, 0.0], [-1.0, 1.0]])
    weights = directed(zero @ zero.T, np.full(3, 1 / 3), 0.3).weights
    total = (weights + 0.1) @ zero
    assert (zero @ total >= weights @ zero @ total - 1e-15).all() and weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("ratio", [1e-3, 1.0, 1e3])
def test_heights_are_reached_by_the_shortest_vector(ratio: float) -> None:
    """With a row for the heights or without one: the same minimiser, whatever length was expected."""
    for seed, (tasks, columns) in enumerate(((2, 4), (6, 12), (20, 24), (40, 50))):
        rows = gradients(seed, tasks, columns)
        _, cosines = unit_rows(rows @ rows.T)
        factor = np.linalg.cholesky(cosines).T
        for linear in np.random.default_rng(seed).normal(size=(5, tasks)) @ cosines:
            side = np.linalg.solve(factor.T, linear)
            expected = nnls(factor, -side)[0]
            root = nonnegative.root_of(cosines)
            assert root.regular
            np.testing.assert_allclose(root.nearest(side), expected, atol=1e-9)
            reached = root.above(-linear, ratio * (np.linalg.norm(factor @ expected) or 1.0))
            assert reached is not None
            np.testing.assert_allclose(reached, expected, atol=1e-9)
            assert nonnegative.residual(cosines, linear, np.ones(tasks), reached) <= (
                1e-12 if ratio == 1 else 1e-9
            )


def test_heights_out_of_reach_are_reported() -> None:
    """No vector has positive products with two opposite ones."""
    root = nonnegative.root_of(np.array([[1.0, -1.0], [-1.0, 1.0]]))
    assert root.above(np.ones(2), 1.0) is None
    assert root.above(np.array([1.0, -1.0]), 1.0) is not None


def nearly_opposite(seed: int, tasks: int = 6, columns: int = 30) -> np.ndarray:
    """Two rows opposite up to rounding of float32, among others."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(tasks, columns)).astype(np.float32)
    rows[1] = np.float32(-0.3) * rows[0]
    rows[1] += np.spacing(np.abs(rows[1])) * random.integers(-1, 2, columns).astype(np.float32)
    return rows.astype(np.float64)


def weakly_stationary(seed: int, tasks: int = 20, columns: int = 10) -> np.ndarray:
    """Half of the rows cancel, in float32; the others look to one side of their span."""
    random = np.random.default_rng(seed)
    rows, normal = random.normal(size=(tasks, columns)), random.normal(size=columns)
    along = rows @ normal / (normal @ normal)
    along[tasks // 2 :] -= np.abs(along[tasks // 2 :])
    rows -= along[:, None] * normal
    shares = random.uniform(0.1, 1.0, tasks // 2)
    rows[tasks // 2 - 1] = -shares[:-1] @ rows[: tasks // 2 - 1] / shares[-1]
    return rows.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("matrices", [nearly_opposite, weakly_stationary])
def test_gradients_that_cancel_up_to_rounding(matrices: Callable[[int], np.ndarray]) -> None:
    """The answer hurts no task by more than rounding of the gradients, with weights of ordinary size."""
    for seed in range(60):
        rows = matrices(seed)
        gramian, mean = rows @ rows.T, np.full(len(rows), 1 / len(rows))
        norms = np.linalg.norm(rows, axis=1)
        projections, projection = dual_cone_projections(gramian), dual_cone_projection(gramian, mean)
        vectors = np.vstack([projections.transform @ rows, projection.weights @ rows])
        # Relative to the summands: a gradient that cancels is projected to zero.
        sizes = np.append(projections.transform @ norms, projection.weights @ norms)
        assert (vectors @ rows.T >= -1e-6 * sizes[:, None] * norms).all()
        assert max(projections.transform.max(), projection.weights.max()) < 1e5
        assert not projections.vanishes
        assert 0 <= projections.residual < 1e-4 and 0 <= projection.residual < 1e-6
        averse = conflict_averse(gramian, mean, 0.5)
        added = (averse.weights - mean) @ rows
        assert np.linalg.norm(added) <= 0.5 * np.linalg.norm(mean @ rows) * (1 + 1e-7)
        assert (rows @ (averse.weights @ rows)).min() == pytest.approx(
            averse.level, abs=1e-6 * norms.max() ** 2
        )
        pulled = directed(gramian, mean, 0.3)
        assert pulled.residual < 1e-7
        total = (pulled.weights + 0.3 * mean) @ rows
        assert (rows @ total).min() >= pulled.weights @ rows @ total - 1e-6 * norms.max() ** 2


def entangled(seed: int) -> np.ndarray:
    """Rows nearly parallel to others, or opposite, at every distance from 1e-17 to 0.1, and some a zero."""
    random = np.random.default_rng(seed)
    tasks, columns = int(random.integers(3, 25)), int(random.integers(2, 40))
    rows = random.normal(size=(tasks, columns))
    for _ in range(4):
        one, other = random.choice(tasks, 2, replace=False)
        factor = random.choice([1.0, -1.0, -1.0, 0.0]) * random.uniform(0.1, 3.0)
        rows[one] = factor * rows[other] + (factor != 0) * 10 ** random.uniform(-17, -1) * rows[one]
    return rows


def test_gradients_that_cancel_at_any_distance_beside_zeros() -> None:
    for seed in range(300):
        rows = entangled(seed)
        gramian, mean = rows @ rows.T, np.full(len(rows), 1 / len(rows))
        norms = np.linalg.norm(rows, axis=1)
        transform, weights = (
            dual_cone_projections(gramian).transform,
            dual_cone_projection(gramian, mean).weights,
        )
        sizes = np.append(transform @ norms, weights @ norms)
        products = np.vstack([transform, weights]) @ rows @ rows.T
        assert (products >= -1e-6 * sizes[:, None] * norms).all(), seed
        added = (conflict_averse(gramian, mean, 0.5).weights - mean) @ rows
        assert np.linalg.norm(added) <= 0.5 * np.linalg.norm(mean @ rows) * (1 + 1e-4), seed
        assert directed(gramian, mean, 0.3).residual < 1e-6, seed


def test_where_nothing_can_be_told_from_rounding_the_best_point_is_returned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """scipy's limit of iterations is no exception of ours; another of its solvers answers."""

    def exhausted(*_: object, **__: object) -> None:
        raise RuntimeError("Maximum number of iterations reached.")

    for rows in (gradients(5, 6, 9), gradients(5, 9, 6), nearly_opposite(0)):
        gramian, mean = rows @ rows.T, np.full(len(rows), 1 / len(rows))
        expected = [
            dual_cone_projections(gramian).transform @ rows,
            conflict_averse(gramian, mean, 0.5).weights @ rows,
        ]
        with monkeypatch.context() as patch:
            patch.setattr("scipy.optimize.nnls", exhausted)
            actual = dual_cone_projections(gramian), conflict_averse(gramian, mean, 0.5)
        np.testing.assert_allclose(actual[0].transform @ rows, expected[0], atol=1e-5)
        np.testing.assert_allclose(actual[1].weights @ rows, expected[1], atol=1e-5)
        assert max(actual[0].residual, actual[1].residual) <= 1e-4


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
