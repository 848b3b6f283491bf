"""The shortest vector in the convex hull of the task gradients, from their Gramian alone.

The problem is min αᵀGα over the simplex (Désidéri 2012; Sener & Koltun 2018, equation 3). It is solved in the
coordinates β_i = α_i‖g_i‖, in which the matrix C of cosines has a unit diagonal and neither scale nor ratio of the
norms matters: min βᵀCβ subject to cᵀβ = 1, β ≥ 0, with c_i = min‖g‖ / ‖g_i‖. A point is optimal exactly when
(Cβ)_i ≥ ν c_i for all i, with ν = βᵀCβ. On a support S the minimiser without the signs solves
(C_SS + hhᵀ) z = h, h = c_S / ‖c_S‖, up to a factor; that matrix is regular exactly when the gradients of S are
affinely independent.

Three solvers stand behind one another. `_pivot` starts from the full support and exchanges all violated signs at
once (block principal pivoting, Júdice & Pires 1994); `_pivot_batch` does it for many Gramians together. Where
gradients are affinely dependent, `_pivot_dependent` does the same with a pseudo-inverse and settles ties. `_wolfe`
adds one task at a time and never increases the norm (Wolfe 1976): slow, but it cannot cycle; it is also what the
tests hold the others against.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detente.geometry.gramian import ROUNDING, Array, check_semidefinite, unit_rows, validated

EPS = float(np.finfo(np.float64).eps)
# What is promised (see `simplex_residual`), and what the fast path must reach to be believed.
RESIDUAL = 1e-10
TRUSTED = 1e-13
# A signed condition counts as violated from here on, relative to the terms that were summed.
VIOLATED = 1e-14
# Solutions of the support's system grow to this size only if its gradients are affinely dependent to rounding.
SINGULAR = 1e11
# Exchanging everything at once takes 2 to 9 rounds; more means that it cycles.
ROUNDS = 15
# Exchanges of one task at a time for dependent gradients before Wolfe's method takes over.
EXCHANGES = 50


def minimum_norm_point(gramian: ArrayLike) -> Array:
    """Weights of the shortest vector in the convex hull of T gradients, exact for any T.

    min αᵀGα subject to α ≥ 0, Σα = 1 (Désidéri 2012; Sener & Koltun 2018, equation 3). The residual
    (:func:`simplex_residual`) is at rounding level, whatever the scale and the ratio of the norms and the rank; should
    rounding ever keep it from there, the best weights found are returned.

    Ties: if several weightings reach the shortest vector, the one with the smallest Σ α_i²‖g_i‖² is returned, so that
    equal gradients get equal weights and permuting the tasks permutes the weights. Gradients of zero length share the
    whole weight evenly: they are the shortest vector.

    Args:
        gramian: [T, T] or a batch [..., T, T], entry (i, j) is the inner product of the gradients of tasks i and j.

    Returns:
        [..., T] float64, non-negative, each row sums to 1.

    Raises:
        ValueError: not square, not finite, or not a Gramian (see :func:`detente.geometry.gramian.unit_rows`).

    Example:
        >>> minimum_norm_point([[1.0, 0.0], [0.0, 4.0]])
        array([0.8, 0.2])
    """
    gram = validated(gramian)
    tasks = gram.shape[-1]
    if tasks == 2:
        rows = list(map(_checked_pair, *gram.reshape(-1, 4).T.tolist()))
        return np.array(rows).reshape(gram.shape[:-1])
    norms, cosines = unit_rows(gram)
    if tasks == 1 or not norms.size:
        return np.ones(norms.shape)
    norms, cosines = norms.reshape(-1, tasks), cosines.reshape(-1, tasks, tasks)
    if norms.all():
        weights = _solve(norms, cosines)
    else:
        vanishing = norms == 0
        regular = ~vanishing.any(axis=-1)
        weights = vanishing / np.maximum(vanishing.sum(axis=-1, keepdims=True), 1)
        if regular.any():
            weights[regular] = _solve(norms[regular], cosines[regular])
    return np.asarray(weights.reshape(gram.shape[:-1]))


def frank_wolfe(gramian: ArrayLike, *, max_iterations: int = 250, tolerance: float = 1e-5) -> Array:
    """The same weights by the published iteration: a reference, and an option for comparisons.

    Algorithm 2 of Sener & Koltun 2018: from equal weights, step towards the task whose gradient has the smallest inner
    product with the current combination; the step is the exact two-point solution (their Algorithm 1), not clamped, so
    that a single task is reached. The paper stops when the step is "about 0" or after a number of iterations; here it
    stops when the weights change by less than ``tolerance`` in sum of absolute values, the rule of the public codes.

    The iteration is sublinear: after k steps ‖d‖² exceeds its minimum by up to 2 max‖g_i − g_j‖² / (k + 2).

    Args:
        gramian: [T, T].
        max_iterations: number of steps after which the current weights are returned.
        tolerance: stopping rule, absolute, on weights that sum to 1.

    Returns:
        [T] float64, non-negative, sums to 1.

    Raises:
        ValueError: not one Gramian; a negative tolerance or number of iterations.

    Example:
        >>> frank_wolfe([[1.0, 0.0], [0.0, 4.0]])
        array([0.8, 0.2])
    """
    if max_iterations < 0 or not tolerance >= 0:
        raise ValueError(
            f"max_iterations={max_iterations} and tolerance={tolerance} must not be negative in frank_wolfe."
        )
    gram = validated(gramian)
    if gram.ndim != 2:
        raise ValueError(f"frank_wolfe takes one Gramian [T, T], not a batch {list(gram.shape)}.")
    unit_rows(gram)
    weights = np.full(len(gram), 1.0 / len(gram))
    for _ in range(max_iterations):
        products = gram @ weights
        level = float(weights @ products)
        nearest = int(products.argmin())
        if products[nearest] >= level:
            break
        step, _rest = _pair(float(gram[nearest, nearest]), float(products[nearest]), level)
        change = 2 * step * (1 - float(weights[nearest]))
        weights *= 1 - step
        weights[nearest] += step
        if change < tolerance:
            break
    return np.asarray(weights / weights.sum())


def simplex_residual(gramian: ArrayLike, weights: ArrayLike) -> float | Array:
    """How far weights are from solving min αᵀGα over the simplex, relative and free of scale.

    With μ = αᵀGα the weights are optimal exactly when (Gα)_i ≥ μ for every task i, with equality where α_i > 0. Let
    r_i = ((Gα)_i − μ) / ((|G||α|)_i + |α|ᵀ|G||α|), the difference over the terms that were summed to compute it, and
    share_i = α_i‖g_i‖ / Σ_j|α_j|‖g_j‖. The residual is the largest of

    * −r_i, a task that ought to have more weight,
    * min(r_i, share_i), a task that ought to have less,
    * |Σα − 1|, −α_i and −share_i, weights off the simplex.

    Row i is measured by its own size, not by the largest gradient's, so that tasks a million times shorter or longer
    than the others count in full, and scaling all gradients changes nothing. About 1e-16 is rounding, 1 is as wrong
    as can be.

    Args:
        gramian: [..., T, T].
        weights: [..., T].

    Returns:
        A float for one Gramian, [...] for a batch.

    Raises:
        ValueError: not a Gramian, or shapes that do not belong together.

    Example:
        >>> simplex_residual([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5])
        0.0
        >>> simplex_residual([[1.0, 0.0], [0.0, 1.0]], [1.0, 0.0])
        1.0
    """
    gram = validated(gramian)
    alpha = np.asarray(weights, dtype=np.float64)
    if alpha.shape != gram.shape[:-1]:
        raise ValueError(
            f"weights of shape {list(alpha.shape)} do not belong to a Gramian {list(gram.shape)}."
        )
    norms, _ = unit_rows(gram)
    products = _times(gram, alpha)
    sizes = _times(np.abs(gram), np.abs(alpha))
    sizes += (np.abs(alpha) * sizes).sum(axis=-1, keepdims=True)
    differences = products - (alpha * products).sum(axis=-1, keepdims=True)
    relative = differences / np.where(sizes > 0, sizes, 1.0)
    terms = alpha * norms
    total = np.abs(terms).sum(axis=-1, keepdims=True)
    shares = terms / np.where(total > 0, total, 1.0)
    worst = np.maximum.reduce([-relative, np.minimum(relative, shares), -alpha, -shares]).max(axis=-1)
    residual = np.maximum(np.maximum(worst, np.abs(alpha.sum(axis=-1) - 1)), 0.0)
    return float(residual) if residual.ndim == 0 else residual


def _pair(first: float, product: float, second: float) -> tuple[float, float]:
    """The two weights for squared norms ``first``, ``second`` (Algorithm 1 of Sener & Koltun 2018), vertices exact.

    Both differences are those of the formula's two distances, so neither weight suffers from cancellation.
    """
    to_first, to_second = second - product, first - product
    if to_first > 0 and to_second > 0:
        return to_first / (to_first + to_second), to_second / (to_first + to_second)
    if first == second:
        return 0.5, 0.5
    return (1.0, 0.0) if first < second else (0.0, 1.0)


def _checked_pair(first: float, product: float, mirrored: float, second: float) -> tuple[float, float]:
    """The two weights for the entries of a 2 × 2 Gramian; `unit_rows`' checks without the cost of small arrays."""
    bound = (first**0.5 * second**0.5) if first >= 0 and second >= 0 else -1.0
    if not (abs(product - mirrored) <= ROUNDING * bound and abs(product) <= (1 + ROUNDING) * bound):
        unit_rows([[first, product], [mirrored, second]])  # raises with the reason, or tolerates it
    return _pair(first, 0.5 * (product + mirrored), second)


