"""The geometric loss strategy."""

from __future__ import annotations

import numpy as np
import torch

from detente.methods.base import Declaration, Method
from detente.methods.checks import positive_losses
from detente.methods.registry import register
from detente.values import Combination, TaskGradients


@register
class GLS(Method):
    """Geometric loss strategy: minimise the geometric mean of the losses instead of their sum.

    The objective (Π L_t)^(1/T) has the gradient Σ w_t g_t with w_t = (Π L_j)^(1/T) / (T L_t): every task counts by
    its relative progress, so the unit in which a loss is measured does not matter for the direction (Chennupati et
    al. 2019, MultiNet++). The weights are computed from logarithms: a product of many losses under- or overflows.

    Public codes multiply the losses or take T-th roots first; they agree wherever their numbers stay finite.

    When to use it: few tasks with positive losses of very different size, and nothing to tune. A loss close to zero
    takes all the weight. Cost: nothing beyond the step itself, no task gradients are taken.

    Raises:
        ValueError: a loss is not positive; the task is named.

    Example:
        >>> import detente
        >>> detente.combine("gls", torch.eye(2), losses=[1.0, 4.0]).weights
        tensor([1.0000, 0.2500], dtype=torch.float64)
    """

    declares = Declaration(
        name="gls",
        source="Chennupati et al. 2019 (MultiNet++), geometric loss strategy",
        needs=frozenset({"losses"}),
        native_scale="own",
        homogeneity=1,
        permutation="exact",
    )

    def __init__(self) -> None:
        super().__init__()

    def solve(self, gradients: TaskGradients) -> Combination:
        """The gradient of the geometric mean with respect to each loss."""
        logs = np.log(positive_losses(self, gradients))
        return Combination(weights=torch.from_numpy(np.exp(logs.mean() - logs) / gradients.tasks))
