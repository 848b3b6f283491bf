"""What every solver of this room does first: check a Gramian, and take its rows to unit length, on one thread."""

from __future__ import annotations

import math
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

Array = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)

# How far an entry may be from symmetry, or a cosine beyond one, before it is no longer rounding of a float64 Gramian.
ROUNDING = 1e-8
# Up to here numpy's BLAS does not start threads for a product of T×T matrices.
ALONE = 32


def validated(gramian: ArrayLike) -> Array:
    """The Gramian as float64, or a ``ValueError`` that names the entry at fault.

    Args:
        gramian: [..., T, T], entry (i, j) is the inner product of the gradients of tasks i and j.

    Returns:
        [..., T, T] float64; the argument itself where it already is such an array.

    Raises:
        ValueError: not square, no task at all, NaN or infinite entries.

    Example:
        >>> validated([[4, 0], [0, 1]]).dtype
        dtype('float64')
    """
    gram = np.asarray(gramian, dtype=np.float64)
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] == 0:
        raise ValueError(f"a Gramian has shape [..., T, T] with T at least 1, not {list(gram.shape)}.")
    if np.count_nonzero(np.isfinite(gram)) < gram.size:
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(gram))[0])
        raise ValueError(
            f"the Gramian's entry {list(place)} is {gram[place]}: a gradient holds NaN or infinite values, or "
            "its square overflows float64. Check that task's loss."
        )
    return gram


def check_semidefinite(cosines: Array) -> None:
    """Refuse a matrix of cosines [T, T] that no gradients have, by far more than rounding.

    Solvers ask where they have no solution to the accuracy promised: of a Gramian the best point is an answer, of
    another matrix there may be none.

    Raises:
        ValueError: an eigenvalue is negative beyond rounding.

    Example:
        >>> check_semidefinite(np.eye(2))
    """
    lowest = float(np.linalg.eigvalsh(cosines)[0])
    if lowest < -ROUNDING * len(cosines):
        raise ValueError(
            f"the matrix of {len(cosines)} tasks is not positive semidefinite (smallest eigenvalue of the cosines "
            f"{lowest:.1e}): it is not a Gramian."
        )


def unit_rows(gramian: ArrayLike) -> tuple[Array, Array]:
    """Norms of the gradients and the Gramian of the gradients scaled to unit length.

    A row of the second has entries of size one whatever the scale of its gradient, so that a threshold on it is
    relative to ‖g_i‖‖g_j‖. A gradient of zero length keeps a row of zeros.

    Args:
        gramian: [..., T, T].

    Returns:
        ``norms`` [..., T] and ``cosines`` [..., T, T], symmetric, diagonal 1 up to rounding (0 for zero gradients).

    Raises:
        ValueError: as :func:`validated`; or the matrix cannot be a Gramian: it is not symmetric, a diagonal entry
            is negative, or a cosine exceeds one, by more than rounding.

    Example:
        >>> norms, cosines = unit_rows([[4.0, 3.0], [3.0, 9.0]])
        >>> norms.tolist(), cosines.tolist()
        ([2.0, 3.0], [[1.0, 0.5], [0.5, 1.0]])
    """
    gram = validated(gramian)
    squares = np.diagonal(gram, axis1=-2, axis2=-1)
    if np.count_nonzero(squares < 0):  # three times as fast as `any`
        place = tuple(int(i) for i in np.argwhere(squares < 0)[0])
        raise ValueError(
            f"the Gramian's diagonal entry {list(place)} is {squares[place]}, but it is the square of a norm: "
            "this matrix is not a Gramian."
        )
    norms = np.sqrt(squares)
    lengths = norms
    if np.count_nonzero(norms) < norms.size:
        # What stands in a zero gradient's row must be negligible beside every other product.
        floor = ROUNDING * norms.max(axis=-1, keepdims=True, initial=0.0)
        lengths = np.where(norms > 0, norms, np.where(floor > 0, floor, 1.0))
    products = lengths[..., :, None] * lengths[..., None, :]
    mirrored = np.swapaxes(gram, -1, -2)
    if np.count_nonzero(gram != mirrored):
        uneven = np.abs(gram - mirrored) > ROUNDING * products
        if uneven.any():
            place = tuple(int(i) for i in np.argwhere(uneven)[0])
            raise ValueError(
                f"the Gramian is not symmetric: entry {list(place)} differs from its mirror image."
            )
        gram = gram * 0.5 + mirrored * 0.5
    cosines = gram / products
    if np.count_nonzero(np.abs(cosines) > 1 + ROUNDING):
        place = tuple(int(i) for i in np.argwhere(np.abs(cosines) > 1 + ROUNDING)[0])
        raise ValueError(
            f"entry {list(place)} of the Gramian is larger than the product of the two norms on its diagonal: "
            "this matrix is not a Gramian."
        )
    if lengths is not norms:
        vanishing = norms == 0
        cosines[vanishing[..., :, None] | vanishing[..., None, :]] = 0.0
    return norms, cosines


def one_thread(tasks: int) -> AbstractContextManager[object]:
    """While this lasts the BLAS of numpy and scipy runs on one thread; for few tasks it does so anyway.

    Torch's threads go on spinning for a while after an operation. Threads that numpy's BLAS starts meanwhile for a T×T
    product wait for a core, much longer than the product takes.

    Args:
        tasks: T, the size of the matrices.

    Example:
        >>> import numpy as np
        >>> with one_thread(100):
        ...     product = np.eye(100) @ np.eye(100)
    """
    if tasks <= ALONE:
        return nullcontext()
    limited: AbstractContextManager[object] = _controller("scipy.linalg" in sys.modules).limit(
        limits=1, user_api="blas"
    )
    return limited


@cache
def _controller(with_scipy: bool) -> ThreadpoolController:
    # It knows the libraries that are loaded when it is made, and scipy brings its own.
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def spectrum_of_two(norms: Array, cosine: float) -> tuple[float, float]:
    """Return the larger eigenvalue of two tasks, and the root of the product of both, without the shorter one's square.

    The sum is a² + b², the product a²b²(1 - c²); it is zero for gradients that are parallel but for rounding, judged as
    the rank of any number of tasks.

    Example:
        >>> spectrum_of_two(np.array([2.0, 1.0]), 0.0)
        (4.0, 2.0)
    """
    a, b = norms.tolist()
    largest = (a * a + b * b + math.hypot((a - b) * (a + b), 2 * a * b * cosine)) / 2
    parallel = 1 - abs(cosine) <= 16 * EPS * (1 + abs(cosine))
    return largest, 0.0 if parallel else a * b * math.sqrt((1 - cosine) * (1 + cosine))


def condition_of_two(norms: Array, cosine: float) -> float:
    """Return the condition number of two gradients of positive length.

    Example:
        >>> condition_of_two(np.array([3.0, 1.0]), 0.0)
        3.0
    """
    largest, area = spectrum_of_two(norms / norms.max(), cosine)
    return math.inf if area == 0 else max(1.0, largest / area)
