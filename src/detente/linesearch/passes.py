"""Run the closure again and again at different points, each time as if it were the first.

Every pass starts from the same random state and the same buffers, and runs in the caller's precision; the arithmetic of
the step between the passes runs in full.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from detente.linesearch.closure import Closure, flat
from detente.linesearch.engine import Buffers, Losses, read_buffers, write_buffers

RandomState = tuple[torch.Tensor, ...]


def random_state() -> RandomState:
    """Read the state of torch's own generators: the CPU's, and those of the CUDA devices in use."""
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
    """Tell whether nothing was drawn between the two."""
    return len(first) == len(second) and all(map(torch.equal, first, second))


class Frozen:
    """Hold random state and buffers at the start of a step, to go back to before every forward pass.

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
        self._before: list[Buffers] = []
        self._after: list[Buffers] = []
        for module in modules:
            self._keep(module)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Surround the one forward pass that counts: its buffers and its random state are those left behind."""
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
        self._after = [read_buffers(entry.module) for entry in self._before]
        self.end = random_state()

    def rewind(self, state: RandomState | None = None) -> None:
        """Put back the buffers of the start, and the random state of the start, or the given one."""
        write_buffers(self._before)
        set_random_state(self.start if state is None else state)

    def leave(self) -> None:
        """Put back the buffers that the pass that counts left, and the random state ``end``."""
        write_buffers(self._after)
        set_random_state(self.end)

    def _keep(self, module: nn.Module) -> None:
        if module in self._known:
            return
        for inner in module.modules():
            if inner not in self._known:
                self._known.add(inner)
                self._before.append(read_buffers(inner))


@dataclass(frozen=True)
class Autocast:
    """Hold the caller's ``torch.autocast``, to run the closure under it and everything else without.

    Attributes:
        entered: for each kind of device on which it is enabled the dtype, and whether casts of parameters are cached.
    """

    entered: tuple[tuple[str, torch.dtype, bool], ...]

    @classmethod
    def current(cls) -> Autocast:
        """Read what is enabled here."""
        cached = torch.is_autocast_cache_enabled()
        kinds = [kind for kind in _kinds_of_devices() if torch.is_autocast_enabled(kind)]
        return cls(tuple((kind, torch.get_autocast_dtype(kind), cached) for kind in kinds))

    @contextmanager
    def left(self) -> Iterator[None]:
        """Compute in full precision inside."""
        with ExitStack() as stack:
            for kind, dtype, _ in self.entered:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=False))
            yield

    @contextmanager
    def entered_again(self) -> Iterator[None]:
        """Compute inside as the caller does.

        The copies in half precision that torch caches of the parameters last as long as the outermost block, the
        caller's: before a pass they may be of other values or lack a graph, and after it the parameters move.
        """
        with ExitStack() as stack:
            for kind, dtype, cached in self.entered:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=cached))
            torch.clear_autocast_cache()
            stack.callback(torch.clear_autocast_cache)
            yield


def _kinds_of_devices() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


class Passes:
    """Run all forward passes of one step, and count them.

    A pass through the heads alone starts from the random state that the whole network left behind, so that the numbers
    it draws are no second use of those the trunk drew.

    Args:
        closure: the caller's.
        modules: whose buffers stand still.
        discover: as in :class:`Frozen`.

    Attributes:
        trunk_forwards, head_forwards: passes so far; one through the whole network counts for both.
        draws: True if the whole network drew random numbers.
        precision: the caller's.
    """

    def __init__(self, closure: Closure, modules: Sequence[nn.Module], *, discover: bool) -> None:
        self._closure = closure
        self._frozen = Frozen(modules, discover=discover)
        self._heads_start = self._frozen.start
        self.trunk_forwards = self.head_forwards = 0
        self.draws = False
        self.precision = Autocast.current()

    def first(self) -> tuple[Any, Losses]:
        """Run the pass with a graph, whose buffers and random numbers count."""
        with self._frozen.watching(), torch.enable_grad():
            pair = self._run()
        self._heads_start = self._frozen.end
        self.draws = not same_random_state(self._frozen.start, self._frozen.end)
        return pair

    def first_of_heads(self, features: Any) -> Losses:
        """Run the heads once more with a graph, for losses whose random numbers later passes of the heads repeat."""
        self._frozen.rewind(self._heads_start)
        with torch.enable_grad():
            losses = self._run_heads(features)
        self._frozen.end = random_state()
        return losses

    def again(self) -> tuple[Any, Losses]:
        """Run the whole network as it now is, without a graph."""
        self._frozen.rewind()
        with _without_graph():
            return self._run()

    def heads(self, features: Any) -> Losses:
        """Run the heads as they now are on ``features``, without a graph."""
        self._frozen.rewind(self._heads_start)
        with _without_graph():
            return self._run_heads(features)

    def whole(self) -> Losses:
        """Run the whole network as it now is, its heads with the random numbers of :meth:`heads`."""
        features, losses = self.again()
        return self.heads(features) if self.draws else losses

    def leave(self) -> None:
        """Leave buffers as the first pass did; random state as the last pass with a graph did."""
        self._frozen.leave()

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Put buffers and random state back to what they were before the first pass if something fails inside."""
        try:
            yield
        except BaseException:
            self._frozen.rewind()
            raise

    def _run(self) -> tuple[Any, Losses]:
        self.trunk_forwards += 1
        self.head_forwards += 1
        with self.precision.entered_again():
            return _pair(self._closure())

    def _run_heads(self, features: Any) -> Losses:
        self.head_forwards += 1
        try:
            with self.precision.entered_again():
                given = self._closure(features)
        except TypeError as error:
            if _takes_features(self._closure):
                raise
            raise TypeError(
                "the fast search hands the representation to the closure as its one positional argument, and this "
                "closure does not take one: write def closure(features=None)."
            ) from error
        returned, losses = _pair(given)
        if not _same(flat(returned), flat(features)):
            raise ValueError(
                "closure(features) returned another representation than it was given: with features it must run the "
                "heads on them, and leave the encoder out."
            )
        return losses


def _takes_features(closure: Any) -> bool:
    try:
        inspect.signature(closure).bind(None)
    except TypeError:
        return False
    except ValueError:  # a callable that does not tell what it takes
        return True
    return True


@contextmanager
def _without_graph() -> Iterator[None]:
    try:
        with torch.no_grad():
            yield
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise RuntimeError(
            f"{error}. The trials of a search run the closure without a graph, and it differentiates inside: put the "
            "part that does, from the first tensor it needs a derivative of, under torch.enable_grad()."
        ) from error


def _pair(returned: Any) -> tuple[Any, Losses]:
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(
            f"the closure must return the pair (features, losses), got {type(returned).__name__}."
        )
    return returned[0], returned[1]


def _same(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(
        a is b or (a.shape == b.shape and torch.equal(a, b)) for a, b in zip(first, second, strict=True)
    )
