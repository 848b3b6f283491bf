"""What a step promises: who receives what, in which length, and what the record says."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from twins.engine import (
    Remembering,
    RememberingWeighting,
    Spy,
    Weighting,
    assert_grads,
    expected,
    remembered,
    row,
)
from twins.nets import SPACES, Net, grads, options_for

import detente

# ---- the record


@pytest.mark.parametrize("space", SPACES)
def test_the_record_holds_the_plain_numbers_of_the_step(space: str) -> None:
    net = Net()
    z, losses = net.losses()
    tensors = {"exact": net.trunk, "features": [z], "layer": list(net.last.parameters())}[space]
    jacobian = torch.stack([row(loss, tensors) for loss in losses.values()])
    record = detente.backward(losses, Spy(weights=(1, 2, 3)), **options_for(space, net, z))
    norms = jacobian.norm(dim=1)
    assert record.names == ("a", "b", "c") and record.weights == (1, 2, 3)
    assert record.status == "ok" and record.accepted and record.space == space and record.seconds > 0
    assert record.losses == pytest.approx([loss.item() for loss in losses.values()])
    assert record.gradient_norms == pytest.approx(norms.tolist())
    assert np.allclose(record.cosines, (jacobian @ jacobian.T / norms / norms[:, None]).numpy())
    singular = torch.linalg.svdvals(jacobian)
    assert record.condition_number == pytest.approx((singular[0] / singular[-1]).item(), rel=1e-6)
    assert record.altered is None and record.notes == ()
    plain = record.to_dict()
    assert plain["names"] == ["a", "b", "c"] and isinstance(plain["raw"]["norms"][0], float)


def test_unnamed_losses_are_called_by_their_position() -> None:
    for sequence in (list, tuple):
        _, losses = Net().losses()
        assert detente.backward(sequence(losses.values()), Spy()).names == ("0", "1", "2")


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
@pytest.mark.parametrize("method", [Spy(), Weighting(weights=(1, 1, 1)), RememberingWeighting()])
def test_losses_of_one_element_are_scalars(shape: tuple[int, ...], method: detente.Method) -> None:
    net, method = Net(), copy.deepcopy(method)
    _, losses = net.losses()
    record = detente.backward({name: loss.reshape(shape) for name, loss in losses.items()}, method)
    assert record.losses == pytest.approx([loss.item() for loss in losses.values()])
    detente.combine("uniform", torch.eye(2), losses=torch.ones(2, *shape))


# ---- adding


@pytest.mark.parametrize("space", [*SPACES, "none"])
def test_gradients_are_added_to_those_that_are_there(space: str) -> None:
    net = Net()
    method = Weighting(weights=(1, 2, 3)) if space == "none" else Spy(weights=(1, 2, 3))
    z, losses = net.losses()
    detente.backward(losses, method, **options_for(space, net, z))
    once = grads(net)
    held = [p.grad for p in net.parameters()]
    z, losses = net.losses()
    detente.backward(losses, method, **options_for(space, net, z))
    assert_grads(net.parameters(), [2 * g for g in once if g is not None])
    assert all(p.grad is h for p, h in zip(net.parameters(), held, strict=True)), (
        "the tensors of .grad were replaced"
    )


def test_hooks_of_tensors_see_each_backward_and_post_accumulate_hooks_do_not_run() -> None:
    net, seen, after = Net(), [], []
    net.first.weight.register_hook(lambda g: seen.append(g.clone()))
    net.first.weight.register_post_accumulate_grad_hook(after.append)
    _, losses = net.losses()
    detente.backward(losses, Spy())
    assert len(seen) == 3 and not after
    assert torch.allclose(sum(seen), net.first.weight.grad)


# ---- refused and stationary steps


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("space", [*SPACES, "none"])
def test_a_refused_step_leaves_every_gradient_as_it_was(space: str, held: bool) -> None:
    net = Net()
    if held:
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter)
    before, objects = grads(net), [p.grad for p in net.parameters()]
    z, losses = net.losses()
    method = (
        Weighting(weights=(1, 2, 3), status="refused")
        if space == "none"
        else Spy(weights=(1, 2, 3), status="refused")
    )
    record = detente.backward(losses, method, **options_for(space, net, z))
    assert not record.accepted and record.status == "refused" and record.weights == (1, 2, 3)
    for parameter, was, same in zip(net.parameters(), before, objects, strict=True):
        assert parameter.grad is same
        assert was is None or torch.equal(parameter.grad, was)


@pytest.mark.parametrize("scale", ["native", "sum", "unit"])
@pytest.mark.parametrize("space", SPACES)
def test_a_stationary_direction_is_exactly_zero(space: str, scale: Any) -> None:
    net = Net(tied=True)
    z, losses = net.losses()
    want = [row(losses[name], net.heads[name].parameters()) for name in "abc"]
    spy = Spy(weights=(0.1, 0.2, 0.7), status="stationary")
    record = detente.backward(losses, spy, scale=scale, **options_for(space, net, z))
    assert record.status == "stationary" and record.accepted
    for parameter in net.trunk:
        assert parameter.grad is not None and not parameter.grad.any()
    for name, own in zip("abc", want, strict=True):
        assert torch.allclose(torch.cat([p.grad.reshape(-1) for p in net.heads[name].parameters()]), own)


# ---- scale


@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("scale", ["native", "sum", "mean", "unit"])
@pytest.mark.parametrize("space", SPACES)
def test_scale_sets_the_length_where_the_problem_is_solved(space: str, scale: Any, heads: Any) -> None:
    net, weights = Net(tied=True), torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64)
    z, losses = net.losses()
    tensors = {"exact": net.trunk, "features": [z], "layer": list(net.last.parameters())}[space]
    if space == "features":  # the gradient through the features alone, not around them
        _, apart = net.losses()
        del apart
        copy_of_z = z.detach().requires_grad_()
        around = nn.functional.linear(copy_of_z, net.first.weight)
        jacobian = torch.stack([row((net.heads[n](around) - 1).square().mean(), [copy_of_z]) for n in "abc"])
    else:
        jacobian = torch.stack([row(loss, tensors) for loss in losses.values()])
    native = (weights @ jacobian).norm()
    length = {
        "native": native,
        "sum": jacobian.sum(dim=0).norm(),
        "mean": jacobian.mean(dim=0).norm(),
        "unit": torch.tensor(1.0),
    }[scale]
    factor = (length / native).item()
    plain = expected(losses, net.parameters(), weights.tolist(), heads=heads)
    trunk = {id(p) for p in net.trunk}
    want = [g * factor if id(p) in trunk else g for p, g in zip(net.parameters(), plain, strict=True)]
    record = detente.backward(
        losses, Spy(weights=weights.tolist()), scale=scale, heads=heads, **options_for(space, net, z)
    )
    assert_grads(net.parameters(), want, rtol=1e-8, atol=1e-12)
    assert record.weights == tuple(weights.tolist()), "the record tells the method's own weights"
    if space == "exact":
        assert torch.cat([p.grad.reshape(-1) for p in net.trunk]).norm().item() == pytest.approx(
            length.item()
        )


@pytest.mark.parametrize("scale", ["sum", "mean", "unit"])
def test_scale_of_a_weighting_of_losses(scale: Any) -> None:
    net = Net()
    _, losses = net.losses()
    jacobian = torch.stack([row(loss, net.trunk) for loss in losses.values()])
    length = {"sum": jacobian.sum(0).norm(), "mean": jacobian.mean(0).norm(), "unit": torch.tensor(1.0)}[
        scale
    ]
    heads = expected(losses, net.heads.parameters(), (3, 1, 1), heads="weighted")
    detente.backward(losses, Weighting(weights=(3, 1, 1)), scale=scale)
    assert torch.cat([p.grad.reshape(-1) for p in net.trunk]).norm().item() == pytest.approx(length.item())
    assert_grads(net.heads.parameters(), heads)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("scale", ["sum", "mean", "unit"])
def test_zero_stays_zero(space: str, scale: Any) -> None:
    net = Net(tied=True)
    z, losses = net.losses()
    detente.backward(losses, Spy(weights=(0, 0, 0)), scale=scale, **options_for(space, net, z))
    assert all(not p.grad.any() for p in net.trunk)
    net.zero_grad()
    z, losses = net.losses()
    vanishing = {name: loss * 0 for name, loss in losses.items()}
    detente.backward(vanishing, Spy(weights=(1, 2, 3)), scale=scale, **options_for(space, net, z))
    assert all(not p.grad.any() for p in net.parameters())


# ---- heads


@pytest.mark.parametrize("heads", [None, "own", "weighted"])
@pytest.mark.parametrize("kind", ["gradients", "losses"])
def test_heads(kind: str, heads: Any) -> None:
    net = Net()
    _, losses = net.losses()
    method = Spy(weights=(1, 2, 3)) if kind == "gradients" else Weighting(weights=(1, 2, 3))
    default = "own" if kind == "gradients" else "weighted"
    want = expected(losses, net.parameters(), (1, 2, 3), heads=heads or default, shared=net.trunk)
    detente.backward(losses, method, heads=heads)
    assert_grads(net.parameters(), want)


# ---- measure


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("heads", [None, "own"])
def test_measuring_changes_nothing_but_the_record(space: str, heads: Any) -> None:
    results = []
    for measure in (False, True):
        net, method = Net(tied=True), RememberingWeighting()
        for _ in range(2):
            z, losses = net.losses()
            record = detente.backward(
                losses, method, measure=measure, heads=heads, **options_for(space, net, z)
            )
        results.append((grads(net), remembered(method), record))
    (plain, state, without), (measured, same_state, record) = results
    assert state == same_state
    for one, two in zip(plain, measured, strict=True):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-14)
    assert without.raw is None and without.space == "none"
    assert record.raw is not None and record.space == space and record.weights == without.weights
    assert record.losses == without.losses


def test_measuring_a_method_that_looks_anyway_changes_nothing_at_all() -> None:
    records = []
    for measure in (False, True):
        net, method = Net(), Remembering()
        record = detente.backward(net.losses()[1], method, measure=measure)
        records.append((record.raw, record.weights, [g.tolist() for g in grads(net)], remembered(method)))
    assert records[0] == records[1]


# ---- the parts a step is made of


def test_a_step_is_its_three_parts() -> None:
    for space in SPACES:
        whole, parts = Net(tied=True), Net(tied=True)
        z, losses = whole.losses()
        detente.backward(
            losses, detente.create("mgda"), scale="sum", heads="weighted", **options_for(space, whole, z)
        )
        z, losses = parts.losses()
        taken = detente.task_gradients(losses, **options_for(space, parts, z))
        assert taken is not None
        detente.apply(taken, detente.create("mgda").combine(taken.gradients), scale="sum", heads="weighted")
        assert_grads(parts.parameters(), grads(whole))
    assert detente.task_gradients([nn.Linear(2, 1)(torch.ones(1, 2)).sum() for _ in range(2)]) is None


def test_combine_leaves_its_input_alone_and_gives_a_direction_of_its_own() -> None:
    matrix = torch.randn(3, 4)
    before = matrix.clone()
    first = detente.combine(Spy(direction=lambda jacobian: jacobian[0]), matrix).direction
    assert first is not None and torch.equal(first, matrix[0])
    first.zero_()
    assert torch.equal(matrix, before)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        direction = detente.combine(Spy(weights=(1, 2, 4)), torch.eye(3, dtype=dtype)).direction
        assert direction is not None and direction.dtype == dtype and direction.tolist() == [1, 2, 4]
    assert detente.combine(Spy(weights=(1, 1, 1), status="stationary"), matrix).direction.tolist() == [0] * 4
    refused = detente.combine(Spy(weights=(1, 1, 1), status="refused"), matrix)
    assert torch.allclose(refused.direction, matrix.sum(dim=0)) and not refused.accepted


def test_uniform_is_the_plain_backward_bit_for_bit() -> None:
    ours, plain = Net(), Net()
    detente.backward(ours.losses()[1], detente.create("uniform"))
    sum(plain.losses()[1].values()).backward()
    for one, two in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=1e-13, atol=1e-15)


def test_training_under_autocast() -> None:
    net = Net().float()
    net.x = net.x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, losses = net.losses()
    for options in ({}, {"features": z}, {"solve_on": net.last}):
        net.zero_grad()
        detente.backward(losses, Spy(weights=(1, 2, 3)), retain_graph=True, **options)
        want = expected(losses, net.parameters(), (1, 2, 3))
        assert_grads(net.parameters(), want, rtol=0.05, atol=0.02)
