"""Gradient scalers: unscaled losses in, scaled ``.grad`` out, unscaled gradients for the method."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import detente

TASKS = ("a", "b")
FACTOR = 1024.0


class Network(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(3, 1 + place) for place, task in enumerate(TASKS)})
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        z = self.trunk(x)
        return z, {task: head(z) for task, head in self.heads.items()}


def losses_of(network: Network, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).to(next(network.parameters()))
    z, outputs = network(x)
    return z, {
        task: (output - 3.0 * place).square().mean() for place, (task, output) in enumerate(outputs.items())
    }


def where(network: Network, space: str, z: torch.Tensor) -> dict[str, Any]:
    if space == "features":
        return {"features": z}
    return {"solve_on": network.trunk[2]} if space == "layer" else {}


CASES = [
    (name, space)
    for name, info in sorted(detente.methods().items())
    for space in (sorted(info.spaces) if info.takes_gradients else ["none"])
]


@pytest.mark.parametrize(("name", "space"), CASES)
def test_the_gradients_are_multiplied_and_the_method_sees_them_as_they_are(name: str, space: str) -> None:
    networks, methods = [Network(), Network()], [detente.create(name, tasks=TASKS) for _ in range(2)]
    scaler = torch.amp.GradScaler("cpu", init_scale=FACTOR)
    info = detente.methods()[name]
    further = info.batches - 1
    for step in range(2):
        records = []
        for network, method, more in zip(networks, methods, ({}, {"scaler": scaler}), strict=True):
            z, losses = losses_of(network, step)
            extra = [losses_of(network, 10 + k)[1] for k in range(0 if space == "features" else further)]
            records.append(detente.backward(losses, method, extra=extra, **where(network, space, z), **more))
        plain, scaled = records
        assert (plain.losses, plain.weights, plain.status) == (scaled.losses, scaled.weights, scaled.status)
        assert plain.raw == scaled.raw
        for one, other in zip(*(network.parameters() for network in networks), strict=True):
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None:
                torch.testing.assert_close(FACTOR * one.grad, other.grad, rtol=1e-12, atol=0)
            one.grad = other.grad = None
    for key, value in methods[0].state_dict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(
                value, methods[1].state_dict()[key], rtol=1e-12, atol=0, equal_nan=True
            )


class Overflow(torch.autograd.Function):
    """The value unchanged, the gradient infinite."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")


@pytest.mark.parametrize(
    ("name", "space", "place"),
    [
        ("moco", "exact", "shared"),
        ("famo", "none", "shared"),
        ("gradnorm", "exact", "own"),
        ("gradnorm", "features", "behind"),
        ("gradnorm", "layer", "behind"),
    ],
)
def test_an_overflow_is_left_to_the_scaler(name: str, space: str, place: str) -> None:
    network, method = Network(), detente.create(name, tasks=TASKS)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=FACTOR)
    for overflows in (False, True, False):
        before = copy.deepcopy((network.state_dict(), method.state_dict()))
        x = torch.randn(5, 4, dtype=torch.float64)
        first = network.trunk[1](network.trunk[0](x))
        z = network.trunk[3](
            network.trunk[2](Overflow.apply(first) if overflows and place == "behind" else first)
        )
        z = Overflow.apply(z) if overflows and place == "shared" else z
        outputs = {task: head(z) for task, head in network.heads.items()}
        losses = {task: output.square().mean() for task, output in outputs.items()}
        if overflows and place == "own":
            losses["b"] = losses["b"] + 0 * Overflow.apply(network.heads["b"].bias).sum()
        record = detente.backward(losses, method, scaler=scaler, **where(network, space, z))
        assert record.accepted and record.losses == pytest.approx([loss.item() for loss in losses.values()])
        scaler.step(optimizer)
        scaler.update()
        after = (network.state_dict(), method.state_dict())
        same = [torch.equal(value, after[0][key]) for key, value in before[0].items()]
        assert all(same) if overflows else not any(same)
        if overflows:
            assert "scaler skips this step" in record.notes[0] and "task" in record.notes[0]
            assert str(before[1]) == str(after[1])
            assert all(parameter.grad.isnan().all() for parameter in network.parameters())
            assert scaler.get_scale() == FACTOR / 2
        optimizer.zero_grad()


def test_without_a_scaler_an_overflow_is_an_error_and_a_loss_always_is() -> None:
    network = Network()
    for scaler in (None, torch.amp.GradScaler("cpu", enabled=False)):
        _, outputs = network(torch.ones(5, 4, dtype=torch.float64))
        losses = {task: Overflow.apply(output).square().mean() for task, output in outputs.items()}
        with pytest.raises(ValueError, match="task 'a' is not finite"):
            detente.backward(losses, detente.create("mgda"), scaler=scaler)
    _, losses = losses_of(network)
    losses["b"] = losses["b"] * float("nan")
    with pytest.raises(ValueError, match="the loss of task 'b' is not finite"):
        detente.backward(losses, detente.create("mgda"), scaler=torch.amp.GradScaler("cpu"))
    assert all(parameter.grad is None for parameter in network.parameters())
    with pytest.raises(TypeError, match="scaler is a float"):
        detente.backward(losses_of(network)[1], detente.create("mgda"), scaler=2.0)


def test_half_precision_keeps_small_gradients_as_torch_does() -> None:
    """Under float16 autocast, beside the loop of torch's own documentation, with clipping in between."""
    ends = []
    for ours in (False, True):
        network = Network(torch.float32)
        optimizer = torch.optim.SGD(network.parameters(), lr=1e5)
        scaler, method = torch.amp.GradScaler("cpu", init_scale=2.0**14), detente.create("uniform")
        start = copy.deepcopy(network.state_dict())
        for step in range(3):
            with torch.autocast("cpu", torch.float16):
                x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
                _, outputs = network(x)
                losses = {task: 1e-7 * output.float().square().mean() for task, output in outputs.items()}
            if ours:
                detente.backward(losses, method, scaler=scaler, measure=True)
            else:
                scaler.scale(sum(losses.values())).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1e-7)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append(network.state_dict())
    for key, value in ends[0].items():
        moved = (value - start[key]).norm()
        assert moved > 0, key
        assert (value - ends[1][key]).norm() <= 2e-2 * moved, (
            key
        )  # half precision rounds each task's gradient
