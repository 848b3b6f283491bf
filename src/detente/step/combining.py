"""The mathematics of a step alone: a matrix of task gradients, a method, a combination with its direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from detente.autograd.engine import full_precision
from detente.autograd.layout import finite, probes_of_rows
from detente.autograd.losses import check_scalar, values_of
from detente.autograd.numbers import check_gradients, check_losses, gramian, to_host
from detente.methods.base import Method, positional
from detente.methods.registry import create
from detente.step.deciding import check_result, undone_on_failure, watched
from detente.values import Combination, TaskGradients


def combine(
    method: Method | str, jacobian: torch.Tensor, losses: Mapping[str, Any] | Sequence[Any] | None = None
) -> Combination:
    """Combine a matrix of task gradients: one training step of ``method``, the mathematics alone.

    Args:
        method: a method, or the name of one (created afresh, with its default options).
        jacobian: [T, P], one task gradient per row; left untouched. To a method that looks at blocks of parameters
            it is a single block.
        losses: T numbers, by name or by position; needed by methods that look at losses.

    Returns:
        The combination, with the direction [P] in the dtype and on the device of ``jacobian``.

    Raises:
        ValueError: the matrix is empty, not two-dimensional, or not finite (the task is named), the number of
            losses differs, or the method rejects the input.

    Example:
        >>> combine("mgda", torch.tensor([[2.0, 0.0], [0.0, 2.0]])).direction
        tensor([1., 1.])
    """
    with full_precision():
        return _combine(create(method) if isinstance(method, str) else method, jacobian, losses)


def _combine(
    method: Method, jacobian: torch.Tensor, losses: Mapping[str, Any] | Sequence[Any] | None
) -> Combination:
    jacobian = torch.as_tensor(jacobian).detach()
    if jacobian.dim() != 2 or jacobian.shape[0] == 0:
        raise ValueError(
            f"jacobian has shape {tuple(jacobian.shape)}; give one row per task, [T, P] with T >= 1."
        )
    if not jacobian.is_floating_point():
        raise ValueError(f"jacobian has dtype {jacobian.dtype}; give floating-point gradients.")
    tasks = jacobian.shape[0]
    if losses is not None and len(losses) != tasks:
        raise ValueError(f"{len(losses)} losses for {tasks} rows of the jacobian.")
    if isinstance(losses, Mapping):
        names = tuple(str(name) for name in losses)
    else:
        names = method.tasks if method.tasks is not None and len(method.tasks) == tasks else positional(tasks)
    scalars = [] if losses is None else values_of(losses)
    if not all(isinstance(loss, (int, float)) for loss in scalars):
        scalars = [
            loss if isinstance(loss, torch.Tensor) else torch.as_tensor(loss, dtype=torch.float64)
            for loss in scalars
        ]
        for name, loss in zip(names, scalars, strict=True):
            check_scalar(name, loss)
    needs = method.needs_now()
    wanted = bool(needs & {"gramian", "blocks"})
    # A method that asks for no Gramian is spared its T²P products; only the check of the rows remains.
    looked_at = gramian(jacobian) if wanted else probes_of_rows(jacobian)
    given: np.ndarray | None = None
    if scalars and isinstance(scalars[0], torch.Tensor):
        seen, given = to_host([looked_at, scalars])
    else:
        (seen,) = to_host([looked_at])
        given = None if losses is None else np.array(scalars, dtype=np.float64)
    matrix = seen if wanted else None
    check_losses(names, given)
    check_gradients(names, np.diagonal(seen) if wanted else finite(jacobian, seen))
    gradients = TaskGradients(names=names, losses=given, gramian=matrix, jacobian=jacobian)
    if matrix is not None and "blocks" in needs:
        whole: dict[str, Any] = {
            "block_names": ("all",),
            "block_sizes": (jacobian.shape[1],),
            "block_layers": (0,),
        }
        gradients = replace(gradients, block_gramians=matrix[None].copy(), **whole)
    with undone_on_failure(method) if watched(method, jacobian, matrix) else nullcontext():
        combination = with_direction(method.combine(gradients), gradients)
        check_result(method, combination)
    return combination


def with_direction(combination: Combination, gradients: TaskGradients) -> Combination:
    """Return the combination with its direction [P] filled in from the weights; exactly zero where it is stationary.

    The direction has memory of its own: the engine uses that of the Jacobian again in the next step.
    """
    jacobian = gradients.jacobian
    assert jacobian is not None
    if combination.status == "stationary":
        return replace(combination, direction=jacobian.new_zeros(jacobian.shape[1]))
    direction = combination.direction
    if direction is None and combination.block_weights is not None:
        weights = combination.block_weights.to(device=jacobian.device, dtype=jacobian.dtype)
        pieces = zip(weights, torch.split(jacobian, list(gradients.block_sizes), dim=1), strict=True)
        direction = torch.cat([block @ piece for block, piece in pieces])
    elif direction is None:
        assert combination.weights is not None, "a combination has weights or a direction"
        direction = combination.weights.to(device=jacobian.device, dtype=jacobian.dtype) @ jacobian
    elif direction.untyped_storage().data_ptr() == jacobian.untyped_storage().data_ptr():
        direction = direction.clone()
    return replace(combination, direction=direction.to(jacobian.dtype))
