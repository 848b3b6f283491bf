"""What an analytic problem declares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch


class AnalyticProblem(ABC):
    """T losses of D numbers, with the facts about them that are known without running anything.

    Attributes:
        dimension: D.
        tasks: the T tasks' names.
        bounds: D pairs, the part of the space a picture shows.
        starts: points from which the published runs begin, D numbers each.

    Example:
        >>> from detente.problems import Toy
        >>> Toy().dimension, Toy().tasks
        (2, ('first', 'second'))
    """

    dimension: ClassVar[int]
    tasks: ClassVar[tuple[str, ...]]
    bounds: ClassVar[tuple[tuple[float, float], ...]]
    starts: ClassVar[tuple[tuple[float, ...], ...]]

    @abstractmethod
    def losses(self, theta: torch.Tensor) -> torch.Tensor:
        """[..., D] points to [..., T] losses, differentiable almost everywhere, in the dtype of ``theta``."""

    @property
    @abstractmethod
    def lower(self) -> torch.Tensor:
        """[T] float64, below every value of each loss."""

    @abstractmethod
    def optimum(self, preference: Sequence[float]) -> torch.Tensor:
        """[D] float64, where the sum of the losses weighted by ``preference`` is smallest."""

    @abstractmethod
    def pareto_set(self, points: int) -> torch.Tensor:
        """[points, D] float64 along the Pareto set, from the second task's optimum to the first's (T = 2)."""

    def front(self, points: int) -> torch.Tensor:
        """[points, T] float64, the losses along the Pareto set."""
        return self.losses(self.pareto_set(points))
