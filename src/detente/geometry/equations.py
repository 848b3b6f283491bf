"""Equations that prescribe every task's projection on the direction.

* Gw = w^(−1/α): the α-fair bargaining solution (Ban & Ji 2024); α = 1 is Nash's (Navon et al. 2022).
* equal angles with all gradients, in the sense of least squares: ConFIG (Liu et al. 2024).

Both are solved for the coefficients β_i = w_i‖g_i‖ of the unit gradients, in which G becomes the matrix C of cosines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from detente.geometry.gramian import Array, unit_rows
from detente.geometry.nonnegative import EPS, root_of
from detente.geometry.pseudoinverse import inverse_times_ones

# Newton steps; 5 to 40 are taken.
STEPS = 500
# How many of the first ones may be replaced by a sweep over the tasks where norms enter the equation.
SWEEPS = 60
# A vector of ones of which this part, squared, lies in the range is orthogonal to it.
NOTHING_LEFT = 1e-12


def fair_weights(gramian: ArrayLike, alpha: float = 1.0) -> Array | None:
    """Positive w with Gw = w^(−1/α), elementwise.

    The equation is the stationarity of ½wᵀGw − Σ u(w_i) with u' = w^(−1/α), which is strictly convex: a damped Newton
    iteration in the coefficients of the unit gradients finds its only solution. For α = 1 neither scale nor ratio of
    the norms enters at all. There is a solution exactly when some direction helps every task, that is, when 0 lies
    outside the convex hull of the gradients.

    Args:
        gramian: [T, T], entry (i, j) is the inner product of the gradients of tasks i and j.
        alpha: α > 0, 1 for proportional fairness.

    Returns:
        [T] positive, or None where there is no solution: 0 in the hull of the gradients to rounding.

    Raises:
        ValueError: not one Gramian; α not positive and finite.

    Example:
        >>> fair_weights([[4.0, 0.0], [0.0, 0.25]])
        array([0.5, 2. ])
        >>> fair_weights([[1.0, -1.0], [-1.0, 1.0]]) is None
        True
    """
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha} must be a finite number above 0.")
    norms, cosines = _one(gramian)
    longest = float(norms.max())
    if norms.min() == 0 or root_of(cosines).cancelling.any():
        return None
    logs = np.log(norms / longest)
    power = 1.0 - 1.0 / alpha
    # β_i(Cβ)_i = e_i with e_i = k_i β_i^power; without the other tasks β is this:
    beta = np.exp(logs * (1.0 - alpha) / (1.0 + alpha))
    total = float(beta @ cosines @ beta)
    if total > 0:
        beta *= (float(beta @ beta) / total) ** (alpha / (1.0 + alpha))
    solved = _newton(cosines, logs * (1.0 - alpha) / alpha, power, alpha, beta)
    # Lengths were divided by the longest: G → s²G takes w → s^(−2α/(1+α)) w.
    return np.asarray(solved / (norms / longest) * longest ** (-2.0 * alpha / (1.0 + alpha)))


def fair_residual(gramian: ArrayLike, weights: ArrayLike, alpha: float = 1.0) -> float:
    """Largest |(Gw)_i − w_i^(−1/α)| over the terms that were summed to compute it.

    Args:
        gramian: [T, T].
        weights: [T] positive.
        alpha: as for :func:`fair_weights`.

    Returns:
        About 1e-16 for rounding, up to 1; scaling a gradient and its weight inversely changes nothing for α = 1.

    Raises:
        ValueError: not one Gramian.

    Example:
        >>> fair_residual([[4.0, 0.0], [0.0, 0.25]], [0.5, 2.0])
        0.0
    """
    norms, cosines = _one(gramian)
    given = np.asarray(weights, dtype=np.float64)
    wanted = given ** (-1.0 / alpha) / norms
    beta = given * norms
    sizes = np.abs(cosines) @ np.abs(beta) + wanted
    return float((np.abs(cosines @ beta - wanted) / sizes).max())


@dataclass(frozen=True)
class UnitDirection:
    """A direction equally inclined to all gradients.

    Attributes:
        weights: [T], of any sign.
        vanishes: True if the direction is zero to rounding: the pseudo-inverse solution vanishes (as for two opposite
            gradients), or the projections add up to nothing.
        residual: by how much the least-squares solution misses C(Cβ − 1) = 0, relative to the terms summed.

    Example:
        >>> unit_direction([[1.0, 0.0], [0.0, 1.0]]).vanishes
        False
    """

    weights: Array
    vanishes: bool
    residual: float


def unit_direction(gramian: ArrayLike) -> UnitDirection:
    """Weights of ConFIG: a direction equally inclined to all gradients, as long as their projections on it add up to.

    u is the normalised pseudo-inverse of the unit gradients times 1, d = (Σ⟨g_i, u⟩) u (Liu et al. 2024, equation 5).
    With β = C⁺1 its weights are (nᵀCβ / βᵀCβ) β_i / n_i, n the norms. A zero gradient takes part in nothing.

    Args:
        gramian: [T, T].

    Raises:
        ValueError: not one Gramian.

    Example:
        >>> unit_direction([[1.0, 0.0], [0.0, 4.0]]).weights
        array([1.5 , 0.75])
    """
    norms, cosines = _one(gramian)
    weights = np.zeros(len(norms))
    present = np.flatnonzero(norms)
    if not len(present):
        return UnitDirection(weights, True, 0.0)
    lengths, part = norms[present], cosines[np.ix_(present, present)]
    beta, inclined, _ = inverse_times_ones(part)
    gaps, magnitudes = part @ (part @ beta - 1.0), np.abs(part)
    residual = float((np.abs(gaps) / (magnitudes @ (magnitudes @ np.abs(beta) + 1.0))).max())
    if float(inclined @ inclined) <= NOTHING_LEFT * len(present):
        return UnitDirection(weights, True, residual)
    relative = lengths / lengths.max()
    factor = float(relative @ inclined) / float(beta @ inclined)
    weights[present] = factor * beta / relative
    negligible = abs(float(relative @ inclined)) <= len(present) * EPS * float(relative @ np.abs(inclined))
    return UnitDirection(weights, negligible, residual)


# ---- private


def _one(gramian: ArrayLike) -> tuple[Array, Array]:
    norms, cosines = unit_rows(gramian)
    if norms.ndim != 1:
        raise ValueError(f"give one Gramian [T, T], not a batch {[*norms.shape, norms.shape[-1]]}.")
    return norms, cosines


def _newton(cosines: Array, logs: Array, power: float, alpha: float, beta: Array) -> Array:
    """The β with β_i(Cβ)_i = exp(logs_i) β_i^power.

    The unknowns are relative steps δ, scaled by √e so that the matrix DCD/√e√e + I/α has no small eigenvalue.
    """
    tasks = len(beta)
    magnitudes = np.abs(cosines)
    previous = math.inf
    for round_ in range(STEPS):
        products, sizes = cosines @ beta, magnitudes @ beta
        wanted = np.exp(logs + power * np.log(beta))
        roots = np.sqrt(wanted)
        scaled = beta / roots
        right = (wanted - beta * products) / roots
        matrix = scaled[:, None] * cosines * scaled
        matrix.flat[:: tasks + 1] += 1.0 / alpha
        eta = np.linalg.solve(matrix, right)
        error = float((np.abs(right) * roots / (wanted + beta * sizes)).max())
        change = scaled * eta
        largest = float(np.abs(change / beta).max())
        if error <= 4 * EPS or (largest < 1e-3 and error >= previous):
            break  # at the level of rounding
        if largest < 0.1:
            beta, previous = beta + change, error
            continue
        if power != 0 and round_ < SWEEPS and largest > 10:
            # Tasks that have orders of magnitude to go would hold each other back on a common step.
            beta = _sweep(cosines, logs, alpha, beta)
            continue
        beta = beta + _length(cosines, logs, power, beta, products, change) * change
    return beta


def _sweep(cosines: Array, logs: Array, alpha: float, beta: Array) -> Array:
    """Every β_i in turn to where its own equation holds, the others kept: b + rest = k b^(−1/α)."""
    beta = beta.copy()
    for task, log in enumerate(logs.tolist()):
        rest = float(cosines[task] @ beta - cosines[task, task] * beta[task])
        low, high = -600.0, 600.0
        for _ in range(40):  # a start for Newton; five digits are plenty
            middle = 0.5 * (low + high)
            if math.exp(middle) + rest > math.exp(min(log - middle / alpha, 700.0)):
                high = middle
            else:
                low = middle
        beta[task] = math.exp(0.5 * (low + high))
    return beta


def _length(cosines: Array, logs: Array, power: float, beta: Array, products: Array, change: Array) -> float:
    """How far along a descent direction the convex potential falls, to a factor of two of its minimum."""
    images = cosines @ change
    start, curvature = float(change @ products), float(change @ images)
    shrinking = change < 0
    room = float((beta[shrinking] / -change[shrinking]).min()) if shrinking.any() else math.inf

    def slope(step: float) -> float:
        moved = np.exp(logs + (power - 1.0) * np.log(beta + step * change))
        return start + step * curvature - float(change @ moved)

    step = min(1.0, 0.99 * room)
    if slope(step) > 0:
        low, high = 0.0, step
        reference = abs(slope(0.0))
        for _ in range(60):
            step = 0.5 * (low + high)
            value = slope(step)
            if abs(value) <= 0.5 * reference:
                break
            low, high = (step, high) if value < 0 else (low, step)
        return step
    while 2 * step < 0.99 * room and step < 1e6 and slope(2 * step) < 0:
        step *= 2
    return step
