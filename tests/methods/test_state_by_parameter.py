"""State of the size of the parameters goes with the parameters, not with their places."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

import detente


class Net:
    """A trunk and two heads on batches that all runs draw alike."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
        self.heads = nn.ModuleDict({name: nn.Linear(4, 1) for name in "ab"}).double()
        self.draw = torch.Generator().manual_seed(1)

    def losses(self, layers: slice = slice(None)) -> dict[str, torch.Tensor]:
        z = self.trunk[layers](torch.randn(8, 4, generator=self.draw, dtype=torch.float64))
        return {name: (head(z) - 1).square().mean() + 0.1 for name, head in self.heads.items()}


def _remembers(name: str) -> bool:
    """Tell whether a method keeps something for every parameter."""
    method = detente.create(name)
    if "jacobian" in method.declares.needs:
        detente.backward(Net().losses(), method)
    return method.column_layout is not None


REMEMBERING = [name for name in detente.methods() if _remembers(name)]


def test_there_are_such_methods() -> None:
    assert set(REMEMBERING) >= {"db-mtl", "moco", "excess-mtl", "adaptive-mgda"}


@pytest.mark.parametrize("name", REMEMBERING)
def test_another_order_of_the_parameters_changes_nothing(name: str) -> None:
    ends = []
    for orders in ((1, 1, 1, 1), (1, -1, 1, -1)):
        net, method = Net(), detente.create(name)
        for order in orders:
            net.trunk.zero_grad()
            shared: Sequence[torch.Tensor] = list(net.trunk.parameters())[::order]
            detente.backward(net.losses(), method, shared=shared)
        ends.append([parameter.grad.clone() for parameter in net.trunk.parameters()])
    for one, other in zip(*ends, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-15)


def test_the_state_of_a_parameter_is_its_own_when_others_come_and_go() -> None:
    """The running means of DB-MTL that belong to one parameter do not depend on what was shared beside it."""
    means = []
    for beside in (True, False):
        net, method = Net(), detente.create("db-mtl", beta=0.5)
        first, last = net.trunk[0].weight, net.trunk[2].weight
        orders = ([first, last], [last, first], [last], [last, first]) if beside else ([last],) * 4
        for shared in orders:
            detente.backward(net.losses(), method, shared=shared, task_specific=net.heads)
        assert method.means is not None
        means.append(method.means[:, :16].clone())
    assert torch.allclose(*means, rtol=1e-12)


def test_a_loaded_state_goes_on() -> None:
    net, method = Net(), detente.create("moco")
    for _ in range(2):
        detente.backward(net.losses(), method)
    state = method.state_dict()
    assert "column_layout" not in state
    going, loaded = detente.create("moco"), detente.create("moco")
    for one in (going, loaded):
        one.load_state_dict(state)
    gradients = []
    for one in (going, loaded):
        fresh = Net()
        detente.backward(fresh.losses(), one)
        gradients.append([parameter.grad for parameter in fresh.trunk.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
