"""The whole step: what a training loop calls in place of ``sum(losses).backward()``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from detente.autograd.accumulation import Accumulation
from detente.autograd.branches import Branches
from detente.autograd.engine import (
    Taken,
    full_precision,
    further_gradients,
    measured,
    task_gradients,
)
from detente.autograd.layout import Gradients, accumulate, finite, probes
from detente.autograd.losses import Losses
from detente.autograd.numbers import (
    GradientNotFinite,
    check_behind,
    check_losses,
    to_host,
)
from detente.autograd.ranks import ProcessGroup
from detente.autograd.reduction import Samples, losses_of_all
from detente.autograd.roles import Memory, Named, Parameters
from detente.autograd.step import Mode, Request, Step, prepare
from detente.methods.base import Method, one_of
from detente.methods.registry import info_of
from detente.step.combining import with_direction
from detente.step.deciding import (
    NUMBERS,
    decide,
    lengths_of,
    not_finite,
    record_of,
    undone_on_failure,
    watched,
)
from detente.step.scaling import left_to_the_scaler, tell_scaler, withdraw
from detente.step.weighting import NO_SHARED, weighting_step
from detente.values import GRADIENT_NEEDS, Combination, MethodInfo, StepRecord, TaskGradients

Features = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | Branches | None
Heads = Literal["own", "weighted"] | None
Scale = Literal["native", "sum", "mean", "unit"]


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
    memory: Mode = "fast",
    measure: bool = False,
    extra: Sequence[Losses] = (),
    scaler: torch.amp.GradScaler | None = None,
    process_group: ProcessGroup = None,
    samples: Samples = None,
    retain_graph: bool = False,
) -> StepRecord:
    """Fill ``.grad`` for one step of training with several losses: the line that replaces ``sum(losses).backward()``.

    A parameter that two or more losses reach is shared and receives the method's direction; one that a single loss
    reaches is that task's own. Once shared, a parameter stays shared for this method, so that batches without some
    task change nothing. Gradients are added to an existing ``.grad``. Behind an operation that packs several tasks
    into one tensor (a concatenation, a compiled model) the gradients themselves tell heads from shared parameters. Leaf
    tensors that are no parameters (inputs that require a gradient) are left out of the problem unless ``shared`` names
    them. A task that reaches nothing shared is left out too; its own parameters move. ``torch.autocast`` around the
    call changes nothing.

    Gradients are taken with ``torch.autograd.grad``: post-accumulate hooks of parameters do not run, and hooks of
    tensors (``register_hook``) see each backward, that is one task's gradient at a time.

    Args:
        losses: scalars with their graph, by task name or in sequence (named "0", "1", …). A task may be absent
            from a step.
        method: from :func:`detente.create`, made once, outside the loop: it may carry state.
        features: the shared representation, one tensor or several: the problem is solved on the gradients of the
            whole batch's representation, and one backward carries the result through the encoder (upper bound).
            Shared parameters reached past it take the weighted sum of their gradients. From :func:`detente.branch` all
            heads are walked in one call of autograd.
        shared, task_specific: parameters or modules, instead of discovery. With both given nothing else is touched;
            with one given everything else a loss reaches has the other role.
        solve_on: shared parameters to solve on (the last shared layer); the weights then serve all of them.
        heads: ``own``: own parameters take the plain gradient of their loss; ``weighted``: multiplied by the task's
            weight. None is ``own`` for methods that combine gradients and ``weighted`` for weightings of losses.
        scale: length of the shared direction in the space where the problem is solved: ``native``, or that of the
            ``sum`` or ``mean`` gradient, or ``unit``. Own parameters are not scaled; zero stays zero.
        memory: ``fast``: one backward per task; ``batched``: one vectorised backward (every task walks all heads);
            ``low``: the same Gramian without keeping T gradients: the graph is walked in segments, and one weighted
            backward follows (T + 1 backwards; beside the graph T rows of one segment's parameters, and the gradients
            that wait between two segments). Then only methods that give weights from inner products or losses. With
            ``features`` or ``solve_on`` all are the same.
        measure: take task gradients for the record also for methods that do not need them.
        extra: losses of the same tasks on further, independent batches, for methods that declare ``batches:k``: k - 1
            of them, or none (this batch then stands for all). They only inform the method.
        scaler: of torch.amp. Pass the losses unscaled: the method sees unscaled gradients, and ``.grad`` is scaled, as
            ``scaler.step(optimizer)`` expects. A gradient that is not finite is then no error: every ``.grad`` is
            filled with NaN, the method's state stays, and the scaler skips the step and lowers its factor. After a
            refused step leave out ``scaler.unscale_`` and ``scaler.step`` and call ``scaler.update()`` as always; a
            loop that calls them all the same skips the step too, for a ``.grad`` that was None is filled with NaN
            (the method's next step takes it back), but lowers the factor.
        process_group: the processes among which the batch is split: None is torch.distributed's default group where
            it is initialized, False this process alone. Every rank then ends with the ``.grad`` and the record of the
            whole batch; call it on every rank, with losses that are means over the rank's own examples.
        samples: on several processes the number of examples behind this rank's losses, or a mapping from task to
            number, by which means are weighted; None counts every rank once. A task that is absent here, or has 0
            examples, takes no part on this rank.
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
        RankFailed: another process could not take the step; its message is passed on.

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
    if not isinstance(method, Method) or heads not in _HEADS or scale not in _SCALES or memory not in _MODES:
        _check_call(method, heads, scale, memory)
    workspace, needs = Memory.of(method), method.needs_now()
    info = workspace.info or info_of(method)
    workspace.info = info
    named = _NOTHING
    if features is not None or shared is not None or task_specific is not None or solve_on is not None:
        named = Named.read(features, shared, task_specific, solve_on)
    accumulation = method.__dict__.get("accumulation")
    how = _How(method, info, heads or info.heads, scale, measure, extra, accumulation)
    refused = None
    if extra or accumulation is not None or memory == "low" or not isinstance(extra, Sequence):
        refused = _refusal(how, named, memory)
    request = Request(
        named,
        needs,
        memory,
        # Where a method asks for more than numbers about the gradients, a rank's part of them will not do.
        whole=not needs <= NUMBERS,
        drops=not GRADIENT_NEEDS.isdisjoint(info.needs),
        retain_graph=retain_graph,
        samples=samples,
        scaler=scaler,
        process_group=process_group,
        agreed=how,
        refused=refused,
    )
    with full_precision():
        step = prepare(losses, request, workspace, method.tasks)
        if step.memory.filled:
            withdraw(step.memory)
        try:
            record = _take_step(step, how)
        except GradientNotFinite as error:
            if step.factor is None:
                raise
            record = left_to_the_scaler(step, error)
        if record.status == "refused" and step.factor is not None:
            tell_scaler(step)
    return replace(record, seconds=time.perf_counter() - started)


_NOTHING = Named()
_HEADS, _MODES = (None, "own", "weighted"), ("fast", "batched", "low")
_SCALES = ("native", "sum", "mean", "unit")


@dataclass(frozen=True)
class _How:
    """Hold who decides about a step, and what becomes of the decision."""

    method: Method
    info: MethodInfo
    heads: Heads
    scale: Scale
    measure: bool
    extra: Sequence[Losses]
    accumulation: Accumulation | None

    def __call__(self, request: Request) -> dict[str, object]:
        """Return what decides which messages follow, and must be the same on all ranks."""
        part, accumulation = None, self.accumulation
        if accumulation is not None:
            part = f"{accumulation.done + 1} of {accumulation.parts}"
        options = (
            self.heads,
            self.scale,
            request.mode,
            self.measure,
            len(self.extra),
            request.scaler is not None,
        )
        return {
            "method": self.info.name,
            "options": options,
            "needs": tuple(sorted(request.needs)),
            "micro-batch": part,
        }


def _take_step(step: Step, how: _How) -> StepRecord:
    """Take the gradients that a step needs, let the method decide, and carry its decision to the parameters."""
    accumulation = how.accumulation
    if accumulation is not None:
        accumulation.add(step)
        if accumulation.done < accumulation.parts:
            known = losses_of_all(step.losses, step.reduction)
            check_losses(step.names, known)
            weights = (None,) * len(step.names)
            return StepRecord(
                step.names, tuple(known.tolist()), weights, status="accumulating", space="exact"
            )
        return _combined(measured(accumulation.finish(step)), how)
    request = step.request
    wanted = not GRADIENT_NEEDS.isdisjoint(request.needs) or request.named.branches is not None
    # Behind a node that packs several tasks only gradients tell whose own a parameter is, and which task is left out.
    wanted = wanted or (step.roles.certain >= 0 and (how.heads == "own" or request.drops))
    if wanted or how.measure or how.scale != "native":
        taken = task_gradients(step)
        if taken is not None:
            if how.extra and how.info.batches > 1:
                taken = further_gradients(taken, how.extra)
            return _combined(taken, how)
    return weighting_step(step, how.method, how.heads)


def _combined(taken: Taken, how: _How) -> StepRecord:
    """Let the method combine task gradients, and carry its decision to the parameters.

    A method that looks at gradients is not asked where these have told that nothing is shared.
    """
    method, gradients = how.method, taken.gradients
    if gradients.space == "exact" and not taken.columns and how.info.takes_gradients:
        accumulate(taken.own_gradients())
        losses, ones = tuple(taken.losses.tolist()), (1.0,) * len(taken.losses)
        return StepRecord(taken.step.names, losses, ones, notes=(NO_SHARED,))
    # What fails past this point (a gradient behind the representation, weights that do not exist) must not leave a
    # trace in the method; in the exact space hardly anything does, and a copy of a large state is saved.
    jacobian, step = gradients.jacobian, taken.step
    cautious = gradients.space != "exact" or how.heads == "weighted" or jacobian is None
    cautious = cautious or len(step.inside) < len(step.names)
    if not cautious and how.info.stateful and jacobian is not None:
        cautious = watched(method, jacobian, gradients.gramian)
    with undone_on_failure(method) if cautious else nullcontext():
        combination = decide(method, taken)
        record = record_of(taken, combination)
        _apply(taken, combination, how.heads, how.scale, not_finite(method))
    return record


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
        >>> from detente import combine, task_gradients
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> taken = task_gradients({"a": weight.sum(), "b": (3 * weight).sum()})
        >>> apply(taken, combine("mgda", taken.gradients.jacobian))
        >>> weight.grad
        tensor([1., 1.])
    """
    with full_precision():
        _apply(taken, combination, heads or "own", scale, _NOT_FINITE)


_NOT_FINITE = (
    "the combined gradient is not finite (NaN or Inf) although every task's is. Nothing was changed."
)


def _apply(taken: Taken, combination: Combination, heads: Heads, scale: Scale, message: str) -> None:
    if combination.status == "refused":
        return
    weights = combination.weights
    if weights is None and heads == "weighted":
        raise ValueError("heads='weighted' needs one weight for each task, and this method gives none.")
    plain = weights is not None and combination.direction is None and combination.status == "ok"
    if plain and scale == "native" and taken.walked.complete:
        shared = taken.shared_gradients(None, weights)
    else:
        shared = shared_gradients(taken, combination, scale=scale)
    own = taken.own_gradients(weights if heads == "weighted" else None)
    looked_at = [] if scale == "native" and _in_range(taken, combination) else list(shared)
    if heads == "weighted" and weights is not None and bool((weights.abs() > 1).any()):
        looked_at += own
    if looked_at:
        (probed,) = to_host([probes(gradient for _, gradient in looked_at)])
        if not finite([gradient for _, gradient in looked_at], probed).all():
            raise GradientNotFinite(message)
    accumulate(shared + own)


def _in_range(taken: Taken, combination: Combination) -> bool:
    """Return whether it is known, without looking, that the gradients of the shared parameters are finite."""
    jacobian, gramian = taken.walked.jacobian, taken.gradients.gramian
    if taken.gradients.space != "exact":
        return True  # looked at where it is made
    if jacobian is None or gramian is None or taken.step.factor is not None:
        return False
    if jacobian.dtype.itemsize < 4 or any(tensor.dtype.itemsize < 4 for tensor in taken.columns):
        return False
    if combination.direction is not None:
        return True  # looked at where the method gave it
    weights = combination.weights
    if combination.block_weights is not None:
        weights = combination.block_weights.abs().amax(dim=0)
    assert weights is not None, "a combination has weights or a direction"
    return float(np.abs(weights.numpy()) @ np.sqrt(gramian.diagonal())) < 1e38


def shared_gradients(taken: Taken, combination: Combination, *, scale: Scale = "native") -> Gradients:
    """Return shared parameters with the gradient that a combination gives each of them; no ``.grad`` is touched.

    Args:
        taken: from :func:`task_gradients`; its graph is used up unless it was retained.
        combination: what a method decided.
        scale: length of the direction, see :func:`backward`.

    Raises:
        ValueError: a gradient behind the representation is not finite, or weights are needed and there are none.
    """
    direction, weights = combination.direction, combination.weights
    if taken.walked.jacobian is None:
        if combination.status == "stationary" and weights is not None:
            weights = torch.zeros_like(weights)
        given = direction is not None or combination.block_weights is not None
        shared = taken.shared_gradients(None, None if given else weights)
        if scale != "native" and shared:
            length = lengths_of(shared)
            if taken.step.factor is not None:
                length = length / taken.step.factor.to(length)
            factor = _length_factor(length, taken.gradients, scale)
            shared = [(tensor, gradient * factor.to(gradient)) for tensor, gradient in shared]
    else:
        plain = direction is None and combination.block_weights is None and combination.status == "ok"
        if not plain or scale != "native":
            combination = with_direction(combination, taken.gradients)
            direction = combination.direction
            assert direction is not None
            if scale != "native":
                factor = _length_factor(_length(taken, direction), taken.gradients, scale)
                direction = direction * factor.to(direction.dtype)
                weights = None if weights is None else weights * factor.to(device=weights.device)
            if combination.status == "stationary" and weights is not None:
                weights = torch.zeros_like(weights)
        shared = taken.shared_gradients(direction, weights)
    if taken.gradients.space != "exact":
        check_behind(taken.gradients.names, shared)
    return shared


def _length(taken: Taken, direction: torch.Tensor) -> torch.Tensor:
    """Return the norm of a direction in the space of the problem, a float64 scalar on its device."""
    length: torch.Tensor = torch.linalg.vector_norm(direction, dtype=torch.float64)
    if taken.step.reduction is None or not taken.walked.partial:
        return length
    return taken.step.reduction.ranks.sum(length * length).sqrt()


def _length_factor(length: torch.Tensor, gradients: TaskGradients, scale: Scale) -> torch.Tensor:
    """Return a float64 scalar on the device of ``length`` that makes of it the requested one; 0 for no direction."""
    assert gradients.gramian is not None
    target = 1.0
    if scale != "unit":
        target = float(np.sqrt(max(gradients.gramian.sum(), 0.0)))
        target = target / gradients.tasks if scale == "mean" else target
    return torch.where(length > 0, target / length, torch.zeros_like(length))


def _refusal(how: _How, named: Named, mode: Mode) -> Exception | None:
    """Return what does not go together in a step, as the error to raise."""
    info, extra, accumulation = how.info, how.extra, how.accumulation
    if isinstance(extra, (Mapping, torch.Tensor)) or not isinstance(extra, Sequence):
        return TypeError("extra= takes a list with the losses of each further batch, even for a single one.")
    if extra:
        if info.batches < 2:
            return ValueError(f"{info.name} looks at one batch only; leave extra= out.")
        if len(extra) != info.batches - 1:
            return ValueError(
                f"{info.name} takes {info.batches - 1} further batches, and extra= holds {len(extra)}."
            )
        if named.features is not None:
            return ValueError(
                "extra= and features= do not go together: two batches have no representation in common on which to "
                "compare gradients. Leave features= out, or name the last shared layer in solve_on=."
            )
    if mode == "low" and named.features is None and named.solve_on is None:
        others = how.method.needs_now() & GRADIENT_NEEDS - {"gramian"}
        reason = ""
        if others:
            reason = f"{info.name} looks at more than the Gramian ({', '.join(sorted(others))})"
        elif extra:
            reason = "gradients of further batches are compared with those of this one"
        elif accumulation is not None:
            reason = "accumulate() keeps a sum of every task's gradients"
        if reason:
            return ValueError(f"memory='low' does not go with this step: {reason}. Use memory='fast'.")
    if accumulation is None:
        return None
    if accumulation.done >= accumulation.parts:
        return ValueError(
            f"accumulate() was told of {accumulation.parts} micro-batches, and this is one more. Open a new context "
            "for the next step."
        )
    option = "features=" if named.features is not None else "solve_on=" if named.solve_on is not None else ""
    option = option or ("extra=" if extra else "")
    if option:
        return ValueError(
            f"accumulate() adds up gradients on the parameters, so {option} does not go with it. Leave {option} out, "
            "or accumulate without the context: call backward() for every micro-batch with losses divided by their "
            "number."
        )
    return None


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
    if scale != "native":
        one_of("scale", scale, ("native", "sum", "mean", "unit"))
    if memory != "fast":
        one_of("memory", memory, ("fast", "batched", "low"))
