"""Names to methods: what exists, what each declares, and how one is made."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeVar, cast

from detente.methods.base import Declaration, Method
from detente.methods.options import near
from detente.values import MethodInfo, Option, Row

F = TypeVar("F", bound=Callable[..., Method])
R = TypeVar("R", bound=Row)


class UnknownName(ValueError, LookupError):
    """Nothing of that name is registered.

    Example:
        >>> import detente
        >>> detente.wrap("evry", detente.create("mgda"))
        Traceback (most recent call last):
        ...
        detente.methods.registry.UnknownName: unknown wrapper 'evry'; did you mean 'every'? Registered: adaptive, ...
    """


class UnknownMethod(UnknownName):
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


class Registry(Generic[R]):
    """Keep rows by name: of methods, of wrappers, and of whatever else is made from declared options.

    Args:
        kind: what its rows are, for messages.
        unknown: what a name without a row raises.

    Example:
        >>> tools = Registry[Row]("tool")
        >>> tools.add(Row(name="list", summary="A list.", source="Python", factory=list))
        >>> tools.find("list").factory("ab")
        ['a', 'b']
    """

    def __init__(self, kind: str, unknown: type[UnknownName] = UnknownName) -> None:
        self.kind, self.unknown = kind, unknown
        self._rows: dict[str, R] = {}

    def add(self, row: R) -> None:
        """Keep a row; the same factory, defined again, replaces its own.

        Raises:
            ValueError: another factory has that name.
        """
        known = self._rows.get(row.name)
        if known is not None and _place(known.factory) != _place(row.factory):
            raise ValueError(
                f"a {self.kind} named {row.name!r} is already registered by {_place(known.factory)}; choose another "
                "name."
            )
        self._rows[row.name] = row

    def remove(self, name: str) -> None:
        """Forget a row.

        Raises:
            UnknownName: there is none of that name.
        """
        self.find(name)
        del self._rows[name]

    def find(self, name: str) -> R:
        """Return the row of that name.

        Raises:
            UnknownName: there is none; close names are suggested.
        """
        if name not in self._rows:
            raise self.unknown(
                f"unknown {self.kind} {name!r}; {near(name, self._rows)}Registered: {', '.join(sorted(self._rows))}."
            )
        return self._rows[name]

    def get(self, name: str) -> R | None:
        """Return the row of that name; None if there is none."""
        return self._rows.get(name)

    def rows(self) -> dict[str, R]:
        """Return a copy of the rows by name, sorted."""
        return dict(sorted(self._rows.items()))


def make(row: Row, *arguments: Any, **options: Any) -> Any:
    """Call the factory of a row.

    Raises:
        UnknownOption: the row has no such option; its options are listed.

    Example:
        >>> import detente
        >>> make(detente.methods()["mgda"], solver="exact").solver
        'exact'
    """
    for option in options:
        if option not in row.options:
            offered = ", ".join(row.options) or "none"
            raise UnknownOption(f"{row.name} has no option {option!r}; it has {offered}.")
    return row.factory(*arguments, **options)


_registered = Registry[MethodInfo]("method", UnknownMethod)


def register(factory: F) -> F:
    """Make a :class:`~detente.methods.base.Method` known by its declared name; used as a decorator.

    What is decorated is a class with ``declares``, or a function that makes a method from options: a preset, known by
    the name that the method it makes declares. Options, their defaults and (for ``Literal`` annotations) their choices
    are read from the signature. The summary is the first line of the docstring.

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
    _registered.add(describe(factory))
    return factory


def unregister(name: str) -> None:
    """Forget a registered method.

    Raises:
        UnknownMethod: no such method is registered.
    """
    _registered.remove(name)


def describe(what: Callable[..., Method] | Method) -> MethodInfo:
    """Return what a method declares, with summary and options read from a docstring and a signature.

    Args:
        what: a class, a function that makes a method, or an instance, see :func:`info_of`. A parameter that takes a
            method to wrap is no option.

    Raises:
        TypeError: as :func:`register`.

    Example:
        >>> import detente
        >>> describe(detente.create("gradvac", group="layer")).gives
        'blocks'
    """
    if isinstance(what, Method):
        return info_of(what)
    declared = getattr(what if isinstance(what, type) else what(), "declares", None)
    if declared is None:
        raise TypeError(f"{what.__name__} has no `declares`; give it a detente.Declaration.")
    return _described(declared, what)


