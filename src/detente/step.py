"""One training step: losses to task gradients, task gradients to a combination, a combination to ``.grad``.

:func:`backward` is what a training loop calls; it composes :func:`task_gradients`, the method, and :func:`apply`.
:func:`combine` is the mathematics alone, on a matrix.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

# "as" of the same name: what another room needs to compose the parts of a step anew.
from detente.autograd.flat import Gradients, accumulate, finite, probes, probes_of_rows
from detente.autograd.gramian import gramian
from detente.autograd.host import to_host as to_host
from detente.autograd.losses import (
    Losses,
    check_behind,
    check_gradients,
    check_losses,
    check_own,
    check_scalar,
    check_weighted,
    named_losses,
    values_of,
)
from detente.autograd.measure import Taken as Taken
from detente.autograd.measure import check_further, measure_gradients, take_further
from detente.autograd.partition import Memory as Memory
from detente.autograd.partition import Parameters as Parameters
from detente.autograd.partition import as_tensors as as_tensors
from detente.autograd.take import Where, take
from detente.autograd.weighted import weighted_backward
from detente.diagnostics.conflict import measure_conflict
from detente.methods.base import Method as Method
from detente.methods.base import one_of, positional
from detente.methods.registry import create, info_of
from detente.values import GRADIENT_NEEDS, Combination, StepRecord, TaskGradients

Features = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None
Heads = Literal["own", "weighted"] | None
Scale = Literal["native", "sum", "mean", "unit"]
MemoryMode = Literal["fast", "batched"]

NO_SHARED = "no shared parameters: every parameter takes the plain gradient of its own loss"
NO_SHARED_WEIGHTED = "no shared parameters: every parameter takes the weighted gradient of its own loss"


def combine(
    method: Method | str, jacobian: torch.Tensor, losses: Mapping[str, Any] | Sequence[Any] | None = None
) -> Combination:
    """The mathematics alone: one training step of ``method`` on a matrix of task gradients.

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
    method = create(method) if isinstance(method, str) else method
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
    return with_direction(method.combine(gradients), gradients)


def with_direction(combination: Combination, gradients: TaskGradients) -> Combination:
    """The combination with its direction [P] filled in from the weights; exactly zero where it is stationary.

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
    return replace(combination, direction=direction)


def task_gradients(
    losses: Losses,
    *,
    features: Features = None,
    shared: Parameters | None = None,
    task_specific: Parameters | Mapping[str, Any] | None = None,
    solve_on: Parameters | None = None,
    memory: MemoryMode = "fast",
    retain_graph: bool = False,
    blocks: bool = False,
    workspace: Memory | None = None,
) -> Taken | None:
    """Take the gradient of every loss with respect to what the tasks share.

    Args:
        losses, features, shared, task_specific, solve_on, memory, retain_graph: as for :func:`backward`.
        blocks: also one Gramian for each shared tensor, for methods that need blocks; in the exact space.
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
    names, scalars = named_losses(losses)
    where = Where.given(features, shared, task_specific, solve_on)
    workspace = Memory() if workspace is None else workspace
    graph = take(
        names,
        scalars,
        where,
        workspace,
        retain_graph=retain_graph,
        batched=memory == "batched",
        activations=True,
    )
    return None if graph is None else measure_gradients(names, graph, blocks=blocks)


