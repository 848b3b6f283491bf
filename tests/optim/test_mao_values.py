"""The numbers of MAO: torch's own Adam, a twin written out, invariance, altered gradients."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from twin_adams import Model, Twin

import detente
from detente.optim import MAO, kernels, streams
from detente.values import Combination, TaskGradients


@pytest.fixture(params=["fused", "foreach"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "foreach":
        monkeypatch.setattr(kernels, "can_fuse", lambda tensor: False)
    return str(request.param)


def farthest(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


# ---- torch's own optimizers


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("role", ["shared", "own", "both"])
def test_one_task_is_adam(path: str, weight_decay: float, role: str) -> None:
    model, other = Model("a"), Model("a")
    roles: dict[str, Any] = {
        "shared": (model, ()),
        "own": ((), model),
        "both": (model.shared, model.heads),
    }
    optimizer = MAO(*roles[role], lr=0.01, weight_decay=weight_decay)
    kind = torch.optim.AdamW if weight_decay else torch.optim.Adam
    reference = kind(other.parameters(), lr=0.01, weight_decay=weight_decay)
    for step in range(100):
        optimizer.step(model.losses(step))
        reference.zero_grad()
        other.losses(step)["a"].backward()
        reference.step()
    assert farthest(model, Model("a")) > 0.1
    assert farthest(model, other) < 1e-12


def test_a_step_is_the_sum_of_one_adam_for_each_task(path: str) -> None:
    model = Model()
    shared = [p for module in model.shared for p in module.parameters()]
    optimizer = MAO(model.shared, model.heads, lr=0.01, weight_decay=0.1)
    copies = {name: [nn.Parameter(p.detach().clone()) for p in shared] for name in "abc"}
    adams = {name: torch.optim.Adam(copies[name], lr=0.01) for name in "abc"}
    for step in range(100):
        before = [p.detach().clone() for p in shared]
        expected = [p * (1 - 0.01 * 0.1) for p in before]
        for name, loss in model.losses(step).items():
            found = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
            for c, b, g in zip(copies[name], before, found, strict=True):
                c.data.copy_(b)
                c.grad = g
            adams[name].step()
            for e, c, b in zip(expected, copies[name], before, strict=True):
                e += (c - b).detach()
        optimizer.step(model.losses(step))
        for p, e in zip(shared, expected, strict=True):
            torch.testing.assert_close(p.detach(), e, rtol=0, atol=1e-14)


# ---- the twin

FORMS = [
    {"variant": "adam", "bias_correction": "adam"},
    {"variant": "adam", "bias_correction": "paper"},
    {"variant": "adam", "bias_correction": "none"},
    {"variant": "sgd"},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))
def test_the_twin_goes_the_same_way(path: str, form: dict[str, Any]) -> None:
    """Tasks come and go, one joins late, one layer is passed by few, all with weight decay."""
    present = ["ab", "abc", "c", "ba", "cab", "abc"]
    options: dict[str, Any] = {"lr": 0.003, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.05, **form}
    model, other = Model(), Model()
    optimizer = MAO(model.shared, model.heads, **options)
    twin = Twin([p for m in other.shared for p in m.parameters()], list(other.heads.parameters()), **options)
    for step in range(100):
        names = present[step % len(present)]
        optimizer.step(model.losses(step, names))
        twin.step(other.losses(step, names))
    assert farthest(model, Model()) > 0.1
    assert farthest(model, other) < 1e-12


def test_the_forms_differ_and_the_paper_has_a_hidden_warm_up() -> None:
    def first_steps(**form: Any) -> list[float]:
        weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer, found = MAO([weight], lr=1.0, eps=0.0, **form), []
        for _ in range(100):
            before = weight.item()
            optimizer.step([5 * weight.sum(), 0.1 * weight.sum()])
            found.append(before - weight.item())
        return found

    assert first_steps() == pytest.approx([2.0] * 100)
    warm_up = [2 * (1 - 0.999**t) ** 0.5 for t in range(1, 101)]
    assert first_steps(bias_correction="paper") == pytest.approx(warm_up)
    assert warm_up[0] == pytest.approx(2 * 0.0316, rel=1e-3) and warm_up[99] == pytest.approx(
        2 * 0.309, rel=1e-2
    )
    assert first_steps(variant="sgd")[0] == pytest.approx(2 / 0.001**0.5)
    assert first_steps(bias_correction="none")[0] == pytest.approx(2 * 0.1 / 0.001**0.5)


def test_own_parameters_that_two_losses_reach_take_the_sum() -> None:
    model, other = Model("ab"), Model("ab")
    optimizer = MAO(model.trunk, [model.detour, model.heads], lr=0.01)
    reference = torch.optim.Adam(other.detour.parameters(), lr=0.01)
    for step in range(10):
        other.trunk.load_state_dict(model.trunk.state_dict())
        other.heads.load_state_dict(model.heads.state_dict())
        optimizer.step(model.losses(step, detour="ab"))
        reference.zero_grad()
        sum(other.losses(step, detour="ab").values()).backward()
        reference.step()
    assert farthest(model.detour, other.detour) < 1e-12


# ---- invariance


@pytest.mark.parametrize("factor", [1000.0, 1e-3])
def test_the_unit_of_a_loss_does_not_matter(path: str, factor: float) -> None:
    def train(scale: float) -> Model:
        model = Model()
        optimizer = MAO(model.shared, model.heads, lr=0.01, eps=1e-12)
        for step in range(60):
            losses = model.losses(step)
            optimizer.step({**losses, "b": scale * losses["b"]})
        return model

    plain, scaled = train(1.0), train(factor)
    assert farthest(plain, Model()) > 0.1
    assert farthest(plain, scaled) < 1e-6


def test_the_order_of_the_losses_does_not_matter() -> None:
    def train(order: str) -> Model:
        model = Model()
        optimizer = MAO(model.shared, model.heads, tasks=["a", "b", "c"], lr=0.01)
        for step in range(10):
            losses = model.losses(step)
            optimizer.step({name: losses[name] for name in order})
        return model

    assert farthest(train("abc"), train("cab")) == 0


# ---- parameters move once


def test_parameters_stay_until_the_last_backward() -> None:
    model = Model()
    optimizer = MAO(model.shared, model.heads, lr=0.1)
    start = [p.detach().clone() for p in model.parameters()]
    seen = []
    losses = model.losses(0)
    for name, loss in losses.items():
        loss.register_hook(
            lambda g, name=name: seen.append(
                (name, all(torch.equal(p, s) for p, s in zip(model.parameters(), start, strict=True)))
            )
        )
    optimizer.step(losses)
    assert seen == [("a", True), ("b", True), ("c", True)]
    assert farthest(model, Model()) > 0.05


def test_moving_between_the_backwards_would_be_noticed() -> None:
    """The twin that moves by a fused kernel after each task is another optimizer: autograd does not see it."""
    right, wrong = Model("ab"), Model("ab")
    optimizer = MAO(right.shared, right.heads, lr=0.05)
    shared = list(wrong.trunk.parameters())
    adams = {name: torch.optim.Adam(shared, lr=0.05, fused=True) for name in "ab"}
    own = torch.optim.Adam([*wrong.heads.parameters(), *wrong.detour.parameters()], lr=0.05)
    twin_model = Model("ab")
    twin = Twin(
        [p for m in twin_model.shared for p in m.parameters()], list(twin_model.heads.parameters()), lr=0.05
    )
    for step in range(5):
        optimizer.step(right.losses(step))
        twin.step(twin_model.losses(step))
        own.zero_grad()
        for name, loss in wrong.losses(step).items():
            found = torch.autograd.grad(
                loss, [*shared, *wrong.heads[name].parameters()], retain_graph=True, allow_unused=True
            )
            for p, g in zip([*shared, *wrong.heads[name].parameters()], found, strict=True):
                p.grad = g
            adams[name].step()
        own.step()
    assert farthest(right, twin_model) < 1e-12
    assert farthest(right.trunk, wrong.trunk) > 1e-3


# ---- altered gradients


class Altering(detente.Method):
    """Mixes every task with a given matrix; takes part in no registry."""

    declares = detente.Declaration(name="altering", source="this test", needs=frozenset({"gramian"}))

    def __init__(self, matrix: Any = None, status: str = "ok") -> None:
        super().__init__()
        self.matrix, self.status = matrix, status
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def solve(self, gradients: TaskGradients) -> Combination:
        self.calls = self.calls + 1
        tasks = gradients.tasks
        matrix = (
            None if self.matrix is None else torch.as_tensor(self.matrix, dtype=torch.float64)[:tasks, :tasks]
        )
        return Combination(
            weights=torch.ones(tasks, dtype=torch.float64),
            transform=matrix,
            status=self.status,
            notes=("seen",),
        )


def test_gradients_that_are_not_altered_change_nothing(path: str) -> None:
    plain, same = Model(), Model()
    one = MAO(plain.shared, plain.heads, lr=0.01, weight_decay=0.1)
    other = MAO(same.shared, same.heads, lr=0.01, weight_decay=0.1, transform=Altering(torch.eye(3)))
    for step in range(20):
        names = ["abc", "ab", "cb"][step % 3]
        one.step(plain.losses(step, names))
        record = other.step(same.losses(step, names))
        assert record.notes == ("seen",) and record.accepted and record.names == tuple(sorted(names))
        assert record.raw is not None and record.raw == record.altered and not any(record.weights)
    assert farthest(plain, same) == 0


def test_pcgrad_then_mao() -> None:
    """For two tasks the projection is written down here, and each altered gradient goes into an Adam of torch's."""
    model = Model("ab")
    method = detente.create("pcgrad")
    optimizer = MAO(model.trunk, [model.detour, model.heads], lr=0.05, transform=method)
    shared = list(model.trunk.parameters())
    copies = {name: [nn.Parameter(p.detach().clone()) for p in shared] for name in "ab"}
    adams = {name: torch.optim.Adam(copies[name], lr=0.05) for name in "ab"}
    conflicts = 0
    for step in range(30):
        losses = model.losses(step)
        g = {
            n: torch.cat([x.reshape(-1) for x in torch.autograd.grad(loss, shared, retain_graph=True)])
            for n, loss in losses.items()
        }
        dot = g["a"] @ g["b"]
        conflicts += bool(dot < 0)
        altered = g
        if dot < 0:
            altered = {
                "a": g["a"] - dot / (g["b"] @ g["b"]) * g["b"],
                "b": g["b"] - dot / (g["a"] @ g["a"]) * g["a"],
            }
        expected = [p.detach().clone() for p in shared]
        for name in "ab":
            pieces = altered[name].split([p.numel() for p in shared])
            for c, p, piece in zip(copies[name], shared, pieces, strict=True):
                c.data.copy_(p)
                c.grad = piece.view_as(c)
            adams[name].step()
            for e, c, p in zip(expected, copies[name], shared, strict=True):
                e += (c - p).detach()
        optimizer.step(model.losses(step))
        for p, e in zip(shared, expected, strict=True):
            torch.testing.assert_close(p.detach(), e, rtol=0, atol=1e-12)
    assert conflicts > 0


