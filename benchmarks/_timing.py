"""Interleaved timing: A, B, A, B, … so that a busy minute favours neither."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call, ``rounds`` of each, taken in turns after ``warmup`` unmeasured rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warmup + rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratios(seconds: Mapping[str, list[float]], name: str, base: str) -> tuple[float, float, float]:
    """Median, smallest and largest ratio of two runs of the same round."""
    found = [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]
    return statistics.median(found), min(found), max(found)
