"""Under ``torch.autocast`` only the forward computes in half precision: a step inside it is the step outside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import detente
from detente.optim import MAO, Contributions, MTAdam

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
KINDS: dict[str, Callable[..., Any]] = {
    "mao": MAO,
    "mao-paper": lambda *a, **k: MAO(*a, bias_correction="paper", **k),
    "mao-sgd": lambda *a, **k: MAO(*a, variant="sgd", lr=1e-4, **k),
    "mtadam": MTAdam,
    **{
        f"mao-{name}": lambda *a, _name=name, **k: MAO(*a, transform=detente.create(_name), **k)
        for name in ("pcgrad", "aligned-mtl", "gradvac", "upgrad")
    },
}


def network() -> nn.ModuleDict:
    torch.manual_seed(3)
    return nn.ModuleDict(
        {
            "trunk": nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 8)),
            "a": nn.Linear(8, 2),
            "b": nn.Linear(8, 1),
        }
    )


def losses(model: nn.ModuleDict, step: int) -> dict[str, torch.Tensor]:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
    z = model["trunk"](x)
    return {
        "a": (model["a"](z).float() - x[:, :2]).square().mean(),
        "b": (model["b"](z).float() + 1).square().mean(),
    }


@contextmanager
def half(dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast("cpu", dtype):
        yield


def trained(
    kind: Callable[..., Any], dtype: torch.dtype, *, enclosed: bool
) -> tuple[list[torch.Tensor], Any, list[Any]]:
    model = network()
    optimizer = kind(model["trunk"], [model["a"], model["b"]])
    records = []
    with half(dtype) if enclosed else nullcontext():
        for step in range(4):
            with half(dtype):
                found = losses(model, step)
            record = optimizer.step(found, measure=True)
            records.append((record.losses, record.status, record.raw, optimizer.balance))
    return [parameter.detach() for parameter in model.parameters()], optimizer.state_dict(), records


@DTYPES
@pytest.mark.parametrize("name", KINDS)
def test_a_loop_inside_autocast_is_the_loop_outside(name: str, dtype: torch.dtype) -> None:
    inside, state, records = trained(KINDS[name], dtype, enclosed=True)
    outside, its_state, its_records = trained(KINDS[name], dtype, enclosed=False)
    start = list(network().parameters())
    assert (
        max(float((one - old).detach().abs().max()) for one, old in zip(outside, start, strict=True)) > 1e-3
    )
    assert all(torch.equal(one, other) for one, other in zip(inside, outside, strict=True))
    assert records == its_records
    for position, kept in state["state"].items():
        theirs = its_state["state"][position]
        for moments, other in [(kept, theirs)] if "step" in kept else [(kept[t], theirs[t]) for t in kept]:
            assert moments["exp_avg_sq"].dtype == torch.float32
            assert torch.equal(moments["exp_avg_sq"], other["exp_avg_sq"])


@DTYPES
def test_contributions_are_measured_alike(dtype: torch.dtype) -> None:
    def measured(enclosed: bool) -> Any:
        model, found = network(), []
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        contributions, method = Contributions(optimizer, model["trunk"]), detente.create("uniform")
        for step in range(3):
            with half(dtype):
                given = losses(model, step)
            taken = detente.task_gradients(given, shared=model["trunk"])
            combination = method.combine(taken.gradients)
            detente.apply(taken, combination)
            optimizer.step()
            optimizer.zero_grad()
            with half(dtype) if enclosed else nullcontext():
                found.append(contributions.measure(taken, combination.weights))
        return found

    assert measured(True) == measured(False)


@pytest.mark.parametrize("kind", [MAO, MTAdam], ids=["mao", "mtadam"])
def test_a_forward_in_float16_that_overflows_is_refused_by_name(kind: Callable[..., Any]) -> None:
    model = network()
    optimizer = kind(model["trunk"], [model["a"], model["b"]])
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with half(torch.float16):
        z = model["trunk"](torch.ones(2, 6)).half() * 6e4
        with pytest.raises(ValueError, match="the loss of task 'b' is not finite"):
            optimizer.step({"a": model["a"](z / 6e4).float().square().mean(), "b": (z * 10).sum()})
    assert not optimizer.state
    assert all(torch.equal(one, old) for one, old in zip(model.parameters(), before, strict=True))
