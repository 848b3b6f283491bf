"""How often each part of a graph is walked, when it is let go, and what is copied to the host."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from twins.engine import Spy, Weighting

import detente
import detente.autograd.numbers
import detente.step

TASKS = ("a", "b", "c")


class _Counted(torch.autograd.Function):
    """The identity, which counts its backwards and holds a tensor until the graph is freed."""

    generate_vmap_rule = False

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, name: str, walks: Counter[str], held: dict[str, Any]
    ) -> torch.Tensor:
        ctx.name, ctx.walks = name, walks
        inside = x.detach().clone()
        ctx.save_for_backward(inside)
        held[name] = weakref.ref(inside)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        assert ctx.saved_tensors[0].shape == gradient.shape
        ctx.walks[ctx.name] += 1
        return gradient, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> None:
        raise NotImplementedError("only backwards are vectorised here")


class Model(nn.Module):
    """A trunk of two layers and three heads; every part counts its backwards."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 4)
        self.heads = nn.ModuleDict({name: nn.Linear(4, 1) for name in TASKS})
        self.walks: Counter[str] = Counter()
        self.held: dict[str, Any] = {}

    def count(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return _Counted.apply(x, name, self.walks, self.held)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        z = self.last(self.count(self.first(x).tanh(), "trunk")).tanh()
        return z, {
            name: self.count(head(self.count(z, f"into {name}")), name).square().mean()
            for name, head in self.heads.items()
        }


HEADS = dict.fromkeys(TASKS, 1) | {f"into {name}": 1 for name in TASKS}
TWICE = dict.fromkeys(HEADS, 2)


@pytest.mark.parametrize(
    ("mode", "want"),
    [
        ("exact", HEADS | {"trunk": 3}),
        ("features", HEADS | {"trunk": 1}),
        ("layer", TWICE | {"trunk": 1}),
        ("weighting", HEADS | {"trunk": 1}),
    ],
)
def test_walks_of_every_part(mode: str, want: dict[str, int]) -> None:
    model = Model()
    z, losses = model(torch.randn(5, 3))
    options = {"features": {"features": z}, "layer": {"solve_on": model.last.weight}}.get(mode, {})
    method = Weighting(weights=(1, 2, 3)) if mode == "weighting" else Spy(weights=(1, 2, 3))
    detente.backward(losses, method, **options)
    assert model.walks == want


def test_own_heads_of_a_weighting_cost_a_second_walk_of_the_heads_alone() -> None:
    model = Model()
    _, losses = model(torch.randn(5, 3))
    detente.backward(losses, Weighting(weights=(1, 2, 3)), heads="own")
    assert model.walks["trunk"] == 1
    assert model.walks["a"] == 2 and model.walks["into a"] == 1


@pytest.mark.parametrize("mode", ["exact", "features", "layer", "weighting"])
def test_the_graph_is_let_go_with_the_last_task(mode: str) -> None:
    for retain in (False, True):
        model = Model()
        z, losses = model(torch.randn(5, 3))
        options = {"features": {"features": z}, "layer": {"solve_on": model.last.weight}}.get(mode, {})
        method = Weighting(weights=(1, 2, 3)) if mode == "weighting" else Spy()
        detente.backward(losses, method, retain_graph=retain, **options)
        alive = {name for name, reference in model.held.items() if reference() is not None}
        if retain:
            assert alive == set(model.held)
            detente.backward(losses, method, **options)
        else:
            # One call of autograd can only free what it walks: in the exact mode the other heads wait for their losses.
            assert alive <= ({"a", "b", "into a", "into b"} if mode == "exact" else set())
            with pytest.raises(RuntimeError, match="second time"):
                losses["c"].backward()


def test_heads_are_let_go_one_by_one_on_features() -> None:
    """The peak of a step on features is one head's graph, not all of them."""
    model = Model()
    z, losses = model(torch.randn(5, 3))
    seen: list[set[str]] = []

    def look(gradient: torch.Tensor) -> None:
        seen.append({name for name in TASKS if model.held[name]() is not None})

    z.register_hook(look)
    detente.backward(losses, Spy(), features=z)
    assert seen == [{"b", "c"}, {"c"}, set(), set()]


def test_the_buffer_is_used_again_and_never_handed_out() -> None:
    model, places = Model(), []

    def first_row(jacobian: torch.Tensor) -> torch.Tensor:
        places.append((jacobian.data_ptr(), tuple(jacobian.shape)))
        return jacobian[0]  # a view of the engine's memory

    spy = Spy(direction=first_row)
    detente.backward(model(torch.randn(5, 3))[1], spy)
    kept = model.first.weight.grad
    assert kept is not None
    before = kept.clone()
    model.zero_grad(set_to_none=True)
    _, losses = model(torch.randn(5, 3))
    detente.backward({name: losses[name] for name in ("c", "a")}, spy)
    assert torch.equal(kept, before), "the gradients of the first step changed with the second"
    assert [shape[0] for _, shape in places] == [3, 2]
    assert len({place for place, _ in places}) == 1


def test_a_jacobian_taken_by_hand_is_the_callers() -> None:
    model = Model()
    taken = [detente.step.task_gradients(model(torch.full((5, 3), k))[1]) for k in (1.0, 2.0)]
    first, second = (one.gradients.jacobian for one in taken if one is not None)
    assert first is not None and second is not None
    assert first.data_ptr() != second.data_ptr() and not torch.equal(first, second)


class _Scalars(TorchDispatchMode):
    """Counts numbers that leave the device one by one."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "mode", "copies"),
    [
        ("mgda", "exact", 1),
        ("aligned-mtl", "exact", 1),
        ("mgda", "features", 2),  # the second sees what is behind the features
        ("mgda", "layer", 2),
        ("uniform", "exact", 1),
        ("static", "exact", 1),
    ],
)
def test_one_copy_to_the_host(monkeypatch: pytest.MonkeyPatch, name: str, mode: str, copies: int) -> None:
    model, calls = Model(), Counter()
    original = detente.autograd.numbers.to_host

    def counted(tensors: Any) -> Any:
        calls["to_host"] += 1
        return original(tensors)

    for name_of_module, module in list(sys.modules.items()):
        if name_of_module.startswith("detente.") and getattr(module, "to_host", None) is original:
            monkeypatch.setattr(module, "to_host", counted)
    for slow in ("cpu", "item", "__float__", "__bool__", "__int__"):
        function = getattr(torch.Tensor, slow)

        def called(self: torch.Tensor, *args: Any, slow: str = slow, function: Any = function) -> Any:
            calls[slow] += 1
            return function(self, *args)

        monkeypatch.setattr(torch.Tensor, slow, called)
    z, losses = model(torch.randn(5, 3))
    options = {"features": {"features": z}, "layer": {"solve_on": model.last.weight}}.get(mode, {})
    method = detente.create(name)
    with _Scalars() as scalars:
        detente.backward(losses, method, **options)
    assert calls == {"to_host": copies, "cpu": copies}
    assert scalars.count == 0
    model.zero_grad()
