"""Time and peak memory of one step in every mode, beside a plain backward, a loop by hand and TorchJD.

The method is IMTL-G, because it has a closed form here, in TorchJD and by hand: what is compared is how gradients are
taken, not how a problem is solved. A step is the forward pass, the gradients, and `.grad`; no optimizer.

- plain: one backward of the summed losses.
- weighting: `detente.backward` with a weighting that looks at losses only (`uncertainty`).
- features, exact, batched, low: `detente.backward` on the representation, on the parameters, and there with
  `memory="batched"` and `memory="low"`.
- by hand: one `torch.autograd.grad` for each task, flattened, stacked, weighted and cut up again, as users write it.
- TorchJD, TorchJD vmap: `mtl_backward` task by task (`parallel_chunk_size=1`), and in one vectorised backward.

Times are processor time on one thread, which does not count what others on the machine take away, as ratios to the
plain step of the same round: median, range, and number of rounds. Peaks are the bytes that torch's tensors hold at
their highest in a method's first step, every `.grad` included, parameters and inputs not; the same in every run.

Promised are plain + 4 T P bytes for the exact mode and plain + 4 T × (largest parameter), or plain + 8 P where that is
more, for the low one, plus 5 %. Beside TorchJD a promise is kept within the spread if a quarter of the rounds keep it.
Costly steps of large networks are taken on smaller batches, and of a ResNet those alone.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import detente
from benchmarks._networks import Case, lenet, many_heads, recurrent, resnet, transformer
from benchmarks._timing import by_round, interleaved, ratios
from detente.training.memory import peak_allocated
from detente.training.processes import threads

Run = Callable[[], object]
Ratio = tuple[float, float, float]

TASKS = (2, 3, 8, 40, 100)
# Features beside a plain step: where the trunk dominates, and for many small heads on a small trunk.
FEATURES_LIMIT, MANY_HEADS_LIMIT = 1.05, 1.15
MIB = 2**20
CLOCK = time.process_time
# Seconds for the modes that walk the trunk once, and for those that walk it for every task.
CHEAP_BUDGET, COSTLY_BUDGET = 6.0, 6.0
# How much memory a mode may take, in multiples of T gradients: where they are stacked they are held twice, and
# vectorised convolutions take scratch memory of which torch's allocator does not know.
ROOM = {"exact": 1.2, "by hand": 2.5, "TorchJD": 2.5, "batched": 6.0, "TorchJD vmap": 6.0}


@dataclass
class Promise:
    """A limit, what was measured (a median), and the lower end of the spread where that is allowed for."""

    what: str
    measured: float
    limit: float
    lower: float = float("inf")

    @property
    def verdict(self) -> str:
        """In words."""
        if self.measured <= self.limit:
            return "kept"
        return "kept within the spread" if self.lower <= self.limit else "NOT KEPT"

    def __str__(self) -> str:
        return f"{self.what} <= {self.limit:.{2 if self.what == 'time' else 1}f}: {self.verdict}"


@dataclass
class Row:
    """One mode of one case: ratios to the plain step by rounds, and the highest number of bytes."""

    mode: str
    ratio: Ratio
    rounds: int
    peak: int
    promises: list[Promise] = field(default_factory=list)


@dataclass
class Table:
    """One case.

    Attributes:
        case: the network.
        seconds: of a plain step, the median.
        rows: the modes.
        left_out: modes that do not run here, with the reason.
        peer: the faster exact mode beside TorchJD's faster one: their names, the ratio and what is promised.
        cheap: the network with a larger batch that the first three rows' times are from, if they are.
    """

    case: Case
    seconds: float
    rows: list[Row]
    left_out: list[str]
    peer: tuple[str, Ratio, Promise] | None = None
    cheap: Case | None = None

    def promises(self) -> Iterator[tuple[str, Promise]]:
        """All that is promised of this case, with the mode."""
        for row in self.rows:
            yield from ((row.mode, promise) for promise in row.promises)
        if self.peer is not None:
            yield self.peer[0], self.peer[2]


def runs(case: Case, peers: bool) -> dict[str, Callable[[], Run]]:
    """For each mode what makes a step; every step begins with the forward pass and ends without any ``.grad``."""

    def plain() -> Run:
        def step() -> None:
            _, losses = case.forward()
            torch.stack(losses).sum().backward()

        return step

    def of(name: str, **options: str) -> Callable[[], Run]:
        def made() -> Run:
            method = detente.create(name)

            def step() -> None:
                _, losses = case.forward()
                detente.backward(losses, method, **options)  # type: ignore[arg-type]

            return step

        return made

    def on_features() -> Run:
        method = detente.create("imtl-g")

        def step() -> None:
            z, losses = case.forward()
            detente.backward(losses, method, features=z)

        return step

    found = {
        "plain": plain,
        "weighting": of("uncertainty"),
        "features": on_features,
        "exact": of("imtl-g"),
        "batched": of("imtl-g", memory="batched"),
        "low": of("imtl-g", memory="low"),
        "by hand": lambda: lambda: by_hand(case),
    }
    if peers:
        from torchjd.aggregation import IMTLG
        from torchjd.autojac import jac_to_grad, mtl_backward

        def torchjd(chunk: int | None) -> Run:
            aggregator = IMTLG()

            def step() -> None:
                z, losses = case.forward()
                mtl_backward(losses, features=z, parallel_chunk_size=chunk)
                jac_to_grad(case.shared, aggregator)

            return step

        found["TorchJD"] = lambda: torchjd(1)
        found["TorchJD vmap"] = lambda: torchjd(None)
    return found


def by_hand(case: Case) -> None:
    """A step of IMTL-G as users write it."""
    _, losses = case.forward()
    rows = []
    for task, loss in enumerate(losses):
        keep = task < case.tasks - 1
        found = torch.autograd.grad(loss, [*case.shared, *case.own[task]], retain_graph=keep)
        rows.append(torch.cat([gradient.reshape(-1) for gradient in found[: len(case.shared)]]))
        for parameter, gradient in zip(case.own[task], found[len(case.shared) :], strict=True):
            parameter.grad = gradient
    matrix = torch.stack(rows)
    gramian = matrix @ matrix.T
    weights = torch.linalg.pinv(gramian) @ gramian.diagonal().sqrt()
    direction = (weights / weights.sum()) @ matrix
    pieces = direction.split([parameter.numel() for parameter in case.shared])
    for parameter, piece in zip(case.shared, pieces, strict=True):
        parameter.grad = piece.view_as(parameter)


def measure(
    case: Case,
    features_limit: float | None,
    peers: bool,
    exact_limit: float = 1.0,
    cheap: Case | None = None,
) -> Table:
    """Peaks first (they warm up), then times in turns; those of the cheap modes on a network of their own if given."""
    steps, peaks, left_out = {}, {}, []

    def cleared(step: Run, of: Case = case) -> Run:
        def run() -> None:
            step()
            of.clear()

        return run

    for name, make in runs(case, peers).items():
        needed = ROOM.get(name, 0.0) * 4 * case.tasks * sum(p.numel() for p in case.shared)
        if needed > _available():
            left_out.append(f"{name}: may take {needed / 2**30:.0f} GiB")
            continue
        try:
            peaks[name] = peak_allocated(cleared(make()))
        except RuntimeError as error:  # a peer may not take every network
            left_out.append(f"{name}: {str(error).splitlines()[0]}")
            case.clear()
            continue
        steps[name] = cleared(make())
    quick = {name: steps[name] for name in ("plain", "weighting", "features")}
    if cheap is not None:
        makes = runs(cheap, peers=False)
        quick = {name: cleared(makes[name](), cheap) for name in quick}
    costly = {name: step for name, step in steps.items() if name == "plain" or name not in quick}
    in_turns = interleaved(quick, 60, budget=CHEAP_BUDGET, least=7, clock=CLOCK)
    least = 3 if case.tasks <= 8 else 2
    in_long_turns = interleaved(costly, 20, warmup=0, budget=COSTLY_BUDGET, least=least, clock=CLOCK)
    rows = []
    for name in steps:
        seconds = in_turns if name in quick else in_long_turns
        rows.append(Row(name, ratios(seconds, name, "plain"), len(seconds["plain"]), peaks[name]))
    _promise(case, rows, features_limit)
    table = Table(case, statistics.median(in_turns["plain"]), rows, left_out, cheap=cheap)
    rivals = [name for name in in_long_turns if name.startswith("TorchJD")]
    ours = [name for name in in_long_turns if name in ("exact", "batched")]
    if rivals and ours:
        mine, theirs = (
            min(names, key=lambda name: statistics.median(in_long_turns[name])) for names in (ours, rivals)
        )
        ratio = ratios(in_long_turns, mine, theirs)
        quarter = by_round(in_long_turns, mine, theirs)[len(in_long_turns[mine]) // 4]
        table.peer = f"{mine} / {theirs}", ratio, Promise("time", ratio[0], exact_limit, quarter)
    return table


def _available() -> float:
    """Bytes of memory that are free for the asking; infinite where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return float("inf")


