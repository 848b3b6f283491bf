"""The processes that share a batch, every message between them, and a comparison of what they hold.

Nothing here knows gradients: `reduction` does. Numbers are counted where they are sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

ProcessGroup = Any
"""None: the default group where there is one; False: this process alone; or a group of torch.distributed."""


class RankFailed(RuntimeError):
    """Another rank could not take its part in a step; its message is this one's."""


class Ranks:
    """A group of processes: their number, this one's place, and the collectives a step needs.

    Args:
        handle: the group of torch.distributed; None is the default one.

    Attributes:
        rank, size: this process and how many there are.
        calls: collectives so far.
        bytes: what this process handed to them, in bytes.
    """

    def __init__(self, handle: Any = None) -> None:
        self.handle = handle
        self.rank, self.size = dist.get_rank(handle), dist.get_world_size(handle)
        self.calls = self.bytes = 0
        # Small messages travel between hosts where the backend can: a device would have to be waited for.
        backend = dist.get_backend(handle)
        self._on_host = "gloo" in backend or "cpu:" in backend or backend == "mpi"

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add over the ranks, in place."""
        self._count(tensor)
        dist.all_reduce(tensor, group=self.handle)
        return tensor

    def scatter_sum(self, row: torch.Tensor, part: torch.Tensor) -> None:
        """Add ``row`` [R·W] over the ranks, and keep this rank's ``part`` [W] of the sum."""
        self._count(row)
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(part, row.contiguous(), group=self.handle)

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """[R·W] from every rank's ``part`` [W]."""
        self._count(part)
        whole = part.new_empty(self.size * part.numel())
        collect = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        collect(whole, part.contiguous(), group=self.handle)
        return whole

    def numbers(self, values: Sequence[float], device: torch.device) -> np.ndarray:
        """[R, K] float64 on the host: the K numbers of every rank."""
        sent = torch.tensor(values, dtype=torch.float64, device="cpu" if self._on_host else device)
        return self.gather(sent).cpu().numpy().reshape(self.size, len(values))

    def objects(self, value: Any) -> list[Any]:
        """What every rank has to say: for the first step and for errors, not for every step."""
        self.calls += 1
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.handle)
        return found

    def from_first(self, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The first rank's ``values``, on the host."""
        sent = values.to("cpu" if self._on_host else device, copy=True)
        self._count(sent)
        source = 0 if self.handle is None else dist.get_global_rank(self.handle, 0)
        dist.broadcast(sent, source, group=self.handle)
        return sent.to(values.device)

    def agree(self, error: Exception | None) -> None:
        """Fail on all ranks if one has an error; every rank must call it."""
        told = self.objects(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, message in enumerate(told):
            if message is not None:
                raise RankFailed(f"rank {rank} could not take this step ({message})")

    def _count(self, tensor: torch.Tensor) -> None:
        self.calls += 1
        self.bytes += tensor.numel() * tensor.element_size()


def ranks_of(process_group: ProcessGroup | Literal[False] | None) -> Ranks | None:
    """The processes to work with, None if there is only this one.

    Raises:
        TypeError: ``process_group`` is neither a group, nor None, nor False.

    Example:
        >>> ranks_of(False) is None
        True
    """
    if process_group is False or not dist.is_available() or not dist.is_initialized():
        if process_group not in (None, False):
            raise TypeError(
                f"process_group is {process_group!r}, and torch.distributed is not initialized. Call "
                "torch.distributed.init_process_group() first, or leave process_group out."
            )
        return None
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group is a {type(process_group).__name__}; give a group of torch.distributed, None for the "
            "default one, or False for this process alone."
        )
    return Ranks(process_group) if dist.get_world_size(process_group) > 1 else None


class RanksDiffer(RuntimeError):
    """Something that must be the same on every process is not."""


def check_ranks(process_group: ProcessGroup = None, **things: Any) -> None:
    """See that networks, optimizers, methods or tensors are the same on every process, bit for bit.

    For debugging: every byte is hashed on the host. Call it on all ranks, for example after the first step and once
    an epoch. On a single process it does nothing.

    Args:
        process_group: as for :func:`detente.backward`.
        things: what to compare, by the name that an error shall give it: anything with a ``state_dict()`` (networks,
            optimizers, methods, schedulers), tensors, numbers, strings, and mappings or sequences of these.

    Raises:
        RanksDiffer: on all ranks; the first entry that differs is named, with the ranks that differ from rank 0.
        TypeError: an entry is of another kind.

    Example:
        >>> network = torch.nn.Linear(2, 2)
        >>> check_ranks(network=network, optimizer=torch.optim.SGD(network.parameters(), lr=0.1))
    """
    marks = {
        name: hashlib.sha256(found).hexdigest()
        for key, value in things.items()
        for name, found in _entries(key, value)
    }
    ranks = ranks_of(process_group)
    if ranks is None:
        return
    everyones = ranks.objects(marks)
    for name in dict.fromkeys(name for theirs in everyones for name in theirs):
        found = [theirs.get(name) for theirs in everyones]
        others = [str(rank) for rank, mark in enumerate(found) if mark != found[0]]
        if others:
            verb = "differs" if len(others) == 1 else "differ"
            raise RanksDiffer(
                f"{name} is not the same on all ranks: rank {', '.join(others)} {verb} from rank 0. Start all ranks "
                "from the same parameters (DistributedDataParallel does, or broadcast them), seed methods alike, and "
                "call detente.backward and the optimizer on every rank in every step."
            )


def _entries(name: str, value: Any) -> Iterator[tuple[str, bytes]]:
    """Every leaf with its name and its bytes."""
    if isinstance(value, torch.Tensor):
        held = value.detach().cpu().contiguous()
        yield (
            name,
            f"{held.dtype} {tuple(held.shape)}".encode() + held.flatten().view(torch.uint8).numpy().tobytes(),
        )
    elif hasattr(value, "state_dict"):
        yield from _entries(name, value.state_dict())
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _entries(f"{name}.{key}", entry)
    elif isinstance(value, (list, tuple)):
        for place, entry in enumerate(value):
            yield from _entries(f"{name}[{place}]", entry)
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        yield name, repr(value).encode()
    else:
        raise TypeError(
            f"{name} is a {type(value).__name__}; check_ranks compares tensors, numbers, strings and what has a "
            "state_dict()."
        )
