"""A direction to search along, and what is known of the losses' slopes along it."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from detente.autograd.measure import Taken
from detente.linesearch.armijo import Array, ascends, slope_tolerance
from detente.linesearch.moments import State
from detente.linesearch.moves import Moves, shared_products
from detente.values import Combination, TaskGradients


@dataclass(frozen=True)
class Along:
    """What is known of the shared direction: on the host where the Gramian tells it, else on the gradients' device.

    Attributes:
        slopes: [T] inner products of the shared gradients with the direction.
        square: squared length of the direction.
    """

    slopes: Array | torch.Tensor
    square: float | torch.Tensor

    @classmethod
    def by_gramian(cls, gradients: TaskGradients, combination: Combination) -> Along | None:
        """From the weights of a combination; None where they do not give its direction.

        Example:
            >>> gradients = TaskGradients(names=("a", "b"), gramian=np.array([[4.0, 1.0], [1.0, 9.0]]))
            >>> weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
            >>> found = Along.by_gramian(gradients, Combination(weights=weights))
            >>> found.slopes.tolist(), round(found.square, 12)
            ([2.5, 5.0], 3.75)
        """
        if combination.status == "stationary":
            return cls(np.zeros(gradients.tasks), 0.0)
        if combination.weights is None or combination.direction is not None:
            return None
        assert gradients.gramian is not None
        weights = combination.weights.numpy()
        slopes = np.asarray(gradients.gramian @ weights)
        return cls(slopes, max(float(weights @ slopes), 0.0))

    @classmethod
    def by_products(cls, jacobian: torch.Tensor, direction: torch.Tensor) -> Along:
        """From the direction itself."""
        length = torch.linalg.vector_norm(direction, dtype=torch.float64)
        return cls(shared_products(jacobian, direction), length.square())

    @property
    def length(self) -> float:
        """Of the direction, once it is on the host."""
        return float(np.sqrt(float(self.square)))

    @property
    def unread(self) -> list[torch.Tensor]:
        """Numbers that are still on a device."""
        if isinstance(self.slopes, torch.Tensor) and isinstance(self.square, torch.Tensor):
            return [*self.slopes, self.square]
        return []


@dataclass
class Plan:
    """What one search moves, and along what.

    Attributes:
        taken, combination: what the method saw and decided, the direction filled in.
        before: [T] losses where the step began.
        epsilon: [T] machine epsilons of the losses' dtypes.
        moves: the parameters that every trial moves.
        along_shared: slopes along the shared direction, and its length.
        own_slopes: T numbers on their devices, the slopes along the own parameters; on several processes what this
            rank's examples contribute to them.
        own_falls: True if it is known that none of them can be negative: each own parameter moves along its own
            task's gradient.
        in_parts: True if ``along_shared``, while it is unread, is of this rank's part of the direction.
        features: the representation as the closure gave it; None for the search in the parameters.
        along: its tensors, and the direction of each.
        moments: to commit if the step is taken.
        slopes: [T] the sum of both, once they are on the host.
    """

    taken: Taken
    combination: Combination
    before: Array
    epsilon: Array
    moves: Moves
    along_shared: Along
    own_slopes: list[torch.Tensor]
    own_falls: bool
    in_parts: bool
    features: Any = None
    along: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    moments: dict[int, State] = field(default_factory=dict)
    slopes: Array | None = None

    @property
    def shared_slopes(self) -> Array:
        """[T] the part of the slopes that the shared direction contributes, once it is on the host."""
        return np.asarray(self.along_shared.slopes)

    @property
    def unread(self) -> list[torch.Tensor]:
        """Numbers that are still on a device."""
        return [] if self.slopes is not None else [*self.along_shared.unread, *self.own_slopes]

    def read(self, numbers: Array) -> None:
        """Take ``unread`` as it arrived on the host."""
        if self.slopes is None:
            if self.along_shared.unread:
                tasks = len(self.before)
                self.along_shared = Along(numbers[:tasks], float(numbers[tasks]))
                numbers = numbers[tasks + 1 :]
            self.slopes = self.shared_slopes + numbers

    @property
    def descends(self) -> bool:
        """True if it is known, without reading anything from a device, that every loss falls."""
        if not self.own_falls or self.along_shared.unread:
            return False
        return bool((self.shared_slopes > self.tolerance(np.zeros(len(self.before)))).all())

    def tolerance(self, own: Array) -> Array:
        """[T] up to where a slope counts as zero, from what the own parameters contribute; read everything first."""
        gramian = self.taken.gradients.gramian
        assert gramian is not None
        return slope_tolerance(np.sqrt(gramian.diagonal()), self.along_shared.length, own)

    def moved(self) -> np.ndarray:
        """[T] True where the gradient of a task does not vanish on what moves."""
        assert self.slopes is not None and self.taken.gradients.gramian is not None
        shared = (self.combination.status != "stationary") & (self.taken.gradients.gramian.diagonal() > 0)
        return np.asarray(shared | (self.slopes != self.shared_slopes))

    def flat(self) -> np.ndarray:
        """[T] True where the slope is zero up to rounding."""
        assert self.slopes is not None
        return np.asarray(np.abs(self.slopes) <= self.tolerance(self.slopes - self.shared_slopes))

    def against(self, moved: np.ndarray) -> np.ndarray:
        """[T] True where a task that moves does not fall."""
        assert self.slopes is not None
        return ascends(self.slopes, moved, self.tolerance(self.slopes - self.shared_slopes))


def epsilons(losses: list[torch.Tensor]) -> Array:
    """[T] the machine epsilon of each loss's dtype.

    Example:
        >>> epsilons([torch.ones((), dtype=torch.float64)]).tolist()
        [2.220446049250313e-16]
    """
    return np.array([torch.finfo(loss.dtype).eps for loss in losses])


def falls(taken: Taken, gradients: Sequence[object], moved: Sized) -> bool:
    """True if no own parameter's move can raise a loss: each serves one task, and moves along that one's gradient.

    Args:
        taken: what the method saw.
        gradients: one for each own parameter and task that reaches it.
        moved: the own parameters, each once.
    """
    # On several processes the gradients are added up already, and no rank knows which tasks the others have.
    return taken.graph.reduction is None and len(moved) == len(gradients)
