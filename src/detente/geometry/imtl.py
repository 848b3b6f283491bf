"""The vector in the affine hull of the gradients that has equal projections on all of them (IMTL-G)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from detente.geometry.gramian import Array, unit_rows
from detente.geometry.pseudoinverse import inverse_times_ones

# Sums of signed terms below this, relative to the terms' size, are zero.
CANCELLED = 1e-10
# Equal gradients whose norms differ by less than this, as those of float32 may, are equal.
EQUAL = 1e-6


@dataclass(frozen=True)
class EqualProjections:
    """A vector d = Σ weights_i g_i with Σ weights_i = 1 and the same inner product with every unit gradient.

    Attributes:
        weights: [T], of any sign.
        kind: ``found``; ``zero``: the affine hull holds 0 and d = 0 to rounding; ``none``: no such vector exists, and
            the weights (whose magnitudes sum to one) only point where the equal projections are.
        residual: largest distance of a projection from the common one, relative to the terms summed; None where there
            is no such vector.

    Example:
        >>> equal_projections([[1.0, 0.0], [0.0, 1.0]]).weights
        array([0.5, 0.5])
    """

    weights: Array
    kind: Literal["found", "zero", "none"]
    residual: float | None = None


def equal_projections(gramian: ArrayLike) -> EqualProjections:
    """Solve ⟨d, g_i⟩ / ‖g_i‖ = c for all i, with d = Σ α_i g_i and Σ α_i = 1 (Liu et al. 2021, section 3.1).

    In x_i = α_i ‖g_i‖ and the cosines C this is C x = c 1 with Σ x_i / ‖g_i‖ = 1. For independent gradients
    x ∝ C⁻¹ 1. For dependent ones, a vector of C's kernel whose weights do not sum to zero shows that the affine hull
    holds 0, which has equal projections on everything; otherwise the pseudo-inverse solves the system if 1 is in its
    range, and no solution exists if it is not. Where Σ (C⁻¹ 1)_i / ‖g_i‖ = 0 none exists either.

    Args:
        gramian: [T, T]. A gradient of zero length puts 0 into the affine hull.

    Raises:
        ValueError: not a Gramian, see :func:`detente.geometry.gramian.unit_rows`.

    Example:
        >>> equal_projections([[1.0, 2.0], [2.0, 4.0]]).kind  # g and 2 g: twice the first less the second
        'zero'
        >>> equal_projections([[1.0, 0.0], [0.0, 9.0]]).weights
        array([0.75, 0.25])
    """
    norms, cosines = unit_rows(gramian)
    vanishing = norms == 0
    if vanishing.any():
        return EqualProjections(vanishing / vanishing.sum(), "zero", 0.0)
    shorter = norms.min() / norms  # in (0, 1]: 1 / ‖g_i‖ in units that neither overflow nor vanish
    solution, _, kernel = inverse_times_ones(cosines)
    if kernel.shape[1]:
        projector = kernel @ kernel.T
        inside, terms = projector @ shorter, np.abs(projector) @ shorter
        # Row by row, because a short gradient's weight would hide what two long ones do.
        if (np.abs(inside) > EQUAL * terms)[projector.diagonal() > 1e-12].any():
            shares = inside / (inside @ inside)
            return EqualProjections(shares * shorter, "zero", _spread(cosines, shares, 0.0))
    weights = solution * shorter
    total, size = weights.sum(), np.abs(weights).sum()
    outside = np.linalg.norm(kernel.sum(axis=0)) > EQUAL * np.sqrt(len(norms))
    if outside or not abs(total) > CANCELLED * size:
        return EqualProjections(weights / size if size > 0 else np.full(len(norms), 1 / len(norms)), "none")
    return EqualProjections(weights / total, "found", _spread(cosines, solution, 1.0))


def _spread(cosines: Array, shares: Array, projection: float) -> float:
    """Largest |⟨d, u_i⟩ − projection| over the terms that were summed, for d = Σ shares_i u_i."""
    sizes = np.abs(cosines) @ np.abs(shares) + projection
    return float((np.abs(cosines @ shares - projection) / sizes).max())
