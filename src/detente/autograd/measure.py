"""From a pass over the graph to the numbers a method sees, in one copy to the host; and passes of further batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from detente.autograd.blocks import blocks_of
from detente.autograd.exact import ExactPass, Pass, exact_pass
from detente.autograd.flat import Layout, probes
from detente.autograd.host import to_host
from detente.autograd.losses import Losses, check_gradients, check_losses, check_own, multiplied, named_losses
from detente.autograd.partition import Memory, Partition
from detente.autograd.reduce import check_own_of_all, doubtful
from detente.autograd.rows import SummedRows
from detente.autograd.where import Where
from detente.values import MethodInfo, TaskGradients


@dataclass(frozen=True)
class Taken:
    """The task gradients of one step, as values and as the graph that can still carry a direction back.

    Attributes:
        gradients: what a method sees.
        graph: turns a direction into gradients of the shared parameters; holds the own parameters' gradients.
    """

    gradients: TaskGradients
    graph: Pass


def measure_gradients(
    names: tuple[str, ...],
    graph: Pass,
    *,
    blocks: bool = False,
    losses: Sequence[torch.Tensor] | None = None,
) -> Taken:
    """Gramian, losses and a check of every gradient, in one copy to the host.

    Args:
        names: the T tasks.
        graph: a pass with its Jacobian.
        blocks: also one Gramian for each shared tensor, where the pass is over parameters.
        losses: T scalars, where the pass started from others (a gradient scaler's multiples of them).

    Raises:
        ValueError: a loss is not finite; the task is named.
        GradientNotFinite: a gradient is not finite; the task is named.
    """
    values = graph.losses if losses is None else losses
    split = blocks_of(graph.columns) if blocks and graph.columns else None
    products = graph.products(None if split is None else split.sizes)
    if graph.reduction is None:
        probed = probes(gradient for task in graph.own for _, gradient in task)
        told, seen, probed_on_host = to_host([values, products, probed])
    else:
        told, seen, unsound = _summed(graph, values, products)
    matrix = seen if split is None else seen.sum(axis=0)
    check_losses(names, told)
    check_gradients(names, matrix.diagonal(), graph.space)
    if graph.reduction is None:
        check_own(names, graph.own, probed_on_host)
    else:
        check_own_of_all(graph.reduction, names, graph.own, unsound)
    gradients = TaskGradients(
        names=names,
        losses=told,
        gramian=matrix,
        jacobian=graph.jacobian,
        activations=graph.activations,
        space=graph.space,
    )
    if split is not None:
        gradients = replace(
            gradients,
            block_gramians=seen,
            block_names=split.names,
            block_sizes=split.sizes,
            block_layers=split.layers,
        )
    return Taken(gradients, graph)


def _summed(graph: Pass, losses: Sequence[torch.Tensor], products: torch.Tensor) -> list[np.ndarray]:
    """Losses [T], products and counts of doubtful own gradients [T] of the whole batch, in one sum over the ranks."""
    reduction = graph.reduction
    assert reduction is not None
    device, tasks = products.device, len(losses)
    pieces = [loss.detach().reshape(1).to(device, torch.float64) for loss in losses]
    pieces += [doubtful(graph.own, device), reduction.flags(graph.reached).to(device)]
    if graph.partial:
        pieces.append(products.reshape(-1))
    flat = reduction.ranks.sum(torch.cat(pieces))
    if graph.partial:
        (numbers,) = to_host([flat])
        cut = len(numbers) - products.numel()
        numbers, seen = numbers[:cut], numbers[cut:].reshape(products.shape)
    else:
        numbers, seen = to_host([flat, products])
    reduction.read_flags(numbers[2 * tasks :])
    return [numbers[:tasks], seen, numbers[tasks : 2 * tasks]]


def take_further(
    names: tuple[str, ...],
    extra: Sequence[Losses],
    graph: Pass,
    *,
    blocks: bool = False,
    retain_graph: bool = False,
    shares: Sequence[float] = (),
) -> tuple[TaskGradients, ...]:
    """The same tasks' gradients on further batches, with respect to the same parameters, in memory of their own.

    Args:
        names: the T tasks of the step.
        extra: losses of each further batch, with their graph.
        graph: the pass of the step.
        blocks: as for :func:`measure_gradients`.
        retain_graph: keep the graphs.
        shares: on several processes this rank's part of each task's examples.

    Raises:
        ValueError: as the step's own losses do, other tasks, or losses that reach no shared parameter of the step;
            the batch is named.
        TypeError: as the step's own losses do.
    """
    everyone = (1 << len(names)) - 1
    parts = Partition(graph.columns, (everyone,) * len(graph.columns), ((),) * len(names))
    found = []
    for number, batch in enumerate(extra):
        try:
            given, scalars = named_losses(batch)
            here = {name for name, loss in zip(names, graph.losses, strict=True) if loss.requires_grad}
            if set(given) != here:
                raise ValueError(
                    f"the tasks are {', '.join(given)}, and those of the step {', '.join(names)}."
                )
            losses = [
                scalars[given.index(name)] if name in here else loss
                for name, loss in zip(names, graph.losses, strict=True)
            ]
            if graph.reduction is not None:
                losses = [
                    loss * share if loss.requires_grad else loss
                    for loss, share in zip(losses, shares, strict=True)
                ]
            further = _pass_like(graph, losses, parts, retain_graph)
            if graph.factor is not None:
                further.unscale(graph.factor)
            if not further.touched and any(loss.requires_grad for loss in losses):
                raise ValueError(
                    "no loss reaches a shared parameter of the step; use the same model for every batch."
                )
            gradients = measure_gradients(names, further, blocks=blocks, losses=losses).gradients
        except (ValueError, TypeError) as error:
            raise type(error)(f"extra[{number}]: {error}") from error
        found.append(replace(gradients, space=graph.space))
    return tuple(found)


def _pass_like(graph: Pass, losses: list[torch.Tensor], parts: Partition, retain_graph: bool) -> ExactPass:
    """Gradients with respect to the same parameters, on several processes complete on every rank."""
    memory = Memory()
    if graph.factor is not None:
        losses = multiplied(losses, graph.factor)
    if graph.reduction is None:
        return exact_pass(losses, parts, memory, retain_graph=retain_graph)
    rows = SummedRows(Layout(graph.columns), len(losses), memory, graph.reduction.ranks)
    further = exact_pass(losses, parts, memory, rows=rows, retain_graph=retain_graph)
    further.reduction, further.reached = graph.reduction, graph.reached
    return further


def check_further(info: MethodInfo, where: Where, extra: Any) -> None:
    """See that further batches are what the method declares.

    Raises:
        TypeError: ``extra`` is no sequence of losses.
        ValueError: the method takes none, or another number; or the problem is solved on features.
    """
    if isinstance(extra, (Mapping, torch.Tensor)) or not isinstance(extra, Sequence):
        raise TypeError("extra= takes a list with the losses of each further batch, even for a single one.")
    if not extra:
        return
    wanted = [int(need.partition(":")[2]) - 1 for need in info.needs if need.startswith("batches:")]
    if not wanted:
        raise ValueError(f"{info.name} looks at one batch only; leave extra= out.")
    if len(extra) != wanted[0]:
        raise ValueError(f"{info.name} takes {wanted[0]} further batches, and extra= holds {len(extra)}.")
    if where.features is not None:
        raise ValueError(
            "extra= and features= do not go together: two batches have no representation in common on which to compare "
            "gradients. Leave features= out, or name the last shared layer in solve_on=."
        )
