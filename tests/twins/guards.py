"""What the tests of the guards share: gradients, single steps, a small model whose every batch is drawn by number."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

import detente
from detente.methods.wrappers import EarlyTerminationWarning

NAMES = ("left", "right", "middle")


def drawn(seed: int, tasks: int = 3, columns: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** (torch.rand(tasks, 1, generator=generator, dtype=torch.float64) * 2 - 1)
    return torch.randn(tasks, columns, generator=generator, dtype=torch.float64) * scales


def statuses(method: detente.Method, matrices: Sequence[torch.Tensor]) -> list[str]:
    return [detente.combine(method, matrix).status for matrix in matrices]


def named(method: detente.Method, rows: dict[str, Sequence[float]]) -> detente.Combination:
    """One step with named tasks, of which some may be absent."""
    matrix = torch.tensor(list(rows.values()), dtype=torch.float64)
    return detente.combine(method, matrix, dict.fromkeys(rows, 1.0))


def ended(method: detente.Method) -> list[str]:
    """The messages of the warnings with which an epoch ends."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        method.end_epoch()
    assert all(issubclass(one.category, EarlyTerminationWarning) for one in caught)
    return [str(one.message) for one in caught]


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.trunk, self.last = torch.nn.Linear(3, 4), torch.nn.Linear(4, 4)
            self.heads = torch.nn.ModuleDict({name: torch.nn.Linear(4, 1) for name in NAMES})

    def forward(self, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        z = torch.tanh(self.last(torch.tanh(self.trunk(x))))
        targets = x.sin().T
        losses = {
            name: (head(z)[:, 0] - target).square().mean()
            for (name, head), target in zip(self.heads.items(), targets, strict=True)
        }
        return z, losses

    def shared(self) -> list[torch.nn.Parameter]:
        return [*self.trunk.parameters(), *self.last.parameters()]
