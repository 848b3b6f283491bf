"""Rows of a Jacobian and the tensors they are made of; gradients, and how they reach ``.grad``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from detente.autograd.entries import dense, real

Gradients = list[tuple[torch.Tensor, torch.Tensor]]
"""Parameters with the gradient each is to receive."""

# Columns whose weighted sum is taken at once.
_GROUP = 1 << 20
# Tensors whose operations are torch's own.
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# Entries of a tensor on the CPU below which a call costs more than the reading.
_SMALL = 1 << 15


class Layout:
    """Say how tensors lie one after another in a row of P real numbers; a complex entry takes two.

    Args:
        tensors: in order.

    Attributes:
        widths: the number of real numbers in each tensor.
        columns: P, their sum.
        dtype: the real type that holds every tensor's gradient.
    """

    __slots__ = ("columns", "dtype", "tensors", "widths")

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = tuple(tensors)
        self.widths: list[int] = []
        self.columns = 0
        dtype: torch.dtype | None = None
        for tensor in self.tensors:
            width = tensor.numel() * (2 if tensor.is_complex() else 1)
            self.widths.append(width)
            self.columns += width
            mine = tensor.dtype.to_real()
            dtype = mine if dtype is None or dtype == mine else torch.promote_types(dtype, mine)
        self.dtype = torch.float32 if dtype is None else dtype

    @property
    def like(self) -> torch.Tensor:
        """An empty tensor of the dtype, on the first tensor's device."""
        return torch.empty(0, dtype=self.dtype, device=self.tensors[0].device)

    def write(self, row: torch.Tensor, gradients: Sequence[torch.Tensor | None]) -> None:
        """Fill ``row`` [P] with one gradient per tensor; None and sparse gradients are written out."""
        pieces = []
        for width, gradient in zip(self.widths, gradients, strict=True):
            if gradient is None:
                pieces.append(torch.zeros((), dtype=row.dtype, device=row.device).expand(width))
                continue
            if gradient.layout is not torch.strided or gradient.is_complex():
                gradient = real(dense(gradient))
            gradient = gradient.reshape(-1)
            if gradient.dtype != row.dtype or gradient.device != row.device:
                gradient = gradient.to(device=row.device, dtype=row.dtype)
            pieces.append(gradient)
        if len(pieces) == 1:
            row.copy_(pieces[0])
        else:
            torch.cat(pieces, out=row)

    def split(self, row: torch.Tensor) -> list[torch.Tensor]:
        """Return views of ``row`` [P], one in the shape of each tensor (a copy where dtype or device differ)."""
        found = []
        for tensor, piece in zip(self.tensors, torch.split(row, self.widths), strict=True):
            if tensor.is_complex():  # the copy aligns the pairs, as a complex view asks
                piece = torch.view_as_complex(piece.reshape(*tensor.shape, 2).clone())
            piece = piece.reshape(tensor.shape)
            if piece.dtype != tensor.dtype or piece.device != tensor.device:
                piece = piece.to(device=tensor.device, dtype=tensor.dtype)
            found.append(piece)
        return found

    def weighted(self, weights: torch.Tensor, jacobian: torch.Tensor) -> list[torch.Tensor]:
        """Return what :meth:`split` makes of ``weights`` [T] @ ``jacobian`` [T, P], a few tensors at a time.

        One allocation of P numbers is taken from the system anew in every step, page by page; smaller ones are reused.
        """
        if self.columns <= _GROUP:
            return self.split(weights @ jacobian)
        found: list[torch.Tensor] = []
        group: list[torch.Tensor] = []
        start = stop = 0
        for position, (tensor, width) in enumerate(zip(self.tensors, self.widths, strict=True)):
            group.append(tensor)
            stop += width
            if stop - start >= _GROUP or position == len(self.tensors) - 1:
                found += Layout(group).split(weights @ jacobian[:, start:stop])
                group, start = [], stop
        return found


def lay(place: torch.Tensor, gradient: torch.Tensor | None) -> None:
    """Fill a part of a row with the gradient of one tensor; None and a sparse one are written out."""
    if gradient is None:
        place.zero_()
        return
    if gradient.layout is not torch.strided or gradient.is_complex():
        gradient = real(dense(gradient))
    place.view(gradient.shape).copy_(gradient)


def gradients_of(
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    seeds: Sequence[torch.Tensor] | None,
    *,
    retain_graph: bool,
) -> list[torch.Tensor | None]:
    """Call ``torch.autograd.grad``, with None for an input that no output depends on; no inputs are allowed.

    Raises:
        RuntimeError: as autograd does; in words of ours where a compiled model can be walked only once.
    """
    for output in outputs:
        if not output.requires_grad:  # tasks that are absent on this rank
            here = [place for place, one in enumerate(outputs) if one.requires_grad]
            outputs = [outputs[place] for place in here]
            seeds = None if seeds is None else [seeds[place] for place in here]
            break
    if not inputs or not outputs:
        return [None] * len(inputs)
    try:
        return list(torch.autograd.grad(outputs, inputs, seeds, retain_graph=retain_graph, allow_unused=True))
    except RuntimeError as error:
        if "donated buffer" not in str(error):
            raise
        raise RuntimeError(
            "a compiled part of the model was prepared for a single backward through each graph, and the gradients of "
            "several tasks need several. Set torch._functorch.config.donated_buffer = False before the model's first "
            "backward, or pass the compiled trunk's output as features=, which walks it once."
        ) from error


def present(inputs: Sequence[torch.Tensor], gradients: Iterable[torch.Tensor | None]) -> Gradients:
    """Return pairs of parameter and gradient, without those that received none."""
    found = []
    for tensor, gradient in zip(inputs, gradients, strict=True):
        if gradient is not None:
            found.append((tensor, gradient))
    return found


