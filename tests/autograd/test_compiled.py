"""Compiled models: as one piece they hide what is shared; a compiled trunk is walked like any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from twins.engine import Spy, assert_grads, expected

import detente


class Net(nn.Module):
    """A trunk and two heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4), nn.Tanh())
        self.left, self.right = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.trunk(x)
        return self.left(z), self.right(z)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(module: nn.Module) -> Callable[..., torch.Tensor]:
    return torch.compile(module, backend="aot_eager")


def losses_of(left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"left": left.square().mean(), "right": right.sin().mean()}


X = torch.linspace(-1, 1, 15).reshape(5, 3)
WEIGHTS = (0.4, 1.7)


def wanted(net: Net) -> list[torch.Tensor | None]:
    return expected(losses_of(*net(X)), net.parameters(), WEIGHTS)


def test_one_piece_is_told_apart_by_its_gradients() -> None:
    net = Net()
    whole = compiled(net)
    detente.backward(losses_of(*whole(X)), Spy(weights=WEIGHTS))
    assert_grads(net.parameters(), wanted(net), rtol=1e-4, atol=1e-6)


def test_one_piece_asks_for_the_shared_parameters_where_no_gradients_tell() -> None:
    net = Net()
    whole = compiled(net)
    method = detente.create("mgda")
    with pytest.raises(ValueError, match=r"compiled or scripted model.*memory='low'.*shared="):
        detente.backward(losses_of(*whole(X)), method, memory="low")
    assert all(parameter.grad is None for parameter in net.parameters())
    for names in (
        {"shared": net.trunk},
        {"task_specific": [net.left, net.right]},
        {"shared": net.trunk, "task_specific": [net.left, net.right]},
    ):
        net.zero_grad()
        detente.backward(losses_of(*whole(X)), Spy(weights=WEIGHTS), **names)
        assert_grads(net.parameters(), wanted(net), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # the compiler looks at z.grad
@pytest.mark.parametrize("heads_too", [False, True])
def test_compiled_parts(heads_too: bool) -> None:
    net = Net()
    trunk = compiled(net.trunk)
    left, right = (compiled(net.left), compiled(net.right)) if heads_too else (net.left, net.right)
    for mode in ("exact", "features", "layer"):
        net.zero_grad()
        z = trunk(X)
        options = {"features": {"features": z}, "layer": {"solve_on": net.trunk[3].weight}}.get(mode, {})
        detente.backward(losses_of(left(z), right(z)), Spy(weights=WEIGHTS), **options)
        assert_grads(net.parameters(), wanted(net), rtol=1e-4, atol=1e-6)


def test_a_trunk_prepared_for_one_backward_says_so() -> None:
    """After one plain backward the compiler reuses the trunk's memory during a backward: it can be walked only once."""
    net = Net()
    trunk = compiled(net.trunk)
    sum(losses_of(net.left(trunk(X)), net.right(trunk(X))).values()).backward()
    for options in ({}, {"solve_on": net.trunk[3].weight}):
        net.zero_grad()
        z = trunk(X)
        with pytest.raises(
            RuntimeError, match=r"several tasks need several.*donated_buffer = False.*features="
        ):
            detente.backward(losses_of(net.left(z), net.right(z)), Spy(), **options)
        assert all(parameter.grad is None for parameter in net.parameters())
    z = trunk(X)
    detente.backward(losses_of(net.left(z), net.right(z)), Spy(weights=WEIGHTS), features=z)
    assert_grads(net.parameters(), wanted(net), rtol=1e-4, atol=1e-6)
