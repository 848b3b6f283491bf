"""Random graphs of modules with random sharing: every mode against the slow, obvious twin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from twins.engine import TOLERANCE, Spy, Weighting, assert_grads, expected, gradient, row

import detente

WIDTH = 3
OPERATIONS = ("linear", "tanh", "add", "multiply", "join", "parameter", "detach")


@dataclass(frozen=True)
class Plan:
    """A graph: each node is an operation on earlier nodes (node 0 is the input) with a module out of a pool."""

    nodes: tuple[tuple[str, int, int, int], ...]
    losses: tuple[tuple[int, int | None], ...]  # the node each loss looks at, and a head out of the pool
    features: tuple[int, ...]
    seed: int


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


class Pool:
    """The modules of a plan, and the plan carried out on them."""

    def __init__(self, plan: Plan) -> None:
        torch.manual_seed(plan.seed)
        self.plan = plan
        double = {"dtype": torch.float64}
        self.linear = nn.ModuleList(nn.Linear(WIDTH, WIDTH, **double) for _ in range(3))
        self.join = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH, **double) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 2, **double) for _ in range(3))
        self.bare = nn.ParameterList(nn.Parameter(torch.randn(WIDTH, **double)) for _ in range(3))
        self.input = torch.randn(2, WIDTH, **double)
        self.parameters = [
            *self.linear.parameters(),
            *self.join.parameters(),
            *self.heads.parameters(),
            *self.bare,
        ]

    def run(self, cut: Sequence[int] = ()) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Losses and features. Nodes in ``cut`` are replaced by copies of themselves that remember nothing."""
        values = [self.input]
        for number, (operation, i, j, module) in enumerate(self.plan.nodes, start=1):
            x, y = values[i], values[j]
            value = {
                "linear": lambda x=x, m=module: self.linear[m](x),
                "tanh": lambda x=x: x.tanh(),
                "add": lambda x=x, y=y: x + y,
                "multiply": lambda x=x, y=y: x * y,
                "join": lambda x=x, y=y, m=module: self.join[m](torch.cat([x, y], dim=1)),
                "parameter": lambda x=x, m=module: x * self.bare[m],
                "detach": lambda x=x, y=y: x.detach() + y,
            }[operation]()
            values.append(value.detach().requires_grad_() if number in cut else value)
        losses = {}
        for task, (node, head) in enumerate(self.plan.losses):
            seen = values[node] if head is None else self.heads[head](values[node])
            losses[f"task {task}"] = (seen + 0.1 * task).square().mean() + seen.sin().sum()
        return losses, [values[node] for node in self.plan.features]


def _weights(losses: dict[str, torch.Tensor]) -> list[float]:
    return [0.4 + 1.3 * task for task in range(len(losses))]


@settings(max_examples=60)
@given(plans(), st.sampled_from(["exact", "batched", "low", "layer", "weighting"]))
def test_modes_on_parameters(plan: Plan, mode: str) -> None:
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
    jacobian = (
        torch.stack([row(loss, shared[-2:] if mode == "layer" else shared) for loss in losses.values()])
        if shared
        else None
    )
    record = detente.backward(losses, method, **options)
    assert_grads(pool.parameters, want)
    assert bool(record.notes) == (not shared or mode == "low")
    if jacobian is not None and isinstance(method, Spy):
        assert method.seen is not None and method.seen.gramian is not None
        assert torch.allclose(torch.from_numpy(method.seen.gramian), jacobian @ jacobian.T, **TOLERANCE)
        if mode == "low":
            assert method.seen.jacobian is None and "segments" in record.notes[-1]
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
    if not all(depends):
        name = list(losses)[depends.index(False)]
        with pytest.raises(ValueError, match=f"the loss of task '{name}' does not depend on features="):
            detente.backward(losses, method, features=features)
        assert all(parameter.grad is None for parameter in pool.parameters)
        return
    behind = [p for p in pool.parameters if any(gradient(f.sum(), p) is not None for f in features)]
    heads = "own" if spied else "weighted"
    want = expected(losses, pool.parameters, weights, heads=heads, shared=behind)
    jacobian = torch.stack([row(loss, copies) for loss in apart.values()])
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
        spy.weights = _weights(losses)
        want = expected(losses, pool.parameters, spy.weights, shared=shared)
        detente.backward(losses, spy)
        assert_grads(pool.parameters, want)
