"""CAGrad: stay near the mean gradient and help the task helped least."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from detente.geometry.dual_cone import conflict_averse
from detente.methods.base import Declaration, Method
from detente.methods.options import number, one_of
from detente.methods.registry import register
from detente.values import Combination, TaskGradients


@register
class CAGrad(Method):
    """CAGrad: within a ball around the mean gradient, the direction that helps the task helped least the most.

    max_d min_i ⟨g_i, d⟩ subject to ‖d − g₀‖ ≤ c‖g₀‖, g₀ the mean gradient (Liu et al. 2021, equation 3). The dual is
    min over the simplex of ⟨g_w, g₀⟩ + c‖g₀‖‖g_w‖, and d = g₀ + (c‖g₀‖ / ‖g_w‖) g_w (Algorithm 1). c = 0 is the mean
    gradient; for c < 1 the method converges to a minimum of the mean loss. The paper takes 0.4 for scenes, 0.5
    elsewhere, 0.9 for ten robot tasks.

    Solved exactly: ball and half-spaces are one equation in one unknown, and the optimum is certified by the signs of
    its multipliers (duality gap at rounding level). Public codes run a general solver in the weights and are off by
    1e-4 to 2e-3 on ordinary matrices, by all of it on dominated ones; one returns exactly zero for short gradients.
    They also differ in length: factor 1 (the paper), 1/(1+c²), 1/(1+c), times T.

    Where 0 lies in the convex hull of the gradients and the ball reaches a direction that hurts no task, g_w vanishes
    and the formula divides 0 by 0; the optimal direction nearest to g₀ is taken, which is DualProj's.

    Cost: some 3 to 15 linear systems in T unknowns.

    When to use it: as a safe change from the mean loss, with one dial for how far to leave it.

    Args:
        c: radius of the ball relative to ‖g₀‖, at least 0.
        rescale: 0 leaves the length, 1 divides by 1 + c² (the official code), 2 by 1 + c.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import detente
        >>> detente.combine("cagrad", torch.tensor([[1.0, 0.0], [0.0, 1.0]])).direction
        tensor([0.7500, 0.7500])
    """

    declares = Declaration(
        name="cagrad",
        source="Liu et al. 2021 (CAGrad), equation 3, Algorithm 1",
        needs=frozenset({"gramian"}),
        native_scale="own",
        homogeneity=1,
        permutation="exact",
        search={"c": (0.1, 0.2, 0.4, 0.5, 0.6, 0.8, 0.9)},
    )

    def __init__(self, *, c: float = 0.5, rescale: Literal[0, 1, 2] = 0) -> None:
        super().__init__()
        self.c = number("c", c, least=0)
        self.rescale = one_of("rescale", rescale, (0, 1, 2))

    def solve(self, gradients: TaskGradients) -> Combination:
        """The weights of the conflict-averse direction."""
        assert gradients.gramian is not None
        nearest = conflict_averse(gradients.gramian, np.full(gradients.tasks, 1 / gradients.tasks), self.c)
        weights = nearest.weights / (1.0, 1.0 + self.c**2, 1.0 + self.c)[self.rescale]
        return Combination(
            weights=torch.from_numpy(weights),
            status="stationary" if nearest.vanishes else "ok",
            residual=nearest.residual,
        )
