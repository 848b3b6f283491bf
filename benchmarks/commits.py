"""One exact step of this tree beside one of another commit (`--base REV`), both measured in one run.

Two processes live side by side and import one tree's package each; the networks are this tree's for both. They take
turns, one waiting while the other computes, and change who comes first with every turn. A turn is a number of steps of
`detente.backward` with `mgda`, forward pass included, of which the median counts, in processor time on one thread. A
ratio is that of one turn; the median and the range are shown, and promised is a median of at most 1.03 over at least
20 turns of both. After five turns both processes begin anew, because some of the differences between two processes
last as long as they live; both keep freed memory, which takes the largest of these away. `--base HEAD` on a clean tree
shows what the machine alone does to these ratios. Before the turns both take one step from the same seed; networks on
which the gradients differ by more than rounding are named.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import detente
from benchmarks._base import BASE, ROOT, NoBase, environment, tree
from benchmarks._networks import Case, lenet, recurrent, resnet, transformer
from benchmarks._timing import keep_memory

LIMIT = 1.03
TURNS, GENERATIONS = 5, 5
# Processor seconds of one turn; a step that takes longer is a turn of its own.
TURN = 0.4
# Name and number of tasks, batch where it is not the network's own: T rows of a ResNet take 0.4 GB with 8 tasks.
NETWORKS: dict[str, Callable[..., Case]] = {
    "LeNet": lenet,
    "ResNet-18": resnet,
    "transformer": transformer,
    "GRU": recurrent,
}
Size = tuple[str, int, int | None]
SIZES: tuple[Size, ...] = (
    *(("LeNet", tasks, None) for tasks in (2, 3, 8, 40)),
    *(("ResNet-18", tasks, batch) for tasks, batch in ((2, None), (3, None), (8, 16))),
    *(("transformer", tasks, batch) for tasks, batch in ((2, None), (3, None), (8, None), (40, 4))),
    *(("GRU", tasks, None) for tasks in (2, 3, 8, 40)),
)
# Both trees add in another order; where gradients differ by more, they do not do the same work.
SAME = 1e-4

# ---- the process of one tree


def _step(case: Case, method: Any) -> None:
    detente.backward(case.forward()[1], method)


def _answer(request: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    """Build a network and tell its gradient, or take steps on the last one and tell their median of seconds."""
    if "network" in request:
        current.clear()  # the last one's rows are large
        size = {} if request["batch"] is None else {"batch": request["batch"]}
        case = NETWORKS[request["network"]](request["tasks"], **size)
        current.update(case=case, method=detente.create("mgda"))
        _step(**current)
        gradient = torch.cat([p.grad.flatten().double() for p in case.shared if p.grad is not None])
        pattern = torch.arange(gradient.numel(), dtype=torch.float64).cos()
        case.clear()
        return {"told": [float(gradient.norm()), float(gradient @ pattern)]}
    seconds = []
    for _ in range(request["steps"]):
        started = time.process_time()
        _step(**current)
        current["case"].clear()
        seconds.append(time.process_time() - started)
    return {"seconds": statistics.median(seconds)}


def serve() -> None:
    """Answer requests, one JSON object a line, until they end."""
    torch.set_num_threads(1)
    keep_memory()
    current: dict[str, Any] = {}
    print(json.dumps({"package": str(Path(detente.__file__).resolve().parent)}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line), current)), flush=True)


class Worker:
    """A process that imports one tree's package and answers requests."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.commits"],
            env=environment(folder),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            package = self._read()["package"]
            if Path(package) != (folder / "src" / "detente").resolve():
                raise RuntimeError(f"{package} was imported instead of the package below {folder}")
        except RuntimeError:
            self.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


# ---- turns


@dataclass
class Row:
    """One network: what both commits took in every turn, and whether their gradients agree."""

    name: str
    tasks: int
    here: list[float] = field(default_factory=list)
    there: list[float] = field(default_factory=list)
    same: bool = True

    @property
    def ratios(self) -> list[float]:
        """Of every turn."""
        return [a / b for a, b in zip(self.here, self.there, strict=True)]


def take_turns(here: Worker, there: Worker, size: Size, row: Row, turns: int) -> None:
    """Let both processes take turns on one network, and add what they took to its row."""
    name, tasks, batch = size
    told = [worker.ask(network=name, tasks=tasks, batch=batch)["told"] for worker in (here, there)]
    near = SAME * max(abs(told[1][0]), 1e-30)
    row.same &= all(math.isclose(a, b, abs_tol=near) for a, b in zip(*told, strict=True))
    here.ask(steps=1)  # both warm up; the second step of the other one tells how long a turn is
    there.ask(steps=1)
    steps = max(1, round(TURN / max(there.ask(steps=1)["seconds"], 1e-6)))
    order = [(here, row.here), (there, row.there)]
    for _ in range(turns):
        for worker, seconds in order:
            seconds.append(worker.ask(steps=steps)["seconds"])
        order.reverse()


def rows(
    base: str, sizes: Sequence[Size] = SIZES, turns: int = TURNS, generations: int = GENERATIONS
) -> list[Row]:
    """Measure every network: so many turns of both commits in each generation of processes.

    Raises:
        NoBase: the other commit is not here.
    """
    found = [Row(name, tasks) for name, tasks, _ in sizes]
    with tree(base) as folder:
        for _ in range(generations):
            with contextlib.ExitStack() as stack:
                here, there = (
                    stack.enter_context(contextlib.closing(Worker(place))) for place in (ROOT, folder)
                )
                for size, row in zip(sizes, found, strict=True):
                    take_turns(here, there, size, row, turns)
    return found


def _told(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):7.3f}  ({min(ratios):.3f} to {max(ratios):.3f})"


def _verdict(ratios: list[float]) -> str:
    kept = statistics.median(ratios) <= LIMIT
    return f"promised <= {LIMIT}: {'kept' if kept else 'NOT KEPT'}"


def main(base: str = BASE) -> None:
    """Print the ratios of every network, and of all together."""
    everything: list[float] = []
    try:
        found = rows(base)
    except NoBase as error:
        print(f"left out: {error}")
        return
    print(
        f"exact step of this tree / of {base}, {TURNS * GENERATIONS} turns each; milliseconds are those of {base}"
    )
    for row in found:
        everything += row.ratios
        note = "" if row.same else "   the gradients differ"
        line = f"{row.name:12} T = {row.tasks:<3}{1000 * statistics.median(row.there):9.1f} ms {_told(row.ratios)}"
        print(f"{line}  {_verdict(row.ratios)}{note}")
    print(f"{'all turns':33}{_told(everything)}  {_verdict(everything)}")


if __name__ == "__main__":
    serve()
