"""Gradients are copied to their rows the moment they are whole: what is held, and what may stand in the way."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from twins.engine import Spy

import detente
from detente.autograd.layout import finite, probes

MODES = ("fast", "low")


@pytest.fixture(autouse=True)
def _all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detente.autograd.jacobian._LARGE", 1)


def step(losses: Any, memory: str, **options: Any) -> tuple[detente.StepRecord, Spy]:
    spy = Spy(weights=[1.0 + task for task in range(len(losses))])
    if memory == "low":  # it keeps no gradients to look at
        spy.declares = replace(spy.declares, needs=frozenset({"gramian"}))
    return detente.backward(losses, spy, memory=memory, **options), spy


def expected(losses: list[torch.Tensor], parameters: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows, and their weighted sum."""
    rows = []
    for loss in losses:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        rows.append(torch.cat([g.to_dense().reshape(-1) for g in whole]))
    matrix = torch.stack(rows)
    return matrix, torch.arange(1.0, len(rows) + 1).to(matrix) @ matrix


def assert_step(
    losses: list[torch.Tensor], parameters: list[torch.Tensor], memory: str, **options: Any
) -> None:
    matrix, direction = expected(losses, parameters)
    _, spy = step(losses, memory, **options)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters]
    torch.testing.assert_close(torch.cat([g.reshape(-1) for g in grads]), direction)
    assert spy.seen is not None and spy.seen.gramian is not None
    torch.testing.assert_close(torch.from_numpy(spy.seen.gramian).to(matrix), matrix @ matrix.T)
    for parameter in parameters:
        assert not parameter._backward_hooks, "a hook of ours is left"


def layers(count: int = 4, width: int = 5) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count))).double()


@pytest.mark.parametrize("memory", MODES)
def test_no_backward_holds_its_gradients(memory: str) -> None:
    """When the first layer's gradient comes, those of the layers behind it are gone."""
    trunk, alive = layers(), []
    refs: list[weakref.ref[torch.Tensor]] = []

    def note(gradient: torch.Tensor) -> None:
        alive.append(sum(ref() is not None for ref in refs))
        refs.append(weakref.ref(gradient))

    for parameter in trunk.parameters():
        parameter.register_hook(note)
    z = trunk(torch.ones(200, 5, dtype=torch.float64))  # wide enough for a single segment
    losses = [z.sum(), z.square().sum()]
    step(losses, memory)
    backwards = 3 if memory == "low" else 2
    assert len(alive) == 8 * backwards
    assert max(alive[:16]) <= 1, alive


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("large", [20, 100])
def test_some_are_handed_over_and_others_left(
    monkeypatch: pytest.MonkeyPatch, memory: str, large: int
) -> None:
    monkeypatch.setattr("detente.autograd.jacobian._LARGE", large)
    trunk, frozen = layers(3), nn.Parameter(torch.ones(5, dtype=torch.float64), requires_grad=False)
    z = trunk(torch.ones(2, 5, dtype=torch.float64)) * frozen
    losses = [z.sum(), z.square().sum()]
    assert_step(losses, list(trunk.parameters()), memory, shared=[frozen, trunk])


@pytest.mark.parametrize("memory", MODES)
def test_hooks_of_the_caller_come_first(memory: str) -> None:
    trunk, seen = layers(2), []
    doubled, watched = trunk[0].weight, trunk[1].weight
    doubled.register_hook(lambda gradient: 2 * gradient)
    watched.register_hook(lambda gradient: seen.append(gradient.clone()))
    z = trunk(torch.ones(2, 5, dtype=torch.float64))
    losses = [z.sum(), z.square().sum()]
    _, direction = expected(losses, list(trunk.parameters()))
    plain = torch.autograd.grad(losses[0], watched, retain_graph=True)[0]
    seen.clear()
    step(losses, memory)
    grads = torch.cat([p.grad.reshape(-1) for p in trunk.parameters()])
    torch.testing.assert_close(grads, direction)
    assert len(seen) == (3 if memory == "low" else 2)
    torch.testing.assert_close(seen[0], plain)


