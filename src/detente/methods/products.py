"""Inner products of parameter-sized rows, for methods that keep such rows; no method lives here."""

from __future__ import annotations

import numpy as np
import torch

# Columns are converted to float64 in chunks of about this many entries, so that no copy of the rows is made.
_CHUNK_ENTRIES = 1 << 17


def inner_products(left: torch.Tensor, right: torch.Tensor) -> np.ndarray:
    """[T, S] float64 on the host: inner products of the rows of ``left`` [T, P] with those of ``right`` [S, P].

    Products are taken in float64: in float32 they overflow above 1e19 and lose small tasks beside large ones.

    Example:
        >>> inner_products(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        array([[3., 8.]])
    """
    width = max(1, _CHUNK_ENTRIES // (len(left) + len(right)))
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for start in range(0, left.shape[1], width):
        columns = slice(start, start + width)
        one = left[:, columns].to(torch.float64)
        other = one if left is right else right[:, columns].to(torch.float64)
        total.addmm_(one, other.T)
    return total.cpu().numpy()
