"""Mean rank of methods over metrics."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from detente.statistics.checking import is_finite

__all__ = ["mean_ranks"]


def mean_ranks(
    results: Mapping[str, Mapping[str, Mapping[str, float]]],
    higher_is_better: Mapping[str, bool] | Mapping[str, Mapping[str, bool]],
) -> dict[str, float]:
    """The mean over all (task, metric) pairs of each method's rank; 1 is best.

    Equal values share the mean of their places (1, 2.5, 2.5, 4). A rank says nothing about how far two
    methods are apart, and it changes when a third method is added: do not read it alone.

    Args:
        results: method to task to metric to value, usually means over seeds.
        higher_is_better: metric to bool, or task to metric to bool.

    Returns:
        Method to mean rank, in the order given.

    Raises:
        ValueError: no methods or metrics, a value or direction that is missing or of the wrong kind, by name.

    Example:
        >>> results = {
        ...     "uniform": {"seg": {"miou": 0.39}, "depth": {"error": 0.55}},
        ...     "pcgrad": {"seg": {"miou": 0.38}, "depth": {"error": 0.55}},
        ...     "cagrad": {"seg": {"miou": 0.40}, "depth": {"error": 0.56}},
        ... }
        >>> mean_ranks(results, {"miou": True, "error": False})
        {'uniform': 1.75, 'pcgrad': 2.25, 'cagrad': 2.0}
    """
    pairs = list(
        dict.fromkeys(
            (task, metric)
            for tasks in results.values()
            for task, metrics in tasks.items()
            for metric in metrics
        )
    )
    if not pairs:
        raise ValueError("mean_ranks needs at least one method with one metric")
    costs = np.array(
        [[_cost(results, method, pair, higher_is_better) for pair in pairs] for method in results]
    )
    # Place of each: one, plus those that are better, plus half of the others that are equal.
    better = (costs[None] < costs[:, None]).sum(axis=1)
    equal = (costs[None] == costs[:, None]).sum(axis=1) - 1
    ranks = 1 + better + equal / 2
    return {method: float(mean) for method, mean in zip(results, ranks.mean(axis=1).tolist(), strict=True)}


def _cost(
    results: Mapping[str, Mapping[str, Mapping[str, float]]],
    method: str,
    pair: tuple[str, str],
    higher_is_better: Mapping[str, bool] | Mapping[str, Mapping[str, bool]],
) -> float:
    task, metric = pair
    value = results[method].get(task, {}).get(metric)
    if value is None:
        raise ValueError(
            f"method {method!r} lacks metric {metric!r} of task {task!r}, which another method has: give it, or "
            "leave the metric or the method out"
        )
    if not is_finite(value):
        raise ValueError(
            f"method {method!r}, task {task!r}, metric {metric!r}: {value!r} is no finite number"
        )
    by_task = any(isinstance(entry, Mapping) for entry in higher_is_better.values())
    table: object = higher_is_better.get(task) if by_task else higher_is_better
    direction = table.get(metric) if isinstance(table, Mapping) else None
    if not isinstance(direction, bool):
        raise ValueError(
            f"higher_is_better of task {task!r}, metric {metric!r} is {direction!r}: expected True or False"
        )
    return -float(value) if direction else float(value)
