"""SDMGrad: the minimum-norm direction, pulled towards the mean gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from detente.geometry.dual_cone import directed
from detente.geometry.nonnegative import NOTHING
from detente.geometry.projection import project_onto_simplex
from detente.methods.base import Declaration, Method
from detente.methods.options import number, one_of, whole
from detente.methods.registry import register
from detente.values import Combination, TaskGradients


@register
class SDMGrad(Method):
    """SDMGrad: minimum-norm weights, regularised towards the mean gradient.

    w* = argmin over the simplex of ‖g_w + λg₀‖², g₀ the mean gradient, and d = (g_w* + λg₀) / (1 + λ) (Xiao et al.
    2023, equation 9). λ = 0 is MGDA, λ → ∞ the mean gradient. The weights are those of d; they sum to 1.

    ``exact`` solves the problem to machine precision. ``sgd`` is what the published code does: some steps of projected
    gradient descent with momentum on the weights. After its 20 steps it is far from the optimum where gradients
    conflict (40 % and more in the objective). Public codes go on from the weights of the last training step; here every
    call starts from equal ones, so that the method needs no memory. The paper draws the two factors of the Gramian from
    two independent batches, and the direction from a third: ``sgd`` takes them as ``extra=[…, …]``, and the training
    loop draws them. Without them this batch serves for all three, and the record says so.

    Cost: exact, some 3 to 15 linear systems in T unknowns.

    When to use it: between the mean loss and MGDA, with one dial; ``sgd`` to reproduce the paper.

    Args:
        lambda_: λ, at least 0.
        solver: ``exact`` or ``sgd``.
        steps: number of descent steps on the weights per training step, for ``sgd``.
        lr: their step size, on gradients divided by their mean norm, for ``sgd`` (public codes: 5 and 10).
        momentum: at least 0 and below 1, for ``sgd``.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import detente
        >>> detente.combine("sdmgrad", torch.tensor([[1.0, 0.0], [0.0, 2.0]])).weights
        tensor([0.8000, 0.2000], dtype=torch.float64)
    """

    declares = Declaration(
        name="sdmgrad",
        source="Xiao et al. 2023, equation 9, Algorithm 1",
        needs=frozenset({"gramian"}),
        native_scale="simplex",
        homogeneity=1,
        simplex=True,
        permutation="exact",
        search={"lambda_": (0.1, 0.3, 1.0, 3.0)},
    )

    def __init__(
        self,
        *,
        lambda_: float = 0.3,
        solver: Literal["exact", "sgd"] = "exact",
        steps: int = 20,
        lr: float = 5.0,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        self.lambda_ = number("lambda_", lambda_, least=0)
        self.solver = one_of("solver", solver, ("exact", "sgd"))
        self.steps = whole("steps", steps, least=1)
        self.lr = number("lr", lr, above=0)
        self.momentum = number("momentum", momentum, least=0, below=1)
        if solver == "sgd":
            self.declares = replace(self.declares, needs=frozenset({"gramian", "batches:3"}))

    def solve(self, gradients: TaskGradients) -> Combination:
        """The weights of the pulled direction."""
        gramian, tasks = gradients.gramian, gradients.tasks
        assert gramian is not None
        mean = np.full(tasks, 1 / tasks)
        notes: tuple[str, ...] = ()
        residual = None
        if self.solver == "exact":
            solution = directed(gramian, mean, self.lambda_)
            shares, residual = solution.weights, solution.residual
        else:
            shares, notes = self._descend(gradients)
        weights = (shares + self.lambda_ * mean) / (1.0 + self.lambda_)
        weights /= weights.sum()
        norms = np.sqrt(np.diagonal(gramian))
        squared, terms = float(weights @ gramian @ weights), float(weights @ norms)
        stationary = squared <= NOTHING * tasks * terms**2
        return Combination(
            weights=torch.from_numpy(weights),
            status="stationary" if stationary else "ok",
            notes=notes,
            residual=residual,
        )

    def _descend(self, gradients: TaskGradients) -> tuple[np.ndarray, tuple[str, ...]]:
        """Projected gradient descent with momentum, from equal weights."""
        products, size, notes = self._products(gradients)
        shares = np.full(gradients.tasks, 1 / gradients.tasks)
        if size > 0:
            products = products / size
            pull = self.lambda_ * products.mean(axis=1)
            velocity = np.zeros_like(shares)
            for _ in range(self.steps):
                velocity = self.momentum * velocity + products @ shares + pull
                shares = project_onto_simplex(shares - self.lr * velocity)
        return shares, notes

    def _products(self, gradients: TaskGradients) -> tuple[np.ndarray, float, tuple[str, ...]]:
        """[T, T] inner products of two independent batches, or of this one; the product of mean norms; what to note."""
        assert gradients.gramian is not None
        factors = [batch.jacobian for batch in gradients.extra[:2]]
        if len(factors) < 2 or factors[0] is None or factors[1] is None:
            size = float(np.sqrt(np.diagonal(gradients.gramian)).mean()) ** 2
            return gradients.gramian, size, ("sdmgrad: one batch served for all three; pass extra=",)
        first, second = (factor.to(torch.float64) for factor in factors if factor is not None)
        size = float(first.norm(dim=1).mean() * second.norm(dim=1).mean())
        return (first @ second.T).cpu().numpy(), size, ()
