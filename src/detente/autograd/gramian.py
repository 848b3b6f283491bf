"""The Gramian of task gradients: float64 products of float32 rows, without a float64 copy of the matrix."""

from __future__ import annotations

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
