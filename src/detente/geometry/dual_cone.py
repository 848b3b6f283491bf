"""The vector nearest to a given combination of gradients that helps every task by a given amount.

d(t) = argmin ‖d − g₀‖ subject to ⟨g_i, d⟩ ≥ t for all i, with g₀ = Σ p_i g_i. Its solution is d = g₀ + Σ v_i g_i with
v ≥ 0, ⟨g_i, d⟩ ≥ t and equality where v_i > 0. Four methods are this one problem and differ in what fixes t:

* DualProj: t = 0, the projection of the mean gradient onto the dual cone {d: ⟨g_i, d⟩ ≥ 0}; UPGrad: the same for each
  gradient alone (Quinton & Rey 2024).
* CAGrad: ‖d − g₀‖ = c‖g₀‖ (Liu et al. 2021, equation 3, whose dual is the problem over the simplex).
* SDMGrad: Σ v_i = 1/λ (Xiao et al. 2023, equation 9: then λv minimises ‖g_w + λg₀‖² over the simplex).

Both ‖d − g₀‖ and Σ v_i grow with t, so the last two are one equation in one unknown. On a support S,
x = C_SS⁻¹(τ c_S − q_S) in the coordinates x_i = v_i‖g_i‖ that make C a matrix of cosines, with c_i = min‖g‖ / ‖g_i‖ and
q = C(p‖g‖): the fast path chooses τ and exchanges the wrong signs together; where that does not settle, τ is
bracketed, and each trial value is an ordinary problem of `pivoting`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from detente.geometry.gramian import Array, unit_rows
from detente.geometry.pivoting import (
    ACCEPTED,
    EPS,
    VIOLATED,
    Support,
    add_one_by_one,
    independent,
    nonnegative_minimiser,
    nonnegative_minimisers,
    pivot,
    residual,
    shortest,
)
from detente.geometry.simplex import minimum_norm_point

# A squared length below this times T and the terms summed for it cannot be told from zero (as for `mgda`).
NOTHING = 16 * EPS
NO_PREFERENCE = np.zeros(0)


@dataclass(frozen=True)
class Nearest:
    """A vector d = Σ weights_i g_i with ⟨g_i, d⟩ ≥ level for all i.

    Attributes:
        weights: [T].
        level: t, in the unit of a squared gradient.
        vanishes: True if d is zero to rounding.

    Example:
        >>> dual_cone_projection([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5]).weights
        array([0.5, 0.5])
    """

    weights: Array
    level: float
    vanishes: bool


def dual_cone_projection(gramian: ArrayLike, preference: ArrayLike) -> Nearest:
    """Projection of Σ p_i g_i onto the dual cone {d: ⟨g_i, d⟩ ≥ 0 for all i}.

    Args:
        gramian: [T, T], entry (i, j) is the inner product of the gradients of tasks i and j.
        preference: [T] non-negative p.

    Returns:
        The projection; its weights are never below p. It vanishes exactly when 0 is a positive combination of the
        gradients that p names, with others added if need be.

    Raises:
        ValueError: not a Gramian, or a negative preference.

    Example:
        >>> dual_cone_projection([[1.0, -1.0], [-1.0, 2.0]], [1.0, 0.0]).weights
        array([1. , 0.5])
    """
    norms, cosines, given = _prepare(gramian, preference)
    longest = float(norms.max())
    if longest == 0:
        return Nearest(given, 0.0, True)
    start = given * (norms / longest)
    linear, sizes = cosines @ start, np.abs(cosines) @ start
    solution = nonnegative_minimiser(cosines, linear, sizes)
    gaps = linear + cosines @ solution
    unsigned = sizes + np.abs(cosines) @ solution
    vanishes = bool((gaps[start > 0] <= NOTHING * len(norms) * unsigned[start > 0]).all())
    return Nearest(given + _over(solution, norms / longest), 0.0, vanishes)


def dual_cone_projections(gramian: ArrayLike) -> tuple[Array, bool]:
    """Projection of every gradient alone onto the dual cone of all.

    Args:
        gramian: [T, T].

    Returns:
        [T, T] whose row t holds the weights of the projection of g_t, and whether all of them vanish to rounding. Rows
        that do are reported as they are, not as zeros.

    Raises:
        ValueError: not a Gramian.

    Example:
        >>> dual_cone_projections([[1.0, -1.0], [-1.0, 2.0]])[0]
        array([[1. , 0.5],
               [1. , 1. ]])
    """
    norms, cosines, _ = _prepare(gramian, NO_PREFERENCE)
    tasks = len(norms)
    if (cosines >= 0).all():
        return np.eye(tasks), not norms.any()
    present = np.flatnonzero(norms)
    if len(present) < tasks:  # a zero gradient asks for nothing and gives nothing
        part = np.ix_(present, present)
        transform = np.eye(tasks)
        transform[part], vanishes = _projections(norms[present], cosines[part])
        return transform, vanishes
    return _projections(norms, cosines)


def _projections(norms: Array, cosines: Array) -> tuple[Array, bool]:
    """Weights of the projections of gradients of positive length, and whether all vanish."""
    magnitudes, regular = np.abs(cosines), independent(cosines)
    scaled = None if regular else _all_vanish(cosines)
    if scaled is None:
        scaled = nonnegative_minimisers(cosines, cosines, magnitudes, regular=regular)
    own = scaled.copy()
    own.flat[:: len(own) + 1] += 1.0
    vanishes = False
    if not regular:
        sizes = (own @ magnitudes).diagonal()
        vanishes = bool(((own @ cosines).diagonal() <= NOTHING * len(own) * sizes).all())
    relative = norms / norms.max()
    scaled *= relative[:, None] / relative
    scaled.flat[:: len(own) + 1] += 1.0
    return scaled, vanishes


def conflict_averse(gramian: ArrayLike, preference: ArrayLike, radius: float) -> Nearest:
    """The vector within ``radius`` ‖g₀‖ of g₀ = Σ p_i g_i that helps the task helped least as much as possible.

    max_d min_i ⟨g_i, d⟩ subject to ‖d − g₀‖ ≤ c‖g₀‖ (Liu et al. 2021, equation 3). The paper's dual is
    min over the simplex of ⟨g_w, g₀⟩ + c‖g₀‖‖g_w‖; weights − p is proportional to its w. Where 0 lies in the hull of
    the gradients and the ball reaches the dual cone, the dual's w has g_w = 0 and the paper's formula divides 0 by 0;
    of the many d that are then optimal the one nearest to g₀ is returned.

    Args:
        gramian: [T, T].
        preference: [T] non-negative p, 1/T each in the paper.
        radius: c ≥ 0.

    Returns:
        The vector; ``level`` is the optimal value min_i ⟨g_i, d⟩.

    Raises:
        ValueError: not a Gramian, or a negative preference or radius.

    Example:
        >>> conflict_averse([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5], 0.5).weights
        array([0.75, 0.75])
    """
    norms, cosines, given = _prepare(gramian, preference)
    if not 0 <= radius < math.inf:
        raise ValueError(f"radius={radius} must be a finite number >= 0.")
    problem = _Problem(norms, cosines, given)
    if problem.centre_vanishes or radius == 0:
        return problem.nearest(np.zeros(len(norms)), problem.least)
    target = radius * problem.distance
    dependent = norms.min() == 0 or not independent(cosines)
    if dependent and hull_holds_zero(cosines):
        return _capped(problem, target)
    return problem.nearest(*_at_distance(problem, target))


def directed(gramian: ArrayLike, preference: ArrayLike, strength: float) -> Array:
    """Weights w over the simplex that minimise ‖g_w + λg₀‖² with g₀ = Σ p_i g_i (Xiao et al. 2023, equation 9).

    Args:
        gramian: [T, T].
        preference: [T] non-negative p, 1/T each in the paper.
        strength: λ ≥ 0; 0 is the minimum-norm point.

    Returns:
        [T] non-negative, sums to 1.

    Raises:
        ValueError: not a Gramian, or a negative preference or strength.

    Example:
        >>> directed([[1.0, 0.0], [0.0, 4.0]], [0.5, 0.5], 0.0)
        array([0.8, 0.2])
    """
    norms, cosines, given = _prepare(gramian, preference)
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength={strength} must be a finite number >= 0.")
    tasks = len(norms)
    if strength == 0 or tasks == 1 or norms.max() == 0:
        return minimum_norm_point(gramian)
    problem = _Problem(norms, cosines, given)
    lifted = None
    if (norms.min() == 0 or not independent(cosines)) and hull_holds_zero(cosines):
        # Weights of zero length cost nothing: they take what the projection onto the dual cone leaves of the simplex.
        lifted = nonnegative_minimiser(cosines, problem.linear, problem.sizes)
        wanted = strength * _over(lifted, problem.norms)
        if wanted.sum() <= 1:
            return np.asarray(wanted + (1 - wanted.sum()) * minimum_norm_point(gramian))
    weights = np.zeros(tasks)
    present = problem.present()
    ceiling = None if lifted is None else lifted[norms > 0]
    found = _with_total(present, present.shortest / present.longest / strength, ceiling)[0] * present.limits
    weights[norms > 0] = found / found.sum()
    return weights


# ---- the problem in scaled coordinates


class _Problem:
    """One problem: cosines C, q = C(p‖g‖) and c, with all lengths relative to the longest gradient."""

    def __init__(self, norms: Array, cosines: Array, given: Array) -> None:
        self.longest = float(norms.max()) or 1.0
        self.norms, self.cosines, self.given = norms / self.longest, cosines, given
        start = given * self.norms
        self.magnitudes = np.abs(cosines)
        self.linear, self.sizes = cosines @ start, self.magnitudes @ start
        square = max(float(start @ self.linear), 0.0)
        self.distance = math.sqrt(square)  # ‖g₀‖
        self.centre_vanishes = square <= NOTHING * len(norms) * float(start @ self.sizes)
        self.shortest = float(norms.min())
        self.limits = self.shortest / self.longest / self.norms if self.shortest > 0 else np.zeros(len(norms))
        with np.errstate(divide="ignore"):
            self.least = float((self.linear / self.limits).min()) if self.shortest > 0 else 0.0

    def present(self) -> _Problem:
        """The same without tasks whose gradient is zero."""
        inside = np.flatnonzero(self.norms)
        if len(inside) == len(self.norms):
            return self
        part = np.ix_(inside, inside)
        return _Problem(self.norms[inside] * self.longest, self.cosines[part], self.given[inside])

    def at(self, level: float) -> tuple[Array, Array]:
        """Q − τc, and the terms that were summed for it."""
        return self.linear - level * self.limits, self.sizes + abs(level) * self.limits

    def nearest(self, solution: Array, level: float) -> Nearest:
        """The result in the caller's coordinates."""
        weights = self.given + _over(solution, self.norms)
        total = self.given * self.norms + solution
        square = float(total @ self.cosines @ total)
        vanishes = square <= NOTHING * len(total) * float(total @ self.magnitudes @ total)
        return Nearest(weights, level * self.shortest * self.longest, vanishes)


