"""What a caller names, as flat tuples of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from detente.autograd.exact import check_layer
from detente.autograd.partition import Memory, Partition, as_tensors, partition
from detente.autograd.representation import Roles, assign_roles


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

    def plan(
        self, names: Sequence[str], losses: Sequence[torch.Tensor], memory: Memory, *, part: bool = False
    ) -> Partition | Roles:
        """Who owns what; roles where the problem is solved on the features.

        Args:
            names, losses: of the T tasks.
            memory: of the method.
            part: these are one process's losses of several.

        Raises:
            ValueError: as :func:`~detente.autograd.representation.assign_roles` and
                :func:`~detente.autograd.partition.partition`, a parameter to solve on is not shared, or a method that
                was loaded lacks a task where shared parameters are discovered.
        """
        if self.shared is None and self.task_specific is None:
            memory.check_awaited(names, losses)
        if self.features is not None:
            return assign_roles(
                names,
                losses,
                self.features,
                memory,
                shared=self.shared,
                task_specific=self.task_specific,
            )
        parts = partition(losses, memory, shared=self.shared, task_specific=self.task_specific, part=part)
        if self.solve_on is not None and any(parts.reached):
            check_layer(self.solve_on, parts)
        return parts
