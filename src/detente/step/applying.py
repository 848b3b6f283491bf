"""A combination back to the parameters."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from detente.autograd.flat import Gradients, accumulate
from detente.autograd.losses import check_behind
from detente.autograd.measure import Taken
from detente.step.combining import with_direction
from detente.values import Combination, TaskGradients

Heads = Literal["own", "weighted"] | None
Scale = Literal["native", "sum", "mean", "unit"]


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
    if not combination.accepted:
        return
    weights = combination.weights
    if weights is None and (heads == "weighted" or taken.graph.space == "layer"):
        asked = "heads='weighted'" if heads == "weighted" else "solve_on="
        raise ValueError(f"{asked} needs one weight for each task, and this method gives none.")
    shared = shared_gradients(taken, combination, scale=scale)
    accumulate([*shared, *taken.graph.own_gradients(weights if heads == "weighted" else None)])


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
    if taken.gradients.jacobian is None:
        shared = _without_rows(taken, combination, scale, by_weights)
    elif by_weights and scale == "native" and combination.status == "ok":
        assert weights is not None
        shared = taken.graph.shared_by_weights(weights)
    else:
        shared = _along_direction(taken, combination, scale)
    if taken.graph.space != "exact":
        check_behind(taken.gradients.names, shared)
    return shared


def _without_rows(taken: Taken, combination: Combination, scale: Scale, by_weights: bool) -> Gradients:
    """Where no task gradients were kept: one weighted backward, brought to the asked length afterwards."""
    weights = combination.weights
    if weights is None or not by_weights:
        raise ValueError(
            "memory='low' keeps no task gradients, and this method's direction is no weighted sum of them in this "
            "step. Use memory='fast'."
        )
    if combination.status == "stationary":
        weights = torch.zeros_like(weights)
    shared = taken.graph.shared_by_weights(weights)
    if scale == "native" or not shared:
        return shared
    lengths = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for _, g in shared])
    length = torch.linalg.vector_norm(lengths)
    if taken.graph.factor is not None:
        length = length / taken.graph.factor.to(length)
    factor = _length_factor(length, taken.gradients, scale)
    return [(tensor, gradient * factor.to(gradient)) for tensor, gradient in shared]


def _along_direction(taken: Taken, combination: Combination, scale: Scale) -> Gradients:
    """Gradients of the shared parameters for a direction that the weights do not give, or not at this length."""
    assert taken.gradients.jacobian is not None
    combination = with_direction(combination, taken.gradients)
    direction, weights = combination.direction, combination.weights
    assert direction is not None
    if scale != "native":
        factor = _length_factor(taken.graph.length(direction), taken.gradients, scale)
        direction = direction * factor.to(direction.dtype)
        weights = None if weights is None else weights * factor.to(device=weights.device)
    if combination.status == "stationary" and weights is not None:
        weights = torch.zeros_like(weights)
    return taken.graph.shared(direction, weights)


def _length_factor(length: torch.Tensor, gradients: TaskGradients, scale: Scale) -> torch.Tensor:
    """A float64 scalar on the device of ``length`` that makes of it the asked one; 0 for a zero direction."""
    assert gradients.gramian is not None
    target = 1.0
    if scale != "unit":
        target = float(np.sqrt(max(gradients.gramian.sum(), 0.0)))
        target = target / gradients.tasks if scale == "mean" else target
    return torch.where(length > 0, target / length, torch.zeros_like(length))
