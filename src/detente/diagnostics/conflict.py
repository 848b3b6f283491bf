"""Conflict measures of a Gramian as one frozen value of plain numbers."""

from __future__ import annotations

import numpy as np

from detente.geometry import conflict
from detente.geometry.gramian import unit_rows
from detente.geometry.spectrum import condition_of_rows
from detente.geometry.threads import one_thread
from detente.values import Conflict


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
