"""The record of a step where the altered gradients cancel to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import detente
from detente.diagnostics.conflict import measure_altered, measure_conflict


@pytest.mark.parametrize("name", ["upgrad", "pcgrad", "gradvac", "aligned-mtl"])
@pytest.mark.parametrize("seed", range(3))
def test_descent_to_the_pareto_set_never_ends_in_an_error(name: str, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    hessians, centres = some(3, 6).abs() * 3 + 0.2, some(3, 6)
    theta = torch.nn.Parameter(some(6) * 3)
    method, optimizer = detente.create(name), torch.optim.SGD([theta], lr=0.2)
    for _ in range(100):
        record = detente.backward(
            [(h * (theta - c).square()).sum() / 2 for h, c in zip(hessians, centres, strict=True)],
            method,
            shared=[theta],
        )
        if record.accepted:
            optimizer.step()
        optimizer.zero_grad()
        assert record.altered is None or np.isfinite(record.altered.norms).all()


def test_the_altered_gradients_by_their_vectors() -> None:
    random = np.random.default_rng(0)
    vectors, transform = random.normal(size=(3, 8)), random.normal(size=(3, 3))
    made = measure_altered(vectors @ vectors.T, transform)
    altered = transform @ vectors
    wanted = measure_conflict(altered @ altered.T)
    assert made.norms == pytest.approx(wanted.norms, rel=1e-12)
    assert np.array(made.cosines) == pytest.approx(np.array(wanted.cosines), rel=1e-9)


def test_a_small_altered_gradient_that_is_no_rounding_stays() -> None:
    gramian = np.diag([1.0, 1e-20])
    made = measure_altered(gramian, np.array([[1.0, 0.0], [0.0, 1.0]]))
    assert made.norms == pytest.approx((1.0, 1e-10))
