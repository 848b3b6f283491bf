"""Real gloo processes on this machine, and what they say to each other."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks._cost_model import Kind

# torch's functions by what they do, and which of their arguments is handed over.
FUNCTIONS: dict[str, tuple[Kind, int]] = {
    "all_reduce": ("all-reduce", 0),
    "broadcast": ("broadcast", 0),
    "reduce_scatter_tensor": ("reduce-scatter", 1),
    "reduce_scatter_single": ("reduce-scatter", 1),
    "all_gather_into_tensor": ("all-gather", 1),
    "all_gather_single": ("all-gather", 1),
}


@dataclass(frozen=True)
class Sent:
    """One collective as it happened: its kind, the bytes this rank handed over, its seconds."""

    kind: Kind
    bytes: int
    seconds: float


@contextmanager
def recorded(*, together: bool = True) -> Iterator[list[Sent]]:
    """Every collective on tensors in this context; ``together``: each begins when all ranks are there."""
    found: list[Sent] = []
    originals = {name: getattr(dist, name) for name in FUNCTIONS if hasattr(dist, name)}
    inside = False

    def noted(name: str) -> Callable[..., Any]:
        kind, place = FUNCTIONS[name]

        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal inside
            if inside:  # one of torch's functions may call another
                return originals[name](*arguments, **options)
            if together:
                dist.barrier()
            inside, started = True, time.perf_counter()
            try:
                told = originals[name](*arguments, **options)
            finally:
                inside = False
            tensor = arguments[place]
            found.append(Sent(kind, tensor.numel() * tensor.element_size(), time.perf_counter() - started))
            return told

        return run

    try:
        for name in originals:
            setattr(dist, name, noted(name))
        yield found
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def in_processes(work: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """What ``work(*arguments)`` returns on every rank of a gloo group of ``size`` processes, one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_enter, (work, size, folder, arguments), nprocs=size, start_method="spawn")
        written = [(Path(folder) / f"rank-{rank}").read_bytes() for rank in range(size)]
        return [pickle.loads(told) for told in written]  # noqa: S301  our own processes wrote it


def _enter(rank: int, work: Callable[..., Any], size: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if "GLOO_SOCKET_IFNAME" not in os.environ and Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting = f"file://{folder}/meeting"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(minutes=5)
    )
    found = work(*arguments)
    (Path(folder) / f"rank-{rank}").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
