"""Gradients of each task with respect to a shared representation: the upper bound.

Every head is walked once. The method is solved on the gradients of the whole batch's representation, and one
backward carries the result through the encoder, whatever the number of tasks (Sener & Koltun 2018, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeGuard

import torch

from detente.autograd.entries import sum_of
from detente.autograd.graph import gradient_edge, walk
from detente.autograd.jacobian import Pass
from detente.autograd.layout import Gradients, Layout, gradients_of, present
from detente.autograd.step import Step

# Largest entry of a direction that enters an encoder in float16, which sums it over examples and multiplies it.
_PEAK = 2.0**6


@dataclass(frozen=True)
class FeaturesPass(Pass):
    """Hold task gradients with respect to the representation.

    Attributes:
        used: for each tensor of the representation whether some loss has a gradient for it; what lies behind the others
            is left alone.
        direct: for each task the gradients of shared parameters that its loss reaches past the representation
            (a skip connection, a tied weight, a layer several heads use); weighted like the rest.
        plain: gradients of leaves behind the representation that are no parameters, for the plain sum of the losses.
        mine: positions of this rank's columns where the Jacobian is that of the whole batch.
    """

    used: Sequence[bool] = field(kw_only=True)
    direct: tuple[Gradients, ...] = field(kw_only=True)
    plain: Gradients = field(kw_only=True)
    mine: torch.Tensor | None = field(default=None, kw_only=True)

    def carry(self, direction: torch.Tensor | None, weights: torch.Tensor | None) -> Gradients:
        """Take one backward through the encoder, and add the weighted gradients that bypass the representation."""
        step, encoder = self.step, self.step.roles.encoder
        if direction is None:
            assert weights is not None
            direction = self.by_weights(weights)
        if self.mine is not None:
            direction = direction[self.mine]
        found = _behind(
            step, self.used, self.scaled(direction), encoder, retain_graph=step.request.retain_graph
        )
        total = dict(found)
        if any(self.direct):
            if weights is None:
                raise ValueError(
                    "some shared parameters are reached past features=, and this method gives no weights to combine "
                    "their gradients by. Pass every tensor by which the heads depend on shared parameters."
                )
            for row, task in enumerate(step.inside):
                for tensor, gradient in self.direct[task]:
                    part = gradient * weights[row].to(device=gradient.device, dtype=gradient.dtype)
                    total[tensor] = sum_of(total[tensor], part) if tensor in total else part
        return list(total.items())


def features_pass(step: Step) -> FeaturesPass:
    """Take the gradients of T losses with respect to the representation [T, P] and to each task's own parameters.

    With several features the gradient with respect to each holds the others fixed, also where one is computed
    from another. The Jacobian of a representation in half precision is kept in float32.
    """
    roles = step.roles
    layout = Layout(roles.on)
    dtype = torch.float32 if layout.dtype.itemsize < 4 else layout.dtype
    jacobian = step.memory.buffer(len(step.inside), layout.columns, dtype, roles.on[0].device)
    branches = step.request.named.branches
    with _stopped_at(roles.on) if roles.stopped and branches is None else nullcontext(), step.recomputation:
        if branches is not None and not roles.entwined:
            used, own, direct = _at_once(step, layout, jacobian)
        else:
            used, own, direct = _head_by_head(step, layout, jacobian)
    if step.factor is not None:
        jacobian.mul_((1 / step.factor).to(device=jacobian.device, dtype=jacobian.dtype))
    activations = None
    if "activations" in step.request.needs:
        activations = torch.empty_like(jacobian[0])
        layout.write(activations, [feature.detach() for feature in roles.on])
    reached = frozenset(_reached(step, used, own, direct)) if step.reduction is not None else frozenset()
    plain: Gradients = []
    behind = [leaf for leaf in roles.left_out if leaf not in {t for task in own for t, _ in task}]
    if behind:
        total = jacobian.sum(dim=0) if step.factor is None else jacobian.sum(dim=0) * step.factor.to(jacobian)
        plain = _behind(step, used, total, behind, retain_graph=True)
    found = FeaturesPass(
        step,
        jacobian,
        own,
        reached=reached,
        partial=step.reduction is not None,
        activations=activations,
        used=used,
        direct=direct,
        plain=plain,
    )
    return gathered(found) if step.reduction is not None and step.request.whole else found


def _head_by_head(
    step: Step, layout: Layout, jacobian: torch.Tensor
) -> tuple[list[bool], tuple[Gradients, ...], tuple[Gradients, ...]]:
    """Ask autograd once per task; a task's gradient with respect to the representation is that of all its branches."""
    roles, branches = step.roles, step.request.named.branches
    count, row, last = len(roles.on), 0, len(step.scaled) - 1
    used = [False] * count
    own: list[Gradients] = []
    direct: list[Gradients] = []
    read: Sequence[torch.Tensor] = roles.on
    if branches is not None:
        read = [part for name in branches for part in branches.parts(name)]
    for task, loss in enumerate(step.scaled):
        past, mine = _past(step, task), roles.own[task]
        keep = step.request.retain_graph or roles.stopped or (roles.entwined and task < last)
        found = gradients_of([loss], [*read, *past, *mine], None, retain_graph=keep)
        parts = _folded(found[: len(read)], count)
        if task in step.inside:
            layout.write(jacobian[row], parts)
            row += 1
        used = [before or g is not None for before, g in zip(used, parts, strict=True)]
        direct.append(present(past, found[len(read) : len(read) + len(past)]))
        own.append(present(mine, found[len(read) + len(past) :]))
        step.recomputation.next()
    return used, tuple(own), tuple(direct)


