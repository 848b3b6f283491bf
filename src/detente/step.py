"""One training step: losses to task gradients, task gradients to a combination, a combination to ``.grad``.

:func:`backward` is what a training loop calls; it composes :func:`task_gradients`, the method, and :func:`apply`.
:func:`combine` is the mathematics alone, on a matrix.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from detente.autograd.exact import Pass, exact_pass, layer_pass
from detente.autograd.flat import Gradients, accumulate, largest_entries
from detente.autograd.gramian import gramian
from detente.autograd.host import to_host
from detente.autograd.partition import Memory, Parameters, as_tensors, partition
from detente.autograd.representation import assign_roles, features_pass
from detente.autograd.weighted import weighted_backward
from detente.diagnostics.conflict import measure_conflict
from detente.methods.base import Method, one_of, positional
from detente.methods.registry import create, info_of
from detente.values import Combination, StepRecord, TaskGradients

Losses = Mapping[str, torch.Tensor] | Sequence[torch.Tensor]
Features = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None
Heads = Literal["own", "weighted"] | None
Scale = Literal["native", "sum", "mean", "unit"]
MemoryMode = Literal["fast", "batched"]

NO_SHARED = "no shared parameters: every parameter takes the plain gradient of its own loss"


def combine(
    method: Method | str, jacobian: torch.Tensor, losses: Mapping[str, Any] | Sequence[Any] | None = None
) -> Combination:
    """The mathematics alone: one training step of ``method`` on a matrix of task gradients.

    Args:
        method: a method, or the name of one (created afresh, with its default options).
        jacobian: [T, P], one task gradient per row; left untouched.
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
    method = create(method) if isinstance(method, str) else method
    jacobian = torch.as_tensor(jacobian).detach()
    if jacobian.dim() != 2 or jacobian.shape[0] == 0:
        raise ValueError(f"jacobian has shape {tuple(jacobian.shape)}; give one row per task, [T, P] with T >= 1.")
    if not jacobian.is_floating_point():
        raise ValueError(f"jacobian has dtype {jacobian.dtype}; give floating-point gradients.")
    tasks = jacobian.shape[0]
    if losses is not None and len(losses) != tasks:
        raise ValueError(f"{len(losses)} losses for {tasks} rows of the jacobian.")
    if isinstance(losses, Mapping):
        names = tuple(str(name) for name in losses)
    else:
        names = method.tasks if method.tasks is not None and len(method.tasks) == tasks else positional(tasks)
    scalars = [] if losses is None else [_scalar(n, v) for n, v in zip(names, _values(losses), strict=True)]
    host = to_host([*scalars, gramian(jacobian)])
    matrix = host[-1]
    numbers = np.array([float(entry) for entry in host[:-1]]) if losses is not None else None
    _check_losses(names, numbers)
    _check_gradients(names, matrix)
    gradients = TaskGradients(names=names, losses=numbers, gramian=matrix, jacobian=jacobian)
    return with_direction(method.combine(gradients), jacobian)


def with_direction(combination: Combination, jacobian: torch.Tensor) -> Combination:
    """The combination with its direction [P] filled in from the weights; exactly zero where it is stationary."""
    if combination.status == "stationary":
        return replace(combination, direction=jacobian.new_zeros(jacobian.shape[1]))
    if combination.direction is not None:
        return combination
    assert combination.weights is not None, "a combination has weights or a direction"
    weights = combination.weights.to(device=jacobian.device, dtype=jacobian.dtype)
    return replace(combination, direction=weights @ jacobian)


@dataclass(frozen=True)
class Taken:
    """The task gradients of one step, as values and as the graph that can still carry a direction back.

    Attributes:
        gradients: what a method sees.
        graph: turns a direction into gradients of the shared parameters; holds the own parameters' gradients.
    """

    gradients: TaskGradients
    graph: Pass


