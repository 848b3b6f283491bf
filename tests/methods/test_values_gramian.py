"""Methods that are equations in the Gramian: TorchJD, clarabel, 50-digit arithmetic and closed forms as judges."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import cvxpy
import mpmath
import numpy as np
import pytest
import torch

import detente

NAMES = ("edm", "imtl-g", "nash-mtl", "fairgrad", "cagrad", "upgrad", "dualproj", "config", "sdmgrad")


def normal(seed: int, tasks: int, columns: int, common: float = 0.0) -> torch.Tensor:
    random = np.random.default_rng([seed, tasks, columns])
    return torch.from_numpy(random.normal(size=(tasks, columns)) + common * random.normal(size=columns))


def direction(name: str, jacobian: torch.Tensor, **options: object) -> torch.Tensor:
    found = detente.combine(detente.create(name, **options), jacobian).direction
    assert found is not None
    return found


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert torch.linalg.vector_norm(actual - expected) <= tolerance * torch.linalg.vector_norm(expected)


@pytest.fixture(scope="module")
def residuals() -> ModuleType:
    file = Path(__file__).resolve().parents[2] / "benchmarks" / "residuals.py"
    spec = importlib.util.spec_from_file_location("residuals_of_the_benchmark", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", [0, 7])
def test_residuals_on_the_battery(residuals: ModuleType, seed: int) -> None:
    for row in residuals.rows(quick=True, seed=seed):
        assert row["residual"] <= residuals.PROMISED, row
        assert row["matrices"] > 100


@pytest.mark.parametrize("name", [*NAMES, "mgda", "imtl"])
def test_a_method_tells_the_residual_of_its_problem(residuals: ModuleType, name: str) -> None:
    """None where a closed form or no equation answers; elsewhere at rounding level on ordinary gradients."""
    for label, matrix in residuals.battery(1, quick=True):
        tasks = len(matrix)
        gradients = detente.TaskGradients(
            names=tuple(map(str, range(tasks))), gramian=matrix @ matrix.T, losses=np.ones(tasks)
        )
        outcome = detente.create(name).combine(gradients)
        if outcome.status == "refused" or (name in ("mgda", "edm") and (tasks <= 2 or "zero" in label)):
            assert outcome.residual is None or name == "mgda"
            continue
        assert outcome.residual is not None, label
        assert 0 <= outcome.residual <= residuals.PROMISED, (label, outcome.residual)


def test_the_residual_of_an_iteration_that_stops_early_shows() -> None:
    rows = normal(3, 8, 20)
    assert (
        detente.create("mgda", solver="frank-wolfe")
        .combine(detente.TaskGradients(names=tuple("abcdefgh"), gramian=(rows @ rows.T).numpy()))
        .residual
        > 1e-10
    )


def test_the_residuals_notice_a_wrong_answer(residuals: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    jacobian = normal(0, 4, 6).numpy()
    for name in residuals.METHODS:
        assert residuals.residual(name, jacobian) <= residuals.PROMISED
        right = type(detente.create(name)).solve

        def off(self: detente.Method, gradients: detente.TaskGradients, right: object = right) -> object:
            found = right(self, gradients)  # type: ignore[operator]
            weights = found.weights * torch.tensor([1.0, 1.0001, 1.0, 1.0], dtype=torch.float64)
            transform = None if found.transform is None else found.transform * (1 + 1e-4 * torch.eye(4))
            return detente.Combination(weights=weights, transform=transform)

        with monkeypatch.context() as patch:
            patch.setattr(type(detente.create(name)), "solve", off)
            assert residuals.residual(name, jacobian) > 1e-8, name


@pytest.mark.parametrize("tasks, columns", [(2, 3), (3, 8), (5, 7), (8, 20)])
def test_against_torchjd(tasks: int, columns: int) -> None:
    """Where TorchJD is exact, or to the accuracy of its solver."""
    from torchjd import aggregation
    from torchjd.linalg import QuadprogProjector

    projector = QuadprogProjector(norm_eps=0.0, reg_eps=1e-12)
    for seed in range(5):
        jacobian = normal(seed, tasks, columns)
        close(direction("config", jacobian), aggregation.ConFIG()(jacobian), 1e-9)
        close(direction("imtl-g", jacobian), aggregation.IMTLG()(jacobian), 1e-7)
        upgrad, dualproj = aggregation.UPGrad(projector=projector), aggregation.DualProj(projector=projector)
        close(direction("upgrad", jacobian), upgrad(jacobian), 1e-6)
        close(direction("dualproj", jacobian), dualproj(jacobian), 1e-6)
        preference = torch.linspace(0.1, 1.0, tasks, dtype=torch.float64)
        weighted = aggregation.UPGrad(preference, projector=projector)
        close(direction("upgrad", jacobian, preference=preference.tolist()), weighted(jacobian), 1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
def test_bargaining_against_fifty_digits(alpha: float) -> None:
    for seed, (tasks, columns) in enumerate([(1, 3), (2, 3), (3, 8), (5, 12), (8, 30)]):
        jacobian = (
            normal(seed, tasks, columns, 0.3) * torch.logspace(0, 3, tasks, dtype=torch.float64)[:, None]
        )
        outcome = detente.combine(detente.create("fairgrad", alpha=alpha), jacobian)
        assert outcome.status == "ok" and outcome.weights is not None
        with mpmath.workdps(50):
            rows = mpmath.matrix(jacobian.tolist())
            gramian = rows * rows.T
            start = mpmath.matrix(outcome.weights.tolist())

            def equation(*w: mpmath.mpf, gramian: mpmath.matrix = gramian) -> list[mpmath.mpf]:
                return list(
                    gramian * mpmath.matrix(w) - mpmath.matrix([x ** (-1 / mpmath.mpf(alpha)) for x in w])
                )

            # Newton's method finds the root near its start, and ours must be it.
            root = mpmath.findroot(equation, list(start), tol=1e-40) if tasks > 1 else None
            if root is None:
                root = [gramian[0, 0] ** (-1 / (1 + 1 / mpmath.mpf(alpha)))]
            assert all(x > 0 for x in root)
            errors = [float(abs(a - b) / b) for a, b in zip(start, root, strict=True)]
        assert max(errors) <= 1e-9


def test_nash_and_fairgrad_agree_and_their_length_is_known() -> None:
    for seed in range(5):
        jacobian = normal(seed, 5, 9, 0.5) * torch.tensor([[1e-3], [1.0], [1e3], [1e6], [1.0]])
        nash = detente.combine("nash-mtl", jacobian)
        fair = detente.combine("fairgrad", jacobian)
        assert nash.direction is not None and nash.weights is not None and fair.weights is not None
        assert torch.equal(nash.weights, fair.weights)
        assert float(nash.direction.norm()) == pytest.approx(5**0.5, rel=1e-9)
        clipped = direction("nash-mtl", jacobian, max_norm=1.0)
        assert float(clipped.norm()) == pytest.approx(1.0, rel=1e-9)
        close(clipped * 5**0.5, nash.direction, 1e-9)
        assert torch.equal(direction("nash-mtl", jacobian, max_norm=10.0), nash.direction)


@pytest.mark.parametrize("name", ["nash-mtl", "fairgrad"])
def test_no_bargain_at_a_stationary_set(name: str) -> None:
    u, v = normal(0, 2, 5)
    for rows in ([u, -u], [u, -3 * u, v], [u, 0 * u], [u, v, -u - 2 * v]):
        for scale in (1e-12, 1.0, 1e12):
            outcome = detente.combine(name, scale * torch.stack(rows))
            assert outcome.status == "refused" and not outcome.accepted
            assert outcome.direction is not None and not outcome.direction.any()
            assert "no solution" in outcome.notes[0]


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9, 1.5])
def test_cagrad_against_clarabel(c: float) -> None:
    """The primal: max t with ⟨g_i, d⟩ ≥ t in the ball."""
    for seed, (tasks, columns) in enumerate([(2, 3), (3, 8), (6, 4), (8, 20)]):
        jacobian = normal(seed, tasks, columns, 0.2).numpy()
        mean = jacobian.mean(axis=0)
        d, level = cvxpy.Variable(columns), cvxpy.Variable()
        ball = cvxpy.norm(d - mean) <= c * np.linalg.norm(mean)
        problem = cvxpy.Problem(cvxpy.Maximize(level), [jacobian @ d >= level, ball])
        problem.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
        found = direction("cagrad", torch.from_numpy(jacobian), c=c).numpy()
        assert np.linalg.norm(found - mean) <= c * np.linalg.norm(mean) * (1 + 1e-9)
        assert (jacobian @ found).min() >= level.value - 1e-8 * (1 + abs(level.value))
        for rescale, factor in ((1, 1 + c * c), (2, 1 + c)):
            shorter = direction("cagrad", torch.from_numpy(jacobian), c=c, rescale=rescale).numpy()
            np.testing.assert_allclose(shorter * factor, found, rtol=1e-12, atol=1e-12)


def test_cagrad_where_the_hull_holds_zero_and_the_ball_reaches_the_dual_cone() -> None:
    """Both tasks of u and -u are kept from harm, and the direction along v is followed as far as the mean goes."""
    jacobian = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    close(direction("cagrad", jacobian, c=0.5), torch.tensor([0.0, 1.0], dtype=torch.float64), 1e-12)
    opposite = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    # mean -0.5, ball [-0.75, -0.25]: the second task gains 2 per unit, the first loses 1; -0.25 hurts least
    close(direction("cagrad", opposite, c=0.5), torch.tensor([-0.25], dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("strength", [0.0, 0.01, 0.3, 3.0])
def test_sdmgrad_against_clarabel(strength: float) -> None:
    for seed, (tasks, columns) in enumerate([(2, 3), (3, 8), (6, 4), (8, 20)]):
        jacobian = normal(seed, tasks, columns, 0.2).numpy()
        mean = jacobian.mean(axis=0)
        w = cvxpy.Variable(tasks, nonneg=True)
        objective = cvxpy.sum_squares(jacobian.T @ w + strength * mean)
        problem = cvxpy.Problem(cvxpy.Minimize(objective), [cvxpy.sum(w) == 1])
        problem.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-14, tol_gap_rel=1e-14, tol_feas=1e-14)
        expected = (jacobian.T @ w.value + strength * mean) / (1 + strength)
        found = direction("sdmgrad", torch.from_numpy(jacobian), lambda_=strength).numpy()
        np.testing.assert_allclose(found, expected, atol=2e-6)
        assert (1 + strength) ** 2 * (found @ found) <= problem.value + 1e-10


def test_sdmgrad_by_descent() -> None:
    """Many small steps reach the optimum; the published few do not; further batches make the factors."""
    jacobian = normal(3, 4, 9)
    exact = direction("sdmgrad", jacobian)
    slow = detente.create("sdmgrad", solver="sgd", steps=20000, lr=0.05, momentum=0.0)
    outcome = detente.combine(slow, jacobian)
    assert outcome.direction is not None and "one batch" in outcome.notes[0]
    close(outcome.direction, exact, 1e-6)
    first, second = normal(4, 4, 9), normal(5, 4, 9)
    batches = tuple(
        detente.TaskGradients(names=tuple("0123"), gramian=(j @ j.T).numpy(), jacobian=j)
        for j in (first, second)
    )
    gradients = detente.TaskGradients(
        names=tuple("0123"), gramian=(jacobian @ jacobian.T).numpy(), jacobian=jacobian, extra=batches
    )
    outcome = detente.create("sdmgrad", solver="sgd", steps=1, lr=1.0, momentum=0.5).combine(gradients)
    products = (first @ second.T).numpy()
    norms = [np.linalg.norm(factor.numpy(), axis=1).mean() for factor in (first, second)]
    products = products / (norms[0] * norms[1])
    stepped = 0.25 - 1.3 * products.mean(axis=1)
    # Projection on the simplex by bisection of its threshold.
    low, high = stepped.min() - 1, stepped.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(stepped - middle, 0).sum() > 1 else (low, middle)
    expected = (np.maximum(stepped - low, 0) + 0.3 / 4) / 1.3
    assert outcome.weights is not None and not outcome.notes
    np.testing.assert_allclose(outcome.weights.numpy(), expected, atol=1e-12)


def test_sdmgrad_declares_its_batches_only_where_it_looks_at_them() -> None:
    from detente.methods.registry import info_of

    assert "batches:3" in info_of(detente.create("sdmgrad", solver="sgd")).needs
    assert info_of(detente.create("sdmgrad")).needs == {"gramian"}


def test_edm_is_the_bisector_of_two() -> None:
    for seed in range(5):
        u, v = normal(seed, 2, 4)
        found = direction("edm", torch.stack([u, 1000 * v]))
        bisector = u / u.norm() + v / v.norm()
        assert float(found @ bisector / found.norm() / bisector.norm()) == pytest.approx(1.0, rel=1e-12)
        unit = 1 / (1 / u.norm() + 1 / (1000 * v.norm()))
        close(found, unit * bisector, 1e-10)


def test_dual_cone_by_hand() -> None:
    jacobian = torch.tensor([[1.0, 0.0], [-1.0, 1e-3]], dtype=torch.float64)
    # π(g_1) removes its part against g_2, π(g_2) its part against g_1.
    first = jacobian[0] + jacobian[1] / (1 + 1e-6)
    second = torch.tensor([0.0, 1e-3], dtype=torch.float64)
    close(direction("upgrad", jacobian), (first + second) / 2, 1e-9)
    weights = detente.combine("upgrad", jacobian).weights
    assert weights is not None
    altered = detente.combine("upgrad", jacobian).transform
    assert altered is not None
    np.testing.assert_allclose(altered.numpy(), [[1, 1 / (1 + 1e-6)], [1, 1]], rtol=1e-12)
    np.testing.assert_allclose(altered.mean(dim=0), weights)


def test_a_task_a_million_times_shorter_is_not_forgotten() -> None:
    """Public codes with a ridge of 1e-4 on the diagonal drop it."""
    jacobian = torch.tensor([[1.0, 0.0], [-1e-6, 1e-7]], dtype=torch.float64)
    for name in ("upgrad", "dualproj"):
        found = direction(name, jacobian)
        assert float(jacobian[1] @ found) >= -1e-18
        assert float(found.norm()) > 1e-2


@pytest.mark.parametrize(
    "name, options",
    [
        ("cagrad", {"c": -0.1}),
        ("cagrad", {"c": float("inf")}),
        ("cagrad", {"rescale": 3}),
        ("nash-mtl", {"max_norm": 0.0}),
        ("fairgrad", {"alpha": 0.0}),
        ("fairgrad", {"alpha": float("nan")}),
        ("sdmgrad", {"lambda_": -1.0}),
        ("sdmgrad", {"steps": 0}),
        ("sdmgrad", {"momentum": 1.0}),
        ("sdmgrad", {"solver": "adam"}),
        ("upgrad", {"preference": [0.0, 0.0]}),
        ("dualproj", {"preference": [-1.0, 1.0]}),
    ],
)
def test_options_out_of_range_are_named(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        detente.create(name, **options)


@pytest.mark.parametrize("name", NAMES)
def test_float32_noise_on_equal_gradients_changes_little(name: str) -> None:
    """Two tasks with the same gradient up to the last bit of float32 are one task, not an excuse to stop."""
    u = normal(0, 1, 2000)[0].to(torch.float32)
    noisy = u * torch.where(torch.arange(2000) % 2 == 0, 1 + 1.2e-7, 1.0).to(torch.float32)
    same, near = direction(name, torch.stack([u, u])), direction(name, torch.stack([u, noisy]))
    assert float(same.norm()) > 0
    close(near, same, 1e-4)
