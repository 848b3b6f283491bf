"""Every module's examples run, and every public name says what it is."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "detente"


def modules() -> list[str]:
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if parts[-1] != "__main__":
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


# Rooms whose modules are used directly from outside; of the others, what an `__all__` offers is public.
OPEN_ROOMS = ("detente.geometry", "detente.methods", "detente.metrics", "detente.values")


def public_names(module: ModuleType) -> dict[str, object]:
    """The public classes and functions of a module: what it offers, or, in an open room, what it defines."""
    offered = set(getattr(module, "__all__", ()))
    return {
        name: value
        for name, value in vars(module).items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and not name.startswith("_")
        and (
            name in offered
            or (module.__name__.startswith(OPEN_ROOMS) and value.__module__ == module.__name__)
        )
    }


def own_docstring(value: object) -> str | None:
    """Not an inherited one, and not the signature that a dataclass gets as its docstring."""
    written = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    return None if str(written).startswith(f"{getattr(value, '__name__', '')}(") else written


@pytest.mark.parametrize("name", modules())
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    )
    assert outcome.failed == 0, f"{outcome.failed} of {outcome.attempted} examples in {name} fail: see above"


@pytest.mark.parametrize("name", modules())
def test_public_names_are_explained(name: str) -> None:
    module = importlib.import_module(name)
    assert inspect.getdoc(module), f"{name} has no docstring"
    short = [
        public
        for public, value in public_names(module).items()
        # For an exception one line can say it all: what happened.
        if len((own_docstring(value) or "").strip().splitlines())
        < (1 if inspect.isclass(value) and issubclass(value, BaseException) else 2)
    ]
    assert not short, f"{name}: a docstring of more than one line is missing for {short}"


def test_every_room_has_an_example() -> None:
    """A suite that finds no examples would pass: the core rooms must have some."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for room in ("geometry", "methods", "autograd", "step"):
        found = [
            test
            for name in modules()
            if name.startswith(f"detente.{room}")
            for test in finder.find(importlib.import_module(name))
            if test.examples
        ]
        assert found, f"no example in any docstring of detente.{room}"
