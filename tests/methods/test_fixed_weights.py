"""Uniform and static weights against numbers worked out by hand and `sum(losses).backward()`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import detente


def test_uniform_is_the_sum_or_the_mean() -> None:
    jacobian = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0], [-1.0, 0.0, 1.0]])
    summed, mean = (
        detente.combine(detente.create("uniform", reduce=reduce), jacobian) for reduce in ("sum", "mean")
    )
    assert summed.direction is not None and summed.direction.tolist() == [10.0, 22.0, 34.0]
    assert summed.weights is not None and summed.weights.tolist() == [1.0, 1.0, 1.0]
    assert mean.direction is not None and mean.direction.tolist() == pytest.approx([10 / 3, 22 / 3, 34 / 3])


def test_uniform_does_what_a_summed_backward_does() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    theirs = copy.deepcopy(ours)
    inputs = torch.randn(6, 4)
    detente.backward([column.square().mean() for column in ours(inputs).T], detente.create("uniform"))
    sum(column.square().mean() for column in theirs(inputs).T).backward()  # type: ignore[union-attr]
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        assert torch.allclose(mine.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_static_by_hand() -> None:
    jacobian = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    outcome = detente.combine(detente.create("static", weights=[2.0, 0.5, 0.0]), jacobian)
    assert outcome.direction is not None and outcome.direction.tolist() == [2.0, 0.5]
    assert outcome.weights is not None and outcome.weights.tolist() == [2.0, 0.5, 0.0]
    ones = detente.combine("static", jacobian).direction
    assert ones is not None and ones.tolist() == [6.0, 6.0]


def test_static_by_name_keeps_its_numbers_when_tasks_are_absent() -> None:
    method = detente.create("static", weights={"seg": 3.0, "depth": 1.0, "edges": 0.5})
    for names, expected in (
        (("depth", "seg"), [1.0, 3.0]),
        (("edges",), [0.5]),
        (("seg", "edges", "depth"), [3.0, 0.5, 1.0]),
    ):
        outcome = detente.combine(method, torch.eye(len(names)), dict.fromkeys(names, 1.0))
        assert outcome.weights is not None and outcome.weights.tolist() == expected


@pytest.mark.parametrize(
    "weights, message",
    [
        ([1.0, -1.0], "weights of task '1' is -1.0"),
        ([0.0, 0.0], "weights is zero for every task"),
        ({"seg": float("nan")}, "weights of task 'seg' is nan"),
    ],
)
def test_static_names_what_is_wrong_with_its_weights(weights: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detente.create("static", weights=weights)
    with pytest.raises(ValueError, match="2 values for 3 tasks"):
        detente.combine(detente.create("static", weights=[1.0, 1.0]), torch.eye(3))


def test_the_weights_are_copied() -> None:
    mine = [1.0, 2.0]
    method = detente.create("static", weights=mine)
    mine[0] = 100.0
    outcome = detente.combine(method, torch.eye(2)).weights
    assert outcome is not None and outcome.tolist() == [1.0, 2.0]
