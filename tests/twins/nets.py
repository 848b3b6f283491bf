"""A small model with a trunk and three heads, and the options that solve on each of its spaces."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SPACES = ("exact", "features", "layer")


class Net(nn.Module):
    """A trunk and three heads in float64; ``tied`` lets the first head use the trunk's first weight again."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.heads = nn.ModuleDict({name: nn.Linear(4, 2) for name in "abc"})
        self.tied = tied
        self.double()
        self.x = torch.randn(5, 4, dtype=torch.float64)

    def losses(self, names: str = "abc") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        z = self.last(self.first(self.x).tanh()).sin()
        around = nn.functional.linear(z, self.first.weight) if self.tied else z
        return z, {name: (self.heads[name](around) - len(name)).square().mean() for name in names}

    @property
    def trunk(self) -> list[torch.Tensor]:
        return [*self.first.parameters(), *self.last.parameters()]


def options_for(space: str, net: Net, z: torch.Tensor) -> dict[str, Any]:
    return {"features": {"features": z}, "layer": {"solve_on": net.last}}.get(space, {})


def grads(module: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]
