"""The one pass over the graph that fits what a caller names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from detente.autograd.exact import Pass, exact_pass, layer_pass
from detente.autograd.flat import Layout
from detente.autograd.losses import multiplied
from detente.autograd.low import low_pass
from detente.autograd.partition import Memory, Partition, walk
from detente.autograd.reduce import Prepared, gather_columns, reached_by
from detente.autograd.reduction import Reduction
from detente.autograd.representation import FeaturesPass, Roles, features_pass
from detente.autograd.rows import Rows, ScatteredRows, SummedRows
from detente.autograd.where import Where


def take(
    step: Prepared,
    where: Where,
    memory: Memory,
    *,
    retain_graph: bool,
    mode: str,
    activations: bool,
    whole: bool,
    factor: torch.Tensor | None = None,
) -> Pass | None:
    """The task gradients of one step, None if no loss reaches a shared parameter.

    Args:
        step: the T tasks, their losses, and who owns what.
        where: what the caller named.
        memory: of the method.
        retain_graph: keep the graph for another backward.
        mode: in the exact space: ``fast``, ``batched`` (one vectorised backward) or ``low`` (no Jacobian is kept).
        activations: copy the representation for methods that look at it.
        whole: on several processes, let every rank have all of the gradients, and not a part of each.
        factor: of a gradient scaler: the backwards start from the losses times this number, so that half precision
            holds small gradients, and the Jacobian is divided by it.
    """
    found = _pass(
        step,
        step.losses if factor is None else multiplied(step.losses, factor),
        where,
        memory,
        retain_graph=retain_graph,
        mode=mode,
        activations=activations,
        whole=whole,
    )
    if found is not None and factor is not None:
        found.unscale(factor)
    return found


def _pass(
    step: Prepared,
    losses: Sequence[torch.Tensor],
    where: Where,
    memory: Memory,
    *,
    retain_graph: bool,
    mode: str,
    activations: bool,
    whole: bool,
) -> Pass | None:
    parts, reduction = step.parts, step.reduction
    if isinstance(parts, Roles):
        assert where.features is not None
        found = features_pass(
            losses, where.features, parts, memory, retain_graph=retain_graph, activations=activations
        )
        if reduction is not None:
            found.reduction, found.partial, found.reached = reduction, True, _reached(found)
            if whole:
                gather_columns(found, reduction)
        return found
    if not (parts.shared_reached if reduction is None else reduction.anywhere):
        return None
    if mode == "low" and where.solve_on is None:
        return low_pass(losses, parts, memory, retain_graph=retain_graph, reduction=reduction)
    rows = rows_of(parts, where, memory, len(losses), reduction, whole)
    if where.solve_on is not None:
        layer = layer_pass(losses, parts, where.solve_on, rows, retain_graph=retain_graph)
        layer.reduction, layer.reached = reduction, reached_by(parts, losses)
        return layer
    exact = exact_pass(losses, parts, memory, rows=rows, retain_graph=retain_graph, batched=mode == "batched")
    exact.reduction, exact.partial = reduction, rows.partial
    exact.reached = exact.touched | {tensor for task in exact.own for tensor, _ in task}
    return exact


def _reached(found: FeaturesPass) -> set[torch.Tensor]:
    """Parameters that some loss of this rank has a gradient for; what lies behind an unused feature alone has none."""
    behind = set(found.encoder)
    if not all(found.used):
        used = [feature for feature, used in zip(found.features, found.used, strict=True) if used]
        behind &= walk(used, named=True).leaves.keys()
    return behind | {tensor for task in (*found.direct, *found.own) for tensor, _ in task}


def rows_of(
    parts: Partition, where: Where, memory: Memory, tasks: int, reduction: Reduction | None, whole: bool
) -> Rows:
    """Where the rows of the Jacobian go."""
    layout = Layout(parts.shared if where.solve_on is None else where.solve_on)
    if reduction is None:
        return Rows(layout, tasks, memory)
    if whole or where.solve_on is not None:
        return SummedRows(layout, tasks, memory, reduction.ranks)
    return ScatteredRows(layout, tasks, memory, reduction.ranks)
