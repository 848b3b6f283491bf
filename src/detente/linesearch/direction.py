"""Build the direction of one search: where the problem is solved, what every trial moves, and the slopes along it.

There are two: in the parameters, where a trial runs the whole network, and in the representation, where it runs the
heads alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import numpy as np
import torch

from detente.linesearch.armijo import Array, Slopes, slope_tolerance
from detente.linesearch.closure import check_graph, flat, like
from detente.linesearch.engine import Gradients, Losses, Solved
from detente.linesearch.moments import Preconditioner, State
from detente.linesearch.passes import Passes
from detente.values import Combination, TaskGradients

# Columns that are converted to float64 at once.
_CHUNK = 1 << 20


class Displacement:
    """Move parameters along their directions; they can always be put back, bit for bit.

    Args:
        pairs: parameter and direction; the directions of a parameter that occurs twice are added.

    Example:
        >>> theta = torch.tensor([1.0, 2.0])
        >>> moved = Displacement([(theta, torch.tensor([1.0, 0.0]))])
        >>> moved.to(0.5)
        >>> theta
        tensor([0.5000, 2.0000])
        >>> moved.back()
        >>> theta
        tensor([1., 2.])
    """

    def __init__(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        total = merged(pairs)
        self.parameters = list(total)
        self.directions = list(total.values())
        self._origin = [parameter.detach().clone() for parameter in self.parameters]

    def to(self, eta: float) -> None:
        """Move to θ - η d, from where the parameters stood at first."""
        self.back()
        if self.parameters:
            with torch.no_grad():
                torch._foreach_add_(self.parameters, self.directions, alpha=-eta)

    def back(self) -> None:
        """Put the parameters back where they stood at first."""
        if self.parameters:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self._origin)

    def away(self) -> bool:
        """Tell whether some parameter differs from where it stood at first; the device has to be waited for."""
        return any(
            not torch.equal(parameter, origin)
            for parameter, origin in zip(self.parameters, self._origin, strict=True)
        )


@dataclass(frozen=True)
class SharedSlopes:
    """Hold the slopes along the shared direction: on the host where the Gramian gives them, else on a device.

    Attributes:
        slopes: [T] inner products of the shared gradients with the direction.
        square: squared length of the direction.
    """

    slopes: Array | torch.Tensor
    square: float | torch.Tensor

    @classmethod
    def by_gramian(cls, gradients: TaskGradients, combination: Combination) -> SharedSlopes | None:
        """Compute them from the weights of a combination; None where these do not give its direction.

        Example:
            >>> gradients = TaskGradients(names=("a", "b"), gramian=np.array([[4.0, 1.0], [1.0, 9.0]]))
            >>> weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
            >>> shared = SharedSlopes.by_gramian(gradients, Combination(weights=weights))
            >>> shared.slopes.tolist(), round(shared.square, 12)
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
    def by_products(cls, jacobian: torch.Tensor, direction: torch.Tensor) -> SharedSlopes:
        """Compute them from the direction [P] itself."""
        length = torch.linalg.vector_norm(direction, dtype=torch.float64)
        return cls(row_products(jacobian, direction), length.square())

    @property
    def unread(self) -> list[torch.Tensor]:
        """Numbers that are still on a device."""
        if isinstance(self.slopes, torch.Tensor) and isinstance(self.square, torch.Tensor):
            return [*self.slopes, self.square]
        return []


