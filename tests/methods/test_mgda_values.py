"""MGDA against quadprog, TorchJD, closed forms and formulas written out."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import detente


def rows(tasks: int, columns: int, seed: int) -> np.ndarray:
    random = np.random.default_rng([seed, tasks, columns])
    return np.asarray(random.normal(size=(tasks, columns)) * random.uniform(0.3, 3.0, (tasks, 1)))


def solved(matrix: np.ndarray, losses: Any = None, **options: Any) -> np.ndarray:
    weights = detente.combine(detente.create("mgda", **options), torch.from_numpy(matrix), losses).weights
    assert weights is not None
    return weights.numpy()


@pytest.mark.parametrize("tasks, columns", [(2, 5), (3, 4), (5, 12), (8, 30), (10, 11), (20, 60)])
def test_exact_equals_quadprog(tasks: int, columns: int) -> None:
    """Independent gradients, so that the weights are unique and quadprog's matrix is positive definite."""
    quadprog = pytest.importorskip("quadprog")
    for seed in range(10):
        matrix = rows(tasks, columns, seed)
        gramian = matrix @ matrix.T
        simplex = np.column_stack([np.ones(tasks), np.eye(tasks)])
        bound = np.zeros(tasks + 1)
        bound[0] = 1.0
        expected = quadprog.solve_qp(gramian, np.zeros(tasks), simplex, bound, 1)[0]
        weights = solved(matrix)
        ours, theirs = np.linalg.norm(weights @ matrix), np.linalg.norm(expected @ matrix)
        assert ours <= theirs * (1 + 1e-9)
        # Where the hull passes close to zero the weights are sensitive; the point is what counts.
        assert (
            np.linalg.norm(weights @ matrix - expected @ matrix)
            <= 1e-6 * np.linalg.norm(matrix, axis=1).max()
        )


def test_exact_is_never_longer_than_torchjd_and_equal_for_two_tasks() -> None:
    """TorchJD's Frank-Wolfe stops at a step of 1e-3: exact for T=2, above the optimum for more tasks."""
    torchjd = pytest.importorskip("torchjd.aggregation")
    for tasks, columns in ((2, 5), (3, 6), (5, 9)):
        for seed in range(4):
            matrix = rows(tasks, columns, seed)
            theirs = torchjd.MGDA(epsilon=1e-9, max_iters=1500)(torch.from_numpy(matrix)).numpy()
            ours = solved(matrix) @ matrix
            # The gap of Frank-Wolfe falls as 1/k; squared lengths differ by no more than it.
            excess = theirs @ theirs - ours @ ours
            assert -1e-12 * (theirs @ theirs) <= excess <= 5e-3 * (matrix**2).sum(axis=1).max()
            if tasks == 2:
                assert np.allclose(theirs, ours, rtol=0, atol=1e-9)


def test_two_tasks_by_hand() -> None:
    """α = <g2 - g1, g2> / ‖g1 - g2‖², kept in [0, 1] (Sener & Koltun 2018, equation 4)."""
    for seed in range(30):
        first, second = rows(2, 4, seed)
        share = np.clip((second - first) @ second / ((first - second) @ (first - second)), 0, 1)
        assert solved(np.stack([first, second])) == pytest.approx([share, 1 - share], abs=1e-12)
    assert solved(np.array([[1.0, 0.0], [3.0, 0.0]])).tolist() == [1.0, 0.0]  # a vertex, reached exactly


def test_orthogonal_gradients_weigh_with_the_inverse_square() -> None:
    lengths = [Fraction(1), Fraction(2), Fraction(5), Fraction(10)]
    inverse = [1 / length**2 for length in lengths]
    expected = [float(value / sum(inverse)) for value in inverse]
    assert solved(np.diag([float(length) for length in lengths])) == pytest.approx(expected, rel=1e-14)


def test_a_task_that_only_hinders_gets_nothing() -> None:
    """g3 = 2 g1 + 2 g2 lies beyond the segment between g1 and g2, whose midpoint is the shortest."""
    matrix = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    assert solved(matrix).tolist() == [0.5, 0.5, 0.0]


