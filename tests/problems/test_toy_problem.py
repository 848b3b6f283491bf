"""Every analytic problem keeps to what it declares; the toy equals its formula written down a second time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from detente.problems import AnalyticProblem, Toy
from detente.problems.toy import SCALES

PROBLEMS: dict[str, AnalyticProblem] = {f"toy, {name}": Toy(name) for name in SCALES}
PREFERENCES = ((1.0, 1.0), (0.1, 0.9), (0.7, 0.3), (3.0, 1.0), (1.0, 0.0), (0.0, 1.0))

problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


def scattered(problem: AnalyticProblem, points: int = 200) -> torch.Tensor:
    low, high = torch.tensor(problem.bounds, dtype=torch.float64).T
    uniform = torch.rand(
        points, problem.dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    return low + (high - low) * uniform


def gradients(problem: AnalyticProblem, theta: torch.Tensor) -> torch.Tensor:
    """[N, T, D]."""
    theta = theta.clone().requires_grad_()
    losses = problem.losses(theta)
    rows = [torch.autograd.grad(column.sum(), theta, retain_graph=True)[0] for column in losses.unbind(-1)]
    return torch.stack(rows, dim=-2)


class TestDeclaredFacts:
    """For every problem; a new one joins by a line in PROBLEMS."""

    @problems
    def test_starts_are_finite_and_in_the_picture(self, problem: AnalyticProblem) -> None:
        starts = torch.tensor(problem.starts, dtype=torch.float64)
        assert starts.shape[1:] == (problem.dimension,)
        for axis, (low, high) in enumerate(problem.bounds):
            assert (low < starts[:, axis]).all()
            assert (starts[:, axis] < high).all()
        assert torch.isfinite(problem.losses(starts)).all()
        assert torch.isfinite(gradients(problem, starts)).all()

    @problems
    @pytest.mark.parametrize("preference", PREFERENCES)
    def test_gradient_vanishes_at_the_optimum(
        self, problem: AnalyticProblem, preference: tuple[float, ...]
    ) -> None:
        weights = torch.tensor(preference, dtype=torch.float64)
        found = gradients(problem, problem.optimum(preference)[None])[0]
        assert (weights @ found).norm() <= 1e-13 * (weights[:, None] * found).abs().sum() + 1e-13

    @problems
    @pytest.mark.parametrize("preference", PREFERENCES)
    def test_nothing_is_lower_than_the_optimum(
        self, problem: AnalyticProblem, preference: tuple[float, ...]
    ) -> None:
        weights = torch.tensor(preference, dtype=torch.float64)
        best = problem.losses(problem.optimum(preference)) @ weights
        wide = 3 * scattered(problem, 20_000)
        assert best <= (problem.losses(wide) @ weights).min()
        assert (
            best < (problem.losses(problem.optimum(preference) + 1e-3 * scattered(problem)) @ weights).min()
        )

    @problems
    def test_autograd_is_the_difference_quotient(self, problem: AnalyticProblem) -> None:
        theta, step = scattered(problem), 1e-6
        found = gradients(problem, theta)
        for axis in range(problem.dimension):
            shift = torch.zeros(problem.dimension, dtype=torch.float64)
            shift[axis] = step
            quotient = (problem.losses(theta + shift) - problem.losses(theta - shift)) / (2 * step)
            torch.testing.assert_close(found[..., axis], quotient, rtol=1e-5, atol=1e-6)

    @problems
    def test_batches_are_their_points(self, problem: AnalyticProblem) -> None:
        theta = scattered(problem, 6).reshape(2, 3, problem.dimension)
        one_by_one = torch.stack([torch.stack([problem.losses(point) for point in row]) for row in theta])
        torch.testing.assert_close(problem.losses(theta), one_by_one, rtol=0, atol=0)

    @problems
    def test_losses_stay_above_the_lower_bound(self, problem: AnalyticProblem) -> None:
        everywhere = torch.cat((3 * scattered(problem, 20_000), problem.pareto_set(101)))
        assert (problem.losses(everywhere) > problem.lower).all()

    @problems
    def test_the_front_is_not_dominated(self, problem: AnalyticProblem) -> None:
        front = problem.front(101)
        assert (front[1:, 0] < front[:-1, 0]).all()
        assert (front[1:, 1] > front[:-1, 1]).all()
        losses = problem.losses(2 * scattered(problem, 5000))
        better = (losses[:, None] <= front[None]).all(-1)
        assert not better.any()

    @problems
    def test_the_ends_of_the_front_are_the_tasks_optima(self, problem: AnalyticProblem) -> None:
        ends = problem.pareto_set(11)[[0, -1]]
        expected = torch.stack((problem.optimum((0.0, 1.0)), problem.optimum((1.0, 0.0))))
        torch.testing.assert_close(ends, expected, rtol=0, atol=1e-14)


def formula(x: float, y: float) -> tuple[float, float]:
    """The toy's losses with factors 1, with the math module and one point at a time."""
    h1 = abs(0.5 * (-x - 7) - math.tanh(-y))
    h2 = abs(0.5 * (-x + 3) + math.tanh(-y) + 2)
    f1, f2 = math.log(max(h1, 5e-6)) + 6, math.log(max(h2, 5e-6)) + 6
    g1 = ((-x + 7) ** 2 + 0.1 * (-y - 8) ** 2) / 10 - 20
    g2 = ((-x - 7) ** 2 + 0.1 * (-y - 8) ** 2) / 10 - 20
    c1, c2 = max(math.tanh(0.5 * y), 0.0), max(math.tanh(-0.5 * y), 0.0)
    return c1 * f1 + c2 * g1, c1 * f2 + c2 * g2


