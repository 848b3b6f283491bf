"""FairGrad: α-fair allocation of the improvement."""

from __future__ import annotations

import torch

from detente.geometry.equations import fair_residual, fair_weights
from detente.methods.base import Declaration, Method
from detente.methods.options import number
from detente.methods.registry import register
from detente.values import Combination, TaskGradients


@register
class FairGrad(Method):
    """FairGrad: the direction whose improvements are α-fairly shared among the tasks.

    Among directions of a given length, d = Σ w_i g_i maximises Σ ⟨g_i, d⟩^(1−α) / (1−α) exactly when Gw = w^(−1/α),
    elementwise (Ban & Ji 2024, equation 7). α → 0 is the plain sum, α = 1 proportional fairness and the same as
    Nash-MTL, α = 2 least potential delay, α → ∞ the largest improvement of the task helped least (MGDA's direction).
    Scaling all gradients by s scales the direction by s^((1−α)/(1+α)).

    Solved by a damped Newton method on the strictly convex potential behind the equation, to machine precision; the
    official code runs a general least-squares solver from fixed weights. Where 0 lies in the convex hull of the
    gradients no direction helps every task and the equation has no solution: the step is refused, and the direction
    reported is zero.

    Cost: some 5 to 40 linear systems in T unknowns.

    When to use it: to choose between Nash-MTL's indifference to scale and more weight for the task helped least.

    Args:
        alpha: above 0, finite.

    Raises:
        ValueError: ``alpha`` is not positive.

    Example:
        >>> import detente
        >>> detente.combine("fairgrad", torch.tensor([[2.0, 0.0], [0.0, 0.5]])).direction
        tensor([1., 1.])
    """

    declares = Declaration(
        name="fairgrad",
        source="Ban & Ji 2024, equation 7",
        needs=frozenset({"gramian"}),
        native_scale="own",
        homogeneity=0,
        nonconflict=True,
        permutation="exact",
        search={"alpha": (0.5, 1.0, 2.0, 5.0)},
    )

    def __init__(self, *, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = number("alpha", alpha, above=0)

    def solve(self, gradients: TaskGradients) -> Combination:
        """The fair weights."""
        assert gradients.gramian is not None
        weights = fair_weights(gradients.gramian, self.alpha)
        if weights is None:
            note = "fairgrad: no direction helps every task: the equation has no solution"
            nothing = torch.zeros(gradients.tasks, dtype=torch.float64)
            return Combination(weights=nothing, status="refused", notes=(note,))
        residual = fair_residual(gradients.gramian, weights, self.alpha)
        return Combination(weights=torch.from_numpy(weights), residual=residual)