def task_gradients(
    losses: Losses,
    *,
    features: Features = None,
    shared: Parameters | None = None,
    task_specific: Parameters | Mapping[str, Any] | None = None,
    solve_on: Parameters | None = None,
    memory: MemoryMode = "fast",
    retain_graph: bool = False,
    workspace: Memory | None = None,
) -> Taken | None:
    """Take the gradient of every loss with respect to what the tasks share.

    Args:
        losses, features, shared, task_specific, solve_on, memory, retain_graph: as for :func:`backward`.
        workspace: memory from one step to the next; None takes fresh memory, so that the returned Jacobian is the
            caller's to keep.

    Returns:
        The task gradients, or None if no parameter is shared.

    Raises:
        ValueError: as :func:`backward`.

    Example:
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> taken = task_gradients({"a": weight.sum(), "b": (3 * weight).sum()})
        >>> taken.gradients.gramian
        array([[ 2.,  6.],
               [ 6., 18.]])
    """
    names, scalars = _named_losses(losses)
    workspace = Memory() if workspace is None else workspace
    graph = _take(names, scalars, features, shared, task_specific, solve_on, memory, retain_graph, workspace)
    return None if graph is None else _measure(names, graph)


def apply(taken: Taken, combination: Combination, *, heads: Heads = "own", scale: Scale = "native") -> None:
    """Carry a combination back to the parameters: add to the ``.grad`` of shared and own parameters.

    A refused combination leaves every ``.grad`` as it was.

    Args:
        taken: from :func:`task_gradients`; its graph is used up unless it was retained.
        combination: with its direction filled in.
        heads: ``own`` parameters take the plain gradient of their loss, or ``weighted`` like the shared ones.
        scale: length of the shared direction, see :func:`backward`.

    Raises:
        ValueError: a gradient behind the representation is not finite, or weights are needed and there are none.

    Example:
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> taken = task_gradients({"a": weight.sum(), "b": (3 * weight).sum()})
        >>> apply(taken, combine("mgda", taken.gradients.jacobian))
        >>> weight.grad
        tensor([1., 1.])
    """
    if not combination.accepted:
        return
    direction, weights = combination.direction, combination.weights
    assert direction is not None, "use with_direction() first"
    if weights is None and (heads == "weighted" or taken.graph.space == "layer"):
        asked = "heads='weighted'" if heads == "weighted" else "solve_on="
        raise ValueError(f"{asked} needs weights of the tasks, and this method gives only a direction.")
    native = weights
    if scale != "native":
        factor = _length_factor(direction, taken.gradients, scale)
        direction = direction * factor.to(direction.dtype)
        weights = None if weights is None else weights * factor.to(device=weights.device)
    if combination.status == "stationary" and weights is not None:
        weights = torch.zeros_like(weights)
    shared = taken.graph.shared(direction, weights)
    if taken.graph.space != "exact":
        _check_behind(taken.gradients.names, shared)
    own = taken.graph.own
    if heads == "weighted":
        assert native is not None
        own = [[(p, g * float(w)) for p, g in task] for w, task in zip(native.tolist(), own, strict=True)]
    accumulate([*shared, *(pair for task in own for pair in task)])


