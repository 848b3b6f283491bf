"""One exact step of this tree beside one of another commit (`--base REV`), both measured in one run.

Two processes live side by side and import one tree's package each; the networks are this tree's for both. They take
turns, one waiting while the other computes, and change who comes first with every turn. A turn is a number of steps of
`detente.backward` with `mgda`, forward pass included, in processor time on one thread. A ratio is that of one turn; the
median and the range are shown, and promised is a median of at most 1.03 over 20 turns of both. `--base HEAD` on a clean
tree shows what the machine alone does to these ratios. Before the turns both processes take one step from the same
seed; networks on which the gradients differ by more than rounding are named.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import detente
from benchmarks._base import BASE, ROOT, NoBase, environment, tree
from benchmarks._networks import Case, lenet, recurrent, resnet, transformer

LIMIT = 1.03
TURNS = 21
# Processor seconds of one turn; a step that takes longer is a turn of its own.
TURN = 0.2
# Name and number of tasks, batch where it is not the network's own: T rows of a ResNet take 0.4 GB with 8 tasks.
NETWORKS: dict[str, Callable[..., Case]] = {
    "LeNet": lenet,
    "ResNet-18": resnet,
    "transformer": transformer,
    "GRU": recurrent,
}
CASES: tuple[tuple[str, int, int | None], ...] = (
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
    """Build a network and tell its gradient, or take steps on the last one and tell the seconds of one."""
    if "network" in request:
        current.clear()  # the last one's rows are large
        size = {} if request["batch"] is None else {"batch": request["batch"]}
        case = NETWORKS[request["network"]](request["tasks"], **size)
        current.update(case=case, method=detente.create("mgda"))
        torch.manual_seed(1)  # dropout
        _step(**current)
        gradient = torch.cat([p.grad.flatten().double() for p in case.shared if p.grad is not None])
        pattern = torch.arange(gradient.numel(), dtype=torch.float64).cos()
        case.clear()
        return {"told": [float(gradient.norm()), float(gradient @ pattern)]}
    started = time.process_time()
    for _ in range(request["steps"]):
        _step(**current)
        current["case"].clear()
    return {"seconds": (time.process_time() - started) / request["steps"]}


def serve() -> None:
    """Answer requests, one JSON object a line, until they end."""
    torch.set_num_threads(1)
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
        package = self._read()["package"]
        if Path(package) != (folder / "src" / "detente").resolve():
            raise RuntimeError(f"{package} was imported instead of the package below {folder}")

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
    """One network: seconds of a step of the other commit (median), the turns' ratios, and whether gradients agree."""

    name: str
    tasks: int
    seconds: float
    ratios: list[float]
    same: bool


def compare(here: Worker, there: Worker, case: tuple[str, int, int | None], turns: int = TURNS) -> Row:
    """Let both processes take turns on one network."""
    name, tasks, batch = case
    told = [worker.ask(network=name, tasks=tasks, batch=batch)["told"] for worker in (here, there)]
    scale = max(abs(told[1][0]), 1e-30)
    same = all(math.isclose(a, b, abs_tol=SAME * scale) for a, b in zip(*told, strict=True))
    here.ask(steps=1)  # both warm up; the second step of the other one tells how long a turn is
    there.ask(steps=1)
    steps = max(1, round(TURN / max(there.ask(steps=1)["seconds"], 1e-6)))
    mine, theirs = [], []
    for turn in range(turns):
        order = ((here, mine), (there, theirs))
        for worker, seconds in order if turn % 2 == 0 else reversed(order):
            seconds.append(worker.ask(steps=steps)["seconds"])
    pairs = zip(mine, theirs, strict=True)
    return Row(name, tasks, statistics.median(theirs), [a / b for a, b in pairs], same)


def rows(
    base: str, cases: tuple[tuple[str, int, int | None], ...] = CASES, turns: int = TURNS
) -> Iterator[Row]:
    """One row per network.

    Raises:
        NoBase: the other commit is not here.
    """
    with tree(base) as folder:
        workers: list[Worker] = []
        try:
            for place in (ROOT, folder):
                workers.append(Worker(place))
            for case in cases:
                yield compare(*workers, case, turns)
        finally:
            for worker in workers:
                worker.close()


def _told(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):7.3f}  ({min(ratios):.3f} to {max(ratios):.3f})"


def _verdict(ratios: list[float]) -> str:
    kept = statistics.median(ratios) <= LIMIT
    return f"promised <= {LIMIT}: {'kept' if kept else 'NOT KEPT'}"


def main(base: str = BASE) -> None:
    """Print the ratios of every network, and of all together."""
    everything: list[float] = []
    print(f"exact step of this tree / of {base}, {TURNS} turns each; milliseconds are those of {base}")
    try:
        for row in rows(base):
            everything += row.ratios
            note = "" if row.same else "   the gradients differ"
            line = f"{row.name:12} T = {row.tasks:<3}{1000 * row.seconds:9.1f} ms {_told(row.ratios)}"
            print(f"{line}  {_verdict(row.ratios)}{note}", flush=True)
    except NoBase as error:
        print(f"left out: {error}")
        return
    print(f"{'all turns':33}{_told(everything)}  {_verdict(everything)}")


if __name__ == "__main__":
    serve()
