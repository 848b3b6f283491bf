"""What a step leaves behind: its record, and after a failure nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

from detente.diagnostics.conflict import measure_altered, measure_conflict
from detente.methods.base import Method
from detente.methods.registry import info_of
from detente.values import Combination, StepRecord, TaskGradients


def record_of(gradients: TaskGradients, combination: Combination) -> StepRecord:
    """A step in plain numbers, from what a method saw and what it decided.

    ``seconds`` is left at zero: whoever calls knows how long the step took.
    """
    assert gradients.gramian is not None and gradients.losses is not None
    transform = None if combination.transform is None else combination.transform.numpy()
    return StepRecord(
        names=gradients.names,
        losses=tuple(gradients.losses.tolist()),
        weights=None if combination.weights is None else tuple(combination.weights.tolist()),
        status=combination.status,
        space=gradients.space,
        raw=measure_conflict(gradients.gramian),
        altered=None if transform is None else measure_altered(gradients.gramian, transform),
        kept_rank=combination.kept_rank,
        dropped=combination.dropped,
        notes=combination.notes,
    )


@contextmanager
def undone_on_failure(method: Method) -> Iterator[None]:
    """Whatever fails inside, the method knows afterwards what it knew before.

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
            method.load_state_dict(state)
        raise
