"""Running the caller's closure again and again at different points, each time as if it were the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from detente.linesearch.freeze import Frozen, random_state, same_random_state
from detente.linesearch.record import ClosureChanged

Losses = Mapping[str, torch.Tensor] | Sequence[torch.Tensor]


class Closure(Protocol):
    """What the caller hands over: one fixed batch, run forward.

    Called without arguments it runs the network and returns the shared representation (a tensor, or a flat sequence or
    mapping of tensors; the classical search ignores it) and the losses; with ``features`` it runs the heads only, on
    the representation given, and returns that and the losses. It neither calls backward nor moves anything.
    """

    def __call__(self, features: Any = None, /) -> tuple[Any, Losses]:
        """The representation and the losses."""


class Runs:
    """All forward passes of one step, counted; every one starts from the same random state and the same buffers.

    A pass through the heads alone starts from the random state that the whole network left behind, so that the numbers
    it draws are no second use of those the trunk drew.

    Args:
        closure: the caller's.
        modules: whose buffers stand still.
        discover: as in :class:`~detente.linesearch.freeze.Frozen`.

    Attributes:
        trunk_forwards, head_forwards: passes so far; one through the whole network counts for both.
        draws: True if the whole network drew random numbers.
    """

    def __init__(self, closure: Closure, modules: Sequence[nn.Module], *, discover: bool) -> None:
        self._closure = closure
        self._frozen = Frozen(modules, discover=discover)
        self._heads_start = self._frozen.start
        self.trunk_forwards = self.head_forwards = 0
        self.draws = False

    def first(self) -> tuple[Any, Losses]:
        """The pass with a graph, whose buffers and random numbers count."""
        with self._frozen.watching(), torch.enable_grad():
            found = self._run()
        self._heads_start = self._frozen.end
        self.draws = not same_random_state(self._frozen.start, self._frozen.end)
        return found

    def first_of_heads(self, features: Any) -> Losses:
        """The heads once more with a graph, for losses whose random numbers later passes through the heads repeat."""
        self._frozen.rewind(self._heads_start)
        with torch.enable_grad():
            losses = self._run_heads(features)
        self._frozen.end = random_state()
        return losses

    def again(self) -> tuple[Any, Losses]:
        """The whole network as it now is, without a graph."""
        self._frozen.rewind()
        with torch.no_grad():
            return self._run()

    def heads(self, features: Any) -> Losses:
        """The heads as they now are on ``features``, without a graph."""
        self._frozen.rewind(self._heads_start)
        with torch.no_grad():
            return self._run_heads(features)

    def leave(self) -> None:
        """Buffers and random state as the first pass left them."""
        self._frozen.leave()

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Whatever fails inside, buffers and random state are afterwards what they were before the first pass."""
        try:
            yield
        except BaseException:
            self._frozen.rewind()
            raise

    def _run(self) -> tuple[Any, Losses]:
        self.trunk_forwards += 1
        self.head_forwards += 1
        return _pair(self._closure())

    def _run_heads(self, features: Any) -> Losses:
        self.head_forwards += 1
        returned, losses = _pair(self._closure(features))
        if not _same(flat(returned), flat(features)):
            raise ValueError(
                "closure(features) returned another representation than it was given: with features it must run the "
                "heads on them, and leave the encoder out."
            )
        return losses


def flat(features: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of a representation.

    Raises:
        TypeError: it is neither a real tensor nor a flat sequence or mapping of such, or is empty.
    """
    parts: tuple[Any, ...] = ()
    if isinstance(features, torch.Tensor):
        parts = (features,)
    elif isinstance(features, Mapping):
        parts = tuple(features.values())
    elif isinstance(features, Sequence) and not isinstance(features, str):
        parts = tuple(features)
    if not parts or not all(isinstance(part, torch.Tensor) and not part.is_complex() for part in parts):
        raise TypeError(
            "the closure must return (features, losses) with features a real tensor, or a sequence or mapping of such; "
            f"got {type(features).__name__} for features."
        )
    return parts


def like(features: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """Other tensors in the form of a representation.

    Example:
        >>> sorted(like({"low": torch.zeros(1), "high": torch.zeros(1)}, torch.eye(2)))
        ['high', 'low']
    """
    if isinstance(features, torch.Tensor):
        return tensors[0]
    if isinstance(features, Mapping):
        return dict(zip(features, tensors, strict=True))
    if hasattr(features, "_make"):  # a named tuple
        return features._make(tensors)
    return tuple(tensors) if isinstance(features, tuple) else list(tensors)


def in_order(losses: Losses, names: Sequence[str]) -> list[torch.Tensor]:
    """The losses of the tasks ``names``, in that order.

    Raises:
        ClosureChanged: they are of other tasks.
    """
    if isinstance(losses, Mapping):
        given = {str(name): loss for name, loss in losses.items()}
        if given.keys() == set(names):
            return [given[name] for name in names]
        told = ", ".join(given)
    else:
        if len(losses) == len(names):
            return list(losses)
        told = f"{len(losses)} without names"
    raise ClosureChanged(
        f"the closure gave losses of tasks {', '.join(names)} at first and then of {told}. Every call must run the "
        "same tasks on the same batch. Nothing was changed."
    )


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
