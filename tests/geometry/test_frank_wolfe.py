"""The published iteration: its first step by hand, its proven rate, vertices, and its stopping rule."""

from __future__ import annotations

import numpy as np
import pytest

from detente.geometry.simplex import frank_wolfe, minimum_norm_point, simplex_residual


def draw(kind: str, tasks: int, seed: int) -> np.ndarray:
    """Gradients [T, 30]."""
    rng = np.random.default_rng(seed)
    gradients = rng.standard_normal((tasks, 30))
    if kind == "correlated":
        gradients += rng.standard_normal(30) * rng.uniform(0, 3, (tasks, 1))
    elif kind == "norm ratio 1e6":
        gradients *= 10.0 ** np.linspace(-6, 0, tasks)[:, None]
    elif kind == "zero in the hull":
        gradients[-1] = -gradients[:-1].sum(axis=0)
    return gradients


def gram(gradients: np.ndarray) -> np.ndarray:
    return gradients @ gradients.T


def assert_on_simplex(weights: np.ndarray) -> None:
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("kind", ["gaussian", "correlated", "norm ratio 1e6", "zero in the hull"])
def test_frank_wolfe_approaches_the_exact_solution_at_the_proven_rate(kind: str) -> None:
    for seed in range(5):
        gramian = gram(draw(kind, 8, seed))
        exact = minimum_norm_point(gramian)
        diagonal = np.diagonal(gramian)
        diameter = (diagonal[:, None] + diagonal - 2 * gramian).max()
        for steps in (1, 10, 100, 3000):
            weights = frank_wolfe(gramian, max_iterations=steps, tolerance=0.0)
            assert_on_simplex(weights)
            excess = weights @ gramian @ weights - exact @ gramian @ exact
            assert -1e-12 * diameter <= excess <= 2 * diameter / (steps + 2)


def test_frank_wolfe_first_step_by_hand() -> None:
    # d = (1/3, 2/3, 1); inner products 1/3, 4/3, 3; the exact step towards task 0 minimises (1 + 2γ)² + 13 (1 − γ)².
    gramian = np.diag([1.0, 4.0, 9.0])
    step = 11 / 17
    expected = np.full(3, (1 - step) / 3) + np.array([step, 0, 0])
    np.testing.assert_allclose(frank_wolfe(gramian, max_iterations=1), expected, rtol=1e-14)
    np.testing.assert_array_equal(frank_wolfe(gramian, max_iterations=0), np.full(3, 1 / 3))


def test_frank_wolfe_reaches_vertices_and_two_tasks_exactly() -> None:
    assert frank_wolfe([[1.0, 2.0], [2.0, 9.0]]).tolist() == [1.0, 0.0]
    np.testing.assert_allclose(frank_wolfe([[1.0, -1.0], [-1.0, 4.0]]), [5 / 7, 2 / 7], rtol=1e-14)
    assert frank_wolfe(np.ones((3, 3))).tolist() == pytest.approx([1 / 3] * 3)
    assert frank_wolfe(np.diag([1.0, 0.0, 2.0])).tolist() == [0.0, 1.0, 0.0]


def test_frank_wolfe_stops_by_its_tolerance() -> None:
    gramian = gram(draw("gaussian", 8, 0))
    coarse, fine = (
        frank_wolfe(gramian, tolerance=0.1),
        frank_wolfe(gramian, max_iterations=5000, tolerance=1e-9),
    )
    assert simplex_residual(gramian, fine) < simplex_residual(gramian, coarse)
    # The first step by hand changes the weights by 2 · 11/17 · (1 − 1/3) = 0.863 in sum.
    diagonal = np.diag([1.0, 4.0, 9.0])
    once = frank_wolfe(diagonal, max_iterations=1).tolist()
    assert frank_wolfe(diagonal, tolerance=0.87).tolist() == once
    assert frank_wolfe(diagonal, tolerance=0.86).tolist() != once
