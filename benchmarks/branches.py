"""One step on branches of the representation beside a plain step: the price of `features=detente.branch(z, T)`.

A step is the forward pass, the gradients, and `.grad`; no optimizer. Plain is `sum(losses).backward()`. The method is
`mgda`. Its own time, that of `combine`, is taken out of the ratios and shown beside them, as part of a plain step: what
remains is what the library adds, the Gramian included. What one product of T rows in float64 takes is shown too, as the
least that a Gramian costs. "Unbranched" is `features=z`, where all heads read one tensor and autograd is asked
once for each; "stacked" is the plain step with `torch.stack(losses).sum()`, which spares T additions.

Times are processor time on one thread, in turns, as ratios of the same round: median and range; the process keeps freed
memory, because giving it back and asking again takes more time than what is measured. Promised are at most
1.05 on ResNet-18 and the transformer, 1.10 on LeNet and the recurrent network, 1.15 for a hundred small heads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import detente
from benchmarks._networks import Case, lenet, many_heads, recurrent, resnet, transformer
from benchmarks._timing import interleaved, keep_memory
from detente.training.processes import threads

CLOCK = time.process_time
ROUNDS, BUDGET, LEAST = 101, 25.0, 15
# Factories and limits, each network made when it is its turn.
CASES: tuple[tuple[Callable[[], Case], float], ...] = (
    (lambda: resnet(3), 1.05),
    (lambda: resnet(40), 1.05),
    (lambda: transformer(3), 1.05),
    (lambda: transformer(40), 1.05),
    (lambda: lenet(8), 1.10),
    (lambda: lenet(40), 1.10),
    (lambda: recurrent(8), 1.10),
    (lambda: recurrent(40), 1.10),
    (lambda: many_heads(), 1.15),
)


@dataclass
class Run:
    """A way to take a step, and the seconds that its method took in every call so far."""

    step: Callable[[], object]
    inside: list[float] = field(default_factory=list)

    def timed(self, combine: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Let a method's ``combine`` note how long it takes."""

        def noting(gradients: Any) -> Any:
            started = CLOCK()
            try:
                return combine(gradients)
            finally:
                self.inside.append(CLOCK() - started)

        return noting


@dataclass
class Row:
    """One way to take a step.

    Attributes:
        way: its name.
        ratios: to the plain step of the same round, without the method's own time.
        method: the method's own time as part of a plain step, the median.
    """

    way: str
    ratios: list[float]
    method: float


@dataclass
class Table:
    """One network, and the ways to take a step on it; promised is the one on branches.

    Attributes:
        case: the network.
        seconds: of a plain step, the median.
        gramian: seconds of the product of T rows of the representation's size with their transpose, in float64.
        rows: the ways.
        limit: of the branches' ratio.
    """

    case: Case
    seconds: float
    gramian: float
    rows: list[Row]
    limit: float


def runs(case: Case) -> dict[str, Run]:
    """For each way what makes a step; branches only where the library offers them."""

    def plain() -> None:
        sum(case.forward()[1]).backward()  # type: ignore[union-attr]

    def stacked() -> None:
        torch.stack(case.forward()[1]).sum().backward()

    def with_method(branched: bool) -> Run:
        method = detente.create("mgda")

        def step() -> None:
            if branched:
                branches = detente.branch(case.encode(), case.tasks)  # type: ignore[attr-defined]
                detente.backward(case.heads(branches), method, features=branches)
            else:
                z, losses = case.forward()
                detente.backward(losses, method, features=z)

        run = Run(step)
        method.combine = run.timed(method.combine)  # type: ignore[method-assign]
        return run

    found = {"plain": Run(plain), "stacked": Run(stacked), "unbranched": with_method(False)}
    if hasattr(detente, "branch"):
        found["branches"] = with_method(True)
    return found


def measure(case: Case, limit: float, *, rounds: int = ROUNDS, budget: float = BUDGET) -> Table:
    """Take steps in every way in turns."""
    ways = runs(case)

    def cleared(run: Run) -> Callable[[], None]:
        def step() -> None:
            run.step()
            case.clear()

        return step

    steps = {way: cleared(run) for way, run in ways.items()}
    seconds = interleaved(steps, rounds, warmup=3, budget=budget, least=LEAST, clock=CLOCK)
    plain, found = seconds["plain"], []
    for way, run in ways.items():
        inside = run.inside[-len(plain) :] if run.inside else [0.0] * len(plain)
        triples = list(zip(seconds[way], inside, plain, strict=True))
        ratios = [(whole - own) / base for whole, own, base in triples]
        found.append(Row(way, ratios, statistics.median(own / base for _, own, base in triples)))
    return Table(case, statistics.median(plain), _gramian(case), found, limit)


def _gramian(case: Case) -> float:
    rows = torch.randn(case.tasks, case.encode().numel(), dtype=torch.float64)
    seconds = interleaved({"product": lambda: rows @ rows.T}, 21, warmup=3, clock=CLOCK)
    return statistics.median(seconds["product"])


def tables() -> Iterator[Table]:
    """One table per network."""
    for make, limit in CASES:
        yield measure(make(), limit)


def verdict(table: Table) -> str:
    """Whether what is promised of the branches holds; empty without them."""
    for row in table.rows:
        if row.way == "branches":
            kept = statistics.median(row.ratios) <= table.limit
            return f"promised <= {table.limit:.2f}: {'kept' if kept else 'NOT KEPT'}"
    return ""


def show(table: Table) -> None:
    """Print one table."""
    case, plain = table.case, table.rows[0]
    told = f"plain step {1000 * table.seconds:.1f} ms, {len(plain.ratios)} rounds"
    told += f", a Gramian {table.gramian / table.seconds:.4f}"
    print(f"{case.name}, T = {case.tasks}, batch {case.batch}: {told}")
    for row in table.rows[1:]:
        ratio = f"{statistics.median(row.ratios):7.3f}  ({min(row.ratios):.3f} to {max(row.ratios):.3f})"
        method = f"  method {row.method:.4f}" if row.method else ""
        promise = f"  {verdict(table)}" if row.way == "branches" else ""
        print(f"  {row.way:11}{ratio}{method}{promise}")
    print(flush=True)


def main() -> None:
    """Print every table."""
    if not hasattr(detente, "branch"):
        print("detente.branch is not there: only the unbranched way is measured")
    keep_memory()
    with threads(1):
        for table in tables():
            show(table)