# How far along the slope: from C_SS, the centre, and cᵀ slope (which is also the slope's squared length).
Closure = Callable[[Array, Array, float], float]
Measure = Callable[[Array], float]


def _at_distance(problem: _Problem, target: float) -> tuple[Array, float]:
    """The x and τ with ‖Σ x_i u_i‖ = target."""

    def closure(system: Array, centre: Array, steepness: float) -> float:
        spare = target**2 - float(centre @ system @ centre)
        return math.sqrt(max(spare, 0.0) / steepness)

    def excess(solution: Array) -> float:
        return math.sqrt(max(float(solution @ problem.cosines @ solution), 0.0)) - target

    return _settle(problem, closure, excess)


def _with_total(problem: _Problem, total: float, ceiling: Array | None) -> tuple[Array, float]:
    """The x and τ with cᵀx = total; ``ceiling`` is x at τ = 0 where no larger τ has a solution."""

    def closure(system: Array, centre: Array, steepness: float) -> float:
        return total / steepness

    def excess(solution: Array) -> float:
        return float(problem.limits @ solution) - total

    return _settle(problem, closure, excess, ceiling)


def _settle(
    problem: _Problem, closure: Closure, excess: Measure, ceiling: Array | None = None
) -> tuple[Array, float]:
    if not independent(problem.cosines):
        solution, level = _bracket(problem, closure, excess, ceiling, regular=False)
        even = shortest(problem.cosines, *problem.at(level), solution)
        kept = abs(excess(even)) <= VIOLATED * abs(excess(np.zeros(len(even))))
        return (even if kept else solution), level
    support = np.ones(len(problem.limits), dtype=bool)
    for _ in range(12):
        found = _on_support(problem, support, closure)
        if found is None:
            break
        wrong, _ = _judge(problem, support, *found)
        if not wrong.any():
            return found
        support ^= wrong
    return _bracket(problem, closure, excess, ceiling, regular=True)


