"""MultiMNIST: every method against tuned fixed weights on the packaged digits, and the papers' full protocol.

    python scripts/studies/multimnist.py sweep --out runs/multimnist-study --minutes 60
    python scripts/studies/multimnist.py full --out runs/multimnist-full --data-dir DIR --minutes 80
    python scripts/studies/multimnist.py page --out-sweep runs/multimnist-study --out-full runs/multimnist-full \
        --page docs/results/multimnist.md

Everything is carried out by `detente sweep` and `detente run`. After --minutes what still runs is ended; the same command
goes on from the last checkpoints, and its exit code is 3 as long as there is something left to do.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from _multimnist_page import write
from _multimnist_protocol import ENTRIES, Entry, folder_of

from detente.methods import create, describe, methods
from detente.records import read_run
from detente.sweeps.watch import told

LEFT_TO_DO = 3
# What takes part besides every registered method: the upper bound, and what is no method of its own.
FEATURES = ("mgda", "aligned-mtl")
ALSO = (
    "adaptive-mgda with free heads: --method adaptive-mgda --option refuse=shared",
    "mgda with backtracking: --method mgda --search backtracking",
    "mgda with fast search: --method mgda --gradients features --search fast",
    "uniform with adam: --optimizer adam",
    "mao: --optimizer mao",
    "mtadam: --optimizer mtadam",
)
# The guard's bound has the unit of a gradient, so the method declares no grid; these are the values around which
# inexact-mgda.md finds that it begins to refuse steps.
GRID = "inexact-mgda.epsilon=0.02,0.05,0.1"
_SECONDS_TO_END = 60.0
_SECONDS_BETWEEN_LINES = 30.0


def main() -> None:
    """Sweep, full runs, or page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    sweep = parts.add_parser("sweep", help="the packaged digits: one `detente sweep`")
    _sweep_options(sweep)
    _full_options(parts.add_parser("full", help="the papers' protocol: `detente run` for each entry"))
    page = parts.add_parser("page", help="the page and its pictures from what is stored")
    page.add_argument("--out-sweep", type=Path, help="folder of the sweep")
    page.add_argument("--out-full", type=Path, help="folder of the full runs, however many there are")
    page.add_argument("--page", type=Path, required=True, help="pictures go into images/ beside it")
    asked = parser.parse_args()
    if asked.part == "page":
        if asked.out_sweep is None and asked.out_full is None:
            parser.error("page needs --out-sweep, --out-full or both.")
        usual = shlex.join(["detente", *sweep_words(sweep.parse_args(["--out", "OUT"]))])
        write(asked.page, asked.out_sweep, asked.out_full, usual)
        print(asked.page)
        return
    try:
        sys.exit(_sweep(asked) if asked.part == "sweep" else _full(asked))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on.", file=sys.stderr)
        sys.exit(LEFT_TO_DO)


# ---- the sweep


def _sweep_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, help="end after so many minutes; call again to go on")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument(
        "--methods", nargs="+", default=["all"], help="as of `detente sweep`; all: every registered one"
    )
    parser.add_argument(
        "--features",
        nargs="*",
        default=FEATURES,
        metavar="METHOD",
        help="these on the representation too; all stands for every method that can",
    )
    parser.add_argument("--also", nargs="*", default=ALSO, help="as of `detente sweep`")
    parser.add_argument("--lrs", nargs="+", default=["0.01", "0.03", "0.1"])
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--front", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--halve-every", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-steps", type=int, help="for a look: so many steps of each run")
    parser.add_argument("--plan", action="store_true", help="print what would run")


def sweep_words(asked: argparse.Namespace) -> list[str]:
    """The words of `detente sweep`."""
    on_features = asked.features
    if "all" in on_features:
        found = {name: describe(create(name)) for name in sorted(methods())}
        on_features = [
            name for name, info in found.items() if info.takes_gradients and "features" in info.spaces
        ]
    words = ["sweep", "multimnist", "--methods", *asked.methods]
    words += [f"{name}@features" for name in on_features]
    words += ["--also", *asked.also] if asked.also else []
    words += ["--grid", GRID] if {"all", "inexact-mgda"} & set(asked.methods) else []
    words += ["--lrs", *asked.lrs, "--trials", str(asked.trials), "--seeds", str(asked.seeds)]
    words += ["--front", str(asked.front), "--epochs", str(asked.epochs)]
    words += ["--halve-every", str(asked.halve_every), "--batch-size", str(asked.batch_size)]
    words += ["--max-steps", str(asked.max_steps)] if asked.max_steps else []
    words += ["--plan"] if asked.plan else []
    return [*words, "--workers", str(asked.workers), "--out", str(asked.out)]


def _sweep(asked: argparse.Namespace) -> int:
    """One `detente sweep`, ended at the limit; it tells itself how far it is."""
    words = sweep_words(asked)
    print(shlex.join(["detente", *words]), file=sys.stderr)
    limit = None if asked.minutes is None else time.monotonic() + 60 * asked.minutes
    with _ending([_started(words)]) as (process,), contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(None if limit is None else max(0.0, limit - time.monotonic()))
    if process.returncode == 0:  # it ended while it was being ended
        return 0
    done = sum(1 for _ in asked.out.glob("runs/*/result.json"))
    print(f"{asked.minutes:g} minutes are over; {done} runs are stored. The same command goes on.")
    return LEFT_TO_DO