def _promise(case: Case, rows: list[Row], features_limit: float | None) -> None:
    by_mode = {row.mode: row for row in rows}
    sizes = [parameter.numel() for parameter in case.shared]
    plain = by_mode["plain"].peak
    limits = {
        "exact": plain + 4 * case.tasks * sum(sizes),
        "low": plain + max(4 * case.tasks * max(sizes), 8 * sum(sizes)),
    }
    for mode, limit in limits.items():
        if mode not in by_mode:
            continue
        measured = by_mode[mode].peak / MIB
        by_mode[mode].promises.append(Promise("peak", measured, 1.05 * limit / MIB))
    if features_limit is not None:
        features = by_mode["features"]
        features.promises.append(Promise("time", features.ratio[0], features_limit))


def tables(quick: bool = False) -> Iterator[Table]:
    """One table per network and number of tasks."""
    peers = _has_torchjd()
    if quick:
        yield measure(lenet(2, batch=8), None, peers)
        return
    for tasks in TASKS:
        limit = FEATURES_LIMIT if tasks <= 8 else None
        # Smaller batches for the larger networks where a step walks the trunk so often.
        yield measure(lenet(tasks), limit, peers, exact_limit=1.05)
        batch = {8: 16, 40: 8, 100: 4}.get(tasks, 32)
        cheap = resnet(tasks) if batch < 32 else None
        yield measure(resnet(tasks, batch), FEATURES_LIMIT, peers, cheap=cheap)
        yield measure(transformer(tasks, batch=16 if tasks <= 8 else 4), limit, peers)
        yield measure(recurrent(tasks), limit, peers)
    yield measure(many_heads(), MANY_HEADS_LIMIT, peers)


