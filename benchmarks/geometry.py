"""Time of the T×T mathematics, medians of interleaved runs: shortest vector (exact, Frank-Wolfe) and spectrum.

Gradients have 2000 entries. `independent` ones are Gaussian, so that every task gets weight; `correlated` ones share
a direction and differ in length, so that few do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from benchmarks._timing import interleaved
from detente.geometry.simplex import frank_wolfe, minimum_norm_point, simplex_residual
from detente.geometry.spectrum import spectrum

TASKS = (2, 3, 8, 40, 100)
DIMENSION = 2000
# Microseconds per exact solution that the solver was built to; None where none was set.
TARGETS = {2: 30.0, 3: 100.0, 8: 100.0, 40: 2000.0, 100: 8000.0}


def gramians(tasks: int, seed: int = 0) -> dict[str, np.ndarray]:
    """One Gramian of independent and one of correlated gradients."""
    rng = np.random.default_rng([seed, tasks])
    own = rng.standard_normal((tasks, DIMENSION))
    shared = own + rng.standard_normal(DIMENSION) * rng.uniform(0.5, 3.0, (tasks, 1))
    return {"independent": own @ own.T, "correlated": shared @ shared.T}


def rows(repeats: int = 15, seconds: float = 0.01) -> list[dict[str, Any]]:
    """The table as a list of rows.

    Args:
        repeats: runs per entry, taken in turn through the whole table so that a slow moment touches all alike.
        seconds: length of a run; short calls are repeated within it.
    """
    solvers: dict[str, Callable[[np.ndarray], Any]] = {
        "minimum_norm_point": minimum_norm_point,
        "frank_wolfe": frank_wolfe,
        "spectrum": spectrum,
    }
    problems = {(tasks, kind): gramian for tasks in TASKS for kind, gramian in gramians(tasks).items()}
    runs: dict[str, Callable[[], object]] = {}
    calls: dict[str, int] = {}
    for (tasks, kind), gramian in problems.items():
        for name, solver in solvers.items():
            key = f"{tasks} {kind} {name}"
            solver(gramian)
            start = time.perf_counter()
            solver(gramian)
            calls[key] = max(1, int(seconds / (time.perf_counter() - start)))
            runs[key] = partial(_repeat, solver, gramian, calls[key])
    measured = interleaved(runs, repeats)
    table = []
    for (tasks, kind), gramian in problems.items():
        for name, solver in solvers.items():
            key = f"{tasks} {kind} {name}"
            row: dict[str, Any] = {"tasks": tasks, "gradients": kind, "call": name}
            row["microseconds"] = 1e6 * median(measured[key]) / calls[key]
            row["target"] = TARGETS[tasks] if name == "minimum_norm_point" else None
            if name != "spectrum":
                weights = solver(gramian)
                row["residual"] = float(simplex_residual(gramian, weights))
                row["tasks with weight"] = int(np.count_nonzero(weights))
            table.append(row)
    return table


def _repeat(solver: Callable[[np.ndarray], Any], gramian: np.ndarray, calls: int) -> None:
    for _ in range(calls):
        solver(gramian)


def main() -> None:
    """Print the table."""
    print("tasks  gradients    call                 median µs  target µs  residual  weights")
    for row in rows():
        target = "" if row["target"] is None else f"{row['target']:.0f}"
        residual = f"{row['residual']:.0e}" if "residual" in row else ""
        print(
            f"{row['tasks']:>5}  {row['gradients']:13}{row['call']:20}{row['microseconds']:>10.1f}{target:>11}"
            f"{residual:>10}{row.get('tasks with weight', ''):>9}"
        )


if __name__ == "__main__":
    main()
