"""Buffers of modules: reading them, and putting them back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Buffers:
    """Hold one module's own buffers, and what they held when they were read.

    Attributes:
        module: whose they are.
        found: the tensors themselves by name, None where a name is only reserved.
        values: copies of what they held.
    """

    module: nn.Module
    found: dict[str, torch.Tensor | None]
    values: dict[str, torch.Tensor]


def read_buffers(module: nn.Module) -> Buffers:
    """Copy what a module's own buffers hold now; those of modules inside it are left out.

    Args:
        module: any module, a scripted one too.
    """
    found = dict(module._buffers.items())  # of a scripted module it is no dict
    values = {
        name: buffer.detach().clone()
        for name, buffer in found.items()
        if buffer is not None and not torch.nn.parameter.is_lazy(buffer)
    }
    return Buffers(module, found, values)


def write_buffers(kept: Sequence[Buffers]) -> None:
    """Put back what :func:`read_buffers` copied, and the tensors themselves where they were replaced.

    Args:
        kept: one entry for each module.
    """
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