def test_a_row_that_takes_in_another_task_reaches_what_that_task_reaches() -> None:
    """Only task a passes the detour; mixed into b, its gradient is b's gradient there too."""
    model = Model("ab")
    optimizer = MAO(model.shared, model.heads, transform=Altering([[1.0, 0.0], [2.0, 1.0]]))
    optimizer.step(model.losses(0))
    kept = optimizer.state[model.detour.weight]
    assert set(kept) == {"a", "b"}
    torch.testing.assert_close(kept["b"]["exp_avg"], 2 * kept["a"]["exp_avg"])
    apart = MAO(model.shared, model.heads, transform=Altering([[1.0, 2.0], [0.0, 1.0]]))
    apart.step(model.losses(0))
    assert set(apart.state[model.detour.weight]) == {"a"}


def test_an_altered_gradient_of_zero_is_a_gradient() -> None:
    """Momentum goes on and the counters count, as in Adam, where the task itself reaches the parameter."""
    model = Model("ab")
    method = Altering(torch.eye(2))
    optimizer = MAO(model.shared, model.heads, betas=(0.9, 0.999), transform=method)
    optimizer.step(model.losses(0))
    kept = optimizer.state[model.trunk[0].weight]["b"]
    before = kept["exp_avg"].clone()
    method.matrix = torch.zeros(2, 2)
    optimizer.step(model.losses(1))
    assert kept["step"] == 2 and "b" not in optimizer.state[model.detour.weight]
    torch.testing.assert_close(kept["exp_avg"], 0.9 * before)


