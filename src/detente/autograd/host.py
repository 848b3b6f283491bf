"""The single place where numbers leave the device: one copy for everything a step needs on the host."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TypeAlias

import numpy as np
import torch

Part: TypeAlias = torch.Tensor | Sequence[torch.Tensor]


def to_host(parts: Sequence[Part]) -> list[np.ndarray]:
    """Copy small tensors to the host as float64 arrays of the same shapes, in one transfer.

    Args:
        parts: tensors, or sequences of tensors of one number each; such a sequence becomes one vector.

    Example:
        >>> [array.tolist() for array in to_host([[torch.tensor(1.5), torch.tensor([2])], torch.eye(2)])]
        [[1.5, 2.0], [[1.0, 0.0], [0.0, 1.0]]]
    """
    lists = [[part] if isinstance(part, torch.Tensor) else part for part in parts]
    everything = [tensor for tensors in lists for tensor in tensors]
    if not everything:
        return [np.zeros(0) for _ in parts]
    if len(everything) == 1:  # a copy all the same: the method may keep it
        alone = everything[0].detach().to(torch.float64).cpu().clone().numpy()
        return [alone if part is everything[0] else alone.reshape(-1)[: len(part)] for part in parts]
    device = next((tensor.device for tensor in everything if not tensor.is_cpu), everything[0].device)
    alike = all(tensor.device == device and tensor.is_floating_point() for tensor in everything)
    with torch.no_grad():
        flat = []
        for part, tensors in zip(parts, lists, strict=True):
            if not alike:
                tensors = [tensor.to(device=device, dtype=torch.float64) for tensor in tensors]
            if isinstance(part, torch.Tensor):
                flat.append(tensors[0].reshape(-1))
            elif tensors:
                flat.append(torch.stack([one.reshape(()) if one.dim() else one for one in tensors]))
        numbers = torch.cat(flat).to(torch.float64).cpu().numpy()
    arrays, offset = [], 0
    for part in parts:
        shape = tuple(part.shape) if isinstance(part, torch.Tensor) else (len(part),)
        size = prod(shape)
        arrays.append(numbers[offset : offset + size].reshape(shape))
        offset += size
    return arrays
