"""Random graphs of modules with random sharing: every mode against the slow, obvious twin."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from twins.engine import TOLERANCE, Spy, Weighting, assert_grads, expected, gradient, row
from twins.graphs import OPERATIONS, WIDTH, Plan, Pool, whole_of

import detente


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    nodes = []
    for number in range(1, draw(st.integers(2, 8)) + 1):
        earlier = st.integers(0, number - 1)
        operation = "linear" if number == 1 else draw(st.sampled_from(OPERATIONS))
        nodes.append((operation, draw(earlier), draw(earlier), draw(st.integers(0, 2))))
    node = st.integers(1, len(nodes))
    losses = draw(st.lists(st.tuples(node, st.none() | st.integers(0, 2)), min_size=1, max_size=4))
    features = draw(st.lists(node, min_size=1, max_size=3, unique=True))
    return Plan(tuple(nodes), tuple(losses), tuple(features), draw(st.integers(0, 99)))


def _weights(losses: dict[str, torch.Tensor]) -> list[float]:
    return [0.4 + 1.3 * task for task in range(len(losses))]


def _everywhere(spans: object, waiting: list[int], allowed: int) -> tuple[float, list[int]]:
    """A cut before every node: so small a graph would hardly be cut at all."""
    return 0.0, list(range(len(waiting)))


@settings(max_examples=70)
@given(plans(), st.sampled_from(["exact", "batched", "low", "cut", "layer", "weighting"]))
def test_modes_on_parameters(plan: Plan, mode: str) -> None:
    with mock.patch("detente.autograd.jacobian._LARGE", WIDTH * 2):  # small and large ones
        if mode == "cut":
            with mock.patch("detente.autograd.segments._cuts", _everywhere):
                _mode_on_parameters(plan, "low")
        else:
            _mode_on_parameters(plan, mode)


def _mode_on_parameters(plan: Plan, mode: str) -> None:
    pool = Pool(plan)
    losses, _ = pool.run()
    assume(all(loss.requires_grad for loss in losses.values()))
    weights = _weights(losses)
    shared = [
        p for p in pool.parameters if sum(gradient(loss, p) is not None for loss in losses.values()) > 1
    ]
    heads = "weighted" if mode == "weighting" else "own"
    want = expected(losses, pool.parameters, weights, heads=heads)
    method = Weighting(weights=weights) if mode == "weighting" else Spy(weights=weights)
    if mode == "low":  # it keeps no gradients to look at
        method.declares = replace(method.declares, needs=frozenset({"gramian"}))
    options = {mode: {"memory": mode}} if mode in ("batched", "low") else {"layer": {"solve_on": shared[-2:]}}
    options = options.get(mode, {})
    if mode == "layer" and not shared:
        options = {}
    inside = [
        loss for loss in losses.values() if any(gradient(loss, parameter) is not None for parameter in shared)
    ]
    jacobian = (
        torch.stack([row(loss, shared[-2:] if mode == "layer" else shared) for loss in inside])
        if shared
        else None
    )
    record = detente.backward(losses, method, **options)
    assert_grads(pool.parameters, want)
    left_out = mode != "weighting" and shared and len(inside) < len(losses)
    assert bool(record.notes) == bool(not shared or mode == "low" or left_out)
    assert len(record.dropped) == (len(losses) - len(inside) if left_out else 0)
    if jacobian is not None and isinstance(method, Spy):
        assert method.seen is not None and method.seen.gramian is not None
        assert torch.allclose(torch.from_numpy(method.seen.gramian), jacobian @ jacobian.T, **TOLERANCE)
        if mode == "low":
            assert method.seen.jacobian is None and "were taken in" in record.notes[-1]
        else:
            assert method.seen.jacobian is not None and method.seen.jacobian.shape == jacobian.shape


@settings(max_examples=80)
@given(plans(), st.booleans())
def test_features_anywhere(plan: Plan, spied: bool) -> None:
    pool = Pool(plan)
    losses, features = pool.run()
    assume(all(loss.requires_grad for loss in losses.values()))
    assume(all(feature.requires_grad for feature in features))
    apart, copies = pool.run(cut=plan.features)
    depends = [
        loss.requires_grad and any(gradient(loss, c) is not None for c in copies) for loss in apart.values()
    ]
    weights = _weights(losses)
    method = Spy(weights=weights) if spied else Weighting(weights=weights)
    reached = [[gradient(loss, p) is not None for loss in losses.values()] for p in pool.parameters]
    common = [
        any(gradient(f.sum(), p) is not None for f in features) or sum(mine) > 1
        for p, mine in zip(pool.parameters, reached, strict=True)
    ]
    past = [
        not depends[task] and any(mine[task] for mine, one in zip(reached, common, strict=True) if one)
        for task in range(len(losses))
    ]
    if any(past):
        name = list(losses)[past.index(True)]
        with pytest.raises(ValueError, match=f"the loss of task '{name}' does not depend on features="):
            detente.backward(losses, method, features=features)
        assert all(parameter.grad is None for parameter in pool.parameters)
        return
    if not any(depends):
        with pytest.raises(ValueError, match=r"no loss .* depends on features="):
            detente.backward(losses, method, features=features)
        assert all(parameter.grad is None for parameter in pool.parameters)
        return
    behind = [p for p in pool.parameters if any(gradient(f.sum(), p) is not None for f in features)]
    heads = "own" if spied else "weighted"
    want = expected(losses, pool.parameters, weights, heads=heads, shared=behind)
    inside = [loss for loss, one in zip(apart.values(), depends, strict=True) if one]
    jacobian = torch.stack([row(loss, copies) for loss in inside])
    detente.backward(losses, method, features=features)
    assert_grads(pool.parameters, want)
    if isinstance(method, Spy):
        assert method.seen is not None and method.seen.jacobian is not None
        assert torch.allclose(method.seen.jacobian, jacobian, **TOLERANCE)


@settings(max_examples=40)
@given(
    plans(),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True), min_size=2, max_size=4),
)
def test_what_was_shared_once_stays_shared(plan: Plan, batches: list[list[int]]) -> None:
    pool = Pool(plan)
    spy, shared = Spy(), set()
    for present in batches:
        losses, _ = pool.run()
        losses = {
            name: loss
            for task, (name, loss) in enumerate(losses.items())
            if task in present and loss.requires_grad
        }
        if not losses:
            continue
        for parameter in pool.parameters:
            parameter.grad = None
            if sum(gradient(loss, parameter) is not None for loss in losses.values()) > 1:
                shared.add(parameter)
        weights = _weights(losses)
        spy.weights = dict(zip(losses, weights, strict=True))
        want = expected(losses, pool.parameters, weights, shared=shared)
        detente.backward(losses, spy)
        assert_grads(pool.parameters, want)


@settings(max_examples=80)
@given(
    plans(),
    st.sampled_from(["exact", "batched", "low", "weighting"]),
    st.none() | st.integers(-3, 12),
    st.booleans(),
)
def test_micro_batches_and_scalers_change_nothing(
    plan: Plan, mode: str, exponent: int | None, accumulated: bool
) -> None:
    """Two uneven micro-batches, a factor that is a power of two, or both, in every mode they go with."""
    assume(not (accumulated and mode == "low"))
    pool = Pool(plan)
    cuts = (slice(0, 2), slice(2, 3)) if accumulated else (slice(None),)
    parts, examples = [pool.run(rows=cut)[0] for cut in cuts], [2, 1] if accumulated else [3]
    assume(all(loss.requires_grad for part in parts for loss in part.values()))
    whole = whole_of(parts, examples)
    weights = _weights(whole)
    shared = [p for p in pool.parameters if sum(gradient(loss, p) is not None for loss in whole.values()) > 1]
    assume(shared or not accumulated)
    factor = 1.0 if exponent is None else 2.0**exponent
    method = Weighting(weights=weights) if mode == "weighting" else Spy(weights=weights)
    if mode == "low":
        method.declares = replace(method.declares, needs=frozenset({"gramian"}))
    want = expected(whole, pool.parameters, weights, heads="weighted" if mode == "weighting" else "own")
    inside = [loss for loss in whole.values() if any(gradient(loss, p) is not None for p in shared)]
    jacobian = torch.stack([row(loss, shared) for loss in inside]) if shared else None
    options: dict[str, Any] = {"memory": mode} if mode in ("batched", "low") else {}
    if exponent is not None:
        options["scaler"] = torch.amp.GradScaler("cpu", init_scale=factor)
    with detente.accumulate(method, len(parts)) if accumulated else nullcontext():
        for part, count in zip(parts, examples, strict=True):
            record = detente.backward(part, method, samples=count, **options)
    assert_grads(pool.parameters, [None if wanted is None else factor * wanted for wanted in want])
    assert record.losses == pytest.approx([loss.item() for loss in whole.values()], rel=1e-12)
    if isinstance(method, Spy) and jacobian is not None:
        assert method.seen is not None and method.seen.gramian is not None
        assert torch.allclose(torch.from_numpy(method.seen.gramian), jacobian @ jacobian.T, **TOLERANCE)