def test_more_tasks_than_dimensions_satisfy_the_conditions_of_optimality() -> None:
    for seed in range(10):
        matrix = rows(12, 4, seed) + np.array([4.0, 0, 0, 0])
        weights = solved(matrix)
        products = matrix @ (weights @ matrix)
        least = products.min()
        assert weights.min() >= 0 and weights.sum() == pytest.approx(1, rel=1e-12)
        assert weights @ (products - least) <= 1e-10 * np.abs(products).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_rounded_to_their_precision_still_count_as_stationary(dtype: torch.dtype) -> None:
    """The threshold is a relative length of about 6e-8 √T, float32's own rounding."""
    for seed in range(20):
        some = rows(3, 50, seed)
        shares = np.random.default_rng(seed).uniform(0.2, 1.0, 4)
        closing = -(shares[:3] @ some) / shares[3]
        matrix = torch.from_numpy(np.vstack([some, closing])).to(dtype)
        outcome = detente.combine("mgda", matrix)
        assert outcome.status == "stationary"
        assert outcome.direction is not None and not outcome.direction.any()
        shifted = matrix.clone()
        shifted[3] += (
            1e-3 * shifted[3].norm() * torch.nn.functional.normalize(torch.ones(50, dtype=dtype), dim=0)
        )
        assert detente.combine("mgda", shifted).status == "ok"


def normalized(matrix: np.ndarray, losses: np.ndarray, form: str) -> np.ndarray:
    norms = np.linalg.norm(matrix, axis=1)
    divisors = {"l2": norms, "loss": losses, "loss+": norms * losses}
    return np.asarray(matrix / divisors[form][:, None])


@pytest.mark.parametrize("form", ["l2", "loss", "loss+"])
def test_normalize_solves_on_the_divided_gradients_and_weighs_the_given_ones(form: str) -> None:
    for seed in range(10):
        matrix = rows(4, 9, seed)
        losses = np.random.default_rng(seed).uniform(0.1, 3.0, 4)
        expected = solved(normalized(matrix, losses, form))
        method = detente.create("mgda", normalize=form)
        outcome = detente.combine(method, torch.from_numpy(matrix), losses)
        assert outcome.weights is not None and outcome.direction is not None
        assert outcome.weights.numpy() == pytest.approx(expected, abs=1e-9)
        assert outcome.direction.numpy() == pytest.approx(expected @ matrix, abs=1e-8)


def test_normalize_with_a_vanishing_gradient_is_stationary() -> None:
    matrix = np.array([[1.0, 2.0], [0.0, 0.0]])
    for form in ("none", "l2", "loss", "loss+"):
        outcome = detente.combine(
            detente.create("mgda", normalize=form), torch.from_numpy(matrix), [1.0, 2.0]
        )
        assert outcome.status == "stationary" and outcome.weights is not None
        assert outcome.weights.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("form", ["loss", "loss+"])
def test_normalize_by_losses_needs_positive_losses(form: str) -> None:
    method = detente.create("mgda", normalize=form)
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match=r"'depth'.*positive"):
            detente.combine(method, torch.eye(2), {"seg": 1.0, "depth": bad})
        assert method.tasks is None
    with pytest.raises(ValueError, match="losses="):
        detente.combine(method, torch.eye(2))


def test_frank_wolfe_comes_near_and_exact_is_never_longer() -> None:
    """The published stop (a change below 1e-5, 250 iterations) leaves some length; the exact solver leaves none."""
    longest = 0.0
    for seed in range(20):
        matrix = rows(6, 14, seed)
        exact = np.linalg.norm(solved(matrix) @ matrix)
        published = np.linalg.norm(solved(matrix, solver="frank-wolfe") @ matrix)
        assert exact <= published * (1 + 1e-12)
        longest = max(longest, published / exact)
    assert 1 < longest < 1.5


def test_upper_bound_solves_on_the_gradients_of_the_representation() -> None:
    """MGDA-UB (Sener & Koltun 2018, section 3.3): weights from dL/dZ of the whole batch, applied to the encoder."""
    torch.manual_seed(0)
    trunk = torch.nn.Linear(3, 4).double()
    heads = [torch.nn.Linear(4, 1).double() for _ in range(3)]
    inputs = torch.randn(5, 3, dtype=torch.float64)

    def losses(z: torch.Tensor) -> list[torch.Tensor]:
        return [(head(z) - target).square().mean() for target, head in enumerate(heads)]

    z = trunk(inputs)
    at = z.detach().requires_grad_()
    jacobian = np.stack([torch.autograd.grad(loss, at)[0].reshape(-1).numpy() for loss in losses(at)])
    weights = solved(jacobian)
    summed = sum(w * loss for w, loss in zip(weights, losses(trunk(inputs)), strict=True))
    expected = torch.autograd.grad(summed, trunk.weight)[0]
    record = detente.backward(losses(z), detente.create("mgda"), features=z)
    assert record.space == "features" and record.weights == pytest.approx(weights, abs=1e-10)
    assert trunk.weight.grad is not None
    assert torch.allclose(trunk.weight.grad, expected, rtol=1e-9, atol=1e-12)
