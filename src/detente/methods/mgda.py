"""The multiple-gradient descent algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from detente.geometry.simplex import frank_wolfe, minimum_norm_point, simplex_residual
from detente.methods.base import Declaration, Method
from detente.methods.options import one_of
from detente.methods.registry import register
from detente.values import Combination, TaskGradients

# The squared norm of a combination is known from a float64 Gramian to about T machine epsilons of the squared sum
# of its terms' norms; below this it cannot be told from zero.
STATIONARY = 16 * np.finfo(np.float64).eps


@register
class MGDA(Method):
    """Multiple-gradient descent: the shortest vector in the convex hull of the task gradients.

    The weights solve min ‖Σ α_t g_t‖² over the simplex. Either the solution is zero and the point is Pareto
    stationary, or it is a direction along which no task's loss increases (Désidéri 2012; Sener & Koltun 2018,
    equation 3). On ``features=`` the same problem on the gradients of the representation is the upper bound MGDA-UB
    (section 3.3): one backward through the encoder whatever the number of tasks.

    Published codes differ: they stop a Frank-Wolfe iteration at a change of 1e-5 or after 250 iterations, and clamp
    its step so that a vertex is never reached. Here ``exact`` is an active-set solution to machine precision;
    ``frank-wolfe`` is the iteration as the paper describes it.

    The direction counts as zero when ‖Σ α_t g_t‖² is below 16 T machine epsilons (float64) of (Σ α_t ‖g_t‖)², a
    relative length of about 6e-8 √T.

    When to use it: no task may get worse, and a short step is welcome where tasks conflict; the smallest gradient
    decides its length. Cost: the task gradients and a small problem in T numbers.

    Args:
        solver: ``exact`` or ``frank-wolfe`` (Algorithm 2 of Sener & Koltun 2018).
        normalize: gradients the problem is solved on: ``none``; ``l2``: g / ‖g‖; ``loss``: g / L; ``loss+``:
            g / (L ‖g‖). The weights are then applied to the gradients as they are. A task whose gradient
            vanishes makes the point stationary in every form.

    Raises:
        ValueError: a loss is not positive while ``normalize`` divides by it.

    Example:
        >>> import detente
        >>> detente.combine("mgda", torch.tensor([[1.0, 0.0], [0.0, 2.0]])).weights
        tensor([0.8000, 0.2000], dtype=torch.float64)
    """

    declares = Declaration(
        name="mgda",
        source="Désidéri 2012; Sener & Koltun 2018, equation 3, Algorithm 2, section 3.3 (upper bound)",
        needs=frozenset({"gramian"}),
        native_scale="simplex",
        homogeneity=1,
        nonconflict=True,
        stationary="hull",
        simplex=True,
        permutation="exact",
        search={"normalize": ("none", "l2", "loss", "loss+")},
    )

    def __init__(
        self,
        *,
        solver: Literal["exact", "frank-wolfe"] = "exact",
        normalize: Literal["none", "l2", "loss", "loss+"] = "none",
    ) -> None:
        super().__init__()
        self.solver = one_of("solver", solver, ("exact", "frank-wolfe"))
        self.normalize = one_of("normalize", normalize, ("none", "l2", "loss", "loss+"))

    def solve(self, gradients: TaskGradients) -> Combination:
        """The minimum-norm weights."""
        gramian = gradients.gramian
        assert gramian is not None
        problem = gramian
        if self.normalize != "none":
            divisor = self._divisor(gradients)
            problem = gramian / divisor[:, None] / divisor
        exact = self.solver == "exact"
        weights = minimum_norm_point(problem) if exact else frank_wolfe(problem)
        closed_form = exact and len(weights) <= 2
        residual = None if closed_form else float(simplex_residual(problem, weights))
        return self._combination(gramian, weights, residual)

    def solve_blocks(self, blocks: Sequence[TaskGradients]) -> list[Combination]:
        """All blocks in one batch, where the solver takes one."""
        if self.solver != "exact" or self.normalize != "none":
            return super().solve_blocks(blocks)
        gramians = np.stack([block.gramian for block in blocks if block.gramian is not None])
        weights = minimum_norm_point(gramians)
        closed_form = weights.shape[-1] <= 2
        residuals = (
            [None] * len(weights) if closed_form else np.asarray(simplex_residual(gramians, weights)).tolist()
        )
        return list(map(self._combination, gramians, weights, residuals))

    def _combination(self, gramian: np.ndarray, weights: np.ndarray, residual: float | None) -> Combination:
        norms = np.sqrt(np.diagonal(gramian))
        terms = weights * norms
        squared = float(weights @ gramian @ weights)
        stationary = squared <= STATIONARY * len(weights) * float(terms.sum()) ** 2
        return Combination(
            weights=torch.from_numpy(weights), status="stationary" if stationary else "ok", residual=residual
        )

    def _divisor(self, gradients: TaskGradients) -> np.ndarray:
        """[T] positive numbers that divide the gradients of the problem."""
        divisor = np.ones(gradients.tasks)
        if self.normalize in ("l2", "loss+"):
            assert gradients.gramian is not None
            norms = np.sqrt(np.diagonal(gradients.gramian))
            divisor = divisor * np.where(norms > 0, norms, 1.0)  # a vanishing gradient stays zero
        if self.normalize in ("loss", "loss+"):
            if gradients.losses is None:
                raise ValueError(f"mgda(normalize={self.normalize!r}) divides by the losses: pass losses=.")
            for name, loss in zip(gradients.names, gradients.losses, strict=True):
                if not loss > 0:
                    raise ValueError(
                        f"mgda(normalize={self.normalize!r}) divides by the loss of task {name!r}, which is {loss}; "
                        "it needs positive losses. Use normalize='l2' or 'none'."
                    )
            divisor = divisor * gradients.losses
        return divisor
