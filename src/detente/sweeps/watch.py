"""What a person sees while a sweep works: a table at a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from detente.sweeps.asked import Failure
from detente.sweeps.plan import Plan, Planned
from detente.sweeps.workers import Outcome

_SECONDS_BETWEEN_LINES = 15.0


@dataclass
class State:
    """Where a sweep stands.

    Attributes:
        total: runs that are planned as far as is known.
        workers: runs at the same time.
        done, failed, running: contender to number of runs.
        best: contender to what was chosen.
        seconds: of every run that is done.
    """

    total: int
    workers: int
    done: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    running: Counter[str] = field(default_factory=Counter)
    best: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def see(self, plan: Plan, known: Sequence[Planned], results: Mapping[str, Outcome]) -> None:
        """Count what there is."""
        self.done.clear()
        self.failed.clear()
        for planned in {planned.name: planned for planned in known}.values():
            found = results.get(planned.name)
            if isinstance(found, Failure) or (found is not None and found.get("untested")):
                self.failed[planned.contender.name] += 1
            elif found is not None:
                self.done[planned.contender.name] += 1
                self.seconds[planned.name] = found["seconds"]
        self.total = max(self.total, self.ended + self.running.total())
        for name, choice in plan.choices(results).items():
            point = choice.point
            self.best[name] = ", ".join([f"learning rate {point.learning_rate:g}", *point.options])

    @property
    def ended(self) -> int:
        """Runs that are done or failed."""
        return self.done.total() + self.failed.total()

    @property
    def seconds_left(self) -> float | None:
        """By the mean length of the runs that ended; None before the first."""
        if not self.seconds:
            return None
        left = max(self.total - self.ended, 0)
        return left * sum(self.seconds.values()) / len(self.seconds) / self.workers


Show = Callable[[], None]


@contextmanager
def watched(state: State, contenders: Sequence[str], *, enabled: bool) -> Iterator[Show]:
    """Gives what is to be called when something has changed."""
    if not enabled:
        yield lambda: None
    elif sys.stderr.isatty():
        with _table(state, contenders) as show:
            yield show
    else:
        yield _lines(state)


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
    left = state.seconds_left
    parts = [f"{state.ended} of {state.total} runs", f"{state.running.total()} running"]
    parts += [f"{state.failed.total()} failed"] if state.failed.total() else []
    parts += [f"about {told(left)} left"] if left is not None else []
    return ", ".join(parts)


def _lines(state: State) -> Show:
    spoken = time.monotonic()

    def show() -> None:
        nonlocal spoken
        if time.monotonic() - spoken >= _SECONDS_BETWEEN_LINES:
            spoken = time.monotonic()
            print(summary(state), file=sys.stderr, flush=True)

    return show


@contextmanager
def _table(state: State, contenders: Sequence[str]) -> Iterator[Show]:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    def drawn() -> Any:
        table = Table("contender", "done", "running", "failed", "chosen on validation data", box=None)
        table.caption = summary(state)
        for name in contenders:
            counts: Mapping[str, Counter[str]] = {
                "done": state.done,
                "running": state.running,
                "failed": state.failed,
            }
            cells = [str(count[name]) if count[name] else "" for count in counts.values()]
            table.add_row(name, *cells, state.best.get(name, ""))
        return table

    with Live(drawn(), console=Console(stderr=True), refresh_per_second=2) as live:
        # What runs print meanwhile appears above the table.
        yield lambda: live.update(drawn())
