"""Norms, cosines, magnitude similarity and ratios: direct formulas on the gradients, and the degenerate cases."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detente.diagnostics import conflict
from detente.geometry.gramian import unit_rows, validated

MEASURES = (
    conflict.mean_magnitude_similarity,
    conflict.minimal_magnitude_similarity,
    conflict.minimal_cosine,
    conflict.norm_ratio,
)


@given(
    tasks=st.integers(2, 6),
    seed=st.integers(0, 10**6),
    exponent=st.integers(-12, 12),
    spread=st.sampled_from([0.0, 1.0, 6.0]),
)
def test_equal_the_definitions_on_the_gradients(tasks: int, seed: int, exponent: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    gradients = rng.standard_normal((tasks, 7)) * 10.0 ** rng.uniform(-spread, 0, (tasks, 1)) * 10.0**exponent
    gramian = gradients @ gradients.T
    lengths = [math.hypot(*g) for g in gradients.tolist()]
    np.testing.assert_allclose(conflict.norms(gramian), lengths, rtol=1e-13)
    cosines, similarities = [], []
    for i, j in itertools.combinations(range(tasks), 2):
        a, b = lengths[i], lengths[j]
        cosines.append(sum(gradients[i] / a * (gradients[j] / b)))
        similarities.append(2 * (a / b) / ((a / b) ** 2 + 1))
        assert conflict.cosines(gramian)[i, j] == pytest.approx(cosines[-1], abs=1e-13)
        assert conflict.cosines(gramian)[j, i] == conflict.cosines(gramian)[i, j]
        assert conflict.magnitude_similarity(gramian)[j, i] == pytest.approx(similarities[-1], rel=1e-12)
    assert conflict.minimal_cosine(gramian) == pytest.approx(min(cosines), abs=1e-13)
    assert conflict.mean_magnitude_similarity(gramian) == pytest.approx(np.mean(similarities), rel=1e-12)
    assert conflict.minimal_magnitude_similarity(gramian) == pytest.approx(min(similarities), rel=1e-12)
    assert conflict.norm_ratio(gramian) == pytest.approx(max(lengths) / min(lengths), rel=1e-12)


def test_by_hand() -> None:
    # Norms 1, 3, 2; angles 90°, 120° and 60°.
    gramian = np.array([[1.0, 0.0, -1.0], [0.0, 9.0, 3.0], [-1.0, 3.0, 4.0]])
    assert conflict.norms(gramian).tolist() == [1, 3, 2]
    np.testing.assert_allclose(conflict.cosines(gramian), [[1, 0, -0.5], [0, 1, 0.5], [-0.5, 0.5, 1]])
    expected = [[1, 6 / 10, 4 / 5], [6 / 10, 1, 12 / 13], [4 / 5, 12 / 13, 1]]
    np.testing.assert_allclose(conflict.magnitude_similarity(gramian), expected)
    assert conflict.mean_magnitude_similarity(gramian) == pytest.approx((6 / 10 + 4 / 5 + 12 / 13) / 3)
    assert conflict.minimal_magnitude_similarity(gramian) == pytest.approx(6 / 10)
    assert conflict.minimal_cosine(gramian) == -0.5
    assert conflict.norm_ratio(gramian) == 3


def test_parallel_gradients_never_leave_the_range_of_a_cosine() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        direction = rng.standard_normal(11)
        gradients = np.outer(rng.uniform(-3, 3, 4), direction)
        cosines = conflict.cosines(gradients @ gradients.T)
        assert np.abs(cosines).max() <= 1
        np.testing.assert_array_equal(np.diagonal(cosines), 1)


def test_zero_gradients() -> None:
    gramian = np.diag([4.0, 0.0, 0.0])
    assert conflict.cosines(gramian).tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert conflict.magnitude_similarity(gramian).tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    assert conflict.mean_magnitude_similarity(gramian) == pytest.approx(1 / 3)
    assert conflict.minimal_cosine(gramian) == 0
    assert conflict.norm_ratio(gramian) == math.inf
    nothing = np.zeros((2, 2))
    assert conflict.cosines(nothing).tolist() == [[0, 0], [0, 0]]
    assert conflict.mean_magnitude_similarity(nothing) == 1
    assert conflict.norm_ratio(nothing) == 1


def test_single_task_is_in_no_conflict() -> None:
    assert [measure([[4.0]]) for measure in MEASURES] == [1, 1, 1, 1]
    assert conflict.norm_ratio([[0.0]]) == 1


def test_batches_of_matrices() -> None:
    rng = np.random.default_rng(3)
    gradients = rng.standard_normal((2, 5, 3, 9))
    gradients[1, 2, 0] = 0
    stack = gradients @ np.swapaxes(gradients, -1, -2)
    for function in (conflict.norms, conflict.cosines, conflict.magnitude_similarity):
        looped = np.array([[function(gramian) for gramian in row] for row in stack])
        np.testing.assert_array_equal(function(stack), looped)


@pytest.mark.parametrize("measure", MEASURES)
def test_one_number_is_of_one_gramian(measure: Callable[[object], float]) -> None:
    with pytest.raises(ValueError, match="one Gramian"):
        measure(np.stack([np.eye(2)] * 3))
    with pytest.raises(ValueError, match="inf"):
        measure([[math.inf, 0.0], [0.0, 1.0]])


# ------------------------------------------------------------------------------------------ scaling of rows


@pytest.mark.parametrize("scale", [1e-300, 1e-24, 1.0, 1e24, 1e300])
def test_unit_rows_at_any_scale(scale: float) -> None:
    norms, cosines = unit_rows(np.array([[4.0, 3.0], [3.0, 9.0]]) * scale)
    np.testing.assert_allclose(norms, np.array([2.0, 3.0]) * math.sqrt(scale), rtol=1e-14)
    np.testing.assert_allclose(cosines, [[1.0, 0.5], [0.5, 1.0]], rtol=1e-14)


def test_unit_rows_keep_a_zero_row_and_its_underflow() -> None:
    norms, cosines = unit_rows(np.array([[0.0, 1e-170], [1e-170, 1.0]]))
    assert norms.tolist() == [0, 1]
    assert cosines.tolist() == [[0, 0], [0, 1]]


def test_unit_rows_mend_rounding_in_the_symmetry() -> None:
    _, cosines = unit_rows(np.array([[4.0, 3.0 + 1e-12], [3.0, 9.0]]))
    assert cosines[0, 1] == cosines[1, 0] == pytest.approx(0.5, abs=1e-12)


def test_validated_names_the_entry_of_a_batch() -> None:
    stack = np.stack([np.eye(2)] * 3)
    stack[2, 1, 0] = np.nan
    with pytest.raises(ValueError, match=r"entry \[2, 1, 0\] is nan.*loss"):
        validated(stack)
    with pytest.raises(ValueError, match=r"entry \[1, 1\] is -1\.0.*not a Gramian"):
        unit_rows(np.stack([np.eye(2), np.diag([1.0, -1.0])]))