class Inner(torch.autograd.Function):
    """A layer that is run again in its backward, as reversible and implicit networks do, on the same parameter."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.leaf = leaf
        return (x @ weight.detach()).tanh()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            again = (x @ ctx.leaf).tanh()
        found = torch.autograd.grad(again, [x, ctx.leaf], gradient)
        return *found, None


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("rows", [2, 200])
def test_a_backward_inside_an_operation_meets_the_same_leaf(memory: str, rows: int) -> None:
    trunk = layers(2)
    weight = nn.Parameter(torch.randn(5, 5, dtype=torch.float64))
    hidden = Inner.apply(trunk[0](torch.ones(rows, 5, dtype=torch.float64)), weight, weight)
    z = trunk[1](hidden) @ weight
    assert_step([z.sum(), z.square().mean()], [weight, *trunk.parameters()], memory, shared=[weight, trunk])


@pytest.mark.parametrize("large", [1, 1000])
def test_a_leaf_that_several_segments_feed(monkeypatch: pytest.MonkeyPatch, large: int) -> None:
    monkeypatch.setattr("detente.autograd.jacobian._LARGE", large)
    monkeypatch.setattr(
        "detente.autograd.segments._cuts", lambda spans, waiting, allowed: (0.0, list(range(len(waiting))))
    )
    trunk = layers(2)
    z = trunk[0](trunk(trunk[0](torch.ones(2, 5, dtype=torch.float64))).tanh())
    assert_step([z.sum(), z.square().sum()], list(trunk.parameters()), "low")


@pytest.mark.parametrize("memory", MODES)
def test_sparse_gradients(memory: str) -> None:
    table = nn.Embedding(6, 3, sparse=True).double()
    scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
    z = table(torch.tensor([1, 1, 4])) * scale
    assert_step([z.sum(), z.square().sum()], [table.weight, scale], memory)


@pytest.mark.parametrize("memory", MODES)
def test_a_loss_that_is_a_parameter(memory: str) -> None:
    weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    other = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    assert_step([weight, weight * other, other * 2], [weight, other], memory)


def test_a_leaf_that_a_task_does_not_reach_has_a_row_of_zeros() -> None:
    """Also where the memory of the row held something else before."""
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    spy = Spy(weights=[1.0, 1.0])
    for losses in ([a.sum() + 5 * b.sum(), a.sum() + b.sum()], [a.sum(), a.sum() + b.sum()]):
        detente.backward(losses, spy)
    assert spy.seen is not None and spy.seen.jacobian is not None
    assert spy.seen.jacobian.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("memory", MODES)
def test_no_hook_stays_behind_an_error(memory: str) -> None:
    trunk = layers(2)
    z = trunk(torch.ones(2, 5, dtype=torch.float64))

    def broken(gradient: torch.Tensor) -> None:
        raise RuntimeError("from inside")

    handle = trunk[0].weight.register_hook(broken)
    with pytest.raises(RuntimeError, match="from inside"):
        step([z.sum(), z.square().sum()], memory)
    handle.remove()
    assert all(not parameter._backward_hooks for parameter in trunk.parameters())
    assert all(parameter.grad is None for parameter in trunk.parameters())


@pytest.mark.parametrize("entries", [8, 1 << 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probes_never_miss_and_never_accuse(entries: int, dtype: torch.dtype) -> None:
    """Small tensors by their norm, large ones by their sum: huge entries overflow there, and are looked at again."""
    huge = torch.full((entries,), torch.finfo(dtype).max, dtype=dtype)
    tiny = torch.full((entries,), torch.finfo(dtype).tiny, dtype=dtype)
    given = [huge, -huge, tiny, torch.zeros(entries, dtype=dtype)]
    for bad in (torch.nan, torch.inf, -torch.inf):
        given.append(tiny.clone())
        given[-1][entries // 2] = bad
    told = torch.stack([probe.double() for probe in probes(given)]).numpy()
    assert finite(given, told).tolist() == [True] * 4 + [False] * 3
