"""The residual that every claim about the simplex problem is measured by: hand-computed values and invariances."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detente.geometry.simplex import minimum_norm_point, simplex_residual


def gram(gradients: np.ndarray) -> np.ndarray:
    return gradients @ gradients.T


def test_residual_by_hand() -> None:
    # d = (1/2, 1): μ = 5/4, products (1/2, 2); task 0 falls short by 3/4 of 1/2 + 5/4.
    assert simplex_residual([[1.0, 0.0], [0.0, 4.0]], [0.5, 0.5]) == pytest.approx(0.75 / 1.75)
    assert simplex_residual(np.zeros((2, 2)), [0.3, 0.7]) == 0
    assert simplex_residual(np.eye(2), [0.4, 0.4]) == pytest.approx(0.2)
    assert simplex_residual(np.eye(2), [1.25, -0.25]) >= 0.25
    # All weight on one of two opposite gradients, while zero is in the hull: as wrong as can be.
    assert simplex_residual([[1.0, -1.0], [-1.0, 1.0]], [1.0, 0.0]) == pytest.approx(1.0)


def test_residual_sees_a_task_a_million_times_shorter() -> None:
    gramian = np.diag([1.0, 1e-12])
    right = np.array([1e-12, 1.0]) / (1 + 1e-12)
    assert simplex_residual(gramian, right) <= 1e-15
    assert simplex_residual(gramian, [0.0, 1.0]) == pytest.approx(
        1.0
    )  # the long task is wrong by 1e-12 in weight
    # Twice the right weight for the long task: its share of the terms is 2e-6, and all of it is wrong.
    assert simplex_residual(gramian, [2e-12, 1 - 2e-12]) == pytest.approx(2e-6, rel=1e-5)


@given(scale=st.integers(-24, 24), seed=st.integers(0, 1000))
def test_residual_is_free_of_scale(scale: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gramian, weights = gram(rng.standard_normal((4, 6))), rng.dirichlet(np.ones(4))
    assert simplex_residual(gramian * 10.0**scale, weights) == pytest.approx(
        simplex_residual(gramian, weights), rel=1e-9
    )
    batch = simplex_residual(np.stack([gramian, gramian]), np.stack([weights, minimum_norm_point(gramian)]))
    assert batch[0] == pytest.approx(simplex_residual(gramian, weights))
    assert batch[1] <= 1e-13
