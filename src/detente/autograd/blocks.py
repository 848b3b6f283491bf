"""The blocks of a Jacobian: one for each shared tensor, grouped into layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from detente.autograd.flat import Layout
from detente.autograd.gramian import gramian


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
        sizes=tuple(Layout((tensor,)).columns for tensor in tensors),
        layers=tuple(layers),
    )


def block_gramians(jacobian: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """[B, T, T] float64 on the Jacobian's device: one Gramian for each block of its columns [T, P].

    Example:
        >>> block_gramians(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), (1, 1)).tolist()
        [[[9.0, 3.0], [3.0, 1.0]], [[16.0, 0.0], [0.0, 0.0]]]
    """
    return torch.stack([gramian(piece) for piece in torch.split(jacobian, list(sizes), dim=1)])