def _solve(norms: Array, cosines: Array) -> Array:
    """[B, T] weights for gradients of positive length."""
    limits: Array = norms.min(axis=-1, keepdims=True) / norms
    if len(limits) == 1:
        found = _pivot(cosines[0], limits[0])
        scaled = (_solve_dependent(cosines[0], limits[0]) if found is None else found)[None]
    else:
        scaled, trusted = _pivot_batch(cosines, limits)
        for index in np.flatnonzero(~trusted):
            scaled[index] = _solve_dependent(cosines[index], limits[index])
    weights: Array = scaled * limits
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def _solve_dependent(cosines: Array, limits: Array) -> Array:
    """[T] scaled weights where the fast path gave up."""
    tasks = len(limits)
    scaled = _pivot_dependent(cosines, limits)
    if scaled is not None and _residual(cosines, limits, scaled) <= TRUSTED * tasks:
        return scaled
    scaled = _wolfe(cosines, limits)
    residual = float(_residual(cosines, limits, scaled))
    if residual > RESIDUAL:
        check_semidefinite(cosines)
    # Every other solution lies on the same face of the hull; among those the tie rule chooses.
    gaps, sizes = _gaps(cosines, limits, scaled)
    face = np.flatnonzero(gaps < 16 * tasks * EPS * sizes)
    part = _pivot_dependent(cosines[np.ix_(face, face)], limits[face])
    if part is not None:
        settled = np.zeros(tasks)
        settled[face] = part
        if _residual(cosines, limits, settled) <= max(residual, TRUSTED):
            return settled
    return scaled


