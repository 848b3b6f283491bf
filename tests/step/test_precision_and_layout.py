"""Autocast, compiled parts, channels_last and inputs of every task's own, in every space and mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from twins.engine import Spy, assert_grads, expected

import detente

TASKS = ("a", "b", "c")
WEIGHTS = (0.4, 1.7, 0.9)
SPACES = ("exact", "batched", "low", "layer", "features", "accumulate")


class Told(Spy):
    """Weights as told, from inner products alone, so that every mode serves it."""

    declares = detente.Declaration(name="told", source="a test", needs=frozenset({"gramian"}))


class Convolutional(nn.Module):
    """A trunk of convolutions and three heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.trunk = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.GELU(), nn.Conv2d(6, 4, 3, stride=2), nn.Tanh()
        )
        self.heads = nn.ModuleDict({task: nn.Conv2d(4, 1 + place, 2) for place, task in enumerate(TASKS)})


def losses_of(
    trunk: Callable[..., torch.Tensor], heads: Mapping[str, Callable[..., torch.Tensor]], x: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    z = trunk(x)
    outputs = {task: heads[task](z) for task in TASKS}
    if z.dtype == torch.bfloat16:
        outputs = {task: output.float() for task, output in outputs.items()}
    return z, {task: (outputs[task] - place).square().mean() for place, task in enumerate(TASKS)}


def take(space: str, losses: Any, z: Any, layer: Any, **more: Any) -> tuple[Told, detente.StepRecord]:
    """One step in a space; micro-batches are two times the same, which gives the same mean."""
    method = Told(weights=WEIGHTS)
    if space == "accumulate":
        with detente.accumulate(method, 2):
            for _ in range(2):
                record = detente.backward(losses, method, retain_graph=True, **more)
        return method, record
    options = {
        "batched": {"memory": "batched"},
        "low": {"memory": "low"},
        "layer": {"solve_on": layer},
        "features": {"features": z},
    }
    return method, detente.backward(losses, method, retain_graph=True, **options.get(space, {}), **more)


def gramian_of(losses: Mapping[str, torch.Tensor], tensors: Any) -> torch.Tensor:
    rows = []
    for loss in losses.values():
        found = torch.autograd.grad(loss, list(tensors), retain_graph=True)
        rows.append(torch.cat([gradient.double().reshape(-1) for gradient in found]))
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.T


def where(space: str, network: Any, z: Any) -> list[torch.Tensor]:
    if space == "features":
        return [z]
    return list(network.trunk[2].parameters() if space == "layer" else network.trunk.parameters())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("space", SPACES)
def test_autocast_in_bfloat16(space: str, scaled: bool) -> None:
    """Beside autograd on the same graph: what half precision rounds away, both round away."""
    network = Convolutional()
    x = torch.randn(4, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        z, losses = losses_of(network.trunk, network.heads, x)
    assert z.dtype == torch.bfloat16
    want = expected(losses, network.parameters(), WEIGHTS)
    more: dict[str, Any] = {"scaler": torch.amp.GradScaler("cpu", init_scale=64.0)} if scaled else {}
    method, record = take(space, losses, z, network.trunk[2], **more)
    assert record.accepted and method.seen is not None
    gramian = gramian_of(losses, where(space, network, z))
    torch.testing.assert_close(torch.from_numpy(method.seen.gramian), gramian, rtol=0.05, atol=1e-4)
    factor = 64.0 if scaled else 1.0
    for parameter, wanted in zip(network.parameters(), want, strict=True):
        assert parameter.grad is not None and wanted is not None and parameter.grad.dtype == torch.float32
        difference = (parameter.grad / factor - wanted).norm() / wanted.norm()
        assert difference < 0.03, difference


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("space", SPACES)
def test_channels_last(space: str, scaled: bool) -> None:
    """The same numbers as in the usual order, and a .grad in the shape of its parameter."""
    x = torch.randn(4, 2, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    network = Convolutional().double()
    _, losses = losses_of(network.trunk, network.heads, x)
    want = expected(losses, network.parameters(), WEIGHTS)
    network = network.to(memory_format=torch.channels_last)
    z, losses = losses_of(network.trunk, network.heads, x.to(memory_format=torch.channels_last))
    assert z.is_contiguous(memory_format=torch.channels_last)
    more: dict[str, Any] = {"scaler": torch.amp.GradScaler("cpu", init_scale=64.0)} if scaled else {}
    method, _ = take(space, losses, z, network.trunk[2], **more)
    factor = 64.0 if scaled else 1.0
    assert_grads(network.parameters(), [factor * wanted for wanted in want if wanted is not None])
    assert method.seen is not None
    gramian = gramian_of(losses, where(space, network, z))
    torch.testing.assert_close(torch.from_numpy(method.seen.gramian), gramian)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("space", "scaled"),
    [("exact", True), ("low", False), ("low", True), ("accumulate", False), ("accumulate", True)],
)
def test_compiled_trunk_and_heads(space: str, scaled: bool, fresh_compiler: None) -> None:
    network = Convolutional()
    x = torch.randn(4, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    trunk = torch.compile(network.trunk, backend="aot_eager")
    heads = {task: torch.compile(head, backend="aot_eager") for task, head in network.heads.items()}
    _, plain = losses_of(network.trunk, network.heads, x)
    want = expected(plain, network.parameters(), WEIGHTS)
    z, losses = losses_of(trunk, heads, x)
    more: dict[str, Any] = {"scaler": torch.amp.GradScaler("cpu", init_scale=64.0)} if scaled else {}
    _, record = take(space, losses, z, network.trunk[2], **more)
    factor = 64.0 if scaled else 1.0
    assert record.accepted
    assert_grads(network.parameters(), [factor * wanted for wanted in want], rtol=1e-4, atol=1e-4 * factor)


class OwnInputs(nn.Module):
    """Every task has a batch of its own, of another size, which passes the same trunk."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.trunk = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(4, 1 + place) for place, task in enumerate(TASKS)})
        self.double()

    def forward(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        draw = torch.Generator().manual_seed(1)
        batches = {
            task: torch.randn(2 + 3 * place, 3, generator=draw, dtype=torch.float64)
            for place, task in enumerate(TASKS)
        }
        z = {task: self.trunk(x) for task, x in batches.items()}
        return z, {task: (self.heads[task](z[task]) - 1).square().mean() for task in TASKS}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("space", [*SPACES, "weighting"])
def test_every_task_has_a_batch_of_its_own(space: str, scaled: bool) -> None:
    network = OwnInputs()
    z, losses = network()
    more: dict[str, Any] = {"scaler": torch.amp.GradScaler("cpu", init_scale=64.0)} if scaled else {}
    factor = 64.0 if scaled else 1.0
    if space == "weighting":
        want = expected(losses, network.parameters(), (1, 1, 1), heads="weighted")
        detente.backward(losses, detente.create("uniform"), **more)
    else:
        want = expected(losses, network.parameters(), WEIGHTS)
        method, _ = take(space, losses, z, network.trunk[2], **more)
        assert method.seen is not None
        if space == "features":  # of other examples each: the gradients are orthogonal
            squares = [
                torch.autograd.grad(loss, z[task], retain_graph=True)[0].square().sum()
                for task, loss in losses.items()
            ]
            gramian = torch.diag(torch.stack(squares))
        else:
            gramian = gramian_of(losses, where(space, network, z))
        torch.testing.assert_close(torch.from_numpy(method.seen.gramian), gramian)
    assert_grads(network.parameters(), [factor * wanted for wanted in want])
