"""Gradients of each task with respect to the shared parameters themselves, or to a layer of them.

One backward through the trunk per task, each head walked once, the graph freed with the last task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from detente.autograd.flat import Gradients, Layout, gradients_of, present, seeds_of
from detente.autograd.partition import Memory, Partition
from detente.values import Space


@dataclass
class Pass:
    """The task gradients of one step, and how a direction becomes gradients of the parameters.

    Attributes:
        losses: T scalars with their graph.
        space: where the gradients were taken.
        jacobian: [T, P] or None if none were taken.
        own: for each task the gradients of its own parameters, not weighted.
        activations: [P] the flattened representation, if the space is ``features``.
    """

    losses: Sequence[torch.Tensor]
    space: Space
    jacobian: torch.Tensor | None = None
    own: list[Gradients] = field(default_factory=list)
    activations: torch.Tensor | None = None

    def shared(self, direction: torch.Tensor, weights: torch.Tensor | None) -> Gradients:
        """Gradients of the shared parameters, for a direction [P] in this pass's space.

        ``weights`` [T] are those of the direction (its length included), where it has any.
        """
        raise AssertionError("the passes below define it")


@dataclass
class ExactPass(Pass):
    """Task gradients with respect to all shared parameters."""

    partition: Partition = field(kw_only=True)

    def shared(self, direction: torch.Tensor, weights: torch.Tensor | None) -> Gradients:
        """The direction, cut into the shapes of the parameters that some loss reaches."""
        pieces = Layout(self.partition.shared).split(direction)
        reached = zip(self.partition.shared, self.partition.reached, pieces, strict=True)
        return [(tensor, piece) for tensor, mask, piece in reached if mask]


def exact_pass(
    losses: Sequence[torch.Tensor], partition: Partition, memory: Memory, *, retain_graph: bool, batched: bool = False
) -> ExactPass:
    """Take the gradients of T losses with respect to ``partition.shared`` [T, P] and to each task's own parameters.

    Args:
        losses: T scalars with their graph.
        partition: who owns what.
        memory: lends the [T, P] buffer.
        retain_graph: keep the graph after the last task.
        batched: one vectorised backward instead of T; every task then walks all heads, and every operation of the
            graph must support ``torch.vmap``.
    """
    layout = Layout(partition.shared)
    jacobian = memory.buffer(len(losses), layout.columns, layout.like)
    if batched:
        own = _batched(losses, partition, layout, jacobian, retain_graph)
        return ExactPass(losses, "exact", jacobian, own, partition=partition)
    own = []
    last = len(losses) - 1
    for task, loss in enumerate(losses):
        wanted = [tensor for tensor, mask in zip(partition.shared, partition.reached, strict=True) if mask >> task & 1]
        mine = partition.own[task]
        found = gradients_of([loss], [*wanted, *mine], None, retain_graph=retain_graph or task < last)
        by_tensor = dict(zip(wanted, found[: len(wanted)], strict=True))
        layout.write(jacobian[task], [by_tensor.get(tensor) for tensor in partition.shared])
        own.append(present(mine, found[len(wanted) :]))
    return ExactPass(losses, "exact", jacobian, own, partition=partition)


def _batched(
    losses: Sequence[torch.Tensor], partition: Partition, layout: Layout, jacobian: torch.Tensor, retain_graph: bool
) -> list[Gradients]:
    mine = [tensor for tensors in partition.own for tensor in tensors]
    shared = [tensor for tensor, mask in zip(partition.shared, partition.reached, strict=True) if mask]
    stacked = torch.stack([loss.reshape(()) for loss in losses])
    found = torch.autograd.grad(
        stacked,
        [*shared, *mine],
        torch.eye(len(losses), dtype=stacked.dtype, device=stacked.device),
        retain_graph=retain_graph,
        allow_unused=True,
        is_grads_batched=True,
    )
    by_tensor = dict(zip([*shared, *mine], found, strict=True))
    own: list[Gradients] = []
    for task in range(len(losses)):
        layout.write(
            jacobian[task], [None if (g := by_tensor.get(tensor)) is None else g[task] for tensor in partition.shared]
        )
        rows = [(tensor, by_tensor[tensor]) for tensor in partition.own[task]]
        own.append([(tensor, gradient[task]) for tensor, gradient in rows if gradient is not None])
    return own


@dataclass
class LayerPass(Pass):
    """Task gradients with respect to some shared parameters; one weighted backward serves all the others."""

    partition: Partition = field(kw_only=True)
    retain_graph: bool = field(kw_only=True)

    def shared(self, direction: torch.Tensor, weights: torch.Tensor | None) -> Gradients:
        """The weighted backward through heads and trunk."""
        assert weights is not None
        reached = [t for t, mask in zip(self.partition.shared, self.partition.reached, strict=True) if mask]
        seeds = seeds_of(self.losses, weights)
        return present(reached, gradients_of(self.losses, reached, seeds, retain_graph=self.retain_graph))


def layer_pass(
    losses: Sequence[torch.Tensor],
    partition: Partition,
    layer: Sequence[torch.Tensor],
    memory: Memory,
    *,
    retain_graph: bool,
) -> LayerPass:
    """Take the gradients of T losses with respect to ``layer`` [T, P] and to each task's own parameters.

    Raises:
        ValueError: a parameter of the layer is not shared.
    """
    for position, tensor in enumerate(layer):
        if not any(tensor is shared for shared in partition.shared):
            raise ValueError(
                f"parameter {position} of solve_on= (shape {tuple(tensor.shape)}) is not shared by the tasks; "
                "name parameters that two or more losses reach, such as the last shared layer."
            )
    layout = Layout(tuple(layer))
    jacobian = memory.buffer(len(losses), layout.columns, layout.like)
    own = []
    for task, loss in enumerate(losses):
        mine = partition.own[task]
        found = gradients_of([loss], [*layer, *mine], None, retain_graph=True)
        layout.write(jacobian[task], found[: len(layer)])
        own.append(present(mine, found[len(layer) :]))
    return LayerPass(losses, "layer", jacobian, own, partition=partition, retain_graph=retain_graph)
