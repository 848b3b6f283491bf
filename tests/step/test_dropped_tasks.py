"""Tasks that reach nothing shared: left out of the shared problem in every space, told in the record, remembered."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from twins.engine import gradient

import detente
from detente.methods.registry import info_of

TASKS = ("a", "p", "b")  # p is a probe: it reads a detached representation
SPACES = ("exact", "batched", "low", "features", "branches", "layer", "accumulate")
METHODS = sorted(detente.methods())
IN_SPACE = {"features": "features", "branches": "features", "layer": "layer"}


class Probed(nn.Module):
    """A trunk, two heads and a probe."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 4)
        self.heads = nn.ModuleDict({task: nn.Linear(4, 1) for task in TASKS})
        self.double()

    def losses(
        self, step: int = 0, tasks: str = "apb", *, branched: bool = False, packed: bool = False
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        z: Any = self.last(self.first(x).tanh()).tanh()
        read: Any = dict.fromkeys(TASKS, z)
        if branched:
            read = z = detente.branch(z, TASKS)
        outputs = {t: self.heads[t](read[t].detach() if t == "p" else read[t]) for t in tasks}
        if packed:
            outputs = dict(zip(outputs, torch.cat(list(outputs.values()), dim=1).unbind(1), strict=True))
        targets = {"a": 1.0, "p": 0.0, "b": -1.0}
        losses = {task: (output - targets[task]).square().mean() for task, output in outputs.items()}
        return z, losses


def take(
    network: Probed, method: detente.Method, space: str, step: int = 0, **more: Any
) -> detente.StepRecord:
    network.zero_grad()
    z, losses = network.losses(step, branched=space == "branches")
    if space == "accumulate":
        with detente.accumulate(method, 2):
            detente.backward(losses, method, **more)
            return detente.backward(network.losses(step)[1], method, **more)
    options: dict[str, Any] = {
        "batched": {"memory": "batched"},
        "low": {"memory": "low"},
        "features": {"features": z},
        "branches": {"features": z},
        "layer": {"solve_on": network.last},
    }
    return detente.backward(losses, method, **options.get(space, {}), **more)


def runs(name: str, space: str) -> bool:
    info = detente.methods()[name]
    if space == "low" and info.needs & {"jacobian", "activations", "blocks"}:
        return False
    return IN_SPACE.get(space, "exact") in info.spaces


CASES = [(name, space) for name in METHODS for space in SPACES if runs(name, space)]


@pytest.mark.parametrize(
    ("name", "space"), [case for case in CASES if detente.methods()[case[0]].takes_gradients]
)
def test_a_probe_is_left_out_and_the_record_says_so(name: str, space: str) -> None:
    network, alone = Probed(), Probed()
    method, twin = detente.create(name), detente.create(name)
    for step in range(2):
        _, losses = network.losses(step)
        want = gradient(losses["p"], network.heads["p"].weight)
        record = take(network, method, space, step)
        assert record.names == TASKS and len(record.weights) == 3
        assert record.dropped[:1] == ("p",) and record.weights[1] is None
        assert sum("'p' reaches no shared parameter" in note for note in record.notes) == 1
        assert record.raw is not None and len(record.raw.norms) == 3 and record.raw.norms[1] == 0.0
        assert record.raw.cosines[1] == (0.0, 0.0, 0.0)
        if record.accepted and detente.methods()[name].heads == "own":
            probe = network.heads["p"].weight.grad
            assert probe is not None and want is not None
            torch.testing.assert_close(probe, want)
        # The trunk moves as it does where the probe is no loss at all.
        alone.zero_grad()
        if space not in ("features", "branches", "layer"):
            detente.backward(alone.losses(step, "ab")[1], twin)
            for one, other in zip(network.first.parameters(), alone.first.parameters(), strict=True):
                assert one.grad is not None and other.grad is not None
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize(
    ("name", "space"),
    [case for case in CASES if not detente.methods()[case[0]].takes_gradients and case[1] != "accumulate"],
)
def test_weightings_of_losses_keep_every_task(name: str, space: str, measure: bool) -> None:
    record = take(Probed(), detente.create(name), space, measure=measure)
    assert record.names == TASKS and record.dropped == () and None not in record.weights
    if measure:
        assert record.raw is not None and len(record.raw.norms) == 3 and record.raw.norms[1] == 0.0


@pytest.mark.parametrize(
    "name", [name for name in METHODS if "preference" in detente.methods()[name].options]
)
def test_a_preference_by_position_counts_every_task(name: str) -> None:
    networks, ends = [Probed(), Probed()], []
    given: tuple[Any, Any] = ([0.6, 0.1, 0.3], {"a": 0.6, "p": 0.1, "b": 0.3})
    for network, preference in zip(networks, given, strict=True):
        method = detente.create(name, preference=preference)
        ends.append([take(network, method, "exact", step).weights for step in range(2)])
    assert ends[0] == ends[1]
    for one, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)


WRAPPED = [
    ("every", {"k": 2}, "mgda"),
    ("every", {"k": 3}, "gradnorm"),
    ("every", {"k": 2}, "nash-mtl"),
    ("per-block", {}, "mgda"),
    ("per-block", {}, "pcgrad"),
    ("inexact", {"epsilon": 0.01}, "mgda"),
    ("inexact", {"epsilon": 0.01}, "pcgrad"),
    ("adaptive", {}, "mgda"),
    ("smooth", {}, "mgda"),
    ("normalize", {}, "upgrad"),
]


def _wrapped(wrapper: str, options: dict[str, Any], name: str, space: str) -> bool:
    """Whether a wrapped method is served in a space."""
    info = info_of(detente.wrap(wrapper, detente.create(name), **options))
    if space == "low":
        return not info.needs & {"jacobian", "activations", "blocks"}
    if "blocks" in info.needs and space in ("features", "branches"):
        return False
    return IN_SPACE.get(space, "exact") in info.spaces


