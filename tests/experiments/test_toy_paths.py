"""Paths over the toy: Adam as torch's, starts that do not disturb each other, hooks, refusals, failures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import detente
from detente.experiments.toy_paths import descend
from detente.problems import Toy
from detente.values import Combination, TaskGradients

SEEN: list[tuple[Any, ...]] = []


class Probe(detente.Method):
    """Uniform weights, writing down what it is given.

    It refuses steps while the first coordinate's gradient is negative, if asked to.
    """

    declares = detente.Declaration(
        name="probe", source="this test", needs=frozenset({"losses", "gramian", "after_step"})
    )

    def __init__(self, *, refuse: bool = False, fail: bool = False) -> None:
        super().__init__()
        self.refuse, self.fail = refuse, fail

    def solve(self, gradients: TaskGradients) -> Combination:
        assert gradients.jacobian is not None
        SEEN.append(("solve", gradients.names, torch.tensor(gradients.losses), gradients.jacobian.clone()))
        if self.fail and float(gradients.jacobian.sum(0)[0]) < 0:
            raise ValueError("this probe was asked to fail")
        refused = self.refuse and float(gradients.jacobian.sum(0)[0]) < 0
        return Combination(weights=torch.ones(2, dtype=torch.float64), status="refused" if refused else "ok")

    def after_step(self, losses: Any) -> None:
        SEEN.append(("after", torch.tensor(losses, dtype=torch.float64)))

    def end_epoch(self) -> None:
        SEEN.append(("epoch",))


@pytest.fixture(autouse=True)
def _probe() -> Iterator[None]:
    detente.register(Probe)
    SEEN.clear()
    yield
    detente.unregister("probe")


def plain_loop(start: tuple[float, ...], weights: tuple[float, float], steps: int, lr: float) -> torch.Tensor:
    """[steps + 1, 2]: torch's own Adam on the weighted sum, one point."""
    point = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([point], lr=lr)
    path = [point.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        (Toy().losses(point) @ torch.tensor(weights, dtype=torch.float64)).backward()
        optimizer.step()
        path.append(point.detach().clone())
    return torch.stack(path)


def test_fixed_weights_are_a_plain_training_loop() -> None:
    found = descend(Toy(), "static", options={"weights": [0.3, 0.7]}, steps=60, lr=1e-2, stride=1)
    expected = torch.stack([plain_loop(start, (0.3, 0.7), 60, 1e-2) for start in Toy.starts])
    torch.testing.assert_close(found.paths, expected, rtol=1e-10, atol=1e-10)
    assert found.steps == tuple(range(61))
    assert found.refused == (0,) * 5
    assert found.stopped == (None,) * 5


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9])
def test_fixed_weights_end_at_the_declared_optimum(weight: float) -> None:
    weights = [weight, 1 - weight]
    found = descend(
        Toy(), "static", options={"weights": weights}, starts=[(9, -4), (-7.5, -4)], steps=400, lr=0.3
    )
    torch.testing.assert_close(found.paths[:, -1], Toy().optimum(weights).expand(2, 2), rtol=0, atol=1e-6)


def test_starts_do_not_disturb_each_other() -> None:
    """A method with memory: one start alone goes where it goes among five."""
    options = {"temperature": 0.5}
    together = descend(Toy(), "dwa", options=options, steps=50, lr=1e-2, stride=10, positive=True)
    for number, start in enumerate(Toy.starts):
        alone = descend(
            Toy(), "dwa", options=options, starts=[start], steps=50, lr=1e-2, stride=10, positive=True
        )
        torch.testing.assert_close(together.paths[number], alone.paths[0], rtol=1e-12, atol=1e-12)


def test_stride_keeps_the_last_point() -> None:
    found = descend(Toy(), "uniform", steps=25, stride=10)
    every = descend(Toy(), "uniform", steps=25, stride=1)
    assert found.steps == (0, 10, 20, 25)
    assert torch.equal(found.paths, every.paths[:, [0, 10, 20, 25]])


def test_methods_see_their_own_start() -> None:
    descend(Toy(), "probe", steps=2, stride=1, starts=[(9.0, -1.0), (-7.5, -0.5)])
    theta = torch.tensor([9.0, -1.0], dtype=torch.float64, requires_grad=True)
    losses = Toy().losses(theta)
    rows = [torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in losses]
    kind, names, seen, jacobian = SEEN[0]
    assert (kind, names) == ("solve", ("first", "second"))
    torch.testing.assert_close(seen, losses.detach())
    torch.testing.assert_close(jacobian, torch.stack(rows))


def test_hooks_are_called_in_order() -> None:
    path = descend(Toy(), "probe", steps=2, stride=1, starts=[(9.0, -1.0)]).paths[0]
    assert [entry[0] for entry in SEEN] == ["solve", "epoch", "after", "solve", "epoch"]
    torch.testing.assert_close(SEEN[2][1], Toy().losses(path[1]))


def test_raised_losses_are_positive_and_gradients_stay() -> None:
    plain = descend(Toy(), "probe", steps=1, starts=[(0.0, -8.0)])
    raised = descend(Toy(), "probe", steps=1, starts=[(0.0, -8.0)], positive=True)
    assert torch.equal(plain.paths, raised.paths)
    first, second = (entry for entry in SEEN if entry[0] == "solve")
    torch.testing.assert_close(second[2] - first[2], torch.full((2,), 21.0, dtype=torch.float64))
    assert torch.equal(first[3], second[3])


def test_a_refused_step_moves_nothing() -> None:
    """Left of the optimum the slope is negative there: that start is refused for ever, the other is not."""
    found = descend(Toy(), "probe", options={"refuse": True}, starts=[(-5, -8), (5, -8)], steps=20, lr=1e-2)
    assert torch.equal(found.paths[0], found.paths[0, :1].expand_as(found.paths[0]))
    torch.testing.assert_close(found.paths[1, -1], plain_loop((5, -8), (1, 1), 20, 1e-2)[-1])
    assert found.refused == (20, 0)
    assert "after" not in [entry[0] for entry in SEEN[:4]]


def test_steps_without_a_direction_are_counted() -> None:
    """On the way down the left bowl the two gradients are never opposite; on the Pareto set of mgda they are."""
    optimum = tuple(Toy().optimum((0.5, 0.5)).tolist())
    found = descend(Toy(), "mgda", starts=[optimum, (-5, -4)], steps=3, lr=1e-2)
    assert found.stationary == (3, 0)
    assert torch.equal(found.paths[0, 0], found.paths[0, -1])


def test_a_rejected_input_stops_that_start_and_says_why() -> None:
    found = descend(Toy(), "probe", options={"fail": True}, starts=[(-5, -8), (5, -8)], steps=5, lr=1e-2)
    assert found.stopped == ("this probe was asked to fail", None)
    assert torch.equal(found.paths[0, 0], found.paths[0, -1])
    assert not torch.equal(found.paths[1, 0], found.paths[1, -1])


@pytest.mark.parametrize("bad", [{"steps": 0}, {"stride": 0}, {"lr": 0.0}, {"lr": float("inf")}])
def test_bad_numbers_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give steps and stride >= 1 and a finite lr > 0"):
        descend(Toy(), "uniform", **bad)
