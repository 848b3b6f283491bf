"""Methods that learn from losses and gradients together, against TorchJD and the published formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import detente

STEPS = 50


def weights_of(method: detente.Method, losses: object, jacobian: torch.Tensor) -> torch.Tensor:
    """The weights of one step."""
    weights = detente.combine(method, jacobian, losses).weights  # type: ignore[arg-type]
    assert weights is not None
    return weights


def falling(seed: int, tasks: int = 4, steps: int = STEPS) -> list[torch.Tensor]:
    """Positive losses of unequal size that fall at unequal speed, with noise."""
    random = np.random.default_rng(seed)
    sizes, speeds = 10 ** random.uniform(-2, 2, tasks), random.uniform(0.0, 0.1, tasks)
    noise = np.exp(random.normal(size=(steps, tasks)) * 0.1)
    return list(torch.from_numpy(sizes * np.exp(-np.arange(steps)[:, None] * speeds) * noise))


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0)


def noisy(seed: int, steps: int = 12, tasks: int = 3, columns: int = 7) -> list[torch.Tensor]:
    random = np.random.default_rng(seed)
    lengths = np.array([0.1, 1.0, 20.0])[:tasks, None]
    return [torch.from_numpy(random.normal(size=(tasks, columns)) * lengths) for _ in range(steps)]


@pytest.mark.parametrize("lr", [0.01, 1.0])
def test_excess_mtl_equals_torchjd(lr: float) -> None:
    """TorchJD adds 1e-7 to squared gradients and to the first excess: negligible at this scale, 1e4."""
    from torchjd.aggregation import ExcessMTLWeighting

    reference = ExcessMTLWeighting(robust_step_size=lr, n_warmup_steps=1)
    method = detente.create("excess-mtl", lr=lr)
    for jacobian in noisy(1):
        expected = 3 * reference(1e4 * jacobian)
        close(weights_of(method, [1.0] * 3, 1e4 * jacobian), expected, 1e-9)


def test_excess_mtl_counts_entries_and_tasks_without_gradient_as_zero() -> None:
    method = detente.create("excess-mtl", lr=1.0)
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert torch.allclose(
        weights_of(method, [1.0, 1.0], rows), 2 * torch.tensor([1.0, 0.0]).double().softmax(0)
    )


@pytest.mark.parametrize(("beta", "sigma"), [(0.9, 0.0), (0.9, 0.5), (0.0, 0.0)])
def test_db_mtl_equals_its_formula(beta: float, sigma: float) -> None:
    method = detente.create("db-mtl", beta=beta, sigma=sigma)
    means = [torch.zeros(7).double() for _ in range(3)]
    for k, (jacobian, losses) in enumerate(zip(noisy(2), falling(9, tasks=3), strict=False), start=1):
        b = beta / k**sigma
        means = [b * m + (1 - b) * g / loss for m, g, loss in zip(means, jacobian, losses, strict=True)]
        longest = max(m.norm() for m in means)
        expected = sum((m * (longest / m.norm()) for m in means), torch.zeros(7).double())
        combination = detente.combine(method, jacobian, losses)
        assert combination.direction is not None and combination.weights is None
        torch.testing.assert_close(combination.direction, expected, rtol=1e-12, atol=1e-12)


def test_db_mtl_is_stationary_where_every_gradient_vanishes() -> None:
    combination = detente.combine("db-mtl", torch.zeros(2, 3), [1.0, 1.0])
    assert combination.status == "stationary" and combination.direction is not None
    assert not combination.direction.any()


@pytest.mark.parametrize("name", ["excess-mtl", "db-mtl"])
def test_another_number_of_shared_parameters_is_refused(name: str) -> None:
    method = detente.create(name)
    detente.combine(method, torch.eye(2, 3), [1.0, 1.0])
    before = {key: buffer.clone() for key, buffer in method.named_buffers()}
    with pytest.raises(ValueError, match="3 shared parameters and was given 4"):
        detente.combine(method, torch.eye(2, 4), [1.0, 1.0])
    assert all(torch.equal(buffer, before[key]) for key, buffer in method.named_buffers())


@pytest.mark.parametrize("name", ["excess-mtl", "db-mtl"])
def test_gradients_of_features_are_refused_by_name(name: str) -> None:
    weight = torch.ones(2, requires_grad=True)
    features = weight * 2
    with pytest.raises(ValueError, match="features"):
        detente.backward([features.sum(), features.square().sum()], detente.create(name), features=features)


def test_gradients_out_of_the_range_of_their_dtype_are_named() -> None:
    with pytest.raises(ValueError, match="'1'"):
        detente.combine("db-mtl", torch.eye(2) * 1e30, [1.0, 1e-30])


def test_weightings_that_take_gradients_weigh_the_heads_too() -> None:
    heads = {name: detente.methods()[name].heads for name in ("gradnorm", "excess-mtl", "db-mtl", "famo")}
    assert heads == {"gradnorm": "weighted", "excess-mtl": "weighted", "db-mtl": "own", "famo": "weighted"}


# ---- both halves of IMTL


def test_imtl_gives_the_scaled_gradients_equal_projections() -> None:
    """The published closed form of the gradients' half, on gradients scaled by the losses' half."""
    method, scales = detente.create("imtl", lr=0.1), detente.create("imtl-l", lr=0.1)
    for jacobian, losses in zip(noisy(4, steps=30), falling(10, tasks=3, steps=30), strict=True):
        scaled = weights_of(scales, losses, jacobian)[:, None] * jacobian
        unit = scaled / scaled.norm(dim=1, keepdim=True)
        differences, turned = scaled[:1] - scaled[1:], unit[:1] - unit[1:]
        rest = scaled[0] @ turned.T @ torch.linalg.inv(differences @ turned.T)
        alpha = torch.cat([1 - rest.sum(keepdim=True, dim=0), rest])
        combination = detente.combine(method, jacobian, losses)
        assert combination.direction is not None and combination.status == "ok"
        torch.testing.assert_close(combination.direction, alpha @ scaled, rtol=1e-9, atol=1e-9)


def test_imtl_learns_its_scales_also_where_it_is_stationary() -> None:
    method = detente.create("imtl")
    gradients = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    combination = detente.combine(method, gradients, [1.0, 3.0])
    assert combination.status == "stationary" and combination.direction is not None
    assert not combination.direction.any() and float(method.log_scale[1]) < 0
