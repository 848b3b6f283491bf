"""The Gramian of task gradients: float64 products of float32 rows, without a float64 copy of the matrix."""

from __future__ import annotations

import torch

# Columns are converted in chunks of about this many entries: small enough to stay in a core's cache, large enough
# that the loop in Python does not show.
_CHUNK_ENTRIES = 1 << 17


def gramian(jacobian: torch.Tensor) -> torch.Tensor:
    """The T×T matrix of inner products of the rows of ``jacobian`` [T, P], in float64 on its device.

    Rows in float32 (or shorter) are converted before they are multiplied: their products overflow float32 above
    1e19 and lose the small tasks beside the large ones.

    Example:
        >>> gramian(torch.tensor([[3.0, 4.0], [1.0, 0.0]])).tolist()
        [[25.0, 3.0], [3.0, 1.0]]
    """
    tasks, columns = jacobian.shape
    if jacobian.dtype == torch.float64:
        return jacobian @ jacobian.T
    width = max(1, _CHUNK_ENTRIES // max(tasks, 1))
    total = torch.zeros(tasks, tasks, dtype=torch.float64, device=jacobian.device)
    buffer = torch.empty(tasks, min(width, columns), dtype=torch.float64, device=jacobian.device)
    for start in range(0, columns, width):
        piece = jacobian[:, start : start + width]
        chunk = buffer[:, : piece.shape[1]]
        chunk.copy_(piece)
        total.addmm_(chunk, chunk.T)
    return total
