"""Losses to task gradients, with nothing decided yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from detente.autograd.losses import Losses, named_losses
from detente.autograd.measure import Taken, measure_gradients
from detente.autograd.partition import Memory, Parameters
from detente.autograd.take import Where, take

Features = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None
MemoryMode = Literal["fast", "batched"]


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
