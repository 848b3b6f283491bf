"""Parameters, where they stand, and what they move along; inner products of gradients with a move."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

Gradients = Sequence[tuple[torch.Tensor, torch.Tensor]]

# Columns that are converted to float64 at once.
_CHUNK = 1 << 20


class Moves:
    """Parameters and the directions they are moved along; they can always be put back, bit for bit.

    Where the caller's ``torch.autocast`` encloses the whole step, the copies in half precision that it caches of the
    parameters would outlive a move: going back, with which every move begins, drops them.

    Args:
        pairs: parameter and direction; the directions of a parameter that occurs twice are added.

    Example:
        >>> theta = torch.tensor([1.0, 2.0])
        >>> moves = Moves([(theta, torch.tensor([1.0, 0.0]))])
        >>> moves.to(0.5)
        >>> theta
        tensor([0.5000, 2.0000])
        >>> moves.back()
        >>> theta
        tensor([1., 2.])
    """

    def __init__(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        total = merged(pairs)
        self.parameters = list(total)
        self.directions = list(total.values())
        self._origin = [parameter.detach().clone() for parameter in self.parameters]

    def to(self, eta: float) -> None:
        """θ - η d, from where the parameters stood at first."""
        self.back()
        if self.parameters:
            with torch.no_grad():
                torch._foreach_add_(self.parameters, self.directions, alpha=-eta)

    def back(self) -> None:
        """The parameters as they stood at first."""
        if self.parameters:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self._origin)
            torch.clear_autocast_cache()

    def away(self) -> bool:
        """True if some parameter differs from where it stood at first; the device has to be waited for."""
        return any(
            not torch.equal(parameter, origin)
            for parameter, origin in zip(self.parameters, self._origin, strict=True)
        )


def merged(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[torch.Tensor, torch.Tensor]:
    """Parameter to direction, dense; the directions of a parameter that occurs twice are added.

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


def own_products(own: Sequence[Gradients], moves: Moves) -> list[torch.Tensor]:
    """For each task a float64 scalar on its device: the inner product of its own gradients with what they move along.

    Where a parameter is one task's own and moves along its plain gradient, that is the gradient's squared length.
    """
    along = dict(zip(moves.parameters, moves.directions, strict=True))
    found = []
    for task in own:
        total = torch.zeros((), dtype=torch.float64)
        for parameter, gradient in task:
            part = _inner(gradient, along[parameter])
            total = total.to(part.device) + part
        found.append(total)
    return found


def shared_products(jacobian: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """[T] float64 inner products of the rows of ``jacobian`` [T, P] with ``direction`` [P], on its device.

    Example:
        >>> shared_products(torch.eye(2), torch.tensor([3.0, 4.0])).tolist()
        [3.0, 4.0]
    """
    total = torch.zeros(jacobian.shape[0], dtype=torch.float64, device=jacobian.device)
    for start in range(0, jacobian.shape[1], _CHUNK):
        piece = slice(start, start + _CHUNK)
        total += jacobian[:, piece].to(torch.float64) @ direction[piece].to(torch.float64)
    return total


def real(tensor: torch.Tensor) -> torch.Tensor:
    """The entries as one vector of real numbers; a complex one counts twice."""
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).reshape(-1)


def _inner(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    if first is second:  # a plain gradient: no copies in float64
        length: torch.Tensor = torch.linalg.vector_norm(real(first), dtype=torch.float64)
        return length.square()
    return shared_products(real(first)[None], real(second))[0]
