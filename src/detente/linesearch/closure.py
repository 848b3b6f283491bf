"""Running the caller's closure again and again at different points, each time as if it were the first."""

from __future__ import annotations

import inspect
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

    Only the passes that the gradients belong to have a graph. A closure that differentiates inside (a derivative of the
    output in the loss) does so under ``torch.enable_grad()``, or the trials fail.
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
        with _without_graph():
            return self._run()

    def heads(self, features: Any) -> Losses:
        """The heads as they now are on ``features``, without a graph."""
        self._frozen.rewind(self._heads_start)
        with _without_graph():
            return self._run_heads(features)

    def leave(self) -> None:
        """Buffers as the first pass left them; random state as the last pass with a graph did."""
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
        try:
            found = self._closure(features)
        except TypeError as error:
            if _takes_features(self._closure):
                raise
            raise TypeError(
                "the fast search hands the representation to the closure as its one positional argument, and this "
                "closure does not take one: write def closure(features=None)."
            ) from error
        returned, losses = _pair(found)
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
    parts = _entries(features)
    bad = [(label, part) for label, part in parts if not isinstance(part, torch.Tensor) or part.is_complex()]
    if bad or not parts:
        got = f"{type(features).__name__} for features"
        if bad and bad[0][1] is not features:
            got = f"{_kind(bad[0][1])} for {bad[0][0]}"
        raise TypeError(
            "the closure must return (features, losses) with features a real tensor, or a flat sequence or mapping of "
            f"such; got {got}."
        )
    return tuple(part for _, part in parts)


def check_graph(features: Any) -> None:
    """See that every tensor of a representation can be moved and be walked back to the encoder.

    Raises:
        ValueError: one carries no graph; it is named.
    """
    for label, part in _entries(features):
        if not part.requires_grad:
            raise ValueError(
                f"{label} (shape {tuple(part.shape)}, {part.dtype}) carries no graph, so the search cannot move it. "
                "Return as features only what the shared parameters compute, not detached: masks, indices and sizes "
                "stay outside, where the closure can read them. If the encoder did compute it, it is frozen or ran "
                "under torch.no_grad()."
            )


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
            return [_number(name, given[name]) for name in names]
        told = f"of {', '.join(given)}"
    elif isinstance(losses, Sequence) and not isinstance(losses, str):
        if len(losses) == len(names):
            return [_number(name, loss) for name, loss in zip(names, losses, strict=True)]
        told = f"of {len(losses)} without names"
    else:
        told = f"a {type(losses).__name__} for all of them"
    raise ClosureChanged(
        f"the closure gave losses of tasks {', '.join(names)} at first and then {told}. Every call must run the same "
        "tasks on the same batch. Nothing was changed."
    )


def _number(name: str, loss: Any) -> torch.Tensor:
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return loss
    kind = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else _kind(loss)
    raise ClosureChanged(
        f"the closure gave the loss of task {name!r} as a tensor of one number at first and then as {kind}. Every call "
        "must return the losses alike. Nothing was changed."
    )


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype}"
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _entries(features: Any) -> list[tuple[str, Any]]:
    """What a representation holds, each with its name for messages."""
    if isinstance(features, torch.Tensor):
        return [("features", features)]
    if isinstance(features, Mapping):
        return [(f"features[{name!r}]", part) for name, part in features.items()]
    if isinstance(features, Sequence) and not isinstance(features, str):
        return [(f"features[{place}]", part) for place, part in enumerate(features)]
    return []


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