def backward(
    losses: Losses,
    method: Method,
    *,
    features: Features = None,
    shared: Parameters | None = None,
    task_specific: Parameters | Mapping[str, Any] | None = None,
    solve_on: Parameters | None = None,
    heads: Heads = None,
    scale: Scale = "native",
    memory: MemoryMode = "fast",
    measure: bool = False,
    retain_graph: bool = False,
) -> StepRecord:
    """Fill ``.grad`` for one step of training with several losses: the line that replaces ``sum(losses).backward()``.

    A parameter that two or more losses reach is shared and receives the method's direction; one that a single loss
    reaches is that task's own. Once shared, a parameter stays shared for this method, so that batches without some
    task change nothing. Gradients are added to an existing ``.grad``. Hooks on leaves do not run, since gradients
    are taken with ``torch.autograd.grad``.

    Args:
        losses: scalars with their graph, by task name or in sequence (named "0", "1", …). A task may be absent
            from a step.
        method: from :func:`detente.create`, made once, outside the loop: it may carry state.
        features: the shared representation, one tensor or several: the problem is solved on the gradients of the
            whole batch's representation, and one backward carries the result through the encoder (upper bound).
            Shared parameters reached past it take the weighted sum of their gradients.
        shared, task_specific: parameters or modules, instead of discovery. With both given nothing else is touched;
            with one given everything else a loss reaches has the other role.
        solve_on: shared parameters to solve on (the last shared layer); the weights then serve all of them.
        heads: ``own``: own parameters take the plain gradient of their loss; ``weighted``: multiplied by the task's
            weight. None is ``own`` for methods that combine gradients and ``weighted`` for weightings of losses.
        scale: length of the shared direction in the space where the problem is solved: ``native``, or that of the
            ``sum`` or ``mean`` gradient, or ``unit``. Own parameters are not scaled; zero stays zero.
        memory: ``fast``: one backward per task; ``batched``: one vectorised backward (every task walks all heads).
        measure: take task gradients for the record also for methods that do not need them.
        retain_graph: keep the graph for another backward.

    Returns:
        A record of the step in plain numbers. ``record.accepted`` is False if the method refused the step; every
        ``.grad`` is then as it was found.

    Raises:
        ValueError: no losses, a loss that is not a scalar or has no graph, NaN or Inf in a loss or gradient,
            features that a loss does not depend on, named shared parameters that no loss reaches, a space the
            method cannot be solved in. The task is named; ``.grad`` and the method's state are unchanged.
        TypeError: ``method`` is not a method.

    Example:
        >>> import detente
        >>> trunk, left, right = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        >>> method = detente.create("mgda")
        >>> z = trunk(torch.ones(2, 3))
        >>> record = detente.backward({"left": left(z).square().mean(), "right": right(z).square().mean()}, method)
        >>> record.names, record.accepted, trunk.weight.grad is not None
        (('left', 'right'), True, True)
    """
    started = time.perf_counter()
    _check_call(method, heads, scale, memory, features, solve_on)
    names, scalars = _named_losses(losses)
    info = info_of(method)
    workspace: Memory = method.__dict__.setdefault("workspace", Memory())
    if heads is None:
        heads = info.heads
    if not (info.takes_gradients or measure or scale != "native"):
        record = _weighting(names, scalars, method, workspace, shared, task_specific, heads, retain_graph)
        return replace(record, seconds=time.perf_counter() - started)
    graph = _take(names, scalars, features, shared, task_specific, solve_on, memory, retain_graph, workspace)
    if graph is None:
        plain = None if info.takes_gradients else method
        record = _weighting(names, scalars, plain, workspace, shared, task_specific, heads, retain_graph)
        return replace(record, seconds=time.perf_counter() - started)
    taken = _measure(names, graph)
    assert taken.gradients.jacobian is not None
    # Past this point something may still fail behind the representation: keep what the method knew.
    before = deepcopy(method.state_dict()) if info.stateful and graph.space != "exact" else None
    combination = with_direction(method.combine(taken.gradients), taken.gradients.jacobian)
    try:
        apply(taken, combination, heads=heads, scale=scale)
    except ValueError:
        if before is not None:
            method.load_state_dict(before)
        raise
    return replace(_record(taken.gradients, combination), seconds=time.perf_counter() - started)


# ---- private


def _weighting(
    names: tuple[str, ...],
    losses: list[torch.Tensor],
    method: Method | None,
    workspace: Memory,
    shared: Parameters | None,
    task_specific: Parameters | Mapping[str, Any] | None,
    heads: Heads,
    retain_graph: bool,
) -> StepRecord:
    """A step that needs no task gradients: one backward of the weighted losses (plain ones without a method)."""
    numbers = None
    before = None
    combination = Combination(weights=torch.ones(len(losses), dtype=torch.float64), notes=(NO_SHARED,))
    if method is not None:
        if "losses" in info_of(method).needs:
            numbers = np.array([float(entry) for entry in to_host(losses)])
            _check_losses(names, numbers)
        before = deepcopy(method.state_dict()) if info_of(method).stateful else None
        known = method.tasks
        combination = method.combine(TaskGradients(names=names, losses=numbers, space="none"))
    parts = _partition(losses, workspace, shared, task_specific)
    assert combination.weights is not None
    found, own = weighted_backward(
        losses,
        parts,
        combination.weights,
        plain_heads=heads == "own" and method is not None,
        retain_graph=retain_graph,
    )
    everything = [*found, *(pair for task in own for pair in task)]
    largest = largest_entries(gradient for _, gradient in everything)
    try:
        if numbers is None:
            host = to_host([*losses, *largest])
            numbers = np.array([float(entry) for entry in host[: len(losses)]])
            _check_losses(names, numbers)
            finite = np.array([float(entry) for entry in host[len(losses) :]])
        else:
            finite = np.array([float(entry) for entry in to_host(largest)])
        _check_plain(names, found, own, finite)
    except ValueError:
        if method is not None:
            if before is not None:
                method.load_state_dict(before)
            elif known is None:
                method._unbind()
        raise
    accumulate(everything)
    return StepRecord(
        names=names,
        losses=tuple(numbers.tolist()),
        weights=tuple(combination.weights.tolist()),
        status=combination.status,
        notes=combination.notes,
    )