def apply(taken: Taken, combination: Combination, *, heads: Heads = "own", scale: Scale = "native") -> None:
    """Carry a combination back to the parameters: add to the ``.grad`` of shared and own parameters.

    A refused combination leaves every ``.grad`` as it was.

    Args:
        taken: from :func:`task_gradients`; its graph is used up unless it was retained.
        combination: what a method decided.
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
    assert taken.gradients.jacobian is not None
    weights = combination.weights
    if weights is None and (heads == "weighted" or taken.graph.space == "layer"):
        asked = "heads='weighted'" if heads == "weighted" else "solve_on="
        raise ValueError(f"{asked} needs one weight for each task, and this method gives none.")
    shared = shared_gradients(taken, combination, scale=scale)
    own = taken.graph.own
    if heads == "weighted":
        assert weights is not None
        own = [[(p, g * float(w)) for p, g in task] for w, task in zip(weights.tolist(), own, strict=True)]
    accumulate([*shared, *(pair for task in own for pair in task)])


def shared_gradients(taken: Taken, combination: Combination, *, scale: Scale = "native") -> Gradients:
    """Shared parameters with the gradient that a combination gives each of them; no ``.grad`` is touched.

    Args:
        taken: from :func:`task_gradients`; its graph is used up unless it was retained.
        combination: what a method decided.
        scale: length of the direction, see :func:`backward`.

    Raises:
        ValueError: a gradient behind the representation is not finite, or weights are needed and there are none.
    """
    weights = combination.weights
    by_weights = weights is not None and combination.direction is None and combination.block_weights is None
    if by_weights and scale == "native" and combination.status == "ok":
        assert weights is not None
        shared = taken.graph.shared_by_weights(weights)
    else:
        shared = _along_direction(taken, combination, scale)
    if taken.graph.space != "exact":
        check_behind(taken.gradients.names, shared)
    return shared


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
    extra: Sequence[Losses] = (),
    retain_graph: bool = False,
) -> StepRecord:
    """Fill ``.grad`` for one step of training with several losses: the line that replaces ``sum(losses).backward()``.

    A parameter that two or more losses reach is shared and receives the method's direction; one that a single loss
    reaches is that task's own. Once shared, a parameter stays shared for this method, so that batches without some
    task change nothing. Gradients are added to an existing ``.grad``.

    Gradients are taken with ``torch.autograd.grad``: post-accumulate hooks of parameters do not run, and hooks of
    tensors (``register_hook``) see each backward, that is one task's gradient at a time.

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
            With ``features`` or ``solve_on`` both are the same.
        measure: take task gradients for the record also for methods that do not need them.
        extra: losses of the same tasks on further, independent batches, for methods that declare ``batches:k``: k - 1
            of them, or none (this batch then stands for all). They only inform the method.
        retain_graph: keep the graph for another backward.

    Returns:
        A record of the step in plain numbers. ``record.accepted`` is False if the method refused the step; every
        ``.grad`` is then as it was found.

    Raises:
        ValueError: no losses, a loss that is not a scalar or has no graph, NaN or Inf in a loss or gradient,
            features that a loss does not depend on, named shared parameters that no loss reaches, a space the
            method cannot be solved in, further batches it does not take. The task is named; ``.grad`` and the
            method's state are unchanged.
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
    _check_call(method, heads, scale, memory)
    names, scalars = named_losses(losses)
    where = Where.given(features, shared, task_specific, solve_on)
    info = info_of(method)
    workspace: Memory = method.__dict__.setdefault("workspace", Memory())
    if heads is None:
        heads = info.heads
    check_further(info, where, extra)
    needs = method.needs_now()
    graph = None
    if needs & GRADIENT_NEEDS or measure or scale != "native":
        graph = take(
            names,
            scalars,
            where,
            workspace,
            retain_graph=retain_graph,
            batched=memory == "batched",
            activations="activations" in needs,
        )
    if graph is None:
        record = _weighting(names, scalars, method, where, heads, retain_graph, workspace)
        return replace(record, seconds=time.perf_counter() - started)
    taken = measure_gradients(names, graph, blocks="blocks" in needs)
    if extra and any(need.startswith("batches:") for need in needs):
        further = take_further(names, extra, graph, blocks="blocks" in needs, retain_graph=retain_graph)
        taken = replace(taken, gradients=replace(taken.gradients, extra=further))
    # What fails past this point (a gradient behind the representation, weights that do not exist) must not leave a
    # trace in the method; in the exact space nothing does, and a copy of a large state is saved.
    cautious = graph.space != "exact" or heads == "weighted"
    with undone_on_failure(method) if cautious else nullcontext():
        combination = method.combine(taken.gradients)
        apply(taken, combination, heads=heads, scale=scale)
    return replace(record_of(taken.gradients, combination), seconds=time.perf_counter() - started)


# ---- private


