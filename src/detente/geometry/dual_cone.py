"""The vector nearest to a given combination of gradients that helps every task by a given amount.

d(t) = argmin ‖d − g₀‖ subject to ⟨g_i, d⟩ ≥ t for all i, with g₀ = Σ p_i g_i. Its solution is d = g₀ + Σ v_i g_i with
v ≥ 0, ⟨g_i, d⟩ ≥ t and equality where v_i > 0. Four methods are this one problem and differ in what fixes t:

* DualProj: t = 0, the projection of the mean gradient onto the dual cone {d: ⟨g_i, d⟩ ≥ 0}; UPGrad: the same for each
  gradient alone (Quinton & Rey 2024).
* CAGrad: ‖d − g₀‖ = c‖g₀‖ (Liu et al. 2021, equation 3, whose dual is the problem over the simplex).
* SDMGrad: Σ v_i = 1/λ (Xiao et al. 2023, equation 9: then λv minimises ‖g_w + λg₀‖² over the simplex).

Both ‖d − g₀‖ and Σ v_i grow with t, so the last two are one equation in one unknown. On a support S,
x = C_SS⁻¹(τ c_S − q_S) in the coordinates x_i = v_i‖g_i‖ that make C a matrix of cosines, with c_i = min‖g‖ / ‖g_i‖ and
q = C(p‖g‖). A support suggests τ, τ is bracketed, and the problem at each trial value (`nonnegative`) has the next
support.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from detente.geometry.gramian import Array, check_semidefinite, unit_rows
from detente.geometry.nonnegative import (
    EPS,
    NOTHING,
    VIOLATED,
    Root,
    Support,
    residual,
    root_of,
    shortest,
)
from detente.geometry.simplex import RESIDUAL, minimum_norm_point

# The residual at which a support is the right one.
SETTLED = 1e-13
NO_PREFERENCE = np.zeros(0)


@dataclass(frozen=True)
class Nearest:
    """A vector d = Σ weights_i g_i with ⟨g_i, d⟩ ≥ level for all i.

    Attributes:
        weights: [T].
        level: t, in the unit of a squared gradient.
        vanishes: True if d is zero to rounding.
        residual: largest violation of the conditions of the problem, relative to the terms summed in them.

    Example:
        >>> dual_cone_projection([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5]).weights
        array([0.5, 0.5])
    """

    weights: Array
    level: float
    vanishes: bool
    residual: float


@dataclass(frozen=True)
class Projections:
    """The projection of every gradient alone onto the dual cone of all.

    Attributes:
        transform: [T, T], row t holds the weights of the projection of g_t.
        vanishes: True if all projections are zero to rounding; their rows are reported as they are, not as zeros.
        residual: as in :class:`Nearest`, the largest of the T problems.

    Example:
        >>> dual_cone_projections([[1.0, 0.0], [0.0, 1.0]]).residual
        0.0
    """

    transform: Array
    vanishes: bool
    residual: float


@dataclass(frozen=True)
class Directed:
    """Weights over the simplex, and how well they solve their problem.

    Attributes:
        weights: [T] non-negative, sums to 1.
        residual: as in :class:`Nearest`.

    Example:
        >>> directed([[1.0, 0.0], [0.0, 4.0]], [0.5, 0.5], 0.0).weights
        array([0.8, 0.2])
    """

    weights: Array
    residual: float


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
        return Nearest(given, 0.0, True, 0.0)
    start = given * (norms / longest)
    linear, sizes = cosines @ start, np.abs(cosines) @ start
    solution = _lift(root_of(cosines), cosines, start) if (linear < 0).any() else np.zeros(len(norms))
    gaps = linear + cosines @ solution
    unsigned = sizes + np.abs(cosines) @ solution
    vanishes = bool((gaps[start > 0] <= NOTHING * len(norms) * unsigned[start > 0]).all())
    missed = _accounted(cosines, residual(cosines, linear, sizes, solution))
    return Nearest(given + _over(solution, norms / longest), 0.0, vanishes, missed)


def dual_cone_projections(gramian: ArrayLike) -> Projections:
    """Projection of every gradient alone onto the dual cone of all.

    Args:
        gramian: [T, T].

    Returns:
        The projections' weights. All vanish exactly when 0 is a strictly positive combination of the gradients.

    Raises:
        ValueError: not a Gramian.

    Example:
        >>> dual_cone_projections([[1.0, -1.0], [-1.0, 2.0]]).transform
        array([[1. , 0.5],
               [1. , 1. ]])
    """
    norms, cosines, _ = _prepare(gramian, NO_PREFERENCE)
    own = np.eye(len(norms))
    conflicting = np.flatnonzero((cosines < 0).any(axis=1))
    if not len(conflicting):
        return Projections(own, not norms.any(), 0.0)
    magnitudes, root = np.abs(cosines), root_of(cosines)
    scaled = np.zeros_like(cosines)
    for task in conflicting:
        scaled[task] = root.nearest(root.matrix[:, task])
        if not root.regular:
            scaled[task] = shortest(cosines, cosines[task], magnitudes[task], scaled[task])
    missed = _accounted(cosines, residual(cosines, cosines, magnitudes, scaled))
    own += scaled
    sizes = (own @ magnitudes).diagonal()
    vanishes = not root.regular and bool(((own @ cosines).diagonal() <= NOTHING * len(own) * sizes).all())
    relative = norms / norms.max()
    transform = np.eye(len(norms)) + _over(scaled * relative[:, None], relative)
    return Projections(transform, vanishes, missed)


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
        return problem.nearest(np.zeros(len(norms)), problem.least, 0.0)
    target = radius * problem.distance
    if problem.holds_zero:
        return _capped(problem, target)
    solution = _at_distance(problem, target)
    return problem.nearest(solution.values, solution.level, solution.missed)


def directed(gramian: ArrayLike, preference: ArrayLike, strength: float) -> Directed:
    """Weights w over the simplex that minimise ‖g_w + λg₀‖² with g₀ = Σ p_i g_i (Xiao et al. 2023, equation 9).

    Args:
        gramian: [T, T].
        preference: [T] non-negative p, 1/T each in the paper.
        strength: λ ≥ 0; 0 is the minimum-norm point.

    Raises:
        ValueError: not a Gramian, or a negative preference or strength.

    Example:
        >>> directed([[1.0, 0.0], [0.0, 1.0]], [1.0, 0.0], 0.5).weights
        array([0.25, 0.75])
    """
    norms, cosines, given = _prepare(gramian, preference)
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength={strength} must be a finite number >= 0.")
    if strength == 0 or len(norms) == 1 or norms.max() == 0:
        weights = minimum_norm_point(gramian)
    else:
        weights = _directed(gramian, _Problem(norms, cosines, given), strength)
    terms = norms / (float(norms.max()) or 1.0)
    total = (weights + strength * given) * terms
    products, sizes = terms * (cosines @ total), terms * (np.abs(cosines) @ total)
    violation = float(weights @ products) - products
    summed = sizes + float(weights @ sizes)
    missed = max(float((violation / np.where(summed > 0, summed, 1.0)).max()), 0.0)
    return Directed(weights, _accounted(cosines, missed))


def _directed(gramian: ArrayLike, problem: _Problem, strength: float) -> Array:
    lifted = None
    if problem.holds_zero:
        # Weights of zero length cost nothing: they take what the projection onto the dual cone leaves of the simplex.
        lifted = problem.lift()
        wanted = strength * _over(lifted, problem.norms)
        if wanted.sum() <= 1:
            return np.asarray(wanted + (1 - wanted.sum()) * minimum_norm_point(gramian))
    present, inside = problem.present(), problem.norms > 0
    ceiling = None if lifted is None else lifted[inside]
    solution = _with_total(present, present.shortest / present.longest / strength, ceiling)
    weights = np.zeros(len(inside))
    weights[inside] = solution.values * present.limits
    return np.asarray(weights / weights.sum())


# ---- the problem in scaled coordinates


@dataclass(frozen=True)
class _Solution:
    """An x with its τ, and by how much it misses its conditions."""

    values: Array
    level: float
    missed: float


class _Problem:
    """One problem: cosines C, q = C(p‖g‖) and c, with all lengths relative to the longest gradient."""

    def __init__(self, norms: Array, cosines: Array, given: Array) -> None:
        self.longest = float(norms.max()) or 1.0
        self.norms, self.cosines, self.given = norms / self.longest, cosines, given
        self.start = given * self.norms
        self.magnitudes = np.abs(cosines)
        self.linear, self.sizes = cosines @ self.start, self.magnitudes @ self.start
        square = max(float(self.start @ self.linear), 0.0)
        self.distance = math.sqrt(square)  # ‖g₀‖
        self.centre_vanishes = square <= NOTHING * len(norms) * float(self.start @ self.sizes)
        self.shortest = float(norms.min())
        self.limits = self.shortest / self.longest / self.norms if self.shortest > 0 else np.zeros(len(norms))
        with np.errstate(divide="ignore"):
            self.least = float((self.linear / self.limits).min()) if self.shortest > 0 else 0.0

    @cached_property
    def root(self) -> Root:
        """The factor of C."""
        return root_of(self.cosines)

    @property
    def holds_zero(self) -> bool:
        """0 lies in the convex hull of the gradients to rounding."""
        return self.shortest == 0 or bool(self.root.cancelling.any())

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

    def length(self, solution: Array) -> float:
        """‖Σ x_i u_i‖ from the factor: a square would lose half of the digits where gradients cancel."""
        return float(np.linalg.norm(self.root.matrix @ solution))

    def lift(self) -> Array:
        """The x at τ = 0."""
        return _lift(self.root, self.cosines, self.start)

    def missed(self, solution: Array, level: float) -> float:
        """Residual of an x and its τ."""
        return residual(self.cosines, *self.at(level), solution)

    def nearest(self, solution: Array, level: float, missed: float) -> Nearest:
        """The result in the caller's coordinates."""
        weights = self.given + _over(solution, self.norms)
        total = self.start + solution
        square = float(total @ self.cosines @ total)
        vanishes = square <= NOTHING * len(total) * float(total @ self.magnitudes @ total)
        return Nearest(
            weights, level * self.shortest * self.longest, vanishes, _accounted(self.cosines, missed)
        )


