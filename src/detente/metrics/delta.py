"""Δm: by how many percent a multi-task network is worse than one network for each task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

__all__ = ["delta_m", "relative_changes"]

_Values = Mapping[str, Mapping[str, float]]
_Directions = Mapping[str, bool] | Mapping[str, Mapping[str, bool]]


def delta_m(
    results: _Values,
    baselines: _Values,
    higher_is_better: _Directions,
    per: Literal["task", "metric"] = "task",
) -> float:
    """Mean relative change against single-task baselines, in percent; **lower is better**.

    A metric M with baseline B changes by (-1)^h (M - B) / B * 100 percent, where h is 1 when higher values
    are better and 0 otherwise: positive means worse than the baseline.

    * ``per="task"`` averages the metrics of each task first and then the tasks, so that a task with many
      metrics counts no more than another;
    * ``per="metric"`` averages over all metrics of all tasks.

    Published tables use one or the other; name the one you report.

    Source: Senushkin et al. (2023), section 6, after Maninis et al. (2019). The formula printed there for
    the task-weighted form lacks the division by the number of metrics of each task, which the paper's
    tables contain; it is made here.

    Args:
        results: task to metric to value.
        baselines: the same tasks and metrics, from the single-task networks.
        higher_is_better: metric to bool, or task to metric to bool. Names that do not occur in ``results``
            are ignored.
        per: ``"task"`` or ``"metric"``.

    Returns:
        Percent; 0 for the baselines themselves.

    Raises:
        ValueError: a task or metric is missing on one side, a direction is missing or no bool, a value is
            not finite, a baseline is zero or negative (a relative change means nothing then), or ``per`` is
            unknown.

    Example:
        >>> baselines = {"segmentation": {"miou": 0.5, "accuracy": 0.8}, "depth": {"error": 2.0}}
        >>> results = {"segmentation": {"miou": 0.45, "accuracy": 0.8}, "depth": {"error": 1.8}}
        >>> directions = {"miou": True, "accuracy": True, "error": False}
        >>> round(delta_m(results, baselines, directions), 6)
        -2.5
        >>> round(delta_m(results, baselines, directions, per="metric"), 6)
        0.0
    """
    if per not in ("task", "metric"):
        raise ValueError(f'per is {per!r}: expected "task" or "metric"')
    changes = relative_changes(results, baselines, higher_is_better)
    if per == "metric":
        return _mean([change for metrics in changes.values() for change in metrics.values()])
    return _mean([_mean(list(metrics.values())) for metrics in changes.values()])


def relative_changes(
    results: _Values, baselines: _Values, higher_is_better: _Directions
) -> dict[str, dict[str, float]]:
    """Relative change of every metric against its baseline, in percent; positive is worse.

    The terms of which :func:`delta_m` is the mean; arguments and errors are the same.

    Example:
        >>> relative_changes({"depth": {"error": 3.0}}, {"depth": {"error": 2.0}}, {"error": False})
        {'depth': {'error': 50.0}}
    """
    if not results:
        raise ValueError("results is empty: give at least one task")
    _same_names(results, baselines, "task", "")
    changes: dict[str, dict[str, float]] = {}
    for task, metrics in results.items():
        if not metrics:
            raise ValueError(f"results of task {task!r} are empty: give at least one metric")
        _same_names(metrics, baselines[task], "metric", f" of task {task!r}")
        changes[task] = {}
        for metric, given in metrics.items():
            value = _finite(given, "result", task, metric)
            baseline = _finite(baselines[task][metric], "baseline", task, metric)
            if baseline <= 0.0:
                raise ValueError(
                    f"baseline of task {task!r}, metric {metric!r} is {baseline}: a relative change needs a "
                    "baseline above zero; leave this metric out"
                )
            worse = (value - baseline) / baseline * 100.0
            changes[task][metric] = -worse if _direction(higher_is_better, task, metric) else worse
    return changes


def _same_names(
    results: Mapping[str, object], baselines: Mapping[str, object], kind: str, where: str
) -> None:
    for name in results:
        if name not in baselines:
            raise ValueError(f"baselines lack {kind} {name!r}{where}, which results contain")
    for name in baselines:
        if name not in results:
            raise ValueError(f"results lack {kind} {name!r}{where}, which baselines contain")


def _finite(given: float, kind: str, task: str, metric: str) -> float:
    try:
        value = float(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{kind} of task {task!r}, metric {metric!r} is {given!r}: no number") from error
    if not math.isfinite(value):
        raise ValueError(
            f"{kind} of task {task!r}, metric {metric!r} is {value}: a finite number is expected"
        )
    return value


def _direction(higher_is_better: _Directions, task: str, metric: str) -> bool:
    by_task = any(isinstance(entry, Mapping) for entry in higher_is_better.values())
    table: object = higher_is_better.get(task) if by_task else higher_is_better
    if not isinstance(table, Mapping) or metric not in table:
        raise ValueError(f"higher_is_better lacks metric {metric!r} of task {task!r}: say True or False")
    direction = table[metric]
    if not isinstance(direction, bool):
        raise ValueError(
            f"higher_is_better of task {task!r}, metric {metric!r} is {direction!r}: expected True or False"
        )
    return direction


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
