"""MoDo: multi-objective gradient with double sampling."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from detente.methods.base import Declaration, Method
from detente.methods.moco import simplex_step
from detente.methods.options import number, one_of
from detente.methods.products import inner_products
from detente.methods.registry import register
from detente.values import Combination, TaskGradients


@register
class MoDo(Method):
    """MoDo: weights that walk towards the minimum-norm ones by products of gradients from independent batches.

    Minimum-norm weights from one batch are biased: the noise of a gradient multiplies itself in its squared norm. MoDo
    takes the two factors from two independent batches, λ ← Π(λ - γ (G₁ G₂ᵀ + ρ I) λ), from λ = 1/T, where Π projects
    onto the simplex, and descends along Σ λ_t g_t on a third batch (Chen et al. 2023, Algorithm 1).

    ``backward(losses, method, extra=[losses_1, losses_2])`` takes the losses of the third batch first. Without
    ``extra`` this batch serves three times, G₁ = G₂ = G; the weights are then biased as those of one batch are, and the
    record says so. Détente's training loop draws the three batches.

    In the ``paper`` form γ has the unit of an inverse squared gradient (published values: γ 1e-3, ρ 0.1). In the
    ``normalized`` form, ours, G₁ G₂ᵀ is divided by the mean of ‖g₁‖‖g₂‖ over the tasks, so that γ means the same
    at every scale of the losses. A task that is absent keeps its share of the weights.

    When to use it: small noisy batches, and three of them at hand for a step. Cost: the task gradients of three
    batches instead of one, one product of two T x P matrices, and its T x T numbers to the host.

    Args:
        form: ``normalized`` or ``paper``.
        gamma: > 0, step of the weights.
        rho: >= 0, pulls the weights towards equality.

    Raises:
        ValueError: an option is out of range; ``extra`` holds another number of batches than two.

    Example:
        >>> import detente
        >>> method = detente.create("modo", gamma=0.1, rho=0.0)
        >>> detente.combine(method, torch.tensor([[1.0, 0.0], [0.0, 3.0]])).weights  # G Gᵀ / 5 = diag(0.2, 1.8)
        tensor([0.5400, 0.4600], dtype=torch.float64)
    """

    declares = Declaration(
        name="modo",
        source="Chen et al. 2023 (double sampling), Algorithm 1",
        needs=frozenset({"gramian", "jacobian", "batches:3"}),
        spaces=frozenset({"exact", "layer"}),
        stateful=True,
        native_scale="simplex",
        homogeneity=1,
        simplex=True,
        permutation="exact",
        search={"gamma": (0.001, 0.01, 0.1)},
    )

    weights: torch.Tensor

    def __init__(
        self, *, form: Literal["normalized", "paper"] = "normalized", gamma: float = 0.01, rho: float = 0.1
    ) -> None:
        super().__init__()
        self.form = one_of("form", form, ("normalized", "paper"))
        self.gamma = number("gamma", gamma, above=0)
        self.rho = number("rho", rho, least=0)

    def allocate(self, tasks: int) -> None:
        """Weights."""
        self.register_buffer("weights", torch.full((tasks,), 1 / tasks, dtype=torch.float64))

    def solve(self, gradients: TaskGradients) -> Combination:
        """The weights after a step on the two further batches."""
        products, size, notes = self._products(gradients)
        at = self.positions(gradients.names)
        if self.form == "normalized":
            products = products / (size or 1.0)
        weights = simplex_step(self.weights.numpy()[at], products, self.gamma, self.rho)
        self.weights.numpy()[at] = weights
        return Combination(weights=torch.from_numpy(weights / weights.sum()), notes=notes)

    def _products(self, gradients: TaskGradients) -> tuple[np.ndarray, float, tuple[str, ...]]:
        """[T, T] inner products between two batches, the mean of the products of norms, and what to note."""
        assert gradients.gramian is not None
        if not gradients.extra:
            size = float(np.diagonal(gradients.gramian).mean())
            return gradients.gramian, size, ("modo: one batch served for all three; pass extra=",)
        if len(gradients.extra) != 2:
            raise ValueError(
                f"modo takes two further batches and was given {len(gradients.extra)}: pass extra=[losses_1, losses_2]."
            )
        first, second = gradients.extra
        assert first.jacobian is not None and second.jacobian is not None
        assert first.gramian is not None and second.gramian is not None
        norms = np.sqrt(np.diagonal(first.gramian)) * np.sqrt(np.diagonal(second.gramian))
        return inner_products(first.jacobian, second.jacobian), float(norms.mean()), ()
