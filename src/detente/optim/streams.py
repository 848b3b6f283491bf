"""Task gradients for an optimizer: one task after the other, or altered by a method, which needs all at once.

All that this package uses of the engine is named here, and nowhere else in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from detente.autograd.engine import Taken, full_precision, task_gradients
from detente.autograd.layout import Gradients, Layout, gradients_of, present
from detente.autograd.losses import Losses
from detente.autograd.numbers import check_losses, to_host
from detente.autograd.ranks import ProcessGroup, ranks_of
from detente.autograd.reduction import Reduction, Samples, losses_of_all
from detente.autograd.roles import Memory, Named, find_roles
from detente.autograd.step import Request, Step, named_losses, prepare
from detente.methods import Method
from detente.step import decide, record_of, undone_on_failure
from detente.values import StepRecord

__all__ = [
    "Gradients",
    "Losses",
    "Memory",
    "ProcessGroup",
    "Samples",
    "Share",
    "Taken",
    "TaskLosses",
    "altered",
    "check_losses",
    "columns_by_task",
    "full_precision",
    "read",
    "streamed",
]

# Methods known to give a transform; a test holds the list against the registry.
ALTERING = ("aligned-mtl", "gradvac", "pcgrad", "upgrad")

Share = tuple[str, Gradients, Gradients]
"""A task with its gradients of shared parameters, and those of task-specific ones."""


@dataclass(frozen=True)
class TaskLosses:
    """Hold the losses of a step, and the parameters that an optimizer asks their gradients of.

    Attributes:
        names: T tasks, in the order in which their backwards run.
        losses: T scalars with their graph.
        values: [T] their values, on several processes those of the whole batch.
        shared, specific: parameters by their role.
        reduction: on several processes, what makes the whole of the ranks' parts.
    """

    names: tuple[str, ...]
    losses: Sequence[torch.Tensor]
    values: np.ndarray
    shared: Sequence[torch.Tensor]
    specific: Sequence[torch.Tensor]
    reduction: Reduction | None = None

    def in_order(self, tasks: Sequence[str]) -> TaskLosses:
        """Let the backwards run in the order in which the tasks became known, whatever that of a mapping."""
        order = sorted(range(len(self.names)), key=lambda task: tasks.index(self.names[task]))
        names = tuple(self.names[task] for task in order)
        return replace(
            self, names=names, losses=[self.losses[task] for task in order], values=self.values[order]
        )


def read(
    losses: Losses,
    roles: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
    workspace: Memory,
    process_group: ProcessGroup,
    samples: Samples,
    known: Sequence[str] | None,
) -> TaskLosses:
    """Read the losses of a step, once, and on several processes the other ranks' as well.

    Args:
        losses: as a caller gave them.
        roles: shared parameters, and task-specific ones.
        workspace: lends memory.
        process_group, samples: as for :func:`detente.backward`.
        known: the tasks so far; a rank may lack some of them.

    Raises:
        ValueError: a loss is no scalar with a graph, or the ranks do not fit.
    """
    shared, specific = roles
    ranks = ranks_of(process_group)
    if ranks is None:
        names, scalars = named_losses(losses)
        (values,) = to_host([scalars])
        return TaskLosses(tuple(names), scalars, values, shared, specific)
    named = Named(shared=tuple(shared), task_specific=tuple(specific))
    wanted = Request(named, samples=samples, process_group=process_group)
    with torch.enable_grad():  # this rank's share of each loss keeps its graph
        ready = prepare(losses, wanted, workspace, known)
    values = losses_of_all(ready.losses, ready.reduction)
    return TaskLosses(tuple(ready.names), ready.losses, values, shared, specific, ready.reduction)


def streamed(request: TaskLosses) -> Iterator[Share]:
    """Take one task's gradients after the other; each is let go before the next backward.

    Args:
        request: what to take; its graph is used up.
    """
    inputs, last = [*request.shared, *request.specific], len(request.names) - 1
    for place, (name, loss) in enumerate(zip(request.names, request.losses, strict=True)):
        found = gradients_of([loss], inputs, None, retain_graph=place < last)
        if request.reduction is not None:
            found = _summed(inputs, found, request.reduction)
        count = len(request.shared)
        share = (name, present(request.shared, found[:count]), present(request.specific, found[count:]))
        del found
        yield share
        del share  # its memory serves the next task's gradients


def altered(request: TaskLosses, method: Method, workspace: Memory) -> tuple[StepRecord, Iterator[Share]]:
    """Let a method alter the task gradients: its record, and task by task the altered ones.

    A step it refuses has no gradients at all, and a stationary one without a transform none of the shared parameters.
    The matrix [T, P] of all task gradients is held, and one altered row at a time. The method has no say in the
    gradients of task-specific parameters.

    Args:
        request: what to take.
        method: gives a transform [T, T].
        workspace: lends the matrix.

    Raises:
        ValueError: a gradient is not finite, no loss reaches a shared parameter, or the method rejects the input or
            gives no transform. The method's state is then as it was.
    """
    step = _step(request, method, workspace)
    taken = task_gradients(step)
    assert taken is not None, "find_roles() refuses losses that reach no shared parameter"
    gramian, jacobian = taken.gradients.gramian, taken.gradients.jacobian
    assert gramian is not None and jacobian is not None
    with undone_on_failure(method):
        combination = decide(method, taken)
        transform = combination.transform
        if transform is None and combination.status == "ok" and gramian.any():
            raise ValueError(
                f"transform={method.declares.name} gives no altered gradient for each task in this step; it "
                f"combines them in another way. Methods that do: {', '.join(ALTERING)} (with their default "
                "options), or leave transform= out. Nothing was changed."
            )
    record = replace(record_of(taken, combination), weights=(None,) * len(request.names))
    if not combination.accepted:
        return record, iter(())
    if transform is None and not gramian.any():
        transform = torch.eye(len(gramian), dtype=torch.float64)  # of zeros there is nothing to alter
    # Otherwise something else than the gradients, a guard, keeps the shared parameters where they are.
    owner = {tensor: task for task, pairs in enumerate(taken.walked.own) for tensor, _ in pairs}
    heads: list[Gradients] = [[] for _ in request.names]
    for tensor, gradient in taken.own_gradients():
        heads[owner.get(tensor, 0)].append((tensor, gradient))
    columns, masks, inside = taken.columns, step.roles.reached, taken.step.inside

    def shares() -> Iterator[Share]:
        layout, mixed = Layout(columns), jacobian.new_empty(jacobian.shape[1])
        for place, name in enumerate(request.names):
            if transform is None or place not in inside:
                yield name, [], heads[place]
                continue
            # A parameter that neither this task nor one mixed into it reaches is none of its business: no zero there.
            row = transform[inside.index(place)]
            mixed_in = [task for task, factor in zip(inside, row.tolist(), strict=True) if factor]
            reached = 1 << place | sum(1 << task for task in mixed_in)
            torch.matmul(
                row.to(device=jacobian.device, dtype=jacobian.dtype)[None], jacobian, out=mixed[None]
            )
            pieces = zip(columns, masks, layout.split(mixed), strict=True)
            yield name, [(tensor, piece) for tensor, mask, piece in pieces if mask & reached], heads[place]

    return record, shares()


def _step(request: TaskLosses, method: Method, workspace: Memory) -> Step:
    """Prepare the step of which all gradients are taken; what each loss reaches is that on some rank."""
    named = Named(shared=tuple(request.shared), task_specific=tuple(request.specific))
    wanted = Request(named, method.needs_now(), whole=True)
    names, losses, reduction = request.names, list(request.losses), request.reduction
    roles = find_roles(names, losses, named, workspace, part=reduction is not None)
    if reduction is not None:
        masks = _masks_of_all(roles.reached, len(names), reduction)
        reaching = 0
        for mask in masks:
            reaching |= mask
        roles = replace(roles, reached=masks, tasks=reaching)
    inside = tuple(task for task in range(len(names)) if roles.tasks >> task & 1)
    return Step(names, losses, losses, roles, workspace, inside, wanted, reduction=reduction)


def columns_by_task(taken: Taken) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
    """View the rows of a Jacobian as gradients: for each parameter those of all tasks, by name.

    Args:
        taken: of :func:`detente.task_gradients`, with a Jacobian.
    """
    gradients, columns = taken.gradients, taken.columns
    assert gradients.jacobian is not None
    found: dict[torch.Tensor, dict[str, torch.Tensor]] = {parameter: {} for parameter in columns}
    for name, row in zip(gradients.names, gradients.jacobian, strict=True):
        for parameter, piece in zip(columns, Layout(columns).split(row), strict=True):
            found[parameter][name] = piece
    return found


def _summed(
    inputs: Sequence[torch.Tensor], found: Sequence[torch.Tensor | None], reduction: Reduction
) -> list[torch.Tensor | None]:
    """Add one task's gradients over the ranks; None where no rank has any."""
    layout = Layout(tuple(inputs))
    like = layout.like
    flat = torch.empty(layout.columns + len(inputs), dtype=like.dtype, device=like.device)
    layout.write(flat[: layout.columns], found)
    flat[layout.columns :] = flat.new_tensor([float(gradient is not None) for gradient in found])
    reduction.ranks.sum(flat)
    (counts,) = to_host([flat[layout.columns :]])
    pieces = layout.split(flat[: layout.columns])
    return [piece if count else None for piece, count in zip(pieces, counts, strict=True)]


def _masks_of_all(masks: Sequence[int], tasks: int, reduction: Reduction) -> tuple[int, ...]:
    """Give for each shared parameter the bit mask of the losses that reach it on some rank."""
    bits = [float(mask >> task & 1) for mask in masks for task in range(tasks)]
    seen = reduction.ranks.numbers(bits, torch.device("cpu")).any(axis=0).reshape(len(masks), tasks)
    return tuple(sum(1 << task for task in range(tasks) if row[task]) for row in seen)
