"""PCGrad: projecting conflicting gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from detente.geometry.surgery import Order, ascending, project_conflicts, shuffled
from detente.methods.base import Declaration, Method
from detente.methods.options import one_of
from detente.methods.registry import register
from detente.values import Combination, TaskGradients


@register
class PCGrad(Method):
    """PCGrad: take from each task's gradient what points against another task's gradient, then add them up.

    The gradient of task i meets the gradients of the other tasks one after the other, in an order drawn anew for every
    task and step. Where their inner product is negative, the component along g_j is taken away:
    g_i ← g_i - (⟨g_i, g_j⟩ / ‖g_j‖²) g_j, with the running g_i and the given g_j (Yu et al. 2020, Algorithm 1). The
    direction is the sum of the altered gradients. For two tasks it conflicts with neither; for more it may, because a
    later projection can undo an earlier one.

    The altered gradients are combinations of the given ones, so all is computed from the Gramian. Public codes add
    1e-8 or 1e-5 to ‖g_j‖², which switches the projection off for small gradients, and one draws a single order for all
    tasks; here nothing is added and every task has an order of its own. Some codes return the mean: ``reduce="mean"``.

    When to use it: gradients that often point against each other, and no wish to weigh tasks. Cost: the task
    gradients and T - 1 operations on T x T numbers.

    Args:
        reduce: ``sum`` of the altered gradients, or their ``mean``.
        order: ``random``, or ``fixed``: each task takes the others in the order in which the losses are given.
        seed: of the method's own generator, for ``order="random"``; saved and restored with its state.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import detente
        >>> detente.combine("pcgrad", torch.tensor([[1.0, 0.0], [-1.0, 1.0]])).transform
        tensor([[1.0000, 0.5000],
                [1.0000, 1.0000]], dtype=torch.float64)
    """

    declares = Declaration(
        name="pcgrad",
        source="Yu et al. 2020 (gradient surgery), Algorithm 1",
        needs=frozenset({"gramian"}),
        stateful=True,
        native_scale="sum",
        homogeneity=1,
        permutation="distribution",
        search={"reduce": ("sum", "mean")},
    )

    def __init__(
        self,
        *,
        reduce: Literal["sum", "mean"] = "sum",
        order: Literal["random", "fixed"] = "random",
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        self.reduce = one_of("reduce", reduce, ("sum", "mean"))
        self.order = one_of("order", order, ("random", "fixed"))
        if order == "fixed":
            self.declares = replace(self.declares, stateful=False, permutation=None)
        if reduce == "mean":
            self.declares = replace(self.declares, native_scale="mean")

    def solve(self, gradients: TaskGradients) -> Combination:
        """The projections, as a transform of the task gradients."""
        assert gradients.gramian is not None
        order = visiting_order(self.order, gradients.tasks, self.generator)
        return self._combination(project_conflicts(gradients.gramian, order))

    def solve_blocks(self, blocks: Sequence[TaskGradients]) -> list[Combination]:
        """All blocks at once, with the same order in each."""
        order = visiting_order(self.order, blocks[0].tasks, self.generator)
        gramians = np.stack([block.gramian for block in blocks if block.gramian is not None])
        return [self._combination(transform) for transform in project_conflicts(gramians, order)]

    def _combination(self, transform: np.ndarray) -> Combination:
        weights = transform.sum(axis=0) if self.reduce == "sum" else transform.mean(axis=0)
        return Combination(
            weights=torch.from_numpy(weights),
            transform=torch.from_numpy(transform),
            status="ok" if transform.any() else "stationary",
        )


def visiting_order(order: str, tasks: int, generator: torch.Generator | None) -> Order:
    """[T, T-1] in which order each task meets the others: ``fixed``, or ``random`` from the generator.

    Example:
        >>> visiting_order("fixed", 3, None).tolist()
        [[1, 2], [0, 2], [0, 1]]
    """
    if order == "fixed" or tasks <= 2:  # there is one order only
        return ascending(tasks)
    return shuffled(torch.rand(tasks, tasks, dtype=torch.float64, generator=generator).numpy())
