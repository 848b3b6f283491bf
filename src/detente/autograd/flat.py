"""Rows of a Jacobian and the tensors they are made of, and gradients that may be kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
import torch

Gradients = list[tuple[torch.Tensor, torch.Tensor]]
"""Parameters with the gradient each is to receive."""


# Columns whose weighted sum is taken at once.
_GROUP = 1 << 20
# Entries of a tensor on the CPU below which a call costs more than the reading.
_SMALL = 1 << 15


@dataclass(frozen=True)
class Layout:
    """How tensors lie one after another in a row of P real numbers; a complex entry takes two."""

    tensors: tuple[torch.Tensor, ...]

    @cached_property
    def widths(self) -> list[int]:
        """The number of real numbers in each tensor."""
        return [_width(tensor) for tensor in self.tensors]

    @property
    def columns(self) -> int:
        """P, the number of real numbers in all tensors together."""
        return sum(self.widths)

    @property
    def like(self) -> torch.Tensor:
        """An empty tensor of the real dtype that holds every tensor's gradient, on the first one's device."""
        dtype = reduce(torch.promote_types, (tensor.dtype.to_real() for tensor in self.tensors))
        return torch.empty(0, dtype=dtype, device=self.tensors[0].device)

    def places(self, row: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Where in ``row`` [P] each tensor's gradient lies, for :func:`lay`."""
        return torch.split(row, self.widths)

    def write(self, row: torch.Tensor, gradients: Sequence[torch.Tensor | None]) -> None:
        """Fill ``row`` [P] with one gradient per tensor; None and sparse gradients are written out."""
        pieces = []
        for tensor, gradient in zip(self.tensors, gradients, strict=True):
            if gradient is None:
                gradient = torch.zeros((), dtype=row.dtype, device=row.device).expand(_width(tensor))
            elif gradient.layout is not torch.strided:
                gradient = gradient.to_dense()
            if gradient.is_complex():
                gradient = torch.view_as_real(gradient.resolve_conj())
            pieces.append(gradient.reshape(-1).to(device=row.device, dtype=row.dtype))
        torch.cat(pieces, out=row)

    def weighted(self, weights: torch.Tensor, jacobian: torch.Tensor) -> list[torch.Tensor]:
        """What :meth:`split` makes of ``weights`` [T] @ ``jacobian`` [T, P], a few tensors at a time.

        One allocation of P numbers is taken from the system anew in every step, page by page; smaller ones are reused.
        """
        found: list[torch.Tensor] = []
        group: list[torch.Tensor] = []
        start = stop = 0
        for position, tensor in enumerate(self.tensors):
            group.append(tensor)
            stop += _width(tensor)
            if stop - start >= _GROUP or position == len(self.tensors) - 1:
                found += Layout(tuple(group)).split(weights @ jacobian[:, start:stop])
                group, start = [], stop
        return found

    def split_columns(self, jacobian: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[T, ·] views of ``jacobian`` [T, P], one for each tensor."""
        return torch.split(jacobian, self.widths, dim=1)

    def split(self, row: torch.Tensor) -> list[torch.Tensor]:
        """Views of ``row`` [P], one in the shape of each tensor (a copy where dtype or device differ)."""
        pieces = torch.split(row, self.widths)
        return [_shaped(piece, tensor) for tensor, piece in zip(self.tensors, pieces, strict=True)]


def lay(place: torch.Tensor, gradient: torch.Tensor | None) -> None:
    """Fill one of the :meth:`Layout.places` with a gradient; None and a sparse one are written out."""
    if gradient is None:
        place.zero_()
        return
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())
    place.view(gradient.shape).copy_(gradient)


def _width(tensor: torch.Tensor) -> int:
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def _shaped(piece: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():  # the copy aligns the pairs, as a complex view asks
        piece = torch.view_as_complex(piece.reshape(*tensor.shape, 2).clone())
    return piece.reshape(tensor.shape).to(device=tensor.device, dtype=tensor.dtype)


def gradients_of(
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    seeds: Sequence[torch.Tensor] | None,
    *,
    retain_graph: bool,
) -> list[torch.Tensor | None]:
    """``torch.autograd.grad`` that allows no inputs and leaves None where an output does not depend on one.

    Raises:
        RuntimeError: as autograd does; in words of ours where a compiled model can be walked only once.
    """
    if not all(output.requires_grad for output in outputs):  # tasks that are absent on this rank
        present_here = [place for place, output in enumerate(outputs) if output.requires_grad]
        outputs = [outputs[place] for place in present_here]
        seeds = None if seeds is None else [seeds[place] for place in present_here]
    if not inputs or not outputs:
        return [None] * len(inputs)
    try:
        return list(
            torch.autograd.grad(outputs, list(inputs), seeds, retain_graph=retain_graph, allow_unused=True)
        )
    except RuntimeError as error:
        if "donated buffer" not in str(error):
            raise
        raise RuntimeError(
            "a compiled part of the model was prepared for a single backward through each graph, and the gradients of "
            "several tasks need several. Set torch._functorch.config.donated_buffer = False before the model's first "
            "backward, or pass the compiled trunk's output as features=, which walks it once."
        ) from error


def present(inputs: Sequence[torch.Tensor], gradients: Iterable[torch.Tensor | None]) -> Gradients:
    """Pairs of parameter and gradient, without those that received none."""
    return [
        (tensor, gradient) for tensor, gradient in zip(inputs, gradients, strict=True) if gradient is not None
    ]


def seeds_of(losses: Sequence[torch.Tensor], weights: torch.Tensor) -> list[torch.Tensor]:
    """One weight per loss, in the loss's shape, dtype and device: what a weighted backward starts from."""
    return [
        weight.to(device=loss.device, dtype=loss.dtype).expand_as(loss)
        for loss, weight in zip(losses, weights.unbind(), strict=True)
    ]


def probes(gradients: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """For each gradient a scalar on its device that is NaN or Inf if an entry is.

    On the CPU the norm of many small tensors, taken in one call, and the sum of large ones, the fastest of all. Both
    may overflow where every entry is finite: :func:`finite` looks again.
    """
    parts = [_entries(gradient) for gradient in gradients]
    if any(part.device.type != "cpu" for part in parts):  # one launch for many tensors
        filled = [part if part.numel() else part.new_zeros(1) for part in parts]
        return list(torch._foreach_norm(filled, ord=float("inf")))
    if sum(part.numel() for part in parts) < len(parts) * _SMALL:
        return list(torch._foreach_norm(parts))
    return [part.sum(dtype=torch.promote_types(part.dtype, torch.float32)) for part in parts]


def probes_of_rows(jacobian: torch.Tensor) -> torch.Tensor:
    """The probe of each row of a real matrix."""
    return jacobian.sum(dim=1, dtype=torch.promote_types(jacobian.dtype, torch.float32))


def finite(gradients: Sequence[torch.Tensor] | torch.Tensor, probed: np.ndarray) -> np.ndarray:
    """For each gradient True if every entry is finite, by its probe, or by a second look where that is not.

    Args:
        gradients: tensors, or the rows of one.
        probed: a probe of each, on the host.

    Example:
        >>> huge = torch.full((2,), 3e38)
        >>> finite([huge], probes([huge])[0].reshape(1).numpy())
        array([ True])
    """
    found = [bool(known) for known in np.isfinite(probed)]
    if not all(found):
        found = [
            known or bool(torch.isfinite(_entries(gradient)).all())
            for known, gradient in zip(found, gradients, strict=True)
        ]
    return np.array(found)


def _entries(gradient: torch.Tensor) -> torch.Tensor:
    """The entries of a gradient as real numbers."""
    if gradient.layout is not torch.strided:
        gradient = gradient.coalesce().values()
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def accumulate(gradients: Gradients) -> None:
    """Add to every ``.grad``, as a backward would.

    A gradient becomes ``.grad`` itself where there was none; one whose memory overlaps itself or another's (autograd
    hands out expanded tensors, and one tensor for two inputs) is copied first.
    """
    taken: set[int] = set()
    with torch.no_grad():
        for tensor, gradient in gradients:
            if tensor.grad is not None:
                # A sparse gradient added to a dense one in place; a dense one takes the place of a sparse one.
                if tensor.grad.layout is torch.strided:
                    tensor.grad.add_(gradient)
                else:
                    tensor.grad = gradient + tensor.grad
                continue
            if gradient.layout is torch.strided:
                address = gradient.data_ptr()
                if address in taken or not _dense(gradient):
                    gradient = gradient.clone(memory_format=torch.contiguous_format)
                taken.add(gradient.data_ptr())
            tensor.grad = gradient


def _dense(tensor: torch.Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    if tensor.dim() == 4:
        return tensor.is_contiguous(memory_format=torch.channels_last)
    return False
