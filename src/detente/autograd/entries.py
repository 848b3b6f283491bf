"""The entries of gradients: complex ones as pairs of real numbers, sparse ones written out."""

from __future__ import annotations

import torch


def real(tensor: torch.Tensor) -> torch.Tensor:
    """Return the entries as real numbers; a complex tensor becomes a view with pairs in its last axis.

    Example:
        >>> real(torch.tensor([1 + 2j])).tolist()
        [[1.0, 2.0]]
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with all its entries, whatever its layout.

    Example:
        >>> dense(torch.eye(2).to_sparse()).layout
        torch.strided
    """
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def sum_of(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Add two gradients: sparse if both are, else dense.

    Example:
        >>> sum_of(torch.eye(2).to_sparse(), torch.eye(2)).layout
        torch.strided
    """
    if one.layout is not torch.strided and other.layout is torch.strided:
        return other + one  # torch adds a sparse tensor to a dense one, and not the other way round
    return one + other