def _on_support(problem: _Problem, support: Support, closure: Closure) -> tuple[Array, float] | None:
    """The x and τ if the support is right: x = centre + s · slope, cᵀ centre = 0, with s from the closure."""
    inside = np.flatnonzero(support)
    system, limits = problem.cosines[np.ix_(inside, inside)], problem.limits[inside]
    try:
        solved = np.linalg.solve(system, np.stack((limits, problem.linear[inside]), axis=1))
    except np.linalg.LinAlgError:
        return None
    slope, rest = solved[:, 0], solved[:, 1]
    steepness = float(limits @ slope)
    if not steepness > 0:
        return None
    lowest = float(limits @ rest) / steepness
    centre = lowest * slope - rest
    step = closure(system, centre, steepness)
    solution = np.zeros(len(support))
    solution[inside] = centre + step * slope
    return solution, lowest + step


def _judge(problem: _Problem, support: Support, solution: Array, level: float) -> tuple[Support, float]:
    """Which signs are wrong, and the largest violation."""
    linear, sizes = problem.at(level)
    absolute = np.abs(solution)
    unsigned = problem.magnitudes @ absolute + sizes
    gaps = problem.cosines @ solution + linear
    wrong = np.where(support, solution < 0, gaps < -VIOLATED * unsigned)
    sizes = np.where(unsigned > 0, unsigned, 1.0)
    missed = (np.where(support, np.abs(gaps), -gaps) / sizes).max()
    return wrong, max(float(missed), -float(solution.min()) / (float(absolute.max()) or 1.0))


