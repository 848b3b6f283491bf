"""How far a loss walks on its way to `.grad`: the files and functions of the package that one step enters.

The step is the third of `mgda` on two tasks (a linear trunk and two linear heads), when everything has been imported,
sized and cached. `sys.setprofile` sees every call; a function is the first line of a `def` in a file below
`src/detente`, so that what dataclasses generate does not count. Promised are at most 14 files and 75 functions in the
exact space; on the features, and on branches of them, the same is shown. "Frames" counts by qualified name, and with
the comprehensions, generators and lambdas inside the functions, each of which is one more thing to read. Python 3.12
and later run most comprehensions without a frame: hold these numbers beside others of one version only.

Below it the package lines of the rooms that a step walks through, without docstrings, comments and blank lines. Both
are counted for another commit too (`--base REV`).
"""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import detente
from benchmarks._base import BASE, ROOT, NoBase, environment, tree

FILES, FUNCTIONS = 14, 75
ROOMS = ("autograd", "step", "linesearch", "optim", "methods")
# What the lines of the rooms are to fall to.
LINES = 0.75

# ---- what a step enters


@dataclass
class Walk:
    """What one step enters.

    Attributes:
        files: path below the package to the number of functions entered there.
        calls: how often a function was entered.
        frames: distinct qualified names of files, comprehensions and lambdas included.
        frame_calls: how often one of these was entered, or resumed.
    """

    files: dict[str, int]
    calls: int
    frames: int
    frame_calls: int

    @property
    def functions(self) -> int:
        """Distinct functions."""
        return sum(self.files.values())

    def __str__(self) -> str:
        functions = f"{len(self.files):3} files {self.functions:4} functions {self.calls:4} calls"
        return f"{functions} {self.frames:4} frames {self.frame_calls:4} calls"


def entered(run: Callable[[], object], below: Path) -> Walk:
    """Count what of the files below a folder a call enters."""
    calls: Counter[tuple[str, int]] = Counter()
    frames: Counter[tuple[str, str]] = Counter()
    prefix = str(below.resolve()) + "/"

    def see(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(prefix):
            return
        file = code.co_filename.removeprefix(prefix)
        frames[file, code.co_qualname] += 1
        if not code.co_name.startswith("<"):
            calls[file, code.co_firstlineno] += 1

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(before)
    files = Counter(file for file, _ in calls)
    return Walk(dict(sorted(files.items())), calls.total(), len(frames), frames.total())


def walks() -> dict[str, Walk]:
    """The third step of mgda in every way that the imported package offers."""
    ways = ["exact", "features"]
    if hasattr(detente, "branch"):
        ways.append("branches")
    return {way: _third(way) for way in ways}


def _third(way: str) -> Walk:
    torch.manual_seed(0)
    trunk, *heads = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2), torch.nn.Linear(8, 2)
    inputs, method = torch.randn(16, 4), detente.create("mgda")

    records: list[detente.StepRecord] = []

    def step() -> None:
        for parameter in (p for module in (trunk, *heads) for p in module.parameters()):
            parameter.grad = None
        z = trunk(inputs)
        read: Any = dict.fromkeys(("left", "right"), z)
        given: dict[str, Any] = {"features": z} if way == "features" else {}
        if way == "branches":
            read = given["features"] = detente.branch(z, ("left", "right"))  # type: ignore[attr-defined]
        pairs = zip(("left", "right"), heads, (0.0, 1.0), strict=True)
        losses = {name: (head(read[name]) - goal).square().mean() for name, head, goal in pairs}
        records.append(detente.backward(losses, method, **given))

    step()
    step()
    walked = entered(step, Path(detente.__file__).parent)
    assert all(record.accepted for record in records) and trunk.weight.grad is not None
    return walked


# ---- lines

_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(text: str) -> int:
    """Lines of a module that hold code: neither docstrings nor comments nor nothing.

    Example:
        >>> code_lines('def f():\\n    "Tell."\\n\\n    # why\\n    return (1,\\n            2)\\n')
        3
    """
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    told = {
        (node.body[0].lineno, node.body[0].col_offset)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE and token.start not in told:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines)


def rooms(package: Path) -> dict[str, int]:
    """Lines of code in every room; 0 for one that is not there."""
    return {
        room: sum(code_lines(file.read_text(encoding="utf-8")) for file in (package / room).rglob("*.py"))
        for room in ROOMS
    }


# ---- both trees


def _of_base(folder: Path) -> dict[str, Walk]:
    """Count in a process of its own, which imports the other commit's package."""
    command = [sys.executable, "-m", "benchmarks.walk"]
    done = subprocess.run(
        command, env=environment(folder), cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {way: Walk(**told) for way, told in json.loads(done.stdout).items()}


def _promise(what: str, measured: float, limit: float) -> str:
    return f"promised at most {limit:g} {what}: {'kept' if measured <= limit else 'NOT KEPT'}"


def _show(here: dict[str, Walk], before: dict[str, Walk]) -> Iterator[str]:
    for way, walk in here.items():
        yield f"{way:18}{walk}"
        if way in before:
            yield f"{way + ', before':18}{before[way]}"
    yield _promise("files", len(here["exact"].files), FILES)
    yield _promise("functions", here["exact"].functions, FUNCTIONS)
    for way, walk in here.items():
        yield f"functions entered, {way}"
        yield from (f"  {file:32}{count:4}" for file, count in walk.files.items())


def main(base: str = BASE) -> None:
    """Print both counts, for this tree and for the other commit."""
    here, lines = walks(), rooms(Path(detente.__file__).parent)
    before: dict[str, Walk] = {}
    then: dict[str, int] = {}
    try:
        with tree(base) as folder:
            before, then = _of_base(folder), rooms(folder / "src" / "detente")
    except NoBase as error:
        print(f"commit {base} is left out: {error}")
    print(*_show(here, before), sep="\n")
    print(f"lines of code{'':8}now" + (f"{base:>12}" if then else ""))
    for room in ROOMS:
        print(f"  {room:16}{lines[room]:6}" + (f"{then[room]:12}" if then else ""))
    total, former = sum(lines.values()), sum(then.values())
    print(f"  {'together':16}{total:6}" + (f"{former:12}" if then else ""))
    if then:
        print(f"ratio {total / former:.3f}; {_promise('of the former lines', total / former, LINES)}")


if __name__ == "__main__":
    print(json.dumps({way: asdict(walk) for way, walk in walks().items()}))