def info_of(method: Method) -> MethodInfo:
    """Return what an instance declares, registered or not: its options or a wrapped method may have changed what holds.

    Example:
        >>> import detente
        >>> info_of(detente.create("uniform")).name
        'uniform'
    """
    row = _registered.get(method.declares.name)
    if row is not None and row.factory is type(method) and "declares" not in method.__dict__:
        return row
    preset = row is not None and not isinstance(row.factory, type)
    return _described(method.declares, row.factory if row is not None and preset else type(method))


def _described(declared: Declaration, factory: Callable[..., Method]) -> MethodInfo:
    summary, options = read_signature(factory)
    options = with_search(factory, options, declared.search)
    return MethodInfo(**vars(declared), summary=summary, options=options, factory=factory)


@lru_cache(maxsize=256)
def read_signature(
    factory: Callable[..., Any], *, around: frozenset[str] = frozenset()
) -> tuple[str, Mapping[str, Option]]:
    """Read the summary of a class or function, and its options with their defaults and choices.

    Args:
        factory: its parameters are the options, but for those annotated as a method.
        around: names of further parameters that are no options, such as the parameters an optimizer moves.

    Raises:
        TypeError: there is no docstring, or an option without default.

    Example:
        >>> import detente
        >>> summary, options = read_signature(detente.wrappers.Every)
        >>> options["k"]
        Option(default=5, choices=(), search=())
    """
    summary = (inspect.getdoc(factory) or "").strip().split("\n")[0]
    if not factory.__doc__ or not summary:
        raise TypeError(f"{factory.__name__} has no docstring; its first line is the summary users read.")
    constructor: Any = cast("type[Method]", factory).__init__ if isinstance(factory, type) else factory
    if constructor is Method.__init__:
        return summary, {}  # preference and seed are for authors to pass on, not options of every method
    hints = typing.get_type_hints(constructor)
    options: dict[str, Option] = {}
    for name, parameter in inspect.signature(factory).parameters.items():
        hint = hints.get(name)
        if (
            parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            or hint is Method
            or name in around
        ):
            continue
        if parameter.default is parameter.empty:
            raise TypeError(f"option {name!r} of {factory.__name__} has no default; every option needs one.")
        options[name] = Option(
            parameter.default, typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        )
    return summary, MappingProxyType(options)


def with_search(
    factory: Callable[..., Any], options: Mapping[str, Option], search: Mapping[str, tuple[Any, ...]]
) -> Mapping[str, Option]:
    """Return ``options`` with the values that a default search tries for each.

    Raises:
        TypeError: a class searches over something that is no option of it; a preset may leave options out.

    Example:
        >>> with_search(dict, {"k": Option(5)}, {"k": (1, 5)})["k"]
        Option(default=5, choices=(), search=(1, 5))
    """
    for name in search:
        if name not in options and isinstance(factory, type):
            raise TypeError(
                f"{factory.__name__} declares a search over {name!r}, which is none of its options."
            )
    found = {name: replace(option, search=tuple(search.get(name, ()))) for name, option in options.items()}
    return MappingProxyType(found)


def _place(factory: Callable[..., Any]) -> str:
    return f"{factory.__module__}.{factory.__qualname__}"


def methods() -> dict[str, MethodInfo]:
    """Return every registered method: name to :class:`detente.MethodInfo`, sorted by name.

    Example:
        >>> import detente
        >>> "aligned-mtl" in detente.methods()
        True
    """
    return _registered.rows()


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
    row = describe(_load(name)) if name.rpartition(":")[0].endswith(".py") else _registered.find(name)
    method: Method = make(row, **options)
    if isinstance(tasks, str):
        raise TypeError(f"tasks is the text {tasks!r}; give a list of names, or their number.")
    if tasks is not None:
        names = tuple(str(task) for task in range(tasks)) if isinstance(tasks, int) else tuple(tasks)
        method.bind(names)
    return method


def _load(name: str) -> type[Method]:
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
    return cls


def discover(package: str, path: Sequence[str]) -> None:
    """Import every module of ``package``, so that one new file is one new method.

    Args:
        package: dotted name of the package.
        path: its ``__path__``.

    Example:
        >>> import json
        >>> discover("json", json.__path__)  # imports json.decoder, json.encoder and others
    """
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
