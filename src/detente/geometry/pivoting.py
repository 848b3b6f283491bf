"""Minimisers of ½xᵀCx + qᵀx over x ≥ 0, C a matrix of cosines: the solvers below `dual_cone`.

A point is optimal exactly when y = Cx + q ≥ 0 and x_i y_i = 0. Given the support of x, x solves a linear system.

`pivot` (one problem) and `nonnegative_minimisers` (many at once) are for independent gradients: where the signs of x
inside or of y outside are wrong, tasks are exchanged, all at once while that brings the number of wrong signs down,
one at a time otherwise, which cannot cycle for a positive definite matrix (Júdice & Pires 1994; Murty 1974).
`add_one_by_one` is for dependent gradients: one task at a time enters a support that stays independent (Goldfarb &
Idnani 1983), and the objective falls each time. Every threshold is relative to the terms that were summed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from detente.geometry.gramian import Array

EPS = float(np.finfo(np.float64).eps)
# A signed condition counts as violated from here on.
VIOLATED = 1e-14
# A unit gradient that keeps this distance from the span of those before it: no subset is singular to rounding.
INDEPENDENT = 1e-3
# The same, if what follows is held against the conditions.
BARELY = 1e-5
# Where no progress is possible any more, a violation up to here is rounding.
ACCEPTED = 1e-11
# Added to the diagonal of a singular matrix to guess a support.
RIDGE = 1e-9
# Up to so many tasks, a whole system is solved sooner than a part of it is cut out.
SMALL = 12
# Batches are solved this many float64 numbers at a time, so that they stay in the cache.
CHUNK = 1 << 19

Support = NDArray[np.bool_]


def independent(cosines: Array, distance: float = INDEPENDENT) -> bool:
    """True if the unit gradients are linearly independent well beyond rounding.

    Args:
        cosines: [T, T] inner products of the gradients scaled to unit length.
        distance: what every unit gradient must keep from the span of those before it.
    """
    try:
        return bool(np.linalg.cholesky(cosines).diagonal().min() > distance)
    except np.linalg.LinAlgError:
        return False


def nonnegative_minimiser(cosines: Array, linear: Array, sizes: Array) -> Array:
    """X ≥ 0 that minimises ½xᵀCx + qᵀx; of several the shortest, where that is found at once.

    Args:
        cosines: [T, T] symmetric positive semidefinite, q in its range.
        linear: [T], q.
        sizes: [T], the terms that were summed to compute q, as magnitudes.

    Returns:
        [T] non-negative.

    Raises:
        ValueError: no x reaches the conditions; then the matrix is not positive semidefinite.

    Example:
        >>> nonnegative_minimiser(np.eye(2), np.array([-1.0, 1.0]), np.ones(2))
        array([1., 0.])
    """
    if not (linear < 0).any():
        return np.zeros(len(linear))
    found = pivot(cosines, linear, sizes, linear < 0) if independent(cosines) else None
    return _dependent(cosines, linear, sizes) if found is None else found


def nonnegative_minimisers(cosines: Array, linears: Array, sizes: Array, *, regular: bool) -> Array:
    """The same for B problems with one matrix, solved together.

    Args:
        cosines: [T, T], shared by the problems.
        linears: [B, T] linear terms.
        sizes: [B, T], as for one problem.
        regular: what :func:`independent` says of the matrix.

    Returns:
        [B, T] solutions.
    """
    rows, tasks = linears.shape
    solutions = np.zeros((rows, tasks))
    # Of dependent gradients, a ridge gives the support in most cases; what it gives is held against the conditions.
    matrix = cosines if regular or independent(cosines, BARELY) else cosines + RIDGE * np.eye(tasks)
    chunk = max(1, CHUNK // (tasks * tasks))
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        for row in start + _pivot_together(matrix, linears[part], sizes[part], solutions[part]):
            found = pivot(cosines, linears[row], sizes[row], linears[row] < 0) if regular else None
            solutions[row] = _dependent(cosines, linears[row], sizes[row]) if found is None else found
    if not regular:
        for row in np.flatnonzero((linears < 0).any(axis=1)):
            solutions[row] = _settled(cosines, linears[row], sizes[row], solutions[row])
    return solutions


def pivot(matrix: Array, linear: Array, sizes: Array, start: Support) -> Array | None:
    """X for a positive definite matrix, from a guess of its support.

    Block principal pivoting: entries that turn negative leave the support, tasks whose condition is violated
    enter it, all at once. None if rounding keeps it from settling.
    """
    tasks = len(linear)
    magnitudes, support = np.abs(matrix), start.copy()
    fewest, patience = tasks + 1, 8
    for _ in range(60 + tasks):
        inside = np.flatnonzero(support)
        columns = matrix[:, inside]
        try:
            values = np.linalg.solve(columns[inside], -linear[inside])
        except np.linalg.LinAlgError:
            return None
        wrong = columns @ values + linear < -VIOLATED * (magnitudes[:, inside] @ np.abs(values) + sizes)
        wrong[inside] = values < 0
        count = int(wrong.sum())
        if count == 0:
            solution = np.zeros(tasks)
            solution[inside] = values
            return solution
        if count < fewest:
            fewest, patience = count, 8
        elif patience > 0:
            patience -= 1
        else:
            last = int(np.flatnonzero(wrong)[-1])
            wrong[:] = False
            wrong[last] = True
        support ^= wrong
    return None


def residual(cosines: Array, linear: Array, sizes: Array, solution: Array) -> float:
    """Largest violation of y ≥ 0 and of y_i = 0 where x_i > 0, for y = Cx + q.

    Relative to the terms that were summed, so that it is free of scale.
    """
    gaps = cosines @ solution + linear
    unsigned = np.abs(cosines) @ np.abs(solution) + sizes
    wrong = np.where(solution > 0, np.abs(gaps), -gaps) / np.where(unsigned > 0, unsigned, 1.0)
    return max(float(wrong.max()), 0.0)


def add_one_by_one(cosines: Array, linear: Array, sizes: Array) -> Array | None:
    """X for a semidefinite matrix, with a support of independent gradients.

    Tasks enter one at a time, so that it ends whatever the ties. None if there is no minimiser.
    """
    tasks = len(linear)
    magnitudes = np.abs(cosines)
    solution, support = np.zeros(tasks), np.zeros(tasks, dtype=bool)
    aside, level = support.copy(), 0.0
    for _ in range(100 * tasks):
        gaps, unsigned = cosines @ solution + linear, magnitudes @ solution + sizes
        slack = np.where(support | aside, 0.0, gaps / np.where(unsigned > 0, unsigned, 1.0))
        entering = int(slack.argmin())
        if slack[entering] >= -VIOLATED:
            break
        found = _enter(cosines, linear, solution, support, entering)
        if found is None:
            if slack[entering] < -ACCEPTED:
                return None
            aside[entering] = True
            continue
        lower = float(found[0] @ (0.5 * (cosines @ found[0]) + linear))
        if lower < level:
            (solution, support), level = found, lower
            aside[:] = False
        else:
            aside[entering] = True
    return solution


def _enter(
    cosines: Array, linear: Array, solution: Array, support: Support, entering: int
) -> tuple[Array, Support] | None:
    """Raise x of one task until its condition holds, tasks that reach zero leaving; None if that never happens."""
    current, support = solution.copy(), support.copy()
    while True:
        inside = np.flatnonzero(support)
        column = cosines[inside, entering]
        try:
            change = np.linalg.solve(cosines[np.ix_(inside, inside)], column)
        except np.linalg.LinAlgError:
            return None
        rest = float(cosines[entering, entering] - column @ change)
        shrinking = change > 0
        room = np.where(shrinking, current[inside] / np.where(shrinking, change, 1.0), np.inf)
        first = int(room.argmin()) if len(room) else -1
        partial = float(room[first]) if len(room) else np.inf
        full = np.inf
        if rest > 8 * len(linear) * EPS * (1.0 + np.abs(column) @ np.abs(change)):
            full = max(-float(cosines[entering] @ current + linear[entering]) / rest, 0.0)
        if not np.isfinite(min(full, partial)):
            return None
        if full <= partial:
            support[entering] = True
            inside = np.flatnonzero(support)
            current = np.zeros(len(linear))
            try:
                current[inside] = np.linalg.solve(cosines[np.ix_(inside, inside)], -linear[inside])
            except np.linalg.LinAlgError:
                return None
            return np.maximum(current, 0.0), support & (current > 0)
        current[inside] -= partial * change
        current[entering] += partial
        support[inside[first]] = False
        current[inside[first]] = 0.0


def shortest(cosines: Array, linear: Array, sizes: Array, solution: Array) -> Array:
    """Of all minimisers the one of smallest length, if a few attempts find it.

    Equal gradients then get equal shares, so that permuting the tasks permutes the solution.
    """
    unsigned = np.abs(cosines) @ solution + sizes
    accuracy = max(residual(cosines, linear, sizes, solution), VIOLATED * 10)
    face = np.flatnonzero((solution > 0) | (cosines @ solution + linear <= accuracy * unsigned))
    for _ in range(5):
        if not len(face):
            break
        values, vectors = np.linalg.eigh(cosines[np.ix_(face, face)])
        kept = vectors[:, values > 8 * len(face) * EPS * values[-1]]
        shares = np.zeros(len(solution))
        shares[face] = kept @ (kept.T @ solution[face])
        if shares.min() >= -ACCEPTED * np.abs(shares).max():
            shares = np.maximum(shares, 0.0)
            return shares if residual(cosines, linear, sizes, shares) <= accuracy else solution
        face = (
            face[(shares[face] > 0) | (solution[face] > 0)] if (shares[solution > 0] > 0).all() else face[:0]
        )
    return solution


def _settled(cosines: Array, linear: Array, sizes: Array, guess: Array) -> Array:
    """The guess, or the values on its support, if that meets the conditions; from scratch otherwise."""
    accuracy = 10 * VIOLATED * len(linear)
    if residual(cosines, linear, sizes, guess) <= accuracy:
        return guess
    inside = np.flatnonzero(guess > 0)
    if len(inside):
        values, vectors = np.linalg.eigh(cosines[np.ix_(inside, inside)])
        kept = values > 8 * len(inside) * EPS * values[-1]
        basis = vectors[:, kept]
        solution = np.zeros(len(linear))
        solution[inside] = np.maximum(basis @ ((basis.T @ -linear[inside]) / values[kept]), 0.0)
        if residual(cosines, linear, sizes, solution) <= accuracy:
            return solution
    return _dependent(cosines, linear, sizes)


def _dependent(cosines: Array, linear: Array, sizes: Array) -> Array:
    found = add_one_by_one(cosines, linear, sizes)
    if found is None:
        raise ValueError(
            f"a problem with {len(cosines)} tasks that always has a solution has none: the matrix is not positive "
            "semidefinite to rounding, so it is not a Gramian."
        )
    return shortest(cosines, linear, sizes, found)


def _pivot_together(cosines: Array, linears: Array, sizes: Array, out: Array) -> NDArray[np.intp]:
    """Block pivoting of B problems at once.

    Returns the problems that did not settle.
    """
    magnitudes = np.abs(cosines)
    index = np.arange(len(linears))
    support = linears < 0 if len(cosines) <= SMALL else _guess(cosines, magnitudes, linears)
    for _ in range(12):
        current = linears[index]
        values = _on_supports(cosines, current, support)
        unsigned = np.abs(values) @ magnitudes + sizes[index]
        wrong = np.where(support, values < 0, values @ cosines + current < -VIOLATED * unsigned)
        going = wrong.any(axis=1)
        if not going.any():
            out[index] = values
            return index[:0]
        out[index[~going]] = values[~going]
        index, support = index[going], support[going] ^ wrong[going]
    return index


def _guess(cosines: Array, magnitudes: Array, linears: Array) -> Support:
    """Supports after some projected gradient steps of all problems: each is one product of matrices."""
    step = 1.0 / float(magnitudes.sum(axis=0).max())
    values = np.maximum(-linears, 0.0)
    for _ in range(8):
        values = np.maximum(values - step * (values @ cosines + linears), 0.0)
    return np.asarray(values > 0)


def _on_supports(cosines: Array, linears: Array, support: Support) -> Array:
    """[B, T] solutions of the systems on B supports."""
    if len(cosines) <= SMALL:
        both = support[:, :, None] & support[:, None, :]
        systems = np.where(both, cosines, np.eye(len(cosines)))
        return np.asarray(np.linalg.solve(systems, np.where(support, -linears, 0.0)[..., None])[..., 0])
    tasks = len(cosines)
    values = np.zeros((len(linears), tasks + 1))
    counts = support.sum(axis=1)
    width = int(counts.max())
    if width:
        # Supports are packed to the left; what they leave of the width points at an appended row of zeros.
        order = np.argsort(~support, axis=1, kind="stable")[:, :width]
        empty = np.arange(width) >= counts[:, None]
        order[empty] = tasks
        padded = np.zeros((tasks + 1, tasks + 1))
        padded[:tasks, :tasks] = cosines
        systems = padded.ravel().take(order[:, :, None] * (tasks + 1) + order[:, None, :])
        systems[:, range(width), range(width)] += empty
        rows = np.arange(len(linears))[:, None]
        values[:, :tasks] = -linears
        sides = values[rows, order]
        values[:] = 0.0
        values[rows, order] = np.linalg.solve(systems, sides[..., None])[..., 0]
    return values[:, :tasks]
