"""Making a forward pass repeatable: the random state and the buffers of the modules it runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

RandomState = tuple[torch.Tensor, ...]


def random_state() -> RandomState:
    """The state of torch's own generators: the CPU's, and those of the CUDA devices in use."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states += torch.cuda.get_rng_state_all()
    return tuple(states)


def set_random_state(states: RandomState) -> None:
    """Put back what :func:`random_state` gave."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(list(states[1:]))


def same_random_state(first: RandomState, second: RandomState) -> bool:
    """True if nothing was drawn between the two."""
    return len(first) == len(second) and all(map(torch.equal, first, second))


@dataclass(frozen=True)
class _Buffers:
    """One module's buffers: the tensors themselves, None where a name is only reserved, and what they held."""

    module: nn.Module
    found: dict[str, torch.Tensor | None]
    values: dict[str, torch.Tensor]


def _read(module: nn.Module) -> _Buffers:
    found = dict(module._buffers.items())  # of a scripted module it is no dict
    values = {
        name: buffer.detach().clone()
        for name, buffer in found.items()
        if buffer is not None and not torch.nn.parameter.is_lazy(buffer)
    }
    return _Buffers(module, found, values)


def _write(kept: Sequence[_Buffers]) -> None:
    tensors: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    for entry in kept:
        held = entry.module._buffers
        for name in [name for name in held.keys() if name not in entry.found]:  # noqa: SIM118, see _read
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
        # to. It may read them too: put back what its forward pass left (`leave`) before walking the graph.
        with torch.no_grad():
            torch._foreach_copy_(tensors, values)


class Frozen:
    """Random state and buffers at the start of a step, to go back to before every forward pass.

    Args:
        modules: whose buffers to keep, with everything inside them.
        discover: keep also those of every module that runs while :meth:`watching` lasts.

    Attributes:
        start: the random state at the start.
        end: the random state to leave behind; at first that of the start.
    """

    def __init__(self, modules: Sequence[nn.Module], *, discover: bool) -> None:
        self.start = self.end = random_state()
        self._discover = discover
        self._known: set[nn.Module] = set()
        self._before: list[_Buffers] = []
        self._after: list[_Buffers] = []
        for module in modules:
            self._keep(module)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the one forward pass that counts: its buffers and its random state are those left behind."""
        handle = None
        if self._discover:
            thread = threading.get_ident()

            def see(module: nn.Module, _: Any) -> None:
                if threading.get_ident() == thread:
                    self._keep(module)

            handle = register_module_forward_pre_hook(see)
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()
        self._after = [_read(entry.module) for entry in self._before]
        self.end = random_state()

    def rewind(self, state: RandomState | None = None) -> None:
        """Buffers as at the start, and the random state of the start, or the given one."""
        _write(self._before)
        set_random_state(self.start if state is None else state)

    def leave(self) -> None:
        """Buffers as the pass that counts left them, and the random state ``end``."""
        _write(self._after)
        set_random_state(self.end)

    def _keep(self, module: nn.Module) -> None:
        if module in self._known:
            return
        for inner in module.modules():
            if inner not in self._known:
                self._known.add(inner)
                self._before.append(_read(inner))
