"""Loops around the step: refused steps under a gradient scaler, and modules with buffers under checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from twins.engine import Spy

import detente

# ---- a gradient scaler

FACTOR = 1024.0
ORDER = (False, True, True, False, True, False)  # which steps are refused


def _network() -> tuple[nn.Linear, nn.ModuleList]:
    torch.manual_seed(0)
    return nn.Linear(8, 16), nn.ModuleList([nn.Linear(16, 1) for _ in range(2)])


def _train(
    space: str,
    *,
    guarded: bool,
    scaled: bool,
    two: bool = False,
    calls: int = 1,
    zero: Callable[..., None] | None = None,
) -> tuple[list[torch.Tensor], list[float]]:
    """Run the documented loop; every parameter after each batch, and the scaler's factor.

    Args:
        guarded: whether record.accepted guards the optimizer's step.
        two: one optimizer for the trunk and one for the heads.
        calls: of backward() for each batch, with losses divided by their number.
        zero: clears gradients after each batch; the optimizers do by default.
    """
    trunk, heads = _network()
    parameters = [*trunk.parameters(), *heads.parameters()]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
    ]
    if two:
        optimizers = [
            torch.optim.SGD(trunk.parameters(), lr=0.1, momentum=0.9),
            torch.optim.AdamW(heads.parameters(), lr=0.1),
        ]
    method, scaler = Spy(), torch.amp.GradScaler("cpu", init_scale=FACTOR, enabled=scaled)
    history, factors = [], []
    for batch, refused in enumerate(ORDER):
        inputs = torch.randn(6, 8, generator=torch.Generator().manual_seed(batch))
        method.status = "refused" if refused else "ok"
        for _ in range(calls):
            z = trunk(inputs).relu()
            losses = [(head(z) - task).square().mean() / calls for task, head in enumerate(heads)]
            more: dict[str, Any] = {"features": {"features": z}, "layer": {"solve_on": trunk}}.get(space, {})
            record = detente.backward(losses, method, scaler=scaler, **more)
        assert record.accepted != refused
        if record.accepted or not guarded:
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
        factors.append(scaler.get_scale())
        if zero is not None:
            zero(record, optimizers)
        else:
            for optimizer in optimizers:
                optimizer.zero_grad()
        history.append(torch.cat([parameter.detach().reshape(-1) for parameter in parameters]).clone())
    return history, factors


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("space", ["exact", "features", "layer"])
@pytest.mark.parametrize("guarded", [True, False])
def test_refused_steps_under_a_scaler_are_those_without_one(
    guarded: bool, space: str, two: bool, calls: int
) -> None:
    scaled, factors = _train(space, guarded=guarded, scaled=True, two=two, calls=calls)
    plain, _ = _train(space, guarded=True, scaled=False, two=two, calls=calls)
    for refused, before, after in zip(ORDER[1:], scaled, scaled[1:], strict=False):
        assert torch.equal(before, after) == refused
    for one, other in zip(scaled, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    if guarded:
        assert factors == [FACTOR] * len(ORDER)


def test_gradients_cleared_only_after_accepted_steps() -> None:
    """What a refused step leaves for the scaler must not lie under the next step's gradient."""

    def zero(record: detente.StepRecord, optimizers: list[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers if record.accepted else []:
            optimizer.zero_grad()

    scaled, factors = _train("exact", guarded=True, scaled=True, zero=zero)
    plain, _ = _train("exact", guarded=True, scaled=False, zero=zero)
    assert factors == [FACTOR] * len(ORDER)
    for one, other in zip(scaled, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("space", ["exact", "features", "layer"])
def test_a_gradient_that_was_there_stays_as_it_was(space: str) -> None:
    trunk, heads = _network()
    parameters = [*trunk.parameters(), *heads.parameters()]
    for parameter in parameters[::2]:
        parameter.grad = torch.rand_like(parameter)
    before = [None if p.grad is None else p.grad.clone() for p in parameters]
    z = trunk(torch.ones(2, 8)).relu()
    losses = [head(z).square().mean() for head in heads]
    more: dict[str, Any] = {"features": {"features": z}, "layer": {"solve_on": trunk}}.get(space, {})
    scaler = torch.amp.GradScaler("cpu", init_scale=FACTOR)
    record = detente.backward(losses, Spy(status="refused"), scaler=scaler, **more)
    scaler.update()
    assert record.status == "refused" and scaler.get_scale() == FACTOR
    for parameter, held in zip(parameters, before, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.isnan().all() if held is None else torch.equal(parameter.grad, held)


# ---- buffers under checkpointing


class Reckoner(nn.Module):
    """Networks whose parts run again in every backward, by kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
        self.norm: nn.Module = nn.BatchNorm1d(6, momentum=None if kind == "cumulative" else 0.1)
        if kind == "instance norm":
            self.norm = nn.InstanceNorm1d(6, track_running_stats=True)
        if kind == "spectral norm":
            self.second = nn.utils.parametrizations.spectral_norm(self.second)
        if kind == "old spectral norm":
            self.second = nn.utils.spectral_norm(self.second)  # type: ignore[no-untyped-call]
        self.outer = nn.BatchNorm1d(6)
        self.heads = nn.ModuleList([nn.Linear(6, 1) for _ in range(3)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(6) for _ in range(3)])
        self.double()

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        if self.kind == "instance norm":
            hidden = self.norm(hidden[None].transpose(1, 2))[0].t()
        else:
            hidden = self.norm(hidden)
        result: torch.Tensor = self.second(hidden.tanh())
        return result

    def head(self, task: int, z: torch.Tensor) -> torch.Tensor:
        if self.kind == "heads with a common norm":
            z = self.outer((task + 1) * z)
        if self.kind == "heads with norms":
            z = self.norms[task](z)
        result: torch.Tensor = self.heads[task](z).tanh()
        return result

    def losses(self) -> tuple[Any, list[torch.Tensor]]:
        draw = torch.Generator().manual_seed(3)
        x, y = (torch.randn(8, 4, generator=draw, dtype=torch.float64) + shift for shift in (2, -1))
        run: Any = lambda part, *inputs: checkpoint(part, *inputs, use_reentrant=False)  # noqa: E731
        if self.kind == "twice in a region":
            z = run(lambda x: self.trunk(x) + self.trunk(2 * x), x)
        elif self.kind == "two regions":
            z = run(self.trunk, x) + run(self.trunk, y)
        elif self.kind == "nested":
            z = run(lambda x: self.outer(run(self.trunk, x)).sin(), x)
        elif self.kind == "norm outside":
            z = self.outer(run(self.trunk, x))
        elif self.kind == "inputs of every task's own":
            z = {str(task): run(self.trunk, (task + 1) * x) for task in range(3)}
        else:
            z = run(self.trunk, x)
        of = z if isinstance(z, dict) else dict.fromkeys("012", z)
        return z, [(run(self.head, task, of[str(task)]) - task).square().mean() for task in range(3)]


class Ones(Spy):
    """Weight every task alike, from inner products."""

    declares = detente.Declaration(name="ones", source="a test", needs=frozenset({"gramian"}))


KINDS = (
    "plain",
    "cumulative",
    "instance norm",
    "spectral norm",
    "old spectral norm",
    "twice in a region",
    "two regions",
    "nested",
    "norm outside",
    "heads with norms",
)
MODES = ("fast", "batched", "low", "features", "layer", "weighting", "plain heads", "measured")


def _take(network: Reckoner, mode: str) -> None:
    z, losses = network.losses()
    more: dict[str, Any] = {
        "batched": {"memory": "batched"},
        "low": {"memory": "low"},
        "features": {"features": z},
        "layer": {"solve_on": network.first},
        "plain heads": {"heads": "own"},
        "measured": {"measure": True},
    }.get(mode, {})
    weighting = mode in ("weighting", "plain heads", "measured")
    detente.backward(losses, detente.create("uniform") if weighting else Ones(), **more)


def _beside_a_plain_backward(kind: str, mode: str) -> tuple[Reckoner, Reckoner]:
    plain, network = Reckoner(kind), Reckoner(kind)
    sum(plain.losses()[1]).backward()  # type: ignore[union-attr]
    _take(network, mode)
    for (name, parameter), other in zip(network.named_parameters(), plain.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-12)
    return plain, network


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_buffers_and_gradients_are_those_of_a_plain_backward(kind: str, mode: str) -> None:
    plain, network = _beside_a_plain_backward(kind, mode)
    moved = 0
    fresh = Reckoner(kind)
    for (name, buffer), other, start in zip(
        network.named_buffers(), plain.buffers(), fresh.buffers(), strict=True
    ):
        assert torch.equal(buffer, other), name
        moved += not torch.equal(buffer, start)
    assert moved


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("batched", "layer")])
@pytest.mark.parametrize("kind", ["heads with a common norm", "inputs of every task's own"])
def test_a_module_in_regions_of_different_tasks_moves_as_often_as_in_a_plain_backward(
    kind: str, mode: str
) -> None:
    """In the order of the tasks, where a plain backward begins with the last: the counts agree, not the last digits."""
    plain, network = _beside_a_plain_backward(kind, mode)
    counts = [{n: int(b) for n, b in one.named_buffers() if "tracked" in n} for one in (network, plain)]
    assert counts[0] == counts[1]
    fresh = dict(Reckoner(kind).named_buffers())
    for (name, buffer), other in zip(network.named_buffers(), plain.buffers(), strict=True):
        if other.is_floating_point() and not torch.equal(other, fresh[name]):
            assert (buffer - other).norm() <= 0.5 * (other - fresh[name]).norm(), name


def test_extra_backwards_leave_no_hook_behind() -> None:
    before = len(nn.modules.module._global_forward_pre_hooks)
    for mode in MODES:
        _take(Reckoner("plain"), mode)
    network = Reckoner("plain")
    losses = network.losses()[1]
    losses[1] = losses[1] * float("nan")
    with pytest.raises(ValueError, match="not finite"):
        detente.backward(losses, Ones())
    assert len(nn.modules.module._global_forward_pre_hooks) == before
