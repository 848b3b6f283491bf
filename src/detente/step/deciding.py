"""What a method decides about a step, and what the step leaves behind: its record, and after a failure nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from detente.autograd.engine import Taken
from detente.autograd.numbers import GradientNotFinite
from detente.autograd.step import Step
from detente.diagnostics.conflict import measure_altered, measure_conflict
from detente.methods.base import Method
from detente.methods.registry import info_of
from detente.values import Combination, Conflict, StepRecord

LOW = "memory='low': task gradients were taken in {} and not kept"
# What a method may need and still get by, on several processes, with one part of every gradient on each.
NUMBERS = frozenset({"losses", "gramian", "epoch", "after_step"})
# A residual above this is told: the rounding of a solver is below it.
RESIDUAL = 1e-10


def record_of(taken: Taken, combination: Combination) -> StepRecord:
    """Put a step in plain numbers, from what a method saw and what it decided.

    ``seconds`` is left at zero: whoever calls knows how long the step took.
    """
    gradients, step = taken.gradients, taken.step
    assert gradients.gramian is not None
    transform = None if combination.transform is None else combination.transform.numpy()
    raw = measure_conflict(gradients.gramian)
    altered = None if transform is None else measure_altered(gradients.gramian, transform)
    notes = _notes(taken, combination, raw.norms)
    if len(step.inside) < len(step.names):
        raw = _of_all(raw, step)
        altered = None if altered is None else _of_all(altered, step)
    weights: list[float | None] = [None] * len(step.names)
    if combination.weights is not None:
        for task, weight in zip(step.inside, combination.weights.tolist(), strict=True):
            weights[task] = weight
    return StepRecord(
        names=step.names,
        losses=tuple(taken.losses.tolist()),
        weights=tuple(weights),
        status=combination.status,
        space=gradients.space,
        raw=raw,
        altered=altered,
        kept_rank=combination.kept_rank,
        dropped=(*outside(step), *combination.dropped),
        notes=notes,
        residual=combination.residual,
    )


def _of_all(conflict: Conflict, step: Step) -> Conflict:
    """Return norms and cosines for all tasks of a step, 0 for those outside of the shared problem."""
    place = {task: row for row, task in enumerate(step.inside)}
    rows = [place.get(task) for task in range(len(step.names))]
    norms = tuple(0.0 if row is None else conflict.norms[row] for row in rows)
    cosines = tuple(
        tuple(0.0 if row is None or column is None else conflict.cosines[row][column] for column in rows)
        for row in rows
    )
    return replace(conflict, norms=norms, cosines=cosines)


def outside(step: Step) -> tuple[str, ...]:
    """Return the names of the tasks that are left out of the shared problem."""
    if len(step.inside) == len(step.names):
        return ()
    return tuple(name for task, name in enumerate(step.names) if task not in step.inside)


def _notes(taken: Taken, combination: Combination, norms: tuple[float, ...]) -> tuple[str, ...]:
    """Return the method's notes, and what else is to be known of the step."""
    notes, roles = combination.notes, taken.step.roles
    if len(taken.step.inside) < len(taken.step.names):
        notes += notes_on_outside(taken.step)
    if roles.left_out:
        leaf = roles.left_out[0]
        notes = (
            *notes,
            f"{len(roles.left_out)} leaf tensors that are no parameters (the first has shape {tuple(leaf.shape)}) are "
            "left out of the shared problem and take the gradient of the plain sum; name them in shared= to include "
            "them",
        )
    if roles.apart:
        notes = (*notes, "every task has a representation of its own: no conflict can be seen there")
    if combination.status != "ok" and 0.0 in norms:
        name = taken.gradients.names[norms.index(0.0)]
        notes = (*notes, f"the gradient of task {name!r} is zero, which made the step {combination.status}")
    if combination.residual is not None and combination.residual > RESIDUAL:
        notes = (
            *notes,
            f"the weights miss the conditions of the method's problem by {combination.residual:.1g} (relative): the "
            "task gradients are too nearly dependent for more",
        )
    segments = getattr(taken.walked, "segments", None)
    if segments is not None:
        notes = (*notes, LOW.format(f"{segments} segment" if segments == 1 else f"{segments} segments"))
    return notes