def _times(matrices: Array, vectors: Array) -> Array:
    return np.asarray(np.matmul(matrices, vectors[..., None])[..., 0])


def _probe(tasks: int) -> Array:
    """A right-hand side that no subspace is orthogonal to by design: its solution shows a singular system."""
    return np.asarray(np.sqrt(np.arange(tasks) + 0.7))


def _gaps(cosines: Array, limits: Array, scaled: Array) -> tuple[Array, Array]:
    """(Cβ)_i − ν c_i for non-negative β with cᵀβ = 1, and the terms that were summed to compute it."""
    products = _times(cosines, scaled)
    sizes = _times(np.abs(cosines), scaled)
    level = (scaled * products).sum(axis=-1, keepdims=True)
    return products - limits * level, sizes + limits * (scaled * sizes).sum(axis=-1, keepdims=True)


def _residual(cosines: Array, limits: Array, scaled: Array) -> Array:
    """`simplex_residual` for non-negative scaled weights with cᵀβ = 1."""
    gaps, sizes = _gaps(cosines, limits, scaled)
    shares = scaled / scaled.sum(axis=-1, keepdims=True)
    return np.asarray(np.maximum(-gaps / sizes, np.minimum(gaps / sizes, shares)).max(axis=-1))


def _pivot(cosines: Array, limits: Array) -> Array | None:
    """Block principal pivoting: [T] scaled weights, None where it cycles or the gradients are dependent."""
    tasks = len(limits)
    magnitudes, probe = np.abs(cosines), _probe(tasks)
    support = np.ones(tasks, dtype=bool)
    system, columns, sizes_of, bounds = cosines, cosines, magnitudes, limits
    for _ in range(ROUNDS):
        length = math.sqrt(bounds @ bounds)
        side = bounds / length
        sides = np.empty((len(side), 2))
        sides[:, 0] = side
        sides[:, 1] = probe[: len(side)]
        try:
            solutions = np.linalg.solve(system + side[:, None] * side, sides)
        except np.linalg.LinAlgError:
            return None
        if not np.vdot(solutions, solutions) < SINGULAR**2:
            return None
        candidate = solutions[:, 0]
        absolute = np.abs(candidate)
        thresholds = limits / length
        gaps = columns @ candidate - (1.0 - side @ candidate) * thresholds
        sizes = sizes_of @ absolute
        sizes += thresholds * (absolute @ sizes[support])
        wrong = gaps < -VIOLATED * sizes
        wrong[support] = candidate < 0
        if not np.count_nonzero(wrong):  # three times as fast as `any`
            if np.count_nonzero(np.where(support, np.abs(gaps), -gaps) > TRUSTED * sizes):
                return None
            scaled = np.zeros(tasks)
            scaled[support] = candidate
            return scaled
        support ^= wrong
        inside = np.flatnonzero(support)
        if not len(inside):
            return None
        columns, sizes_of, bounds = cosines[:, inside], magnitudes[:, inside], limits[inside]
        system = columns[inside]
    return None