def _lift(root: Root, cosines: Array, start: Array) -> Array:
    """The x ≥ 0 that takes Σ start_i u_i to its projection onto the dual cone; of several the shortest."""
    solution = root.nearest(root.matrix @ start)
    if root.regular:
        return solution
    return shortest(cosines, cosines @ start, np.abs(cosines) @ start, solution)


# How far along the slope: from C_SS, the centre, and cᵀ slope (which is also the slope's squared length).
Closure = Callable[[Array, Array, float], float]


@dataclass(frozen=True)
class _Goal:
    """What fixes τ: its closure on a support, by how much an x exceeds it, and the size of the terms summed."""

    closure: Closure
    excess: Callable[[Array], float]
    size: Callable[[Array], float]

    def missed(self, solution: Array) -> float:
        """Distance from the goal, relative to the terms summed."""
        return abs(self.excess(solution)) / self.size(solution)


def _at_distance(problem: _Problem, target: float, ceiling: Array | None = None) -> _Solution:
    """The x and τ with ‖Σ x_i u_i‖ = target; ``ceiling`` is x at τ = 0 where no larger τ has a solution."""

    def closure(system: Array, centre: Array, steepness: float) -> float:
        spare = target**2 - float(centre @ system @ centre)
        return math.sqrt(max(spare, 0.0) / steepness)

    def excess(solution: Array) -> float:
        return problem.length(solution) - target

    def size(solution: Array) -> float:
        return float(solution.sum()) + target  # of vectors of unit length

    return _settle(problem, _Goal(closure, excess, size), ceiling)


