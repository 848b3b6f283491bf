"""Small dense mathematics on one thread, where the threads of two libraries would wait for each other."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

# Up to here numpy's BLAS does not start threads for a product of T×T matrices.
_ALONE = 32


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
    if tasks <= _ALONE:
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
