"""Which parameters are shared and which a task's own: found, remembered, or named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from twins.engine import (
    Remembering,
    Spy,
    Weighting,
    assert_grads,
    expected,
    gradient,
    row,
)
from twins.nets import Net, grads

import detente

# ---- absent tasks


def test_what_is_shared_stays_shared_when_a_task_is_absent() -> None:
    net, spy = Net(), Spy(weights=(1, 2, 3))
    detente.backward(net.losses()[1], spy)
    net.zero_grad()
    _, losses = net.losses("b")
    want = expected(losses, net.parameters(), (5.0,), shared=net.trunk)
    spy.weights = (5.0,)
    record = detente.backward(losses, spy)
    assert_grads(net.parameters(), want)
    assert record.names == ("b",) and record.space == "exact" and record.weights == (5.0,)
    assert net.heads["a"].weight.grad is None


def test_another_method_knows_nothing_of_it() -> None:
    net = Net()
    detente.backward(net.losses()[1], Spy())
    net.zero_grad()
    _, losses = net.losses("b")
    want = expected(losses, net.parameters(), (1.0,))
    for method in (Spy(weights=(5.0,)), copy.deepcopy(Spy(weights=(5.0,)))):
        net.zero_grad()
        record = detente.backward(net.losses("b")[1], method)
        assert_grads(net.parameters(), want)
        assert len(record.notes) == 1 and "no shared parameters" in record.notes[0]


def test_features_and_parameters_in_turn_remember_each_parameter_once() -> None:
    net, spy = Net(tied=True), Spy()
    z, losses = net.losses()
    detente.backward(losses, spy, features=z)
    detente.backward(net.losses()[1], spy)
    assert spy.seen is not None and spy.seen.jacobian is not None
    assert spy.seen.jacobian.shape[1] == sum(p.numel() for p in net.trunk)


def test_two_models_under_one_method() -> None:
    one, two, spy = Net(), Net(), Spy(weights=(1, 2, 3))
    for net in (one, two, one):
        net.zero_grad()
        _, losses = net.losses()
        want = expected(losses, net.parameters(), (1, 2, 3))
        other = grads(two if net is one else one)
        record = detente.backward(losses, spy)
        assert_grads(net.parameters(), want)
        for before, after in zip(other, grads(two if net is one else one), strict=True):
            assert (before is None and after is None) or torch.equal(before, after)
        assert record.gradient_norms == pytest.approx(
            [row(loss, net.trunk).norm().item() for loss in net.losses()[1].values()]
        )


# ---- names instead of discovery


def _actor_and_critic() -> tuple[nn.Module, nn.Module, nn.ModuleList, Callable[[], list[torch.Tensor]]]:
    torch.manual_seed(0)
    actor, critic = nn.Linear(3, 3), nn.Linear(3, 1)
    own = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
    x = torch.randn(4, 3)
    return actor, critic, own, lambda: [critic(head(actor(x)).tanh()).mean() for head in own]


def test_with_both_named_nothing_else_is_touched() -> None:
    actor, critic, own, losses = _actor_and_critic()
    for shared, specific in (
        (actor, own),
        (list(actor.parameters()), {"0": own[0], "1": own[1]}),
        ((p for p in actor.parameters()), (head for head in own)),
        ([actor.weight, actor.bias], [own[0].parameters(), own[1]]),
    ):
        actor.zero_grad(), own.zero_grad()
        want = expected(dict(enumerate(losses())), [*actor.parameters(), *own.parameters()], (2, 3))
        spy = Spy(weights=(2, 3))
        detente.backward(losses(), spy, shared=shared, task_specific=specific)
        assert_grads([*actor.parameters(), *own.parameters()], want, rtol=1e-5, atol=1e-7)
        assert critic.weight.grad is None and critic.bias.grad is None
        assert spy.seen is not None and spy.seen.jacobian is not None and spy.seen.jacobian.shape == (2, 12)


@pytest.mark.parametrize("method", [Weighting(weights=(2, 3)), Spy(weights=(2, 3))])
def test_named_parameters_in_every_mode(method: detente.Method) -> None:
    actor, critic, own, _ = _actor_and_critic()
    x = torch.randn(4, 3)
    for mode in ("exact", "features", "layer"):
        for module in (actor, critic, own):
            module.zero_grad()
        z = actor(x)
        losses = [critic(head(z).tanh()).mean() for head in own]
        options = {"features": {"features": z}, "layer": {"solve_on": actor.bias}}.get(mode, {})
        detente.backward(
            losses, copy.deepcopy(method), shared=actor, task_specific=own, heads="own", **options
        )
        want = expected(
            dict(enumerate(critic(h(actor(x)).tanh()).mean() for h in own)),
            [*actor.parameters(), *own.parameters()],
            (2, 3),
        )
        assert_grads([*actor.parameters(), *own.parameters()], want, rtol=1e-5, atol=1e-7)
        assert critic.weight.grad is None


@pytest.mark.parametrize("memory", ["fast", "batched"])
def test_with_one_named_everything_else_has_the_other_role(memory: Any) -> None:
    net = Net()
    for names, shared in (
        ({"shared": net.last}, list(net.last.parameters())),
        ({"task_specific": net.heads}, net.trunk),
        (
            {"task_specific": [net.first, net.heads["a"]]},
            [*net.last.parameters(), *net.heads["b"].parameters(), *net.heads["c"].parameters()],
        ),
        ({"shared": []}, []),
    ):
        net.zero_grad()
        _, losses = net.losses()
        ids = {id(p) for p in shared}
        want = []
        for parameter in net.parameters():
            terms = [g for loss in losses.values() if (g := gradient(loss, parameter)) is not None]
            reaching = [
                w
                for w, loss in zip((1, 2, 3), losses.values(), strict=True)
                if gradient(loss, parameter) is not None
            ]
            weights = reaching if id(parameter) in ids else [1] * len(terms)
            want.append(sum(w * g for w, g in zip(weights, terms, strict=True)))
        record = detente.backward(losses, Spy(weights=(1, 2, 3)), memory=memory, **names)
        assert_grads(net.parameters(), want)
        assert bool(record.notes) == (not shared)


def test_frozen_parameters_may_be_named() -> None:
    net = Net()
    net.first.requires_grad_(False)
    net.heads["a"].weight.requires_grad_(False)
    _, losses = net.losses()
    want = expected(losses, net.parameters(), (1, 2, 3))
    detente.backward(losses, Spy(weights=(1, 2, 3)), shared=[net.first, net.last], task_specific=net.heads)
    assert_grads(net.parameters(), want)


# ---- nothing shared


def _apart() -> tuple[nn.ModuleList, list[torch.Tensor]]:
    heads = nn.ModuleList(nn.Linear(2, 1) for _ in range(2))
    return heads, [(head(torch.ones(3, 2)) + 1).square().mean() for head in heads]


@pytest.mark.parametrize(
    "options", [{}, {"measure": True}, {"heads": "weighted"}, {"scale": "unit"}, {"memory": "batched"}]
)
def test_without_shared_parameters_gradients_are_plain_and_the_record_says_so(
    options: dict[str, Any],
) -> None:
    heads, losses = _apart()
    spy = Remembering()
    want = expected(dict(enumerate(losses)), heads.parameters(), (1, 1))
    record = detente.backward(losses, spy, **options)
    assert_grads(heads.parameters(), want, rtol=1e-6)
    assert any("no shared parameters" in note and "plain" in note for note in record.notes)
    assert record.space == "none" and record.raw is None and record.weights == (1, 1)
    assert spy.tasks is None, "the method was asked although there was nothing to decide"


def test_a_weighting_without_shared_parameters_weights_its_losses_and_says_so() -> None:
    for heads_option, weights, word in ((None, (2, 3), "weighted"), ("own", (1, 1), "plain")):
        heads, losses = _apart()
        want = expected(dict(enumerate(losses)), heads.parameters(), weights, heads="weighted")
        record = detente.backward(losses, Weighting(weights=(2, 3)), heads=heads_option)
        assert_grads(heads.parameters(), want, rtol=1e-6)
        assert any("no shared parameters" in note and word in note for note in record.notes)
