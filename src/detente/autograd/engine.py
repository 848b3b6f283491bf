"""From losses to what a method sees: one pass over the graph, and its numbers in one copy to the host.

:func:`task_gradients` is the one way from a prepared step to task gradients. Whoever needs them calls it: a training
step, the last of several micro-batches, a line search, an optimizer with a method in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from detente.autograd.batched import TAKE
from detente.autograd.features import FeaturesPass, features_pass
from detente.autograd.jacobian import ExactPass, Pass, SummedRows, exact_pass
from detente.autograd.layer import layer_pass
from detente.autograd.layout import Gradients, Layout, gradients_of, present, probes, seeds_of
from detente.autograd.losses import Losses
from detente.autograd.low import low_pass
from detente.autograd.numbers import (
    blocks_of,
    check_gradients,
    check_losses,
    check_own,
    to_host,
)
from detente.autograd.reduction import check_own_of_all, doubtful
from detente.autograd.roles import Memory, Roles
from detente.autograd.step import Step, multiplied, named_losses
from detente.values import TaskGradients

_AUTOCAST = ("cpu", "cuda", "xpu", "mps")


@dataclass(frozen=True)
class Taken:
    """Hold the task gradients of one step, as values and as the pass that can still carry a direction back.

    Attributes:
        gradients: what a method sees: the tasks of the shared problem.
        losses: [T] float64 of all tasks of the step.
        step: the step, its ``inside`` those of the shared problem.
        walked: turns a direction into gradients; holds the own parameters' gradients.
        touched: parameters that some loss has a gradient for, on several processes on some rank.
    """

    gradients: TaskGradients
    losses: np.ndarray
    step: Step
    walked: Pass
    touched: frozenset[torch.Tensor]

    def shared_gradients(self, direction: torch.Tensor | None, weights: torch.Tensor | None) -> Gradients:
        """Return gradients of the shared parameters, of the whole batch.

        Args:
            direction: [P] in the space of the problem; None for that of the weights.
            weights: one for each task of the problem, those of the direction (its length included), where it has any.

        Raises:
            ValueError: weights are needed and there are none.
        """
        if weights is None and (self.walked.jacobian is None or self.gradients.space == "layer"):
            raise ValueError(
                "solve_on= needs one weight for each task, and this method gives none."
                if self.walked.jacobian is not None
                else "memory='low' keeps no task gradients, and this method's direction is no weighted sum of them in "
                "this step. Use memory='fast'."
            )
        found, reduction = self.walked.carry(direction, weights), self.step.reduction
        if self.walked.complete:
            if len(self.touched) < len(found) or not self.touched.issuperset(self.columns):
                found = [pair for pair in found if pair[0] in self.touched]
        elif reduction is not None:
            found = reduction.gradients(reduction.shared, found, self.touched)
        return found

    def own_gradients(self, weights: torch.Tensor | None = None) -> Gradients:
        """Return gradients of the tasks' own parameters, times the task's weight where weights are given.

        Args:
            weights: one for each task of the problem; a task outside of it counts as it is, and so does a leaf that is
                no parameter and was left out.
        """
        step, reduction = self.step, self.step.reduction
        here: Gradients = []
        if weights is None and reduction is None and not step.roles.left_out:
            for task in self.walked.own:
                here += task
            return here
        factors = [1.0] * len(step.names)
        if weights is not None:
            for place, weight in zip(step.inside, weights.tolist(), strict=True):
                factors[place] = weight
        left_out = set(step.roles.left_out)
        settled = set(self.walked.settled_own) if isinstance(self.walked, ExactPass) else set()
        own: Gradients = []
        for place, (factor, gradients) in enumerate(zip(factors, self.walked.own, strict=True)):
            for tensor, gradient in gradients:
                if tensor in left_out:
                    # Inputs are each rank's own: what a plain backward of its losses gives.
                    here.append((tensor, gradient / step.shares[place] if step.shares else gradient))
                    continue
                part = gradient if factor == 1.0 else gradient * factor
                (here if reduction is None or tensor in settled else own).append((tensor, part))
        if isinstance(self.walked, FeaturesPass):
            here += self.walked.plain
        return here if reduction is None else here + reduction.gradients(reduction.own, own, self.touched)

    @property
    def columns(self) -> tuple[torch.Tensor, ...]:
        """The parameters in the order of the Jacobian's columns; empty on features."""
        return self.walked.columns


