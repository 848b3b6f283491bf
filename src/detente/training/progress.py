"""Progress and time left, on standard error: a bar at a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_SECONDS_BETWEEN_LINES = 15.0


class Progress(Protocol):
    """Told how far a run is."""

    def __call__(self, done: int, note: str = "") -> None:
        """``done`` steps of the total are finished; ``note`` is a few words, such as the last metrics."""


@contextmanager
def progress(title: str, total: int, *, enabled: bool = True) -> Iterator[Progress]:
    """A bar (at a terminal) or a line every quarter of a minute, with the time left."""
    if not enabled:
        yield lambda done, note="": None
    elif sys.stderr.isatty():
        with _bar(title, total) as update:
            yield update
    else:
        yield _Lines(title, total)


class _Lines:
    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.started = self.spoken = time.monotonic()
        self.first: int | None = None

    def __call__(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = done
        if now - self.spoken < _SECONDS_BETWEEN_LINES or done == self.first:
            return
        self.spoken = now
        left = (now - self.started) / (done - self.first) * (self.total - done)
        print(
            f"{self.title}: step {done} of {self.total}, {left:.0f} s left {note}".rstrip(), file=sys.stderr
        )


@contextmanager
def _bar(title: str, total: int) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total, note="")

        def update(done: int, note: str = "") -> None:
            if note:
                bar.update(task, completed=done, note=note)
            else:
                bar.update(task, completed=done)

        yield update
