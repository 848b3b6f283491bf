"""MoCo: multi-objective gradient correction."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from detente.geometry.projection import project_onto_simplex
from detente.methods.base import Declaration, Method
from detente.methods.checks import layout_of, sized
from detente.methods.options import number, one_of
from detente.methods.products import inner_products
from detente.methods.registry import register
from detente.values import Combination, TaskGradients


@register
class MoCo(Method):
    """MoCo: follow running means of the task gradients, with weights that walk towards their shortest combination.

    Minimum-norm weights solved on the gradients of one batch are biased by its noise. MoCo tracks every task's gradient
    by a running mean, y_t ← y_t + β_k (g_t - y_t), and takes one projected step for the weights,
    λ ← Π(λ - γ_k (Y Yᵀ + ρ I) λ), from λ = 1/T; Π projects onto the simplex. The direction is Σ λ_t y_t (Fernando et
    al. 2023, Algorithm 1), with β_k = beta / k^beta_decay and γ_k = gamma / k^gamma_decay in the k-th step.

    In the ``paper`` form γ has the unit of an inverse squared gradient, and y starts at 0. In the ``normalized`` form,
    ours, Y Yᵀ is divided by the mean of its diagonal, so that γ means the same at every scale of the losses, and
    y starts at the first gradient. A public code also brings every gradient to the length of its loss first,
    L g / ‖g‖; its step sizes are the defaults. k counts a task's own steps; a task that is absent keeps its y and λ.

    The weights are in the buffer ``weights``. They apply to remembered gradients, not to those of the step, so that
    the heads take the plain gradients of their losses and the combination has only a direction.

    When to use it: small noisy batches, where minimum-norm weights jump. Cost: the task gradients, T x P numbers of
    state in the memory of the parameters, a second Gramian, and its T x T numbers to the host.

    Args:
        form: ``normalized`` or ``paper``.
        beta: in (0, 1], step of the running means.
        beta_decay: >= 0, how fast it falls.
        gamma: > 0, step of the weights.
        gamma_decay: >= 0, how fast it falls.
        rho: >= 0, pulls the weights towards equality.

    Raises:
        ValueError: an option is out of range; the number of shared parameters changed.

    Example:
        >>> import detente
        >>> method = detente.create("moco")
        >>> detente.combine(method, torch.tensor([[1.0, 0.0], [0.0, 3.0]])).direction  # Y Yᵀ / 5 = diag(0.2, 1.8)
        tensor([0.5400, 1.3800])
        >>> method.weights
        tensor([0.5400, 0.4600], dtype=torch.float64)
    """

    declares = Declaration(
        name="moco",
        source="Fernando et al. 2023 (gradient correction), Algorithm 1",
        needs=frozenset({"jacobian"}),
        spaces=frozenset({"exact"}),
        stateful=True,
        native_scale="simplex",
        homogeneity=1,
        permutation="exact",
        gives="direction",
        search={"beta": (0.1, 0.5, 1.0), "gamma": (0.01, 0.1, 1.0)},
    )

    tracked: torch.Tensor | None
    weights: torch.Tensor
    steps: torch.Tensor

    def __init__(
        self,
        *,
        form: Literal["normalized", "paper"] = "normalized",
        beta: float = 0.5,
        beta_decay: float = 0.5,
        gamma: float = 0.1,
        gamma_decay: float = 0.5,
        rho: float = 0.0,
    ) -> None:
        super().__init__()
        self.form = one_of("form", form, ("normalized", "paper"))
        self.beta = number("beta", beta, above=0, most=1)
        self.beta_decay = number("beta_decay", beta_decay, least=0)
        self.gamma = number("gamma", gamma, above=0)
        self.gamma_decay = number("gamma_decay", gamma_decay, least=0)
        self.rho = number("rho", rho, least=0)

    def allocate(self, tasks: int) -> None:
        """Weights, steps of each task, and running means sized by the first gradients."""
        self.register_buffer("tracked", None)
        self.register_buffer("weights", torch.full((tasks,), 1 / tasks, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros(tasks, dtype=torch.int64))

    def solve(self, gradients: TaskGradients) -> Combination:
        """The weighted sum of the running means after this step's gradients joined them."""
        jacobian = gradients.jacobian
        assert jacobian is not None and self.tasks is not None
        at = self.positions(gradients.names)
        everyone = gradients.names == self.tasks
        place = torch.from_numpy(at).to(jacobian.device)
        tracked = sized(self, self.tracked, jacobian, gradients)
        steps = self.steps.numpy()[at] + 1
        share = np.minimum(self.beta / steps**self.beta_decay, 1.0)
        if self.form == "normalized":
            share = np.where(steps == 1, 1.0, share)
        old = tracked if everyone else tracked[place]
        means = torch.lerp(old, jacobian, torch.from_numpy(share).to(jacobian)[:, None])
        products = inner_products(means, means)
        size = float(np.diagonal(products).mean()) if self.form == "normalized" else 1.0
        gamma = self.gamma / float(steps.max()) ** self.gamma_decay
        weights = simplex_step(self.weights.numpy()[at], products / (size or 1.0), gamma, self.rho)
        self.tracked = means if everyone else tracked.index_copy(0, place, means)
        self.column_layout = layout_of(gradients)
        self.steps.numpy()[at] = steps
        self.weights.numpy()[at] = weights
        if not products.any():
            return Combination(direction=jacobian.new_zeros(jacobian.shape[1]), status="stationary")
        share_of_all = torch.from_numpy(weights / weights.sum()).to(jacobian)
        return Combination(direction=share_of_all @ means)


def simplex_step(weights: np.ndarray, products: np.ndarray, gamma: float, rho: float) -> np.ndarray:
    """One projected gradient step of the weights [T] of the tasks present: Π(λ - γ (M + ρ I) λ), for M = ``products``.

    Weights that do not sum to one, because some task is absent, keep their sum.

    Args:
        weights: [T], not negative.
        products: [T, T] inner products of gradients; not necessarily symmetric.
        gamma: step size.
        rho: strength of the pull towards equal weights.

    Example:
        >>> simplex_step(np.array([0.5, 0.5]), np.diag([0.0, 2.0]), 0.2, 0.0).round(12).tolist()
        [0.6, 0.4]
    """
    total = weights.sum() or 1.0
    start = weights / total if weights.any() else np.full(len(weights), 1 / len(weights))
    return project_onto_simplex(start - gamma * (products @ start + rho * start)) * total
