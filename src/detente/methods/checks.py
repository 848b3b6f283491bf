"""Checks of losses, options and remembered gradients that methods share; no method lives here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from detente.methods.base import Method
from detente.values import TaskGradients

Array = NDArray[np.float64]
# Weights beyond e^80 leave float32, in which gradients are added up, hardly a factor of a thousand.
_LARGEST_LOGARITHM = 80.0
# How far a negative weighted loss, and the scale itself, may go beyond where they settle, see check_growth.
_UNBOUNDED = 100.0


def positive_losses(
    method: Method, gradients: TaskGradients, why: str = "takes logarithms of the losses"
) -> Array:
    """Return the losses [T] of this step, all of them positive.

    Raises:
        ValueError: a loss is zero or negative; the task is named.

    Example:
        >>> import detente
        >>> gradients = TaskGradients(names=("left", "right"), losses=np.array([1.0, 0.0]))
        >>> positive_losses(detente.create("gls"), gradients)
        Traceback (most recent call last):
        ...
        ValueError: gls takes logarithms of the losses, and the loss of task 'right' is 0.0; it needs positive losses...
    """
    losses = gradients.losses
    assert losses is not None
    if not losses.min() > 0:
        place = int(np.argmin(losses > 0))
        raise ValueError(
            f"{method.declares.name} {why}, and the loss of task {gradients.names[place]!r} is {losses[place]}; it "
            "needs positive losses. Add a constant to that loss (its gradient stays the same) or use another method."
        )
    return losses


def learned_scales(method: Method, logarithms: Array, names: Sequence[str]) -> Array:
    """Return e to the learned logarithms, as long as their squares are well inside float64.

    Args:
        method: for messages.
        logarithms: [T].
        names: the tasks, in the same order.

    Raises:
        ValueError: a scale has left every useful range, because that task's loss stays at zero; it is named.

    Example:
        >>> import detente
        >>> learned_scales(detente.create("imtl"), np.array([0.0, 81.0]), ("left", "right"))
        Traceback (most recent call last):
        ...
        ValueError: imtl: the learned scale of task 'right' has grown to e^81. It grows without end where a loss...
    """
    place = int(logarithms.argmax())
    if logarithms[place] > _LARGEST_LOGARITHM:
        raise _without_end(method, names[place], logarithms[place])
    return np.exp(logarithms)


def check_growth(
    method: Method, gradients: TaskGradients, logarithms: Array, weighted: Array, *, start: float = 0.0
) -> None:
    """Refuse learned scales that no bounded optimum explains.

    Where a scale has settled, the weighted loss is 1 in the unit of the method's formula. It fluctuates around that,
    and may be negative for some steps, during which the scale grows. What is refused: the loss of this step is
    negative, the running mean of the weighted loss (over about 20 steps) is below -100, and the scale is more than 100
    times what it was at the start. A loss whose mean is positive gets there only if it is spread by hundreds of times
    that mean; one that stays at L < 0 gets there in less than ln(100 max(1, 1 / |L|)) / lr + 20 steps, when its weight
    is near 100 max(1, 1 / |L|).

    Args:
        method: for messages.
        gradients: of this step, with losses.
        logarithms: [T] of the scales.
        weighted: [T] running means of the weighted losses, in units of their value where the scale has settled.
        start: the logarithm of every scale before the first step.

    Raises:
        ValueError: a scale is running away; the task is named.

    Example:
        >>> import detente
        >>> gradients = TaskGradients(names=("left", "right"), losses=np.array([1.0, -0.5]))
        >>> check_growth(detente.create("imtl"), gradients, np.array([0.0, 5.5]), np.array([1.0, -110.0]))
        Traceback (most recent call last):
        ...
        ValueError: imtl: the learned scale of task 'right' has grown to e^6. It grows without end where a loss...
    """
    assert gradients.losses is not None
    runaway = (gradients.losses < 0) & (weighted < -_UNBOUNDED) & (logarithms - start > np.log(_UNBOUNDED))
    if runaway.any():
        place = int(runaway.argmax())
        raise _without_end(method, gradients.names[place], logarithms[place])


def _without_end(method: Method, task: str, logarithm: float) -> ValueError:
    return ValueError(
        f"{method.declares.name}: the learned scale of task {task!r} has grown to e^{logarithm:.0f}. It grows without "
        "end where a loss stays at or below zero. Add a constant to that loss (its gradient stays the same) or use a "
        "method that learns no scale."
    )


def losses_of(method: Method, losses: Mapping[str, Any] | Sequence[Any], expected: Sequence[str]) -> Array:
    """Return finite losses [len(expected)] handed to a hook, in the order of the tasks ``expected``.

    Args:
        method: whose hook was called, for messages.
        losses: numbers or scalar tensors: by task name, or in the order of ``expected``.
        expected: the tasks of the step that the hook belongs to.

    Raises:
        ValueError: a task is missing or unknown, the count differs, or a loss is not finite; the task is named.

    Example:
        >>> import detente
        >>> losses_of(detente.create("famo"), {"b": 2.0, "a": 1.0}, ("a", "b"))
        array([1., 2.])
    """
    name = method.declares.name
    if isinstance(losses, Mapping):
        given = {str(task): float(loss) for task, loss in losses.items()}
        missing = [task for task in expected if task not in given]
        unknown = [task for task in given if task not in expected]
        if missing or unknown:
            what = f"lacks task {missing[0]!r}" if missing else f"names task {unknown[0]!r}"
            raise ValueError(
                f"{name}: after_step() {what}; it takes the losses of the tasks of the last step "
                f"({', '.join(expected)}), on the same batch."
            )
        values = np.array([given[task] for task in expected])
    else:
        values = np.array([float(loss) for loss in losses])
        if len(values) != len(expected):
            raise ValueError(
                f"{name}: after_step() was given {len(values)} losses, and the last step had {len(expected)} tasks "
                f"({', '.join(expected)})."
            )
    for task, value in zip(expected, values, strict=True):
        if not np.isfinite(value):
            raise ValueError(
                f"{name}: the loss of task {task!r} given to after_step() is not finite: {value}."
            )
    return values


def sized(
    method: Method, state: torch.Tensor | None, jacobian: torch.Tensor, gradients: TaskGradients
) -> torch.Tensor:
    """Return a [tasks, P] state in the order of the Jacobian's columns, or zeros where there is none yet.

    The state goes with the parameters, not with their places: where another order of the parameters, or more or fewer
    of them, is given than last time (``method.column_layout``, see :func:`layout_of`), the columns follow, and those of
    new parameters are zero.

    Args:
        method: whose state it is.
        state: None before the first step.
        jacobian: [T, P], whose dtype and device the state takes.
        gradients: tell which parameter each column belongs to, where they know.

    Raises:
        ValueError: the Jacobian has another number of columns than the state, and nothing tells which are which.

    Example:
        >>> import detente
        >>> sized(detente.create("db-mtl", tasks=2), None, torch.ones(2, 3), TaskGradients(("a", "b"))).shape
        torch.Size([2, 3])
    """
    assert method.tasks is not None
    if state is None:
        return jacobian.new_zeros(len(method.tasks), jacobian.shape[1])
    known, now = method._buffers.get("column_layout"), layout_of(gradients)
    if known is not None and now is not None and not torch.equal(known, now):
        return _reordered(state, known, now).to(jacobian)
    if state.shape[1] != jacobian.shape[1]:
        raise ValueError(
            f"{method.declares.name} remembers gradients of {state.shape[1]} shared parameters and was given "
            f"{jacobian.shape[1]}. Name the shared parameters with shared=, so that they stay the same, or create a "
            "new method."
        )
    return state.to(jacobian)


def layout_of(gradients: TaskGradients) -> torch.Tensor | None:
    """Return key and width [K, 2] of the parameters behind the columns, for a method's buffer; None if unknown.

    Example:
        >>> layout_of(TaskGradients(("a",), columns=((0, 6), (1, 2)))).tolist()
        [[0, 6], [1, 2]]
    """
    return torch.tensor(gradients.columns, dtype=torch.int64) if gradients.columns else None


def _reordered(state: torch.Tensor, known: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """Return the columns of a state [T, P] as the parameters now follow one another; new ones are zero."""
    pieces = torch.split(state, known[:, 1].tolist(), dim=1)
    held = {(key, width): piece for (key, width), piece in zip(known.tolist(), pieces, strict=True)}
    found = [held.get((key, width), state.new_zeros(len(state), width)) for key, width in now.tolist()]
    return torch.cat(found, dim=1)


def check_range(method: Method, gradients: TaskGradients, sizes: np.ndarray) -> None:
    """Refuse sizes [T] of gradients that are not finite.

    Raises:
        ValueError: one is not; the task is named.

    Example:
        >>> import detente
        >>> gradients = TaskGradients(names=("left", "right"))
        >>> check_range(detente.create("db-mtl"), gradients, np.array([1.0, np.inf]))
        Traceback (most recent call last):
        ...
        ValueError: db-mtl: the gradient of task 'right' is out of the range of its dtype. Scale that loss down.
    """
    finite = np.isfinite(sizes)
    if not finite.all():
        name = gradients.names[int(np.argmin(finite))]
        raise ValueError(
            f"{method.declares.name}: the gradient of task {name!r} is out of the range of its dtype. Scale that loss "
            "down."
        )