# ---- the full protocol


def _full_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--data-dir", type=Path, help="folder of the four MNIST files; left out, packaged digits"
    )
    parser.add_argument("--minutes", type=float, help="end after so many minutes; call again to go on")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, each on one thread")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--lrs", nargs="+", default=["0.01"], help="the page takes the best on validation data"
    )
    parser.add_argument(
        "--only", nargs="+", choices=[entry.name for entry in ENTRIES], help="these entries alone"
    )
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--max-steps", type=int, help="for a look: so many steps of each run")


@dataclass
class Task:
    """One full run: its folder, its command, and its process while it runs."""

    folder: Path
    words: list[str]
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def done(self) -> bool:
        """Whether its result is stored."""
        return (self.folder / "result.json").exists()

    def epochs(self) -> list[float]:
        """Seconds of every epoch that is behind it."""
        if not (self.folder / "config.json").exists():
            return []
        return [row["seconds"] for row in read_run(self.folder).epochs]


def full_words(entry: Entry, seed: int, lr: str, asked: argparse.Namespace) -> list[str]:
    """The words of `detente run` for an entry."""
    words = ["run", "multimnist", *entry.flags, "--learning-rate", lr, "--seed", str(seed)]
    words += ["--epochs", str(asked.epochs), "--threads", "1"]
    words += ["--data-dir", str(asked.data_dir.resolve())] if asked.data_dir else []
    words += ["--max-steps", str(asked.max_steps)] if asked.max_steps else []
    return [*words, "--json", "--out", str(asked.out / folder_of(entry, lr, seed))]


def _full(asked: argparse.Namespace) -> int:
    """The runs that have no result, a few at a time, in the order in which they tell most."""
    entries = [entry for entry in ENTRIES if asked.only is None or entry.name in asked.only]
    tasks = [
        Task(asked.out / folder_of(entry, lr, seed), full_words(entry, seed, lr, asked))
        for seed in asked.seeds
        for lr in asked.lrs
        for entry in entries
    ]
    asked.out.mkdir(parents=True, exist_ok=True)
    limit = float("inf") if asked.minutes is None else time.monotonic() + 60 * asked.minutes
    waiting = [task for task in tasks if not task.done]
    running: list[Task] = []
    failed: list[Task] = []
    processes: list[subprocess.Popen[bytes]] = []
    spoken = time.monotonic()
    # A run needs no notice: its records are whole at any moment.
    with _ending(processes, signal.SIGTERM):
        while (waiting or running) and time.monotonic() < limit:
            while waiting and len(running) < asked.workers:
                task = waiting.pop(0)
                with open(asked.out / f"{task.folder.name}.log", "ab") as log:
                    task.process = _started(task.words, log)
                running.append(task)
                processes.append(task.process)
            time.sleep(0.2)
            for task in [task for task in running if task.process and task.process.poll() is not None]:
                running.remove(task)
                if not task.done:
                    failed.append(task)
                    print(f"{task.folder.name} failed: see {task.folder}.log", file=sys.stderr)
            if time.monotonic() - spoken > _SECONDS_BETWEEN_LINES:
                spoken = time.monotonic()
                print(_progress(tasks, running, asked), file=sys.stderr, flush=True)
    print(_progress(tasks, [], asked))
    if failed:
        return 1
    return 0 if all(task.done for task in tasks) else LEFT_TO_DO


def _progress(tasks: Sequence[Task], running: Sequence[Task], asked: argparse.Namespace) -> str:
    """How far the runs are, and how long the rest will take at the pace of the epochs so far."""
    behind = {task.folder.name: task.epochs() for task in tasks}
    seconds = sorted(value for listed in behind.values() for value in listed)
    parts = [f"{sum(task.done for task in tasks)} of {len(tasks)} runs done"]
    parts += [f"{task.folder.name} {len(behind[task.folder.name])}/{asked.epochs}" for task in running]
    left = sum(asked.epochs - len(behind[task.folder.name]) for task in tasks if not task.done)
    if seconds and left:
        rest = left * seconds[len(seconds) // 2] / asked.workers
        parts.append(f"about {told(rest)} left")
    return ", ".join(parts)


# ---- processes


def _started(words: Sequence[str], log: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """A `detente` of its own group, so that an interrupt reaches it once and through us."""
    return subprocess.Popen(
        [sys.executable, "-m", "detente", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


@contextlib.contextmanager
def _ending(
    processes: list[subprocess.Popen[bytes]], notice: signal.Signals = signal.SIGINT
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Whatever of these still runs at the end of the block is given notice, and killed if it does not end."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield processes
    finally:
        signal.signal(signal.SIGTERM, before)
        alive = [process for process in processes if process.poll() is None]
        for process in alive:
            process.send_signal(notice)
        give_up = time.monotonic() + _SECONDS_TO_END
        for process in alive:
            try:
                process.wait(max(0.0, give_up - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


if __name__ == "__main__":
    main()
