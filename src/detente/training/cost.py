"""What a step costs, measured by itself: in turns with the steps of a reference, with nothing recorded."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from detente.training.config import TrainingConfig
from detente.training.loop import unrecorded_steps
from detente.training.memory import peak_allocated
from detente.training.problem import Problem
from detente.training.processes import threads

_WARM = 3
_LONGEST_TURN = 50


@dataclass(frozen=True)
class Cost:
    """What a step costs.

    Attributes:
        seconds_per_step: median over the turns.
        relative: median of the ratios to the reference's turn beside it; ``low`` and ``high`` are their range.
        peak_memory_bytes: what tensors hold at once at most during a step, beside parameters and the optimizer's state.
        processor_share: the least share of one processor core that the process had in a turn. Well below 1, other work
            went on beside, or the data come from elsewhere.
    """

    seconds_per_step: float
    relative: float
    low: float
    high: float
    peak_memory_bytes: int
    processor_share: float


def measure_cost(
    build: Callable[[TrainingConfig], Problem],
    config: TrainingConfig,
    reference: TrainingConfig,
    *,
    turns: int = 7,
    seconds: float = 0.3,
) -> Cost:
    """Measure the steps of one configuration beside those of another.

    Both train, from their own fresh networks, for as long as it takes; nothing is stored. The first steps, in which
    buffers are made, are not counted.

    Args:
        build: the problem of a configuration.
        config: whose steps are measured.
        reference: whose steps they are held against.
        turns: of each, one after the other.
        seconds: about how long a turn is.

    Raises:
        ValueError: a step of either cannot be taken, such as with losses that are not finite.
    """
    with tempfile.TemporaryDirectory() as place, torch.random.fork_rng(), threads(config.threads):
        steps = [unrecorded_steps(build(one), one, Path(place)) for one in (config, reference)]
        lengths = []
        for step in steps:
            for _ in range(_WARM):
                step()
            lengths.append(max(1, min(_LONGEST_TURN, math.ceil(seconds / _timed(step, 1)[0]))))
        found: list[list[float]] = [[], []]
        shares = []
        for turn in range(turns):
            # Who comes first changes, so that nobody always follows the other.
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                taken, share = _timed(steps[which], lengths[which])
                found[which].append(taken)
                shares.append(share)
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        peak = peak_allocated(steps[0], device)
    ratios = [mine / its for mine, its in zip(*found, strict=True)]
    return Cost(
        statistics.median(found[0]),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        peak,
        min(1.0, *shares),
    )


def _timed(step: Callable[[], None], count: int) -> tuple[float, float]:
    """Seconds of one step, and the share of a processor core."""
    started, used = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    seconds = time.perf_counter() - started
    return seconds / count, (time.process_time() - used) / seconds
