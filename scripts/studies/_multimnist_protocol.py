"""The full MultiMNIST protocol: its entries, what was published of them, and what the finished runs say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from detente.experiments import find
from detente.metrics import delta_m
from detente.records import Run, find_runs
from detente.statistics import Printed, Range, Spread, delta_m_range, spread

TASKS = ("left", "right")
_HIGHER = {"accuracy": True}


@dataclass(frozen=True)
class Entry:
    """One row: its folder, its title, how `detente run` makes it, and the name of its published row, if it has one."""

    name: str
    title: str
    flags: tuple[str, ...]
    published: str | None = None
    tasks: tuple[str, ...] = TASKS


# What tells most comes first: whoever stops early has the paper's main claim.
ENTRIES = (
    Entry("uniform", "uniform", ("--method", "uniform"), "uniform"),
    Entry("mgda-features", "MGDA (features)", ("--method", "mgda", "--gradients", "features"), "MGDA-UB"),
    Entry("mgda-exact", "MGDA (exact)", ("--method", "mgda")),
    Entry("aligned-mtl", "Aligned-MTL (exact)", ("--method", "aligned-mtl")),
    Entry("single-left", "single task: left", ("--tasks", "left"), "single task", ("left",)),
    Entry("single-right", "single task: right", ("--tasks", "right"), "single task", ("right",)),
    Entry("uncertainty", "uncertainty", ("--method", "uncertainty"), "uncertainty"),
    Entry("gradnorm", "GradNorm", ("--method", "gradnorm"), "GradNorm"),
)
# Rows between which the paper sees a difference, or none; "single" are the networks for one task each.
CLAIMS = (
    ("mgda-features", "uniform"),
    ("mgda-features", "single"),
    ("uncertainty", "uniform"),
    ("gradnorm", "uniform"),
)
EPOCHS = 100


def folder_of(entry: Entry, lr: str, seed: int) -> str:
    """The name of a run's folder.

    >>> folder_of(ENTRIES[0], "0.01", 0)
    'uniform-lr0.01-seed0'
    """
    return f"{entry.name}-lr{float(lr):g}-seed{seed}"


@dataclass(frozen=True)
class Row:
    """What the runs of an entry say, at the learning rate that was best on validation data unless another is named."""

    entry: Entry
    rate: float
    by_rate: Mapping[float, tuple[Run, ...]]

    @property
    def runs(self) -> tuple[Run, ...]:
        """At the best learning rate."""
        return self.by_rate[self.rate]

    def accuracy(self, task: str, rate: float | None = None) -> Spread:
        """On test data, in percent."""
        runs = self.runs if rate is None else self.by_rate[rate]
        found = spread(100 * _accuracy(run, "metrics", task) for run in runs)
        assert found is not None
        return found

    def validation(self, rate: float) -> float:
        """By what the rate is chosen: the mean accuracy of the first seed on validation data, in percent."""
        return 100 * _validation(self.by_rate[rate], self.entry.tasks)

    @property
    def seconds(self) -> float:
        """Of a run, the median over the seeds."""
        return float(median(_result(run)["seconds"] for run in self.runs))


def rows_of(folder: Path) -> tuple[dict[str, Row], list[str]]:
    """Name of an entry to what its finished runs say, in the order of the entries; and titles of those without any.

    Raises:
        SystemExit: two runs were trained under different conditions.
    """
    runs = [run for run in find_runs(folder) if run.finished]
    _same_conditions(runs)
    found: dict[str, Row] = {}
    for entry in ENTRIES:
        mine: dict[float, list[Run]] = {}
        for run in runs:
            if run.path.name.rpartition("-lr")[0] == entry.name:
                mine.setdefault(run.config["config"]["learning_rate"], []).append(run)
        if mine:
            rate = max(mine, key=lambda rate: _validation(mine[rate], entry.tasks))
            by_seed = {tried: tuple(sorted(mine[tried], key=lambda run: run.seed)) for tried in sorted(mine)}
            found[entry.name] = Row(entry, rate, by_seed)
    return found, [entry.title for entry in ENTRIES if entry.name not in found]


def conditions(rows: Mapping[str, Row]) -> dict[str, Any]:
    """What was equal for all rows: the data's counts and source, epochs, batch."""
    run = next(iter(rows.values())).runs[0]
    config, data = run.config["config"], run.config["problem"]["data"]
    return {
        **{key: config[key] for key in ("epochs", "batch_size", "halve_every", "momentum", "dropout")},
        **{key: data[key] for key in ("counts", "source", "size")},
        "steps": _result(run)["steps"],
        "shortened": config["max_steps"] is not None,
        "versions": run.config["versions"],
    }


def published_of(entry: Entry) -> dict[str, Printed]:
    """Task to the published accuracy in percent; empty where there is none."""
    for row in find("multimnist").published:
        if row.method == entry.published:
            return {task: Printed.read(f"{100 * row.metrics[task]['accuracy']:.2f}") for task in entry.tasks}
    return {}


def published_source() -> str:
    """Paper and table."""
    return find("multimnist").published[0].source


