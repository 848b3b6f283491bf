"""Task gradients for an optimizer: one task after the other, or altered by a method, which needs all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from detente.autograd.exact import exact_pass
from detente.autograd.flat import Gradients, Layout, finite, gradients_of, present, probes
from detente.autograd.host import to_host
from detente.autograd.measure import measure_gradients
from detente.autograd.partition import Memory, Partition
from detente.autograd.reduction import Reduction
from detente.autograd.rows import SummedRows
from detente.autograd.where import Where
from detente.methods import Method
from detente.step import record_of, undone_on_failure
from detente.values import StepRecord

# Methods known to give a transform; a test holds the list against the registry.
ALTERING = ("aligned-mtl", "gradvac", "pcgrad", "upgrad")


@dataclass(frozen=True)
class Asked:
    """The gradients an optimizer asks for in one step.

    Attributes:
        names: T tasks, in the order in which their backwards run.
        losses: T finite scalars with their graph.
        shared, specific: parameters by their role.
        name_of: gives a parameter's name, for messages.
        remembers: whether a task has moments from earlier steps, for messages.
        reduction: on several processes, what makes the whole of the ranks' parts.
    """

    names: tuple[str, ...]
    losses: Sequence[torch.Tensor]
    shared: Sequence[torch.Tensor]
    specific: Sequence[torch.Tensor]
    name_of: Callable[[torch.Tensor], str]
    remembers: Callable[[str], bool]
    reduction: Reduction | None = None


def streamed(asked: Asked, own: dict[torch.Tensor, torch.Tensor]) -> Iterator[tuple[str, Gradients]]:
    """Task by task the gradients of the shared parameters; each is let go before the next backward.

    Args:
        asked: what to take.
        own: filled with the gradients of task-specific parameters, those of several tasks added up.

    Raises:
        ValueError: a gradient is not finite; task and parameter are named, and the tasks whose gradients were handed
            out before.
    """
    inputs, last = [*asked.shared, *asked.specific], len(asked.names) - 1
    for place, (name, loss) in enumerate(zip(asked.names, asked.losses, strict=True)):
        found = gradients_of([loss], inputs, None, retain_graph=place < last)
        if asked.reduction is not None:
            found = _summed(inputs, found, asked.reduction)
        _check(asked, place, present(inputs, found))
        # Never added in place: autograd may hand out one tensor for two inputs.
        for parameter, gradient in present(asked.specific, found[len(asked.shared) :]):
            own[parameter] = own[parameter] + gradient if parameter in own else gradient
        pairs = present(asked.shared, found[: len(asked.shared)])
        del found
        yield name, pairs
        del pairs  # its memory serves the next task's gradients


def altered(
    asked: Asked, method: Method, workspace: Memory, own: dict[torch.Tensor, torch.Tensor]
) -> tuple[StepRecord, Iterator[tuple[str, Gradients]]]:
    """The record of what a method makes of the task gradients, and task by task the altered ones.

    A step it refuses has no gradients at all, and a stationary one without a transform none of the shared parameters.
    The matrix [T, P] of all task gradients is held, and one altered row at a time.

    Args:
        asked: what to take.
        method: gives a transform [T, T].
        workspace: lends the matrix.
        own: filled as by :func:`streamed`; the method has no say in them.

    Raises:
        ValueError: a gradient is not finite, no loss reaches a shared parameter, or the method rejects the input or
            gives no transform. The method's state is then as it was.
    """
    where = Where(None, tuple(asked.shared), tuple(asked.specific), None)
    parts = where.plan(asked.names, asked.losses, workspace)
    assert isinstance(parts, Partition), "there is no representation here"
    reduction, rows_here = asked.reduction, None
    if reduction is not None:
        rows_here = SummedRows(Layout(parts.shared), len(asked.names), workspace, reduction.ranks)
    graph = exact_pass(asked.losses, parts, workspace, retain_graph=False, rows=rows_here)
    masks = parts.reached
    if reduction is not None:
        graph.reduction = reduction
        graph.reached = graph.touched | {tensor for task in graph.own for tensor, _ in task}
        masks = _masks_of_all(masks, len(asked.names), reduction)
    taken = measure_gradients(asked.names, graph, blocks="blocks" in method.needs_now())
    assert taken.gradients.gramian is not None
    with undone_on_failure(method):
        combination = method.combine(taken.gradients)
        transform = combination.transform
        # Something else than the gradients, a guard, may keep the shared parameters where they are.
        held = transform is None and combination.status == "stationary" and taken.gradients.gramian.any()
        if transform is None and combination.accepted and not held:
            if taken.gradients.gramian.any():
                raise ValueError(
                    f"transform={method.declares.name} gives no altered gradient for each task in this step; it "
                    f"combines them in another way. Methods that do: {', '.join(ALTERING)} (with their default "
                    "options), or leave transform= out. Nothing was changed."
                )
            transform = torch.eye(len(asked.names), dtype=torch.float64)  # of zeros there is nothing to alter
    record = replace(record_of(taken.gradients, combination), weights=None)
    if not combination.accepted:
        return record, iter(())
    for parameter, gradient in graph.own_gradients():
        own[parameter] = own[parameter] + gradient if parameter in own else gradient
    if transform is None:
        return record, iter(())
    jacobian, factors = taken.gradients.jacobian, transform
    assert jacobian is not None

    def rows() -> Iterator[tuple[str, Gradients]]:
        layout, mixed = Layout(parts.shared), jacobian.new_empty(jacobian.shape[1])
        for place, (name, row) in enumerate(zip(asked.names, factors, strict=True)):
            # A parameter that neither this task nor one mixed into it reaches is none of its business: no zero there.
            reached = 1 << place | sum(1 << task for task, factor in enumerate(row.tolist()) if factor)
            factors_of_row = row.to(device=jacobian.device, dtype=jacobian.dtype)
            torch.matmul(factors_of_row[None], jacobian, out=mixed[None])
            pieces = zip(parts.shared, masks, layout.split(mixed), strict=True)
            yield name, [(tensor, piece) for tensor, mask, piece in pieces if mask & reached]

    return record, rows()


def _summed(
    inputs: Sequence[torch.Tensor], found: Sequence[torch.Tensor | None], reduction: Reduction
) -> list[torch.Tensor | None]:
    """One task's gradients added over the ranks; None where no rank has any."""
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
    """For each shared parameter the bit mask of the losses that reach it on some rank."""
    bits = [float(mask >> task & 1) for mask in masks for task in range(tasks)]
    seen = reduction.ranks.numbers(bits, torch.device("cpu")).any(axis=0).reshape(len(masks), tasks)
    return tuple(sum(1 << task for task in range(tasks) if row[task]) for row in seen)


