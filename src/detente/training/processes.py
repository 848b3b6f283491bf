"""The processes that train one network together: usually one, otherwise one for each device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from detente.autograd.ranks import RankFailed

T = TypeVar("T")


class Processes:
    """This process and those it shares every batch with.

    Several are started from outside, by ``detente run --devices`` or by torchrun; this class finds them in the
    environment. Lightning Fabric chooses the device, opens the process group and wraps the network.

    Args:
        devices: how many there must be, over all machines.

    Attributes:
        rank, size: this process and how many there are; rank 0 alone writes.
        device: of this process.

    Raises:
        ValueError: another number of processes was started, or a machine has fewer devices than processes.
    """

    def __init__(self, devices: int) -> None:
        from lightning_fabric import Fabric

        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != devices:
            raise ValueError(
                f"devices is {devices}, and {'one process was' if started == 1 else f'{started} processes were'} "
                "started. Give `detente run` the option --devices, which starts them, or start that many with torchrun."
            )
        here = int(os.environ.get("LOCAL_WORLD_SIZE", str(devices)))
        if torch.cuda.is_available() and here > torch.cuda.device_count():
            raise ValueError(
                f"{here} processes were started on a machine with {torch.cuda.device_count()} devices; use as many as "
                "it has."
            )
        strategy = "auto" if devices == 1 else "ddp"
        self.fabric = Fabric(accelerator="auto", devices=here, num_nodes=devices // here, strategy=strategy)
        if devices > 1:
            self.fabric.launch()
        self.rank, self.size = int(self.fabric.global_rank), devices
        self.device: torch.device = self.fabric.device

    def set_up(self, module: nn.Module) -> nn.Module:
        """The network as it is to be called: on the device, and with the same numbers in every process."""
        wrapped: nn.Module = self.fabric.setup_module(module)
        return wrapped

    def part(self, indices: torch.Tensor) -> torch.Tensor:
        """This process's examples of a batch: parts in order, whose sizes differ by one at most.

        Raises:
            ValueError: fewer examples than processes.
        """
        if len(indices) < self.size:
            raise ValueError(
                f"a batch of {len(indices)} examples cannot be spread over {self.size} processes. Choose a batch size "
                "that leaves more examples to the last batch of an epoch."
            )
        return torch.tensor_split(indices, self.size)[self.rank]

    def first(self, work: Callable[[], T]) -> T:
        """What the first process finds, on all of them; where it fails, all do.

        Raises:
            RankFailed: on the others, with its message.
        """
        if self.size == 1:
            return work()
        told: list[Any] = [None, None]
        error: Exception | None = None
        if self.rank == 0:
            try:
                told[0] = work()
            except Exception as raised:
                error, told[1] = raised, f"{type(raised).__name__}: {raised}"
        dist.broadcast_object_list(told, src=0)
        if error is not None:
            raise error
        if told[1] is not None:
            raise RankFailed(f"rank 0 could not go on ({told[1]})")
        value: T = told[0]
        return value

    def gathered(self, value: T) -> list[T]:
        """The value of every process, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """While this lasts torch computes with so many threads; None leaves it to torch."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Unwritten:
    """Stands for the run folder in processes that do not write: takes everything a `RunFolder` does, keeps nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _nothing(self, *_: Any) -> None:
        """Done by the first process."""

    append_step = append_epoch = flush = truncate_after = write_result = write_samples = _nothing
