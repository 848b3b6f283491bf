"""See that the processes have not drifted apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from detente.autograd.ranks import ProcessGroup, ranks_of


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
