"""EDM: the shortest vector in the hull of the unit gradients."""

from __future__ import annotations

import numpy as np
import torch

from detente.geometry.gramian import unit_rows
from detente.geometry.simplex import minimum_norm_point, simplex_residual
from detente.methods.base import Declaration, Method
from detente.methods.registry import register
from detente.values import Combination, TaskGradients

# As for `mgda`: a squared length below this times T and the terms summed for it cannot be told from zero.
STATIONARY = 16 * np.finfo(np.float64).eps


@register
class EDM(Method):
    """EDM: the direction equally inclined to every gradient it needs, a bisector of the unit gradients.

    The weights α* of the shortest vector in the convex hull of the unit gradients g_i / ‖g_i‖ are carried over to the
    gradients as they are: λ_i = (α*_i / ‖g_i‖) / Σ_j (α*_j / ‖g_j‖), d = Σ λ_i g_i (Katrutsa et al. 2020). Long
    gradients do not count for more in the choice of the direction; for two tasks it is the bisector of their angle.

    The direction vanishes exactly where MGDA's does, when 0 lies in the convex hull of the gradients, a vanishing
    gradient included; it counts as zero below a relative length of about 6e-8 √T. Cost: one quadratic program in T
    unknowns, solved exactly.

    When to use it: tasks whose gradients differ in length by orders of magnitude for reasons of units alone.

    Example:
        >>> import detente
        >>> detente.combine("edm", torch.tensor([[1.0, 0.0], [0.0, 4.0]])).weights
        tensor([0.8000, 0.2000], dtype=torch.float64)
    """

    declares = Declaration(
        name="edm",
        source="Katrutsa et al. 2020, equidirectional multi-gradient descent",
        needs=frozenset({"gramian"}),
        native_scale="simplex",
        homogeneity=1,
        nonconflict=True,
        stationary="hull",
        simplex=True,
        permutation="exact",
    )

    def solve(self, gradients: TaskGradients) -> Combination:
        """The minimum-norm weights of the unit gradients, divided by the norms."""
        assert gradients.gramian is not None
        norms, cosines = unit_rows(gradients.gramian)
        shares = minimum_norm_point(cosines)
        if norms.min() == 0:
            return Combination(weights=torch.from_numpy(shares), status="stationary")
        squared = float(shares @ cosines @ shares)
        residual = None if gradients.tasks <= 2 else float(simplex_residual(cosines, shares))
        weights = shares * (norms.min() / norms)
        weights /= weights.sum()
        stationary = squared <= STATIONARY * gradients.tasks
        return Combination(
            weights=torch.from_numpy(weights), status="stationary" if stationary else "ok", residual=residual
        )