def _folded(gradients: Sequence[torch.Tensor | None], count: int) -> list[torch.Tensor | None]:
    """Add up the gradients of several branches, ``count`` tensors each."""
    total = list(gradients[:count])
    for place, gradient in enumerate(gradients[count:]):
        held = total[place % count]
        total[place % count] = gradient if held is None else held if gradient is None else held + gradient
    return total


def _at_once(
    step: Step, layout: Layout, jacobian: torch.Tensor
) -> tuple[list[bool], tuple[Gradients, ...], tuple[Gradients, ...]]:
    """Ask autograd once for all tasks: no node serves two of them, so that their gradients stay apart by themselves."""
    roles, branches = step.roles, step.request.named.branches
    assert branches is not None
    count = len(roles.on)
    branched = [[part for part in branches.parts(name) if part.requires_grad] for name in step.names]
    past = [_past(step, task) for task in range(len(step.names))]
    inputs = [t for task, mine in enumerate(roles.own) for t in (*branched[task], *past[task], *mine)]
    found = iter(gradients_of(step.scaled, inputs, None, retain_graph=step.request.retain_graph))
    used = [False] * count
    own: list[Gradients] = []
    direct: list[Gradients] = []
    inside = frozenset(step.inside)
    rows: list[list[torch.Tensor | None]] = []
    for task, name in enumerate(step.names):
        parts = [next(found) if part.requires_grad else None for part in branches.parts(name)]
        parts = parts or [None] * count
        used = [before or gradient is not None for before, gradient in zip(used, parts, strict=True)]
        if task in inside:
            rows.append(parts)
        direct.append(present(past[task], islice(found, len(past[task]))))
        own.append(present(roles.own[task], islice(found, len(roles.own[task]))))
    alike = [parts[0].reshape(-1) for parts in rows if _plain(parts, jacobian)]
    if len(alike) == len(rows):
        torch.stack(alike, out=jacobian)  # one call for all
    else:
        for row, parts in enumerate(rows):
            layout.write(jacobian[row], parts)
    step.recomputation.next()
    return used, tuple(own), tuple(direct)


def _plain(parts: Sequence[torch.Tensor | None], like: torch.Tensor) -> TypeGuard[Sequence[torch.Tensor]]:
    """Return whether a task's gradient is one dense tensor of the Jacobian's type."""
    one = parts[0] if len(parts) == 1 else None
    return (
        one is not None
        and one.layout is torch.strided
        and one.dtype == like.dtype
        and one.device == like.device
    )


