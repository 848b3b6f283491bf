"""Conflict measures of a Gramian as one frozen value of plain numbers."""

from __future__ import annotations

import numpy as np

from detente.geometry import conflict
from detente.geometry.gramian import unit_rows
from detente.geometry.spectrum import condition_of_rows
from detente.geometry.threads import one_thread
from detente.values import Conflict

# Times T machine epsilons: what rounding leaves of a sum of T² products that cancels.
_CANCELLED = 64


def measure_altered(gramian: np.ndarray, transform: np.ndarray) -> Conflict:
    """The same for the altered gradients Σ_j transform_ij g_j.

    Near the Pareto set an altered gradient cancels to rounding. What is left of it has no direction and may not even be
    a Gramian: it counts as zero.

    Args:
        gramian: [T, T] float64 of the gradients as given.
        transform: [T, T].

    Example:
        >>> measure_altered(np.ones((2, 2)), np.array([[1.0, 0.0], [0.1, -0.1]])).norms
        (1.0, 0.0)
    """
    altered = transform @ gramian @ transform.T
    altered = (altered + altered.T) / 2
    summands = np.abs(transform) @ np.abs(gramian) @ np.abs(transform).T
    squares = np.diagonal(altered)
    left = squares > _CANCELLED * len(squares) * np.finfo(np.float64).eps * np.diagonal(summands)
    lengths = np.sqrt(np.where(left, squares, 0.0))
    bound = lengths[:, None] * lengths[None, :]
    cleaned = np.clip(altered, -bound, bound)
    np.fill_diagonal(cleaned, np.where(left, squares, 0.0))
    return measure_conflict(cleaned)


def measure_conflict(gramian: np.ndarray) -> Conflict:
    """Norms, cosines, condition number, magnitude similarity and norm ratio of T gradients.

    Args:
        gramian: [T, T] float64, inner products of the gradients.

    Example:
        >>> measure_conflict(np.array([[1.0, -1.0], [-1.0, 4.0]])).minimal_cosine
        -0.5
    """
    norms, scaled = unit_rows(gramian)  # once, for all the measures
    cosines = conflict.cosines_of_rows(norms, scaled)
    with one_thread(len(norms)):
        condition_number = condition_of_rows(norms, scaled)
    return Conflict(
        norms=tuple(norms.tolist()),
        cosines=tuple(map(tuple, cosines.tolist())),
        condition_number=condition_number,
        magnitude_similarity=conflict.mean_of_pairs(conflict.similarity_of_lengths(norms)),
        minimal_cosine=float(cosines.min()) if len(cosines) > 1 else 1.0,
        norm_ratio=conflict.ratio_of_lengths(norms),
    )
