"""The pure step of Adam against torch's optimizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detente.geometry.adam import adam_step
from detente.geometry.softmax import softmax


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sixty_steps_equal_torch(weight_decay: float) -> None:
    random = np.random.default_rng(0)
    start = random.normal(size=4)
    parameter = torch.from_numpy(start.copy()).requires_grad_()
    optimizer = torch.optim.Adam([parameter], lr=0.03, weight_decay=weight_decay)
    values, moments = start, np.zeros((4, 3))
    for _ in range(60):
        gradient = random.normal(size=4) * [1.0, 1e-3, 1e3, 0.0]
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        before = values.copy(), moments.copy()
        following = adam_step(values, moments, gradient, lr=0.03, weight_decay=weight_decay)
        assert np.array_equal(values, before[0]) and np.array_equal(moments, before[1])
        values, moments = following
        np.testing.assert_allclose(values, parameter.detach().numpy(), rtol=0, atol=1e-13)


def test_every_entry_counts_its_own_steps() -> None:
    values, moments = adam_step(np.zeros(2), np.zeros((2, 3)), np.array([1.0, 2.0]), lr=0.1)
    alone, its = adam_step(values[:1], moments[:1], np.array([3.0]), lr=0.1)
    both, _ = adam_step(values, moments, np.array([3.0, 5.0]), lr=0.1)
    assert alone[0] == both[0] and its[0, 2] == 2


def test_softmax_of_any_size() -> None:
    logits = np.array([[0.0, 1.0, -2.0], [1e300, 1e300, -1e300]])
    expected = torch.softmax(torch.from_numpy(logits), dim=1).numpy()
    np.testing.assert_allclose(softmax(logits), expected, rtol=1e-15)
