"""Random numbers that stay the same on every machine and with every version of numpy and torch.

The distributions of ``numpy.random.Generator`` and ``torch.Generator`` may change between versions. The
raw 64-bit output of the PCG64 bit generator and the seeding by ``SeedSequence`` may not (numpy's
compatibility policy, NEP 19), so data sets are drawn from these two alone, by integer arithmetic.
"""

from __future__ import annotations

import operator
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

__all__ = ["check_seed", "random_integers", "random_order"]

_MAX_BELOW = 1 << 31


def check_seed(seed: SupportsIndex) -> int:
    """Give ``seed`` as a plain int, or raise ``ValueError`` unless it is a whole number of at least 0.

    Example:
        >>> check_seed(3)
        3
    """
    if isinstance(seed, bool | np.bool_):
        raise ValueError(f"seed is {seed!r}: a whole number of at least 0 is expected")
    try:
        number = operator.index(seed)
    except TypeError as error:
        raise ValueError(f"seed is {seed!r}: a whole number of at least 0 is expected") from error
    if number < 0:
        raise ValueError(f"seed is {number}: a whole number of at least 0 is expected")
    return number


def _raw(seed: SupportsIndex, key: tuple[int, ...], count: int) -> npt.NDArray[np.uint64]:
    bits = np.random.PCG64(np.random.SeedSequence(entropy=check_seed(seed), spawn_key=key))
    return np.asarray(bits.random_raw(count), dtype=np.uint64).reshape(count)


def random_integers(
    seed: SupportsIndex, key: tuple[int, ...], *, below: int, count: int
) -> npt.NDArray[np.int64]:
    """Draw whole numbers uniformly from 0 to ``below`` - 1, independently.

    The upper 32 bits u of each raw number give (u * ``below``) >> 32, the multiply-shift map. Two results
    differ in probability by at most 2^-32, that is by a relative 1.4e-5 for 60 000 values.

    Args:
        seed: a whole number of at least 0.
        key: names the stream; different keys give independent streams of the same seed.
        below: number of possible results, 1 to 2^31.
        count: how many to draw.

    Returns:
        int64 [count].

    Raises:
        ValueError: ``seed`` or ``below`` is out of range.

    Example:
        >>> random_integers(0, (1, 0), below=10, count=5).tolist()
        [9, 4, 6, 6, 2]
    """
    if not 1 <= below <= _MAX_BELOW:
        raise ValueError(f"below is {below}: expected 1 to {_MAX_BELOW}")
    upper = _raw(seed, key, count) >> np.uint64(32)
    return ((upper * np.uint64(below)) >> np.uint64(32)).astype(np.int64)


def random_order(seed: SupportsIndex, key: tuple[int, ...], count: int) -> npt.NDArray[np.int64]:
    """Draw a random order of the numbers 0 to ``count`` - 1: the stable sorting order of raw numbers.

    Args:
        seed: a whole number of at least 0.
        key: names the stream; different keys give independent streams of the same seed.
        count: how many numbers to put into order.

    Returns:
        int64 [count], each number once.

    Raises:
        ValueError: ``seed`` is out of range.

    Example:
        >>> sorted(random_order(0, (0, 0), 5).tolist())
        [0, 1, 2, 3, 4]
    """
    return np.argsort(_raw(seed, key, count), kind="stable").astype(np.int64)
