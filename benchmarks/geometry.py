"""Time of the T×T mathematics, medians of interleaved runs: shortest vector (exact, Frank-Wolfe) and spectrum.

A second table holds the problems of UPGrad and DualProj, solved by scipy's non-negative least squares, against the
solvers written by hand that it replaced (`_pivoting`).

Gradients have 2000 entries. `independent` ones are Gaussian, so that every task gets weight; `correlated` ones share
a direction and differ in length, so that few do; `conflicting` ones have nine tenths of their mean taken away (no
conflict with the mean, for DualProj); `dependent` ones span half as many dimensions as there are tasks; of `cancelling`
ones the last is minus the mean of the others, and of `opposite` ones two are opposite up to rounding in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from benchmarks import _pivoting
from benchmarks._timing import interleaved
from detente.geometry import nonnegative
from detente.geometry.dual_cone import dual_cone_projection, dual_cone_projections
from detente.geometry.gramian import unit_rows
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


def conflicts(tasks: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Gramians of gradients in conflict: independent, dependent, cancelling, opposite up to rounding."""
    rng = np.random.default_rng([seed, tasks, 1])
    own = rng.standard_normal((tasks, DIMENSION))
    rank = max(1, tasks // 2)
    cancelling, opposite = own.copy(), own.astype(np.float32)
    cancelling[-1] = -own[:-1].mean(axis=0)
    opposite[1] = np.float32(-0.3) * opposite[0]
    kinds = {
        "conflicting": own - 0.9 * own.mean(axis=0),
        "dependent": rng.standard_normal((tasks, rank)) @ rng.standard_normal((rank, DIMENSION)),
        "cancelling": cancelling,
        "opposite": opposite.astype(np.float64),
    }
    return {kind: rows @ rows.T for kind, rows in kinds.items()}


def dual_cone_rows(repeats: int = 15, seconds: float = 0.01) -> list[dict[str, Any]]:
    """Milliseconds of one projection (DualProj) and of all (UPGrad), by NNLS and by hand; as :func:`rows`."""
    runs: dict[str, Callable[[], object]] = {}
    calls: dict[str, int] = {}
    table: list[dict[str, Any]] = []
    for tasks in (2, 4, 8, 40):
        for kind, gramian in conflicts(tasks).items():
            table.append({"tasks": tasks, "gradients": kind})
            for name, solver in {
                "one": partial(dual_cone_projection, preference=np.full(tasks, 1 / tasks)),
                "one by hand": partial(_by_hand, preference=np.full((1, tasks), 1 / tasks)),
                "all": dual_cone_projections,
                "all by hand": partial(_by_hand, preference=None),
            }.items():
                key = f"{tasks} {kind} {name}"
                table[-1][f"{name} fails"] = solver(gramian) is None
                start = time.perf_counter()
                solver(gramian)
                calls[key] = max(1, int(seconds / (time.perf_counter() - start)))
                runs[key] = partial(_repeat, solver, gramian, calls[key])
    measured = interleaved(runs, repeats)
    for row in table:
        for name in ("one", "one by hand", "all", "all by hand"):
            key = f"{row['tasks']} {row['gradients']} {name}"
            row[name] = 1e6 * median(measured[key]) / calls[key]
    return table


def _by_hand(gramian: np.ndarray, preference: np.ndarray | None) -> np.ndarray | None:
    """The same work as the projections': checks, cosines, minimisers, residual."""
    norms, cosines = unit_rows(gramian)
    starts = np.eye(len(norms)) if preference is None else preference * (norms / norms.max())
    linears, sizes = starts @ cosines, starts @ np.abs(cosines)
    solutions = _pivoting.minimisers(cosines, linears, sizes)
    if solutions is not None:
        nonnegative.residual(cosines, linears, sizes, solutions)
    return solutions


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
    print()
    print("tasks  gradients    DualProj µs  by hand   ratio    UPGrad µs  by hand   ratio")
    for row in dual_cone_rows():
        texts = []
        for name in ("one", "all"):
            hand, ratio = f"{row[f'{name} by hand']:.1f}", f"{row[name] / row[f'{name} by hand']:.2f}"
            if row[f"{name} by hand fails"]:
                hand = ratio = "fails"
            texts.append(f"{row[name]:>10.1f}{hand:>9}{ratio:>8}")
        print(f"{row['tasks']:>5}  {row['gradients']:13}" + "   ".join(texts))


if __name__ == "__main__":
    main()