@dataclass(frozen=True)
class Direction(ABC):
    """Hold what one search moves, and what is known of the slopes along it.

    Attributes:
        solved: gradients and decision.
        moved: the parameters that every trial moves.
        shared: slopes along the shared direction.
        own: T numbers on their devices, the slopes along the own parameters; on several processes what this rank's
            examples contribute to them.
        own_descends: True if it is known that none of them can be negative: each own parameter serves one task, and
            moves along that one's gradient.
        moments: of a preconditioner, to commit if the step is taken.
    """

    space: ClassVar[Literal["exact", "features"]]

    solved: Solved
    moved: Displacement
    shared: SharedSlopes
    own: Sequence[torch.Tensor]
    own_descends: bool
    moments: Mapping[int, State]

    @staticmethod
    @abstractmethod
    def first(passes: Passes) -> tuple[Any, Losses]:
        """Run the pass with a graph; return the representation and the losses whose gradients are taken."""

    @classmethod
    @abstractmethod
    def of(cls, solved: Solved, preconditioner: Preconditioner | None) -> Direction:
        """Make the direction of a step that the method did not refuse."""

    @property
    def unread(self) -> list[torch.Tensor]:
        """Numbers that are still on a device."""
        return [*self.shared.unread, *self.own]

    def slopes(self, numbers: Array) -> Slopes:
        """Compute the slopes from ``unread`` as it arrived on the host."""
        tasks = self.solved.gradients.tasks
        shared, square = self.shared.slopes, self.shared.square
        if self.shared.unread:
            shared, square, numbers = numbers[:tasks], numbers[tasks], numbers[tasks + 1 :]
        shared, gramian = np.asarray(shared), self.solved.gradients.gramian
        assert gramian is not None
        reached = (self.solved.combination.status != "stationary") & (gramian.diagonal() > 0)
        tolerance = slope_tolerance(np.sqrt(gramian.diagonal()), float(np.sqrt(float(square))), numbers)
        return Slopes(shared, numbers, tolerance, reached | (numbers != 0))

    @property
    def descends(self) -> bool:
        """Whether it is known, without reading anything from a device, that every loss falls."""
        if not self.own_descends or self.shared.unread:
            return False
        known = self.slopes(np.zeros(self.solved.gradients.tasks))
        return bool((known.shared > known.tolerance).all())

    @property
    def alike(self) -> int:
        """How many of ``unread``, from the first, are the same on every process."""
        return 0 if self.solved.in_parts else len(self.shared.unread)

    def check(self) -> None:  # noqa: B027, most have nothing to check
        """Refuse gradients that cannot be searched along."""

    @abstractmethod
    def losses_at(self, passes: Passes, eta: float) -> Losses:
        """Run what a trial runs at a distance ``eta``, the parameters moved already."""

    def rest(self, passes: Passes) -> Displacement | None:
        """Take what the trials left where it was and an accepted step moves too; None where there is nothing."""
        return None


@final
@dataclass(frozen=True)
class ParameterDirection(Direction):
    """Move the parameters; every trial runs the whole network."""

    space: ClassVar[Literal["exact", "features"]] = "exact"

    @staticmethod
    def first(passes: Passes) -> tuple[Any, Losses]:
        """Run the network."""
        return passes.first()

    @classmethod
    def of(cls, solved: Solved, preconditioner: Preconditioner | None) -> ParameterDirection:
        """Pair every parameter with what it moves along."""
        along, gradients = solved.direction, solved.own_gradients()
        shared, own = solved.shared_gradients(), list(merged(gradients).items())
        slopes = SharedSlopes.by_gramian(solved.gradients, solved.combination)
        moments: dict[int, State] = {}
        if preconditioner is not None:
            divided, moments = preconditioner.propose([*shared, *own])
            shared, own = divided[: len(shared)], divided[len(shared) :]
            if shared:
                slopes, along = None, _row(solved.columns, dict(shared))
        moved = Displacement([*shared, *own])
        return cls(
            solved,
            moved,
            slopes or _products(solved, along),
            own_products(solved.own, moved),
            preconditioner is None and _each_its_own(solved, gradients),
            moments,
        )

    def losses_at(self, passes: Passes, eta: float) -> Losses:
        """Run the whole network."""
        return passes.again()[1]


