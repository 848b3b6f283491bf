"""Networks so small that every gradient is written down by hand, and ways to pack their losses into one tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from twins.worlds import Several, Sink

import detente

DOUBLE = torch.float64
Losses = list[torch.Tensor]


def number(value: float | Sequence[float]) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=DOUBLE))


def grad(tensor: torch.Tensor) -> list[float] | float | None:
    return None if tensor.grad is None else tensor.grad.tolist()


def refused_or(step: Callable[[], detente.StepRecord]) -> detente.StepRecord | str:
    """The record of a step, or the message with which it was refused."""
    try:
        return step()
    except (ValueError, RuntimeError) as error:
        return str(error)


class ByName(detente.Method):
    """Weights by the task's name, whoever else is there: shared parameters are told from own ones by them."""

    declares = detente.Declaration(name="by-name", source="a test", needs=frozenset({"gramian"}))

    def solve(self, gradients: detente.TaskGradients) -> detente.Combination:
        weights = [{"a": 2.0, "b": 3.0, "c": 5.0}[name] for name in gradients.names]
        return detente.Combination(weights=torch.tensor(weights, dtype=DOUBLE))


class ByNumber(ByName):
    """The same for tasks by number."""

    declares = detente.Declaration(name="by-number", source="a test", needs=frozenset({"gramian"}))

    def solve(self, gradients: detente.TaskGradients) -> detente.Combination:
        weights = [2.0 + int(name) for name in gradients.names]
        return detente.Combination(weights=torch.tensor(weights, dtype=DOUBLE))


def _filled(losses: Losses) -> Losses:
    table = torch.zeros(len(losses), dtype=DOUBLE)
    for at, loss in enumerate(losses):
        table[at] = loss
    return [table[at] for at in range(len(losses))]


FORMS: dict[str, Callable[[Losses], Losses]] = {
    "apart": lambda losses: losses,
    "filled": _filled,
    "stack": lambda losses: list(torch.stack(losses).unbind()),
    "list": lambda losses: list(torch.stack(losses)),
    "index": lambda losses: [torch.stack(losses)[at] for at in range(len(losses))],
    "cat": lambda losses: [part.sum() for part in torch.cat([loss[None] for loss in losses]).split(1)],
    "nested": lambda losses: list(torch.cat([torch.stack(losses[:1]), torch.stack(losses[1:])])),
    "scaled": lambda losses: list(torch.stack(losses) * torch.ones(len(losses), dtype=DOUBLE)),
    "masked": lambda losses: [(torch.stack(losses) * row).sum() for row in torch.eye(len(losses)).double()],
    "product": lambda losses: list(torch.eye(len(losses), dtype=DOUBLE) @ torch.stack(losses)),
    "broadcast": lambda losses: [torch.stack(losses).expand(2, -1)[1, at] for at in range(len(losses))],
    "function": lambda losses: list(Several.apply(*losses)),
    "sink": lambda losses: list(Sink.apply(None, *losses)),
    "vector": lambda losses: list(torch.stack([loss.expand(4) for loss in losses], 1).mean(0)),
}
PICKED = [form for form in FORMS if form != "apart"]


class Two(nn.Module):
    """z = w, losses (a z - 1)² and (b z - c)² at w = 1, a = 2, b = 1: d/dw = 4, d/da = 2; d/dw = d/db = 2 (1 - c)."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.w, self.a, self.b, self.c = number(1.0), number(2.0), number(1.0), c

    def losses(self, z: torch.Tensor | None = None) -> Losses:
        z = self.w * 1.0 if z is None else z
        return [(self.a * z - 1).square(), (self.b * z - self.c).square()]
