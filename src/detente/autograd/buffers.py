"""Buffers of modules: reading them, putting them back, and keeping them still while a backward runs modules again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook


@dataclass(frozen=True)
class Buffers:
    """Hold one module's buffers: the tensors themselves, None where a name is only reserved, and what they held."""

    module: nn.Module
    found: dict[str, torch.Tensor | None]
    values: dict[str, torch.Tensor]


def read_buffers(module: nn.Module) -> Buffers:
    """Copy what a module's own buffers hold now."""
    found = dict(module._buffers.items())  # of a scripted module it is no dict
    values = {
        name: buffer.detach().clone()
        for name, buffer in found.items()
        if buffer is not None and not torch.nn.parameter.is_lazy(buffer)
    }
    return Buffers(module, found, values)


def write_buffers(kept: Sequence[Buffers]) -> None:
    """Put back what :func:`read_buffers` copied."""
    tensors: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    for entry in kept:
        held = entry.module._buffers
        for name in [name for name in held.keys() if name not in entry.found]:  # noqa: SIM118, see read_buffers
            del held[name]
        for name, tensor in entry.found.items():
            if name not in held or held[name] is not tensor:
                held[name] = tensor
        for name, value in entry.values.items():
            found = entry.found[name]
            assert found is not None
            tensors.append(found.data)
            values.append(value)
    if tensors:
        # Through .data: a graph may hold the buffers, and a backward that comes later would refuse them once written
        # to. It may read them too: whoever goes back puts back what the graph's forward pass left before walking it.
        with torch.no_grad():
            torch._foreach_copy_(tensors, values)


class Recomputation:
    """Keep buffers still where several backwards run the same modules again (activation checkpointing).

    A plain backward runs a checkpointed part of the network once more, and so do ours, once per task. Statistics such
    as those of batch normalisation move with the first of them, as they would in a plain backward, and are put back
    after the others.
    """

    def __init__(self) -> None:
        self._before: set[nn.Module] = set()
        self._now: set[nn.Module] = set()
        self._kept: list[Buffers] = []
        self._handle: Any = None

    def __enter__(self) -> Self:
        self._handle = register_module_forward_pre_hook(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
        self.next()

    def next(self) -> None:
        """End one backward; what ran in it stands still in those that follow."""
        if self._now:
            write_buffers(self._kept)
            self._before |= self._now
            self._now, self._kept = set(), []

    def _see(self, module: nn.Module, _: Any) -> None:
        if module._buffers and module not in self._now:
            self._now.add(module)
            if module in self._before:
                self._kept.append(read_buffers(module))
