"""Random loss weighting."""

from __future__ import annotations

from typing import Literal

import torch

from detente.methods.base import Declaration, Method
from detente.methods.options import one_of
from detente.methods.registry import register
from detente.values import Combination, TaskGradients


@register
class RLW(Method):
    """Random loss weighting: draw new positive weights that sum to one at every step.

    On average every task counts alike, as with uniform weights, and the noise of the weights acts like that of
    smaller batches. ``normal``: w = softmax(x) with independent standard normal x_t; ``dirichlet``: uniform on the
    simplex, w_t = x_t / Σ x_j with independent standard exponential x_t, Dirichlet(1, …, 1) (Lin et al. 2022,
    Algorithm 2).

    The weights sum to one, as in the paper and its public codes: beside ``uniform``, whose weights sum to T, the step
    is T times shorter. ``scale="sum"`` evens that out.

    When to use it: as a test whether a weighting learns anything; one that does not beat random weights does not.
    Cost: nothing beyond the step itself, no task gradients are taken.

    Args:
        distribution: ``normal`` (softmax of normal numbers) or ``dirichlet``.
        seed: of the method's own generator; saved and restored with its state.

    Raises:
        ValueError: ``distribution`` is neither.

    Example:
        >>> import detente
        >>> method = detente.create("rlw", distribution="dirichlet", seed=1)
        >>> weights = detente.combine(method, torch.eye(3)).weights
        >>> round(float(weights.sum()), 12), bool((weights > 0).all())
        (1.0, True)
    """

    declares = Declaration(
        name="rlw",
        source="Lin et al. 2022, Algorithm 2",
        stateful=True,
        native_scale="simplex",
        homogeneity=1,
        simplex=True,
        permutation="distribution",
        search={"distribution": ("normal", "dirichlet")},
    )

    def __init__(self, *, distribution: Literal["normal", "dirichlet"] = "normal", seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.distribution = one_of("distribution", distribution, ("normal", "dirichlet"))

    def solve(self, gradients: TaskGradients) -> Combination:
        """Weights drawn for the tasks present."""
        drawn = torch.empty(gradients.tasks, dtype=torch.float64)
        if self.distribution == "normal":
            return Combination(weights=torch.softmax(drawn.normal_(generator=self.generator), dim=0))
        drawn.exponential_(generator=self.generator)
        return Combination(weights=drawn / drawn.sum())