def task_gradients(step: Step) -> Taken | None:
    """Take the gradient of every task's loss, and look at all of them at once on the host.

    Returns:
        The task gradients; None if no loss reaches a shared parameter.

    Raises:
        ValueError: a loss is not finite, or the graph leaves open what is shared and the gradients do not tell.
        GradientNotFinite: a gradient is not finite; the task is named.
    """
    space, mode = step.roles.space, step.request.mode
    if space == "features":
        return measured(features_pass(step))
    if not (step.roles.tasks if step.reduction is None else step.reduction.anywhere):
        return None
    if space == "layer":
        return measured(layer_pass(step))
    return measured(low_pass(step) if mode == "low" else exact_pass(step, take=TAKE[mode]))


def measured(walked: Pass) -> Taken:
    """Take Gramian, losses and a check of every gradient to the host, in one copy."""
    step, roles = walked.step, walked.step.roles
    names, reduction = step.names, step.reduction
    blocks = blocks_of(walked.columns) if "blocks" in step.request.needs and walked.columns else None
    sizes: Sequence[int] | None = None if blocks is None else blocks.sizes
    if roles.unsure and blocks is None:
        widths = Layout(roles.shared).widths
        sizes = [sum(widths[: -roles.unsure]), *widths[-roles.unsure :]]
    products = walked.products(sizes)
    lengths: Sequence[torch.Tensor] = _own_lengths(walked) if roles.unsure else ()
    if reduction is None:
        own: list[torch.Tensor] = []
        for task in walked.own:
            for _, gradient in task:
                own.append(gradient)
        losses, seen, probed, alive = to_host([step.losses, products, probes(own), lengths])
        touched = walked.reached
    else:
        losses, seen, probed, alive, touched = _summed(walked, products, lengths)
    matrix = seen if sizes is None else seen.sum(axis=0)
    inside = names
    if len(step.inside) < len(names):
        inside = tuple(names[task] for task in step.inside)
    # Each check looks again, and names what it finds.
    if not np.isfinite(losses).all():
        check_losses(names, losses)
    if not np.isfinite(matrix.diagonal()).all():
        check_gradients(inside, matrix.diagonal(), roles.space)
    if reduction is not None:
        check_own_of_all(reduction, names, walked.own, probed)
    elif not np.isfinite(probed).all():
        check_own(names, walked.own, probed)
    if roles.unsure and isinstance(walked, ExactPass):
        first = len(roles.shared) - roles.unsure
        if blocks is not None:
            seen = np.concatenate([seen[:first].sum(axis=0)[None], seen[first:]])
        walked, matrix = walked.settled(seen, alive[list(step.inside)] > 0)
        if blocks is not None:
            blocks = blocks_of(walked.columns)
            (seen,) = to_host([walked.products(blocks.sizes)])
    if roles.certain >= 0:
        walked, kept = _without_idle(walked, matrix.diagonal())
        matrix = matrix[np.ix_(kept, kept)]
        seen = seen[:, kept][:, :, kept] if blocks is not None else seen
        inside = tuple(names[task] for task in walked.step.inside)
    gradients = TaskGradients(
        names=inside,
        losses=losses if inside is names else losses[list(walked.step.inside)],
        gramian=matrix,
        jacobian=walked.jacobian,
        activations=walked.activations,
        space=roles.space,
    )
    if blocks is not None:
        gradients = replace(
            gradients,
            block_gramians=seen,
            block_names=blocks.names,
            block_sizes=blocks.sizes,
            block_layers=blocks.layers,
        )
    if walked.columns and "jacobian" in step.request.needs and not walked.partial:
        keys, widths = step.memory.keys(walked.columns), Layout(walked.columns).widths
        gradients = replace(gradients, columns=tuple(zip(keys, widths, strict=True)))
    return Taken(gradients, losses, walked.step, walked, touched)


