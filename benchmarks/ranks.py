"""Messages between two, three and four gloo processes on this machine, beside the cost model's seconds; and the model
read off for a large job.

First each collective alone at lengths from 1 KB to 64 MB, in turns with the steps below: a line through the medians
gives the seconds of an empty message and of a byte. Latency of a hop and bandwidth are what the model makes of these:
where its factors for the number of ranks hold, they are the same in every row. Then the collectives of real steps, each
timed from the moment when all ranks are there. "predicted" is the model's list of collectives at the line's seconds;
"replayed" is the same list sent again with nothing between: it tells an error of the line from what a step does to its
messages. "beyond alone" is what the whole step takes longer than with ``process_group=False``, which contains waiting
and packing too. The processes share this machine's cores. Last the bytes that a step adds at its peak to those of the
forward pass, as the model has it and as the system counts it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import detente
from benchmarks._at_scale import Rows, label, memory_of, tables
from benchmarks._cost_model import (
    KINDS,
    Kind,
    Message,
    Sizes,
    Space,
    buckets_of,
    held,
    hops,
    messages,
    volume,
)
from benchmarks._processes import in_processes, recorded
from detente.autograd.ranks import Ranks
from detente.training.memory import peak_allocated

RANKS = (2, 3, 4)
LENGTHS = tuple(1 << power for power in range(10, 27, 2))  # 1 KB to 64 MB
TASKS, SHARED, MOST = (2, 8, 20), (100_000, 1_000_000, 10_000_000), 100_000_000  # at most so many numbers T P
# One method of each kind; what it declares is all that the model reads.
STEPS: tuple[tuple[str, Space], ...] = (
    ("uniform", "none"),
    ("mgda", "features"),
    ("graddrop", "features"),
    ("mgda", "layer"),
    ("mgda", "exact"),
    ("graddrop", "exact"),
)
EXAMPLES, LAYER = 4, 64
MEMORY_TASKS = 6
PEAKS: tuple[tuple[str, Space, dict[str, Any]], ...] = (
    *((name, space, {}) for name, space in STEPS),
    ("mgda", "exact", {"memory": "batched"}),
    ("mgda", "exact", {"micro_batches": 2}),
    ("graddrop", "exact", {"micro_batches": 2}),
    ("db-mtl", "exact", {}),
    ("mgda", "exact", {"memory": "low"}),
)
Case = tuple[str, Space, int, int]  # method, space, T, about P


@dataclass(frozen=True)
class Line:
    """Seconds of a collective: ``start`` and ``per_byte`` for each byte; ``off``, the largest relative error."""

    start: float
    per_byte: float
    off: float

    def seconds(self, message: Message) -> float:
        """Of one message."""
        return self.start + self.per_byte * message.bytes


@dataclass(frozen=True)
class Step:
    """One kind of step: seconds of its collectives, predicted, replayed and measured; of the step beyond one alone."""

    method: str
    space: Space
    tasks: int
    shared: int
    collectives: int
    bytes: int
    predicted: float
    replayed: float
    measured: float
    beyond: float


@dataclass(frozen=True)
class Measured:
    """What was measured with some number of ranks."""

    ranks: int
    lines: dict[Kind, Line]
    steps: list[Step]


# ---- inside the processes


def _call(ranks: Ranks, kind: Kind, length: int) -> Callable[[], object]:
    """A collective as the engine sends it, each rank handing over ``length`` bytes."""
    tensor, kept = torch.zeros(length // 4), torch.zeros(length // (4 * ranks.size))
    calls: dict[Kind, Callable[[], object]] = {
        "all-reduce": lambda: ranks.sum(tensor),
        "reduce-scatter": lambda: ranks.scatter_sum(tensor, kept),
        "all-gather": lambda: ranks.gather(tensor),
        "broadcast": lambda: ranks.from_first(tensor, tensor.device),
    }
    return calls[kind]


def _ping(lengths: Sequence[int]) -> list[list[list[float]]]:
    """Seconds of some rounds of each collective at each length."""
    ranks = Ranks()
    return [
        [_timed(_call(ranks, kind, length), max(3, min(10, (1 << 22) // length))) for length in lengths]
        for kind in KINDS
    ]


def _timed(call: Callable[[], object], rounds: int) -> list[float]:
    with recorded() as sent:
        for _ in range(rounds + 1):
            call()
    return [one.seconds for one in sent[1:]]


class Layers(nn.Module):
    """A trunk of about P weights and T heads; few examples, so that messages are what takes time."""

    def __init__(self, shared: int, tasks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        side = round(shared**0.5)
        self.first, self.last = nn.Linear(side, side, bias=False), nn.Linear(side, LAYER, bias=False)
        self.heads = nn.ModuleList(nn.Linear(LAYER, 1, bias=False) for _ in range(tasks))
        self.inputs = torch.randn(EXAMPLES, side)

    def forward(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Representation and T losses."""
        z = self.last(self.first(self.inputs).tanh()).tanh()
        return z, [head(z).sub(place).square().mean() for place, head in enumerate(self.heads)]

    def sizes(self, ranks: int) -> Sizes:
        """What the model reads."""
        layer = self.last.weight.numel()
        return Sizes(
            tasks=len(self.heads),
            shared=self.first.weight.numel() + layer,
            own=LAYER * len(self.heads),
            ranks=ranks,
            tensors=2 + len(self.heads),
            features=(EXAMPLES * LAYER,),
            layer=layer,
            shared_tensors=2,
            buckets=buckets_of([layer, self.first.weight.numel()]),
        )


