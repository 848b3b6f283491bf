"""Peak memory: of a run, by what the system tells; of a piece of work, to the byte."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import torch


def reset_peak(device: torch.device) -> None:
    """Start measuring anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Where this is not allowed the peak is that of the whole process so far: still an upper bound.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int | None:
    """Peak since :func:`reset_peak`: allocated on an accelerator, else resident memory of the process.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    except ImportError:
        return None


def peak_allocated(run: Callable[[], object], device: torch.device | None = None) -> int:
    """Bytes that tensors hold at their highest during ``run``, beside what was held before.

    On the CPU torch's profiler notes every allocation and every release, those inside an operation too. The resident
    memory of the process would also count what the allocator keeps for later, and the libraries' scratch memory.

    Example:
        >>> peak_allocated(lambda: torch.zeros(1000) + torch.ones(1000))
        12000
    """
    if device is not None and device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return int(torch.cuda.max_memory_allocated(device)) - before
    from torch.profiler import ProfilerActivity, profile

    # Without this the profiler reports its starts, and that it found no GPU, on the terminal.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    results = profiled.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = highest = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        highest = max(highest, held)
    return highest
