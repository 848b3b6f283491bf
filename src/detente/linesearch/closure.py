"""Read what the caller's closure gives: a representation and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from detente.linesearch.engine import Branches, Losses
from detente.linesearch.record import ClosureChanged


class Closure(Protocol):
    """Run one fixed batch forward: what the caller hands over.

    Called without arguments it runs the network and returns the shared representation (a tensor, or a flat sequence or
    mapping of tensors; the classical search ignores it) and the losses; with ``features`` it runs the heads only, on
    the representation given, and returns that and the losses. It neither calls backward nor moves anything.

    Only the passes that the gradients belong to have a graph. A closure that differentiates inside (a derivative of the
    output in the loss) does so under ``torch.enable_grad()``, or the trials fail.
    """

    def __call__(self, features: Any = None, /) -> tuple[Any, Losses]:
        """Return the representation and the losses."""


def flat(features: Any) -> tuple[torch.Tensor, ...]:
    """List the tensors of a representation.

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
    """Refuse a representation with a tensor that cannot be moved, or not be walked back to the encoder.

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
    """Put other tensors in the form of a representation.

    Example:
        >>> sorted(like({"low": torch.zeros(1), "high": torch.zeros(1)}, torch.eye(2)))
        ['high', 'low']
    """
    if isinstance(features, torch.Tensor):
        return tensors[0]
    if isinstance(features, Branches):
        return features.of(tensors)
    if isinstance(features, Mapping):
        return dict(zip(features, tensors, strict=True))
    if hasattr(features, "_make"):  # a named tuple
        return features._make(tensors)
    return tuple(tensors) if isinstance(features, tuple) else list(tensors)


def in_order(losses: Losses, names: Sequence[str]) -> list[torch.Tensor]:
    """List the losses of the tasks ``names``, in that order.

    Raises:
        ClosureChanged: they are of other tasks.
    """
    if isinstance(losses, Mapping):
        given = {str(name): loss for name, loss in losses.items()}
        if given.keys() == set(names):
            return [_number(name, given[name]) for name in names]
        got = f"of {', '.join(given)}"
    elif isinstance(losses, Sequence) and not isinstance(losses, str):
        if len(losses) == len(names):
            return [_number(name, loss) for name, loss in zip(names, losses, strict=True)]
        got = f"of {len(losses)} without names"
    else:
        got = f"a {type(losses).__name__} for all of them"
    raise ClosureChanged(
        f"the closure gave losses of tasks {', '.join(names)} at first and then {got}. Every call must run the same "
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
    """Name what a representation holds, for messages."""
    if isinstance(features, torch.Tensor):
        return [("features", features)]
    if isinstance(features, Branches):
        features = features.features
    if isinstance(features, Mapping):
        return [(f"features[{name!r}]", part) for name, part in features.items()]
    if isinstance(features, Sequence) and not isinstance(features, str):
        return [(f"features[{place}]", part) for place, part in enumerate(features)]
    return []
