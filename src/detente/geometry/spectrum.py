"""Eigenvalues of a Gramian, its rank, and the condition number of the gradients.

An ordinary eigenvalue routine is right to a machine epsilon of the LARGEST eigenvalue: of gradients whose norms differ
by 1e6 it leaves three or four digits of the smallest. Two tasks have a closed form. Otherwise that routine serves where
the eigenvalues turn out to lie within a factor of a thousand; elsewhere the Gramian is factored, rows of long gradients
before short ones, G = LLᵀ, and the singular values of that graded factor are taken. They are right to a few machine
epsilons of themselves times the condition of the gradients scaled to unit length, whatever the norms (Demmel &
Veselić 1992 say why a scaled matrix decides; the tests hold values and vectors against 50-digit arithmetic).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detente.geometry.gramian import EPS, Array, condition_of_two, spectrum_of_two, unit_rows

# A gradient of unit length that keeps this distance from the span of the others needs no second look.
CLEARLY_INDEPENDENT = 1e-4
# An ordinary routine is right to machine epsilon over this, relative to the smallest eigenvalue: twelve digits or more,
# at less cost. A ratio of the norms below the root of it rules that out beforehand.
WELL_CONDITIONED = 1e-3
WELL_SCALED = WELL_CONDITIONED**0.5


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and eigenvectors of a Gramian G = V diag(values) Vᵀ, largest first.

    Attributes:
        values: [T] eigenvalues, descending, never negative: squares of the gradient matrix' singular values.
        vectors: [T, T] orthonormal eigenvectors in columns, in the order of ``values``. Their signs are arbitrary.
        rank: number of eigenvalues above the tolerance; the first ``rank`` are the ones kept.

    Example:
        >>> spectrum([[4.0, 0.0], [0.0, 0.0]]).rank
        1
    """

    values: Array
    vectors: Array
    rank: int


def spectrum(gramian: ArrayLike, rank_tolerance: float | None = None) -> Spectrum:
    """Eigenvalues of a Gramian, small ones as accurate as large ones, and how many count.

    Args:
        gramian: [T, T], entry (i, j) is the inner product of the gradients of tasks i and j.
        rank_tolerance: an eigenvalue counts if it is larger than this times the largest one. None: T times the machine
            epsilon of float64 (2.2e-16), the level of rounding in the Gramian.

    Returns:
        A :class:`Spectrum`; of a zero matrix with rank 0.

    Raises:
        ValueError: not one Gramian, or a tolerance outside [0, 1).

    Example:
        >>> found = spectrum([[1e12, 0.0], [0.0, 1.0]])
        >>> found.values.tolist(), found.rank
        ([1000000000000.0, 1.0], 2)
        >>> spectrum([[1e12, 0.0], [0.0, 1.0]], rank_tolerance=1e-8).rank
        1
    """
    values, vectors = _decompose(gramian)
    if rank_tolerance is None:
        rank_tolerance = len(values) * EPS
    if not 0 <= rank_tolerance < 1:
        raise ValueError(f"rank_tolerance={rank_tolerance} must be at least 0 and below 1 (or None).")
    return Spectrum(values, vectors, int((values > rank_tolerance * values[0]).sum()))


def condition_number(gramian: ArrayLike) -> float:
    """Largest over smallest singular value of the T gradients (Senushkin et al. 2023, equation 2).

    1 for orthogonal gradients of equal length, the best there is; the paper trains well below about 10. Infinite where
    the gradients are linearly dependent: more tasks than parameters, a zero gradient, two parallel ones. That is judged
    on the gradients scaled to unit length, so that a large ratio of the norms alone never counts as dependence.

    Args:
        gramian: [T, T].

    Returns:
        A float of at least 1, or infinity.

    Raises:
        ValueError: not one Gramian.

    Example:
        >>> condition_number([[9.0, 0.0], [0.0, 1.0]])
        3.0
    """
    return condition_of_rows(*_single(gramian))


def condition_of_rows(norms: Array, cosines: Array) -> float:
    """The condition number of gradients given by their norms [T] and cosines [T, T], as ``unit_rows`` gives them.

    Example:
        >>> condition_of_rows(np.array([3.0, 1.0]), np.eye(2))
        3.0
    """
    longest = norms.max()
    if norms.min() == 0:
        return math.inf
    if len(norms) == 2:
        return condition_of_two(norms, float(cosines[0, 1]))
    order, factor = _factor(norms / longest, cosines)
    if factor.shape[1] < len(norms):
        return math.inf
    singular = np.linalg.svd((norms[order] / longest)[:, None] * factor, compute_uv=False)
    return math.inf if singular[-1] == 0 else max(1.0, float(singular[0] / singular[-1]))


