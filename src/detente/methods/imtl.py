"""Impartial multi-task learning: both halves together."""

from __future__ import annotations

import torch

from detente.geometry.adam import adam_step, mean_gradient
from detente.geometry.imtl import equal_projections
from detente.methods.base import Declaration, Method
from detente.methods.checks import check_growth, learned_scales
from detente.methods.options import number
from detente.methods.registry import register
from detente.values import Combination, Status, TaskGradients

STATUS: dict[str, Status] = {"found": "ok", "zero": "stationary", "none": "refused"}


@register
class IMTL(Method):
    """IMTL: learn a scale per task (IMTL-L) and give the scaled gradients equal projections (IMTL-G).

    Each loss has a learned scale e^(s_t) as in ``imtl-l``: s descends along Σ e^(s_t) L_t - s_t. The direction is
    d = Σ α_t e^(s_t) g_t with Σ α_t = 1 and the same inner product with every unit gradient (Liu et al. 2021,
    sections 3.1 and 3.2, Algorithm 1); the weights are α_t e^(s_t). Scaling does not turn the gradients: the direction
    is that of ``imtl-g`` up to its sign, and the scales set its length.

    α may be negative. Where the affine hull of the scaled gradients holds 0, the direction is zero and the status
    ``stationary``; where no vector of it has equal projections, the step is refused. The scales learn in both cases.

    Paper and codes give the heads the gradients of the scaled losses, e^(s_t) times their own; here they take their
    own plain gradients unless ``heads="weighted"`` asks for α_t e^(s_t) times them. s starts at 0. A loss that
    stays below zero has no best s and is refused early, as in ``imtl-l``.

    When to use it: losses of different units and gradients of different length, with no loss to be preferred.
    Cost: the task gradients (one backward per task), and an eigendecomposition of their cosines.

    Args:
        lr: step length of Adam on s, > 0. Ours: the paper learns s with the network's optimizer.

    Raises:
        ValueError: ``lr`` is out of range; in a step: a loss stays below zero and its scale grows without end.

    Example:
        >>> import detente
        >>> detente.combine("imtl", torch.tensor([[1.0, 0.0], [0.0, 3.0]]), losses=[1.0, 2.0]).direction
        tensor([0.7500, 0.7500])
    """

    declares = Declaration(
        name="imtl",
        source="Liu et al. 2021 (IMTL), sections 3.1 and 3.2, Algorithm 1",
        needs=frozenset({"losses", "gramian"}),
        stateful=True,
        native_scale="own",
        homogeneity=1,
        permutation="exact",
        search={"lr": (0.001, 0.005, 0.025, 0.1)},
    )

    log_scale: torch.Tensor
    moments: torch.Tensor

    def __init__(self, *, lr: float = 0.025) -> None:
        super().__init__()
        self.lr = number("lr", lr, above=0)

    def allocate(self, tasks: int) -> None:
        """One logarithm of a scale per task."""
        self.register_buffer("log_scale", torch.zeros(tasks, dtype=torch.float64))
        self.register_buffer("moments", torch.zeros(tasks, 3, dtype=torch.float64))

    def solve(self, gradients: TaskGradients) -> Combination:
        """Equal projections of the scaled gradients; then the scales take one step."""
        gramian = gradients.gramian
        assert gramian is not None
        assert gradients.losses is not None
        at = self.positions(gradients.names)
        values, moments = self.log_scale.numpy(), self.moments.numpy()
        scales = learned_scales(self, values[at], gradients.names)
        found = equal_projections(gramian * scales[:, None] * scales)
        slope = scales * gradients.losses - 1
        following, learned = adam_step(values[at], moments[at], slope, lr=self.lr)
        check_growth(self, gradients, values[at], mean_gradient(learned) + 1)
        values[at], moments[at] = following, learned
        return Combination(
            weights=torch.from_numpy(found.weights * scales),
            status=STATUS[found.kind],
            residual=found.residual,
        )