@pytest.mark.parametrize(
    ("wrapper", "options", "name", "space"),
    [(*one, space) for one in WRAPPED for space in SPACES if space != "batched" and _wrapped(*one, space)],
)
def test_wrappers_leave_the_probe_out_in_every_step(
    wrapper: str, options: dict[str, Any], name: str, space: str
) -> None:
    """Also in steps in which a wrapper asks for no gradients, and after loading."""

    def make() -> detente.Method:
        return detente.wrap(wrapper, detente.create(name), **options)

    network, resumed = Probed(), Probed()
    method, other = make(), make()
    for step in range(6):
        if step == 3:
            state = copy.deepcopy(other.state_dict())
            other = make()
            other.load_state_dict(state)
        record = take(network, method, space, step)
        again = take(resumed, other, space, step)
        assert record.dropped[:1] == ("p",) and record.weights[1] is None, step
        assert (record.weights, record.dropped, record.status) == (again.weights, again.dropped, again.status)
        for one, two in zip(network.parameters(), resumed.parameters(), strict=True):
            assert (one.grad is None) == (two.grad is None)
            assert one.grad is None or torch.equal(one.grad, two.grad)  # type: ignore[arg-type]


def test_every_keeps_the_shared_direction_between_its_solutions() -> None:
    """By hand: in the steps between, the trunk takes the remembered weights of the tasks of its problem alone."""
    network, method = Probed(), detente.wrap("every", detente.create("mgda"), k=3)
    weights = take(network, method, "exact", 0).weights
    for step in (1, 2):
        _, losses = network.losses(step)
        want = sum(
            w * torch.autograd.grad(losses[task], network.first.weight, retain_graph=True)[0]
            for task, w in zip(TASKS, weights, strict=True)
            if w is not None
        )
        record = take(network, method, "exact", step)
        assert record.weights == pytest.approx(weights)
        torch.testing.assert_close(network.first.weight.grad, want)
        probe = gradient(network.losses(step)[1]["p"], network.heads["p"].weight)
        torch.testing.assert_close(network.heads["p"].weight.grad, probe)


@pytest.mark.parametrize("heads", [None, "own", "weighted"])
@pytest.mark.parametrize("tasks", ["ab", "abp"])
@pytest.mark.parametrize("kind", ["static", "uncertainty", "every"])
def test_packed_losses_are_apart_in_steps_without_task_gradients(kind: str, tasks: str, heads: Any) -> None:
    """Heads behind one node keep their own gradients where a method asks only for losses."""

    def make() -> detente.Method:
        if kind == "every":
            return detente.wrap("every", detente.create("mgda"), k=3)
        return detente.create(
            kind, **({"weights": [2.0, 3.0, 4.0][: len(tasks)]} if kind == "static" else {})
        )

    ends = []
    for packed in (False, True):
        network, method, found = Probed(), make(), []
        for step in range(3):
            network.zero_grad()
            record = detente.backward(network.losses(step, tasks, packed=packed)[1], method, heads=heads)
            grads = [None if p.grad is None else p.grad.clone() for p in network.parameters()]
            found.append((record.weights, grads))
        ends.append(found)
    for (weights, apart), (also, together) in zip(*ends, strict=True):
        assert [w is None for w in weights] == [w is None for w in also]
        for one, other in zip(apart, together, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_absent_and_dropped_tasks_in_turn_and_a_state_loaded_between(name: str) -> None:
    networks, methods, order = [Probed(), Probed()], [], ("apb", "ab", "apb", "pb", "p", "apb", "a")
    methods = [detente.create(name, tasks=TASKS) for _ in networks]
    for step, present in enumerate(order):
        if step in (2, 5):
            state = copy.deepcopy(methods[1].state_dict())
            methods[1] = detente.create(name, tasks=TASKS)
            methods[1].load_state_dict(state)
        records = []
        for network, method in zip(networks, methods, strict=True):
            network.zero_grad()
            records.append(detente.backward(network.losses(step, present)[1], method))
        one, other = records
        assert (one.names, one.weights, one.dropped, one.status) == (
            other.names,
            other.weights,
            other.dropped,
            other.status,
        )
        assert len(one.weights) == len(one.names) == len(present)
        for left, right in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
            assert (left.grad is None) == (right.grad is None)
            assert left.grad is None or torch.equal(left.grad, right.grad)  # type: ignore[arg-type]


def test_a_gradient_that_is_zero_by_number_stays_in() -> None:
    network = Probed()
    _, losses = network.losses(0, "ab")
    losses["b"] = losses["b"] * 0.0
    record = detente.backward(losses, detente.create("mgda"))
    assert record.dropped == () and record.status == "stationary"
    assert any("'b' is zero" in note for note in record.notes)


def test_sparse_and_dense_gradients_of_an_own_parameter_in_micro_batches() -> None:
    """A table of one task's own that is looked up in one micro-batch and read whole in the next."""
    network, table = Probed(), nn.Embedding(6, 4, sparse=True).double()
    method = detente.create("mgda")
    parts = []
    for part in (0, 1):
        _, losses = network.losses(part, "ab")
        looked_up = table(torch.tensor([1, 4])) if part == 0 else table.weight
        losses["a"] = losses["a"] + looked_up.square().sum()
        parts.append(losses)
    want = sum(torch.autograd.grad(l["a"], table.weight, retain_graph=True)[0].to_dense() for l in parts) / 2  # noqa: E741
    with detente.accumulate(method, 2):
        for losses in parts:
            detente.backward(losses, method)
    assert table.weight.grad is not None and table.weight.grad.layout is torch.strided
    torch.testing.assert_close(table.weight.grad, want)