def _decompose_two(norms: Array, cosine: float) -> tuple[Array, Array]:
    """Eigenvalues descending and eigenvectors of two tasks: the vectors stand at half the angle of (a² - b², 2abc)."""
    b, a = sorted(norms.tolist())  # from the longer one, the angle is small where the lengths differ much
    angle = math.atan2(2 * a * b * cosine, (a - b) * (a + b)) / 2
    largest, area = spectrum_of_two(norms, cosine)
    smallest = area * area / largest
    along, across = math.cos(angle), math.sin(angle)
    longer, shorter = [along, -across], [across, along]
    vectors = [longer, shorter] if norms[0] >= norms[1] else [shorter, longer]
    return np.array([largest, min(smallest, largest)]), np.array(vectors)


def _single(gramian: ArrayLike) -> tuple[Array, Array]:
    """Norms and cosines of one Gramian."""
    norms, cosines = unit_rows(gramian)
    if norms.ndim != 1:
        raise ValueError(
            f"the spectrum takes one Gramian [T, T], not a batch {[*norms.shape, norms.shape[-1]]}."
        )
    return norms, cosines


def _decompose(gramian: ArrayLike) -> tuple[Array, Array]:
    """Eigenvalues descending, and eigenvectors."""
    norms, cosines = _single(gramian)
    tasks, longest = len(norms), norms.max()
    if longest == 0:
        return np.zeros(tasks), np.eye(tasks)
    scaled = norms / longest
    if tasks == 2:
        values, vectors = _decompose_two(scaled, float(cosines[0, 1]))
        return values * longest**2, vectors
    if scaled.min() > WELL_SCALED:
        values, vectors = np.linalg.eigh(scaled[:, None] * cosines * scaled)
        if values[0] > WELL_CONDITIONED * values[-1]:
            return values[::-1] * longest**2, vectors[:, ::-1]
    order, factor = _factor(scaled, cosines)
    left, singular, _ = np.linalg.svd(scaled[order][:, None] * factor)
    values = np.zeros(tasks)
    values[: len(singular)] = (singular * longest) ** 2
    vectors = np.empty((tasks, tasks))
    vectors[order] = left
    return values, vectors


def _factor(norms: Array, cosines: Array) -> tuple[NDArray[np.intp], Array]:
    """An order of the tasks and L [T, r] with LLᵀ = C in that order; r rows of C are independent to rounding.

    The rows of diag(norms) L go from long to short: only then are its small singular values accurate.
    """
    order = np.argsort(-norms, kind="stable")
    ordered = cosines[order[:, None], order]
    factor: Array | None = None
    try:
        factor = np.asarray(np.linalg.cholesky(ordered), dtype=np.float64)
        if np.diagonal(factor).min() > CLEARLY_INDEPENDENT:
            return order, factor
    except np.linalg.LinAlgError:
        pass
    values = np.linalg.eigvalsh(ordered)
    rank = int((values > 8 * len(values) * EPS * values[-1]).sum())
    if factor is not None and rank == len(values):
        return order, factor
    return _factor_dependent(norms, cosines, rank)


def _factor_dependent(norms: Array, cosines: Array, rank: int) -> tuple[NDArray[np.intp], Array]:
    """Cholesky factor with complete pivoting: of what is left, the longest comes next."""
    rest = cosines.copy()
    remaining = np.ones(len(rest), dtype=bool)
    chosen, columns = [], []
    for _ in range(rank):
        left = np.where(remaining, np.diagonal(rest), 0.0)
        # Beside the largest remainder of a gradient of unit length, rounding does not count, however long the gradient.
        left[left < 1e-6 * left.max()] = 0.0
        if not left.max() > 0:  # the eigenvalues saw rounding where the elimination leaves nothing
            break
        task = int((left * norms**2).argmax())
        column = rest[:, task] / np.sqrt(left[task])
        column[~remaining] = 0.0
        rest -= np.outer(column, column)
        remaining[task] = False
        chosen.append(task)
        columns.append(column)
    others = np.flatnonzero(remaining)
    order = np.concatenate(
        [np.array(chosen, dtype=np.intp), others[np.argsort(-norms[others], kind="stable")]]
    )
    return order, np.stack(columns, axis=1)[order]
