"""The loss half of impartial multi-task learning."""

from __future__ import annotations

import torch

from detente.geometry.adam import adam_step, mean_gradient
from detente.methods.base import Declaration, Method
from detente.methods.checks import check_growth, learned_scales
from detente.methods.options import number
from detente.methods.registry import register
from detente.values import Combination, TaskGradients


@register
class IMTLL(Method):
    """IMTL-L: learn one scale per task that brings all weighted losses to the same size.

    Each task has a learned s_t, 0 at the start, and the objective is Σ e^(s_t) L_t - s_t, minimised over the network
    and over s at once; the weights are e^(s_t). Where s has settled, e^(s_t) L_t = 1 for every task (Liu et al. 2021,
    section 3.2).

    It is twice the regression form of ``uncertainty`` with s of the other sign: the weights differ by that factor 2.
    Codes hand s to the network's optimizer; here the method keeps s and takes its own Adam steps, after the weights
    of the step were read. A loss that stays at or below zero has no best s: its weight grows without end. A loss that
    stays below zero is refused once its running mean, weighted, is below -100 (1 is where s settles) and its scale more
    than 100 times what it was at the start, long before anything overflows.

    When to use it: losses of different units where a sum of the right overall length matters; together with the
    gradient half it is ``imtl``. Cost: nothing beyond the step itself, no task gradients are taken.

    Args:
        lr: step length of Adam on s, > 0. Ours: the paper learns s with the network's optimizer.

    Raises:
        ValueError: ``lr`` is out of range; in a step: a loss stays below zero and its scale grows without end.

    Example:
        >>> import detente
        >>> method = detente.create("imtl-l", lr=0.1)
        >>> for _ in range(200):
        ...     weights = detente.combine(method, torch.eye(2), losses=[1.0, 10.0]).weights
        >>> [round(float(weight), 2) for weight in weights]
        [1.0, 0.1]
    """

    declares = Declaration(
        name="imtl-l",
        source="Liu et al. 2021 (IMTL), section 3.2",
        needs=frozenset({"losses"}),
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
        """The scales as they are, which then take one step."""
        assert gradients.losses is not None
        at = self.positions(gradients.names)
        values, moments = self.log_scale.numpy(), self.moments.numpy()
        weights = learned_scales(self, values[at], gradients.names)
        slope = weights * gradients.losses - 1
        following, learned = adam_step(values[at], moments[at], slope, lr=self.lr)
        check_growth(self, gradients, values[at], mean_gradient(learned) + 1)
        values[at], moments[at] = following, learned
        return Combination(weights=torch.from_numpy(weights))
