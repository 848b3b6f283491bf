"""Learned scales that grow without end are named early; losses that only dip below zero are not refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

import detente

LEARN_A_SCALE = [
    name
    for name in detente.methods()
    if {"log_scale", "log_variance"} & {*dir(detente.create(name, tasks=2))}
]
MESSAGE = r"learned scale of task 'b' has grown to e\^\d+\. It grows without end where a loss stays at or below zero"


def run(
    method: detente.Method, loss_of: Callable[[int], float], steps: int
) -> tuple[int, float, ValueError | None]:
    """Steps taken, the largest weight on the way, and the refusal of the step after them."""
    jacobian, largest = torch.tensor([[1.0, 0.2, 0.0], [0.1, 1.0, 0.3]]), 0.0
    for step in range(steps):
        state = copy.deepcopy(method.state_dict())
        try:
            weights = detente.combine(method, jacobian, {"a": 1.0, "b": loss_of(step)}).weights
        except ValueError as error:
            for key, value in method.state_dict().items():
                assert (
                    torch.equal(value, state[key]) if isinstance(value, torch.Tensor) else value == state[key]
                )
            return step, largest, error
        assert weights is not None
        largest = max(largest, float(weights.abs().max()))
    return steps, largest, None


def test_three_methods_learn_a_scale() -> None:
    assert sorted(LEARN_A_SCALE) == ["imtl", "imtl-l", "uncertainty"]


@pytest.mark.parametrize("lr", [0.005, 0.025, 0.1])
@pytest.mark.parametrize("loss", [-1e-3, -0.5, -1.0, -500.0])
@pytest.mark.parametrize("name", LEARN_A_SCALE)
def test_a_loss_that_stays_negative_is_named_early(name: str, loss: float, lr: float) -> None:
    room = 100 * max(1.0, 1 / abs(loss))
    steps, largest, error = run(detente.create(name, lr=lr), lambda _: loss, 20_000)
    assert error is not None and steps <= math.log(room) / lr + 20
    assert steps >= math.log(10) / lr / 3  # not after the first negative losses
    assert largest <= 10 * room
    with pytest.raises(ValueError, match=MESSAGE):
        raise error


@pytest.mark.parametrize("form", ["regression", "classification"])
@pytest.mark.parametrize("init", [-3.0, 0.0, 3.0])
def test_uncertainty_counts_from_its_start(form: str, init: float) -> None:
    method = detente.create("uncertainty", form=form, init=init)
    steps, largest, error = run(method, lambda _: -1.0, 2000)
    assert error is not None and "task 'b'" in str(error)
    assert 50 < steps < (math.log(100) + 3) / 0.025 + 20 and largest < 1e4


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("name", LEARN_A_SCALE)
def test_positive_losses_are_never_refused(name: str, scale: float) -> None:
    random = np.random.default_rng(3)
    losses = scale * np.exp(random.normal(size=3000) - np.arange(3000) / 300)
    assert run(detente.create(name, lr=0.1), lambda step: float(losses[step]), 3000)[2] is None


@pytest.mark.parametrize("name", LEARN_A_SCALE)
def test_losses_that_dip_below_zero_are_not_refused(name: str) -> None:
    random = np.random.default_rng(4)
    noise = random.normal(size=2000)
    series: list[Callable[[int], float]] = [
        lambda step: -1.0 if step % 100 < 30 else 1.0,  # every now and then
        lambda step: -500.0 if step < 20 else 1.0,  # at first, in large units
        lambda step: -1000.0 if step == 700 else 1.0,  # once, far off
        lambda step: 0.2 + float(noise[step]),  # noise around a small mean
        lambda step: 1e-3 * (0.2 + float(noise[step])),
        lambda step: -1.0 if step < 80 else 0.01,
    ]
    for loss_of in series:
        assert run(detente.create(name), loss_of, 2000)[2] is None


def test_a_small_noise_at_the_start_is_no_growth() -> None:
    method = detente.create("uncertainty", init=-6.0)  # a weight of 200
    assert run(method, lambda step: -1.0 if step < 20 else 1.0, 500)[2] is None


@pytest.mark.parametrize("name", LEARN_A_SCALE)
def test_a_loss_that_has_turned_positive_is_not_refused(name: str) -> None:
    steps, _, error = run(detente.create(name), lambda _: -500.0, 1000)
    assert error is not None  # one step earlier than this the loss turns
    assert run(detente.create(name), lambda step: -500.0 if step < steps else 500.0, steps + 300)[2] is None


@pytest.mark.parametrize("name", sorted(detente.methods()))
def test_weights_of_other_methods_stay_bounded_where_a_loss_is_negative(name: str) -> None:
    """Every method refuses the task by name within a few steps, or its weights stay where they are."""
    random = np.random.default_rng(5)
    method, jacobian = detente.create(name), torch.from_numpy(random.normal(size=(2, 5)))
    largest = 0.0
    for step in range(1000):
        losses = {"a": 1.0, "b": -0.5 - 0.1 * math.sin(step)}
        try:
            result = detente.combine(method, jacobian, losses)
        except ValueError:
            with pytest.raises(ValueError, match=r"task 'b'.* loss"):
                detente.combine(method, jacobian, losses)
            break
        if result.weights is not None:
            largest = max(largest, float(result.weights.abs().max()))
    assert largest < 1000
