"""Both searches against slow, obvious twins: a copy of the whole model for every trial, gradients by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import detente
from detente.linesearch import Backtracking, FastBacktracking, SearchOptions

GAMMA, C, TRIALS = 2.0, 1e-2, 12
EPS = torch.finfo(torch.float64).eps


@dataclass
class Step:
    eta: float
    trials: int
    before: list[float]
    after: list[float]


def shorter_of_two(g: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """MGDA for two gradients (Sener & Koltun 2018, algorithm 1)."""
    share = (torch.dot(h - g, h) / (g - h).square().sum()).clamp(0, 1)
    return share * g + (1 - share) * h


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def move(parameters: Sequence[torch.Tensor], direction: torch.Tensor, eta: float) -> None:
    with torch.no_grad():
        for parameter, piece in zip(
            parameters, torch.split(direction, [p.numel() for p in parameters]), strict=True
        ):
            parameter -= eta * piece.reshape(parameter.shape)


def holds(before: list[float], after: list[float], slopes: list[float], eta: float) -> bool:
    return all(
        a <= b - C * eta * s + 4 * EPS * max(abs(a), abs(b))
        for b, a, s in zip(before, after, slopes, strict=True)
    )


def take_over(model: Any, moved: Any) -> None:
    """Parameters of the copy; buffers stay."""
    with torch.no_grad():
        for mine, other in zip(model.parameters(), moved.parameters(), strict=True):
            mine.copy_(other)


def classical(model: Any, x: torch.Tensor, lr_ub: float) -> Step:
    old, drawn = deepcopy(model), torch.get_rng_state()
    losses = list(model.losses(model.encoder(x), x).values())
    left = torch.get_rng_state()
    trunk, heads = (
        list(model.encoder.parameters()),
        [list(head.parameters()) for head in model.heads.values()],
    )
    shared = [flat(torch.autograd.grad(loss, trunk, retain_graph=True)) for loss in losses]
    own = [
        flat(torch.autograd.grad(loss, head, retain_graph=True))
        for loss, head in zip(losses, heads, strict=True)
    ]
    d = shorter_of_two(*shared)
    slopes = [float(g @ d + h @ h) for g, h in zip(shared, own, strict=True)]
    before = [float(loss.detach()) for loss in losses]
    for trial in range(TRIALS):
        eta = lr_ub / GAMMA**trial
        copy = deepcopy(old)
        move(list(copy.encoder.parameters()), d, eta)
        for head, h in zip(copy.heads.values(), own, strict=True):
            move(list(head.parameters()), h, eta)
        torch.set_rng_state(drawn)
        with torch.no_grad():
            after = [float(loss) for loss in copy.losses(copy.encoder(x), x).values()]
        if holds(before, after, slopes, eta):
            take_over(model, copy)
            torch.set_rng_state(left)
            return Step(eta, trial + 1, before, after)
    raise AssertionError("the twin found no step")


def fast(model: Any, x: torch.Tensor, lr_ub: float) -> Step:
    old = deepcopy(model)
    z = model.encoder(x)
    model.losses(z, x)  # the heads' first masks are drawn and dropped, the statistics advance
    drawn = torch.get_rng_state()
    again = deepcopy(old)
    losses = list(again.losses(z, x).values())
    left = torch.get_rng_state()
    in_z = [torch.autograd.grad(loss, z, retain_graph=True)[0].reshape(-1) for loss in losses]
    own = [
        flat(torch.autograd.grad(loss, list(head.parameters()), retain_graph=True))
        for loss, head in zip(losses, again.heads.values(), strict=True)
    ]
    d = shorter_of_two(*in_z)
    slopes = [float(g @ d + h @ h) for g, h in zip(in_z, own, strict=True)]
    before = [float(loss.detach()) for loss in losses]
    for trial in range(TRIALS):
        eta = lr_ub / GAMMA**trial
        copy = deepcopy(old)
        for head, h in zip(copy.heads.values(), own, strict=True):
            move(list(head.parameters()), h, eta)
        torch.set_rng_state(drawn)
        with torch.no_grad():
            after = [float(loss) for loss in copy.losses(z.detach() - eta * d.reshape(z.shape), x).values()]
        if holds(before, after, slopes, eta):
            through = torch.autograd.grad(z, list(model.encoder.parameters()), d.reshape(z.shape))
            move(list(copy.encoder.parameters()), flat(through), eta)
            take_over(model, copy)
            torch.set_rng_state(left)
            return Step(eta, trial + 1, before, after)
    raise AssertionError("the twin found no step")


@pytest.mark.parametrize(
    ("kind", "twin", "lr_ub", "modules", "steps"),
    [
        (Backtracking, classical, 1.0, True, 100),
        (Backtracking, classical, 1.0, False, 20),
        (FastBacktracking, fast, 10.0, True, 100),
        (FastBacktracking, fast, 10.0, False, 20),
    ],
)
def test_equal_to_its_twin(
    kind: Any,
    twin: Callable[..., Step],
    lr_ub: float,
    modules: bool,
    steps: int,
    net: Any,
    batch: Callable[[int], torch.Tensor],
) -> None:
    """Same steps, same statistics, same random state; whether modules are named or only their parameters."""
    slow = deepcopy(net)
    shared = net.encoder if modules else net.encoder.parameters()
    own = dict(net.heads.items()) if modules else net.heads.parameters()
    search = kind(
        detente.create("mgda"), shared, own, lr_ub, GAMMA, C, TRIALS, options=SearchOptions(check_steps=0)
    )
    trials, mine, twins = [], torch.manual_seed(7).get_state(), torch.manual_seed(7).get_state()
    for step in range(steps):
        x = batch(step)
        torch.set_rng_state(mine)
        found = search.step(net.closure(x))
        mine = torch.get_rng_state()
        torch.set_rng_state(twins)
        expected = twin(slow, x, lr_ub)
        twins = torch.get_rng_state()
        assert mine.equal(twins)
        assert (found.eta, found.trials) == (expected.eta, expected.trials)
        assert found.losses_before == pytest.approx(expected.before, rel=1e-9)
        assert found.losses_after == pytest.approx(expected.after, rel=1e-9)
        trials.append(found.trials)
        for (name, one), other in zip(net.state_dict().items(), slow.state_dict().values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=f"{name} at step {step}")
    assert len(set(trials)) > 1, f"every kind of search should occur: {sorted(set(trials))}"
    assert int(net.encoder[1].num_batches_tracked) == steps == int(net.heads["b"][1].num_batches_tracked)
