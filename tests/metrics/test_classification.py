"""Accuracy against counting by hand and against torchmetrics."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_accuracy

from detente.metrics import RunningAccuracy, accuracy, correct


@given(seed=st.integers(0, 2**32), rows=st.integers(1, 60), classes=st.integers(2, 12))
def test_accuracy_equals_counting_and_torchmetrics(seed: int, rows: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator)
    labels = torch.randint(classes, (rows,), generator=generator)
    hits = 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        hits += max(range(classes), key=row.__getitem__) == label
    assert accuracy(logits, labels) == hits / rows
    reference = multiclass_accuracy(logits, labels, num_classes=classes, average="micro")
    assert accuracy(logits, labels) == pytest.approx(float(reference), abs=1e-6)


@given(cuts=st.lists(st.integers(0, 101), max_size=6))
def test_batches_of_any_size_give_the_value_of_the_whole(cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(101, 3, generator=generator), torch.randint(3, (101,), generator=generator)
    running = RunningAccuracy()
    edges = [0, *sorted(cuts), 101]
    for start, stop in itertools.pairwise(edges):
        running.update(logits[start:stop], labels[start:stop])
    assert running.compute() == accuracy(logits, labels)
    assert running.total == 101


def test_rows_with_nan_are_wrong() -> None:
    nan = float("nan")
    logits = torch.tensor([[nan, nan], [nan, 1.0], [1.0, nan], [float("inf"), 0.0]])
    assert correct(logits, torch.tensor([0, 0, 1, 0])).tolist() == [False, False, False, True]
    assert correct(logits, torch.tensor([1, 1, 0, 0])).tolist() == [False, False, False, True]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_every_type_of_whole_numbers(dtype: torch.dtype) -> None:
    assert accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0], dtype=dtype)) == 0.75


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        accuracy(torch.zeros(0, 3), torch.zeros(0).long())
    with pytest.raises(ValueError, match="at least one row"):
        RunningAccuracy().compute()
    with pytest.raises(ValueError, match=r"\(3, 4\) and labels \(4,\)"):
        accuracy(torch.zeros(3, 4), torch.zeros(4).long())
    with pytest.raises(ValueError, match="expected \\[N, C\\]"):
        accuracy(torch.zeros(3), torch.zeros(3).long())
    with pytest.raises(ValueError, match=r"torch\.float32"):
        accuracy(torch.zeros(3, 4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"torch\.bool"):
        accuracy(torch.zeros(3, 4), torch.zeros(3).bool())
