"""Aligned-MTL against 50-digit arithmetic, TorchJD, and what it promises of itself."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest
import torch

import detente

MODES = ("min", "median", "rmse")


def rows(tasks: int, columns: int, seed: int) -> np.ndarray:
    random = np.random.default_rng([seed, tasks, columns])
    return np.asarray(random.normal(size=(tasks, columns)) * random.uniform(0.3, 3.0, (tasks, 1)))


def outcome(matrix: np.ndarray, **options: Any) -> detente.Combination:
    return detente.combine(detente.create("aligned-mtl", **options), torch.from_numpy(matrix))


def balance_in_50_digits(matrix: np.ndarray, mode: str) -> np.ndarray:
    """B = s V Λ^(-1/2) Vᵀ of a matrix of full rank, every step in 50 digits from the given numbers on."""
    with mpmath.workdps(50):
        exact = mpmath.matrix(matrix.tolist())
        values, vectors = mpmath.eigsy(exact * exact.T)
        values = [values[i] for i in range(len(matrix))]  # ascending
        size = len(values)
        length = {
            "min": mpmath.sqrt(values[0]),
            "median": mpmath.sqrt(values[(size - 1) // 2]),
            "rmse": mpmath.sqrt(mpmath.fsum(values) / size),
        }[mode]
        root = mpmath.diag([length / mpmath.sqrt(value) for value in values])
        return np.array((vectors * root * vectors.T).tolist(), dtype=np.float64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tasks, columns, ratio", [(2, 5, 1.0), (3, 6, 1.0), (4, 9, 1e3), (6, 20, 1e6)])
def test_equals_the_formula_in_50_digits(mode: str, tasks: int, columns: int, ratio: float) -> None:
    for seed in range(3):
        matrix = rows(tasks, columns, seed) * np.geomspace(1, ratio, tasks)[:, None]
        expected = balance_in_50_digits(matrix, mode)
        found = outcome(matrix, scale=mode, rank_tol=0.0)
        assert found.transform is not None and found.weights is not None and found.direction is not None
        size = np.abs(expected).max()
        assert np.abs(found.transform.numpy() - expected).max() <= 1e-9 * size
        weights = expected.mean(axis=1)
        assert np.abs(found.weights.numpy() - weights).max() <= 1e-9 * size
        lengths = np.linalg.norm(matrix, axis=1)
        assert np.abs(found.direction.numpy() - weights @ matrix).max() <= 1e-8 * (np.abs(weights) @ lengths)


@pytest.mark.parametrize("mode", MODES)
def test_equals_torchjd_without_preference(mode: str) -> None:
    torchjd = pytest.importorskip("torchjd.aggregation")
    for tasks, columns in ((2, 5), (3, 8), (4, 6), (5, 10)):
        for seed in range(5):
            matrix = rows(tasks, columns, seed)
            expected = torchjd.AlignedMTL(scale_mode=mode)(torch.from_numpy(matrix))
            found = outcome(matrix, scale=mode).direction
            assert found is not None
            assert torch.allclose(found, expected, rtol=1e-7, atol=1e-9)


def test_preference_is_used_as_given() -> None:
    """B p for the p that is given, as in TorchJD; it is not brought to any sum."""
    torchjd = pytest.importorskip("torchjd.aggregation")
    matrix = rows(3, 6, 0)
    preference = [0.5, 0.3, 0.2]
    found = outcome(matrix, preference=preference)
    assert found.weights is not None and found.transform is not None and found.direction is not None
    by_hand = balance_in_50_digits(matrix, "min") @ preference
    assert found.weights.numpy() == pytest.approx(by_hand, abs=1e-10)
    expected = torchjd.AlignedMTL(pref_vector=torch.tensor(preference, dtype=torch.float64))(
        torch.from_numpy(matrix)
    )
    assert torch.allclose(found.direction, expected, rtol=1e-7, atol=1e-9)
    doubled = outcome(matrix, preference=[1.0, 0.6, 0.4]).weights
    assert doubled is not None and doubled.numpy() == pytest.approx(2 * by_hand, abs=1e-10)


def test_altered_gradients_are_orthogonal_and_of_equal_length() -> None:
    for tasks, columns in ((2, 3), (5, 8), (12, 40)):
        matrix = rows(tasks, columns, 1)
        found = outcome(matrix)
        assert found.transform is not None
        altered = found.transform.numpy() @ matrix
        gramian = altered @ altered.T
        smallest = np.linalg.svd(matrix, compute_uv=False)[-1] ** 2
        assert np.abs(gramian - smallest * np.eye(tasks)).max() <= 1e-8 * smallest
        assert np.linalg.cond(altered) == pytest.approx(1, abs=1e-8)


def test_closed_form_for_two_gradients_of_equal_length() -> None:
    """Eigenvalues at angle φ are 1 ± cos φ, their eigenvectors the sum and the difference, B a function of tan(φ/2)."""
    for angle in np.linspace(0.1, np.pi - 0.1, 9):
        matrix = np.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])
        ratio = np.tan(angle / 2)  # √((1 - cos φ) / (1 + cos φ))
        plus, minus = (ratio, 1.0) if ratio < 1 else (1.0, 1 / ratio)
        expected = np.array([[plus + minus, plus - minus], [plus - minus, plus + minus]]) / 2
        found = outcome(matrix).transform
        assert found is not None and np.abs(found.numpy() - expected).max() <= 1e-12


def test_orthogonal_gradients_are_brought_to_the_shortest_length() -> None:
    found = outcome(np.diag([1.0, 10.0, 1000.0]))
    assert found.direction is not None and found.direction.tolist() == pytest.approx([1 / 3] * 3, rel=1e-12)
    assert found.kept_rank == 3 and found.dropped == ()


def test_a_small_task_is_kept_that_float32_tolerance_drops() -> None:
    matrix = np.array([[3000.0, 0.0], [0.0, 1.0]])
    kept, dropped = outcome(matrix), outcome(matrix, rank_tol="published")
    assert kept.kept_rank == 2 and kept.dropped == ()
    assert dropped.kept_rank == 1 and dropped.dropped == ("1",)
    assert dropped.direction is not None and dropped.direction.tolist() == pytest.approx([1500.0, 0.0])
    number = outcome(matrix, rank_tol=1e-6)
    assert number.kept_rank == 1 and number.dropped == ("1",)
    assert outcome(matrix, rank_tol=1e-8).kept_rank == 2


def test_dropped_names_tasks_that_are_lost_and_no_others() -> None:
    """Identical gradients are represented to the last digit, however low the rank; a vanishing one is not."""
    row = rows(1, 4, 0)
    for count in (2, 3, 5):
        found = outcome(np.repeat(row, count, axis=0))
        assert found.kept_rank == 1 and found.dropped == ()
        assert found.direction is not None and found.direction.numpy() == pytest.approx(row[0], abs=1e-12)
    found = outcome(np.vstack([row, np.zeros((1, 4)), 2 * row]))
    assert found.kept_rank == 1 and found.dropped == ("1",)


def test_nothing_to_align_is_stationary() -> None:
    found = outcome(np.zeros((3, 4)))
    assert found.status == "stationary" and found.kept_rank == 0 and found.dropped == ("0", "1", "2")
    assert found.direction is not None and found.direction.tolist() == [0.0] * 4


@pytest.mark.parametrize("mode, expected", [("min", 1.0), ("median", 2.0), ("rmse", np.sqrt(30 / 4))])
def test_scale_modes_over_the_kept_rank(mode: str, expected: float) -> None:
    """Singular values 1, 2, 3, 4: the lower median is 2; a fifth, dropped one does not count."""
    matrix = np.diag([3.0, 1.0, 4.0, 2.0, 1e-12])
    found = outcome(matrix, scale=mode, rank_tol=1e-20)
    assert found.kept_rank == 4 and found.transform is not None
    altered = np.linalg.norm(found.transform.numpy() @ matrix, axis=1)
    assert altered == pytest.approx([expected] * 4 + [0.0], abs=1e-9)


@pytest.mark.parametrize("value", [-1e-9, 1.0, np.nan, np.inf, "publishd", [1e-6]])
def test_rank_tolerance_out_of_range(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        detente.create("aligned-mtl", rank_tol=value)


def test_absent_tasks_leave_a_preference_of_the_same_sum() -> None:
    """Preference 0.5, 0.3, 0.2 with the second absent: 5/7 and 2/7 of the sum."""
    method = detente.create("aligned-mtl", preference={"a": 0.5, "b": 0.3, "c": 0.2})
    found = detente.combine(method, torch.eye(2), {"a": 1.0, "c": 1.0}).weights
    assert found is not None and found.tolist() == pytest.approx([5 / 7, 2 / 7])
    assert method.tasks == ("a", "c", "b")


def test_the_record_shows_gradients_before_and_after() -> None:
    weight = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    losses = {"a": weight.square().sum(), "b": 30 * weight[0] + weight[1] * weight[2]}
    record = detente.backward(losses, detente.create("aligned-mtl"))
    assert record.raw is not None and record.altered is not None
    assert record.altered.condition_number == pytest.approx(1, abs=1e-6)
    assert record.raw.condition_number > 1.5 and record.kept_rank == 2
