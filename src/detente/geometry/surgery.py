"""Gradient surgery: task gradients altered one by one until they no longer conflict, from their Gramian alone.

Every altered gradient stays a combination of the given ones, so that inner products and lengths follow from the
Gramian and no parameter-sized vector is touched. All is done on unit gradients: row i of the coefficients says how
the altered gradient i, divided by ‖g_i‖, is made of the unit gradients g_j / ‖g_j‖. The tasks do not wait for one
another: at step k every task meets the k-th partner of its own order, all at once, and a batch of Gramians (one per
block of parameters) is treated together.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    units, made, inner = _start(cosines)
    rows = np.arange(len(made))
    for partner, source in _partners(order, len(made)):
        conflict = inner[rows, partner]
        if conflict.min() < 0:
            conflict = np.minimum(conflict, 0.0)
            made[rows, partner] -= conflict
            inner -= conflict[:, None] * units[source]
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
    units, made, inner = _start(cosines)
    rows = np.arange(len(made))
    moved = np.array(targets, dtype=np.float64).reshape(units.shape)
    present = norms.reshape(-1) > 0
    length, alive = np.ones(len(made)), present
    for partner, source in _partners(order, len(made)):
        defined = alive & present[source]
        found = inner[rows, partner] / length
        found = np.maximum(np.minimum(found, 1.0), -1.0)
        target = moved[rows, partner]
        low = defined & (found < target - BELOW)
        moved[rows, partner] = np.where(defined, (1 - beta) * target + beta * found, target)
        if low.any():
            aim = np.minimum(target, LARGEST_TARGET)
            sine = np.sqrt(1 - aim**2)
            sine[sine == 0] = 1.0  # a target of -1, below which nothing is
            added = length * (aim * np.sqrt(1 - found**2) / sine - found)
            added = np.where(low, np.maximum(added, 0.0), 0.0)
            made[rows, partner] += added
            inner += added[:, None] * units[source]
            length, alive = _lengths(made, inner)
            alive &= present
    return _transform(made, inner, norms), moved.reshape(cosines.shape)


def _start(cosines: Array) -> tuple[Array, Array, Array]:
    """Unit Gramians, coefficients of the untouched gradients and their inner products with all units, as rows [N, T].

    A batch of B Gramians is N = B T rows, one below the other.
    """
    tasks = cosines.shape[-1]
    units = cosines.reshape(-1, tasks)
    made = np.eye(tasks)
    if len(units) > tasks:
        made = np.tile(made, (len(units) // tasks, 1))
    return units, made, units.copy()


def _partners(order: Order, rows: int) -> Iterator[tuple[Order, Order]]:
    """For each step whom each row meets: the task [N], and the row [N] where that one's unit Gramian stands."""
    tasks = len(order)
    first = np.arange(rows) // tasks * tasks
    for column in order.T:
        partner = column if rows == tasks else np.tile(column, rows // tasks)
        yield partner, partner + first


def _lengths(made: Array, inner: Array) -> tuple[Array, NDArray[np.bool_]]:
    """[N] lengths of the running gradients in units of the given ones (1 where it vanishes), and which have one."""
    squares = np.einsum("ij,ij->i", made, inner)
    alive = squares > VANISHING * made.shape[1] * np.abs(made).sum(axis=1) ** 2
    squares[~alive] = 1.0
    return np.sqrt(squares), alive


def _transform(made: Array, inner: Array, norms: Array) -> Array:
    """[..., T, T] the altered gradients in terms of the given ones instead of their units; rounding taken out."""
    made[~_lengths(made, inner)[1]] = 0.0
    tasks = norms.shape[-1]
    divisor = (
        norms if norms.all() else np.where(norms > 0, norms, 1.0)
    )  # nothing is added of a vanishing gradient
    return made.reshape(*norms.shape, tasks) * (divisor[..., :, None] / divisor[..., None, :])
