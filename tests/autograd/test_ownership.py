"""Who owns what, on networks so small that every gradient is written down by hand."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from twins.small import DOUBLE, FORMS, PICKED, ByNumber, Two, grad, number, refused_or

import detente

# ---- losses picked from one tensor


@pytest.mark.parametrize("memory", ["fast", "batched"])
@pytest.mark.parametrize("form", FORMS)
def test_picked_losses_have_heads_of_their_own(form: str, memory: Any) -> None:
    """Gradients 4 and -2 on one shared number: the least norm is 0 at weights 1/3 and 2/3."""
    if memory == "batched" and form in ("function", "sink"):
        return  # functions without a rule for vmap are refused there
    net = Two(c=2.0)
    record = detente.backward(FORMS[form](net.losses()), detente.create("mgda"), memory=memory)
    assert record.weights == pytest.approx((1 / 3, 2 / 3), rel=1e-12) and record.status == "stationary"
    assert [grad(net.w), grad(net.a), grad(net.b)] == pytest.approx([0.0, 2.0, -2.0], abs=1e-12)
    assert record.gradient_norms == pytest.approx((4.0, 2.0)) and record.dropped == ()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name, weights, shared",
    [
        ("mgda", (0.0, 1.0), 2.0),  # 4 and 2 point the same way: the shorter one
        ("pcgrad", (1.0, 1.0), 6.0),
        ("imtl-g", (-1.0, 2.0), 0.0),  # equal projections on one line: 0 lies in the affine hull
        ("aligned-mtl", None, None),
    ],
)
def test_values_on_one_shared_number(form: str, name: str, weights: Any, shared: float | None) -> None:
    net = Two(c=0.0)
    record = detente.backward(FORMS[form](net.losses()), detente.create(name))
    assert [grad(net.a), grad(net.b)] == [2.0, 2.0]
    if weights is None:
        right = detente.combine(name, torch.tensor([[4.0], [2.0]], dtype=DOUBLE))
        weights, shared = right.weights.tolist(), right.direction.item()
    assert record.weights == pytest.approx(weights, abs=1e-12) and grad(net.w) == pytest.approx(shared)


@pytest.mark.parametrize("form", PICKED)
@pytest.mark.parametrize("mode", ["features", "low"])
def test_where_gradients_are_not_taken_it_asks_for_names_or_agrees(form: str, mode: str) -> None:
    net = Two(c=0.0)
    z = net.w * 1.0
    options = {"features": {"features": z}, "low": {"memory": "low"}}[mode]
    record = refused_or(lambda: detente.backward(FORMS[form](net.losses(z)), ByNumber(), **options))
    if isinstance(record, str):
        assert "shared=" in record
        assert all(parameter.grad is None for parameter in net.parameters())
    else:
        assert record.weights == (2.0, 3.0)
        assert [grad(net.w), grad(net.a), grad(net.b)] == [14.0, 2.0, 2.0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["fast", "batched", "low", "both named"])
def test_names_always_help(form: str, mode: str) -> None:
    if mode == "batched" and form in ("function", "sink"):
        return
    net = Two(c=0.0)
    options: dict[str, Any] = {"shared": [net.w]}
    options |= {"task_specific": [net.a, net.b]} if mode == "both named" else {"memory": mode}
    record = detente.backward(FORMS[form](net.losses()), ByNumber(), **options)
    assert record.weights == (2.0, 3.0)
    assert [grad(net.w), grad(net.a), grad(net.b)] == [14.0, 2.0, 2.0]


@pytest.mark.parametrize("form", FORMS)
def test_a_weighting_needs_no_owners(form: str) -> None:
    net = Two(c=0.0)
    record = detente.backward(FORMS[form](net.losses()), detente.create("static", weights=[2, 3]))
    assert record.weights == (2.0, 3.0)
    assert [grad(net.w), grad(net.a), grad(net.b)] == [14.0, 4.0, 6.0]


# ---- scripted, compiled, and data-parallel models


class Model(nn.Module):
    """A trunk (4 and 2 are the gradients of its one number) and two heads, on inputs of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.a, self.b = number(1.0), number(2.0), number(1.0)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.w * x
        return (self.a * z - 1).square(), (self.b * z).square()


