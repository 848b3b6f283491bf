"""How much task gradients disagree, read off their Gramian: in direction (cosines) and in length.

All measures are free of scale, and none is ever NaN: a gradient of zero length has cosine 0 with every gradient, itself
included; its length is unlike any other's, except another zero.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from detente.geometry.gramian import Array, unit_rows


def norms(gramian: ArrayLike) -> Array:
    """Euclidean lengths of the gradients.

    Args:
        gramian: [..., T, T], entry (i, j) is the inner product of the gradients of tasks i and j.

    Returns:
        [..., T], in the unit of the gradients.

    Raises:
        ValueError: not a Gramian.

    Example:
        >>> norms([[4.0, 0.0], [0.0, 9.0]]).tolist()
        [2.0, 3.0]
    """
    return unit_rows(gramian)[0]


def cosines(gramian: ArrayLike) -> Array:
    """Cosines of the angles between the gradients.

    Args:
        gramian: [..., T, T].

    Returns:
        [..., T, T] within [-1, 1], diagonal exactly 1; row and column of a zero gradient are 0, its diagonal too.

    Raises:
        ValueError: not a Gramian.

    Example:
        >>> cosines([[4.0, -3.0], [-3.0, 9.0]]).tolist()
        [[1.0, -0.5], [-0.5, 1.0]]
    """
    return cosines_of_rows(*unit_rows(gramian))


def cosines_of_rows(norms: Array, cosines: Array) -> Array:
    """The same from what ``unit_rows`` gives: norms [..., T] and cosines [..., T, T] up to rounding.

    Example:
        >>> cosines_of_rows(np.array([2.0, 0.0]), np.array([[1.0 + 1e-16, 0.0], [0.0, 0.0]])).tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """
    result = np.minimum(np.maximum(cosines, -1.0), 1.0)  # less overhead than `clip`
    tasks = np.arange(result.shape[-1])
    result[..., tasks, tasks] = norms > 0
    return result


def magnitude_similarity(gramian: ArrayLike) -> Array:
    """Similarity of two gradients' lengths, 2ab / (a² + b²): 1 for equal lengths, near 0 if one dominates.

    Definition 2 of Yu et al. 2020 (gradient surgery), used by Senushkin et al. 2023, Figures 4 and 7.

    Args:
        gramian: [..., T, T].

    Returns:
        [..., T, T] within [0, 1], diagonal 1. A zero gradient has 0 with others and 1 with another zero gradient.

    Raises:
        ValueError: not a Gramian.

    Example:
        >>> magnitude_similarity([[1.0, 0.0], [0.0, 9.0]]).tolist()
        [[1.0, 0.6], [0.6, 1.0]]
    """
    return similarity_of_lengths(norms(gramian))


def similarity_of_lengths(lengths: Array) -> Array:
    """The same from the norms [..., T].

    Example:
        >>> similarity_of_lengths(np.array([1.0, 3.0])).tolist()
        [[1.0, 0.6], [0.6, 1.0]]
    """
    shorter = np.minimum(lengths[..., :, None], lengths[..., None, :])
    longer = np.maximum(lengths[..., :, None], lengths[..., None, :])
    if np.count_nonzero(longer) < longer.size:  # two zeros are alike
        shorter, longer = np.where(longer > 0, shorter, 1.0), np.where(longer > 0, longer, 1.0)
    ratio = shorter / longer
    return np.asarray(2 * ratio / (1 + ratio * ratio))


def mean_magnitude_similarity(gramian: ArrayLike) -> float:
    """Mean of the magnitude similarity over all pairs of tasks; 1 for a single task.

    Args:
        gramian: [T, T].

    Returns:
        A float within [0, 1].

    Raises:
        ValueError: not one Gramian.

    Example:
        >>> mean_magnitude_similarity([[1.0, 0.0], [0.0, 9.0]])
        0.6
    """
    return mean_of_pairs(magnitude_similarity(gramian))


def mean_of_pairs(matrix: Array) -> float:
    """Mean over the entries above the diagonal of one matrix [T, T]; of a single task the value of no disagreement, 1.

    Example:
        >>> mean_of_pairs(np.array([[1.0, 0.5], [0.5, 1.0]]))
        0.5
    """
    return float(_pairs(matrix).mean())


def minimal_magnitude_similarity(gramian: ArrayLike) -> float:
    """Smallest magnitude similarity of a pair of tasks; 1 for a single task.

    Args:
        gramian: [T, T].

    Returns:
        A float within [0, 1].

    Raises:
        ValueError: not one Gramian.

    Example:
        >>> minimal_magnitude_similarity([[1.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 1.0]])
        0.6
    """
    return float(_pairs(magnitude_similarity(gramian)).min())


def minimal_cosine(gramian: ArrayLike) -> float:
    """Smallest cosine between the gradients of two tasks: below 0 they conflict; 1 for a single task.

    Args:
        gramian: [T, T].

    Returns:
        A float within [-1, 1].

    Raises:
        ValueError: not one Gramian.

    Example:
        >>> minimal_cosine([[4.0, -3.0], [-3.0, 9.0]])
        -0.5
    """
    return float(_pairs(cosines(gramian)).min())


def norm_ratio(gramian: ArrayLike) -> float:
    """Longest over shortest gradient, at least 1; infinite beside a zero gradient, 1 if all are zero.

    Args:
        gramian: [T, T].

    Returns:
        A float of at least 1, or infinity.

    Raises:
        ValueError: not one Gramian.

    Example:
        >>> norm_ratio([[4.0, 0.0], [0.0, 9.0]])
        1.5
    """
    return ratio_of_lengths(norms(gramian))


def ratio_of_lengths(lengths: Array) -> float:
    """The same from the norms [T].

    Example:
        >>> ratio_of_lengths(np.array([2.0, 3.0]))
        1.5
    """
    if lengths.ndim != 1:
        raise ValueError(f"a ratio is taken of one Gramian [T, T], not of a batch of {lengths.shape[0]}.")
    shortest, longest = float(lengths.min()), float(lengths.max())
    if shortest == 0:
        return 1.0 if longest == 0 else math.inf
    return longest / shortest


def _pairs(matrix: Array) -> Array:
    """The entries above the diagonal of one matrix; of a single task the value of no disagreement, 1."""
    if matrix.ndim != 2:
        raise ValueError(f"pairs are taken of one Gramian [T, T], not of a batch {list(matrix.shape)}.")
    tasks = len(matrix)
    if tasks == 1:
        return np.ones(1)
    position = np.arange(tasks)
    return np.asarray(matrix[position[:, None] < position])
