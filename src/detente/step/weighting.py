"""A step without task gradients: one backward of the weighted losses."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch

from detente.autograd.engine import Weighted, weighted_backward
from detente.autograd.layout import Gradients, accumulate, probes
from detente.autograd.numbers import check_losses, check_own, check_weighted, to_host
from detente.autograd.reduction import losses_and_reached, losses_of_all
from detente.autograd.step import Step
from detente.methods.base import Method
from detente.step.deciding import (
    check_result,
    notes_on_outside,
    of_first_rank,
    outside,
    undone_on_failure,
)
from detente.values import GRADIENT_NEEDS, Combination, StepRecord, TaskGradients

NO_SHARED = "no shared parameters: every parameter takes the plain gradient of its own loss"
NO_SHARED_WEIGHTED = "no shared parameters: every parameter takes the weighted gradient of its own loss"


def weighting_step(step: Step, method: Method, heads: str | None) -> StepRecord:
    """Take a step without task gradients: one backward of the weighted losses.

    A method that would need gradients, and has none because nothing is shared, is not asked: the weights are 1. One
    that needs none in this step is asked about the tasks of the shared problem; the others' losses count as they are.
    """
    names, reduction = step.names, step.reduction
    needs = step.request.needs
    plain, left_out = not GRADIENT_NEEDS.isdisjoint(needs), outside(step)
    known = None
    if not plain and "losses" in needs:
        known = losses_of_all(step.losses, reduction)
        check_losses(names, known)
    with nullcontext() if plain else undone_on_failure(method):
        combination, inside = Combination(), list(step.inside)
        weights = torch.ones(len(names), dtype=torch.float64)
        if not plain:
            if left_out:
                method.bind(names)  # also those of which it sees nothing
            of_problem = tuple(names[task] for task in inside)
            seen = TaskGradients(of_problem, None if known is None else known[inside], space="none")
            combination = method.combine(seen)
            if reduction is not None:
                combination = of_first_rank(combination, step)
            check_result(method, combination)
            assert combination.weights is not None, "a weighting of losses gives weights"
            weights[inside] = combination.weights
        found = weighted_backward(step, weights, plain_heads=heads == "own" and not plain)
        values, everything = _checked(step, found)
        if combination.accepted:
            accumulate(everything)
    notes = (*combination.notes, *notes_on_outside(step))
    if not step.anything:
        notes = (*notes, NO_SHARED if plain or heads == "own" else NO_SHARED_WEIGHTED)
    told = zip(names, weights.tolist(), strict=True)
    return StepRecord(
        names=names,
        losses=tuple(values.tolist()),
        weights=tuple(None if name in left_out else weight for name, weight in told),
        status=combination.status,
        dropped=left_out,
        notes=notes,
        residual=combination.residual,
    )


def _checked(step: Step, found: Weighted) -> tuple[np.ndarray, Gradients]:
    """Return the losses [T] and all gradients of the whole batch, every number of which is finite."""
    names, reduction = step.names, step.reduction
    own = [pair for task in found.own for pair in task]
    everything = [*found.shared, *own]
    if reduction is None:
        values, probed = to_host([step.losses, probes(gradient for _, gradient in everything + found.plain)])
        check_losses(names, values)
        shared, rest = len(found.shared), len(everything)
        check_own(names, found.own, probed[shared:rest])
        check_weighted(names, found.shared, probed[:shared])
        check_weighted(names, found.plain, probed[rest:])
        return values, everything + found.plain
    reached = {tensor for tensor, _ in everything}
    values, touched = losses_and_reached(step.losses, reduction, reached)
    check_losses(names, values)
    everything = reduction.gradients((*reduction.shared, *reduction.own), everything, touched)
    (probed,) = to_host([probes(gradient for _, gradient in everything)])
    check_weighted(names, everything, probed)
    return values, everything + found.plain
