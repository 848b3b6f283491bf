"""Start real processes that talk over the loopback, and collect what they report."""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_processes(work: Callable[..., Any], size: int, folder: Path, *arguments: Any) -> list[Any]:
    """What ``work(*arguments)`` returns on every rank of a gloo group; the first rank's error is raised here."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.start_processes(_enter, (work, size, str(folder), arguments), nprocs=size, start_method="spawn")
    return [pickle.loads((folder / f"rank-{rank}").read_bytes()) for rank in range(size)]


def _enter(rank: int, work: Callable[..., Any], size: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    try:
        found = work(*arguments)
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(1) from error
    # Each writes its own file: the parent reads them when all have ended.
    (Path(folder) / f"rank-{rank}").write_bytes(pickle.dumps(found))
    dist.barrier()
    # torch 2.6 joins gloo's threads in here without letting go of the interpreter's lock, and waits for ever if one of
    # them still needs it to give back the last collective's tensors. A moment without the lock lets them end.
    time.sleep(0.1)
    dist.destroy_process_group()
