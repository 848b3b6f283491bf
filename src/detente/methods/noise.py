"""How far the gradients of single batches lie from their mean, followed from step to step; no method lives here."""

from __future__ import annotations

import numpy as np
import torch

# Columns are converted to float64 in chunks of about this many entries, so that no copy of the rows is made.
_CHUNK_ENTRIES = 1 << 17
_CHUNK_ENTRIES_ON_DEVICE = 1 << 25


def follow(
    mean: torch.Tensor, variance: torch.Tensor, rows: torch.Tensor, share: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let one more gradient of each task join the mean and the variance of those before it.

    With δ = g - mean and the share a of the new gradient: mean ← mean + a δ and variance ← (1 - a)(variance + a ‖δ‖²).
    With a = 1/n in the n-th step these are the plain mean and the mean squared distance from it (Welford 1962); with
    a = (1 - β) / (1 - β^n) they are the same with the weight β^(n-k) on the k-th gradient (West 1979). The two means of
    the textbook formula, mean ‖g‖² - ‖mean g‖², cancel where the noise is small beside the gradient; here only
    differences are squared, and they are taken in float64.

    Args:
        mean: [T, P] the means so far; any finite numbers where the share is 1.
        variance: [T] float64 on the device of ``mean``, the mean squared distances so far.
        rows: [T, P] the new gradients.
        share: [T] in (0, 1]; 1 starts anew.

    Returns:
        The new mean [T, P] and variance [T]; what was handed in stays as it is.

    Example:
        >>> mean, variance = torch.zeros(1, 2), torch.zeros(1, dtype=torch.float64)
        >>> for number, gradient in enumerate(([1.0, 0.0], [3.0, 0.0], [2.0, 3.0]), start=1):
        ...     mean, variance = follow(mean, variance, torch.tensor([gradient]), np.array([1 / number]))
        >>> mean, variance  # the distances are √2, √2 and 2
        (tensor([[2., 1.]]), tensor([2.6667], dtype=torch.float64))
    """
    tasks, columns = rows.shape
    entries = _CHUNK_ENTRIES if rows.device.type == "cpu" else _CHUNK_ENTRIES_ON_DEVICE
    width = max(1, entries // tasks)
    weight = torch.from_numpy(share).to(device=rows.device, dtype=torch.float64)
    moved, squares = torch.empty_like(mean), torch.zeros_like(variance)
    for start in range(0, columns, width):
        part = slice(start, start + width)
        old, new = mean[:, part].to(torch.float64), rows[:, part].to(torch.float64)
        moved[:, part] = torch.lerp(old, new, weight[:, None])
        squares += (new - old).square_().sum(dim=1)
    return moved, (1 - weight) * (variance + weight * squares)