def _has_torchjd() -> bool:
    try:
        import torchjd  # noqa: F401
    except ImportError:
        print("TorchJD is not installed: its rows are left out", file=sys.stderr)
        return False
    return True


def show(table: Table) -> None:
    """Print one table."""
    case = table.case
    shared = sum(parameter.numel() for parameter in case.shared)
    seconds = f"plain step {1000 * table.seconds:.1f} ms"
    print(f"{case.name}, T = {case.tasks}, batch {case.batch}, P = {shared}: {seconds}")
    if table.cheap is not None:
        print(f"  (times of plain, weighting and features on batch {table.cheap.batch})")
    print(f"  {'mode':13}{'time / plain':<28}{'rounds':>6}{'peak MiB':>10}")
    for row in table.rows:
        told = "; ".join(map(str, row.promises))
        line = f"  {row.mode:13}{_told(row.ratio):28}{row.rounds:6}{row.peak / MIB:10.1f}"
        print(f"{line}  promised {told}" if told else line)
    for reason in table.left_out:
        print(f"  left out: {reason}")
    if table.peer is not None:
        pair, ratio, promise = table.peer
        print(f"  {pair}: {_told(ratio)}  promised {promise}")
    print(flush=True)


def _told(ratio: Ratio) -> str:
    median, low, high = ratio
    return f"{median:7.3f}  ({low:.3f} to {high:.3f})"


def main() -> None:
    """Print every table, whether what is promised holds, and once more what does not."""
    promised, broken = 0, []
    with threads(1):
        for table in tables():
            show(table)
            for what, promise in table.promises():
                promised += 1
                if promise.verdict == "NOT KEPT":
                    place = f"{table.case.name}, T = {table.case.tasks}, {what}"
                    broken.append(
                        f"  {place}: {promise.what} {promise.measured:.2f}, limit {promise.limit:.2f}"
                    )
    print(f"promised: {promised}, not kept: {len(broken)}", *broken, sep="\n")