def _session(groups: Sequence[Sequence[Case]], lengths: Sequence[int]) -> tuple[list[Any], list[Any]]:
    """Pings before every group of cases, and what :func:`_step` tells of each case."""
    pings, told = [], []
    for cases in groups:
        pings.append(_ping(lengths))
        told += [_step(*case) for case in cases]
    return pings, told


def _step(name: str, space: Space, tasks: int, shared: int) -> tuple[Sizes, list[int], list[float]]:
    network, ranks = Layers(shared, tasks), Ranks()
    together, alone = detente.create(name), detente.create(name)

    def step(method: detente.Method, **more: Any) -> float:
        z, losses = network()
        if space == "features":
            more["features"] = z
        if space == "layer":
            more["solve_on"] = network.last
        dist.barrier()
        started = time.perf_counter()
        detente.backward(losses, method, **more)
        taken = time.perf_counter() - started
        network.zero_grad()
        return taken

    step(together)  # the first step has more to say: everything must still be found out
    with recorded() as sent:
        step(together)
    lengths = [one.bytes for one in sent]
    distinct = {(one.kind, one.bytes): _call(ranks, one.kind, one.bytes) for one in sent}
    again = [distinct[one.kind, one.bytes] for one in sent]
    seconds: list[list[float]] = [[], [], [], []]
    for _ in range(max(3, min(15, 20_000_000 // (tasks * shared)))):
        with recorded() as replayed:
            for call in again:
                call()
        with recorded() as sent:
            step(together)
        seconds[0].append(sum(one.seconds for one in replayed))
        seconds[1].append(sum(one.seconds for one in sent))
        seconds[2].append(step(together))
        seconds[3].append(step(alone, process_group=False))
    return network.sizes(ranks.size), lengths, [statistics.median(column) for column in seconds]


def _peaks(ranks: int, shared: int) -> list[tuple[Sizes, int]]:
    """For each case its sizes, and the most that tensors hold during a step beyond what the forward pass left."""
    return [_peak(*case, shared, None if ranks > 1 else False) for case in PEAKS]


def _peak(name: str, space: Space, options: dict[str, Any], shared: int, group: Any) -> tuple[Sizes, int]:
    # Gloo's threads let go of their copies when they come to it, on a busy machine later: the least counts.
    found = [_peak_once(name, space, options, shared, group) for _ in range(3)]
    return found[0][0], min(counted for _, counted in found)


def _peak_once(
    name: str, space: Space, options: dict[str, Any], shared: int, group: Any
) -> tuple[Sizes, int]:
    network, method = Layers(shared, MEMORY_TASKS), detente.create(name)
    parts = options.get("micro_batches", 1)
    more: dict[str, Any] = {"memory": options.get("memory", "fast"), "process_group": group}
    z, losses = network()
    if space == "features":
        more["features"] = z
    if space == "layer":
        more["solve_on"] = network.last

    def step() -> None:
        nonlocal losses
        if parts == 1:
            detente.backward(losses, method, **more)
            return
        with detente.accumulate(method, parts):
            for _ in range(parts):
                detente.backward(losses, method, **more)
                losses = network()[1]

    return network.sizes(dist.get_world_size()), peak_allocated(step)


# ---- outside


def peak_ratios(ranks: int, shared: int) -> dict[str, tuple[float, int]]:
    """Bytes of a step on paper and as counted in this number of processes, by kind of step."""
    found = {}
    for (name, space, options), (sizes, counted) in zip(
        PEAKS, in_processes(_peaks, ranks, ranks, shared)[0], strict=True
    ):
        info = detente.methods()[name]
        state, moment = memory_of(name) if info.takes_gradients else (0.0, (0.0, 1.0))
        on_paper = held(info, space, sizes, state=state, moment=moment, **options)
        found[f"{name}, {label(space, options)}"] = on_paper, counted
    return found


def line_through(lengths: Sequence[int], seconds: Sequence[float]) -> Line:
    """The line with the least relative errors."""
    x, y = np.asarray(lengths, dtype=np.float64), np.asarray(seconds)
    (start, per_byte), *_ = np.linalg.lstsq(np.stack([1 / y, x / y], axis=1), np.ones(len(y)), rcond=None)
    return Line(float(start), float(per_byte), float(np.abs((start + per_byte * x) / y - 1).max()))


def measure(ranks: int) -> Measured:
    """Everything, with this number of processes."""
    lengths = [length // (4 * ranks) * 4 * ranks for length in LENGTHS]
    groups: list[list[Case]] = [
        [(*step, tasks, shared) for step in STEPS]
        for shared in SHARED
        for tasks in TASKS
        if tasks * shared <= MOST
    ]
    sessions = in_processes(_session, ranks, groups, lengths)
    lines = {}
    for place, kind in enumerate(KINDS):
        medians = [
            max(statistics.median([s for ping in pings for s in ping[place][at]]) for pings, _ in sessions)
            for at in range(len(lengths))
        ]
        lines[kind] = line_through(lengths, medians)
    found = []
    cases = [case for group in groups for case in group]
    for case, told in zip(cases, zip(*(told for _, told in sessions), strict=True), strict=True):
        name, space, tasks, _ = case
        sizes, sent, _ = told[0]
        listed = messages(detente.methods()[name], space, sizes)
        assert [message.bytes for message in listed] == sent, f"the model does not list what {case} sends"
        replayed, measured, whole, alone = (
            max(medians) for medians in zip(*(medians for _, _, medians in told), strict=True)
        )
        predicted = sum(lines[message.kind].seconds(message) for message in listed)
        seconds = predicted, replayed, measured, whole - alone
        found.append(Step(name, space, tasks, sizes.shared, len(sent), sum(sent), *seconds))
    return Measured(ranks, lines, found)


def line_rows(measured: Iterable[Measured]) -> Rows:
    """The fitted lines, and latency and bandwidth as the model understands them."""
    found = [("collective", "ranks", "empty", "per MB", "largest error", "latency of a hop", "bandwidth")]
    for kind in KINDS:
        for one in measured:
            line = one.lines[kind]
            hop = line.start / hops(kind, one.ranks)
            bandwidth = volume(kind, one.ranks) / line.per_byte
            found.append(
                (
                    kind,
                    str(one.ranks),
                    f"{line.start * 1e6:.0f} µs",
                    f"{line.per_byte * 1e9:.2f} ms",
                    f"{line.off:.0%}",
                    f"{hop * 1e6:.0f} µs",
                    f"{bandwidth / 1e9:.2f} GB/s",
                )
            )
    return found


def step_rows(measured: Measured) -> Rows:
    """Predicted beside measured seconds of every kind of step."""
    found = [
        ("step", "T", "P", "collectives", "MB", "predicted", "replayed", "measured", "ratio", "beyond alone")
    ]
    for step in measured.steps:
        found.append(
            (
                f"{step.method}, {step.space}",
                str(step.tasks),
                f"{step.shared:.1e}",
                str(step.collectives),
                f"{step.bytes / 1e6:.2f}",
                f"{step.predicted * 1e3:.2f} ms",
                f"{step.replayed * 1e3:.2f} ms",
                f"{step.measured * 1e3:.2f} ms",
                f"{step.predicted / step.measured:.2f}",
                f"{step.beyond * 1e3:.1f} ms",
            )
        )
    return found


def ratio_rows(measured: Iterable[Measured]) -> Rows:
    """Predicted over measured seconds, by ranks and kind of step: median and range over T and P."""
    measured = list(measured)
    found = [("step", *(f"{one.ranks} ranks" for one in measured))]
    for method, space in STEPS:
        row = [f"{method}, {space}"]
        for one in measured:
            ratios = [s.predicted / s.measured for s in one.steps if (s.method, s.space) == (method, space)]
            row.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        found.append(tuple(row))
    return found


def summary(steps: Iterable[tuple[int, Step]], factor: float = 1.5) -> str:
    """In words, how far off the model is: steps with their number of ranks."""
    steps = list(steps)
    told = []
    for ranks in sorted({ranks for ranks, _ in steps}):
        here = [step for count, step in steps if count == ranks]
        near = sum(1 / factor <= step.predicted / step.measured <= factor for step in here)
        again = sum(1 / factor <= step.replayed / step.measured <= factor for step in here)
        told.append(f"with {ranks} ranks {near} (replayed: {again}) of {len(here)}")
    ranks, worst = max(steps, key=lambda found: abs(log(found[1].predicted / found[1].measured)))
    return (
        f"Predicted within a factor {factor} of measured: {', '.join(told)}. Furthest off: {worst.method}, "
        f"{worst.space}, T = {worst.tasks}, P = {worst.shared:.1e} on {ranks} ranks, "
        f"{worst.predicted / worst.measured:.2f} of the measured seconds."
    )


def peak_rows(shared: int = 1_000_000) -> Rows:
    """Bytes on paper beside those counted."""
    found = [("step", "ranks", "on paper", "counted", "ratio")]
    for ranks in (1, 2):
        for step, (on_paper, counted) in peak_ratios(ranks, shared).items():
            cells = f"{on_paper / 1e6:.1f} MB", f"{counted / 1e6:.1f} MB", f"{on_paper / counted:.2f}"
            found.append((step, str(ranks), *cells))
    return found


def text(rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main() -> None:
    """Print all tables."""
    measured = [measure(ranks) for ranks in RANKS]
    print(text(line_rows(measured)))
    print(f"\n{summary((one.ranks, step) for one in measured for step in one.steps)}")
    print("\npeak\n" + text(peak_rows()))
    print("\npredicted / measured\n" + text(ratio_rows(measured)))
    for one in measured:
        print(f"\n{one.ranks} ranks\n{text(step_rows(one))}")
    for title, rows in tables().items():
        print(f"\n{title}\n{text(rows)}")
