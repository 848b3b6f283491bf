"""Aligned-MTL: make the gradients orthogonal and of equal length, then add them up."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from detente.geometry.spectrum import Spectrum, spectrum
from detente.methods.base import Declaration, Method, Preference
from detente.methods.options import number, one_of
from detente.methods.registry import register
from detente.values import Combination, TaskGradients

PUBLISHED_EPSILON = float(np.finfo(np.float32).eps)


@register
class AlignedMTL(Method):
    """Aligned-MTL: replace the gradients by the nearest orthogonal ones of equal length, then add them up.

    With the Gramian G = V Λ Vᵀ over the kept rank, the balance matrix is B = s V Λ^(-1/2) Vᵀ; the altered gradient
    of task i is Σ_j B_ij g_j, and the weights are B p for the preference p. The altered gradients have condition
    number 1. s = √λ_min is the largest factor that lengthens no principal component. On ``features=`` this is
    Aligned-MTL-UB.

    The direction is not a descent direction for every task: along the Pareto front the method drifts towards the
    point that the preference asks for, by design, and there is no stationarity before it.

    Codes differ. Two public codes sum the aligned gradients, others take their mean: here the weights are B p with p
    as given, and 1/T each without preference. The rank tolerance is part of the method: with one at the level of
    float32 the Gramian loses a direction near the Pareto front and the step jumps along it; with one at the level of
    float64 the same formula creeps.

    When to use it: gradients that conflict and differ in length, with all tasks, or a given preference, to count. Cost:
    the task gradients and an eigendecomposition of their Gramian.

    Args:
        scale: ``min``: s = √λ_min; ``median``: √(lower median λ); ``rmse``: √(mean λ); all over the kept rank.
        preference: relative importance of the tasks, by name or position; used as given.
        rank_tol: eigenvalues above this times the largest are kept. None: T float64 epsilons; ``"published"``: T
            float32 epsilons, as public codes in float32; or a number.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import detente
        >>> detente.combine("aligned-mtl", torch.tensor([[1.0, 0.0], [0.0, 4.0]])).direction
        tensor([0.5000, 0.5000])
    """

    declares = Declaration(
        name="aligned-mtl",
        source="Senushkin et al. 2023, section 4, Algorithm 1",
        needs=frozenset({"gramian"}),
        native_scale="mean",
        homogeneity=1,
        permutation="exact",
        search={"scale": ("min", "median", "rmse")},
    )

    def __init__(
        self,
        *,
        scale: Literal["min", "median", "rmse"] = "min",
        preference: Preference = None,
        rank_tol: float | str | None = None,
    ) -> None:
        super().__init__(preference=preference)
        self.scale = one_of("scale", scale, ("min", "median", "rmse"))
        if isinstance(rank_tol, str):
            one_of("rank_tol", rank_tol, ("published",))
        elif rank_tol is not None:
            rank_tol = number("rank_tol", rank_tol, least=0, below=1)
        self.rank_tol = rank_tol

    def solve(self, gradients: TaskGradients) -> Combination:
        """The balance matrix and its weights."""
        gramian = gradients.gramian
        assert gramian is not None
        tasks = gradients.tasks
        tolerance = tasks * PUBLISHED_EPSILON if self.rank_tol == "published" else self.rank_tol
        found = spectrum(gramian, tolerance if not isinstance(tolerance, str) else None)
        if found.rank == 0:
            nothing = torch.zeros(tasks, dtype=torch.float64)
            return Combination(weights=nothing, status="stationary", kept_rank=0, dropped=gradients.names)
        kept, vectors = np.sqrt(found.values[: found.rank]), found.vectors[:, : found.rank]  # descending
        length = {
            "min": kept[-1],
            "median": kept[found.rank // 2],
            "rmse": np.sqrt(np.mean((kept / kept[0]) ** 2)) * kept[0],
        }[self.scale]
        balance = (vectors * (length / kept)) @ vectors.T
        preference = self.preference(gradients.names)
        weights = balance @ (np.full(tasks, 1 / tasks) if preference is None else preference)
        return Combination(
            weights=torch.from_numpy(weights),
            transform=torch.from_numpy(balance),
            kept_rank=found.rank,
            dropped=_dropped(gradients.names, gramian, found),
        )


def _dropped(names: tuple[str, ...], gramian: np.ndarray, found: Spectrum) -> tuple[str, ...]:
    """Tasks of whose squared gradient the kept directions hold less than half."""
    held = found.vectors[:, : found.rank] ** 2 @ found.values[: found.rank]
    squares = np.diagonal(gramian)
    return tuple(n for n, h, square in zip(names, held, squares, strict=True) if not h > 0.5 * square)
