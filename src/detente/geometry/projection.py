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
    values = values - values.max(axis=-1, keepdims=True)
    descending = -np.sort(-values, axis=-1)
    excess = np.cumsum(descending, axis=-1) - 1.0
    counts = np.arange(1, values.shape[-1] + 1)
    support = np.sum(descending * counts > excess, axis=-1, keepdims=True)
    threshold = np.take_along_axis(excess, support - 1, axis=-1) / support
    weights = np.maximum(values - threshold, 0.0)
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))
