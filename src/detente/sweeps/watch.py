"""What a person sees while a sweep works: a table at a terminal, a line now and then elsewhere."""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detente.records.reading import complete_lines
from detente.records.schema import EPOCHS
from detente.sweeps.asked import Failure
from detente.sweeps.plan import Plan, Planned
from detente.sweeps.workers import Outcome
from detente.training import TrainingConfig

_SECONDS_BETWEEN_LINES = 15.0


@dataclass
class State:
    """Where a sweep stands.

    The sweep changes it while another thread shows it: what that one walks through is replaced as a whole, or copied.

    Attributes:
        folder: that holds the folders of the runs.
        total: runs that are planned as far as is known.
        workers: runs at the same time.
        running: name of a run to what it is.
        done, failed: contender to number of runs.
        best: contender to what was chosen.
        seconds: of every run that is done.
    """

    folder: Path
    total: int
    workers: int
    running: dict[str, Planned] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    best: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def see(self, plan: Plan, known: Sequence[Planned], results: Mapping[str, Outcome]) -> None:
        """Count what there is."""
        done, failed = Counter[str](), Counter[str]()
        seconds: dict[str, float] = {}
        for planned in {planned.name: planned for planned in known}.values():
            found = results.get(planned.name)
            if isinstance(found, Failure) or (found is not None and found.get("untested")):
                failed[planned.contender.name] += 1
            elif found is not None:
                done[planned.contender.name] += 1
                seconds[planned.name] = found["seconds"]
        best = {}
        for name, choice in plan.choices(results).items():
            point = choice.point
            best[name] = ", ".join([f"learning rate {point.learning_rate:g}", *point.options])
        self.done, self.failed, self.best, self.seconds = done, failed, best, seconds
        # What was tuned may run once more, to be measured on test data.
        self.total = max(self.total, self.ended + len(self.running.keys() - seconds.keys()))

    @property
    def ended(self) -> int:
        """Runs that are done or failed."""
        return self.done.total() + self.failed.total()

    def at_work(self) -> list[tuple[float, float]]:
        """Of every run that was begun: the part of it that is behind it, and the seconds of training that took."""
        begun = tuple(self.running.items())
        return [behind(self.folder / name, one.config) for name, one in begun if name not in self.seconds]

    def seconds_left(self, at_work: Sequence[tuple[float, float]]) -> float | None:
        """By the mean length of the runs that ended, or else of those at work; None before the first epoch."""
        lengths = list(self.seconds.values()) or [seconds / part for part, seconds in at_work if part]
        if not lengths:
            return None
        left = max(self.total - self.ended - sum(part for part, _ in at_work), 0.0)
        # However many workers there are, a run that was just begun takes its time.
        longest = max((1.0 - part for part, _ in at_work), default=0.0)
        return max(left / self.workers, longest) * sum(lengths) / len(lengths)


def behind(folder: Path, config: TrainingConfig) -> tuple[float, float]:
    """The part of a run that is stored, by its last whole epoch, and the seconds of training; zeros before the first.

    Example:
        >>> behind(Path("no such run"), TrainingConfig(epochs=10))
        (0.0, 0.0)
    """
    try:
        rows = [json.loads(line) for line in complete_lines(folder / EPOCHS)]
        if not rows:
            return 0.0, 0.0
        steps = config.epochs * rows[0]["step"]
        if config.max_steps is not None:
            steps = min(steps, config.max_steps)
        return min(rows[-1]["step"] / steps, 1.0), sum(row["seconds"] for row in rows)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        # Whoever needs these rows says what is wrong with them.
        return 0.0, 0.0


@contextmanager
def watched(state: State, contenders: Sequence[str], *, enabled: bool) -> Iterator[None]:
    """Shows the state while the block works, whether or not it trains in this very thread."""
    if not enabled:
        yield
        return
    with _table(state, contenders) if sys.stderr.isatty() else _lines(state):
        yield


def told(seconds: float) -> str:
    """A length of time in the two largest units.

    Example:
        >>> told(3700)
        '1 h 2 min'
    """
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def summary(state: State) -> str:
    """One line."""
    at_work = state.at_work()
    left = state.seconds_left(at_work)
    parts = [f"{state.ended} of {state.total} runs", f"{len(state.running)} running"]
    if at_work:
        least, most = min(at_work)[0], max(at_work)[0]
        parts[-1] += f" ({least:.0%} done)" if least == most else f" ({least:.0%} to {most:.0%} done)"
    parts += [f"{state.failed.total()} failed"] if state.failed.total() else []
    parts += [f"about {told(left)} left"] if left is not None else []
    return ", ".join(parts)


@contextmanager
def _lines(state: State) -> Iterator[None]:
    over = threading.Event()

    def speak() -> None:
        while not over.wait(_SECONDS_BETWEEN_LINES):
            print(summary(state), file=sys.stderr, flush=True)

    speaker = threading.Thread(target=speak, name="progress of a sweep", daemon=True)
    speaker.start()
    try:
        yield
    finally:
        over.set()
        speaker.join()


@contextmanager
def _table(state: State, contenders: Sequence[str]) -> Iterator[None]:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    def drawn() -> Any:
        table = Table("contender", "done", "running", "failed", "chosen on validation data", box=None)
        table.caption = summary(state)
        running = Counter(one.contender.name for one in tuple(state.running.values()))
        for name in contenders:
            cells = [str(count[name]) if count[name] else "" for count in (state.done, running, state.failed)]
            table.add_row(name, *cells, state.best.get(name, ""))
        return table

    # It is drawn again and again by a thread of its own; what runs print meanwhile appears above it.
    with Live(get_renderable=drawn, console=Console(stderr=True), refresh_per_second=1) as live:
        live.refresh()
        yield