def _check(asked: Asked, place: int, gradients: Gradients) -> None:
    """See that one task's gradients are finite, before anything takes them in."""
    probed = probes(gradient for _, gradient in gradients)
    (known,) = to_host([probed])
    if np.isfinite(known).all():
        return
    fine = finite([gradient for _, gradient in gradients], known)
    if fine.all():
        return
    where = asked.name_of(gradients[int(np.argmin(fine))][0])
    state = standing(asked.names[:place], asked.remembers)
    raise ValueError(
        f"the gradient of task {asked.names[place]!r} is not finite (NaN or Inf), first in {where}. {state} Look for a "
        "division by zero, a logarithm of zero, or a learning rate too high for this task."
    )


def standing(before: Sequence[str], remembers: Callable[[str], bool]) -> str:
    """What a step has changed that fails at one task's gradient, after those of the tasks ``before`` were taken in.

    Example:
        >>> standing(["a", "new"], {"a"}.__contains__).partition("; ")[2][:29]
        "the moments of task 'a', whos"
    """
    before = [name for name in before if remembers(name)]  # the moments of others are dropped again
    if not before:
        return "Nothing was changed."
    return (
        f"Parameters, step counters and the moments of this task are as they were; the moments of "
        f"{_tasks(before)}, whose backward came first, have already taken in their gradient of this step."
    )


def _tasks(names: Sequence[str]) -> str:
    return f"task{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}"
