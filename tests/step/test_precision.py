"""Half precision: autocast around the call, a representation in float16, and results out of the range of a type."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from twins.engine import remembered

import detente
from detente.autograd.numbers import GradientNotFinite
from detente.values import TaskGradients

TASKS = ("a", "b", "c")
HALF = (torch.bfloat16, torch.float16)
SPACES = ("exact", "batched", "low", "layer", "features", "branches", "accumulate")


class Network(nn.Module):
    """A trunk and three heads; the second head nearly opposes the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(16, 1) for task in TASKS})
        self.x = torch.randn(256, 8)
        with torch.no_grad():
            self.heads["b"].weight.copy_(1e-2 * torch.randn(1, 16) - self.heads["a"].weight)

    def losses(self, z: Any) -> dict[str, torch.Tensor]:
        read = z if isinstance(z, detente.Branches) else dict.fromkeys(TASKS, z)
        return {
            task: (self.heads[task](read[task].float()) - place).square().mean()
            for place, task in enumerate(TASKS)
        }


def grads(network: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.double().reshape(-1) for p in network.parameters() if p.grad is not None])


# ---- autocast


CASES = [
    (name, space)
    for name, info in sorted(detente.methods().items())
    for space in ("exact", "features")
    if space in info.spaces
]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("name", "space"), CASES)
def test_backward_inside_autocast_equals_outside(name: str, space: str, dtype: torch.dtype) -> None:
    network, found = Network(), []
    for inside in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", dtype):
            z = network.trunk(network.x)
            losses = network.losses(z)
        more = {"features": z} if space == "features" else {}
        with torch.autocast("cpu", dtype, enabled=inside):
            record = detente.backward(losses, detente.create(name), **more)
        found.append((record.weights, record.status, grads(network)))
    (weights, status, plain), (weights_inside, status_inside, cast) = found
    assert (weights, status) == (weights_inside, status_inside)
    assert torch.equal(plain, cast)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", sorted(detente.methods()))
def test_combine_under_autocast_keeps_the_dtype(name: str, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(3)
    jacobian, losses = torch.randn(3, 40, generator=draw), [1.0, 2.0, 0.5]
    outside = detente.combine(name, jacobian, losses).direction
    with torch.autocast("cpu", dtype):
        inside = detente.combine(name, jacobian, losses).direction
    assert inside is not None and outside is not None and inside.dtype == torch.float32
    assert torch.equal(inside, outside)


# ---- a representation in half precision


@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize("factor", [None, 1.0, 1024.0, 32768.0, 65536.0, 2.0**20])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["mgda", "pcgrad", "upgrad", "graddrop", "aligned-mtl"])
def test_features_in_half_precision(
    name: str, dtype: torch.dtype, factor: float | None, branched: bool
) -> None:
    ends = []
    for cast in (False, True):
        network = Network()
        with torch.autocast("cpu", dtype, enabled=cast):
            z = network.trunk(network.x)
        if cast:
            assert z.dtype == dtype
        else:  # the values that half precision keeps, so that only the gradients' precision is compared
            z = z + (z.detach().to(dtype).float() - z.detach())
        read = detente.branch(z, TASKS) if branched else z
        losses = network.losses(read)
        more: dict[str, Any] = {}
        if cast and factor is not None:
            more["scaler"] = torch.amp.GradScaler("cpu", init_scale=factor)
        record = detente.backward(losses, detente.create(name), features=read, **more)
        assert record.accepted and not any("scaler skips" in note for note in record.notes)
        found = torch.cat(
            [p.grad.double().reshape(-1) for p in network.trunk.parameters() if p.grad is not None]
        )
        ends.append(found / factor if more and factor is not None else found)
    assert (ends[1] - ends[0]).norm() <= 1e-2 * ends[0].norm()


# ---- results out of range


class Giving(detente.Method):
    """Count its steps, and give what it is told to."""

    declares = detente.Declaration(
        name="giving", source="a test", needs=frozenset({"gramian", "jacobian"}), stateful=True
    )

    def __init__(self, *, give: Callable[[TaskGradients], detente.Combination] | None = None) -> None:
        super().__init__()
        self.give = give

    def allocate(self, tasks: int) -> None:
        self.register_buffer("steps", torch.zeros(tasks))

    def solve(self, gradients: TaskGradients) -> detente.Combination:
        self.steps += 1
        assert self.give is not None
        return self.give(gradients)


class GivingWeights(Giving):
    """Give what it is told to, from the Gramian alone."""

    declares = detente.Declaration(
        name="giving", source="a test", needs=frozenset({"gramian"}), stateful=True
    )


class GivingBlocks(Giving):
    """Give what it is told to, for each block of parameters."""

    declares = detente.Declaration(
        name="giving", source="a test", needs=frozenset({"gramian", "blocks"}), stateful=True
    )