def above(row: Row, printed: Printed, task: str) -> Range:
    """By how many points our mean lies above a published number, whatever its rounding was."""
    ours = row.accuracy(task).mean
    return Range(ours - printed.range.high, ours - printed.range.low)


def delta_ms(rows: Mapping[str, Row]) -> tuple[dict[str, float], dict[str, Range]]:
    """Name of an entry to its Δm here, where both single tasks are there; and to all values the published cells allow."""
    ours: dict[str, float] = {}
    alone = {task: rows.get(f"single-{task}") for task in TASKS}
    base = {task: {"accuracy": row.accuracy(task).mean} for task, row in alone.items() if row is not None}
    published: dict[str, Range] = {}
    single = {entry.name: entry for entry in ENTRIES if len(entry.tasks) == 1}
    printed_base = {task: {"accuracy": published_of(single[f"single-{task}"])[task]} for task in TASKS}
    for name, row in rows.items():
        if len(row.entry.tasks) == 1:
            continue
        if len(base) == len(TASKS):
            cells = {task: {"accuracy": row.accuracy(task).mean} for task in TASKS}
            ours[name] = delta_m(cells, base, _HIGHER)
        printed = {task: {"accuracy": cell} for task, cell in published_of(row.entry).items()}
        if printed:
            published[name] = delta_m_range(printed, printed_base, _HIGHER)
    return ours, published


def chance(one: float, other: float, images: int) -> float:
    """How far two accuracies in percent may lie apart, in 95 of 100 cases, by the choice of the test images alone.

    An upper bound, since both networks saw the same images.

    >>> round(chance(96.5, 97.2, 10_000), 2)
    0.48
    """
    variances = [value / 100 * (1 - value / 100) / images for value in (one, other)]
    return 196.0 * math.sqrt(sum(variances))


def claims(rows: Mapping[str, Row]) -> list[str]:
    """What the paper's differences are here, in sentences; of the rows that are there."""
    told = []
    for name, other in CLAIMS:
        one = rows.get(name)
        opponents = {task: rows.get(f"single-{task}" if other == "single" else other) for task in TASKS}
        if one is None or None in opponents.values():
            continue
        images = conditions(rows)["counts"]["test"]
        theirs, ours, by_chance = {}, {}, {}
        for task, opponent in opponents.items():
            assert opponent is not None
            printed = published_of(one.entry)[task], published_of(opponent.entry)[task]
            theirs[task] = printed[0].value - printed[1].value
            here = one.accuracy(task).mean, opponent.accuracy(task).mean
            ours[task] = here[0] - here[1]
            by_chance[task] = chance(*here, images)
        title = "the single tasks" if other == "single" else rows[other].entry.title
        told.append(
            f"{one.entry.title} against {title}, points of accuracy: {_points(theirs)} in the paper, {_points(ours)} "
            f"here. {_judged(theirs, ours, by_chance)}"
        )
    return told


def _judged(theirs: Mapping[str, float], ours: Mapping[str, float], by_chance: Mapping[str, float]) -> str:
    shown = [task for task in TASKS if abs(ours[task]) > by_chance[task]]
    band = f"about {max(by_chance.values()):.1f} points can be chance of the test images alone"
    if not shown:
        return f"No difference is shown here in either task: {band}."
    if all(abs(value) < 0.05 for value in theirs.values()):
        return f"The paper sees none; here there is one in {' and '.join(shown)} ({band})."
    same = [task for task in shown if (ours[task] > 0) == (theirs[task] > 0)]
    if len(same) == len(TASKS):
        return f"The direction is the paper's in both tasks, and more than chance ({band})."
    told = []
    for task in TASKS:
        if task not in shown:
            told.append(f"{task} within chance")
        else:
            told.append(f"{task} {'as in the paper' if task in same else 'opposite to the paper'}")
    return f"Here {', '.join(told)} ({band})."


def _points(by_task: Mapping[str, float]) -> str:
    return " and ".join(f"{value:+.2f} {task}" for task, value in by_task.items())


def _result(run: Run) -> Mapping[str, Any]:
    assert run.result is not None
    return run.result


def _accuracy(run: Run, part: str, task: str) -> float:
    return float(_result(run)[part][task]["accuracy"])


def _validation(runs: Sequence[Run], tasks: Sequence[str]) -> float:
    """Of the first seed, so that a rate tried with fewer seeds is judged alike."""
    run = min(runs, key=lambda run: run.seed)
    return mean(_accuracy(run, "validation", task) for task in tasks)


def _same_conditions(runs: Sequence[Run]) -> None:
    """One table, one set of conditions."""
    keys = ("epochs", "max_steps", "batch_size", "halve_every", "momentum", "dropout", "size")
    for run in runs[1:]:
        for key in keys:
            mine, first = run.config["config"][key], runs[0].config["config"][key]
            if mine != first:
                raise SystemExit(
                    f"{run.path} has {key} {mine}, {runs[0].path} has {first}: one table holds one protocol."
                )
        if run.config["problem"]["data"] != runs[0].config["problem"]["data"]:
            raise SystemExit(f"{run.path} and {runs[0].path} were trained on different digits.")