def _own_lengths(walked: Pass) -> list[torch.Tensor]:
    """Return for each task the length of its own parameters' gradients: whether its loss has any gradient at all."""
    found = []
    for loss, task in zip(walked.step.losses, walked.own, strict=True):
        total = torch.zeros((), dtype=torch.float64, device=loss.device)
        for _, gradient in task:
            values = gradient if gradient.layout is torch.strided else gradient.coalesce().values()
            total = total + torch.linalg.vector_norm(values).to(total)
        found.append(total)
    return found


def _without_idle(walked: Pass, sizes: np.ndarray) -> tuple[Pass, list[int]]:
    """Leave out tasks that only seem to reach what is shared, through a node that packs several tasks.

    Their gradient is exactly zero there, and always was.

    Args:
        walked: the pass.
        sizes: the squared length of each row.

    Returns:
        The pass of the others, and which rows these are.
    """
    step, memory = walked.step, walked.step.memory
    names = step.names
    memory.moved.update(names[task] for task, size in zip(step.inside, sizes, strict=True) if size > 0)
    kept = [
        row
        for row, task in enumerate(step.inside)
        if step.roles.certain >> task & 1 or names[task] in memory.moved
    ]
    if len(kept) == len(step.inside) or not kept or not step.request.drops:
        return walked, list(range(len(step.inside)))
    step = replace(step, inside=tuple(step.inside[row] for row in kept))
    jacobian = None if walked.jacobian is None else walked.jacobian[kept]
    return replace(walked, step=step, jacobian=jacobian), kept


def _summed(
    walked: Pass, products: torch.Tensor, lengths: Sequence[torch.Tensor]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, frozenset[torch.Tensor]]:
    """Return what :func:`measured` looks at, of the whole batch, in one sum over the ranks.

    That is losses [T], products, counts of doubtful own gradients [T], lengths of own gradients, and which parameters
    some rank has a gradient for.
    """
    step = walked.step
    reduction = step.reduction
    assert reduction is not None
    device, tasks = products.device, len(step.losses)
    pieces = [loss.detach().reshape(1).to(device, torch.float64) for loss in step.losses]
    pieces += [doubtful(walked.own, device), reduction.flags(walked.reached).to(device)]
    pieces += [length.reshape(1).to(device) for length in lengths]
    if walked.partial:
        pieces.append(products.reshape(-1))
    flat = reduction.ranks.sum(torch.cat(pieces))
    if walked.partial:
        (numbers,) = to_host([flat])
        cut = len(numbers) - products.numel()
        numbers, seen = numbers[:cut], numbers[cut:].reshape(products.shape)
    else:
        numbers, seen = to_host([flat, products])
    flags = len(reduction.shared) + len(reduction.own)
    losses, unsound, rest = numbers[:tasks], numbers[tasks : 2 * tasks], numbers[2 * tasks :]
    return losses, seen, unsound, rest[flags:], reduction.read_flags(rest[:flags])


def further_gradients(taken: Taken, extra: Sequence[Losses]) -> Taken:
    """Take the same tasks' gradients on further batches too, for methods that compare several.

    Args:
        taken: of the step.
        extra: losses of each further batch, with their graph.

    Returns:
        The task gradients with those of the further batches in ``gradients.extra``, in memory of their own.

    Raises:
        ValueError: as the step's own losses do, other tasks, or losses that reach no shared parameter of the step;
            the batch is named.
        TypeError: as the step's own losses do.
    """
    found = []
    for number, batch in enumerate(extra):
        try:
            gradients = measured(_further_pass(taken, batch)).gradients
        except (ValueError, TypeError) as error:
            raise type(error)(f"extra[{number}]: {error}") from error
        found.append(replace(gradients, space=taken.gradients.space))
    return replace(taken, gradients=replace(taken.gradients, extra=tuple(found)))