def weights_of(*values: float) -> Callable[[TaskGradients], detente.Combination]:
    return lambda gradients: detente.Combination(
        weights=torch.tensor((values * 3)[: gradients.tasks], dtype=torch.float64)
    )


def direction_of(value: float) -> Callable[[TaskGradients], detente.Combination]:
    def give(gradients: TaskGradients) -> detente.Combination:
        assert gradients.jacobian is not None
        return detente.Combination(direction=torch.full_like(gradients.jacobian[0], value))

    return give


def blocks_of(value: float) -> Callable[[TaskGradients], detente.Combination]:
    return lambda gradients: detente.Combination(
        block_weights=torch.full((len(gradients.block_sizes), gradients.tasks), value, dtype=torch.float64)
    )


BAD = {
    "weights that are NaN": weights_of(float("nan")),
    "weights times gradients overflow": weights_of(1e300),
    "weights overflow and cancel": weights_of(3e38, -3e38),
    "a direction that is infinite": direction_of(float("inf")),
    "weights of blocks times gradients overflow": blocks_of(1e300),
}


def _possible(bad: str, space: str, heads: str) -> bool:
    """Whether a space takes what is given: other combinations are refused before anything is computed."""
    if "blocks" in bad:
        return heads == "own" and space in ("exact", "batched", "accumulate")
    return "direction" not in bad or (heads == "own" and space not in ("low", "layer"))


@pytest.mark.parametrize("factor", [None, 1024.0, 2.0**40])
@pytest.mark.parametrize("scale", ["native", "sum"])
@pytest.mark.parametrize(
    ("bad", "space", "heads"),
    [case for case in itertools.product(BAD, SPACES, ("own", "weighted")) if _possible(*case)],
)
def test_a_result_that_is_not_finite_is_refused_or_left_to_the_scaler(
    bad: str, space: str, scale: Any, heads: Any, factor: float | None
) -> None:
    network = Network()
    kind = GivingBlocks if "blocks" in bad else GivingWeights if space == "low" else Giving
    method = kind(give=BAD[bad])
    kept = list(itertools.islice(network.parameters(), 3))
    for parameter in kept:
        parameter.grad = torch.full_like(parameter, 0.25)
    scaler = None if factor is None else torch.amp.GradScaler("cpu", init_scale=factor)

    def step() -> detente.StepRecord:
        z = network.trunk(1e3 * network.x)
        read = detente.branch(z, TASKS) if space == "branches" else z
        more: dict[str, Any] = {
            "batched": {"memory": "batched"},
            "low": {"memory": "low"},
            "layer": {"solve_on": network.trunk},
            "features": {"features": z},
            "branches": {"features": read},
        }.get(space, {})
        return detente.backward(network.losses(read), method, heads=heads, scale=scale, scaler=scaler, **more)

    def whole() -> detente.StepRecord:
        if space != "accumulate":
            return step()
        with detente.accumulate(method, 2):
            step()
            return step()

    def finite() -> list[bool]:
        return [bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None]

    refused, record = False, None
    try:
        record = whole()
    except GradientNotFinite:
        refused = factor is None
        assert refused
    if record is not None and not any("scaler skips" in note for note in record.notes):
        # scale="sum" makes a finite direction of weights that are only too long
        assert scale == "sum" and all(finite())
        return
    assert refused or not any(finite())
    for parameter in network.parameters() if refused else ():
        assert (parameter.grad is not None) == any(parameter is one for one in kept)
        assert parameter.grad is None or bool((parameter.grad == 0.25).all())
    assert remembered(method).get("steps") in (None, [0.0] * 3)


@pytest.mark.parametrize("space", ["exact", "low", "layer", "features"])
def test_weighted_heads_that_overflow_alone(space: str) -> None:
    """Small gradients of what is shared, large ones of a head: only the head's overflow."""
    network = Network()
    method = GivingWeights(give=weights_of(1e30, 1.0, 1.0))
    z = network.trunk(network.x)
    losses = network.losses(z)
    losses["a"] = losses["a"] * 1e-30 + 1e10 * network.heads["a"].bias.sum()
    more: dict[str, Any] = {
        "low": {"memory": "low"},
        "layer": {"solve_on": network.trunk},
        "features": {"features": z},
    }.get(space, {})
    with pytest.raises(GradientNotFinite, match="giving"):
        detente.backward(losses, method, heads="weighted", **more)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert remembered(method).get("steps") in (None, [0.0] * 3)


def test_a_parameter_in_float16_among_float32_ones() -> None:
    """The direction is finite in float32, and not in the parameter's own type."""
    wide, narrow = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float16))
    losses = [wide.sum() + narrow.float().sum(), (2 * wide).sum() + narrow.float().sum()]
    method = Giving(
        give=lambda gradients: detente.Combination(direction=torch.full_like(gradients.jacobian[0], 1e6))
    )
    with pytest.raises(GradientNotFinite, match="giving"):
        detente.backward(losses, method)
    assert wide.grad is None and narrow.grad is None and "steps" not in remembered(method)
