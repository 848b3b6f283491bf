"""The contract of a wrapper, a method around a method, and the registry of those that exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeVar

import numpy as np

from detente.methods.base import Declaration, Method
from detente.methods.registry import Registry, info_of, make, read_signature, with_search
from detente.values import Combination, MethodInfo, Row, TaskGradients

W = TypeVar("W", bound="type[Wrapper]")


@dataclass(frozen=True, kw_only=True)
class WrapperInfo(Row):
    """Hold what is known of a wrapper before it is wrapped around anything.

    Attributes:
        name, summary, source, options, factory: see :class:`detente.values.Row`.
        accepts: what the wrapped method may give: ``weights``, ``blocks``, ``direction``
            (see :class:`detente.MethodInfo`).

    Example:
        >>> import detente
        >>> sorted(detente.wrappers.registered()["every"].accepts)
        ['blocks', 'weights']
    """

    accepts: frozenset[str]


_registered = Registry[WrapperInfo]("wrapper")


class Wrapper(Method):
    """Base of the methods around a method.

    An author writes ``name``, ``source``, ``accepts`` (and ``search``), an ``__init__`` that takes the wrapped method
    first and options as keywords, and ``solve``, which asks ``self.method.combine``. ``looks_at`` names what ``solve``
    needs beside the wrapped method. The last line of ``__init__`` is ``self.derive(...)``: what the wrapper declares,
    as changes to what the wrapped method declares. A subclass with a ``declares`` of its own keeps that.

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
    looks_at: frozenset[str] = frozenset()

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
        """Declare what the wrapped method declares, with what this wrapper looks at and with these changes."""
        if isinstance(getattr(type(self), "declares", None), Declaration):
            return
        inner = self.method.declares
        derived: dict[str, Any] = {
            "name": f"{self.name}({inner.name})",
            "source": f"{self.source}; {inner.source}",
            "needs": inner.needs | self.looks_at,
            "search": self.search,
        }
        self.declares = replace(inner, **{**derived, **changes})

    def named(self, name: str) -> Self:
        """Declare a name of its own and the wrapper's source alone, as a registered preset does; returns itself."""
        self.declares = replace(self.declares, name=name, source=self.source)
        return self

    def inner_info(self) -> MethodInfo:
        """Return what the wrapped method declares."""
        return info_of(self.method)

    def needs_now(self) -> frozenset[str]:
        """Return what this wrapper needs beyond the wrapped method, and what that one needs now."""
        own = self.declares.needs - self.method.declares.needs
        return self.looks_at | own | self.method.needs_now()

    def end_epoch(self) -> None:
        """Tell the wrapped method."""
        self.method.end_epoch()

    def epoch_record(self) -> dict[str, Any]:
        """Return the record of the wrapped method."""
        return self.method.epoch_record()

    def after_step(self, losses: Mapping[str, Any] | Sequence[Any]) -> None:
        """Hand the losses to the wrapped method."""
        self.method.after_step(losses)

    def weights_of(self, result: Combination, gradients: TaskGradients) -> np.ndarray:
        """Return the weights [T, W] that the wrapped method gave: W is 1, or the number of blocks.

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
        TypeError: as :func:`detente.register`.
        ValueError: another wrapper has that name.

    Example:
        >>> sorted(registered())
        ['adaptive', 'every', 'inexact', 'normalize', 'per-block', 'smooth']
    """
    summary, options = read_signature(cls)
    options = with_search(cls, options, cls.search)
    _registered.add(
        WrapperInfo(
            name=cls.name,
            summary=summary,
            source=cls.source,
            options=options,
            factory=cls,
            accepts=cls.accepts,
        )
    )
    return cls


def registered() -> dict[str, WrapperInfo]:
    """Return every registered wrapper: name to :class:`WrapperInfo`, sorted by name.

    Example:
        >>> registered()["every"].options["k"].default
        5
    """
    return _registered.rows()


def wrap(name: str, method: Method, **options: Any) -> Wrapper:
    """Put a wrapper around a method by name; the same as its class in ``detente.wrappers``.

    Args:
        name: a registered name, see :func:`registered`.
        method: the method to wrap.
        **options: the wrapper's options.

    Raises:
        UnknownName: no such wrapper; it is a ValueError.
        UnknownOption: the wrapper has no such option; its options are listed.
        ValueError: an option is out of range, or the method is none it can be wrapped around.
        TypeError: ``method`` is none.

    Example:
        >>> import detente
        >>> detente.wrap("every", detente.create("mgda"), k=5).declares.name
        'every(mgda)'
    """
    wrapper: Wrapper = make(_registered.find(name), method, **options)
    return wrapper
