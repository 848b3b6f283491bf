"""IMTL-G: equal projections on all unit gradients."""

from __future__ import annotations

import torch

from detente.geometry.imtl import equal_projections
from detente.methods.base import Declaration, Method
from detente.methods.registry import register
from detente.values import Combination, Status, TaskGradients

STATUS: dict[str, Status] = {"found": "ok", "zero": "stationary", "none": "refused"}


@register
class IMTLG(Method):
    """IMTL-G: the direction with equal projections on all gradients, with weights that sum to one.

    With u_i = g_i / ‖g_i‖ and d = Σ w_i g_i, the weights satisfy ⟨d, u_1⟩ = … = ⟨d, u_T⟩ and Σ w_i = 1: w_i ∝
    (C⁻¹1)_i / ‖g_i‖ with C the matrix of cosines (Liu et al. 2021, equation 4). Weights may be negative, and the common
    projection too: the method is not a descent method for every task.

    Singular cases. Where 0 lies in the affine hull of the gradients the zero vector has equal projections, and it is
    the answer: opposite gradients, more than P + 1 tasks in P dimensions, and also parallel gradients of unequal
    length. (Codes with a pseudo-inverse return a vector that is not zero, and weights of 1000 and more when there are
    more tasks than parameters.) Equal gradients share their weight; norms that agree to a part in a million count as
    equal for this. Where no weights meet the equations the step is refused, and what is reported only points where the
    projections are equal.

    Cost: one T × T eigenvalue problem and one linear system.

    When to use it: a closed form without options, when no task may be favoured and gradients do not oppose each other.

    Example:
        >>> import detente
        >>> detente.combine("imtl-g", torch.tensor([[1.0, 0.0], [0.0, 4.0]])).direction
        tensor([0.8000, 0.8000])
    """

    declares = Declaration(
        name="imtl-g",
        source="Liu et al. 2021 (IMTL), equation 4",
        needs=frozenset({"gramian"}),
        native_scale="simplex",
        homogeneity=1,
        stationary="affine",
        permutation="exact",
    )

    def solve(self, gradients: TaskGradients) -> Combination:
        """The weights of equal projections."""
        assert gradients.gramian is not None
        found = equal_projections(gradients.gramian)
        return Combination(
            weights=torch.from_numpy(found.weights),
            status=STATUS[found.kind],
            notes=("imtl-g: no weights that sum to one give equal projections",)
            if found.kind == "none"
            else (),
            residual=found.residual,
        )
