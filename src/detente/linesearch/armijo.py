"""State the Armijo condition for several objectives, on a handful of numbers on the host.

Along a move of length η every loss must fall by at least a share c of what its slope promises,

    L_i(θ̃) <= L_i(θ) - c η (<∇_sh L_i, d_sh> + ‖∇_θi L_i‖²)    for every task i

(Filatov 2021, algorithms 3.1 and 3.2, after Fliege & Svaiter 2000). The second term is there because the own parameters
of task i move too, along its own gradient. For a small η all of them hold exactly when every slope is positive.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

EPS64 = float(np.finfo(np.float64).eps)

SLOPE_ROUNDING = 8.0
"""Machine epsilons of float64, for each task, that count as rounding in a slope."""

ROUNDING = 4.0
"""Machine epsilons of a loss that count as rounding.

Storing two losses costs up to one epsilon of their size; the sums behind them, which are added in some tree, cost a
few more. Beyond that a difference is real.
"""


def rounding_tolerance(before: Array, after: Array, epsilon: Array, rounding: float = ROUNDING) -> Array:
    """Bound what the difference of two losses may owe to rounding: [T], ``rounding`` · ε_i · max(|L_i|, |L̃_i|).

    In float32 a loss of 1 resolves about 1e-7; a step whose promised decrease is below that cannot be judged, and must
    not be rejected for ever.

    Args:
        before, after: [T] losses, in any unit.
        epsilon: [T] the machine epsilon of each loss's dtype.
        rounding: how many of them count, >= 0.

    Example:
        >>> rounding_tolerance(np.array([2.0]), np.array([-1.0]), np.array([1e-7])).tolist()
        [8e-07]
    """
    return np.asarray(rounding * epsilon * np.maximum(np.abs(before), np.abs(after)))


def sufficient_decrease(
    before: Array, after: Array, slopes: Array, eta: float, c: float, tolerance: Array | float = 0.0
) -> NDArray[np.bool_]:
    """Tell where [T] the Armijo condition holds; a loss that is NaN or infinite never satisfies it.

    Args:
        before, after: [T] losses at both ends of the step.
        slopes: [T] what each loss falls by per unit of η, to first order.
        eta: length of the step, > 0.
        c: share of the promised decrease that is required, in (0, 1).
        tolerance: [T] what may be missing for rounding.

    Example:
        On ½θ² from θ = 1 a step of η leads to 1 - η, and the condition with c holds exactly for η <= 2 (1 - c).

        >>> sufficient_decrease(np.array([0.5]), np.array([0.5 * (1 - 1.4) ** 2]), np.array([1.0]), 1.4, 0.3).tolist()
        [True]
        >>> sufficient_decrease(np.array([0.5]), np.array([0.5 * (1 - 1.5) ** 2]), np.array([1.0]), 1.5, 0.3).tolist()
        [False]
    """
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(np.isfinite(after) & (after <= before - c * eta * slopes + tolerance))


def slope_tolerance(norms: Array, length: float, own: Array) -> Array:
    """Bound [T] the size of a slope that is zero up to rounding: 8 T ε (‖g_i‖ ‖d‖ + own_i), ε that of float64.

    An inner product that is zero by construction, as with a direction projected onto the cone of descent, comes out as
    a few roundings of either sign; nothing may depend on which.

    Args:
        norms: [T] lengths of the shared gradients.
        length: that of the shared direction.
        own: [T] the part of the slopes that the own parameters contribute.

    Example:
        >>> slope_tolerance(np.array([3.0, 0.0]), 2.0, np.array([0.0, -1.0])).tolist() == [96 * EPS64, 16 * EPS64]
        True
    """
    return np.asarray(SLOPE_ROUNDING * len(norms) * EPS64 * (norms * length + np.abs(own)))


def ascends(slopes: Array, moved: NDArray[np.bool_], tolerance: Array | float = 0.0) -> NDArray[np.bool_]:
    """Tell where [T] no length, however small, need satisfy the condition: the loss moves, and does not fall.

    A task that no parameter's move can change to first order (its gradient vanishes, or everything it has a gradient
    for stays where it is) has slope 0 and is not held against the direction.

    Args:
        slopes: [T].
        moved: [T] True where the gradient of task i does not vanish on what moves.
        tolerance: [T] up to where a slope counts as zero.

    Example:
        >>> ascends(np.array([1.0, -1.0, 0.0, 0.0]), np.array([True, True, True, False])).tolist()
        [False, True, True, False]
    """
    return np.asarray(moved & ~(slopes > tolerance))


def repeats(first: Array, second: Array, epsilon: Array) -> NDArray[np.bool_]:
    """Tell where [T] two evaluations at one point agree: to √ε_i of their size, or to one ε_i.

    With the same random state they mostly agree to the last digit; other kernels without a graph, or sums whose order
    is not fixed, cost a few. Another batch shows in the first digits.

    Args:
        first, second: [T] losses.
        epsilon: [T] the machine epsilon of each loss's dtype.

    Example:
        >>> repeats(np.array([1.0, 1.0]), np.array([1.000001, 1.01]), np.array([1e-7, 1e-7])).tolist()
        [True, False]
    """
    size = np.maximum(np.abs(first), np.abs(second))
    return np.asarray(np.abs(first - second) <= np.sqrt(epsilon) * size + epsilon)


@dataclass(frozen=True)
class Slopes:
    """Hold what each loss falls by per unit of length, to first order.

    Attributes:
        shared: [T] what the shared direction contributes.
        own: [T] what the moves of the own parameters contribute.
        tolerance: [T] up to where a slope counts as zero, see :func:`slope_tolerance`.
        moved: [T] True where the gradient of a task does not vanish on what moves.

    Example:
        >>> slopes = Slopes(np.array([1.0, -3.0]), np.array([0.0, 1.0]), np.full(2, 1e-15), np.array([True, True]))
        >>> slopes.total.tolist(), slopes.against.tolist()
        ([1.0, -2.0], [False, True])
    """

    shared: Array
    own: Array
    tolerance: Array
    moved: NDArray[np.bool_]

    @property
    def total(self) -> Array:
        """[T] both together."""
        return self.shared + self.own

    @property
    def flat(self) -> NDArray[np.bool_]:
        """[T] True where a slope is zero up to rounding."""
        return np.asarray(np.abs(self.total) <= self.tolerance)

    @property
    def against(self) -> NDArray[np.bool_]:
        """[T] True where a task that moves does not fall."""
        return ascends(self.total, self.moved, self.tolerance)


@dataclass(frozen=True)
class Condition:
    """Judge the trials of one search by the Armijo condition, with the rule for rounding.

    Attributes:
        before: [T] losses where the step began.
        slopes: [T] what each loss falls by per unit of length.
        epsilon: [T] the machine epsilon of each loss's dtype.
        c: share of the promised decrease that is required.
        rounding: machine epsilons that count as rounding.

    Example:
        >>> condition = Condition(np.array([0.5]), np.array([1.0]), np.array([2.0**-52]), c=0.3, rounding=4)
        >>> condition.holds(np.array([0.5 * (1 - 1.4) ** 2]), 1.4).tolist()
        [True]
    """

    before: Array
    slopes: Array
    epsilon: Array
    c: float
    rounding: float

    def holds(self, after: Array, eta: float) -> NDArray[np.bool_]:
        """Tell where [T] the losses ``after`` a move of length ``eta`` satisfy it."""
        tolerance = rounding_tolerance(self.before, after, self.epsilon, self.rounding)
        return sufficient_decrease(self.before, after, self.slopes, eta, self.c, tolerance)