def _take(
    names: tuple[str, ...],
    losses: list[torch.Tensor],
    features: Features,
    shared: Parameters | None,
    task_specific: Parameters | Mapping[str, Any] | None,
    solve_on: Parameters | None,
    memory: MemoryMode,
    retain_graph: bool,
    workspace: Memory,
) -> Pass | None:
    if features is not None:
        tensors = as_tensors(features, "features")
        roles = assign_roles(
            names,
            losses,
            tensors,
            workspace,
            shared=None if shared is None else as_tensors(shared, "shared"),
            task_specific=None if task_specific is None else as_tensors(task_specific, "task_specific"),
        )
        return features_pass(losses, tensors, roles, workspace, retain_graph=retain_graph)
    parts = _partition(losses, workspace, shared, task_specific)
    if not any(parts.reached):
        return None
    if solve_on is not None:
        layer = as_tensors(solve_on, "solve_on")
        return layer_pass(losses, parts, layer, workspace, retain_graph=retain_graph)
    return exact_pass(losses, parts, workspace, retain_graph=retain_graph, batched=memory == "batched")


def _partition(
    losses: list[torch.Tensor],
    workspace: Memory,
    shared: Parameters | None,
    task_specific: Parameters | Mapping[str, Any] | None,
) -> Any:
    return partition(
        losses,
        workspace,
        shared=None if shared is None else as_tensors(shared, "shared"),
        task_specific=None if task_specific is None else as_tensors(task_specific, "task_specific"),
    )


def _measure(names: tuple[str, ...], graph: Pass) -> Taken:
    """Gramian, losses and a check of every gradient, in one copy to the host."""
    assert graph.jacobian is not None
    tasks = len(names)
    largest = [largest_entries(gradient for _, gradient in task) for task in graph.own]
    host = to_host([*graph.losses, gramian(graph.jacobian), *(entry for task in largest for entry in task)])
    numbers = np.array([float(entry) for entry in host[:tasks]])
    matrix, rest = host[tasks], iter(host[tasks + 1 :])
    _check_losses(names, numbers)
    _check_gradients(names, matrix, graph.space)
    for name, entries in zip(names, largest, strict=True):
        if not all(np.isfinite(next(rest)) for _ in entries):
            raise ValueError(_not_finite(name, "the gradient of its own parameters"))
    return Taken(
        TaskGradients(
            names=names,
            losses=numbers,
            gramian=matrix,
            jacobian=graph.jacobian,
            activations=graph.activations,
            space=graph.space,
        ),
        graph,
    )


def _length_factor(direction: torch.Tensor, gradients: TaskGradients, scale: Scale) -> torch.Tensor:
    """A float64 scalar on the direction's device that gives it the asked length; 0 for a zero direction."""
    assert gradients.gramian is not None
    target = 1.0
    if scale != "unit":
        target = float(np.sqrt(max(gradients.gramian.sum(), 0.0)))
        target = target / gradients.tasks if scale == "mean" else target
    length = torch.linalg.vector_norm(direction, dtype=torch.float64)
    return torch.where(length > 0, target / length, torch.zeros_like(length))


def _record(gradients: TaskGradients, combination: Combination) -> StepRecord:
    assert gradients.gramian is not None and gradients.losses is not None
    transform = None if combination.transform is None else combination.transform.numpy()
    return StepRecord(
        names=gradients.names,
        losses=tuple(gradients.losses.tolist()),
        weights=None if combination.weights is None else tuple(combination.weights.tolist()),
        status=combination.status,
        space=gradients.space,
        raw=measure_conflict(gradients.gramian),
        altered=None if transform is None else measure_conflict(transform @ gradients.gramian @ transform.T),
        kept_rank=combination.kept_rank,
        dropped=combination.dropped,
        notes=combination.notes,
    )


