"""ConFIG: conflict-free inverse gradients."""

from __future__ import annotations

import torch

from detente.geometry.equations import unit_direction
from detente.methods.base import Declaration, Method
from detente.methods.registry import register
from detente.values import Combination, TaskGradients


@register
class ConFIG(Method):
    """ConFIG: the direction equally inclined to all gradients, as long as their projections on it add up to.

    u = U⁺1 / ‖U⁺1‖ with U the unit gradients in rows and U⁺ its pseudo-inverse; d = (Σ ⟨g_i, u⟩) u (Liu et al. 2024,
    equation 5). For linearly independent gradients it has the same positive cosine with every one of them; for
    dependent ones the pseudo-inverse settles for the least squares of that, and the direction may conflict.

    The pseudo-inverse is taken on the Gramian, C⁺1 with C the matrix of cosines, eigenvalues below 32 T float64
    epsilons of the largest left out. A zero gradient takes part in nothing. A solution below the rounding level gives
    zero, as for two opposite gradients, where codes normalise what rounding left.

    Cost: one T × T eigenvalue problem and one linear system.

    When to use it: tasks whose gradients are independent and equally important, where a step should help all alike (the
    paper: physics-informed networks).

    Example:
        >>> import detente
        >>> detente.combine("config", torch.tensor([[1.0, 0.0], [0.0, 4.0]])).direction
        tensor([2.5000, 2.5000])
    """

    declares = Declaration(
        name="config",
        source="Liu et al. 2024 (ConFIG), equation 5",
        needs=frozenset({"gramian"}),
        native_scale="sum",
        homogeneity=1,
        permutation="exact",
    )

    def solve(self, gradients: TaskGradients) -> Combination:
        """The weights of the conflict-free direction."""
        assert gradients.gramian is not None
        direction = unit_direction(gradients.gramian)
        return Combination(
            weights=torch.from_numpy(direction.weights),
            status="stationary" if direction.vanishes else "ok",
            residual=direction.residual,
        )