def _pivot_batch(cosines: Array, limits: Array) -> tuple[Array, NDArray[np.bool_]]:
    """The same on a batch [B, T, T], rows outside a support replaced by the identity's.

    Returns [B, T] scaled weights, and [B] whether they can be trusted.
    """
    batch, tasks = limits.shape
    magnitudes, identity, probe = np.abs(cosines), np.eye(tasks), _probe(tasks)
    scaled, trusted = np.zeros((batch, tasks)), np.zeros(batch, dtype=bool)
    index = np.arange(batch)
    support = np.ones((batch, tasks), dtype=bool)
    for _ in range(ROUNDS):
        matrices, bounds = cosines[index], limits[index]
        inside = np.where(support, bounds, 0.0)
        length = np.sqrt((inside * inside).sum(axis=-1, keepdims=True))
        side = inside / length
        systems = matrices + side[:, :, None] * side[:, None, :]
        systems = np.where(support[:, :, None] & support[:, None, :], systems, identity)
        sides = np.empty((*side.shape, 2))
        sides[..., 0] = side
        sides[..., 1] = np.where(support, probe, 0.0)
        solutions = _solve_systems(systems, sides)
        regular = np.abs(solutions).max(axis=(1, 2)) < SINGULAR
        candidate = np.where(support & regular[:, None], solutions[..., 0], 0.0)
        absolute = np.abs(candidate)
        thresholds = bounds / length
        gaps = _times(matrices, candidate)
        gaps -= (1.0 - (side * candidate).sum(axis=-1, keepdims=True)) * thresholds
        sizes = _times(magnitudes[index], absolute)
        sizes += thresholds * (absolute * sizes).sum(axis=-1, keepdims=True)
        wrong = np.where(support, candidate < 0, gaps < -VIOLATED * sizes)
        settled = regular & ~wrong.any(axis=-1)
        scaled[index[settled]] = candidate[settled]
        off: NDArray[np.bool_] = np.where(support, np.abs(gaps), -gaps) > TRUSTED * sizes
        trusted[index[settled]] = ~off[settled].any(axis=-1)
        support = support ^ wrong
        going = regular & ~settled & support.any(axis=-1)
        if not going.any():
            break
        index, support = index[going], support[going]
    return scaled, trusted


def _solve_systems(systems: Array, sides: Array) -> Array:
    """Solutions of a batch of systems; infinite where one is exactly singular."""
    try:
        return np.asarray(np.linalg.solve(systems, sides))
    except np.linalg.LinAlgError:
        if len(systems) == 1:
            return np.full(sides.shape, np.inf)
        pairs = zip(systems, sides, strict=True)
        return np.concatenate([_solve_systems(system[None], side[None]) for system, side in pairs])


def _affine_minimiser(cosines: Array, limits: Array, support: NDArray[np.intp]) -> tuple[Array, Array, float]:
    """Shortest vector of the affine hull of a support, dependent gradients allowed.

    Adding δΣβ² to the problem, its solution is z + δ z' + …; returned are z (the smallest of all minimisers, up to a
    factor), z' and ‖c_S‖. What a Gramian in float64 cannot tell from a null direction is one.
    """
    inside = limits[support]
    length = float(np.sqrt(inside @ inside))
    side = inside / length
    system = cosines[np.ix_(support, support)] + np.outer(side, side)
    values, vectors = np.linalg.eigh(system)
    parts = vectors.T @ side
    floor = 2 * len(side) * EPS * values[-1]
    kept = (values > floor) | (np.abs(parts) > 4 * len(side) * EPS)
    values = np.where(values > floor, values, np.maximum(values, 0.0) + floor)[kept]
    basis = vectors[:, kept]
    first = basis @ (parts[kept] / values)
    # Eigenvectors mix long and short gradients; one refinement makes small entries right to rounding of themselves.
    first = first + basis @ ((basis.T @ (side - system @ first)) / values)
    second = -(basis @ ((basis.T @ first) / values))
    return first, second, length


