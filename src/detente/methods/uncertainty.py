"""Uncertainty weighting."""

from __future__ import annotations

from typing import Literal

import torch

from detente.geometry.adam import adam_step, mean_gradient
from detente.methods.base import Declaration, Method
from detente.methods.checks import check_growth, learned_scales
from detente.methods.options import number, one_of
from detente.methods.registry import register
from detente.values import Combination, TaskGradients


@register
class Uncertainty(Method):
    """Uncertainty weighting: learn one noise level per task and divide each loss by its variance.

    Each task has a learned log-variance s_t. The objective is minimised over the network and over s at once;
    where s has settled, every weighted loss is the same constant, so losses of any unit count alike.

    ``regression``: Σ ½ e^(-s_t) L_t + ½ s_t, weights ½ e^(-s_t); ``classification``: Σ e^(-s_t) L_t + ½ s_t,
    weights e^(-s_t) (Kendall, Gal & Cipolla 2018, section 3.2, with s = log σ²). With tasks of both kinds, choose
    ``regression`` and multiply the classification losses by 2.

    Public codes have three forms: L / (2 e^s) + ½ s from s = -0.5 (``init=-0.5`` here); ½ (e^(-s) L + s) from
    s = 0, the default here; e^(-s) L + ½ s, ``classification`` here, used for all tasks. They hand s to the
    network's optimizer; here the method keeps s and takes its own Adam steps, after the weights of the step were
    read. A loss that stays at or below zero has no best s: its weight grows without end. A loss
    that stays below zero is refused once its running mean, weighted, is below -50 (½ is where s settles) and its weight
    more than 100 times what it was at the start, long before anything overflows.

    When to use it: losses of different units, the cheapest learned weighting. Cost: nothing beyond the step itself,
    no task gradients are taken.

    Args:
        form: ``regression`` or ``classification``.
        init: s of every task at the start.
        lr: step length of Adam on s, > 0. Ours: the papers learn s with the network's optimizer.

    Raises:
        ValueError: an option is out of range; in a step: a loss stays below zero and its scale grows without end.

    Example:
        >>> import detente
        >>> method = detente.create("uncertainty", lr=0.1)
        >>> for _ in range(200):
        ...     weights = detente.combine(method, torch.eye(2), losses=[1.0, 10.0]).weights
        >>> [round(float(weight), 2) for weight in weights]
        [0.5, 0.05]
    """

    declares = Declaration(
        name="uncertainty",
        source="Kendall, Gal & Cipolla 2018, section 3.2",
        needs=frozenset({"losses"}),
        stateful=True,
        native_scale="own",
        homogeneity=1,
        permutation="exact",
        search={"form": ("regression", "classification"), "lr": (0.001, 0.005, 0.025, 0.1)},
    )

    log_variance: torch.Tensor
    moments: torch.Tensor

    def __init__(
        self,
        *,
        form: Literal["regression", "classification"] = "regression",
        init: float = 0.0,
        lr: float = 0.025,
    ) -> None:
        super().__init__()
        self.form = one_of("form", form, ("regression", "classification"))
        self.init = number("init", init)
        self.lr = number("lr", lr, above=0)

    def allocate(self, tasks: int) -> None:
        """One log-variance per task."""
        self.register_buffer("log_variance", torch.full((tasks,), self.init, dtype=torch.float64))
        self.register_buffer("moments", torch.zeros(tasks, 3, dtype=torch.float64))

    def solve(self, gradients: TaskGradients) -> Combination:
        """The weights at the present log-variances, which then take one step."""
        assert gradients.losses is not None
        at = self.positions(gradients.names)
        values, moments = self.log_variance.numpy(), self.moments.numpy()
        weights = (0.5 if self.form == "regression" else 1.0) * learned_scales(
            self, -values[at], gradients.names
        )
        slope = 0.5 - weights * gradients.losses
        following, learned = adam_step(values[at], moments[at], slope, lr=self.lr)
        check_growth(self, gradients, -values[at], 1 - 2 * mean_gradient(learned), start=-self.init)
        values[at], moments[at] = following, learned
        return Combination(weights=torch.from_numpy(weights))
