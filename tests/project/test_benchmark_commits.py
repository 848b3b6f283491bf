"""The benchmarks that count what a step enters, hold two commits beside each other, and take a method's time out."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import detente
from benchmarks import _base, branches, commits, methods, walk
from benchmarks._networks import many_heads

# ---- what a step enters

MODULE = """
def outer(n):
    def inner(k):
        return k

    return sum(inner(k) for k in range(n)) + sorted([2, 1], key=lambda k: -k)[0]


def unused():
    pass


class Thing:
    def inner(self):
        return 0

    @property
    def size(self):
        return outer(2) + self.inner()
"""


@pytest.fixture
def package(tmp_path: Path) -> Callable[[], dict[str, Any]]:
    def load() -> dict[str, Any]:
        names: dict[str, Any] = {}
        for file in ("one.py", "two.py"):
            path = tmp_path / "inside" / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(MODULE, encoding="utf-8")
            exec(compile(MODULE, str(path), "exec"), names.setdefault(file, {}))
        return names

    return load


def test_functions_are_the_first_lines_of_defs(tmp_path: Path, package: Any) -> None:
    names = package()
    seen = walk.entered(lambda: names["one.py"]["outer"](3), tmp_path / "inside")
    assert seen.files == {"one.py": 2}
    assert (seen.functions, seen.calls) == (2, 4)
    assert seen.frames == 4  # with the generator and the lambda
    assert seen.frame_calls == 4 + 4 + 2
    both = walk.entered(lambda: names["two.py"]["Thing"]().size + names["one.py"]["outer"](1), tmp_path)
    assert both.files == {"inside/one.py": 2, "inside/two.py": 4}
    assert both.frames == 4 + 6  # two functions of one name are two
    assert walk.entered(lambda: names["one.py"]["outer"](3), tmp_path / "elsewhere").files == {}
    assert sys.getprofile() is None


def test_the_third_step_is_counted_in_every_way() -> None:
    seen = walk.walks()
    assert set(seen) - {"branches"} == {"exact", "features"}
    for way, told in seen.items():
        assert told.files["methods/mgda.py"] >= 1, way
        assert 0 < len(told.files) < told.functions <= told.calls
        assert not any(file.startswith(("/", "..")) for file in told.files)
    assert walk.walks() == seen  # nothing is imported, sized or cached in the third step


def test_two_steps_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    backward = detente.backward

    def noting(*given: Any, **options: Any) -> Any:
        taken.append("step")
        return backward(*given, **options)

    monkeypatch.setattr(detente, "backward", noting)
    monkeypatch.setattr(walk, "entered", lambda run, below: taken.append(f"count in {below.name}"))
    walk.walks()
    assert taken[:3] == ["step", "step", "count in detente"]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", 0),
        ('"""Tells.\n\nMore.\n"""\n\nimport a\n', 1),
        ("# why\nx = 1  # here\n\n", 1),
        ('x = """a\n\nb"""\n', 3),
        ('def f():\n    """Tell."""\n    return (\n        1,\n\n        2,\n    )\n', 5),
        ('class A:\n    """Tell."""\n\n    x: int\n    """No docstring of Python\'s."""\n', 3),
        ('async def f(): "Tell."\n', 1),
    ],
)
def test_lines_of_code(text: str, lines: int) -> None:
    assert walk.code_lines(text) == lines


def test_rooms_are_counted_with_what_lies_below(tmp_path: Path) -> None:
    (tmp_path / "methods" / "wrappers").mkdir(parents=True)
    (tmp_path / "methods" / "a.py").write_text("x = 1\n", encoding="utf-8")
    (tmp_path / "methods" / "wrappers" / "b.py").write_text("x = 1\ny = 2\n", encoding="utf-8")
    assert walk.rooms(tmp_path) == {"autograd": 0, "step": 0, "linesearch": 0, "optim": 0, "methods": 3}


# ---- two commits


class Fake:
    """Answers as a process does, and notes who was asked."""

    def __init__(self, name: str, seconds: Iterator[float], asked: list[str], told: float = 1.0) -> None:
        self.name, self.seconds, self.asked, self.told = name, seconds, asked, told

    def ask(self, **request: Any) -> dict[str, Any]:
        if "network" in request:
            return {"told": [self.told, 0.5 * self.told]}
        self.asked.append(f"{self.name}{request['steps']}")
        return {"seconds": next(self.seconds)}


def test_turns_change_who_comes_first() -> None:
    asked: list[str] = []
    here = Fake("a", iter([9.0, 1.0, 3.0, 2.0]), asked)
    there = Fake("b", iter([9.0, 0.1, 1.0, 2.0, 1.0]), asked)
    row = commits.Row("GRU", 2)
    commits.take_turns(here, there, ("GRU", 2, None), row, turns=3)  # type: ignore[arg-type]
    assert asked == ["a1", "b1", "b1", "a4", "b4", "b4", "a4", "a4", "b4"]
    assert row.ratios == [1.0, 1.5, 2.0]
    assert row.same


