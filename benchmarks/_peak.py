"""The most memory that tensors hold at once while something runs, to the byte."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

# Without this the profiler reports its starts, and that it found no GPU, on the terminal.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak(run: Callable[[], object]) -> int:
    """Bytes of torch's CPU allocations at their highest during ``run``, beside what was held before.

    Torch's profiler notes every allocation and every release, those inside an operation too. The resident memory of
    the process would also count what the allocator keeps for later, and the compiler's and libraries' scratch memory.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    results = profiled.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = highest = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        highest = max(highest, held)
    return highest