def _named_losses(losses: Losses) -> tuple[tuple[str, ...], list[torch.Tensor]]:
    if isinstance(losses, torch.Tensor):
        raise ValueError(
            "losses is one tensor; give the separate scalars, as a mapping from task name to loss or a list. "
            "(A backward through a stacked tensor walks the heads of all tasks.)"
        )
    values = _values(losses)
    if not values:
        raise ValueError("losses is empty; give at least one loss.")
    names = tuple(str(name) for name in losses) if isinstance(losses, Mapping) else positional(len(values))
    scalars = []
    for name, loss in zip(names, values, strict=True):
        if not isinstance(loss, torch.Tensor):
            raise TypeError(f"the loss of task {name!r} is a {type(loss).__name__}, not a tensor.")
        scalars.append(_scalar(name, loss))
        if not loss.requires_grad:
            raise ValueError(
                f"the loss of task {name!r} has no graph; it was detached, computed under torch.no_grad(), or "
                "depends on no parameter that requires a gradient. Leave the task out of this step, or multiply "
                "its prediction by zero to keep the connection."
            )
    return names, scalars


def _values(losses: Mapping[str, Any] | Sequence[Any]) -> list[Any]:
    return list(losses.values()) if isinstance(losses, Mapping) else list(losses)


def _scalar(name: str, loss: Any) -> torch.Tensor:
    loss = torch.as_tensor(loss)
    if loss.numel() != 1:
        raise ValueError(f"the loss of task {name!r} has shape {tuple(loss.shape)}; reduce it to a scalar.")
    return loss


def _check_call(method: Any, heads: Any, scale: Any, memory: Any, features: Any, solve_on: Any) -> None:
    if not isinstance(method, Method):
        hint = f" Create it once, outside the loop: detente.create({method!r})." if isinstance(method, str) else ""
        raise TypeError(f"method is a {type(method).__name__}, not a detente method.{hint}")
    if heads is not None:
        one_of("heads", heads, ("own", "weighted"))
    one_of("scale", scale, ("native", "sum", "mean", "unit"))
    one_of("memory", memory, ("fast", "batched"))
    if features is not None and solve_on is not None:
        raise ValueError("give features= or solve_on=, not both: each names where the problem is solved.")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1:
            raise RuntimeError(
                "this version does not reduce task gradients over processes, and training on would let the ranks "
                "drift apart. Run on one process."
            )


def _not_finite(name: str, what: str) -> str:
    return (
        f"{what} of task {name!r} is not finite (NaN or Inf). Nothing was changed. Look for a division by zero, a "
        "logarithm of zero, or a learning rate too high for this task."
    )


def _check_losses(names: Sequence[str], losses: np.ndarray | None) -> None:
    if losses is None:
        return
    for name, loss in zip(names, losses, strict=True):
        if not np.isfinite(loss):
            raise ValueError(_not_finite(name, "the loss"))


def _check_gradients(names: Sequence[str], matrix: np.ndarray, space: str = "exact") -> None:
    what = "the gradient with respect to the features" if space == "features" else "the shared gradient"
    for name, square in zip(names, np.diagonal(matrix), strict=True):
        if not np.isfinite(square):
            raise ValueError(_not_finite(name, what))


def _check_behind(names: Sequence[str], gradients: Gradients) -> None:
    largest = largest_entries(gradient for _, gradient in gradients)
    if largest and not np.isfinite(to_host([torch.stack(largest).max()])[0]):
        raise ValueError(
            f"the gradients of tasks {', '.join(names)} are finite where the problem was solved and not finite "
            "(NaN or Inf) behind it, in the shared parameters. Nothing was changed."
        )


def _check_plain(
    names: Sequence[str], shared: Gradients, own: Sequence[Gradients], largest: np.ndarray
) -> None:
    if np.isfinite(largest).all():
        return
    offset = len(shared)
    for name, task in zip(names, own, strict=True):
        if not np.isfinite(largest[offset : offset + len(task)]).all():
            raise ValueError(_not_finite(name, "the gradient"))
        offset += len(task)
    raise ValueError(
        f"the gradient of the weighted losses of tasks {', '.join(names)} is not finite (NaN or Inf) in the shared "
        "parameters. Nothing was changed. Pass measure=True for one step to learn which task it comes from."
    )