@pytest.mark.parametrize("inside", [False, True])
def test_a_scripted_model_is_the_same_before_and_after_its_warm_up(inside: bool) -> None:
    net, x = Model(), torch.ones(3, dtype=DOUBLE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        script = torch.jit.script(net)
    method = detente.create("mgda") if inside else ByNumber()
    for _ in range(4):
        net.zero_grad()
        a, b = script(x)
        record = detente.backward([a.mean(), b.mean()], method)
        assert record.weights == pytest.approx((0.0, 1.0) if inside else (2.0, 3.0), abs=1e-12)
        assert [grad(net.w), grad(net.a), grad(net.b)] == pytest.approx([2.0 if inside else 14.0, 2.0, 2.0])


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("what", ["model", "losses"])
@pytest.mark.parametrize("named", [False, True])
def test_a_compiled_model_agrees_or_asks_for_names(what: str, named: bool) -> None:
    net, x = Model(), torch.ones(3, dtype=DOUBLE)

    def computed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = net(x)
        return a.mean(), b.mean()

    losses: Any
    if what == "model":
        losses = [one.mean() for one in torch.compile(net, backend="aot_eager")(x)]
    else:
        losses = torch.compile(computed, backend="aot_eager")(x)
    names = {"shared": [net.w]} if named else {}
    record = refused_or(lambda: detente.backward(losses, ByNumber(), **names))
    if isinstance(record, str):
        assert not named and "shared=" in record
        assert all(parameter.grad is None for parameter in net.parameters())
    else:
        assert record.weights == (2.0, 3.0)
        assert [grad(net.w), grad(net.a), grad(net.b)] == pytest.approx([14.0, 2.0, 2.0])


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_outputs_of_a_data_parallel_model(options: dict[str, bool]) -> None:
    net, x = Model(), torch.ones(3, dtype=DOUBLE)
    parallel = nn.parallel.DistributedDataParallel(net, **options)
    a, b = parallel(x)
    record = detente.backward([a.mean(), b.mean()], ByNumber())
    assert record.weights == (2.0, 3.0)
    assert [grad(net.w), grad(net.a), grad(net.b)] == pytest.approx([14.0, 2.0, 2.0])


# ---- leaves that are no parameters


class Field(nn.Module):
    """u(x) = w x² + v at w = 1, v = 0: u' = 2 w x, u'' = 2 w."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = number(1.0), number(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w * x.square() + self.v


def _physics(net: Field, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """At x = 1, gradients by (w, v): (2 w - 1)²: (4, 0); (2 w + w + v - 1)²: (12, 4); (w + v - 2)²: (-2, -2)."""
    u = net(x)
    first = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), x, create_graph=True)[0]
    data = net(torch.ones(2, dtype=DOUBLE))
    return {
        "continuity": (first - 1).square().mean(),
        "momentum": (second + u - 1).square().mean(),
        "data": (data - 2).square().mean(),
    }


@pytest.mark.parametrize("form", ["apart", "stack", "list", "masked"])
@pytest.mark.parametrize("memory", ["fast", "batched", "low"])
def test_two_physics_losses_and_a_data_loss(form: str, memory: Any) -> None:
    """The least norm lies between (12, 4) and (-2, -2), at 24/29: (12, -28) / 29."""
    net, x = Field(), torch.ones(2, dtype=DOUBLE, requires_grad=True)
    made = _physics(net, x)
    losses = dict(zip(made, FORMS[form](list(made.values())), strict=True))
    names = {"shared": net} if memory == "low" and form != "apart" else {}
    record = detente.backward(losses, detente.create("mgda"), memory=memory, **names)
    assert record.weights == pytest.approx((0.0, 5 / 29, 24 / 29), abs=1e-12)
    assert [grad(net.w), grad(net.v)] == pytest.approx([12 / 29, -28 / 29])
    # (2 w x - 1)² has 4 and (2 w + w x² + v - 1)² has 8 at each of the two points, of which the mean is taken.
    assert grad(x) == pytest.approx([6.0, 6.0])
    assert any("leaf" in note or "leaves" in note for note in record.notes)


def test_a_parameter_in_the_input_is_a_parameter() -> None:
    net, x = Field(), nn.Parameter(torch.ones(1, dtype=DOUBLE))
    losses = list(_physics(net, x).values())[:2]
    record = detente.backward(losses, ByNumber())
    # v is the second loss's own.
    assert [grad(net.w), grad(net.v), grad(x)] == [2 * 4.0 + 3 * 12, 4.0, [2 * 4.0 + 3 * 8]]
    assert not any("leaf" in note or "leaves" in note for note in record.notes)


def _forces(w: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """E = w x³ and F = -3 w x² at w = x = 1: E² has (2, 6) by (w, x), (F + 1)² has (12, 24)."""
    energy = w * x**3
    force = -torch.autograd.grad(energy, x, create_graph=True)[0]
    return {"energy": energy.square(), "force": (force + 1).square()}


@pytest.mark.parametrize("form", ["apart", "stack", "list", "masked"])
def test_forces(form: str) -> None:
    for named, wanted, where in ((False, 2.0, 30.0), (True, 2.0, 6.0)):
        w, x = number(1.0), torch.tensor(1.0, dtype=DOUBLE, requires_grad=True)
        made = _forces(w, x)
        losses = dict(zip(made, FORMS[form](list(made.values())), strict=True))
        names = {"shared": [w, x]} if named else {}
        record = detente.backward(losses, detente.create("mgda"), **names)
        assert record.weights == pytest.approx((1.0, 0.0)) and grad(w) == pytest.approx(wanted)
        assert grad(x) == pytest.approx(where)
        assert record.gradient_norms == pytest.approx((40**0.5, 720**0.5) if named else (2.0, 12.0))
        assert any("leaf" in note or "leaves" in note for note in record.notes) == (not named)


@pytest.mark.parametrize("form", FORMS)
def test_the_batch_is_shared_where_no_parameter_is(form: str) -> None:
    """An attack on two models: x = 1 has the gradients 4 and -2, as the trunk's number has above."""
    net, x = Two(c=2.0), torch.tensor(1.0, dtype=DOUBLE, requires_grad=True)
    record = detente.backward(FORMS[form](net.losses(x)), detente.create("mgda"))
    assert record.weights == pytest.approx((1 / 3, 2 / 3)) and record.space == "exact"
    assert [grad(x), grad(net.a), grad(net.b)] == pytest.approx([0.0, 2.0, -2.0], abs=1e-12)
    assert net.w.grad is None and not any("leaf" in note or "leaves" in note for note in record.notes)


def test_a_leaf_of_one_task_is_no_news() -> None:
    net, x = Two(c=2.0), torch.tensor(1.0, dtype=DOUBLE, requires_grad=True)
    a, b = net.losses()
    record = detente.backward([a + x.square(), b], detente.create("mgda"))
    assert record.weights == pytest.approx((1 / 3, 2 / 3)) and grad(x) == 2.0


def test_a_critic_is_frozen_or_the_generator_is_named() -> None:
    """-c g has (-2, -1) by (g, c) at g = 1, c = 2, and (c g² - 1)² has (8, 2): weights 4/5 and 1/5 on g alone."""
    for how in ("frozen", "named", "both named", "neither"):
        g, c = number(1.0), number(2.0)
        c.requires_grad_(how != "frozen")
        losses = [-c * g, (c * g.square() - 1).square()]
        names = {
            "frozen": {},
            "named": {"shared": [g]},
            "both named": {"shared": [g], "task_specific": []},
            "neither": {},
        }
        record = detente.backward(losses, detente.create("mgda"), **names[how])
        # Without a word, a critic that two losses reach is like any trunk: 86/109 of the first loss.
        first = 86 / 109 if how == "neither" else 0.8
        assert record.weights == pytest.approx((first, 1 - first))
        if how != "neither":
            assert grad(g) == pytest.approx(0.0, abs=1e-12)
        assert (c.grad is None) == (how in ("frozen", "both named"))
