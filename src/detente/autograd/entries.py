"""The entries of a tensor that may be complex or sparse, as real numbers or written out."""

from __future__ import annotations

import torch


def real(tensor: torch.Tensor) -> torch.Tensor:
    """View the entries as real numbers: a complex tensor [...] becomes [..., 2], a real one is returned as it is.

    A dense tensor that is not lazily conjugated shares its memory with the result, so that writing to one changes the
    other. Of a sparse tensor only the values that it stores are given, [nnz, ...], duplicates added up: enough for
    norms and for a look at what is finite; :func:`dense` first gives all entries.

    Example:
        >>> real(torch.tensor([1 + 2j])).tolist()
        [[1.0, 2.0]]
    """
    if tensor.layout is not torch.strided:
        tensor = (tensor.coalesce() if tensor.layout is torch.sparse_coo else tensor).values()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def unreal(entries: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Undo :func:`real` for a dense tensor of the kind of ``like``: pairs become complex numbers again.

    Example:
        >>> unreal(torch.tensor([[1.0, 2.0]]), torch.zeros(1, dtype=torch.complex64))
        tensor([1.+2.j])
    """
    return torch.view_as_complex(entries) if like.is_complex() else entries


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Write a sparse tensor out with all its entries; a dense one is returned as it is.

    Example:
        >>> dense(torch.tensor([0.0, 3.0]).to_sparse())
        tensor([0., 3.])
    """
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Give all entries as one vector [P] of real numbers; a complex one counts twice.

    Example:
        >>> flat(torch.tensor([[1 + 2j, 3 + 4j]]))
        tensor([1., 2., 3., 4.])
    """
    return real(dense(tensor)).reshape(-1)
