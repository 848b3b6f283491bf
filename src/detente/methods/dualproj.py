"""DualProj: project the mean gradient so that it conflicts with no task."""

from __future__ import annotations

import numpy as np
import torch

from detente.geometry.dual_cone import dual_cone_projection
from detente.methods.base import Declaration, Method, Preference
from detente.methods.registry import register
from detente.values import Combination, TaskGradients


@register
class DualProj(Method):
    """DualProj: the vector nearest to the mean gradient that conflicts with no task.

    d = argmin ‖d − Σ p_i g_i‖ subject to ⟨g_i, d⟩ ≥ 0 for all i, the projection onto the dual cone of the gradients
    (Quinton & Rey 2024, section 4; Lopez-Paz & Ranzato 2017 for continual learning). A non-negative least-squares
    problem on the Gramian, solved exactly in coordinates in which norms do not count; weights are never below p.

    The direction vanishes when 0 is a strictly positive combination of the gradients. One public code adds 1e-4 to the
    diagonal, which drops a task a thousand times shorter than the others, and switches the projection off for gradients
    shorter than 0.01; nothing is added here.

    Gradients of which a positive combination is shorter than rounding can tell (about 6e-8 √T of its terms) count as
    cancelling: what is left is orthogonal to them, and the residual says by how much they are hurt.

    Cost: one non-negative least-squares problem in T unknowns.

    When to use it: the mean loss matters, and no task may get worse to first order.

    Args:
        preference: p, at least 0, by name or by position; used as given. None: 1/T each.

    Raises:
        ValueError: the preference is negative or all zero.

    Example:
        >>> import detente
        >>> detente.combine("dualproj", torch.tensor([[1.0, 0.0], [-1.0, 1.0]])).direction
        tensor([0.0000, 0.5000])
    """

    declares = Declaration(
        name="dualproj",
        source="Quinton & Rey 2024, section 4",
        needs=frozenset({"gramian"}),
        native_scale="mean",
        homogeneity=1,
        nonconflict=True,
        stationary="cone",
        permutation="exact",
    )

    def __init__(self, *, preference: Preference = None) -> None:
        super().__init__(preference=preference)

    def solve(self, gradients: TaskGradients) -> Combination:
        """The weights of the projection."""
        assert gradients.gramian is not None
        given = self.preference(gradients.names)
        if given is None:
            given = np.full(gradients.tasks, 1 / gradients.tasks)
        projection = dual_cone_projection(gradients.gramian, given)
        return Combination(
            weights=torch.from_numpy(projection.weights),
            status="stationary" if projection.vanishes else "ok",
            residual=projection.residual,
        )
