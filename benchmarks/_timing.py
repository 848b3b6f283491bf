"""Interleaved timing: A, B, B, A, A, … so that a busy minute favours neither, and nobody always comes first."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    *,
    budget: float = float("inf"),
    least: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call, ``rounds`` of each, taken in turns after ``warmup`` unmeasured rounds.

    Once ``budget`` seconds have been measured no further round begins, but there are ``least`` of them. Every other
    round goes through the calls backwards. With ``clock=time.process_time`` only what this process itself computes
    counts, and not what others on the machine take away meanwhile.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    spent = 0.0
    for number in range(warmup + rounds):
        if number >= warmup + least and spent > budget:
            break
        for name in list(runs) if number % 2 == 0 else reversed(list(runs)):
            started = clock()
            runs[name]()
            if number >= warmup:
                seconds[name].append(clock() - started)
                spent += seconds[name][-1]
    return seconds


def ratios(seconds: Mapping[str, list[float]], name: str, base: str) -> tuple[float, float, float]:
    """Median, smallest and largest ratio of two runs of the same round."""
    found = by_round(seconds, name, base)
    return statistics.median(found), found[0], found[-1]


def by_round(seconds: Mapping[str, list[float]], name: str, base: str) -> list[float]:
    """The ratios of two runs of the same round, in ascending order."""
    return sorted(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


# Numbers of glibc's mallopt(): the size above which the top of the heap is given back, and how many blocks may be
# mapped on their own.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_memory() -> None:
    """Let the C library keep what is freed, instead of giving it back to the system and asking for it again.

    Whether it does so by itself depends on where blocks happen to lie: the same step of a LeNet takes 28 or 40 ms,
    for as long as a process lives. Holds for the rest of the process; nothing happens where there is no glibc.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, -1)
        mallopt(_MMAP_MAX, 0)