def _bracket(
    problem: _Problem, closure: Closure, excess: Measure, ceiling: Array | None, *, regular: bool
) -> tuple[Array, float]:
    """The same, safe: a bracket on τ, with the support at each trial value as a guess of the final one.

    Raises:
        ValueError: it never comes near the conditions.
    """
    low, below = problem.least, np.zeros(len(problem.limits))
    high, above = (math.inf, None) if ceiling is None else (0.0, ceiling)
    support = problem.linear <= low * problem.limits
    best, reached, smallest = below, low, math.inf
    step, slow = abs(low) or float(problem.sizes.max()), 0
    for _ in range(200):
        guess = math.nan
        candidate = _on_support(problem, support, closure) if support.any() else None
        if candidate is not None:
            wrong, violation = _judge(problem, support, *candidate)
            guess = candidate[1]
            if violation < smallest:
                best, reached, smallest = np.maximum(candidate[0], 0.0), guess, violation
            if violation <= ACCEPTED and not wrong.any():
                return np.maximum(candidate[0], 0.0), guess
        width = high - low
        if low < guess < high and slow < 3:
            level = guess
        elif math.isinf(high):
            level, step = low + step, 2 * step
        else:
            level = 0.5 * (low + high)
        linear, sizes = problem.at(level)
        if not low < level < high or (width * problem.limits <= EPS * sizes).all():
            break
        found = pivot(problem.cosines, linear, sizes, support) if regular else None
        found = add_one_by_one(problem.cosines, linear, sizes) if found is None else found
        if found is None or excess(found) >= 0:
            high, above = level, found
        else:
            low, below = level, found
        slow = 0 if high - low < 0.5 * width else slow + 1
        if found is not None:
            support = found > 0
    if above is not None:
        # Dependent gradients: at one τ many x are right, and what is asked for lies between two of them.
        span = excess(above) - excess(below)
        mixed = below + (-excess(below) / span if span > 0 else 0.0) * (above - below)
        violation = residual(problem.cosines, *problem.at(high), mixed)
        if violation < smallest:
            best, reached, smallest = mixed, high, violation
    if smallest > 1e3 * ACCEPTED:
        raise ValueError(
            f"the conditions of the problem with {len(support)} tasks are met to {smallest:.1e} only: the matrix is "
            "not positive semidefinite to rounding, so it is not a Gramian."
        )
    return best, reached