@final
@dataclass(frozen=True)
class FeatureDirection(Direction):
    """Move the representation and the heads; every trial runs the heads, and the encoder follows at the end.

    Attributes:
        pieces: the tensors of the representation, and the direction of each.
    """

    space: ClassVar[Literal["exact", "features"]] = "features"

    pieces: Sequence[tuple[torch.Tensor, torch.Tensor]]

    @staticmethod
    def first(passes: Passes) -> tuple[Any, Losses]:
        """Run the network, and where it draws random numbers the heads again: the trials repeat theirs."""
        features, losses = passes.first()
        flat(features)
        check_graph(features)
        return features, passes.first_of_heads(features) if passes.draws else losses

    @classmethod
    def of(cls, solved: Solved, preconditioner: Preconditioner | None) -> FeatureDirection:
        """Split the direction over the tensors of the representation; of all ranks' examples only one's own move."""
        assert preconditioner is None, "moments of a representation mean nothing"
        gradients, tensors = solved.own_gradients(), flat(solved.features)
        moved = Displacement(gradients)
        slopes = SharedSlopes.by_gramian(solved.gradients, solved.combination)
        pieces = torch.split(solved.local_direction, [tensor.numel() for tensor in tensors])
        return cls(
            solved,
            moved,
            slopes or _products(solved, solved.direction),
            own_products(solved.own, moved),
            _each_its_own(solved, gradients),
            {},
            [
                (tensor.detach(), piece.view(tensor.shape).to(tensor.device, tensor.dtype))
                for tensor, piece in zip(tensors, pieces, strict=True)
            ],
        )

    def check(self) -> None:
        """Refuse shared parameters that act past the representation."""
        if self.solved.past_features:
            raise ValueError(
                "some parameters named in shared= are reached past the representation, so that a move of it is not the "
                "whole step. Return every tensor by which the heads depend on shared parameters as features, or use "
                "Backtracking."
            )

    def losses_at(self, passes: Passes, eta: float) -> Losses:
        """Run the heads on the moved representation."""
        moved = [torch.sub(tensor, piece, alpha=eta) for tensor, piece in self.pieces]
        return passes.heads(like(self.solved.features, moved))

    def rest(self, passes: Passes) -> Displacement | None:
        """Take the encoder, by one backward through it."""
        if self.solved.combination.status == "stationary":
            return None
        passes.leave()  # the graph may hold buffers, which the trials rewound: they must be what its forward left
        return Displacement(self.solved.shared_gradients())


def merged(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[torch.Tensor, torch.Tensor]:
    """Map every parameter to its direction, dense; the directions of one that occurs twice are added.

    Example:
        >>> theta = torch.zeros(1)
        >>> merged([(theta, torch.ones(1)), (theta, torch.ones(1))])[theta]
        tensor([2.])
    """
    total: dict[torch.Tensor, torch.Tensor] = {}
    for parameter, direction in pairs:
        if direction.layout is not torch.strided:
            direction = direction.to_dense()
        total[parameter] = total[parameter] + direction if parameter in total else direction
    return total


def own_products(own: Sequence[Gradients], moved: Displacement) -> list[torch.Tensor]:
    """Multiply each task's own gradients with what they move along: T float64 scalars on their devices.

    Where a parameter is one task's own and moves along its plain gradient, that is the gradient's squared length.
    """
    along = dict(zip(moved.parameters, moved.directions, strict=True))
    products = []
    for task in own:
        total = torch.zeros((), dtype=torch.float64)
        for parameter, gradient in task:
            part = _inner(gradient, along[parameter])
            total = total.to(part.device) + part
        products.append(total)
    return products


def row_products(jacobian: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Multiply the rows of ``jacobian`` [T, P] with ``direction`` [P]: [T] float64 on its device.

    Example:
        >>> row_products(torch.eye(2), torch.tensor([3.0, 4.0])).tolist()
        [3.0, 4.0]
    """
    total = torch.zeros(jacobian.shape[0], dtype=torch.float64, device=jacobian.device)
    for start in range(0, jacobian.shape[1], _CHUNK):
        piece = slice(start, start + _CHUNK)
        total += jacobian[:, piece].to(torch.float64) @ direction[piece].to(torch.float64)
    return total


def _products(solved: Solved, direction: torch.Tensor | None) -> SharedSlopes:
    jacobian = solved.gradients.jacobian
    assert jacobian is not None and direction is not None
    return SharedSlopes.by_products(jacobian, direction)


def _each_its_own(solved: Solved, gradients: Gradients) -> bool:
    """Tell whether every own parameter serves one task alone, so that its move along that gradient raises no loss."""
    # On several processes the gradients are added up already, and no rank knows which tasks the others have.
    return solved.alone and len({parameter for parameter, _ in gradients}) == len(gradients)


def _row(columns: Sequence[torch.Tensor], pieces: Mapping[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """[P] one direction out of the pieces of the parameters, in the order of the Jacobian's columns."""
    return torch.cat(
        [_real(pieces[column] if column in pieces else torch.zeros_like(column)) for column in columns]
    )


def _real(tensor: torch.Tensor) -> torch.Tensor:
    """The entries as one vector of real numbers; a complex one counts twice."""
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).reshape(-1)


def _inner(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    if first is second:  # a plain gradient: no copies in float64
        length: torch.Tensor = torch.linalg.vector_norm(_real(first), dtype=torch.float64)
        return length.square()
    return row_products(_real(first)[None], _real(second))[0]
