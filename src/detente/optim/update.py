"""One step under way: which task reached which parameter, and what is summed up so far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from detente.optim.balance import Gauge


@dataclass
class Update:
    """One step under way.

    Attributes:
        group_of: the group of every parameter.
        gauge: collects contributions, None if they are not measured.
        touched: shared parameters some task's moments took a gradient of, each with those tasks.
        own: task-specific parameters with the sum of their gradients.
        owner: a task that reached each of them.
        taken: the tasks whose gradients were taken.
    """

    group_of: dict[torch.Tensor, dict[str, Any]]
    gauge: Gauge | None
    touched: dict[torch.Tensor, list[str]] = field(default_factory=dict)
    own: dict[torch.Tensor, torch.Tensor] = field(default_factory=dict)
    owner: dict[torch.Tensor, str] = field(default_factory=dict)
    taken: list[str] = field(default_factory=list)

    def groups(self) -> Iterable[tuple[dict[str, Any], list[torch.Tensor]]]:
        """Give the parameters that move, group by group."""
        found: dict[int, tuple[dict[str, Any], list[torch.Tensor]]] = {}
        for parameter in (*self.touched, *self.own):
            group = self.group_of[parameter]
            found.setdefault(id(group), (group, []))[1].append(parameter)
        return found.values()
