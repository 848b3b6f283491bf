"""Conflict measures of a Gramian as one frozen value of plain numbers."""

from __future__ import annotations

import numpy as np

from detente.geometry import conflict, spectrum
from detente.values import Conflict


def measure_conflict(gramian: np.ndarray) -> Conflict:
    """Norms, cosines, condition number, magnitude similarity and norm ratio of T gradients.

    Args:
        gramian: [T, T] float64, inner products of the gradients.

    Example:
        >>> measure_conflict(np.array([[1.0, -1.0], [-1.0, 4.0]])).minimal_cosine
        -0.5
    """
    cosines = conflict.cosines(gramian)
    return Conflict(
        norms=tuple(conflict.norms(gramian).tolist()),
        cosines=tuple(tuple(row) for row in cosines.tolist()),
        condition_number=float(spectrum.condition_number(gramian)),
        magnitude_similarity=float(conflict.mean_magnitude_similarity(gramian)),
        minimal_cosine=float(cosines.min()) if len(cosines) > 1 else 1.0,
        norm_ratio=float(conflict.norm_ratio(gramian)),
    )
