"""What a step leaves behind: its record, and after a failure nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch

from detente.autograd.engine import Taken
from detente.autograd.step import Step
from detente.diagnostics.conflict import measure_altered, measure_conflict
from detente.methods.base import Method
from detente.methods.registry import info_of
from detente.values import Combination, StepRecord

LOW = "memory='low': task gradients were taken in {} and not kept"
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
    outside = step.outside
    return StepRecord(
        names=step.names,
        losses=tuple(taken.losses.tolist()),
        weights=_weights(taken, combination),
        status=combination.status,
        space=gradients.space,
        raw=raw,
        altered=None if transform is None else measure_altered(gradients.gramian, transform),
        kept_rank=combination.kept_rank,
        dropped=(*outside, *combination.dropped) if outside else combination.dropped,
        notes=_notes(taken, combination, raw.norms),
        residual=combination.residual,
    )


def _weights(taken: Taken, combination: Combination) -> tuple[float | None, ...]:
    """Return one weight for each task of the step, None for one that has none."""
    step = taken.step
    found: list[float | None] = [None] * len(step.names)
    if combination.weights is not None:
        for task, weight in zip(step.inside, combination.weights.tolist(), strict=True):
            found[task] = weight
    return tuple(found)


def _notes(taken: Taken, combination: Combination, norms: tuple[float, ...]) -> tuple[str, ...]:
    """Return the method's notes, and what else is to be known of the step."""
    notes, roles = (*combination.notes, *notes_on_outside(taken.step)), taken.step.roles
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


def notes_on_outside(step: Step) -> tuple[str, ...]:
    """Return a note for each task that is left out of the shared problem."""
    return tuple(
        f"task {name!r} reaches no shared parameter: it is left out of the shared problem, and its own parameters "
        "take their plain gradient"
        for name in step.outside
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
