"""PCGrad, GradVac, GradDrop, MoCo and MoDo against slow, obvious twins on the gradients themselves, and TorchJD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import detente
from detente.geometry.projection import project_onto_simplex
from detente.geometry.surgery import ascending, project_conflicts, raise_cosines, shuffled

Matrix = np.ndarray


def conflicting(tasks: int, columns: int, seed: int, scale: float = 1.0, ratio: float = 1.0) -> Matrix:
    random = np.random.default_rng([seed, tasks])
    lengths = np.geomspace(1.0, ratio, tasks)[random.permutation(tasks)]
    return scale * lengths[:, None] * random.normal(size=(tasks, columns))


def combined(method: detente.Method, matrix: Matrix) -> Matrix:
    direction = detente.combine(method, torch.from_numpy(matrix.copy())).direction
    assert direction is not None
    return direction.numpy()


def close(actual: Matrix, expected: Matrix, tolerance: float = 1e-9) -> bool:
    return bool(np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected))


# ---- PCGrad


def slow_pcgrad(matrix: Matrix, order: Sequence[Sequence[int]]) -> Matrix:
    altered = matrix.copy()
    for i, others in enumerate(order):
        for j in others:
            inner = altered[i] @ matrix[j]
            if inner < 0:
                altered[i] = altered[i] - inner / (matrix[j] @ matrix[j]) * matrix[j]
    return altered


@pytest.mark.parametrize("tasks", [2, 3, 5, 12])
@pytest.mark.parametrize("scale, ratio", [(1.0, 1.0), (1e-10, 1.0), (1e10, 1e5)])
def test_pcgrad_is_its_slow_twin(tasks: int, scale: float, ratio: float) -> None:
    for seed in range(5):
        matrix = conflicting(tasks, 7, seed, scale, ratio)
        altered = slow_pcgrad(matrix, [[j for j in range(tasks) if j != i] for i in range(tasks)])
        outcome = detente.combine(detente.create("pcgrad", order="fixed"), torch.from_numpy(matrix))
        assert outcome.transform is not None
        for actual, expected in zip(outcome.transform.numpy() @ matrix, altered, strict=True):
            assert close(actual, expected)
        mean = combined(detente.create("pcgrad", order="fixed", reduce="mean"), matrix)
        assert close(mean, altered.mean(axis=0))


def test_pcgrad_visits_in_the_order_it_draws() -> None:
    matrix = conflicting(6, 4, 1)
    draws = torch.rand(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).numpy()
    order = [sorted((j for j in range(6) if j != i), key=lambda j, i=i: draws[i, j]) for i in range(6)]
    assert close(combined(detente.create("pcgrad", seed=3), matrix), slow_pcgrad(matrix, order).sum(axis=0))
    assert not close(
        combined(detente.create("pcgrad", seed=4), matrix), slow_pcgrad(matrix, order).sum(axis=0)
    )


def test_every_order_is_as_likely_as_any_other() -> None:
    generator = torch.Generator().manual_seed(0)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(1200):
        row = tuple(shuffled(torch.rand(4, 4, generator=generator, dtype=torch.float64).numpy())[1].tolist())
        counts[row] = counts.get(row, 0) + 1
    assert len(counts) == 6 and set(next(iter(counts))) == {0, 2, 3}
    assert all(abs(count - 200) < 5 * math.sqrt(200) for count in counts.values())


class Ascending:
    """Stands in for `torch.randperm`: the identity."""

    def __call__(self, size: int, **_: Any) -> torch.Tensor:
        return torch.arange(size)


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_pcgrad_is_torchjd_in_the_same_order(tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchjd.aggregation import PCGrad

    monkeypatch.setattr(torch, "randperm", Ascending())
    for seed in range(4):
        matrix = conflicting(tasks, 9, seed)
        expected = PCGrad()(torch.from_numpy(matrix)).numpy()
        assert close(combined(detente.create("pcgrad", order="fixed"), matrix), expected, 1e-6)


def test_pcgrad_leaves_nothing_of_opposite_gradients() -> None:
    for scale in (1.0, 1e-12, 1e12):
        row = scale * np.array([[0.3, -1.7, 0.2]])
        outcome = detente.combine("pcgrad", torch.from_numpy(np.concatenate([row, -1000 * row])))
        assert (
            outcome.status == "stationary" and outcome.direction is not None and not outcome.direction.any()
        )


# ---- GradVac


def slow_gradvac(matrix: Matrix, targets: Matrix, beta: float) -> Matrix:
    """One step in ascending order; the targets are changed in place."""
    altered = matrix.copy()
    for i in range(len(matrix)):
        for j in range(len(matrix)):
            if i == j:
                continue
            length, other = np.linalg.norm(altered[i]), np.linalg.norm(matrix[j])
            cosine, target = altered[i] @ matrix[j] / (length * other), targets[i, j]
            if cosine < target:
                sine, wanted = math.sqrt(1 - cosine**2), math.sqrt(1 - target**2)
                altered[i] = (
                    altered[i] + length * (target * sine - cosine * wanted) / (other * wanted) * matrix[j]
                )
                assert altered[i] @ matrix[j] / (np.linalg.norm(altered[i]) * other) == pytest.approx(target)
            targets[i, j] = (1 - beta) * target + beta * cosine
    return altered


def agreeing(tasks: int, columns: int, seed: int) -> Matrix:
    """Gradients with a common part, so that targets rise above zero and corrections are made."""
    return conflicting(tasks, columns, seed) + 0.6 * np.random.default_rng([7, columns]).normal(size=columns)


@pytest.mark.parametrize("tasks", [2, 3, 6])
@pytest.mark.parametrize("beta", [0.5, 0.01])
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_gradvac_is_its_slow_twin_over_several_steps(tasks: int, beta: float, scale: float) -> None:
    method = detente.create("gradvac", beta=beta, order="fixed")
    targets = np.zeros((tasks, tasks))
    corrected = 0
    for step in range(8):
        matrix = scale * agreeing(tasks, 11, step)
        altered = slow_gradvac(matrix, targets, beta)
        corrected += not np.allclose(altered, matrix, rtol=1e-9, atol=0)
        outcome = detente.combine(method, torch.from_numpy(matrix))
        assert outcome.transform is not None
        for actual, expected in zip(outcome.transform.numpy() @ matrix, altered, strict=True):
            assert close(actual, expected, 1e-8)
        assert np.allclose(method.targets[:, :, 0].numpy(), targets, atol=1e-10)
    assert corrected >= 1


def test_gradvac_is_torchjd_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchjd.aggregation import GradVac

    monkeypatch.setattr(torch, "randperm", Ascending())
    method, reference = detente.create("gradvac", order="fixed"), GradVac(beta=0.5, eps=0.0)
    for step in range(5):
        matrix = agreeing(5, 9, step)
        assert close(combined(method, matrix), reference(torch.from_numpy(matrix)).numpy(), 1e-6)


def test_gradvac_with_targets_at_zero_is_pcgrad() -> None:
    matrix = conflicting(7, 5, 2)
    first = combined(detente.create("gradvac", seed=9), matrix)
    assert close(first, combined(detente.create("pcgrad", seed=9), matrix))


def test_gradvac_of_groups_is_gradvac_of_each_group() -> None:
    sizes = (4, 2, 5)
    for group, ranges in (("tensor", ((0, 4), (4, 6), (6, 11))), ("layer", ((0, 6), (6, 11)))):
        whole = detente.create("gradvac", group=group, order="fixed")
        parts = [detente.create("gradvac", order="fixed") for _ in ranges]
        for step in range(4):
            tensors = [torch.zeros(2, 2), torch.zeros(2), torch.zeros(5, 1)]
            matrix = agreeing(3, sum(sizes), step)
            record, actual = backward_of(whole, tensors, matrix)
            expected = [combined(part, matrix[:, a:b]) for part, (a, b) in zip(parts, ranges, strict=True)]
            assert close(actual, np.concatenate(expected)), group
            assert set(record.weights) == {None} and record.space == "exact"


def backward_of(
    method: detente.Method, tensors: list[torch.Tensor], matrix: Matrix, **how: Any
) -> tuple[detente.StepRecord, Matrix]:
    """A model of parameters alone whose task gradients are the rows of a matrix."""
    leaves = [tensor.to(torch.float64).requires_grad_() for tensor in tensors]
    record = detente.backward(linear_losses(leaves, matrix), method, shared=leaves, task_specific=[], **how)
    return record, np.concatenate([leaf.grad.reshape(-1).numpy() for leaf in leaves if leaf.grad is not None])


def linear_losses(leaves: list[torch.Tensor], matrix: Matrix) -> list[torch.Tensor]:
    parameters = torch.cat([leaf.reshape(-1) for leaf in leaves])
    return [(torch.from_numpy(row) * parameters).sum() + 1.0 for row in matrix]


def test_surgery_of_a_batch_is_surgery_of_each() -> None:
    rows = np.stack([agreeing(4, 6, seed) for seed in range(3)])
    gramians, order = rows @ rows.swapaxes(1, 2), ascending(4)
    targets = np.random.default_rng(0).uniform(-0.5, 0.9, (3, 4, 4))
    together = raise_cosines(gramians, targets, order, 0.3)
    for position, gramian in enumerate(gramians):
        alone = raise_cosines(gramian, targets[position], order, 0.3)
        assert np.allclose(alone[0], together[0][position]) and np.allclose(alone[1], together[1][position])
        assert np.allclose(project_conflicts(gramian, order), project_conflicts(gramians, order)[position])


def test_a_target_of_one_adds_finitely_much() -> None:
    transform, _ = raise_cosines(np.eye(2), np.ones((2, 2)), ascending(2), 1.0)
    assert np.isfinite(transform).all() and 1e3 < transform[0, 1] < 1e4


# ---- GradDrop


@pytest.mark.parametrize("leak", [0.0, 0.3, 1.0])
def test_graddrop_is_the_formula(leak: float) -> None:
    matrix = conflicting(4, 200, 5)
    matrix[:, 3], matrix[:, 4] = 0.0, np.abs(matrix[:, 4])
    purity = 0.5 * (
        1 + np.divide(matrix.sum(0), np.abs(matrix).sum(0), out=np.zeros(200), where=matrix.any(0))
    )
    uniform = torch.rand(200, generator=torch.Generator().manual_seed(2)).numpy().astype(np.float64)
    mask = np.where(purity > uniform, matrix > 0, matrix < 0)
    expected = ((leak + (1 - leak) * mask) * matrix).sum(axis=0)
    assert close(combined(detente.create("graddrop", leak=leak, seed=2), matrix), expected)
    assert 20 < (purity > uniform).sum() < 180


def test_graddrop_on_features_looks_at_the_sign_of_the_activation() -> None:
    matrix = conflicting(3, 300, 6)
    activations = np.random.default_rng(1).normal(size=300)
    activations[:5] = 0.0
    signed = matrix * np.sign(activations)
    uniform = torch.rand(300, generator=torch.Generator().manual_seed(0)).numpy().astype(np.float64)
    sizes = np.abs(signed).sum(0)
    purity = 0.5 * (1 + np.divide(signed.sum(0), sizes, out=np.zeros(300), where=sizes > 0))
    mask = np.where(purity > uniform, signed > 0, signed < 0)
    gradients = detente.TaskGradients(
        names=("a", "b", "c"),
        jacobian=torch.from_numpy(matrix),
        activations=torch.from_numpy(activations),
        space="features",
    )
    direction = detente.create("graddrop").combine(gradients).direction
    assert direction is not None and close(direction.numpy(), (mask * matrix).sum(axis=0))
    assert not direction[:5].any()


def test_graddrop_keeps_the_gradient_on_average_where_tasks_agree() -> None:
    matrix = torch.tensor([[1.0, 3.0], [2.0, -1.0]])
    method = detente.create("graddrop")
    directions = torch.stack([detente.combine(method, matrix).direction for _ in range(2000)])  # type: ignore[misc]
    assert (directions[:, 0] == 3).all()
    assert set(directions[:, 1].tolist()) == {3.0, -1.0}
    assert abs((directions[:, 1] == 3).double().mean() - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 2000)


# ---- MoCo, MoDo


def slow_projection(point: Matrix) -> Matrix:
    """The threshold by bisection."""
    low, high = point.min() - 1.0, point.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(point - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(point - (low + high) / 2, 0)


def test_projection_onto_the_simplex() -> None:
    random = np.random.default_rng(0)
    points = [random.normal(size=size) * scale for size in (1, 2, 5, 40) for scale in (0.01, 1.0, 100.0)]
    for point in [*points, np.zeros(3), np.array([1e9, -1e9, 0.0])]:
        assert np.allclose(project_onto_simplex(point), slow_projection(point), atol=1e-12)
    batch = random.normal(size=(4, 6))
    assert np.allclose(project_onto_simplex(batch), [slow_projection(row) for row in batch])
    with pytest.raises(ValueError, match="finite"):
        project_onto_simplex([np.nan, 1.0])


@pytest.mark.parametrize("form", ["normalized", "paper"])
def test_moco_is_its_slow_twin(form: str) -> None:
    tasks = 4
    options = {"beta": 0.6, "beta_decay": 0.5, "gamma": 0.05, "gamma_decay": 0.25, "rho": 0.1}
    method = detente.create("moco", form=form, **options)
    tracked, weights = np.zeros((tasks, 9)), np.full(tasks, 0.25)
    for step in range(1, 9):
        matrix = agreeing(tasks, 9, step)
        rate = 1.0 if form == "normalized" and step == 1 else 0.6 / step**0.5
        tracked += rate * (matrix - tracked)
        products = tracked @ tracked.T
        products = products / (np.trace(products) / tasks if form == "normalized" else 1.0)
        moved = weights - 0.05 / step**0.25 * (products + 0.1 * np.eye(tasks)) @ weights
        weights = slow_projection(moved)
        assert close(combined(method, matrix), weights @ tracked)
        assert np.allclose(method.weights.numpy(), weights)
    assert weights.max() - weights.min() > 0.05


@pytest.mark.parametrize("form", ["normalized", "paper"])
def test_modo_is_its_slow_twin_on_three_batches(form: str) -> None:
    method = detente.create("modo", form=form, gamma=0.02, rho=0.1)
    weights = np.full(3, 1 / 3)
    for step in range(6):
        first, second, third = (agreeing(3, 8, 10 * step + batch) for batch in range(3))
        products = first @ second.T
        if form == "normalized":
            products = products / np.mean(np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1))
        weights = slow_projection(weights - 0.02 * (products @ weights + 0.1 * weights))
        leaves = [torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        extra = [linear_losses(leaves, first), linear_losses(leaves, second)]
        record = detente.backward(linear_losses(leaves, third), method, extra=extra)
        assert record.weights == pytest.approx(weights.tolist(), rel=1e-9) and record.notes == ()
        gradient = np.concatenate([leaf.grad.reshape(-1).numpy() for leaf in leaves])  # type: ignore[union-attr]
        assert close(gradient, weights @ third)


def test_modo_is_torchjd_on_one_matrix_of_products() -> None:
    from torchjd.aggregation import MoDoWeighting

    method, reference = (
        detente.create("modo", form="paper", gamma=0.03, rho=0.2),
        MoDoWeighting(gamma=0.03, rho=0.2),
    )
    for step in range(5):
        matrix = agreeing(4, 6, step)
        outcome = detente.combine(method, torch.from_numpy(matrix))
        assert outcome.weights is not None and "one batch served for all three" in outcome.notes[0]
        expected = reference(torch.from_numpy(matrix @ matrix.T))
        assert np.allclose(outcome.weights.numpy(), expected.numpy(), atol=1e-12)


# ---- bad input


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("pcgrad", {"order": "ascending"}, "order"),
        ("gradvac", {"beta": 1.5}, "beta"),
        ("gradvac", {"group": "block"}, "group"),
        ("graddrop", {"leak": 1.1}, "leak"),
        ("moco", {"beta": 0.0}, "beta"),
        ("moco", {"gamma": -1.0}, "gamma"),
        ("modo", {"rho": -0.1}, "rho"),
    ],
)
def test_options_out_of_range(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        detente.create(name, **options)


def test_a_changed_number_of_parameters_or_groups_is_named() -> None:
    method = detente.create("moco")
    combined(method, conflicting(2, 4, 0))
    with pytest.raises(ValueError, match="4 shared parameters and was given 5"):
        combined(method, conflicting(2, 5, 0))
    method = detente.create("gradvac", group="tensor")
    backward_of(method, [torch.zeros(2), torch.zeros(3)], conflicting(2, 5, 0))
    before = method.targets.clone()
    with pytest.raises(ValueError, match="2 groups and was given 1"):
        backward_of(method, [torch.zeros(5)], conflicting(2, 5, 0))
    assert torch.equal(method.targets, before)
