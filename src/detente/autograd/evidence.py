"""What the graph leaves open, decided by the gradients themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from detente.autograd.roles import Memory, Roles


def settle(
    roles: Roles, names: Sequence[str], blocks: np.ndarray, alive: np.ndarray, memory: Memory
) -> np.ndarray:
    """Decide by the gradients which of the parameters left open are shared.

    A head's gradient under another task's loss is exactly zero. A parameter seen non-zero under two tasks is shared,
    from then on. A zero is evidence only where the task's loss had a gradient at all.

    Args:
        roles: with ``unsure`` parameters.
        names: of the T tasks with rows.
        blocks: [unsure, T] squared lengths of each task's gradient of each such parameter.
        alive: [T] True where a task's gradient is not zero everywhere.
        memory: what was seen before.

    Returns:
        [unsure] for each such parameter -1 if it is shared, else the row of the task whose own it is (any row, if its
        gradient vanishes under every task).

    Raises:
        ValueError: a task without any gradient in this step has never had one, so that what is shared cannot be told.
    """
    found = np.zeros(len(blocks), dtype=np.int64)
    first = len(roles.shared) - roles.unsure
    shared: list[torch.Tensor] = []
    doubtful: list[torch.Tensor] = []
    fresh: list[tuple[torch.Tensor, tuple[frozenset[str], frozenset[str]]]] = []
    for place, sizes in enumerate(blocks):
        leaf, mask = roles.shared[first + place], roles.reached[first + place]
        moved, told = memory.evidence.get(leaf, (frozenset(), frozenset()))
        moved |= {name for name, size in zip(names, sizes, strict=True) if size > 0}
        told |= {name for name, one in zip(names, alive, strict=True) if one}
        fresh.append((leaf, (moved, told)))
        if len(moved) > 1:
            found[place] = -1
            shared.append(leaf)
            continue
        if sizes.any():
            found[place] = int(np.argmax(sizes > 0))
        reaching = {name for row, name in enumerate(names) if mask >> row & 1}
        if moved and not reaching <= told:
            doubtful.append(leaf)
    if doubtful:
        raise ValueError(left_open(doubtful, "a task's gradient is zero everywhere in this first step"))
    for leaf, evidence in fresh:
        memory.evidence[leaf] = evidence
    memory.remember(shared)
    return found


def left_open(leaves: Sequence[torch.Tensor], why: str) -> str:
    """Return the message about parameters of which neither the graph nor gradients tell whose they are."""
    return (
        f"{len(leaves)} parameters (the first has shape {tuple(leaves[0].shape)}) lie behind an operation that packs "
        "several tasks into one tensor (a concatenation, a stack, a compiled or scripted model), so that the graph "
        f"does not tell shared from task-specific ones, and {why}. Name the shared ones with shared=, or compute the "
        "losses apart."
    )
