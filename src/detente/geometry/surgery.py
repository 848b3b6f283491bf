"""Gradient surgery: task gradients altered one by one until they no longer conflict, from their Gramian alone.

Every altered gradient stays a combination of the given ones, so that inner products and lengths follow from the
Gramian and no parameter-sized vector is touched. All is done on unit gradients: row i of the coefficients says how
the altered gradient i, divided by ‖g_i‖, is made of the unit gradients g_j / ‖g_j‖. The tasks do not wait for one
another: at step k every task meets the k-th partner of its own order, all at once, and a batch of Gramians (one per
block of parameters) is treated together.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from detente.geometry.gramian import Array, unit_rows

Order = NDArray[np.int64]

# The squared length of a combination is known to about T machine epsilons of the squared sum of its terms; below this
# it cannot be told from zero, as for the minimum-norm point.
VANISHING = 16 * float(np.finfo(np.float64).eps)
# A cosine counts as below its target from here on: closer than that, rounding decides.
BELOW = 1e-14
# A cosine of 1 to a partner would take an infinite multiple of it.
LARGEST_TARGET = 1 - 1e-8


def ascending(tasks: int) -> Order:
    """[T, T-1]: every task meets the others in ascending order.

    Example:
        >>> ascending(3).tolist()
        [[1, 2], [0, 2], [0, 1]]
    """
    others = np.arange(max(tasks - 1, 0))[None, :].repeat(tasks, axis=0)
    return others + (others >= np.arange(tasks)[:, None])


def shuffled(draws: ArrayLike) -> Order:
    """[T, T-1]: every task meets the others in an order of its own, uniform over all orders.

    Args:
        draws: [T, T] independent uniform numbers; the diagonal is not looked at.

    Example:
        >>> shuffled([[0.0, 0.9, 0.1], [0.2, 0.0, 0.3], [0.5, 0.4, 0.0]]).tolist()
        [[2, 1], [0, 2], [1, 0]]
    """
    keys = np.array(draws, dtype=np.float64)
    np.fill_diagonal(keys, np.inf)
    return np.argsort(keys, axis=1)[:, :-1]


def project_conflicts(gramian: ArrayLike, order: Order) -> Array:
    """Project every task gradient off the others it conflicts with (PCGrad; Yu et al. 2020, Algorithm 1).

    The running gradient of task i meets the given gradients g_j in the order of row i; where their inner product is
    negative its component along g_j is taken away. A conflict is a negative inner product, at every scale.

    Args:
        gramian: [..., T, T].
        order: [T, T-1], see :func:`ascending` and :func:`shuffled`.

    Returns:
        transform [..., T, T]: the altered gradient i is Σ_j transform_ij g_j. A row is exactly zero where nothing
        but rounding is left.

    Raises:
        ValueError: not a Gramian.

    Example:
        >>> project_conflicts([[1.0, -1.0], [-1.0, 2.0]], ascending(2))
        array([[1. , 0.5],
               [1. , 1. ]])
    """
    norms, cosines = unit_rows(gramian)
    tasks = norms.shape[-1]
    rows = np.arange(tasks)
    made, inner = _start(cosines)
    for partner in order.T:
        conflict = np.minimum(inner[..., rows, partner], 0.0)
        if conflict.any():
            made[..., rows, partner] -= conflict
            inner -= conflict[..., None] * cosines[..., partner, :]
    return _transform(made, inner, norms)


def raise_cosines(gramian: ArrayLike, targets: ArrayLike, order: Order, beta: float) -> tuple[Array, Array]:
    """Raise the cosines between task gradients to moving targets (GradVac; Wang et al. 2021, Algorithm 1).

    The running gradient of task i meets the given gradients g_j in the order of row i. Where the cosine ρ is below its
    target ρ̂, so much of g_j is added that it becomes ρ̂:
    ‖g_i‖ (ρ̂ √(1-ρ²) - ρ √(1-ρ̂²)) / (‖g_j‖ √(1-ρ̂²)), with the running ‖g_i‖; then ρ̂ ← (1-β) ρ̂ + β ρ, with the
    cosine found. Where one of the two vanishes there is no cosine: nothing is added, the target stays.

    Args:
        gramian: [..., T, T].
        targets: [..., T, T], ρ̂_ij in [-1, 1]; targets above 1 - 1e-8 count as that.
        order: [T, T-1], see :func:`ascending` and :func:`shuffled`.
        beta: in [0, 1].

    Returns:
        transform [..., T, T] as for :func:`project_conflicts`, and the new targets [..., T, T].

    Raises:
        ValueError: not a Gramian.

    Example:
        >>> transform, targets = raise_cosines([[1.0, -0.6], [-0.6, 1.0]], np.zeros((2, 2)), ascending(2), 0.5)
        >>> transform.round(12).tolist(), targets.tolist()  # with targets 0, a projection
        ([[1.0, 0.6], [0.6, 1.0]], [[0.0, -0.3], [-0.3, 0.0]])
    """
    norms, cosines = unit_rows(gramian)
    tasks = norms.shape[-1]
    moved = np.array(targets, dtype=np.float64)
    rows = np.arange(tasks)
    made, inner = _start(cosines)
    for partner in order.T:
        length, alive = _lengths(made, inner)
        alive &= (norms > 0) & (norms[..., partner] > 0)
        found = np.divide(inner[..., rows, partner], length, out=np.zeros_like(length), where=alive)
        found = found.clip(-1.0, 1.0)
        target = moved[..., rows, partner]
        low = alive & (found < target - BELOW)
        if low.any():
            aim = np.minimum(target, LARGEST_TARGET)
            sine = np.sqrt(1 - aim**2)
            sine = np.where(sine > 0, sine, 1.0)  # a target of -1, below which nothing is
            added = np.where(low, length * (aim * np.sqrt(1 - found**2) / sine - found), 0.0).clip(0.0)
            made[..., rows, partner] += added
            inner += added[..., None] * cosines[..., partner, :]
        moved[..., rows, partner] = np.where(alive, (1 - beta) * target + beta * found, target)
    return _transform(made, inner, norms), moved


def _start(cosines: Array) -> tuple[Array, Array]:
    """Coefficients of the untouched gradients, and the inner products of their units with all units."""
    made = np.zeros_like(cosines)
    diagonal = np.arange(cosines.shape[-1])
    made[..., diagonal, diagonal] = 1.0
    return made, cosines.copy()


def _lengths(made: Array, inner: Array) -> tuple[Array, NDArray[np.bool_]]:
    """[..., T] lengths of the running gradients, in units of the given ones, and which of them are no mere rounding."""
    squares = (made * inner).sum(axis=-1)
    alive = squares > VANISHING * made.shape[-1] * np.abs(made).sum(axis=-1) ** 2
    return np.sqrt(np.where(alive, squares, 0.0)), alive


def _transform(made: Array, inner: Array, norms: Array) -> Array:
    made = np.where(_lengths(made, inner)[1][..., None], made, 0.0)
    divisor = np.where(norms > 0, norms, 1.0)  # nothing is ever added of a gradient that vanishes
    return made * (divisor[..., :, None] / divisor[..., None, :])
