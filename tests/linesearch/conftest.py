"""A small network with everything that a search must hold still, and the closure of one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn


class Net(nn.Module):
    """Encoder and two heads, each with batch norm and dropout, in float64."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 8), nn.Tanh()
        )
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, 1))
                for task in ("a", "b")
            }
        )
        self.double()

    def losses(self, z: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        a = (self.heads["a"](z) - x[:, :1].sin()).square().mean()
        return {"a": a, "b": (self.heads["b"](z) - x[:, 1:2] * x[:, 2:3]).abs().mean()}

    def closure(self, x: torch.Tensor) -> Callable[..., Any]:
        def closure(features: Any = None) -> Any:
            z = self.encoder(x) if features is None else features
            return z, self.losses(z, x)

        return closure


@pytest.fixture
def net() -> Net:
    """The same network in every test."""
    torch.manual_seed(3)
    return Net()


@pytest.fixture
def batch() -> Callable[[int], torch.Tensor]:
    """Step number to a batch, without touching the global generator."""
    return lambda step: torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
