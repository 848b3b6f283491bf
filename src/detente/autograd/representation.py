"""Gradients of each task with respect to a shared representation: the upper bound.

Every head is walked once. The method is solved on the gradients of the whole batch's representation, and one
backward carries the result through the encoder, whatever the number of tasks (Sener & Koltun 2018, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch

from detente.autograd.exact import Pass
from detente.autograd.flat import Gradients, Layout, gradients_of, present
from detente.autograd.partition import Memory, Partition, by_task, gradient_edge, trainable, walk


@dataclass
class FeaturesPass(Pass):
    """Task gradients with respect to the representation.

    Attributes:
        features: the tensors of the representation.
        used: for each of them whether some loss has a gradient for it; what lies behind the others is left alone.
        encoder: shared parameters behind the representation.
        direct: for each task the gradients of shared parameters that its loss reaches past the representation
            (a skip connection, a tied weight, a layer several heads use); weighted like the rest.
        mine: positions of this rank's columns where the Jacobian is that of the whole batch.
    """

    features: Sequence[torch.Tensor] = field(kw_only=True)
    used: Sequence[bool] = field(kw_only=True)
    encoder: Sequence[torch.Tensor] = field(kw_only=True)
    direct: list[Gradients] = field(kw_only=True)
    retain_graph: bool = field(kw_only=True)
    mine: torch.Tensor | None = field(default=None, kw_only=True)

    def shared(self, direction: torch.Tensor, weights: torch.Tensor | None) -> Gradients:
        """One backward through the encoder, plus the weighted gradients that bypass the representation."""
        if self.mine is not None:
            direction = direction[self.mine]
        direction = self.times_factor(direction)
        pieces = Layout(tuple(self.features)).split(direction)
        outputs = [feature for feature, used in zip(self.features, self.used, strict=True) if used]
        seeds = [piece for piece, used in zip(pieces, self.used, strict=True) if used]
        found = gradients_of(outputs, self.encoder, seeds, retain_graph=self.retain_graph)
        total = dict(present(self.encoder, found))
        if any(self.direct):
            if weights is None:
                raise ValueError(
                    "some shared parameters are reached past features=, and this method gives no weights to combine "
                    "their gradients by. Pass every tensor by which the heads depend on shared parameters."
                )
            for task, gradients in enumerate(self.direct):
                for tensor, gradient in gradients:
                    part = gradient * weights[task].to(device=gradient.device, dtype=gradient.dtype)
                    total[tensor] = total[tensor] + part if tensor in total else part
        found_here = list(total.items())
        if self.reduction is None:
            return found_here
        return self.reduction.gradients(self.reduction.shared, found_here)


@dataclass(frozen=True)
class Roles:
    """Which leaves play which part when the problem is solved on a representation, for T losses.

    Attributes:
        encoder: shared parameters behind the features.
        past: for each task the shared parameters its loss (also) reaches past the features.
        own: for each task the parameters that take the plain gradient of its loss.
        stopped: True if gradients must be stopped at the features by hand: one feature is computed from another, or a
            loss also reaches past them what lies behind them. Autograd would carry the rest of the way on, and the
            encoder's part would count twice.
        entwined: True if the graphs of two heads have nodes in common.
    """

    encoder: list[torch.Tensor]
    past: Sequence[Sequence[torch.Tensor]]
    own: Sequence[Sequence[torch.Tensor]]
    stopped: bool
    entwined: bool

    @property
    def shared_reached(self) -> bool:
        """Whether some loss reaches a shared parameter."""
        return bool(self.encoder) or any(self.past)

    def of_tasks(self, tasks: Sequence[int]) -> Roles:
        """The same for some of the losses, by their positions."""
        if list(tasks) == list(range(len(self.own))):
            return self
        return replace(self, past=[self.past[task] for task in tasks], own=[self.own[task] for task in tasks])

    def partition(self) -> Partition:
        """The roles without the representation: every shared parameter counts as reached by every loss."""
        shared = tuple(dict.fromkeys([*self.encoder, *(tensor for task in self.past for tensor in task)]))
        everyone = (1 << len(self.own)) - 1
        return Partition(shared, (everyone,) * len(shared), tuple(map(tuple, self.own)))


def assign_roles(
    names: Sequence[str],
    losses: Sequence[torch.Tensor],
    features: Sequence[torch.Tensor],
    memory: Memory,
    *,
    shared: Sequence[torch.Tensor] | None,
    task_specific: Sequence[torch.Tensor] | None,
) -> Roles:
    """Find the encoder behind ``features`` and what the heads reach past it.

    Parameters behind the features are shared, and so are parameters that two or more losses reach past them; the
    others are own. ``shared`` and ``task_specific`` restrict both to what they name. A parameter behind the features
    cannot be a task's own: the one backward through the encoder does not tell tasks apart.

    Raises:
        ValueError: a feature carries no graph, some loss does not depend on the features (named), no loss reaches any
            named shared parameter, or the names would make a parameter behind the features a task's own.
    """
    for position, feature in enumerate(features):
        if not feature.requires_grad:
            raise ValueError(
                f"features[{position}] carries no graph: the encoder is frozen, or ran under torch.no_grad(). "
                "Without features= the shared parameters are found from the losses."
            )
    edges = [gradient_edge(feature) for feature in features]
    heads = walk(losses, edges, named=shared is not None or task_specific is not None)
    depending = 0
    for mask in heads.stops.values():
        depending |= mask
    for task, name in enumerate(names):
        if losses[task].requires_grad and not depending >> task & 1:
            raise ValueError(
                f"the loss of task {name!r} does not depend on features=. Compute it from the tensor you pass (not "
                "from a detached or recomputed copy), or leave the task out of this step."
            )
    behind = [
        walk([feature], [other for other in edges if other != edge])
        for feature, edge in zip(features, edges, strict=True)
    ]
    encoder = list(dict.fromkeys(leaf for found in behind for leaf in found.leaves))
    inside = set(encoder)
    if shared is not None:
        chosen = set(trainable(shared))
        if chosen and heads.leaves and not chosen & (inside | set(heads.leaves)):
            raise ValueError(
                f"no loss reaches any of the {len(chosen)} parameters named in shared=. Are they of another model, "
                "or was the graph detached?"
            )
    elif task_specific is not None:
        chosen = (inside | set(heads.leaves)) - set(task_specific)
    else:
        memory.remember([*encoder, *(leaf for leaf, mask in heads.leaves.items() if mask & (mask - 1))])
        chosen = set(memory.shared())
    candidates = inside | set(heads.leaves) if task_specific is None else set(task_specific)
    apart = candidates - chosen
    misplaced = [leaf for leaf in encoder if leaf in apart]
    if misplaced:
        raise ValueError(
            f"{len(misplaced)} parameters behind features= (the first has shape {tuple(misplaced[0].shape)}) would be "
            "a task's own, but one backward through the encoder serves all tasks. Name them in shared=, leave "
            "features= out, or name both shared= and task_specific= without them to leave them untouched."
        )
    tasks = len(losses)
    return Roles(
        encoder=[leaf for leaf in encoder if leaf in chosen],
        past=by_task({leaf: mask for leaf, mask in heads.leaves.items() if leaf in chosen}, tasks),
        own=by_task({leaf: mask for leaf, mask in heads.leaves.items() if leaf in apart}, tasks),
        stopped=any(found.stops for found in behind)
        or any(leaf in inside for leaf in heads.leaves if leaf in chosen),
        entwined=heads.overlap,
    )


def features_pass(
    losses: Sequence[torch.Tensor],
    features: Sequence[torch.Tensor],
    roles: Roles,
    memory: Memory,
    *,
    retain_graph: bool,
    activations: bool = True,
) -> FeaturesPass:
    """Take the gradients of T losses with respect to ``features`` [T, P] and to each task's own parameters.

    With several features the gradient with respect to each holds the others fixed, also where one is computed
    from another. ``activations`` copies the representation for methods that look at it.
    """
    layout = Layout(tuple(features))
    jacobian = memory.buffer(len(losses), layout.columns, layout.like)
    used = [False] * len(features)
    own: list[Gradients] = []
    direct: list[Gradients] = []
    last = len(losses) - 1
    with _stopped_at(features) if roles.stopped else nullcontext():
        for task, loss in enumerate(losses):
            past, mine = roles.past[task], roles.own[task]
            keep = retain_graph or roles.stopped or (roles.entwined and task < last)
            found = gradients_of([loss], [*features, *past, *mine], None, retain_graph=keep)
            layout.write(jacobian[task], found[: len(features)])
            used = [before or g is not None for before, g in zip(used, found[: len(features)], strict=True)]
            direct.append(present(past, found[len(features) : len(features) + len(past)]))
            own.append(present(mine, found[len(features) + len(past) :]))
    flattened = None
    if activations:
        flattened = torch.empty_like(jacobian[0])
        layout.write(flattened, [feature.detach() for feature in features])
    return FeaturesPass(
        losses,
        "features",
        jacobian,
        own,
        flattened,
        features=features,
        used=used,
        encoder=roles.encoder,
        direct=direct,
        retain_graph=retain_graph,
    )


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
