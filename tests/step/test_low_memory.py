"""memory="low": the same step without T rows of all parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import detente

GRADIENTS_WANTED = {"jacobian", "blocks", "activations"}
FITTING = [
    name
    for name, info in sorted(detente.methods().items())
    if "exact" in info.spaces and not info.needs & GRADIENTS_WANTED and info.batches == 1
]


class Network(nn.Module):
    """Convolutions, batch norm, a residual connection, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.twice, self.out = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)
        self.heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(3))
        self.double()

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        first = self.norm(self.stem(x)).relu()
        second = first + self.twice(first).tanh()
        third = second + self.twice(second).tanh()
        z = self.out(third.mean(dim=(2, 3)))
        return [(head(z) - place).square().mean() for place, head in enumerate(self.heads)]


def step(network: Network, method: Any, seed: int, **options: Any) -> detente.StepRecord:
    x = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return detente.backward(network(x), method, **options)


@pytest.mark.parametrize("scale", ["native", "sum"])
@pytest.mark.parametrize("name", FITTING)
def test_every_method_that_gives_weights(name: str, scale: Any) -> None:
    networks, methods = [Network(), Network()], [detente.create(name) for _ in range(2)]
    for seed in range(2):
        fast, low = (
            step(network, method, seed, memory=memory, scale=scale, measure=True)
            for network, method, memory in zip(networks, methods, ("fast", "low"), strict=True)
        )
        assert low.losses == fast.losses and low.status == fast.status
        assert low.notes == (
            *fast.notes,
            "memory='low': task gradients were taken in 3 segments and not kept",
        )
        assert low.raw is not None and fast.raw is not None
        assert low.raw.norms == pytest.approx(fast.raw.norms, rel=1e-12)
        for one, other in zip(*(network.parameters() for network in networks), strict=True):
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None:
                torch.testing.assert_close(other.grad, one.grad, rtol=1e-9, atol=1e-13)
            one.grad = other.grad = None


def test_one_segment_is_called_one() -> None:
    trunk = nn.Linear(3, 2)
    z = trunk(torch.ones(4, 3))
    record = detente.backward([z[:, 0].sum(), z[:, 1].sum()], detente.create("mgda"), memory="low")
    assert record.notes == ("memory='low': task gradients were taken in 1 segment and not kept",)


def test_under_a_scaler() -> None:
    plain, scaled = Network(), Network()
    step(plain, detente.create("aligned-mtl"), 0)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    step(scaled, detente.create("aligned-mtl"), 0, memory="low", scaler=scaler, scale="native")
    for one, other in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(256.0 * one.grad, other.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("graddrop", {}, "graddrop looks at more than the Gramian"),
        ("moco", {}, "moco looks at more than the Gramian (jacobian)"),
    ],
)
def test_what_needs_the_gradients_is_refused(name: str, options: dict[str, Any], said: str) -> None:
    network = Network()
    with pytest.raises(ValueError, match="memory='low' does not go with this step") as raised:
        step(network, detente.create(name), 0, memory="low", **options)
    assert said in str(raised.value)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_accumulation_and_task_gradients_are_refused() -> None:
    network, method = Network(), detente.create("mgda")
    with detente.accumulate(method, 1):
        with pytest.raises(ValueError, match="accumulate\\(\\) keeps a sum"):
            step(network, method, 0, memory="low")
        step(network, method, 0)
    with pytest.raises(ValueError, match="keeps no task gradients"):
        detente.task_gradients(network(torch.ones(1, 2, 5, 5, dtype=torch.float64)), memory="low")


def test_the_graph_is_freed_unless_it_is_retained() -> None:
    network = Network()
    x = torch.ones(4, 2, 5, 5, dtype=torch.float64)
    losses = network(x)
    detente.backward(losses, detente.create("mgda"), memory="low", retain_graph=True)
    detente.backward(losses, detente.create("mgda"), memory="low")
    with pytest.raises(RuntimeError, match="second time"):
        losses[0].backward()


def test_what_is_held_at_once() -> None:
    """Ten equal layers and five tasks: rows of one or two layers, and not of ten."""
    tasks, width = 5, 64
    trunk = nn.Sequential(*(nn.Linear(width, width) for _ in range(10)))
    heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(tasks))
    held = {}
    for memory in ("fast", "low"):
        method = detente.create("mgda")
        losses = [head(trunk(torch.ones(2, width))).square().mean() for head in heads]
        detente.backward(losses, method, memory=memory)
        held[memory] = method.__dict__["workspace"]._buffer.numel()
    layer = width * width + width
    assert held["fast"] == tasks * 10 * layer
    assert held["low"] <= tasks * 2 * layer
