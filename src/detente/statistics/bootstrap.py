"""Bootstrap intervals of a mean and of a mean paired difference.

A bootstrap knows only the values it is given. With n values every resampled mean lies between the smallest and
the largest, so for n = 2 and n = 3 the usual 95 % interval *is* the range of the values, which contains the true
mean of symmetric data in 1 - 2^(1 - n) of all cases: 50 % for two seeds, 75 % for three, at the very most 94 % for
five. Read such intervals as a picture of the spread and leave the decision to the paired t-test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from detente.statistics.checking import ROUNDING, check_finite, is_finite

__all__ = ["Interval", "bootstrap_difference", "bootstrap_mean"]

Kind = Literal["percentile", "bca"]


@dataclass(frozen=True)
class Interval:
    """A bootstrap interval of a mean.

    Attributes:
        low: lower end; None with fewer than two values.
        high: upper end; None with fewer than two values.
        level: nominal coverage, 1 - alpha; the actual one is lower for few values.
        count: the number of values that were resampled.
        resamples: how often.
        kind: ``"percentile"`` or ``"bca"``.

    Example:
        >>> bootstrap_mean([1.0, 3.0], generator=np.random.default_rng(0))
        Interval(low=1.0, high=3.0, level=0.95, count=2, resamples=10000, kind='percentile')
    """

    low: float | None
    high: float | None
    level: float
    count: int
    resamples: int
    kind: Kind


def bootstrap_mean(
    values: Sequence[float],
    *,
    generator: np.random.Generator,
    resamples: int = 10_000,
    alpha: float = 0.05,
    kind: Kind = "percentile",
) -> Interval:
    """Bootstrap interval of the mean of some values, one for each seed.

    See the module's text for how little it means with two or three values.

    Args:
        values: one or more; of a single one there is no interval, and the ends are None.
        generator: where the resamples come from.
        resamples: how many; at least 2 / alpha, so that one lies beyond each end.
        alpha: 1 - level.
        kind: ``"percentile"``, or ``"bca"`` for the bias-corrected and accelerated interval (Efron 1987),
            which allows for skewed values.

    Raises:
        ValueError: no values, one that is not finite, or an argument out of range.

    Example:
        >>> found = bootstrap_mean([1.0, 2.0, 4.0, 9.0], generator=np.random.default_rng(0), kind="bca")
        >>> found.low, found.high
        (1.75, 7.75)
    """
    for place, value in enumerate(values):
        if not is_finite(value):
            raise ValueError(f"value {place} is {value!r}: expected a finite number")
    check_resampling(resamples, alpha)
    if kind not in ("percentile", "bca"):
        raise ValueError(f'kind is {kind!r}: expected "percentile" or "bca"')
    if not len(values):
        raise ValueError("a bootstrap interval needs at least one value")
    if len(values) == 1:
        return Interval(None, None, 1 - alpha, 1, resamples, kind)
    data = np.asarray(values, dtype=np.float64)
    means = data[generator.integers(0, len(data), (resamples, len(data)))].mean(axis=1)
    tails = np.array([alpha / 2, 1 - alpha / 2])
    if kind == "bca" and np.ptp(data) > 0:
        tails = _corrected(tails, data, means)
    low, high = np.percentile(means, tails * 100)
    return Interval(float(low), float(high), 1 - alpha, len(data), resamples, kind)


def bootstrap_difference(
    first: Mapping[int, float],
    second: Mapping[int, float],
    *,
    generator: np.random.Generator,
    resamples: int = 10_000,
    alpha: float = 0.05,
    kind: Kind = "percentile",
) -> Interval:
    """Bootstrap interval of the mean of first minus second; whole pairs of one seed are resampled.

    Args:
        first: seed to value.
        second: seed to value; seeds that only one side has are left out.
        generator: where the resamples come from.
        resamples: how many.
        alpha: 1 - level.
        kind: as in :func:`bootstrap_mean`.

    Returns:
        The interval, with ends None for fewer than two common seeds; ``count`` is their number.

    Raises:
        ValueError: as :func:`bootstrap_mean`.

    Example:
        >>> first, second = {0: 3.0, 1: 5.0, 2: 9.0}, {0: 1.0, 1: 4.0, 3: 0.0}
        >>> found = bootstrap_difference(first, second, generator=np.random.default_rng(0))
        >>> found.low, found.high, found.count
        (1.0, 2.0, 2)
    """
    check_finite(first, "the first side")
    check_finite(second, "the second side")
    differences = [float(first[seed]) - float(second[seed]) for seed in sorted(first.keys() & second.keys())]
    if not differences:
        check_resampling(resamples, alpha)
        return Interval(None, None, 1 - alpha, 0, resamples, kind)
    return bootstrap_mean(differences, generator=generator, resamples=resamples, alpha=alpha, kind=kind)


def check_resampling(resamples: int, alpha: float) -> None:
    """Refuse a level that is none, and fewer resamples than it needs."""
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha is {alpha!r}: expected a number between 0 and 1")
    needed = math.ceil(2 / alpha - 1e-9)
    if resamples < needed:
        raise ValueError(f"resamples is {resamples}: alpha = {alpha} needs at least {needed}")


def _corrected(
    tails: NDArray[np.float64], data: NDArray[np.float64], means: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The tail probabilities, corrected for median bias and for skew (the acceleration)."""
    from scipy.special import ndtr, ndtri

    # A resampled mean equal to the observed one counts half. With few values there are many of them, the values in
    # another order, which rounding must not put on one side.
    noise = ROUNDING * np.abs(data).max()
    below = (np.mean(means < data.mean() - noise) + np.mean(means <= data.mean() + noise)) / 2
    bias = ndtri(below)
    if not np.isfinite(bias):
        raise ValueError(
            "every resampled mean lies on one side of the observed one: take more resamples for bca"
        )
    # Leaving value i out moves the mean by (mean - x_i) / (n - 1); the factor cancels.
    pulls = data - data.mean()
    acceleration = np.sum(pulls**3) / (6 * np.sum(pulls**2) ** 1.5)
    shifted = bias + ndtri(tails)
    corrected: NDArray[np.float64] = ndtr(bias + shifted / (1 - acceleration * shifted))
    return corrected
