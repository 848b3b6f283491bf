"""Names to methods: what exists, what each declares, and how one is made."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
import typing
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from detente.methods.base import Declaration, Method
from detente.values import GRADIENT_NEEDS, MethodInfo, Option

_registered: dict[str, tuple[type[Method], MethodInfo]] = {}

M = TypeVar("M", bound=type[Method])


class UnknownMethod(ValueError, LookupError):
    """No method of that name is registered.

    Example:
        >>> import detente
        >>> detente.create("mgdaa")
        Traceback (most recent call last):
        ...
        detente.methods.registry.UnknownMethod: unknown method 'mgdaa'; did you mean 'mgda'? ...
    """


class UnknownOption(TypeError, ValueError):
    """The method has no option of that name.

    Example:
        >>> import detente
        >>> detente.create("mgda", solvr="exact")
        Traceback (most recent call last):
        ...
        detente.methods.registry.UnknownOption: mgda has no option 'solvr'; it has solver, normalize.
    """


def register(cls: M) -> M:
    """Make a :class:`~detente.methods.base.Method` known by its declared name; used as a decorator.

    Options, their defaults and (for ``Literal`` annotations) their choices are read from ``__init__``. The summary
    is the first line of the docstring.

    Raises:
        TypeError: the class declares nothing, has no docstring, an option without default, or a search over something
            that is no option.
        ValueError: another class already has that name.

    Example:
        >>> import detente
        >>> @detente.register
        ... class First(detente.Method):
        ...     '''Follow the first task alone.'''
        ...     declares = detente.Declaration(name="first", source="this example")
        ...     def solve(self, gradients):
        ...         weights = torch.zeros(gradients.tasks, dtype=torch.float64)
        ...         weights[0] = 1
        ...         return detente.Combination(weights=weights)
        >>> import torch
        >>> detente.combine("first", torch.eye(2)).direction
        tensor([1., 0.])
        >>> detente.unregister("first")
    """
    info = describe(cls)
    known = _registered.get(info.name)
    if known is not None and (known[0].__module__, known[0].__qualname__) != (
        cls.__module__,
        cls.__qualname__,
    ):
        raise ValueError(
            f"a method named {info.name!r} is already registered by {known[0].__module__}.{known[0].__qualname__}; "
            "choose another name."
        )
    _registered[info.name] = (cls, info)
    return cls


def unregister(name: str) -> None:
    """Forget a registered method.

    Raises:
        UnknownMethod: no such method is registered.
    """
    _find(name)
    del _registered[name]


def describe(cls: type[Method] | Method) -> MethodInfo:
    """What a method declares, with summary and options read from its class's docstring and signature.

    Args:
        cls: a class, or an instance, whose options or wrapped method may have changed what holds. A parameter that
            takes a method to wrap is no option.

    Raises:
        TypeError: as :func:`register`.

    Example:
        >>> import detente
        >>> describe(detente.create("gradvac", group="layer")).gives
        'blocks'
    """
    declared: Declaration | None = getattr(cls, "declares", None)
    cls = cls if isinstance(cls, type) else type(cls)
    if declared is None:
        raise TypeError(f"{cls.__name__} has no `declares`; give it a detente.Declaration.")
    summary, parameters = _signature(cls)
    for name in declared.search:
        if name not in parameters:
            raise TypeError(f"{cls.__name__} declares a search over {name!r}, which is none of its options.")
    options = {
        name: Option(default, choices, tuple(declared.search.get(name, ())))
        for name, (default, choices) in parameters.items()
    }
    return MethodInfo(
        name=declared.name,
        summary=summary,
        source=declared.source,
        needs=declared.needs,
        spaces=declared.spaces,
        stateful=declared.stateful,
        options=MappingProxyType(options),
        native_scale=declared.native_scale,
        homogeneity=declared.homogeneity,
        nonconflict=declared.nonconflict,
        stationary=declared.stationary,
        simplex=declared.simplex,
        permutation=declared.permutation,
        heads=declared.heads or ("own" if declared.needs & GRADIENT_NEEDS else "weighted"),
        gives=declared.gives,
    )


@lru_cache(maxsize=256)
def _signature(cls: type[Method]) -> tuple[str, dict[str, tuple[Any, tuple[Any, ...]]]]:
    """The summary of a class, and its options with their defaults and choices."""
    summary = (inspect.getdoc(cls) or "").strip().split("\n")[0]
    if not cls.__doc__ or not summary:
        raise TypeError(f"{cls.__name__} has no docstring; its first line is the summary users read.")
    if cls.__init__ is Method.__init__:
        return summary, {}  # preference and seed are for authors to pass on, not options of every method
    constructor: Any = cls.__init__
    hints = typing.get_type_hints(constructor)
    options: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    for name, parameter in list(inspect.signature(constructor).parameters.items())[1:]:
        hint = hints.get(name)
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or hint is Method:
            continue
        if parameter.default is parameter.empty:
            raise TypeError(f"option {name!r} of {cls.__name__} has no default; every option needs one.")
        options[name] = (
            parameter.default,
            typing.get_args(hint) if typing.get_origin(hint) is Literal else (),
        )
    return summary, options


def methods() -> dict[str, MethodInfo]:
    """Every registered method: name to :class:`detente.MethodInfo`, sorted by name.

    Example:
        >>> import detente
        >>> "aligned-mtl" in detente.methods()
        True
    """
    return {name: info for name, (_, info) in sorted(_registered.items())}


def create(name: str, tasks: Sequence[str] | int | None = None, **options: Any) -> Method:
    """Make a method by name.

    Args:
        name: a registered name (see :func:`methods`), or ``path/to/file.py:ClassName`` for a method of your own.
        tasks: the tasks' names, or how many unnamed ones; None takes them from the first losses.
        **options: the method's options, see ``detente.methods()[name].options``.

    Raises:
        UnknownMethod: no such method; close names are suggested.
        UnknownOption: the method has no such option; its options are listed.
        ValueError: an option is out of range, or it does not fit the tasks.
        TypeError: an option, or ``tasks``, is of the wrong kind.

    Example:
        >>> import detente
        >>> detente.create("aligned-mtl", preference={"seg": 0.7, "depth": 0.3}).tasks is None
        True
    """
    cls, info = _load(name) if name.rpartition(":")[0].endswith(".py") else _find(name)
    for option in options:
        if option not in info.options:
            offered = ", ".join(info.options) or "none"
            raise UnknownOption(f"{info.name} has no option {option!r}; it has {offered}.")
    constructor: Any = cls
    method: Method = constructor(**options)
    if isinstance(tasks, str):
        raise TypeError(f"tasks is the text {tasks!r}; give a list of names, or their number.")
    if tasks is not None:
        names = tuple(str(task) for task in range(tasks)) if isinstance(tasks, int) else tuple(tasks)
        method.bind(names)
    return method


def info_of(method: Method) -> MethodInfo:
    """What an instance declares, registered or not, with the options it was made with.

    Example:
        >>> import detente
        >>> info_of(detente.create("uniform")).name
        'uniform'
    """
    known = _registered.get(method.declares.name)
    if known is not None and known[0] is type(method) and "declares" not in method.__dict__:
        return known[1]
    return describe(method)


def _find(name: str) -> tuple[type[Method], MethodInfo]:
    if name not in _registered:
        close = get_close_matches(name, _registered, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UnknownMethod(f"unknown method {name!r}; {hint}Registered: {', '.join(sorted(_registered))}.")
    return _registered[name]


def _load(name: str) -> tuple[type[Method], MethodInfo]:
    path, _, attribute = name.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise UnknownMethod(f"method file {path!r} does not exist; give path/to/file.py:ClassName.")
    module_name = f"detente_user_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # type hints of the class are resolved through it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    cls = getattr(module, attribute, None)
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise UnknownMethod(f"{path} has no class {attribute!r} derived from detente.Method.")
    return cls, describe(cls)


def discover(package: str, path: Sequence[str], skip: Mapping[str, str] | set[str]) -> None:
    """Import every module of ``package``, so that one new file is one new method.

    Args:
        package: dotted name of the package.
        path: its ``__path__``.
        skip: names of modules that hold no method.

    Example:
        >>> import json
        >>> discover("json", json.__path__, {"tool", "__main__"})  # imports json.decoder, json.encoder, json.scanner
    """
    for module in pkgutil.iter_modules(path):
        if module.name not in skip:
            importlib.import_module(f"{package}.{module.name}")
