"""The solvers written by hand that scipy's non-negative least squares replaced, kept to be measured against it.

Block principal pivoting for independent gradients, for one problem and for many at once (Júdice & Pires 1994); one task
at a time for dependent ones (Goldfarb & Idnani 1983), which finds no answer where gradients cancel up to rounding.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from detente.geometry.gramian import Array
from detente.geometry.nonnegative import ACCEPTED, EPS, VIOLATED, Support, independent, shortest

# Up to so many tasks, a whole system is solved sooner than a part of it is cut out.
SMALL = 12


def minimisers(cosines: Array, linears: Array, sizes: Array) -> Array | None:
    """[B, T] minimisers of ½xᵀCx + qᵀx over x ≥ 0 for B linear terms [B, T]; None where one is not found."""
    solutions = np.zeros_like(linears)
    rows: NDArray[np.intp] = np.flatnonzero((linears < 0).any(axis=1))
    regular = independent(cosines)
    if regular and len(rows) > 1:
        rows = _pivot_together(cosines, linears, sizes, solutions)
    for row in rows:
        found = pivot(cosines, linears[row], sizes[row], linears[row] < 0) if regular else None
        if found is None:
            found = add_one_by_one(cosines, linears[row], sizes[row])
            if found is None:
                return None
            found = shortest(cosines, linears[row], sizes[row], found)
        solutions[row] = found
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
