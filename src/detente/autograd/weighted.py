"""One backward of a weighted sum of losses: all that a weighting of the losses needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from detente.autograd.flat import Gradients, gradients_of, present, seeds_of
from detente.autograd.partition import Partition


def weighted_backward(
    losses: Sequence[torch.Tensor],
    partition: Partition,
    weights: torch.Tensor,
    *,
    plain_heads: bool,
    retain_graph: bool,
) -> tuple[Gradients, list[Gradients]]:
    """Gradients of the shared parameters and of each task's own, for the losses weighted by ``weights`` [T].

    Args:
        losses: T scalars with their graph.
        partition: who owns what.
        weights: [T] on the host.
        plain_heads: give own parameters the plain gradient of their loss; the heads are then walked twice.
        retain_graph: keep the graph.
    """
    shared = [tensor for tensor, mask in zip(partition.shared, partition.reached, strict=True) if mask]
    mine = list(dict.fromkeys(tensor for tensors in partition.own for tensor in tensors))
    if plain_heads:
        own = gradients_of(losses, mine, None, retain_graph=True)
        found = gradients_of(losses, shared, seeds_of(losses, weights), retain_graph=retain_graph)
    else:
        both = gradients_of(losses, [*shared, *mine], seeds_of(losses, weights), retain_graph=retain_graph)
        found, own = both[: len(shared)], both[len(shared) :]
    by_tensor = dict(zip(mine, own, strict=True))
    owners: list[Gradients] = []
    for tensors in partition.own:
        # A parameter named as own that several losses reach has the sum already: it is handed over once.
        owners.append([(tensor, g) for tensor in tensors if (g := by_tensor.pop(tensor, None)) is not None])
    return present(shared, found), owners
