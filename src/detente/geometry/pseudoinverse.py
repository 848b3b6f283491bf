"""Kernel of a matrix of cosines, and its pseudo-inverse applied to a vector of ones."""

from __future__ import annotations

import numpy as np

from detente.geometry.gramian import Array
from detente.geometry.nonnegative import EPS, independent


def inverse_times_ones(cosines: Array) -> tuple[Array, Array, Array]:
    """C⁺1, the part of the vector of ones in the range of C, and a basis of the kernel.

    Args:
        cosines: [T, T] symmetric positive semidefinite. Eigenvalues up to 32 T epsilons of the largest are zero.

    Returns:
        C⁺1 [T] to the accuracy of a linear system, CC⁺1 [T], and orthonormal vectors [T, k] of the kernel.

    Example:
        >>> solution, inside, kernel = inverse_times_ones(np.ones((2, 2)))
        >>> solution.round(12).tolist(), inside.round(12).tolist(), kernel.shape
        ([0.5, 0.5], [1.0, 1.0], (2, 1))
    """
    tasks = len(cosines)
    ones = np.ones(tasks)
    if independent(cosines):
        return np.asarray(np.linalg.solve(cosines, ones)), ones, np.zeros((tasks, 0))
    values, vectors = np.linalg.eigh(cosines)
    kept = values > 32 * tasks * EPS * values[-1]
    basis, values, kernel = vectors[:, kept], values[kept], vectors[:, ~kept]
    if kept.all():
        return np.asarray(np.linalg.solve(cosines, ones)), ones, kernel
    solution = basis @ (basis.sum(axis=0) / values)
    # Once more for what is left: small eigenvalues are known to few digits of their own.
    solution = solution + basis @ ((basis.T @ (ones - cosines @ solution)) / values)
    return solution, basis @ basis.sum(axis=0), kernel
