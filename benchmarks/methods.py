"""Time of one `detente.combine` per method and number of tasks, beside TorchJD's aggregators in the same run.

Gradients of P = 2000 numbers in float32, another matrix for every call: entries of a normal distribution, and
(second table) with a common part that makes the tasks agree, so that active sets are small.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import detente

TASKS = (2, 3, 8, 40, 100)
PARAMETERS = 2000
# What is promised: where TorchJD needs more than this, never slower; elsewhere at most LIMIT.
SLOW = 200e-6
LIMIT = 150e-6
# At T = 40, at least so many times faster than TorchJD.
FASTER = {"nash-mtl": 10, "pcgrad": 10, "gradvac": 10, "cagrad": 5, "upgrad": 5, "fairgrad": 5}


def peers(tasks: int) -> dict[str, Callable[[torch.Tensor], Any]]:
    """TorchJD's aggregators by the name of our method."""
    from torchjd import aggregation as a

    made: dict[str, Callable[[], Any]] = {
        "uniform": a.Sum,
        "mgda": a.MGDA,
        "aligned-mtl": a.AlignedMTL,
        "cagrad": lambda: a.CAGrad(c=0.5),
        "config": a.ConFIG,
        "dualproj": a.DualProj,
        "excess-mtl": a.ExcessMTL,
        "fairgrad": lambda: a.FairGrad(alpha=1.0),
        "graddrop": a.GradDrop,
        "gradvac": a.GradVac,
        "imtl-g": a.IMTLG,
        "nash-mtl": lambda: a.NashMTL(n_tasks=tasks),
        "pcgrad": a.PCGrad,
        "rlw": a.Random,
        "upgrad": a.UPGrad,
    }
    found = {}
    for name, make in made.items():
        try:
            found[name] = make()
        except (ImportError, TypeError) as error:
            print(f"TorchJD's {name} cannot be made: {error}")
    return found


def matrices(tasks: int, count: int, *, agreeing: bool, seed: int = 0) -> list[torch.Tensor]:
    """Task gradients [T, P] of norms about 1 to 3."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        rows = torch.randn(tasks, PARAMETERS, generator=generator) / PARAMETERS**0.5
        if agreeing:
            rows = rows + torch.randn(1, PARAMETERS, generator=generator) / PARAMETERS**0.5
        found.append(rows * (1 + 2 * torch.rand(tasks, 1, generator=generator)))
    return found


# Calls in a row before the other one's turn: as in a training loop, code and data of the last call are still in the
# cache. A block ends early after this many seconds.
BLOCK = 10
LONGEST = 0.01


def _seconds(run: Callable[[torch.Tensor], Any], matrices: Sequence[torch.Tensor]) -> float:
    """Seconds per call in one block."""
    started = time.perf_counter()
    calls, passed = 0, 0.0
    while calls < len(matrices) and passed < LONGEST:
        run(matrices[calls])
        calls, passed = calls + 1, time.perf_counter() - started
    return passed / calls


def ours(name: str) -> Callable[[torch.Tensor], Any]:
    """One training step of a fresh method; losses are given to every method."""
    method = detente.create(name)
    return lambda matrix: detente.combine(method, matrix, losses=[1.0 + 0.01 * t for t in range(len(matrix))])


def rows(tasks: Sequence[int] = TASKS, rounds: int = 21, *, agreeing: bool = False) -> list[dict[str, Any]]:
    """One row per method and T: median seconds of ours and of TorchJD's, taken in turns on the same matrices."""
    table = []
    for count in tasks:
        rivals = peers(count)
        given = matrices(count, BLOCK, agreeing=agreeing)
        for name in detente.methods():
            run, rival = ours(name), rivals.get(name)
            mine, theirs = [], []
            turns = rounds if count < 100 else max(3, rounds // 5)
            for turn in range(turns + 1):
                shifted = given[turn % BLOCK :] + given[: turn % BLOCK]
                here = _seconds(run, shifted)
                there = _seconds(rival, shifted) if rival is not None else None
                if turn:  # the first block of each is not counted
                    mine.append(here)
                    if there is not None:
                        theirs.append(there)
            row: dict[str, Any] = {"method": name, "T": count, "seconds": statistics.median(mine)}
            row["torchjd"] = statistics.median(theirs) if theirs else None
            table.append(row)
    return table


def verdict(row: dict[str, Any]) -> str:
    """Whether what is promised of this row holds; empty where nothing is promised."""
    mine, theirs = row["seconds"], row["torchjd"]
    if theirs is not None and theirs > SLOW:
        factor = FASTER.get(row["method"], 1) if row["T"] == 40 else 1
        kept = mine * factor <= theirs
        return f"promised {factor} x: {'kept' if kept else 'NOT KEPT'}"
    if theirs is not None or row["T"] <= 8:
        return f"promised {LIMIT * 1e6:.0f} us: {'kept' if mine <= LIMIT else 'NOT KEPT'}"
    return ""


def main() -> None:
    """Print both tables."""
    for agreeing in (False, True):
        print("gradients that agree in part" if agreeing else "gradients of independent normal entries")
        for row in rows(agreeing=agreeing):
            theirs = row["torchjd"]
            peer = f"{theirs * 1e6:10.0f} us {theirs / row['seconds']:7.1f} x" if theirs else " " * 24
            print(
                f"  {row['method']:14} T={row['T']:<4} {row['seconds'] * 1e6:9.0f} us {peer}  {verdict(row)}"
            )