def _pivot_dependent(cosines: Array, limits: Array) -> Array | None:
    """Block principal pivoting for the limit δ → 0 of the problem with δΣβ² added; None if it does not settle.

    The limit is unique, and its equations decide what is decided by rounding alone otherwise: a task outside the
    support whose condition holds with equality enters if that makes Σβ² smaller.
    """
    tasks = len(limits)
    support = np.ones(tasks, dtype=bool)
    for round_ in range(ROUNDS + EXCHANGES):
        inside = np.flatnonzero(support)
        first, second, length = _affine_minimiser(cosines, limits, inside)
        columns, thresholds = cosines[:, inside], limits / length
        side = thresholds[inside]
        gaps = columns @ first - (1.0 - side @ first) * thresholds
        slopes = columns @ second + (side @ second) * thresholds
        magnitudes = np.abs(columns)
        sizes = magnitudes @ np.abs(first) + thresholds * (1.0 + side @ np.abs(first))
        slope_sizes = magnitudes @ np.abs(second) + thresholds * (side @ np.abs(second))
        wrong = np.where(support, 0.0, _negativity(gaps, sizes, slopes, slope_sizes))
        wrong[inside] = _negativity(first, np.abs(first).max(), second, np.abs(second).max())
        if not wrong.any():
            scaled = np.zeros(tasks)
            scaled[inside] = np.maximum(first, 0.0)
            return np.asarray(scaled / (limits @ scaled))
        # Exchanging all at once is fast and may cycle; one at a time, the worst first, settles almost always.
        exchanged = wrong > 0 if round_ < ROUNDS else wrong == wrong.max()
        support = support ^ exchanged
        if not support.any():
            break
    return None


def _negativity(first: Array, size: Array, second: Array, second_size: Array) -> Array:
    """How negative first + δ second is for small δ, relative to sizes to whose rounding both are known.

    0 where it is not, up to 1 where only the second is, above 1 where the first is.
    """
    level = 64 * len(first) * EPS * size
    by_second = np.where((first < level) & (second < -1e-9 * second_size), -second / second_size, 0.0)
    return np.where(first < -level, 1.0 - first / size, by_second)


def _wolfe(cosines: Array, limits: Array) -> Array:
    """Wolfe's minimum-norm point: one task enters at a time, and the norm falls each time.

    A task whose entry brings no decrease (rounding) is set aside until another one does, so no support comes twice.
    The bound on the number of entries has never been met; if it were, the caller would see the residual.
    """
    tasks = len(limits)
    scaled = np.zeros(tasks)
    scaled[limits.argmax()] = 1.0 / limits.max()
    level = float(scaled @ cosines @ scaled)
    aside = np.zeros(tasks, dtype=bool)
    for _ in range(100 * tasks):
        gaps, sizes = _gaps(cosines, limits, scaled)
        slack = np.where(aside | (scaled > 0), 0.0, gaps / sizes)
        entering = int(slack.argmin())
        if slack[entering] >= -VIOLATED:
            break
        candidate = _descend(cosines, limits, scaled, entering)
        lower = float(candidate @ cosines @ candidate)
        if lower < level:
            scaled, level, aside = candidate, lower, np.zeros(tasks, dtype=bool)
        else:
            aside[entering] = True
    return scaled


def _descend(cosines: Array, limits: Array, scaled: Array, entering: int) -> Array:
    """The shortest vector over the support and one more task, tasks that reach weight zero leaving on the way."""
    current = scaled.copy()
    support = current > 0
    support[entering] = True
    while True:
        inside = np.flatnonzero(support)
        target = np.zeros(len(limits))
        target[inside] = _affine_minimiser(cosines, limits, inside)[0]
        target /= limits @ target
        leaving = support & (target <= 0)
        if not leaving.any():
            return target
        steps = np.full(len(limits), np.inf)
        steps[leaving] = current[leaving] / (current[leaving] - target[leaving])
        first = int(steps.argmin())
        current += steps[first] * (target - current)
        current[first] = 0.0
        support &= current > 0
        if not support.any():
            return scaled