@pytest.mark.parametrize(
    ("name", "factors"), [("cagrad", (1, 1)), ("nash-mtl", (0.1, 1)), ("aligned-mtl", (0.5, 0.5))]
)
def test_values_are_the_formula(name: str, factors: tuple[float, float]) -> None:
    toy = Toy(name)  # type: ignore[arg-type]
    points = torch.cat((scattered(toy), torch.tensor(Toy.starts, dtype=torch.float64)))
    expected = [
        [s * loss for s, loss in zip(factors, formula(x, y), strict=True)] for x, y in points.tolist()
    ]
    torch.testing.assert_close(
        toy.losses(points), torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=1e-13
    )


def test_the_logarithm_is_cut_off_on_the_valley_floor() -> None:
    y = 3.0
    x = -7 + 2 * math.tanh(y)  # h₁ = 0
    loss = Toy().losses(torch.tensor([x, y], dtype=torch.float64))[0]
    assert float(loss) == pytest.approx(math.tanh(1.5) * (math.log(5e-6) + 6), rel=1e-12)


def test_slopes_on_the_axis_are_those_of_both_sides() -> None:
    """∂L_i/∂θ₂ = (f_i - g_i)/2 at θ₂ = 0, whatever torch's clamp does at its bound: the start (0, 0) must move."""
    found = gradients(Toy(), torch.zeros(1, 2, dtype=torch.float64))[0]
    valleys = np.log([3.5, 3.5]) + 6
    bowls = (49 + 6.4) / 10 - 20
    np.testing.assert_allclose(found[:, 1], (valleys - bowls) / 2, rtol=1e-13)
    np.testing.assert_allclose(found[:, 0], 0, atol=1e-15)


@pytest.mark.parametrize("weight", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_the_optimum_is_what_a_minimiser_finds(weight: float) -> None:
    def objective(point: np.ndarray) -> float:
        first, second = formula(*point)
        return weight * first + (1 - weight) * second

    found = minimize(objective, [0.0, -5.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14})
    np.testing.assert_allclose(Toy().optimum((weight, 1 - weight)), found.x, atol=2e-6)


def test_scales_fold_into_the_weights() -> None:
    torch.testing.assert_close(
        Toy("nash-mtl").optimum((10.0, 1.0)), Toy().optimum((1.0, 1.0)), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("preference", [(0, 0), (-1, 2), (1,), (1, 2, 3), (float("nan"), 1)])
def test_bad_preferences_are_refused(preference: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="preference is"):
        Toy().optimum(preference)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="option scales is 'pcgrad'"):
        Toy("pcgrad")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="last axis must be 2"):
        Toy().losses(torch.zeros(2, 3))