def _weighting(
    names: tuple[str, ...],
    losses: list[torch.Tensor],
    method: Method,
    where: Where,
    heads: Heads,
    retain_graph: bool,
    workspace: Memory,
) -> StepRecord:
    """A step without task gradients: one backward of the weighted losses.

    A method that would need gradients, and has none because nothing is shared, is not asked: the weights are 1.
    """
    parts = where.partition(names, losses, workspace)
    needs = method.needs_now()
    plain = bool(needs & GRADIENT_NEEDS)
    known = None
    if not plain and "losses" in needs:
        known = to_host([losses])[0]
        check_losses(names, known)
    with nullcontext() if plain else undone_on_failure(method):
        combination = Combination(weights=torch.ones(len(losses), dtype=torch.float64))
        if not plain:
            combination = method.combine(TaskGradients(names=names, losses=known, space="none"))
        assert combination.weights is not None, "a weighting of losses gives weights"
        found, own = weighted_backward(
            losses,
            parts,
            combination.weights,
            plain_heads=heads == "own" and not plain,
            retain_graph=retain_graph,
        )
        everything = [*found, *(pair for task in own for pair in task)]
        values, probed = to_host([losses, probes(gradient for _, gradient in everything)])
        check_losses(names, values)
        check_own(names, own, probed[len(found) :])
        check_weighted(names, found, probed[: len(found)])
        if combination.accepted:
            accumulate(everything)
    notes = combination.notes
    if not any(parts.reached):
        notes = (*notes, NO_SHARED if plain or heads == "own" else NO_SHARED_WEIGHTED)
    return StepRecord(
        names=names,
        losses=tuple(values.tolist()),
        weights=tuple(combination.weights.tolist()),
        status=combination.status,
        notes=notes,
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
    except Exception:
        for module, (tasks, buffers) in zip(inner, before, strict=True):
            module.tasks = tasks
            module._buffers.clear()
            module._buffers.update(buffers)
        if state is not None:
            method.load_state_dict(state)
        raise


def _along_direction(taken: Taken, combination: Combination, scale: Scale) -> Gradients:
    """Gradients of the shared parameters for a direction that the weights do not give, or not at this length."""
    assert taken.gradients.jacobian is not None
    combination = with_direction(combination, taken.gradients)
    direction, weights = combination.direction, combination.weights
    assert direction is not None
    if scale != "native":
        factor = _length_factor(direction, taken.gradients, scale)
        direction = direction * factor.to(direction.dtype)
        weights = None if weights is None else weights * factor.to(device=weights.device)
    if combination.status == "stationary" and weights is not None:
        weights = torch.zeros_like(weights)
    return taken.graph.shared(direction, weights)


def _length_factor(direction: torch.Tensor, gradients: TaskGradients, scale: Scale) -> torch.Tensor:
    """A float64 scalar on the direction's device that gives it the asked length; 0 for a zero direction."""
    assert gradients.gramian is not None
    target = 1.0
    if scale != "unit":
        target = float(np.sqrt(max(gradients.gramian.sum(), 0.0)))
        target = target / gradients.tasks if scale == "mean" else target
    length = torch.linalg.vector_norm(direction, dtype=torch.float64)
    return torch.where(length > 0, target / length, torch.zeros_like(length))


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
        altered=None if transform is None else measure_conflict(transform @ gradients.gramian @ transform.T),
        kept_rank=combination.kept_rank,
        dropped=combination.dropped,
        notes=combination.notes,
    )


def _check_call(method: Any, heads: Any, scale: Any, memory: Any) -> None:
    if not isinstance(method, Method):
        hint = (
            f" Create it once, outside the loop: detente.create({method!r})."
            if isinstance(method, str)
            else ""
        )
        raise TypeError(f"method is a {type(method).__name__}, not a detente method.{hint}")
    if heads is not None:
        one_of("heads", heads, ("own", "weighted"))
    one_of("scale", scale, ("native", "sum", "mean", "unit"))
    one_of("memory", memory, ("fast", "batched"))
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        raise RuntimeError(
            "this version does not reduce task gradients over processes, and training on would let the ranks "
            "drift apart. Run on one process."
        )
