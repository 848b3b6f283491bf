"""Minimisers of ½xᵀCx + qᵀx over x ≥ 0, C a matrix of cosines: non-negative least squares below `dual_cone`.

A point is optimal exactly when y = Cx + q ≥ 0 and x_i y_i = 0. With C = RᵀR this is ‖Rx + s‖² for q = Rᵀs, which
scipy's active-set solver takes (Lawson & Hanson 1974, chapter 23); for any other q it is the distance to a set of half-
spaces, which the same solver takes with one more row. R is a Cholesky factor for independent gradients and a root of
the eigenvalues above rounding for others, so that near-dependent gradients enter with their angle, not with its square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from detente.geometry.gramian import Array

EPS = float(np.finfo(np.float64).eps)
# A signed condition counts as violated from here on.
VIOLATED = 1e-14
# A unit gradient that keeps this distance from the span of those before it: no subset is singular to rounding.
INDEPENDENT = 1e-3
# A squared length below this times T and the terms summed for it cannot be told from zero (as for `mgda`).
NOTHING = 16 * EPS
# Where no progress is possible any more, a violation up to here is rounding.
ACCEPTED = 1e-11

Support = NDArray[np.bool_]


@dataclass(frozen=True)
class Root:
    """A factor of a matrix of cosines, split where gradients cancel.

    Gradients of which a positive combination is zero to rounding leave no room along themselves: every vector that
    hurts none of them is orthogonal to all. They are solved for apart, because otherwise rounding decides what is left,
    with weights without bound.

    Attributes:
        matrix: [r, T], R with RᵀR = C to rounding.
        regular: the unit gradients are linearly independent well beyond rounding; then r = T.
        cancelling: [T], True for gradients in the span of those that cancel.
        span: [r, k], an orthonormal basis of that span.

    Example:
        >>> root_of(np.eye(2)).nearest(np.array([-1.0, 1.0]))
        array([1., 0.])
    """

    matrix: Array
    regular: bool
    cancelling: Support
    span: Array

    def nearest(self, side: Array) -> Array:
        """Minimise ‖Rx + s‖ over x ≥ 0.

        Args:
            side: [r], s.

        Returns:
            [T] non-negative.
        """
        if not self.cancelling.any():
            return _nonnegative(self.matrix, -side)
        solution = np.zeros(self.matrix.shape[1])
        rest = self.matrix[:, ~self.cancelling]
        if rest.size:
            solution[~self.cancelling] = _nonnegative(self._across(rest), -self._across(side))
        along = self.span.T @ self.matrix[:, self.cancelling]
        solution[self.cancelling] = _nonnegative(along, -self.span.T @ (side + self.matrix @ solution))
        return solution

    def above(self, heights: Array, scale: float) -> Array | None:
        """Minimise ½xᵀCx − hᵀx over x ≥ 0: Rx is the shortest vector whose products with the columns of R are ≥ h.

        Args:
            heights: [T], h.
            scale: the expected length of Rx, above 0; a solution ten million times longer is not seen.

        Returns:
            [T] non-negative, or None where no vector reaches the heights.
        """
        stacked = np.vstack([self.matrix, heights / scale])
        shares = _nonnegative(stacked, _last(len(stacked)))
        rest = 1.0 - float(stacked[-1] @ shares)
        if rest <= 64 * len(stacked) * EPS:
            return None
        return np.asarray(shares * (scale / rest))

    def _across(self, vectors: Array) -> Array:
        return np.asarray(vectors - self.span @ (self.span.T @ vectors))


def root_of(cosines: Array) -> Root:
    """Factor a matrix of cosines, and set apart the gradients that cancel.

    Args:
        cosines: [T, T], symmetric; what is negative of it to rounding counts as zero.

    Example:
        >>> root_of(np.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])).cancelling.tolist()
        [True, True, False]
    """
    tasks = len(cosines)
    nothing = np.zeros(tasks, dtype=bool)
    try:
        factor = np.linalg.cholesky(cosines)
        if factor.diagonal().min() > INDEPENDENT:
            return Root(np.asarray(factor.T), True, nothing, np.zeros((tasks, 0)))
    except np.linalg.LinAlgError:
        pass
    values, vectors = np.linalg.eigh(cosines)
    kept = values > 8 * tasks * EPS * values[-1]
    matrix = np.sqrt(values[kept])[:, None] * vectors[:, kept].T
    matrix[:, cosines.diagonal() == 0] = 0.0  # rounding would be a column like any other
    return _split(Root(matrix, False, nothing, np.zeros((len(matrix), 0))))


def _split(root: Root) -> Root:
    """Set the gradients apart of which a positive combination is shorter than rounding can tell."""
    matrix = root.matrix
    floor = math.sqrt(NOTHING * matrix.shape[1])
    lengths = np.linalg.norm(matrix, axis=0)
    remaining, apart = lengths > floor, np.zeros(matrix.shape[1], dtype=bool)
    while remaining.any():
        columns = np.flatnonzero(remaining)
        members = _cancelling(root._across(matrix[:, columns]) / floor)
        if not len(members):
            break
        members = columns[members]
        apart[members] = True
        # They are one more than the dimensions they span.
        left, singular, _ = np.linalg.svd(root._across(matrix[:, members]), full_matrices=False)
        spanned = left[:, : len(members) - 1][:, singular[: len(members) - 1] > floor * singular[0]]
        root = replace(root, span=np.hstack([root.span, spanned]))
        inside = np.linalg.norm(root._across(matrix), axis=0) <= floor
        apart |= inside & (lengths > floor)
        remaining &= ~apart
    return replace(root, cancelling=apart)


def _cancelling(columns: Array) -> NDArray[np.intp]:
    """Columns of which a positive combination is shorter than its sum, none of them to spare; empty without any."""

    def shares_of(some: Array) -> Array:
        stacked = np.vstack([some, np.ones(some.shape[1])])
        shares = _nonnegative(stacked, _last(len(stacked)))
        return shares if np.linalg.norm(some @ shares) <= shares.sum() else np.zeros_like(shares)

    shares = shares_of(columns)
    members = np.flatnonzero(shares)
    # A column that the others can do without may only correct what cannot be told.
    for column in members[np.argsort(shares[members])]:
        others = members[members != column]
        if len(others) > 1 and shares_of(columns[:, others]).any():
            members = others
    return members


def independent(cosines: Array) -> bool:
    """True if unit gradients are linearly independent well beyond rounding.

    Args:
        cosines: [T, T].

    Example:
        >>> independent(np.eye(2)), independent(np.ones((2, 2)))
        (True, False)
    """
    try:
        return bool(np.linalg.cholesky(cosines).diagonal().min() > INDEPENDENT)
    except np.linalg.LinAlgError:
        return False


def residual(cosines: Array, linear: Array, sizes: Array, solution: Array) -> float:
    """Largest violation of y ≥ 0 and of y_i = 0 where x_i > 0, for y = Cx + q.

    Relative to the terms that were summed, so that it is free of scale.

    Args:
        cosines: [T, T], symmetric.
        linear: [T] or [B, T], q of one problem or of B with the same C.
        sizes: as ``linear``, the terms that were summed to compute q, as magnitudes.
        solution: as ``linear``, x.
    """
    gaps = solution @ cosines + linear
    unsigned = np.abs(solution) @ np.abs(cosines) + sizes
    wrong = np.where(solution > 0, np.abs(gaps), -gaps) / np.where(unsigned > 0, unsigned, 1.0)
    return max(float(wrong.max()), 0.0)


def shortest(cosines: Array, linear: Array, sizes: Array, solution: Array) -> Array:
    """Of all minimisers the one of smallest length, if a few attempts find it.

    Equal gradients then get equal shares, so that permuting the tasks permutes the solution.
    """
    unsigned = np.abs(cosines) @ solution + sizes
    accuracy = max(residual(cosines, linear, sizes, solution), VIOLATED * 10)
    face = np.flatnonzero((solution > 0) | (cosines @ solution + linear <= accuracy * unsigned))
    if len(face) == np.count_nonzero(solution):
        return solution  # the only one: gradients of a support are independent
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


def _last(size: int) -> Array:
    """The last unit vector."""
    return np.asarray(np.eye(1, size, size - 1)[0])


def _nonnegative(matrix: Array, target: Array) -> Array:
    """Minimise ‖Ax − b‖ over x ≥ 0; where scipy's first iteration finds no end, by its second one."""
    from scipy.optimize import lsq_linear, nnls

    try:
        return np.asarray(nnls(matrix, target, maxiter=30 * matrix.shape[1])[0])
    except RuntimeError:
        solution = lsq_linear(matrix, target, bounds=(0.0, np.inf), method="bvls", tol=VIOLATED).x
        return np.where(
            solution > ACCEPTED * solution.max(), solution, 0.0
        )  # a bound is met to rounding there
