"""Slow and obvious: a small model, and the optimizers of detente.optim written out tensor by tensor, entry formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


class Model(nn.Module):
    """A trunk, a layer that only some tasks pass, and a head for each task; smooth, float64."""

    def __init__(self, names: str = "abc", seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh())
        self.detour = nn.Linear(5, 5)
        self.heads = nn.ModuleDict({name: nn.Linear(5, 2) for name in names})
        self.double()

    def losses(
        self, step: int, names: Sequence[str] | None = None, detour: str = "a"
    ) -> dict[str, torch.Tensor]:
        x = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        z = self.trunk(x)
        found = {}
        for place, name in enumerate(self.heads if names is None else names):
            inside = self.detour(z).tanh() + z if name in detour else z
            target = torch.sin((place + 1) * x[:, :2])
            found[name] = 10.0**place * (self.heads[name](inside) - target).square().mean()
        return found

    @property
    def shared(self) -> list[nn.Module]:
        return [self.trunk, self.detour]


def numbers(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Twin:
    """MAO in plain words: for each task and tensor m, v and a count; parameters move at the very end."""

    def __init__(
        self,
        shared: Sequence[torch.Tensor],
        own: Sequence[torch.Tensor] = (),
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        variant: str = "adam",
        bias_correction: str = "adam",
    ) -> None:
        self.shared, self.own = list(shared), list(own)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.variant, self.bias_correction = variant, bias_correction
        self.memory: dict[Any, tuple[torch.Tensor, torch.Tensor, int]] = {}

    def step(self, losses: Mapping[str, torch.Tensor]) -> None:
        gradients = {
            name: torch.autograd.grad(loss, [*self.shared, *self.own], retain_graph=True, allow_unused=True)
            for name, loss in losses.items()
        }
        for place, parameter in enumerate(self.shared):
            change = None
            for name in losses:
                gradient = gradients[name][place]
                if gradient is not None:
                    kind = "sgd" if self.variant == "sgd" else self.bias_correction
                    piece = self.contribution((name, place), gradient, kind)
                    change = piece if change is None else change + piece
            self.move(parameter, change)
        for place, parameter in enumerate(self.own, len(self.shared)):
            found = [gradients[name][place] for name in losses if gradients[name][place] is not None]
            self.move(parameter, self.contribution(place, sum(found), "adam") if found else None)

    def move(self, parameter: torch.Tensor, change: torch.Tensor | None) -> None:
        if change is not None:
            parameter.data = parameter.data - self.lr * self.weight_decay * parameter.data - change

    def contribution(self, key: Any, g: torch.Tensor, kind: str) -> torch.Tensor:
        beta1, beta2 = self.betas
        m, v, t = self.memory.get(key, (torch.zeros_like(g), torch.zeros_like(g), 0))
        m, v, t = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g, t + 1
        self.memory[key] = m, v, t
        if kind == "adam":
            return self.lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + self.eps)
        if kind == "none":
            return self.lr * m / (v.sqrt() + self.eps)
        if kind == "paper":  # equations 8 and 10
            return self.lr / (v + self.eps).sqrt() * m * (1 - beta2**t) / (1 - beta1**t)
        assert kind == "sgd"  # equations 8 and 9
        return self.lr / (v + self.eps).sqrt() * g


class TwinMTAdam:
    """MTAdam in plain words: norms, moments and counts for each task and tensor; own parameters as in the twin of MAO.

    In each tensor the anchor is the first of ``tasks`` that has ever reached it.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        shared: Sequence[torch.Tensor],
        own: Sequence[torch.Tensor] = (),
        lr: float = 1e-3,
        norm_beta: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.tasks, self.shared, self.own = list(tasks), list(shared), list(own)
        self.norm_beta, self.eps = norm_beta, eps
        self.adam = Twin((), own, lr=lr, eps=eps, weight_decay=weight_decay)
        self.norm: dict[Any, float] = {}
        self.m: dict[Any, Any] = {}
        self.v: dict[Any, Any] = {}
        self.t: dict[Any, int] = {}

    def step(self, losses: Mapping[str, torch.Tensor]) -> None:
        gradients = {
            name: torch.autograd.grad(loss, [*self.shared, *self.own], retain_graph=True, allow_unused=True)
            for name, loss in losses.items()
        }
        for place, parameter in enumerate(self.shared):
            here = [name for name in self.tasks if name in losses and gradients[name][place] is not None]
            for name in here:
                g, key = gradients[name][place], (name, place)
                self.t[key] = self.t.get(key, 0) + 1
                norm = math.sqrt(float(g.square().sum()))
                self.norm[key] = self.norm_beta * self.norm.get(key, 0.0) + (1 - self.norm_beta) * norm
                anchor = next((task, place) for task in self.tasks if (task, place) in self.norm)
                theirs, mine = (self.norm[one] / (1 - self.norm_beta ** self.t[one]) for one in (anchor, key))
                g = g * theirs / mine
                self.m[key] = 0.9 * self.m.get(key, 0.0) + 0.1 * g
                self.v[key] = 0.999 * self.v.get(key, 0.0) + 0.001 * g * g
            if here:
                hats = [self.v[name, place] / (1 - 0.999 ** self.t[name, place]) for name in here]
                denominator = torch.stack(hats).amax(dim=0).sqrt() + self.eps
                pieces = [self.m[name, place] / (1 - 0.9 ** self.t[name, place]) for name in here]
                self.adam.move(parameter, self.adam.lr * sum(pieces) / denominator)
        for place, parameter in enumerate(self.own, len(self.shared)):
            found = [gradients[name][place] for name in losses if gradients[name][place] is not None]
            self.adam.move(parameter, self.adam.contribution(place, sum(found), "adam") if found else None)
