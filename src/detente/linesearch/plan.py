"""A direction to search along, and what is known of the losses' slopes along it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from detente.autograd.measure import Taken
from detente.linesearch.armijo import Array
from detente.linesearch.moments import State
from detente.linesearch.moves import Moves
from detente.values import Combination


@dataclass
class Plan:
    """What one search moves, and along what.

    Attributes:
        taken, combination: what the method saw and decided, the direction filled in.
        epsilon: [T] machine epsilons of the losses' dtypes.
        moves: the parameters that every trial moves.
        shared_slopes: [T] slopes along the shared direction: on the host where the Gramian gives them, else on the
            device of the gradients until they are read.
        own_slopes: T numbers on their devices, the slopes along the own parameters.
        own_falls: True if none of them can be negative: each own parameter moves along its own task's gradient.
        features: the representation as the closure gave it; None for the search in the parameters.
        along: its tensors, and the direction of each.
        moments: to commit if the step is taken.
        slopes: [T] the sum of both, once they are on the host.
    """

    taken: Taken
    combination: Combination
    epsilon: Array
    moves: Moves
    shared_slopes: Array | torch.Tensor
    own_slopes: list[torch.Tensor]
    own_falls: bool
    features: Any = None
    along: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    moments: dict[int, State] = field(default_factory=dict)
    slopes: Array | None = None

    @property
    def before(self) -> Array:
        """[T] losses where the step began."""
        losses = self.taken.gradients.losses
        assert losses is not None
        return losses

    @property
    def unread(self) -> list[torch.Tensor]:
        """Slopes that are still on a device, number by number."""
        if self.slopes is not None:
            return []
        on_host = isinstance(self.shared_slopes, np.ndarray)
        return self.own_slopes if on_host else [*self.shared_slopes, *self.own_slopes]

    def read(self, numbers: Array) -> None:
        """Take ``unread`` as it arrived on the host."""
        if self.slopes is None:
            if not isinstance(self.shared_slopes, np.ndarray):
                self.shared_slopes, numbers = numbers[: len(self.before)], numbers[len(self.before) :]
            self.slopes = self.shared_slopes + numbers

    @property
    def descends(self) -> bool:
        """True if it is known, without reading anything from a device, that every loss falls."""
        known = self.own_falls and isinstance(self.shared_slopes, np.ndarray)
        return known and bool((np.asarray(self.shared_slopes) > 0).all())

    def moved(self) -> np.ndarray:
        """[T] True where the gradient of a task does not vanish on what moves."""
        assert self.slopes is not None and self.taken.gradients.gramian is not None
        shared = (self.combination.status != "stationary") & (self.taken.gradients.gramian.diagonal() > 0)
        return np.asarray(shared | (self.slopes != self.shared_slopes))


def epsilons(losses: list[torch.Tensor]) -> Array:
    """[T] the machine epsilon of each loss's dtype.

    Example:
        >>> epsilons([torch.ones((), dtype=torch.float64)]).tolist()
        [2.220446049250313e-16]
    """
    return np.array([torch.finfo(loss.dtype).eps for loss in losses])
