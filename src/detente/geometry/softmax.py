"""Numbers to positive weights that sum to one."""

from __future__ import annotations

import numpy as np

from detente.geometry.gramian import Array


def softmax(logits: Array) -> Array:
    """exp(x_t) / Σ_j exp(x_j) over the last axis; no overflow, whatever the size of the numbers.

    Args:
        logits: [..., T] finite float64.

    Returns:
        [..., T] float64, non-negative, each row sums to 1.

    Example:
        >>> softmax(np.array([1000.0, 1000.0])).tolist()
        [0.5, 0.5]
    """
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: Array = powers / powers.sum(axis=-1, keepdims=True)
    return shares