def seeds_of(losses: Sequence[torch.Tensor], weights: torch.Tensor) -> list[torch.Tensor]:
    """Return one weight per loss, in the loss's shape, dtype and device: what a weighted backward starts from."""
    return [
        weight.to(device=loss.device, dtype=loss.dtype).expand_as(loss)
        for loss, weight in zip(losses, weights.unbind(), strict=True)
    ]


def probes(gradients: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return for each gradient a scalar on its device that is NaN or Inf if an entry is.

    On the CPU the norm of many small tensors, taken in one call, and the sum of large ones, the fastest of all. Both
    may overflow where every entry is finite: :func:`finite` looks again.
    """
    parts, total, on_host = [], 0, True
    for gradient in gradients:
        part = _entries(gradient)
        parts.append(part)
        total += part.numel()
        on_host = on_host and part.device.type == "cpu"
    if not on_host:  # one launch for many tensors
        filled = [part if part.numel() else part.new_zeros(1) for part in parts]
        return list(torch._foreach_norm(filled, ord=float("inf")))
    if total < len(parts) * _SMALL:
        return list(torch._foreach_norm(parts))
    return [part.sum(dtype=torch.promote_types(part.dtype, torch.float32)) for part in parts]


def probes_of_rows(jacobian: torch.Tensor) -> torch.Tensor:
    """Return the probe of each row of a real matrix."""
    return jacobian.sum(dim=1, dtype=torch.promote_types(jacobian.dtype, torch.float32))


def finite(gradients: Sequence[torch.Tensor] | torch.Tensor, probed: np.ndarray) -> np.ndarray:
    """Return for each gradient True if every entry is finite, by its probe, or by a second look where that is not.

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
    """Return the entries of a gradient as real numbers, of a sparse one those that are there."""
    if gradient.layout is not torch.strided:
        gradient = gradient.coalesce().values()
    return real(gradient) if gradient.is_complex() else gradient


def accumulate(gradients: Gradients) -> None:
    """Add to every ``.grad``, as a backward would, or change none.

    What becomes ``.grad`` has the parameter's own layout in memory, as torch promises (fused optimizers walk through
    both side by side), and shares its memory with nothing else: autograd hands out transposed and expanded tensors, and
    one tensor for two inputs. A sparse gradient stays sparse.

    Raises:
        ValueError: a gradient does not fit the ``.grad`` that is there; nothing was written.
    """
    fresh: dict[torch.Tensor, torch.Tensor] = {}
    added: Gradients = []
    addresses: set[int] = set()
    with torch.no_grad():
        for tensor, gradient in gradients:
            there = fresh.get(tensor)
            if there is None:
                there = tensor.grad
            if there is not None:
                _check_fits(tensor, there, gradient)
                if there.layout is not torch.strided:
                    # A dense gradient takes the place of a sparse one.
                    fresh[tensor] = gradient + there
                elif tensor in fresh:
                    fresh[tensor] = there + gradient
                else:
                    added.append((there, gradient))
                continue
            if gradient.layout is torch.strided:
                address = gradient.data_ptr()
                if address in addresses or gradient.stride() != tensor.stride():
                    gradient = _laid_out(gradient, tensor, copied=address in addresses)
                    address = gradient.data_ptr()
                addresses.add(address)
            fresh[tensor] = gradient
        _write(fresh, added)


def _write(fresh: dict[torch.Tensor, torch.Tensor], added: Gradients) -> None:
    """Set every new ``.grad`` and add to those that are there, or leave all of them as they were.

    What may fail comes first, where it can be undone: adding to a plain tensor that fits does not fail.
    """
    before: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    copies: Gradients = []
    plain = [pair for pair in added if type(pair[0]) in _PLAIN]
    try:
        for tensor, gradient in fresh.items():
            before.append((tensor, tensor.grad))
            tensor.grad = gradient
        for there, gradient in added:
            if type(there) not in _PLAIN:
                copies.append((there, there.clone()))
                there.add_(gradient)
    except BaseException:  # also when the user interrupts
        for there, copy in copies:
            there.copy_(copy)
        for tensor, held in before:
            tensor.grad = held
        raise
    for there, gradient in plain:
        there.add_(gradient)


def _laid_out(gradient: torch.Tensor, like: torch.Tensor, *, copied: bool) -> torch.Tensor:
    """Return a gradient with the strides of its parameter where that fills its memory without gaps, else contiguous."""
    target = torch.empty_like(like)
    if not copied and gradient.stride() == target.stride():
        return gradient
    return target.copy_(gradient)


def _check_fits(tensor: torch.Tensor, there: torch.Tensor, gradient: torch.Tensor) -> None:
    if (
        there.shape != gradient.shape
        or there.device != gradient.device
        or (there.dtype != gradient.dtype and not torch.can_cast(gradient.dtype, there.dtype))
    ):
        raise ValueError(
            f"a parameter of shape {tuple(tensor.shape)} has a .grad of shape {tuple(there.shape)}, {there.dtype} on "
            f"{there.device}, to which a gradient of shape {tuple(gradient.shape)}, {gradient.dtype} on "
            f"{gradient.device} cannot be added. Nothing was changed; set .grad to None first (optimizer.zero_grad())."
        )
    expanded = there.layout is torch.strided and any(
        step == 0 and size > 1 for step, size in zip(there.stride(), there.shape, strict=True)
    )
    if expanded or (there.is_inference() and not torch.is_inference_mode_enabled()):
        kind = "an expanded tensor" if expanded else "a tensor made under torch.inference_mode()"
        raise ValueError(
            f"a parameter of shape {tuple(tensor.shape)} has {kind} for a .grad, to which nothing can be added. "
            "Nothing was changed; set .grad to None first (optimizer.zero_grad())."
        )
