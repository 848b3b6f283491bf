"""What turns one rank's part of a step into the whole: sums over the ranks in an order all of them know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from detente.autograd.flat import Gradients, Layout
from detente.autograd.ranks import Ranks


@dataclass
class Reduction:
    """What turns this rank's part of one step into the whole.

    Attributes:
        ranks: the processes.
        shared, own: parameters by their role, in the same order on every rank.
        anywhere: whether some loss on some rank reaches a shared parameter.
        touched: those that some loss on some rank reaches.
    """

    ranks: Ranks
    shared: tuple[torch.Tensor, ...]
    own: tuple[torch.Tensor, ...]
    anywhere: bool = False
    touched: set[torch.Tensor] = field(default_factory=set)

    def flags(self, reached: set[torch.Tensor]) -> torch.Tensor:
        """[shared + own] float64 on the host: which parameters are reached here."""
        return torch.tensor([float(t in reached) for t in (*self.shared, *self.own)], dtype=torch.float64)

    def read_flags(self, summed: np.ndarray) -> None:
        """Which parameters are reached on some rank, from the sum of :meth:`flags`."""
        everything = (*self.shared, *self.own)
        self.touched = {tensor for tensor, count in zip(everything, summed, strict=True) if count > 0}

    def gradients(self, tensors: Sequence[torch.Tensor], found: Gradients) -> Gradients:
        """Gradients of ``tensors`` added over the ranks; those nothing reaches anywhere are left out."""
        wanted = tuple(tensor for tensor in tensors if tensor in self.touched)
        if not wanted:
            return []
        by_tensor: dict[torch.Tensor, torch.Tensor] = {}
        for tensor, gradient in found:
            by_tensor[tensor] = by_tensor[tensor] + gradient if tensor in by_tensor else gradient
        layout = Layout(wanted)
        flat = torch.empty(layout.columns, dtype=layout.like.dtype, device=layout.like.device)
        layout.write(flat, [by_tensor.get(tensor) for tensor in wanted])
        self.ranks.sum(flat)
        return list(zip(wanted, layout.split(flat), strict=True))
