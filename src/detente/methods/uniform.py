"""Uniform weights: the sum of the losses."""

from __future__ import annotations

from typing import Literal

import torch

from detente.methods.base import Declaration, Method
from detente.methods.options import one_of
from detente.methods.registry import register
from detente.values import Combination, TaskGradients


@register
class Uniform(Method):
    """Uniform weights: descend along the sum (or the mean) of the task losses.

    The direction is Σ g_t, or Σ g_t / T: the baseline every method is compared with, and what
    ``sum(losses).backward()`` does.

    When to use it: first, to have something to compare with. Cost: none beyond the plain backward.

    Args:
        reduce: ``sum`` gives every loss weight 1, ``mean`` weight 1/T for the T tasks present (the objective
            1/T Σ L of Sener & Koltun 2018, section 4, baseline i).

    Example:
        >>> import detente
        >>> detente.combine(detente.create("uniform", reduce="mean"), torch.eye(2)).direction
        tensor([0.5000, 0.5000])
    """

    declares = Declaration(
        name="uniform",
        source="linear scalarisation; baseline (i) of Sener & Koltun 2018, section 4",
        native_scale="sum",
        homogeneity=1,
        permutation="exact",
    )

    def __init__(self, *, reduce: Literal["sum", "mean"] = "sum") -> None:
        super().__init__()
        self.reduce = one_of("reduce", reduce, ("sum", "mean"))

    def solve(self, gradients: TaskGradients) -> Combination:
        """Equal weights."""
        weight = 1.0 if self.reduce == "sum" else 1.0 / gradients.tasks
        return Combination(weights=torch.full((gradients.tasks,), weight, dtype=torch.float64))
