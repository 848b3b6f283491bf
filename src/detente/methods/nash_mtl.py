"""Nash-MTL: the tasks bargain for the direction."""

from __future__ import annotations

import numpy as np
import torch

from detente.geometry.equations import fair_residual, fair_weights
from detente.methods.base import Declaration, Method
from detente.methods.options import number
from detente.methods.registry import register
from detente.values import Combination, TaskGradients

NO_SOLUTION = "no direction helps every task: the equation has no solution"


@register
class NashMTL(Method):
    """Nash-MTL: the Nash bargaining solution, the direction with the largest product of improvements.

    Among directions of a given length, d = Σ α_i g_i maximises Σ log ⟨g_i, d⟩ exactly when Gα = 1/α, elementwise
    (Navon et al. 2022, Claim 3.1, equation 2). The direction does not depend on the lengths of the gradients, so that
    no task dominates by its scale, and its own length is √T whatever theirs. It helps every task: ⟨g_i, d⟩ = 1/α_i.

    The equation is the stationarity of the strictly convex ½αᵀGα − Σ log α_i and is solved by a damped Newton method to
    machine precision. The official code runs up to 20 linearised convex programs through an external solver: it keeps
    weights of 1 without a word if the solver is missing, and misses the solution where norms differ by 1e3 or all are
    as small as 1e-8. It also re-computes the weights only every k steps, which is a wrapper here, and clips the length
    to 1, which for a solved equation means dividing by √T.

    Where 0 lies in the convex hull of the gradients (a Pareto-stationary point, a vanishing gradient) no direction
    helps every task and the equation has no solution: the step is refused, and the direction reported is zero.

    Cost: some 5 to 30 linear systems in T unknowns.

    When to use it: tasks of very different scale, none of which may be given up; choose a learning rate for steps of
    constant length.

    Args:
        max_norm: above 0; the shared direction is shortened to this length if it is longer. None leaves it at √T,
            the official code uses 1.

    Raises:
        ValueError: ``max_norm`` is not positive.

    Example:
        >>> import detente
        >>> detente.combine("nash-mtl", torch.tensor([[2.0, 0.0], [0.0, 0.5]])).direction
        tensor([1., 1.])
    """

    declares = Declaration(
        name="nash-mtl",
        source="Navon et al. 2022, equation 2",
        needs=frozenset({"gramian"}),
        native_scale="own",
        homogeneity=0,
        nonconflict=True,
        permutation="exact",
        search={"max_norm": (None, 1.0)},
    )

    def __init__(self, *, max_norm: float | None = None) -> None:
        super().__init__()
        self.max_norm = None if max_norm is None else number("max_norm", max_norm, above=0)

    def solve(self, gradients: TaskGradients) -> Combination:
        """The bargaining weights."""
        assert gradients.gramian is not None
        weights = fair_weights(gradients.gramian)
        if weights is None:
            nothing = torch.zeros(gradients.tasks, dtype=torch.float64)
            return Combination(weights=nothing, status="refused", notes=(f"nash-mtl: {NO_SOLUTION}",))
        residual = fair_residual(gradients.gramian, weights)
        if self.max_norm is not None:
            # The square of the norm is T where the equation holds; the Gramian is asked all the same.
            scaled = weights[:, None] * gradients.gramian * weights
            weights = weights * min(1.0, self.max_norm / float(np.sqrt(scaled.sum())))
        return Combination(weights=torch.from_numpy(weights), residual=residual)
