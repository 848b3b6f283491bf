"""How much task gradients disagree, read off their Gramian: in direction (cosines) and in length.

All measures are free of scale, and none is ever NaN: a gradient of zero length has cosine 0 with every gradient, itself
included; its length is unlike any other's, except another zero. A step records all of them as one `Conflict`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from detente.geometry.gramian import Array, condition_of_two, one_thread, unit_rows
from detente.geometry.spectrum import condition_of_rows
from detente.values import Conflict

# Times T machine epsilons: what rounding leaves of a sum of T² products that cancels.
_CANCELLED = 64


def measure_conflict(gramian: np.ndarray) -> Conflict:
    """Norms, cosines, condition number, magnitude similarity and norm ratio of T gradients.

    Args:
        gramian: [T, T] float64, inner products of the gradients.

    Example:
        >>> measure_conflict(np.array([[1.0, -1.0], [-1.0, 4.0]])).minimal_cosine
        -0.5
    """
    lengths, scaled = unit_rows(gramian)  # once, for all the measures
    bounded = _bounded(lengths, scaled)
    if len(lengths) == 2 and lengths.min() > 0:
        condition_number = condition_of_two(lengths, float(scaled[0, 1]))
    else:
        with one_thread(len(lengths)):
            condition_number = condition_of_rows(lengths, scaled)
    return Conflict(
        norms=tuple(lengths.tolist()),
        cosines=tuple(map(tuple, bounded.tolist())),
        condition_number=condition_number,
        magnitude_similarity=float(_pairs(_similarity(lengths)).mean()),
        minimal_cosine=float(bounded.min()) if len(bounded) > 1 else 1.0,
        norm_ratio=_ratio(lengths),
    )


def measure_altered(gramian: np.ndarray, transform: np.ndarray) -> Conflict:
    """Measure the conflict of the altered gradients Σ_j transform_ij g_j.

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
    return _bounded(*unit_rows(gramian))


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
    return _similarity(norms(gramian))


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
    return float(_pairs(magnitude_similarity(gramian)).mean())


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
    lengths = norms(gramian)
    if lengths.ndim != 1:
        raise ValueError(f"a ratio is taken of one Gramian [T, T], not of a batch of {lengths.shape[0]}.")
    return _ratio(lengths)


# ---- private


def _bounded(norms: Array, cosines: Array) -> Array:
    """Cosines [..., T, T] from what ``unit_rows`` gives, where they are right up to rounding."""
    result = np.minimum(np.maximum(cosines, -1.0), 1.0)  # less overhead than `clip`
    tasks = np.arange(result.shape[-1])
    result[..., tasks, tasks] = norms > 0
    return result


def _similarity(lengths: Array) -> Array:
    """Magnitude similarity [..., T, T] from the norms [..., T]."""
    shorter = np.minimum(lengths[..., :, None], lengths[..., None, :])
    longer = np.maximum(lengths[..., :, None], lengths[..., None, :])
    if np.count_nonzero(longer) < longer.size:  # two zeros are alike
        shorter, longer = np.where(longer > 0, shorter, 1.0), np.where(longer > 0, longer, 1.0)
    ratio = shorter / longer
    return np.asarray(2 * ratio / (1 + ratio * ratio))


def _ratio(lengths: Array) -> float:
    """Longest over shortest of the norms [T]."""
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