def _past(step: Step, task: int) -> list[torch.Tensor]:
    """Return the shared parameters that a task's loss reaches past the representation."""
    return [leaf for leaf, mask in step.roles.past if mask >> task & 1]


def _behind(
    step: Step,
    used: Sequence[bool],
    direction: torch.Tensor,
    leaves: Sequence[torch.Tensor],
    *,
    retain_graph: bool,
) -> Gradients:
    """Carry a direction [P] of the representation back to leaves behind it, in one backward."""
    features = step.roles.on
    shrunk = None
    if any(feature.dtype == torch.float16 for feature in features):
        # A scaler's factor may take it out of the range of float16: a power of two brings it back, and is undone below.
        shrunk = torch.exp2((direction.abs().amax() / _PEAK).log2().ceil().clamp(min=0.0))
        direction = direction / shrunk
    pieces = Layout(features).split(direction)
    outputs = [feature for feature, one in zip(features, used, strict=True) if one]
    seeds = [piece for piece, one in zip(pieces, used, strict=True) if one]
    with step.recomputation:
        found = gradients_of(outputs, leaves, seeds, retain_graph=retain_graph)
    if shrunk is not None:
        found = [None if g is None else g * shrunk.to(device=g.device, dtype=g.dtype) for g in found]
    return present(leaves, found)


def _reached(
    step: Step, used: Sequence[bool], own: Sequence[Gradients], direct: Sequence[Gradients]
) -> set[torch.Tensor]:
    """Return parameters that some loss of this rank has a gradient for; what lies behind an unused feature has none."""
    behind = set(step.roles.encoder)
    if not all(used):
        reading = [feature for feature, one in zip(step.roles.on, used, strict=True) if one]
        behind &= walk(reading).leaves.keys()
    return behind | {tensor for task in (*direct, *own) for tensor, _ in task}


@contextmanager
def _stopped_at(features: Sequence[torch.Tensor]) -> Iterator[None]:
    """While this lasts no gradient flows behind a feature: into the encoder, or into another feature."""
    handles = []
    for feature in features:
        node, number = gradient_edge(feature)

        def block(
            gradients: tuple[torch.Tensor, ...], number: int = number
        ) -> tuple[torch.Tensor | None, ...]:
            return tuple(None if position == number else g for position, g in enumerate(gradients))

        handles.append(node.register_prehook(block))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gathered(found: FeaturesPass) -> FeaturesPass:
    """Return the pass with the columns of the whole batch, for every tensor in rank order, in place of this rank's."""
    step, jacobian = found.step, found.jacobian
    assert jacobian is not None and step.reduction is not None
    ranks = step.reduction.ranks
    widths = Layout(step.roles.on).widths
    table = ranks.numbers([float(width) for width in widths], jacobian.device).astype(int)
    held = [jacobian] if found.activations is None else [jacobian, found.activations[None]]
    mine: list[torch.Tensor] = []
    wholes: list[list[torch.Tensor]] = [[] for _ in held]
    start = first = 0
    for place, width in enumerate(widths):
        longest = int(table[:, place].max())
        for kept, whole in zip(held, wholes, strict=True):
            sent = kept.new_zeros(len(kept), longest)
            sent[:, :width] = kept[:, start : start + width]
            received = ranks.gather(sent.reshape(-1)).view(ranks.size, len(kept), longest)
            whole += [part[:, : int(table[rank, place])] for rank, part in enumerate(received)]
        before = int(table[: ranks.rank, place].sum())
        mine.append(torch.arange(first + before, first + before + width, device=jacobian.device))
        start, first = start + width, first + int(table[:, place].sum())
    changes: dict[str, Any] = {
        "jacobian": torch.cat(wholes[0], dim=1),
        "mine": torch.cat(mine),
        "partial": False,
    }
    if found.activations is not None:
        changes["activations"] = torch.cat(wholes[1], dim=1)[0]
    return replace(found, **changes)
