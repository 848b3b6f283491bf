"""Buffers of modules: reading them, putting them back, and keeping them still while a backward runs modules again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import checkpoint


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

    A plain backward runs each checkpointed region of the network once more, and so do ours, once per task. Statistics
    such as those of batch normalisation move with the first run of a region, as they would in a plain backward. Further
    runs begin with the buffers that the first one began with (a spectral norm reads them), and what the buffers held is
    put back afterwards. Where regions share a module, they move it in the order in which they are first run.
    """

    def __init__(self) -> None:
        # Of each region the modules it runs, with their buffers before its first run.
        self._origins: WeakKeyDictionary[Any, dict[nn.Module, Buffers]] = WeakKeyDictionary()
        self._first: set[tuple[int, nn.Module]] = set()  # in the current backward
        self._replaced: dict[nn.Module, tuple[Any, Buffers]] = {}
        self._handle: Any = None

    def __enter__(self) -> Self:
        self._handle = register_module_forward_pre_hook(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
        self.next()

    def next(self) -> None:
        """End one backward; what ran in it stands still in those that follow."""
        if self._replaced:
            write_buffers([held for _, held in self._replaced.values()])
            self._replaced = {}
        self._first.clear()

    def _see(self, module: nn.Module, _: Any) -> None:
        if not module._buffers:
            return
        region = _region() or self
        if module in self._replaced:
            known, held = self._replaced[module]
            if known is region:
                return
            write_buffers([held])
            del self._replaced[module]
        origins = self._origins.setdefault(region, {})
        if module not in origins:
            origins[module] = read_buffers(module)
            self._first.add((id(region), module))
        elif (id(region), module) not in self._first:
            self._replaced[module] = region, read_buffers(module)
            write_buffers([origins[module]])


def _region() -> Any:
    """Return what stands for the checkpointed region that is being run again; None if none is.

    torch tells it nowhere but in the closure of the function that runs the region.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "unpack_hook" and frame.f_code.co_filename == checkpoint.__file__:
            return frame.f_locals.get("frame")
        frame = frame.f_back  # type: ignore[assignment]
    return None
