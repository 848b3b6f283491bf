"""Time of one `detente.combine` per method and number of tasks, beside TorchJD's aggregators in the same run.

Gradients of P = 2000 numbers in float32, another matrix for every call: entries of a normal distribution, and
(second table) with a common part that makes the tasks agree, so that active sets are small.

With 2, 3 and 8 tasks every method is also held beside a step of ResNet-18 (64x64, batch 32; forward pass, one backward
of the summed losses, no optimizer), taken before and after: promised is less than 1 % of it. What grows with the
network, the Gramian and the weighted sum of 11 million numbers, is no part of this: `modes` has it, in whole steps.
Where TorchJD takes more than 200 µs it is promised never to be slower, and several times faster at 40 tasks. Processor
time on one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import detente
from benchmarks._networks import resnet
from detente.training.processes import threads

CLOCK = time.process_time
TASKS = (2, 3, 8, 40, 100)
PARAMETERS = 2000
# Where TorchJD needs more than this, we are promised to be no slower.
SLOW = 200e-6
# Of a step of ResNet-18, for so many tasks at most.
SHARE, FEW = 0.01, 8
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
# Steps of the ResNet before, and as many after, the methods of one number of tasks.
STEPS = 5


def _seconds(run: Callable[[torch.Tensor], Any], matrices: Sequence[torch.Tensor]) -> float:
    """Seconds per call in one block."""
    started = CLOCK()
    calls, passed = 0, 0.0
    while calls < len(matrices) and passed < LONGEST:
        run(matrices[calls])
        calls, passed = calls + 1, CLOCK() - started
    return passed / calls


def network_step(tasks: int) -> Callable[[], float]:
    """A plain step of ResNet-18, which tells its seconds."""
    case = resnet(tasks)

    def step() -> float:
        started = CLOCK()
        torch.stack(case.forward()[1]).sum().backward()
        passed = CLOCK() - started
        case.clear()
        return passed

    step()
    return step


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
        turns = rounds if count < 100 else max(3, rounds // 5)
        for name in detente.methods():
            table.append(_row(name, rivals.get(name), given, turns))
    return table


def _row(
    name: str, rival: Callable[[torch.Tensor], Any] | None, given: Sequence[torch.Tensor], turns: int
) -> dict[str, Any]:
    run = ours(name)
    mine: list[float] = []
    theirs: list[float] = []
    for turn in range(turns + 1):
        shifted = [*given[turn % BLOCK :], *given[: turn % BLOCK]]
        here = _seconds(run, shifted)
        there = _seconds(rival, shifted) if rival is not None else None
        if turn:  # the first block of each is not counted
            mine.append(here)
            if there is not None:
                theirs.append(there)
    torchjd = statistics.median(theirs) if theirs else None
    return {"method": name, "T": len(given[0]), "seconds": statistics.median(mine), "torchjd": torchjd}


def with_shares(
    tasks: Sequence[int] = TASKS, rounds: int = 21, *, agreeing: bool = False
) -> list[dict[str, Any]]:
    """The same rows, for few tasks with the part ("share") of a step of ResNet-18 that a call takes.

    The steps are taken before and after all methods of one T; their median counts.
    """
    table = []
    for count in tasks:
        step = network_step(count) if count <= FEW else None
        steps = [step() for _ in range(STEPS)] if step is not None else []
        group = rows((count,), rounds, agreeing=agreeing)
        steps += [step() for _ in range(STEPS)] if step is not None else []
        for row in group:
            row["share"] = row["seconds"] / statistics.median(steps) if steps else None
        table += group
    return table


def verdicts(row: dict[str, Any]) -> list[tuple[str, bool]]:
    """What is promised of this row, and whether it holds."""
    mine, theirs, told = row["seconds"], row["torchjd"], []
    if theirs is not None and theirs > SLOW:
        factor = FASTER.get(row["method"], 1) if row["T"] == 40 else 1
        told.append((f"{factor} x", bool(mine * factor <= theirs)))
    if row.get("share") is not None:
        told.append((f"< {SHARE:.0%} of a step", bool(row["share"] < SHARE)))
    return told


def main() -> None:
    """Print both tables."""
    with threads(1):
        for agreeing in (False, True):
            print("gradients that agree in part" if agreeing else "gradients of independent normal entries")
            for row in with_shares(agreeing=agreeing):
                show(row)


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    theirs, share = row["torchjd"], row["share"]
    peer = f"{theirs * 1e6:10.0f} us {theirs / row['seconds']:7.1f} x" if theirs else " " * 23
    part = f"{share:8.2%}" if share is not None else " " * 8
    told = ", ".join(f"{what}: {'kept' if kept else 'NOT KEPT'}" for what, kept in verdicts(row))
    line = f"  {row['method']:14} T={row['T']:<4} {row['seconds'] * 1e6:9.0f} us {peer} {part}"
    print(f"{line}  promised {told}" if told else line.rstrip())
