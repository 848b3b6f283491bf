"""Laws about real models: every parameter moves, and the tasks get better."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from laws.given import SPACES, Subject
from torch import nn
from torch.nn import functional as F

import detente

Batch = tuple[torch.Tensor, dict[str, torch.Tensor]]


@cache
def digits() -> list[Batch]:
    """Nine batches of real MultiMNIST composites from the digits inside the package."""
    from detente.data import load_multimnist

    pairs = load_multimnist(None, size=28, seed=0).train.take(9 * 32)
    return [pairs.batch(slice(start, start + 32)) for start in range(0, 9 * 32, 32)]


def train(
    one: Subject,
    space: str,
    model: Any,
    losses_of: Callable[[Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    batches: list[Batch],
    steps: int,
    *,
    optimizer: torch.optim.Optimizer,
) -> list[detente.StepRecord]:
    """A small training loop with every hook the method declares, and nothing else."""
    method = one.make()
    records = []
    for count in range(steps):
        taken = [batches[(count * one.batches + offset) % len(batches)] for offset in range(one.batches)]
        features, losses = losses_of(taken[0])
        how: dict[str, Any] = {}
        if one.batches > 1 and space != "features":  # two batches have no representation in common
            how["extra"] = [losses_of(batch)[1] for batch in taken[1:]]
        if space == "features":
            how["features"] = features
        elif space == "layer":
            how["solve_on"] = model.last_shared_parameters()
        records.append(detente.backward(losses, method, **how))
        if records[-1].accepted:
            optimizer.step()
        optimizer.zero_grad()
        if "after_step" in one.info.needs:
            with torch.no_grad():
                method.after_step(losses_of(taken[0])[1])
        if "epoch" in one.info.needs and count % 2 == 1:
            method.end_epoch()
    return records


class SmallMLP(nn.Module):
    """Three regressions on one trunk; torch modules a reader knows."""

    tasks = ("sine", "product", "norm")

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(8, 1) for task in self.tasks})

    def last_shared_parameters(self) -> list[nn.Parameter]:
        return list(self.trunk[2].parameters())

    def losses(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        inputs, targets = batch
        features = self.trunk(inputs)
        scales = {"sine": 1.0, "product": 5.0, "norm": 0.2}
        return features, {
            task: scales[task] * F.mse_loss(self.heads[task](features).squeeze(1), targets[task])
            for task in self.tasks
        }


@cache
def regressions() -> list[Batch]:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(6, 64, 4, generator=generator)
    return [
        (x, {"sine": torch.sin(x[:, 0] + x[:, 1]), "product": x[:, 0] * x[:, 2], "norm": x.norm(dim=1)})
        for x in inputs
    ]


def law_every_parameter_of_a_lenet_moves(one: Subject) -> None:
    """Three steps on real digits move every tensor, shared and own, in every declared space."""
    from detente.models import LeNet

    for space in (space for space in SPACES if space in one.info.spaces):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LeNet(size=28, dropout=0.0)

            def losses_of(batch: Batch, model: LeNet = model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                output = model(batch[0])
                return output.features, {
                    task: F.cross_entropy(output.predictions[task], batch[1][task])
                    for task in ("left", "right")
                }

            _moves(one, space, model, losses_of, digits())


def law_every_parameter_of_an_mlp_moves(one: Subject) -> None:
    """Three steps on three regressions move every tensor, in every declared space."""
    for space in (space for space in SPACES if space in one.info.spaces):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = SmallMLP()
            _moves(one, space, model, model.losses, regressions())


def _moves(one: Subject, space: str, model: nn.Module, losses_of: Any, batches: list[Batch]) -> None:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    records = train(
        one, space, model, losses_of, batches, 3, optimizer=torch.optim.SGD(model.parameters(), lr=0.05)
    )
    assert any(record.accepted for record in records), f"{one.label} in {space} refused every step"
    expected = space if one.info.takes_gradients else "none"
    assert records[0].space == expected, f"{one.label}: {records[0].space}, not {expected}"
    # A method that looks at gradients only now and then takes none in between.
    assert {record.space for record in records} <= {expected, "none"}, f"{one.label}: {records}"
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), f"{one.label} in {space}: {name} is not finite"
        assert not torch.equal(parameter, before[name]), f"{one.label} in {space}: {name} did not move"


def law_the_tasks_get_better(one: Subject) -> None:
    """Forty steps of Adam on the shared part lower the mean of the losses, each relative to its start.

    Adam is blind to a method's native scale; the heads keep still, so that the method alone does the work.
    """
    spaces = [space for space in SPACES if space in one.info.spaces]
    for space in spaces if one.info.takes_gradients else spaces[:1]:  # a weighting of losses sees no space
        with torch.random.fork_rng():
            torch.manual_seed(2)
            model = SmallMLP()
            with torch.no_grad():
                start = model.losses(regressions()[0])[1]
            optimizer = torch.optim.Adam(model.trunk.parameters(), lr=0.01)
            train(one, space, model, model.losses, regressions(), 40, optimizer=optimizer)
            with torch.no_grad():
                end = model.losses(regressions()[0])[1]
            relative = sum(float(end[task] / start[task]) for task in start) / len(start)
            assert relative < 0.9, f"{one.label} in {space}: the losses end at {relative:.2f} of their start"
