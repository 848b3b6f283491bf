"""The contract of a wrapper, a method around a method, and the names of those that exist.

A wrapper is a method like any other: it can be passed to ``backward`` and ``combine``, wrapped again, saved and loaded.
What it declares follows from what the wrapped method declares.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import numpy as np

from detente.methods.base import Declaration, Method
from detente.methods.registry import UnknownOption, describe, info_of
from detente.values import Combination, MethodInfo, Option, TaskGradients

_registered: dict[str, WrapperInfo] = {}

W = TypeVar("W", bound="type[Wrapper]")


@dataclass(frozen=True)
class WrapperInfo:
    """What is known of a wrapper before it is wrapped around anything.

    Attributes:
        name: the name for :func:`wrap`.
        summary: one line.
        source: paper, or where the idea comes from.
        options: name to :class:`detente.Option`.
        accepts: what the wrapped method may give: ``weights``, ``blocks``, ``direction``
            (see :class:`detente.MethodInfo`).
        factory: takes a method, and the options as keywords.

    Example:
        >>> import detente
        >>> detente.wrappers.registered()["every"].factory(detente.create("mgda"), k=3).declares.name
        'every(mgda)'
    """

    name: str
    summary: str
    source: str
    options: Mapping[str, Option]
    accepts: frozenset[str]
    factory: Callable[..., Wrapper]


class Wrapper(Method):
    """Base of the methods around a method.

    An author writes ``name``, ``source``, ``accepts`` (and ``search``), an ``__init__`` that takes the wrapped method
    first and options as keywords, and ``solve``, which asks ``self.method.combine``. The last line of ``__init__`` is
    ``self.derive(...)``: what the wrapper declares, as changes to what the wrapped method declares. A subclass with a
    ``declares`` of its own keeps that: so a method built from a wrapper can be registered under a name.

    Names of tasks, epochs and losses after the step are handed on to the wrapped method; its state is saved with the
    wrapper's, under ``method.``.

    Args:
        method: any method, from :func:`detente.create` or another wrapper.

    Raises:
        TypeError: ``method`` is none.
        ValueError: it gives something this wrapper cannot work with.

    Example:
        >>> import detente
        >>> method = detente.wrappers.Smooth(detente.wrappers.Every(detente.create("mgda"), k=5), beta=0.9)
        >>> method.declares.name
        'smooth(every(mgda))'
    """

    name: ClassVar[str]
    source: ClassVar[str]
    accepts: ClassVar[frozenset[str]] = frozenset({"weights", "blocks", "direction"})
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def __init__(self, method: Method) -> None:
        super().__init__()
        if not isinstance(method, Method):
            hint = f" Create it first: detente.create({method!r})." if isinstance(method, str) else ""
            raise TypeError(f"{self.name} wraps a method, not a {type(method).__name__}.{hint}")
        given = info_of(method)
        if given.gives not in self.accepts:
            what = {
                "direction": "gives only a direction, which no weights of the tasks express",
                "blocks": "gives weights that differ from block to block",
                "weights": "gives one weight for each task",
            }[given.gives]
            raise ValueError(f"{self.name} cannot be wrapped around {given.name}: {given.name} {what}.")
        self.method = method

    def derive(self, **changes: Any) -> None:
        """Declare what the wrapped method declares, with these changes."""
        if isinstance(getattr(type(self), "declares", None), Declaration):
            return
        inner = self.method.declares
        self.declares = replace(
            inner,
            **{
                "name": f"{self.name}({inner.name})",
                "source": f"{self.source}; {inner.source}",
                "heads": self.inner_info().heads,
                "search": self.search,
                **changes,
            },
        )

    def inner_info(self) -> MethodInfo:
        """What the wrapped method declares."""
        return info_of(self.method)

    def needs_now(self) -> frozenset[str]:
        """What this wrapper needs beyond the wrapped method, and what that one needs now."""
        return (self.declares.needs - self.method.declares.needs) | self.method.needs_now()

    def end_epoch(self) -> None:
        """Tell the wrapped method."""
        self.method.end_epoch()

    def epoch_record(self) -> dict[str, Any]:
        """What the wrapped method has to say."""
        return self.method.epoch_record()

    def after_step(self, losses: Mapping[str, Any] | Sequence[Any]) -> None:
        """Hand the losses to the wrapped method."""
        self.method.after_step(losses)

    def weights_of(self, result: Combination, gradients: TaskGradients) -> np.ndarray:
        """[T, W] weights that the wrapped method gave: W is 1, or the number of blocks.

        Raises:
            ValueError: it gave none.
        """
        if result.weights is not None:
            return result.weights.numpy()[:, None]
        if result.block_weights is not None:
            return result.block_weights.numpy().T
        raise ValueError(
            f"{self.declares.name} works on weights, and {self.method.declares.name} gave only a direction; it "
            "should declare gives='direction'."
        )


def register_wrapper(cls: W) -> W:
    """Make a :class:`Wrapper` known by its name; used as a decorator.

    Raises:
        ValueError: another wrapper has that name.

    Example:
        >>> sorted(registered())
        ['adaptive', 'every', 'inexact', 'normalize', 'per-block', 'smooth']
    """
    known = _registered.get(cls.name)
    if known is not None and known.factory is not cls:
        raise ValueError(f"a wrapper named {cls.name!r} is already registered; choose another name.")
    summary = (inspect.getdoc(cls) or "").strip().split("\n")[0]
    declared = type("_", (cls,), {"declares": Declaration(cls.name, cls.source, search=cls.search)})
    declared.__doc__ = cls.__doc__
    options = MappingProxyType(dict(describe(declared).options))
    _registered[cls.name] = WrapperInfo(cls.name, summary, cls.source, options, cls.accepts, cls)
    return cls


def registered() -> dict[str, WrapperInfo]:
    """Every registered wrapper: name to :class:`WrapperInfo`, sorted by name.

    Example:
        >>> registered()["every"].options["k"].default
        5
    """
    return dict(sorted(_registered.items()))


def wrap(name: str, method: Method, **options: Any) -> Wrapper:
    """Put a wrapper around a method by name; the same as its class in ``detente.wrappers``.

    Args:
        name: a registered name, see :func:`registered`.
        method: the method to wrap.
        **options: the wrapper's options.

    Raises:
        ValueError: no such wrapper, an option out of range, or a method it cannot be wrapped around.
        UnknownOption: the wrapper has no such option; its options are listed.
        TypeError: ``method`` is none.

    Example:
        >>> import detente
        >>> detente.wrap("every", detente.create("mgda"), k=5).declares.name
        'every(mgda)'
    """
    if name not in _registered:
        raise ValueError(f"unknown wrapper {name!r}. Registered: {', '.join(registered())}.")
    info = _registered[name]
    for option in options:
        if option not in info.options:
            raise UnknownOption(f"{name} has no option {option!r}; it has {', '.join(info.options)}.")
    return info.factory(method, **options)
