"""Mean and spread over seeds, and Δm of several runs against several single-task runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from detente.metrics import delta_m

__all__ = ["Spread", "delta_m_spread", "spread"]


@dataclass(frozen=True)
class Spread:
    """A mean over runs.

    Attributes:
        mean: the mean.
        deviation: sample standard deviation (divided by n - 1); None for a single value.
        count: the number n of values.

    Example:
        >>> spread([1.0, 3.0]).mean
        2.0
    """

    mean: float
    deviation: float | None
    count: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean and sample standard deviation of the values that are there; None if none is.

    None and numbers that are not finite are left out.

    Example:
        >>> spread([2.0, None, 4.0])
        Spread(mean=3.0, deviation=1.4142135623730951, count=2)
        >>> spread([]) is None
        True
    """
    found = [value for value in values if value is not None and math.isfinite(value)]
    if not found:
        return None
    mean = math.fsum(found) / len(found)
    if len(found) == 1:
        return Spread(mean, None, 1)
    squares = math.fsum((value - mean) ** 2 for value in found)
    return Spread(mean, math.sqrt(squares / (len(found) - 1)), len(found))


def delta_m_spread(
    results: Sequence[Mapping[str, float]],
    baselines: Mapping[str, Sequence[float]],
    higher_is_better: Mapping[str, bool],
) -> Spread:
    """Δm of each run against the mean single-task result, and its mean and spread over the runs.

    As in the published tables, every run is held against the same baseline: the mean over the single-task
    runs of each task. The spread therefore does not contain the baseline's own chance.

    Args:
        results: one mapping from task to its main metric for every run (seed).
        baselines: task to the same metric of its single-task runs, one or more.
        higher_is_better: task to the metric's direction.

    Returns:
        Percent; positive is worse than single-task networks.

    Raises:
        ValueError: no results, a task without single-task runs, or what :func:`detente.metrics.delta_m`
            refuses.

    Example:
        >>> round(delta_m_spread([{"a": 0.9}, {"a": 0.8}], {"a": [0.9, 1.1]}, {"a": True}).mean, 6)
        15.0
    """
    if not results:
        raise ValueError("delta_m_spread needs the results of at least one run")
    means: dict[str, Mapping[str, float]] = {}
    for task in results[0]:
        values = baselines.get(task)
        if not values:
            raise ValueError(f"task {task!r} has no single-task run to be compared with")
        means[task] = {"main": math.fsum(values) / len(values)}
    directions = {task: {"main": higher} for task, higher in higher_is_better.items()}
    found = spread(
        delta_m({task: {"main": value} for task, value in result.items()}, means, directions)
        for result in results
    )
    if found is None:
        raise ValueError("no run has a finite result")
    return found
