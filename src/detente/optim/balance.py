"""How much each task pulls on each layer, as plain numbers of one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from detente.autograd.numbers import to_host


@dataclass(frozen=True)
class TaskBalance:
    """Mean absolute gradient and mean absolute contribution to the update, for each layer and task, in one step.

    These are the quantities of Figures 4 and 5 of Hervella et al. 2024: averaged over steps they show the balance
    layer by layer, averaged over layers its course in time. A layer is one tensor of shared parameters.

    Attributes:
        tasks: T names.
        layers: L names, see :class:`detente.optim.MAO` for where they come from.
        sizes: L numbers of entries.
        gradients: L rows of T mean absolute gradients, in units of loss per unit of parameter; 0 where a task does
            not reach a layer.
        contributions: L rows of T mean absolute contributions to the update, in units of the parameters, learning
            rate included and weight decay left out. Contributions of several tasks may cancel: they add up to the
            size of the update only where all have one sign.

    Example:
        >>> found = TaskBalance(("a", "b"), ("weight", "bias"), (3, 1), ((1.0, 4.0), (3.0, 0.0)), ((0.1, 0.1),) * 2)
        >>> found.mean_gradients
        (1.5, 3.0)
        >>> found.to_dict()["contributions"]
        [[0.1, 0.1], [0.1, 0.1]]
    """

    tasks: tuple[str, ...]
    layers: tuple[str, ...]
    sizes: tuple[int, ...]
    gradients: tuple[tuple[float, ...], ...]
    contributions: tuple[tuple[float, ...], ...]

    @property
    def mean_gradients(self) -> tuple[float, ...]:
        """T mean absolute gradients over all entries of all layers (Figure 5, left)."""
        return self._mean(self.gradients)

    @property
    def mean_contributions(self) -> tuple[float, ...]:
        """T mean absolute contributions over all entries of all layers (Figure 5, right)."""
        return self._mean(self.contributions)

    def to_dict(self) -> dict[str, Any]:
        """The record as lists of plain numbers and strings, for one line of JSON."""
        return {
            "tasks": list(self.tasks),
            "layers": list(self.layers),
            "sizes": list(self.sizes),
            "gradients": [list(row) for row in self.gradients],
            "contributions": [list(row) for row in self.contributions],
        }

    def _mean(self, rows: tuple[tuple[float, ...], ...]) -> tuple[float, ...]:
        entries = max(sum(self.sizes), 1)
        columns = zip(*rows, strict=True) if rows else [()] * len(self.tasks)
        return tuple(
            sum(size * value for size, value in zip(self.sizes, column, strict=True)) / entries
            if column
            else 0.0
            for column in columns
        )


class Gauge:
    """Collects the scalars of one step where they are computed, and copies them to the host once.

    Args:
        tasks: names.
        layers: shared parameters.
        name_of: gives a layer's name.
    """

    def __init__(
        self, tasks: Sequence[str], layers: Sequence[torch.Tensor], name_of: Callable[[torch.Tensor], str]
    ) -> None:
        self.tasks, self.layers = tuple(tasks), tuple(layers)
        self._names = tuple(name_of(layer) for layer in layers)
        self._row = {layer: row for row, layer in enumerate(layers)}
        self._cells: list[tuple[int, int, int]] = []
        self._scalars: list[torch.Tensor] = []

    def gradient(self, task: str, layer: torch.Tensor, mean: torch.Tensor) -> None:
        """Note the mean absolute gradient of a task in a layer."""
        self._note(0, task, layer, mean)

    def contribution(self, task: str, layer: torch.Tensor, mean: torch.Tensor) -> None:
        """Note the mean absolute contribution of a task in a layer."""
        self._note(1, task, layer, mean)

    def read(self) -> TaskBalance:
        """The record; cells nobody noted are 0."""
        return self.read_beside(())[0]

    def read_beside(self, scalars: Sequence[torch.Tensor]) -> tuple[TaskBalance, np.ndarray]:
        """The record, and further scalars that go to the host in the same copy."""
        table = np.zeros((2, len(self.layers), len(self.tasks)))
        values, further = to_host([self._scalars, scalars])
        for cell, value in zip(self._cells, values.tolist(), strict=True):
            table[cell] = value
        gradients, contributions = (tuple(tuple(row) for row in kind.tolist()) for kind in table)
        sizes = tuple(layer.numel() for layer in self.layers)
        return TaskBalance(self.tasks, self._names, sizes, gradients, contributions), further

    def _note(self, kind: int, task: str, layer: torch.Tensor, mean: torch.Tensor) -> None:
        self._cells.append((kind, self._row[layer], self.tasks.index(task)))
        self._scalars.append(mean)
