"""What the simplex solvers refuse, by name of the entry, and what they tolerate."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from detente.geometry import simplex
from detente.geometry.dual_cone import dual_cone_projection, dual_cone_projections
from detente.geometry.simplex import frank_wolfe, minimum_norm_point, simplex_residual


@pytest.mark.parametrize("solver", [minimum_norm_point, frank_wolfe])
@pytest.mark.parametrize(
    ("gramian", "message"),
    [
        (np.ones((2, 3)), r"shape \[\.\.\., T, T\].*\[2, 3\]"),
        (np.ones(3), "shape"),
        (np.zeros((0, 0)), "T at least 1"),
        ([[1.0, np.nan], [np.nan, 1.0]], r"entry \[0, 1\] is nan"),
        ([[np.inf, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], r"entry \[0, 0\] is inf"),
        ([[1.0, 0.5], [0.4, 1.0]], "not symmetric"),
        ([[1.0, 0.5, 0.0], [0.4, 1.0, 0.0], [0.0, 0.0, 1.0]], "not symmetric"),
        ([[1.0, 0.0], [0.0, -1.0]], "diagonal"),
        ([[1.0, 3.0], [3.0, 1.0]], "larger than the product"),
        (np.eye(3) + 3 * (np.ones((3, 3)) - np.eye(3)), "larger than the product"),
        ([[0.0, 1.0], [1.0, 1.0]], "larger than the product"),
    ],
)
def test_bad_gramians(solver: Callable[[object], np.ndarray], gramian: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solver(gramian)


def test_a_matrix_that_no_gradients_have_is_named() -> None:
    """Every entry is that of a Gramian, and the whole is none."""
    matrix = 1.9 * np.eye(3) - 0.9
    for solver in (
        dual_cone_projections,
        lambda gramian: dual_cone_projection(gramian, np.ones(3)),
    ):
        with pytest.raises(ValueError, match=r"not positive semidefinite.*-8\.0e-01"):
            solver(matrix)


def test_the_best_point_of_a_gramian_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever accuracy rounding leaves, here none that is asked for."""
    monkeypatch.setattr(simplex, "RESIDUAL", -1.0)
    monkeypatch.setattr(simplex, "_pivot_dependent", lambda *_: None)
    rows = np.random.default_rng(0).normal(size=(6, 3))
    assert simplex_residual(rows @ rows.T, minimum_norm_point(rows @ rows.T)) <= 1e-13


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="tolerance=-1"):
        frank_wolfe(np.eye(2), tolerance=-1.0)
    with pytest.raises(ValueError, match="max_iterations=-1"):
        frank_wolfe(np.eye(2), max_iterations=-1)
    with pytest.raises(ValueError, match="one Gramian"):
        frank_wolfe(np.stack([np.eye(2)] * 3))
    with pytest.raises(ValueError, match="do not belong"):
        simplex_residual(np.eye(3), [0.5, 0.5])


def test_rounding_in_the_symmetry_is_tolerated() -> None:
    for tasks in (2, 3, 8):
        gradients = np.random.default_rng(3).standard_normal((tasks, 500))
        gramian = gradients @ gradients.T
        uneven = gramian * (1 + 1e-14 * np.triu(np.ones((tasks, tasks)), 1))
        np.testing.assert_allclose(minimum_norm_point(uneven), minimum_norm_point(gramian), rtol=1e-11)
