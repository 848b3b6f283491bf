"""Losses to task gradients, with nothing decided yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detente.autograd import engine
from detente.autograd.engine import Taken, full_precision
from detente.autograd.losses import Losses
from detente.autograd.ranks import ProcessGroup
from detente.autograd.reduction import Samples
from detente.autograd.roles import Memory, Named, Parameters
from detente.autograd.step import Mode, Request, prepare
from detente.step.training_step import Features


def task_gradients(
    losses: Losses,
    *,
    features: Features = None,
    shared: Parameters | None = None,
    task_specific: Parameters | Mapping[str, Any] | None = None,
    solve_on: Parameters | None = None,
    memory: Mode = "fast",
    retain_graph: bool = False,
    blocks: bool = False,
    workspace: Memory | None = None,
    process_group: ProcessGroup = None,
    samples: Samples = None,
) -> Taken | None:
    """Take the gradient of every loss with respect to what the tasks share.

    Args:
        losses, features, shared, task_specific, solve_on, memory, retain_graph: as for :func:`backward`.
        blocks: also one Gramian for each shared tensor, for methods that need blocks; in the exact space.
        workspace: memory from one step to the next; None takes fresh memory, so that the returned Jacobian is the
            caller's to keep.
        process_group, samples: as for :func:`backward`. On several processes every rank gets the whole Jacobian.

    Returns:
        The task gradients, or None if no parameter is shared.

    Raises:
        ValueError: as :func:`backward`.

    Example:
        >>> import torch
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> taken = task_gradients({"a": weight.sum(), "b": (3 * weight).sum()})
        >>> taken.gradients.gramian
        array([[ 2.,  6.],
               [ 6., 18.]])
    """
    if memory == "low":
        raise ValueError(
            "memory='low' keeps no task gradients; use memory='fast' here, or backward(), which needs none."
        )
    needs = frozenset({"gramian", "jacobian", "activations", *(["blocks"] if blocks else [])})
    request = Request(
        Named.read(features, shared, task_specific, solve_on),
        needs,
        memory,
        whole=True,
        retain_graph=retain_graph,
        samples=samples,
        process_group=process_group,
    )
    with full_precision():
        step = prepare(losses, request, workspace or Memory())
        return engine.task_gradients(step)
