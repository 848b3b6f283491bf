"""The numbers of a step on the host: one copy for everything, the Gramian, and checks of what arrived.

Every message names the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from detente.autograd.layout import Gradients, finite, probes

Part: TypeAlias = torch.Tensor | Sequence[torch.Tensor]

# Columns are converted in chunks of about this many entries. On the CPU small enough to stay in a core's cache, large
# enough that the loop in Python does not show; elsewhere large enough to keep the device busy.
_CHUNK_ENTRIES = 1 << 17
_CHUNK_ENTRIES_ON_DEVICE = 1 << 25
# The product of a few long rows is read faster in pieces of this many columns than as one skinny matrix product.
_PIECE = 1024
_FEW_TASKS = 8
# From here on products below the diagonal are worth leaving out: four blocks of rows take five eighths of them.
_MANY_TASKS = 64


class GradientNotFinite(ValueError):
    """Say that a gradient is NaN or infinite; under a gradient scaler that happens, and the step is skipped."""


def to_host(parts: Sequence[Part]) -> list[np.ndarray]:
    """Copy small tensors to the host as float64 arrays of the same shapes, in one transfer.

    This is the single place where numbers leave the device.

    Args:
        parts: tensors, or sequences of tensors of one number each; such a sequence becomes one vector.

    Example:
        >>> [array.tolist() for array in to_host([[torch.tensor(1.5), torch.tensor([2])], torch.eye(2)])]
        [[1.5, 2.0], [[1.0, 0.0], [0.0, 1.0]]]
    """
    everything: list[torch.Tensor] = []
    shapes: list[tuple[int, ...]] = []
    for part in parts:
        if isinstance(part, torch.Tensor):
            everything.append(part)
            shapes.append(tuple(part.shape))
        else:
            everything += part
            shapes.append((len(part),))
    if not everything:
        return [np.zeros(0) for _ in parts]
    device, alike = everything[0].device, True
    for tensor in everything:
        if tensor.device != device:
            alike, device = False, device if tensor.is_cpu else tensor.device
        alike = alike and tensor.is_floating_point()
    flat = []
    with torch.no_grad():
        for part in parts:
            several = not isinstance(part, torch.Tensor)
            pieces = [part] if isinstance(part, torch.Tensor) else list(part)
            for place, piece in enumerate(pieces):
                if not alike:
                    piece = piece.to(device=device, dtype=torch.float64)
                pieces[place] = piece.reshape(()) if several and piece.dim() else piece
            if several and pieces:
                flat.append(torch.stack(pieces))
            elif pieces:
                flat.append(pieces[0].reshape(-1))
        joined = flat[0] if len(flat) == 1 else torch.cat(flat)
        moved = joined.detach().to(torch.float64).cpu()
        # A copy in any case: the method may keep it.
        numbers = (moved.clone() if moved.data_ptr() == everything[0].data_ptr() else moved).numpy()
    arrays, offset = [], 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        arrays.append(numbers[offset : offset + size].reshape(shape))
        offset += size
    return arrays


def gramian(jacobian: torch.Tensor) -> torch.Tensor:
    """Return the T×T matrix of inner products of the rows of ``jacobian`` [T, P], in float64 on its device.

    Rows in float32 (or shorter) are converted before they are multiplied: their products overflow float32 above
    1e19 and lose the small tasks beside the large ones.

    Example:
        >>> gramian(torch.tensor([[3.0, 4.0], [1.0, 0.0]])).tolist()
        [[25.0, 3.0], [3.0, 1.0]]
    """
    tasks, columns = jacobian.shape
    entries = _CHUNK_ENTRIES if jacobian.device.type == "cpu" else _CHUNK_ENTRIES_ON_DEVICE
    width = max(1, entries // max(tasks, 1))
    if columns <= width or jacobian.dtype == torch.float64:
        rows = jacobian.to(torch.float64)
        return rows @ rows.T
    width = max(1, width // _PIECE) * _PIECE
    total, step = torch.zeros(tasks, tasks, dtype=torch.float64, device=jacobian.device), -(-tasks // 4)
    buffer = torch.empty(tasks, width, dtype=torch.float64, device=jacobian.device)
    for start in range(0, columns, width):
        piece = jacobian[:, start : start + width]
        chunk = buffer[:, : piece.shape[1]]
        chunk.copy_(piece)
        if tasks <= _FEW_TASKS and chunk.shape[1] % _PIECE == 0:
            pieces = chunk.view(tasks, -1, _PIECE).transpose(0, 1)
            total += torch.bmm(pieces, pieces.transpose(1, 2)).sum(dim=0)
        elif tasks < _MANY_TASKS:
            total.addmm_(chunk, chunk.T)
        else:
            for low in range(0, tasks, step):
                high = min(low + step, tasks)
                total[low:high, :high].addmm_(chunk[low:high], chunk[:high].T)
    if tasks >= _MANY_TASKS:
        upper = torch.triu_indices(tasks, tasks, offset=1, device=total.device)
        total[upper[0], upper[1]] = total[upper[1], upper[0]]
    return total


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
        sizes=tuple(tensor.numel() * (2 if tensor.is_complex() else 1) for tensor in tensors),
        layers=tuple(layers),
    )


def block_gramians(jacobian: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """[B, T, T] float64 on the Jacobian's device: one Gramian for each block of its columns [T, P].

    Example:
        >>> block_gramians(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), (1, 1)).tolist()
        [[[9.0, 3.0], [3.0, 1.0]], [[16.0, 0.0], [0.0, 0.0]]]
    """
    return torch.stack([gramian(piece) for piece in torch.split(jacobian, list(sizes), dim=1)])


def check_losses(names: Sequence[str], losses: np.ndarray | None) -> None:
    """Check that every loss [T] is finite.

    Raises:
        ValueError: one is not; the task is named.
    """
    if losses is None or np.isfinite(losses).all():
        return
    name = next(name for name, loss in zip(names, losses, strict=True) if not np.isfinite(loss))
    raise ValueError(_not_finite(name, "the loss"))


def check_gradients(
    names: Sequence[str], sizes: np.ndarray, space: str = "exact", what: str | None = None
) -> None:
    """Check that every task's gradient is finite, by the square of each [T], or True where it is.

    ``what`` tells which gradient; by default the shared one of ``space``.

    Raises:
        ValueError: one is not; the task is named.
    """
    known = np.isfinite(sizes) if sizes.dtype != np.bool_ else sizes
    if known.all():
        return
    if what is None:
        what = "the gradient with respect to the features" if space == "features" else "the shared gradient"
    raise GradientNotFinite(_not_finite(names[int(np.argmin(known))], what))


def check_own(names: Sequence[str], own: Sequence[Gradients], probed: np.ndarray) -> None:
    """Check that the gradients of own parameters are finite, by the probe of each.

    Raises:
        ValueError: one is not; the task is named.
    """
    offset = 0
    for name, task in zip(names, own, strict=True):
        mine = probed[offset : offset + len(task)]
        offset += len(task)
        if not _all_finite(task, mine):
            raise GradientNotFinite(_not_finite(name, "the gradient of its own parameters"))


def check_behind(names: Sequence[str], gradients: Gradients) -> None:
    """Check that the gradients behind the place where the problem was solved are finite.

    Raises:
        ValueError: one is not. No task can be named: one backward serves them all.
    """
    probed = probes(g for _, g in gradients)
    if not probed or np.isfinite(to_host([torch.stack([p.to(probed[0]) for p in probed]).sum()])[0]):
        return
    if not finite([g for _, g in gradients], np.full(len(gradients), np.nan)).all():
        raise GradientNotFinite(
            f"the gradients of tasks {', '.join(names)} are finite where the problem was solved and not finite "
            "(NaN or Inf) behind it, in the shared parameters. Nothing was changed."
        )


def check_weighted(names: Sequence[str], gradients: Gradients, probed: np.ndarray) -> None:
    """Check that the gradients of weighted losses are finite, by the probe of each.

    Raises:
        ValueError: one is not. No task can be named: one backward serves them all.
    """
    if not _all_finite(gradients, probed):
        raise GradientNotFinite(
            f"the gradient of the weighted losses of tasks {', '.join(names)} is not finite (NaN or Inf) in the shared "
            "parameters. Nothing was changed. Pass measure=True for one step to learn which task it comes from."
        )


def _all_finite(gradients: Gradients, probed: np.ndarray) -> bool:
    return bool(np.isfinite(probed).all() or finite([gradient for _, gradient in gradients], probed).all())


def _not_finite(name: str, what: str) -> str:
    return (
        f"{what} of task {name!r} is not finite (NaN or Inf). Nothing was changed. Look for a division by zero, a "
        "logarithm of zero, or a learning rate too high for this task."
    )
