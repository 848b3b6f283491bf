"""Projection onto the simplex of weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from detente.geometry.gramian import Array


def project_onto_simplex(point: ArrayLike) -> Array:
    """The nearest weights that are not negative and sum to one.

    The solution is max(v - τ, 0) with one threshold τ, found exactly by sorting (Held, Wolfe & Crowder 1974).

    Args:
        point: [..., T] finite numbers.

    Returns:
        [..., T] float64.

    Raises:
        ValueError: a number is not finite, or there is none.

    Example:
        >>> project_onto_simplex([1.2, 0.4, -0.3]).round(12).tolist()
        [0.9, 0.1, 0.0]
    """
    values = np.asarray(point, dtype=np.float64)
    if values.ndim == 0 or values.shape[-1] == 0 or not np.isfinite(values).all():
        raise ValueError(
            "a point to project onto the simplex is a vector [..., T] of finite numbers, T at least 1."
        )
    # Taken from the largest first: the projection does not notice, and nothing is lost beside large numbers.
    descending = np.sort(values, axis=-1)[..., ::-1]
    values = values - descending[..., :1]
    descending = descending - descending[..., :1]
    # The k largest alone would put the threshold at (their sum - 1) / k; the right k gives the largest of these.
    thresholds = (descending.cumsum(axis=-1) - 1.0) / np.arange(1, values.shape[-1] + 1)
    weights = np.maximum(values - thresholds.max(axis=-1, keepdims=True), 0.0)
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))