# ---- where zero lies in the hull


def hull_holds_zero(cosines: Array) -> bool:
    """True if the convex hull of unit gradients holds 0 to rounding.

    Args:
        cosines: [T, T] inner products of the gradients scaled to unit length.
    """
    weights = minimum_norm_point(cosines)
    return bool(weights @ cosines @ weights <= NOTHING * len(weights) * (weights @ np.abs(cosines) @ weights))


def _all_vanish(cosines: Array) -> Array | None:
    """Row t: x ≥ 0 with u_t + Σ x_i u_i = 0, where a vanishing positive combination spans everything; None elsewhere.

    All projections onto the dual cone are then zero, and T problems are one linear system.
    """
    tasks = len(cosines)
    shares = minimum_norm_point(cosines)
    if float(shares @ cosines @ shares) > NOTHING * tasks * float(shares @ np.abs(cosines) @ shares):
        return None
    inside = np.flatnonzero(shares > 1e-9 * shares.max())
    values, vectors = np.linalg.eigh(cosines[np.ix_(inside, inside)])
    kept = values > 32 * tasks * EPS * values[-1]
    basis = vectors[:, kept]
    solution = np.zeros((tasks, tasks))
    solution[:, inside] = (-cosines[:, inside] @ basis / values[kept]) @ basis.T
    own = solution + np.eye(tasks)
    if (np.abs(own @ cosines) > ACCEPTED * (np.abs(own) @ np.abs(cosines))).any():
        return None  # the support spans less
    lift = np.maximum(-solution[:, inside] / shares[inside], 0.0).max(axis=1)
    return np.asarray(np.maximum(solution + lift[:, None] * shares, 0.0))


def _capped(problem: _Problem, target: float) -> Nearest:
    """CAGrad where no direction helps every task: level zero if the ball reaches it, a negative one otherwise."""
    lifted = nonnegative_minimiser(problem.cosines, problem.linear, problem.sizes)
    if math.sqrt(max(float(lifted @ problem.cosines @ lifted), 0.0)) <= target:
        return problem.nearest(lifted, 0.0)
    # Tasks without gradient hold at every level below zero.
    present = problem.present()
    found = present.nearest(*_at_distance(present, target))
    weights = problem.given.copy()
    weights[problem.norms > 0] = found.weights
    return Nearest(weights, found.level, found.vanishes)


# ---- small things


def _prepare(gramian: ArrayLike, preference: ArrayLike) -> tuple[Array, Array, Array]:
    norms, cosines = unit_rows(gramian)
    if norms.ndim != 1:
        raise ValueError(f"give one Gramian [T, T], not a batch {[*norms.shape, norms.shape[-1]]}.")
    given = np.array(preference, dtype=np.float64)
    if given.size and (given.shape != norms.shape or not (given >= 0).all()):
        raise ValueError(f"preference must hold {len(norms)} numbers >= 0, not {given.tolist()}.")
    return norms, cosines, given


def _over(values: Array, lengths: Array) -> Array:
    """Values / lengths, 0 where a length is 0."""
    return np.asarray(np.divide(values, lengths, out=np.zeros(np.shape(values)), where=lengths > 0))