def _with_total(problem: _Problem, total: float, ceiling: Array | None) -> _Solution:
    """The x and τ with cᵀx = total; ``ceiling`` as above."""

    def closure(system: Array, centre: Array, steepness: float) -> float:
        return total / steepness

    def excess(solution: Array) -> float:
        return float(problem.limits @ solution) - total

    return _settle(problem, _Goal(closure, excess, lambda _: total), ceiling)


def _settle(problem: _Problem, goal: _Goal, ceiling: Array | None) -> _Solution:
    solution = _bracket(problem, goal, ceiling)
    if problem.root.regular:
        return solution
    even = shortest(problem.cosines, *problem.at(solution.level), solution.values)
    if goal.missed(even) <= max(VIOLATED, goal.missed(solution.values)):
        return _judged(problem, goal, even, solution.level)
    return solution


def _judged(problem: _Problem, goal: _Goal, values: Array, level: float) -> _Solution:
    return _Solution(values, level, max(problem.missed(values, level), goal.missed(values)))


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


def _bracket(problem: _Problem, goal: _Goal, ceiling: Array | None) -> _Solution:
    """Bracket τ, with the support at each trial value as a guess of the final one.

    Where rounding hides the answer, the best point there is.
    """
    scale = problem.distance or 1.0
    low, below = problem.least, np.zeros(len(problem.limits))
    high, above = (math.inf, None) if ceiling is None else (0.0, ceiling)
    support = (problem.linear <= low * problem.limits) | problem.root.regular
    best = _judged(problem, goal, below, low)
    step, slow = abs(low) or float(problem.sizes.max()), 0
    for _ in range(200):
        guess = math.nan
        candidate = _on_support(problem, support, goal.closure) if support.any() else None
        if candidate is not None:
            values, guess = candidate
            judged = _judged(problem, goal, np.maximum(values, 0.0), guess)
            best = min(best, judged, key=lambda solution: solution.missed)
            if values.min() >= 0 and judged.missed <= SETTLED:
                return judged
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
        trial = problem.root.above(-linear, scale)
        if trial is None or goal.excess(trial) >= 0:
            high, above = level, trial
        else:
            low, below = level, trial
        slow = 0 if high - low < 0.5 * width else slow + 1
        if trial is not None:
            support = trial > 0
    candidates = [best, _judged(problem, goal, below, low)]
    if above is not None:
        # Dependent gradients: at one τ many x are right, and what is asked for lies between two of them.
        span = goal.excess(above) - goal.excess(below)
        mixed = below + (-goal.excess(below) / span if span > 0 else 0.0) * (above - below)
        candidates.append(_judged(problem, goal, mixed, high))
    return min(candidates, key=lambda solution: solution.missed)


