"""Fixed weights of the losses."""

from __future__ import annotations

import numpy as np
import torch

from detente.methods.base import Declaration, Method, Preference
from detente.methods.registry import register
from detente.values import Combination, TaskGradients


@register
class Static(Method):
    """Fixed weights: descend along a weighted sum of the task losses.

    The tuned member of this family is the opponent every balancing method has to beat: each point of a simplex
    grid of weights is one candidate of the papers' grid search (Sener & Koltun 2018, section 4, baseline iii). The
    direction is Σ w_t g_t.

    When to use it: always before anything else, with the weights tuned on validation data. Cost: none beyond the plain
    backward; one training run for each candidate.

    Args:
        weights: one number >= 0 per task, by name or by position; None is 1 for every task. A task absent from a
            step drops out of the sum, the others keep their weights.

    Example:
        >>> import detente
        >>> detente.combine(detente.create("static", weights=[1, 3]), torch.eye(2)).direction
        tensor([1., 3.])
    """

    declares = Declaration(
        name="static",
        source="linear scalarisation; baseline (iii) of Sener & Koltun 2018, section 4",
        native_scale="own",
        homogeneity=1,
        permutation="exact",
    )

    _preference_option = "weights"

    def __init__(self, *, weights: Preference = None) -> None:
        super().__init__(preference=weights)

    def solve(self, gradients: TaskGradients) -> Combination:
        """The weights of the tasks present."""
        weights = self.preference(gradients.names, rescale=False)
        return Combination(weights=torch.from_numpy(np.ones(gradients.tasks) if weights is None else weights))