def of_first_rank(combination: Combination, step: Step) -> Combination:
    """Return on several processes the weights of the first: each solves the same problem, on a machine of its own."""
    if step.reduction is None:
        return combination
    ranks, device = step.reduction.ranks, step.losses[0].device
    changes: dict[str, Any] = {
        name: ranks.from_first(values, device)
        for name in ("weights", "block_weights")
        if (values := getattr(combination, name)) is not None
    }
    return replace(combination, **changes)


def decide(method: Method, taken: Taken) -> Combination:
    """Let a method combine the task gradients of a step, on several processes all alike.

    Raises:
        ValueError: the method rejects the input.
        GradientNotFinite: what it found is not finite.
    """
    step = taken.step
    if len(step.inside) < len(step.names):
        method.bind(step.names)  # also those of which it sees nothing
    combination = method.combine(taken.gradients)
    if step.reduction is not None:
        combination = of_first_rank(combination, step)
    check_result(method, combination)
    return combination


def check_result(method: Method, combination: Combination) -> None:
    """Check that what a method found is finite.

    Raises:
        GradientNotFinite: it is not; the method is named.
    """
    sound = True
    for numbers in (combination.weights, combination.block_weights, combination.transform):
        sound = sound and (numbers is None or bool(np.isfinite(numbers.numpy()).all()))
    direction = combination.direction
    if sound and direction is not None and combination.status == "ok":
        # No number on the host tells: the few methods that give a direction of their own wait for a device once more.
        total = direction.detach().sum(dtype=torch.promote_types(direction.dtype, torch.float32))
        sound = math.isfinite(total.numpy() if total.is_cpu else total)
        sound = sound or bool(torch.isfinite(direction).all())
    if not sound:
        raise GradientNotFinite(not_finite(method))


def not_finite(method: Method) -> str:
    """Return the message about a direction that is not finite."""
    return (
        f"the direction of {method.declares.name} is not finite (NaN or Inf) although every gradient is: some number "
        "in it is out of the range of its type. Nothing was changed. Keep losses and shared parameters in float32, or "
        "multiply all losses by a smaller constant."
    )


def notes_on_outside(step: Step) -> tuple[str, ...]:
    """Return a note for each task that is left out of the shared problem."""
    return tuple(
        f"task {name!r} reaches no shared parameter: it is left out of the shared problem, and its own parameters "
        "take their plain gradient"
        for name in outside(step)
    )


@contextmanager
def undone_on_failure(method: Method) -> Iterator[None]:
    """Give the method back what it knew before, whatever fails inside.

    The whole state of a stateful method is copied for that.
    """
    inner = [module for module in method.modules() if isinstance(module, Method)]
    before = [(module.tasks, dict(module._buffers)) for module in inner]
    state = deepcopy(method.state_dict()) if info_of(method).stateful else None
    try:
        yield
    except BaseException:  # also when the user interrupts
        for module, (tasks, buffers) in zip(inner, before, strict=True):
            module.tasks = tasks
            module._buffers.clear()
            module._buffers.update(buffers)
        if state is not None:
            awaited = method.awaited
            method.load_state_dict(state)
            method.awaited = awaited
        raise


def large_state(method: Method) -> bool:
    """Return whether a copy of the method's state would cost something: it has the size of the parameters."""
    return any(buffer is not None and buffer.numel() > 1 << 16 for buffer in method.buffers())


def lengths_of(gradients: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return the length of gradients of several parameters together, a float64 scalar on their device."""
    lengths = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for _, g in gradients])
    length: torch.Tensor = torch.linalg.vector_norm(lengths)
    return length


def watched(method: Method, jacobian: torch.Tensor, gramian: np.ndarray | None) -> bool:
    """Return whether a method's state is to be copied, in case that what it finds is not finite.

    A copy of a large state costs as much as the step; it is made where numbers are near the ends of their type.

    Args:
        method: what decides.
        jacobian: [T, P].
        gramian: [T, T] if it is known.
    """
    if not large_state(method):
        return info_of(method).stateful
    if jacobian.dtype.itemsize < 4:
        return True
    if gramian is None:
        return not float(torch.linalg.vector_norm(jacobian, ord=float("inf"))) < 1e15
    return not float(gramian.diagonal().max()) < 1e30