def _capped(problem: _Problem, target: float) -> Nearest:
    """CAGrad where no direction helps every task: level zero if the ball reaches it, a negative one otherwise."""
    lifted = problem.lift()
    if problem.length(lifted) <= target:
        return problem.nearest(lifted, 0.0, problem.missed(lifted, 0.0))
    # Tasks without gradient hold at every level below zero.
    present, inside = problem.present(), problem.norms > 0
    solution = _at_distance(present, target, lifted[inside])
    nearest = present.nearest(solution.values, solution.level, solution.missed)
    weights = problem.given.copy()
    weights[inside] = nearest.weights
    return replace(nearest, weights=weights)


def _prepare(gramian: ArrayLike, preference: ArrayLike) -> tuple[Array, Array, Array]:
    norms, cosines = unit_rows(gramian)
    if norms.ndim != 1:
        raise ValueError(f"give one Gramian [T, T], not a batch {[*norms.shape, norms.shape[-1]]}.")
    given = np.array(preference, dtype=np.float64)
    if given.size and (given.shape != norms.shape or not (given >= 0).all()):
        raise ValueError(f"preference must hold {len(norms)} numbers >= 0, not {given.tolist()}.")
    return norms, cosines, given


def _accounted(cosines: Array, missed: float) -> float:
    """The residual, or the error that the matrix has no gradients, where that is why a solution misses."""
    if missed > RESIDUAL:
        check_semidefinite(cosines)
    return missed


def _over(values: Array, lengths: Array) -> Array:
    """Values / lengths, 0 where a length is 0."""
    return np.asarray(np.divide(values, lengths, out=np.zeros(np.shape(values)), where=lengths > 0))