def test_a_refused_step_leaves_everything() -> None:
    model = Model()
    optimizer = MAO(
        model.shared, model.heads, weight_decay=0.1, transform=Altering(torch.eye(3), status="refused")
    )
    record = optimizer.step(model.losses(0))
    assert record.status == "refused" and not record.accepted
    assert farthest(model, Model()) == 0 and not optimizer.state


class Holding(Altering):
    """Refuses the shared part of every second step."""

    def solve(self, gradients: TaskGradients) -> Combination:
        self.status = "stationary" if self.calls % 2 else "ok"
        found = super().solve(gradients)
        return replace(found, transform=None) if self.calls % 2 == 0 else found


def test_a_step_whose_shared_part_is_refused_moves_the_heads_alone() -> None:
    """Shared parameters, their moments and counters wait, as in a step that takes place for the heads only."""
    model, other = Model(), Model()
    optimizer = MAO(model.shared, model.heads, lr=0.01, weight_decay=0.1, transform=Holding(torch.eye(3)))
    whole = MAO(other.shared, (), lr=0.01, weight_decay=0.1)
    heads = torch.optim.AdamW(other.heads.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(6):
        record = optimizer.step(model.losses(step), measure=True)
        assert record.accepted and record.status == ("stationary" if step % 2 else "ok")
        assert optimizer.balance.mean_contributions == (0.0,) * 3 or step % 2 == 0
        losses = other.losses(step)
        heads.zero_grad()
        torch.autograd.backward(
            list(losses.values()), retain_graph=True, inputs=list(other.heads.parameters())
        )
        if step % 2 == 0:
            whole.step(losses)
        heads.step()
    assert farthest(model, other) < 1e-12 and farthest(model, Model()) > 0.01
    assert optimizer.state[model.trunk[0].weight]["a"]["step"] == 3
    # Nothing moves at all where there are no heads; that is no error either.
    lonely = MAO(model.trunk, (), transform=Holding(torch.eye(3)))
    lonely.step(model.losses(0))
    before = copy.deepcopy(model.state_dict())
    assert lonely.step(model.losses(1)).status == "stationary"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("refuse", ["all", "shared"])
def test_a_guard_around_the_transform(refuse: Any) -> None:
    model, start = Model("ab"), Model("ab")
    guard = detente.wrappers.Inexact(detente.create("pcgrad"), epsilon=1e6, refuse=refuse)
    optimizer = MAO(model.shared, model.heads, lr=0.01, weight_decay=0.1, transform=guard)
    record = optimizer.step(model.losses(0))
    assert record.status == {"all": "refused", "shared": "stationary"}[refuse]
    assert farthest(model.trunk, start.trunk) == farthest(model.detour, start.detour) == 0
    assert (farthest(model.heads, start.heads) > 0.005) == (refuse == "shared")
    assert not any(p in optimizer.state for p in model.trunk.parameters())
    guard.epsilon = 0.0
    assert optimizer.step({"a": model.losses(1)["a"]}).status == "ok"
    assert farthest(model.trunk, start.trunk) > 0.005


def test_a_stationary_step_with_a_transform_keeps_its_momentum() -> None:
    weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = MAO([weight], transform=detente.create("upgrad"), lr=0.1)
    optimizer.step([weight.sum(), weight.sum()])
    record = optimizer.step([weight.sum(), -weight.sum()])
    assert record.status == "stationary"
    # Each altered gradient is 0: m = 0.09 and v = 0.000999, corrected by 0.19 and 0.001999.
    step = 0.1 * (0.09 / 0.19) / ((0.000999 / 0.001999) ** 0.5 + 1e-8)
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 0.8 - 2 * step), rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", [detente.create("mgda"), detente.create("moco"), Altering(None)])
def test_a_method_without_altered_gradients_is_named(method: detente.Method) -> None:
    model = Model()
    optimizer = MAO(model.shared, model.heads, transform=method)
    with pytest.raises(
        ValueError, match=f"transform={method.declares.name} gives no altered.*pcgrad.*Nothing was"
    ):
        optimizer.step(model.losses(0))
    assert farthest(model, Model()) == 0 and not optimizer.state and optimizer.tasks is None
    state = method.state_dict()
    assert not any(bool(value.any()) for value in state.values() if isinstance(value, torch.Tensor))


def test_the_methods_named_in_the_message_are_those_that_alter() -> None:
    jacobian = torch.tensor([[1.0, 0.2, 0.0], [-0.5, 1.0, 0.3]])
    found = set()
    for name in detente.methods():
        try:
            combination = detente.combine(name, jacobian, losses=[1.0, 2.0])
        except ValueError:  # asks for what a matrix does not have
            continue
        if combination.transform is not None:
            found.add(name)
    assert set(streams.ALTERING) == found


@pytest.mark.parametrize("name", streams.ALTERING)
def test_every_altering_method_trains(name: str) -> None:
    model = Model()
    optimizer = MAO(model.shared, model.heads, lr=0.01, transform=detente.create(name))
    first = sum(float(loss.detach()) for loss in model.losses(0).values())
    for _ in range(50):
        assert optimizer.step(model.losses(0)).accepted
    assert sum(float(loss.detach()) for loss in model.losses(0).values()) < 0.7 * first