def test_other_gradients_are_told() -> None:
    row = commits.Row("GRU", 2)
    pair = [Fake(name, itertools.repeat(1.0), [], told) for name, told in (("a", 1.001), ("b", 1.0))]
    commits.take_turns(*pair, ("GRU", 2, None), row, turns=1)  # type: ignore[arg-type]
    assert not row.same


def test_a_process_imports_the_tree_it_was_made_for(tmp_path: Path) -> None:
    worker = commits.Worker(_base.ROOT)
    try:
        first = worker.ask(network="LeNet", tasks=2, batch=8)
        assert worker.ask(steps=2)["seconds"] > 0
        assert worker.ask(network="LeNet", tasks=2, batch=8) == first
        assert worker.ask(network="LeNet", tasks=3, batch=8) != first
    finally:
        worker.close()
    copy = tmp_path / "src" / "detente"
    copy.mkdir(parents=True)
    (copy / "__init__.py").write_text("raise RuntimeError('this tree')\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="ended with code 1"):
        commits.Worker(tmp_path)


def test_a_commit_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(_base.NoBase), _base.tree("no-such-commit"):
        pass
    commits.main(base="no-such-commit")
    assert capsys.readouterr().out.startswith("left out: ")


# ---- branches and methods


def test_the_methods_own_time_is_taken_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a clock that moves by one whenever it is read: 1 for a plain step, 3 with a method that takes 1 of them.

    In the three rounds to warm up it moves by 100.
    """
    case = many_heads(3, 8, 16)
    reads = itertools.count()
    monkeypatch.setattr(branches, "CLOCK", lambda: float(next(reads)))
    ways = branches.runs(case).values()
    for run in ways:
        run.step()
    slow = 3 * (next(reads) + 2 * len(ways))
    ticks = itertools.accumulate(itertools.chain(itertools.repeat(100.0, slow), itertools.repeat(1.0)))
    monkeypatch.setattr(branches, "CLOCK", lambda: next(ticks))
    table = branches.measure(case, 1.15, rounds=2)
    by_way = {row.way: row for row in table.rows}
    assert set(by_way) - {"branches"} == {"plain", "stacked", "unbranched"}
    assert by_way["stacked"].ratios == [1.0, 1.0]
    assert by_way["unbranched"].ratios == [2.0, 2.0]
    assert (by_way["stacked"].method, by_way["unbranched"].method) == (0.0, 1.0)
    branches.show(table)
    assert "T = 3, batch 8" in capsys.readouterr().out


def test_every_way_gives_the_heads_the_same_gradients() -> None:
    case, found = many_heads(3, 8, 16), {}
    for way, run in branches.runs(case).items():
        run.step()
        found[way] = [p.grad for head in case.own for p in head]
        assert all(p.grad is not None for p in case.shared)
        case.clear()
    assert ("branches" in found) == hasattr(detente, "branch")
    for way, gradients in found.items():
        for got, want in zip(gradients, found["plain"], strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-7), way


def test_what_is_promised_of_the_branches() -> None:
    case = many_heads(3, 8, 16)
    for ratio, told in ((1.1, "promised <= 1.15: kept"), (1.2, "promised <= 1.15: NOT KEPT")):
        rows = [branches.Row("plain", [1.0], 0.0), branches.Row("branches", [ratio], 0.0)]
        assert branches.verdict(branches.Table(case, 1.0, 0.1, rows, 1.15)) == told
    assert branches.verdict(branches.Table(case, 1.0, 0.1, rows[:1], 1.15)) == ""


def test_what_is_promised_of_a_method() -> None:
    def told(**row: Any) -> list[tuple[str, bool]]:
        return methods.verdicts({"method": "upgrad", "T": 8, "torchjd": None, "share": None, **row})

    assert told(seconds=1.0) == []
    assert told(seconds=1e-4, share=0.009) == [("< 1% of a step", True)]
    assert told(seconds=1e-4, share=0.01) == [("< 1% of a step", False)]
    assert told(seconds=1e-4, torchjd=1.9e-4) == []
    assert told(seconds=3e-4, torchjd=2.9e-4) == [("1 x", False)]
    assert told(seconds=1e-4, torchjd=4.9e-4, T=40) == [("5 x", False)]


def test_only_benchmarks_that_take_a_commit_are_given_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import __main__ as command

    given: list[str] = []
    monkeypatch.setattr(walk, "main", lambda base="x": given.append(base))
    monkeypatch.setattr(methods, "main", lambda: given.append("none"))
    assert command.main(["walk", "methods", "--base", "HEAD"]) == 0
    assert command.main(["walk"]) == 0
    assert given == ["HEAD", "none", "x"]
