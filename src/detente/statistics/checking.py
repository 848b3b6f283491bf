"""What the statistics are given, checked before anything is computed."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping

# Differences of no more than this part of the largest value are rounding.
ROUNDING = 16 * sys.float_info.epsilon


def is_finite(value: object) -> bool:
    """Whether it is a finite number, of Python or of numpy."""
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False


def check_finite(values: Mapping[int, float], owner: str) -> None:
    """Refuse what is no finite number, by owner and seed."""
    for seed, value in values.items():
        if not is_finite(value):
            raise ValueError(
                f"{owner}, seed {seed}: {value!r} is no finite number; leave that seed out and say so"
            )


def check_results(
    results: Mapping[str, Mapping[int, Mapping[str, float]]],
    higher_is_better: Mapping[str, bool],
    reference: str | None,
) -> tuple[str, ...]:
    """The tasks, or a ``ValueError`` that names the method, seed and task at fault."""
    if not results:
        raise ValueError("results is empty: give at least one method")
    tasks: tuple[str, ...] = ()
    for name, runs in results.items():
        if not runs:
            raise ValueError(f"method {name!r} has no seeds: leave it out or give its runs")
        for seed, values in runs.items():
            where = f"method {name!r}, seed {seed}"
            tasks = tasks or tuple(values)
            for task in tasks:
                if task not in values:
                    raise ValueError(f"{where}: task {task!r} is missing, which other runs have")
            for task, value in values.items():
                if task not in tasks:
                    raise ValueError(f"{where}: task {task!r} is in no run before it")
                if not is_finite(value):
                    raise ValueError(
                        f"{where}, task {task!r}: {value!r} is no finite number; leave that seed out and say so"
                    )
            if not values:
                raise ValueError(f"{where} has no tasks")
    for task in tasks:
        if not isinstance(higher_is_better.get(task), bool):
            raise ValueError(
                f"higher_is_better of task {task!r} is {higher_is_better.get(task)!r}: expected True or False"
            )
    if reference is not None and reference not in results:
        raise ValueError(f"the reference {reference!r} is none of the methods {', '.join(results)}")
    return tasks


def check_baselines(baselines: Mapping[str, Mapping[int, float]], tasks: tuple[str, ...]) -> None:
    """Refuse baselines that are not one or more finite numbers for each of the tasks."""
    for task in tasks:
        if not baselines.get(task):
            raise ValueError(f"task {task!r} has no single-task run to be compared with")
        check_finite(baselines[task], f"the baseline of task {task!r}")
    for task in baselines:
        if task not in tasks:
            raise ValueError(f"baselines contain task {task!r}, which no result has: leave it out")
