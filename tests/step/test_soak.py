"""Thousands of steps hold no more memory than the first hundred."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import detente
from detente.linesearch import Backtracking, FastBacktracking
from detente.optim import MAO

SETTLED = 300
TASKS = ("a", "b", "c")


class Net:
    """A trunk and three heads on batches of four."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.trunk = nn.Linear(3, 5)
        self.heads = nn.ModuleDict({task: nn.Linear(5, 1) for task in TASKS})
        self.draw = torch.Generator().manual_seed(1)
        self.all = [*self.trunk.parameters(), *self.heads.parameters()]

    def forward(self, absent: str | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        z = self.trunk(torch.randn(4, 3, generator=self.draw)).tanh()
        return z, {task: (head(z) - 1).square().mean() for task, head in self.heads.items() if task != absent}


def backward(method: str, *, features: bool = False, parts: int = 1, **options: Any) -> Callable[[Net], Any]:
    """A step of `detente.backward` and SGD; every fifth batch lacks a task."""

    def started(net: Net) -> Iterator[None]:
        made = detente.create(method, tasks=TASKS)
        optimizer = torch.optim.SGD(net.all, lr=1e-3)
        count = 0
        while True:
            with nullcontext() if parts == 1 else detente.accumulate(made, parts):
                for _ in range(parts):
                    z, losses = net.forward("b" if count % 5 == 4 else None)
                    detente.backward(losses, made, features=z if features else None, **options)
            optimizer.step()
            optimizer.zero_grad()
            count += 1
            if "epoch" in detente.methods()[method].needs and count % 10 == 0:
                made.end_epoch()
            yield

    return started


def mao(net: Net) -> Iterator[None]:
    optimizer = MAO(net.trunk.parameters(), net.heads.parameters(), tasks=TASKS)
    while True:
        optimizer.step(net.forward()[1])
        yield


def search(kind: Any) -> Callable[[Net], Any]:
    def started(net: Net) -> Iterator[None]:
        found = kind(detente.create("mgda"), net.trunk.parameters(), net.heads.parameters(), 0.1)
        while True:
            x = torch.randn(4, 3, generator=net.draw)

            def closure(features: Any = None, x: torch.Tensor = x) -> Any:
                z = net.trunk(x).tanh() if features is None else features
                return z, {task: (head(z) - 1).square().mean() for task, head in net.heads.items()}

            found.step(closure)
            yield

    return started


KINDS: dict[str, Callable[[Net], Any]] = {
    "exact": backward("aligned-mtl"),
    "features": backward("mgda", features=True),
    "low": backward("upgrad", memory="low"),
    "micro-batches": backward("cagrad", parts=2),
    "state of the gradients": backward("moco"),
    "a window of the past": backward("adaptive-mgda"),
    "weights of losses": backward("dwa"),
    "mao": mao,
    "backtracking": search(Backtracking),
    "fast": search(FastBacktracking),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_steps_hold_no_more_than_some_hundred(kind: str) -> None:
    torch.set_num_threads(1)
    last = 5000 if kind in ("exact", "features") else 1500
    looks = [SETTLED, *range(500, last + 1, 500)]
    steps = KINDS[kind](Net())
    held = []
    for count in range(last + 1):
        next(steps)
        if count in looks:
            held.append(_held())
    tensors, blocks = (list(row) for row in zip(*held, strict=True))
    assert max(tensors[1:]) <= tensors[0], f"tensors alive over the steps: {tensors}"
    # Caches elsewhere grow by some hundred; an object left behind at each step would be twice the limit.
    assert blocks[-1] - blocks[0] < (last - SETTLED) / 2, f"blocks of memory that Python holds: {blocks}"


def _held() -> tuple[int, int]:
    """Tensors alive, and blocks of memory that Python holds."""
    gc.collect()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    return tensors, sys.getallocatedblocks()
