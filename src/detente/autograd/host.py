"""The single place where numbers leave the device: one copy for everything a step needs on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def to_host(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Copy small tensors to the host as float64 arrays of the same shapes, in one transfer.

    Example:
        >>> [array.tolist() for array in to_host([torch.tensor(1.5), torch.tensor([2, 3])])]
        [1.5, [2.0, 3.0]]
    """
    if not tensors:
        return []
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), tensors[0].device)
    pieces = [tensor.detach().reshape(-1) for tensor in tensors]
    if any(piece.device != device or not piece.is_floating_point() for piece in pieces):
        pieces = [piece.to(device=device, dtype=torch.float64) for piece in pieces]
    numbers = torch.cat(pieces).to(torch.float64).cpu().numpy()
    arrays, offset = [], 0
    for tensor in tensors:
        arrays.append(numbers[offset : offset + tensor.numel()].reshape(tensor.shape))
        offset += tensor.numel()
    return arrays
