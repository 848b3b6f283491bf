"""Losses as a caller hands them over, and what may be wrong with them. Every message names the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

Losses: TypeAlias = Mapping[str, torch.Tensor] | Sequence[torch.Tensor]


def values_of(losses: Mapping[str, Any] | Sequence[Any]) -> list[Any]:
    """Return the losses without their names, in order."""
    return list(losses.values()) if isinstance(losses, Mapping) else list(losses)


def check_scalar(name: str, loss: torch.Tensor) -> None:
    """Check that a loss is one real number.

    Raises:
        ValueError: it is not; the task is named.
    """
    if loss.numel() != 1:
        raise ValueError(f"the loss of task {name!r} has shape {tuple(loss.shape)}; reduce it to a scalar.")
    if loss.is_complex():
        raise ValueError(f"the loss of task {name!r} is complex; a loss is a real number.")
