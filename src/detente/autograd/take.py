"""From what a caller names to the one pass over the graph that fits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from detente.autograd.exact import Pass, check_layer, exact_pass, layer_pass
from detente.autograd.partition import Memory, Partition, as_tensors, partition
from detente.autograd.representation import Roles, assign_roles, features_pass


@dataclass(frozen=True)
class Where:
    """Where the problem is solved and who owns what, as flat tuples of tensors; None where it was left open.

    Attributes:
        features: the representation.
        shared, task_specific: parameters by their role.
        solve_on: shared parameters to solve on.
    """

    features: tuple[torch.Tensor, ...] | None
    shared: tuple[torch.Tensor, ...] | None
    task_specific: tuple[torch.Tensor, ...] | None
    solve_on: tuple[torch.Tensor, ...] | None

    @classmethod
    def given(cls, features: Any, shared: Any, task_specific: Any, solve_on: Any) -> Where:
        """Read every iterable exactly once: some are generators.

        Raises:
            ValueError: features and solve_on are both given, or one of them is empty.
            TypeError: an entry is neither a tensor nor a module; the option is named.
        """
        if features is not None and solve_on is not None:
            raise ValueError("give features= or solve_on=, not both: each names where the problem is solved.")
        options = {
            "features": features,
            "shared": shared,
            "task_specific": task_specific,
            "solve_on": solve_on,
        }
        found = {name: None if value is None else as_tensors(value, name) for name, value in options.items()}
        for name in ("features", "solve_on"):
            if found[name] == ():
                raise ValueError(f"{name}= is empty; name at least one tensor, or leave it out.")
        return cls(**found)

    def roles(self, names: Sequence[str], losses: Sequence[torch.Tensor], memory: Memory) -> Roles:
        """Which leaves play which part when the problem is solved on the features.

        Raises:
            ValueError: as :func:`~detente.autograd.representation.assign_roles`.
        """
        assert self.features is not None
        return assign_roles(
            names, losses, self.features, memory, shared=self.shared, task_specific=self.task_specific
        )

    def partition(self, names: Sequence[str], losses: Sequence[torch.Tensor], memory: Memory) -> Partition:
        """Who owns what.

        Raises:
            ValueError: as :meth:`roles` and :func:`~detente.autograd.partition.partition`, or a parameter to solve on
                is not shared.
        """
        if self.features is not None:
            return self.roles(names, losses, memory).partition()
        parts = partition(losses, memory, shared=self.shared, task_specific=self.task_specific)
        if self.solve_on is not None and any(parts.reached):
            check_layer(self.solve_on, parts)
        return parts


def take(
    names: Sequence[str],
    losses: Sequence[torch.Tensor],
    where: Where,
    memory: Memory,
    *,
    retain_graph: bool,
    batched: bool,
    activations: bool,
) -> Pass | None:
    """The task gradients of one step, None if no loss reaches a shared parameter.

    Args:
        names: the T tasks.
        losses: T scalars with their graph.
        where: what the caller named.
        memory: of the method.
        retain_graph: keep the graph for another backward.
        batched: one vectorised backward, in the exact space.
        activations: copy the representation for methods that look at it.

    Raises:
        ValueError: as :meth:`Where.partition`.
    """
    if where.features is not None:
        roles = where.roles(names, losses, memory)
        return features_pass(
            losses, where.features, roles, memory, retain_graph=retain_graph, activations=activations
        )
    parts = where.partition(names, losses, memory)
    if not any(parts.reached):
        return None
    if where.solve_on is not None:
        return layer_pass(losses, parts, where.solve_on, memory, retain_graph=retain_graph)
    return exact_pass(losses, parts, memory, retain_graph=retain_graph, batched=batched)