def _further_pass(taken: Taken, batch: Losses) -> ExactPass:
    """Take gradients of one more batch with respect to the parameters of the step's problem, complete on every rank."""
    step, names = taken.step, taken.gradients.names
    given, scalars = named_losses(batch)
    mine = dict(zip(step.names, step.losses, strict=True))
    here = {name for name, loss in mine.items() if loss.requires_grad}
    if set(given) != here:
        raise ValueError(f"the tasks are {', '.join(given)}, and those of the step {', '.join(step.names)}.")
    losses = []
    for name in names:
        loss = scalars[given.index(name)] if name in here else mine[name]
        if step.shares and loss.requires_grad:
            loss = loss * step.shares[step.names.index(name)]
        losses.append(loss)
    everyone = (1 << len(names)) - 1
    columns = taken.columns
    roles = Roles("exact", everyone, columns, (everyone,) * len(columns), ((),) * len(names))
    further = replace(
        step,
        names=names,
        losses=losses,
        scaled=losses if step.factor is None else multiplied(losses, step.factor),
        roles=roles,
        memory=Memory(),
        inside=tuple(range(len(names))),
    )
    rows = None
    if step.reduction is not None:
        layout = Layout(columns)
        rows = SummedRows(layout, layout.like.new_empty(len(names), layout.columns), step.reduction.ranks)
    found = exact_pass(further, rows)
    if not found.reached and any(loss.requires_grad for loss in losses):
        raise ValueError(
            "no loss reaches a shared parameter of the step; use the same model for every batch."
        )
    return replace(found, reached=taken.walked.reached) if step.reduction is not None else found


@dataclass(frozen=True)
class Weighted:
    """Hold the gradients of a weighted sum of losses: all that a weighting of the losses needs.

    Attributes:
        shared: gradients of the shared parameters.
        own: for each task gradients of its own.
        plain: gradients of leaves that are no parameters, for the plain sum of the losses.
    """

    shared: Gradients
    own: tuple[Gradients, ...]
    plain: Gradients


def weighted_backward(step: Step, weights: torch.Tensor, *, plain_heads: bool) -> Weighted:
    """Take one backward of the losses weighted by ``weights`` [T].

    Args:
        step: its losses and who owns what.
        weights: [T] on the host.
        plain_heads: give own parameters the plain gradient of their loss; the heads are then walked twice.
    """
    roles, losses = step.roles, step.scaled
    left_out = set(roles.left_out)
    shared = [tensor for tensor, mask in zip(roles.shared, roles.reached, strict=True) if mask]
    mine = list(dict.fromkeys(t for tensors in roles.own for t in tensors if t not in left_out))
    apart = [*mine, *roles.left_out] if plain_heads else list(roles.left_out)
    together = shared if plain_heads else [*shared, *mine]
    with step.recomputation as recomputation:
        plain = gradients_of(losses, apart, None, retain_graph=True) if apart else []
        recomputation.next()
        found = gradients_of(
            losses, together, seeds_of(losses, weights), retain_graph=step.request.retain_graph
        )
    own = plain[: len(mine)] if plain_heads else found[len(shared) :]
    by_tensor = dict(zip(mine, own, strict=True))
    owners: list[Gradients] = []
    for tensors in roles.own:
        # A parameter named as own that several losses reach has the sum already: it is handed over once.
        owners.append([(tensor, g) for tensor in tensors if (g := by_tensor.pop(tensor, None)) is not None])
    rest = plain[len(mine) :] if plain_heads else plain
    return Weighted(present(shared, found[: len(shared)]), tuple(owners), present(roles.left_out, rest))


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch ``torch.autocast`` off inside: our arithmetic keeps the types it is given.

    The casts that it caches of parameters are dropped: an optimizer may move these inside.
    """
    with ExitStack() as stack:
        for kind in _AUTOCAST:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.callback(torch.clear_autocast_cache)
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
