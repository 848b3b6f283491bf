"""The Gramian of task gradients: float64 products of float32 rows, without a float64 copy of the matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Columns are converted in chunks of about this many entries. On the CPU small enough to stay in a core's cache, large
# enough that the loop in Python does not show; elsewhere large enough to keep the device busy.
_CHUNK_ENTRIES = 1 << 17
_CHUNK_ENTRIES_ON_DEVICE = 1 << 25
# The product of a few long rows is read faster in pieces of this many columns than as one skinny matrix product.
_PIECE = 1024
_FEW_TASKS = 8


def gramian(jacobian: torch.Tensor) -> torch.Tensor:
    """The T×T matrix of inner products of the rows of ``jacobian`` [T, P], in float64 on its device.

    Rows in float32 (or shorter) are converted before they are multiplied: their products overflow float32 above
    1e19 and lose the small tasks beside the large ones.

    Example:
        >>> gramian(torch.tensor([[3.0, 4.0], [1.0, 0.0]])).tolist()
        [[25.0, 3.0], [3.0, 1.0]]
    """
    tasks, columns = jacobian.shape
    entries = _CHUNK_ENTRIES if jacobian.device.type == "cpu" else _CHUNK_ENTRIES_ON_DEVICE
    width = max(1, entries // max(tasks, 1))
    if columns <= width or jacobian.dtype == torch.float64:
        rows = jacobian.to(torch.float64)
        return rows @ rows.T
    width = max(1, width // _PIECE) * _PIECE
    total = torch.zeros(tasks, tasks, dtype=torch.float64, device=jacobian.device)
    buffer = torch.empty(tasks, width, dtype=torch.float64, device=jacobian.device)
    for start in range(0, columns, width):
        piece = jacobian[:, start : start + width]
        chunk = buffer[:, : piece.shape[1]]
        chunk.copy_(piece)
        if tasks <= _FEW_TASKS and chunk.shape[1] % _PIECE == 0:
            pieces = chunk.view(tasks, -1, _PIECE).transpose(0, 1)
            total += torch.bmm(pieces, pieces.transpose(1, 2)).sum(dim=0)
        else:
            total.addmm_(chunk, chunk.T)
    return total


@dataclass(frozen=True)
class Blocks:
    """B blocks in the order of the Jacobian's columns.

    Attributes:
        names: position and shape of each tensor.
        sizes: how many columns each has.
        layers: which layer each belongs to, counted from 0.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    layers: tuple[int, ...]


def blocks_of(tensors: Sequence[torch.Tensor]) -> Blocks:
    """One block for each tensor.

    A tensor with two or more dimensions starts a layer; one with fewer (a bias, a normalisation's scale) belongs to
    the layer before it. The very first tensor starts a layer in any case.

    Example:
        >>> blocks_of([torch.ones(4, 3), torch.ones(4), torch.ones(2, 4)])
        Blocks(names=('0 [4, 3]', '1 [4]', '2 [2, 4]'), sizes=(12, 4, 8), layers=(0, 0, 1))
    """
    layers: list[int] = []
    for tensor in tensors:
        layers.append(layers[-1] + (tensor.dim() >= 2) if layers else 0)
    return Blocks(
        names=tuple(f"{position} {list(tensor.shape)}" for position, tensor in enumerate(tensors)),
        sizes=tuple(tensor.numel() * (2 if tensor.is_complex() else 1) for tensor in tensors),
        layers=tuple(layers),
    )


def block_gramians(jacobian: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """[B, T, T] float64 on the Jacobian's device: one Gramian for each block of its columns [T, P].

    Example:
        >>> block_gramians(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), (1, 1)).tolist()
        [[[9.0, 3.0], [3.0, 1.0]], [[16.0, 0.0], [0.0, 0.0]]]
    """
    return torch.stack([gramian(piece) for piece in torch.split(jacobian, list(sizes), dim=1)])
