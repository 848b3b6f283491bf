"""The whole step: what a training loop calls in place of ``sum(losses).backward()``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from detente.autograd.accumulation import Accumulation
from detente.autograd.flat import accumulate, probes
from detente.autograd.host import to_host
from detente.autograd.losses import (
    GradientNotFinite,
    Losses,
    check_losses,
    check_own,
    check_weighted,
    multiplied,
)
from detente.autograd.low import LowPass
from detente.autograd.measure import Taken, check_further, measure_gradients, take_further
from detente.autograd.partition import Memory, Parameters
from detente.autograd.ranks import ProcessGroup, ranks_of
from detente.autograd.reduce import Prepared, Samples, losses_of_all, prepare, reached_by
from detente.autograd.representation import Roles
from detente.autograd.take import take
from detente.autograd.weighted import weighted_backward
from detente.autograd.where import Where
from detente.methods.base import Method, one_of
from detente.methods.registry import info_of
from detente.step.applying import Heads, Scale, apply
from detente.step.combining import asks_for_rows, of_first_rank
from detente.step.recording import record_of, undone_on_failure
from detente.step.taking import Features, MemoryMode
from detente.values import GRADIENT_NEEDS, Combination, MethodInfo, StepRecord, TaskGradients

LOW = "memory='low': task gradients were taken in {} and not kept"
NO_SHARED = "no shared parameters: every parameter takes the plain gradient of its own loss"
NO_SHARED_WEIGHTED = "no shared parameters: every parameter takes the weighted gradient of its own loss"


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
    scaler: torch.amp.GradScaler | None = None,
    process_group: ProcessGroup = None,
    samples: Samples = None,
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
            filled with NaN, the method's state stays, and the scaler skips the step and lowers its factor.
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
    _check_call(method, heads, scale, memory)
    ranks = ranks_of(process_group)
    where = Where.given(features, shared, task_specific, solve_on)
    info = info_of(method)
    workspace = Memory.of(method)
    if heads is None:
        heads = info.heads
    step = prepare(
        losses,
        where,
        workspace,
        ranks,
        samples=samples,
        known=method.tasks,
        check=lambda: _check_together(method, info, where, extra, memory),
        asked=lambda: {
            "method": info.name,
            "options": (heads, scale, memory, measure, len(extra), scaler is not None),
            "needs": tuple(sorted(method.needs_now())),
            "micro-batch": _micro_batch(method),
        },
    )
    factor = factor_of(scaler, step.losses)
    accumulation: Accumulation | None = method.__dict__.get("accumulation")
    if accumulation is not None:
        accumulation.add(step, workspace, factor, retain_graph=retain_graph, batched=memory == "batched")
        if accumulation.done < accumulation.parts:
            known = losses_of_all(step.losses, step.reduction)
            check_losses(step.names, known)
            return StepRecord(
                step.names,
                tuple(known.tolist()),
                None,
                status="accumulating",
                space="exact",
                seconds=time.perf_counter() - started,
            )
    try:
        record = None
        if accumulation is not None:
            record = _accumulated(step, method, heads, scale, factor, accumulation, workspace)
        elif method.needs_now() & GRADIENT_NEEDS or measure or scale != "native":
            record = _combining(
                step, method, where, heads, scale, factor, extra, workspace, retain_graph, memory
            )
        if record is None:
            record = _weighting(step, method, heads, factor, retain_graph)
    except GradientNotFinite as error:
        if factor is None:
            raise
        record = _left_to_the_scaler(step, error)
    return replace(record, seconds=time.perf_counter() - started)


def _combining(
    step: Prepared,
    method: Method,
    where: Where,
    heads: Heads,
    scale: Scale,
    factor: torch.Tensor | None,
    extra: Sequence[Losses],
    workspace: Memory,
    retain_graph: bool,
    memory: MemoryMode,
) -> StepRecord | None:
    """A step by task gradients; None if nothing is shared."""
    needs = method.needs_now()
    blocks = "blocks" in needs
    graph = take(
        step,
        where,
        workspace,
        retain_graph=retain_graph,
        mode=memory,
        activations="activations" in needs,
        # Where a method asks for more than numbers about the gradients, parts of them will not do.
        whole=asks_for_rows(needs),
        factor=factor,
    )
    if graph is None:
        return None
    taken = measure_gradients(step.names, graph, blocks=blocks, losses=step.losses)
    if extra and any(need.startswith("batches:") for need in needs):
        further = take_further(
            step.names, extra, graph, blocks=blocks, retain_graph=retain_graph, shares=step.shares
        )
        taken = replace(taken, gradients=replace(taken.gradients, extra=further))
    return _decide(taken, step, method, heads, scale)


def _accumulated(
    step: Prepared,
    method: Method,
    heads: Heads,
    scale: Scale,
    factor: torch.Tensor | None,
    accumulation: Accumulation,
    workspace: Memory,
) -> StepRecord:
    """The decision over all micro-batches of a step."""
    needs = method.needs_now()
    whole, graph = accumulation.finish(step, workspace, factor, whole=asks_for_rows(needs))
    taken = measure_gradients(whole.names, graph, blocks="blocks" in needs)
    return _decide(taken, whole, method, heads, scale)


def _decide(taken: Taken, step: Prepared, method: Method, heads: Heads, scale: Scale) -> StepRecord:
    """Let the method combine task gradients, and carry its decision to the parameters."""
    graph = taken.graph
    # What fails past this point (a gradient behind the representation, weights that do not exist) must not leave a
    # trace in the method; in the exact space nothing does, and a copy of a large state is saved.
    cautious = graph.space != "exact" or heads == "weighted" or graph.jacobian is None
    with undone_on_failure(method) if cautious else nullcontext():
        combination = of_first_rank(method.combine(taken.gradients), step)
        record = record_of(taken.gradients, combination)
        if isinstance(graph, LowPass):
            record = replace(record, notes=(*record.notes, LOW.format(_segments(graph.segments))))
        apply(taken, combination, heads=heads, scale=scale)
    return record


def _weighting(
    step: Prepared,
    method: Method,
    heads: Heads,
    factor: torch.Tensor | None,
    retain_graph: bool,
) -> StepRecord:
    """A step without task gradients: one backward of the weighted losses.

    A method that would need gradients, and has none because nothing is shared, is not asked: the weights are 1.
    """
    names, losses, reduction = step.names, step.losses, step.reduction
    parts = step.parts.partition() if isinstance(step.parts, Roles) else step.parts
    needs = method.needs_now()
    plain = bool(needs & GRADIENT_NEEDS)
    known = None
    if not plain and "losses" in needs:
        known = losses_of_all(losses, reduction)
        check_losses(names, known)
    with nullcontext() if plain else undone_on_failure(method):
        combination = Combination(weights=torch.ones(len(losses), dtype=torch.float64))
        if not plain:
            combination = of_first_rank(
                method.combine(TaskGradients(names=names, losses=known, space="none")), step
            )
        assert combination.weights is not None, "a weighting of losses gives weights"
        found, own = weighted_backward(
            losses if factor is None else multiplied(losses, factor),
            parts,
            combination.weights,
            plain_heads=heads == "own" and not plain,
            retain_graph=retain_graph,
        )
        everything = [*found, *(pair for task in own for pair in task)]
        if reduction is None:
            values, probed = to_host([losses, probes(gradient for _, gradient in everything)])
            check_losses(names, values)
            check_own(names, own, probed[len(found) :])
            check_weighted(names, found, probed[: len(found)])
        else:
            values = losses_of_all(losses, reduction, reached={tensor for tensor, _ in everything})
            check_losses(names, values)
            everything = reduction.gradients((*reduction.shared, *reduction.own), everything)
            (probed,) = to_host([probes(gradient for _, gradient in everything)])
            check_weighted(names, everything, probed)
        if combination.accepted:
            accumulate(everything)
    notes = combination.notes
    if not (parts.shared_reached if reduction is None else reduction.anywhere):
        notes = (*notes, NO_SHARED if plain or heads == "own" else NO_SHARED_WEIGHTED)
    return StepRecord(
        names=names,
        losses=tuple(values.tolist()),
        weights=tuple(combination.weights.tolist()),
        status=combination.status,
        notes=notes,
    )


def _check_together(
    method: Method,
    info: MethodInfo,
    where: Where,
    extra: Sequence[Losses],
    memory: MemoryMode,
) -> None:
    """See that further batches, micro-batches and low memory go together with what else was asked for.

    Raises:
        ValueError: they do not.
        TypeError: ``extra`` is no sequence of losses.
    """
    check_further(info, where, extra)
    accumulation: Accumulation | None = method.__dict__.get("accumulation")
    if memory == "low" and where.features is None and where.solve_on is None:
        others = method.needs_now() & GRADIENT_NEEDS - {"gramian"}
        reason = ""
        if others:
            reason = f"{info.name} looks at more than the Gramian ({', '.join(sorted(others))})"
        elif extra:
            reason = "gradients of further batches are compared with those of this one"
        elif accumulation is not None:
            reason = "accumulate() keeps a sum of every task's gradients"
        if reason:
            raise ValueError(f"memory='low' does not go with this step: {reason}. Use memory='fast'.")
    if accumulation is None:
        return
    if accumulation.done >= accumulation.parts:
        raise ValueError(
            f"accumulate() was told of {accumulation.parts} micro-batches, and this is one more. Open a new context "
            "for the next step."
        )
    option = "features=" if where.features is not None else "solve_on=" if where.solve_on is not None else ""
    option = option or ("extra=" if extra else "")
    if option:
        raise ValueError(
            f"accumulate() adds up gradients on the parameters, so {option} does not go with it. Leave {option} out, "
            "or accumulate without the context: call backward() for every micro-batch with losses divided by their "
            "number."
        )


def _micro_batch(method: Method) -> str | None:
    accumulation: Accumulation | None = method.__dict__.get("accumulation")
    return None if accumulation is None else f"{accumulation.done + 1} of {accumulation.parts}"


def factor_of(scaler: Any, losses: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """What a scaler multiplies losses by, a scalar on their device; None without one, or where it is disabled.

    Raises:
        TypeError: it is no gradient scaler.
    """
    if scaler is None:
        return None
    if not (hasattr(scaler, "scale") and hasattr(scaler, "is_enabled")):
        raise TypeError(f"scaler is a {type(scaler).__name__}; give a torch.amp.GradScaler, or leave it out.")
    if not scaler.is_enabled():
        return None
    one = torch.ones((), dtype=torch.float32, device=losses[0].device)
    scaled: torch.Tensor = scaler.scale(one)  # on the device: the factor is never waited for
    return scaled


def _left_to_the_scaler(step: Prepared, error: GradientNotFinite) -> StepRecord:
    """Fill every ``.grad`` with NaN, by which the scaler knows that this step is to be skipped."""
    if step.reduction is None:
        filled = reached_by(step.parts, step.losses)
    else:
        filled = {*step.reduction.shared, *step.reduction.own}
    accumulate([(tensor, torch.full_like(tensor, float("nan"))) for tensor in filled])
    known = losses_of_all(step.losses, step.reduction)
    told = str(error).partition(" Nothing was changed.")[0]
    return StepRecord(
        names=step.names,
        losses=tuple(known.tolist()),
        weights=None,
        notes=(f"{told} The gradient scaler skips this step.",),
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
    one_of("memory", memory, ("fast", "batched", "low"))


def _segments(count: int) -> str:
    return f"{count} segment" if count == 1 else f"{count} segments"
