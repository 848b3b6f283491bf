"""The table of rooms in docs/architecture.md, enforced: who may import whom, and which libraries.

Imports are read from the source, so an import inside a function counts as well; only what stands at module
level is held against the list of slow libraries.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "detente"
ARCHITECTURE = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"

NOTHING: frozenset[str] = frozenset()

# room -> the other rooms it may import. The public face, detente/__init__.py, is the room "detente".
ROOMS: dict[str, frozenset[str]] = {
    "values": NOTHING,
    "geometry": NOTHING,
    "methods": frozenset({"values", "geometry"}),
    "autograd": frozenset({"values"}),
    "diagnostics": frozenset({"values", "geometry"}),
    "step": frozenset({"values", "methods", "autograd", "diagnostics"}),
    "optim": frozenset({"step", "methods", "autograd", "values"}),
    "linesearch": frozenset({"optim", "step", "methods", "autograd", "geometry", "values"}),
    "problems": NOTHING,
    "data": NOTHING,
    "models": NOTHING,
    "metrics": NOTHING,
    "codec": NOTHING,
    "rl": NOTHING,
    "records": frozenset({"values"}),
    "statistics": frozenset({"metrics"}),
    "reports": frozenset({"records", "statistics"}),
    "integrations": frozenset({"step", "diagnostics"}),
}
ROOMS["training"] = frozenset(ROOMS) - {"statistics", "reports", "integrations"}
ROOMS["experiments"] = ROOMS["training"] | {"training", "reports"}
ROOMS["sweeps"] = ROOMS["experiments"] | {"experiments", "statistics"}
ROOMS["detente"] = frozenset({"values", "methods", "autograd", "step"})
ROOMS["cli"] = frozenset(ROOMS)

# room -> the only foreign libraries it may use, wherever in the file. Rooms that are not named may use any
# library of their extra.
LIBRARIES: dict[str, frozenset[str]] = {
    "values": frozenset({"torch", "numpy"}),
    "geometry": frozenset({"numpy", "scipy", "threadpoolctl"}),
    "methods": frozenset({"torch", "numpy", "scipy"}),
    "autograd": frozenset({"torch", "numpy"}),
    "step": frozenset({"torch", "numpy"}),
    "optim": frozenset({"torch", "numpy"}),
    "linesearch": frozenset({"torch", "numpy"}),
    "detente": NOTHING,
}

# References in the tests, never part of the product.
ONLY_IN_TESTS = frozenset(
    {
        "cvxpy",
        "clarabel",
        "ecos",
        "qpsolvers",
        "quadprog",
        "torchjd",
        "mpmath",
        "statsmodels",
        "sklearn",
        "pytest",
    }
)

# Libraries that may stand at module level; everything else is imported in the function that uses it.
QUICK = frozenset({"numpy", "torch"})


@dataclass(frozen=True)
class Import:
    """One imported module: dotted name, line, and whether the import runs when the file is imported."""

    module: str
    line: int
    at_module_level: bool


def module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """`detente.geometry.simplex` -> `geometry`; the package itself -> `detente`; `python -m detente` -> `cli`."""
    parts = module.split(".")
    room = parts[1] if len(parts) > 1 else parts[0]
    return "cli" if room == "__main__" else room


def imports_of(source: str, module: str, is_package: bool, rooms: frozenset[str]) -> list[Import]:
    """Every import of a file, relative ones resolved; blocks under TYPE_CHECKING do not run on import."""
    found: list[Import] = []
    package = module if is_package else module.rpartition(".")[0]

    def visit(node: ast.AST, runs: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, runs) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - (node.level - 1)]
                base = ".".join([*parents, base] if base else parents)
            if base == "detente":
                # `from detente import geometry` takes a room; `from detente import backward` takes the face.
                for alias in node.names:
                    name = f"detente.{alias.name}" if alias.name in rooms else "detente"
                    found.append(Import(name, node.lineno, runs))
            else:
                found.append(Import(base, node.lineno, runs))
        for child in ast.iter_child_nodes(node):
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            visit(child, runs and not inside and not typing_only)

    visit(ast.parse(source), True)
    return found


def complaints(source: str, module: str, is_package: bool = False) -> list[str]:
    """What the table says against one file, a line each."""
    room = room_of(module)
    if room not in ROOMS:
        return [f"{module}: the room {room!r} is not in the table of docs/architecture.md and of this test"]
    result = []
    for found in imports_of(source, module, is_package, frozenset(ROOMS)):
        top = found.module.partition(".")[0]
        where = f"{module}, line {found.line}: imports {found.module}"
        if top == "detente":
            other = room_of(found.module)
            if other != room and other not in ROOMS[room]:
                result.append(
                    f"{where}, but {room!r} may import only {sorted(ROOMS[room]) or 'nothing of ours'}"
                )
        elif top not in sys.stdlib_module_names:
            if top in ONLY_IN_TESTS:
                result.append(f"{where}, which is a reference for tests only")
            elif room in LIBRARIES and top not in LIBRARIES[room]:
                result.append(f"{where}, but {room!r} may use only {sorted(LIBRARIES[room])}")
            if found.at_module_level and top not in QUICK:
                result.append(f"{where} at module level: import it in the function that uses it")
    return result


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path, PACKAGE))
def test_every_file_keeps_to_the_table(path: Path) -> None:
    found = complaints(path.read_text("utf-8"), module_name(path, PACKAGE), path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_the_package_was_found() -> None:
    assert {"geometry", "methods", "autograd", "step", "values"} <= {
        room_of(module_name(f, PACKAGE)) for f in FILES
    }


def test_the_table_has_no_cycle() -> None:
    order: list[str] = []
    rest = dict(ROOMS)
    while rest:
        free = sorted(room for room, allowed in rest.items() if allowed <= set(order))
        assert free, f"these rooms import each other in a circle: {sorted(rest)}"
        order += free
        for room in free:
            del rest[room]


def test_the_documented_table_is_this_one() -> None:
    documented: dict[str, frozenset[str]] = {}
    table = ARCHITECTURE.read_text("utf-8").split("| room |")[1].split("\n\n")[0]
    for row in table.splitlines()[2:]:
        rooms, _, allowed = (cell.strip() for cell in row.strip().strip("|").split("|"))
        for room in re.findall(r"`([a-z_]+?)(?:/|\.py)?`", rooms):
            named: set[str] = set()
            for words in re.split(r",\s*", allowed):
                if words == "all above":
                    named |= set(documented) - {"detente"}
                elif words != "nothing of ours":
                    named.add("detente" if words == "the public face" else words)
            documented["detente" if room == "__init__" else room] = frozenset(named)
    assert documented == ROOMS


@pytest.mark.parametrize(
    ("source", "module", "complaint"),
    [
        (
            "from detente.values import Combination",
            "detente.geometry.simplex",
            "may import only nothing of ours",
        ),
        ("from ..values import Combination", "detente.geometry.simplex", "may import only nothing of ours"),
        ("from .. import records", "detente.methods.mgda", "imports detente.records"),
        ("from detente import backward", "detente.methods.mgda", "imports detente,"),
        ("def f():\n    from detente.training import loop", "detente.step", "imports detente.training"),
        ("import torch", "detente.geometry.simplex", "may use only ['numpy', 'scipy', 'threadpoolctl']"),
        ("import scipy.optimize", "detente.geometry.simplex", "at module level"),
        ("class A:\n    import pandas", "detente.reports.table", "at module level"),
        ("def f():\n    import cvxpy", "detente.geometry.simplex", "reference for tests only"),
        ("import torch", "detente.kitchen", "not in the table"),
    ],
)
def test_the_check_sees_what_it_must(source: str, module: str, complaint: str) -> None:
    found = complaints(source, module)
    assert found
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("def f():\n    import scipy.optimize", "detente.geometry.simplex"),
        ("from .simplex import g\nfrom detente.geometry import simplex", "detente.geometry.dual"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pandas", "detente.reports.table"),
        ("def f():\n    import tyro", "detente.cli"),
    ],
)
def test_the_check_allows_what_it_may(source: str, module: str) -> None:
    assert complaints(source, module) == []
