"""Which runs a sweep needs next, as a function of what was asked for and of the results there are."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from detente.metrics import delta_m
from detente.records import Metric
from detente.statistics.ranks import mean_ranks
from detente.sweeps.asked import Failure, Rule, SweepConfig
from detente.sweeps.contenders import Contender, Point, beyond, configured, lattice, points, weighted
from detente.training.config import TrainingConfig

Result = Mapping[str, Any]
Purpose = Literal["tune", "final", "front"]

# Changes no number of a run.
VOLATILE = ("test", "data_dir", "checkpoint_seconds", "logger")


@dataclass(frozen=True)
class Planned:
    """One run.

    Attributes:
        name: of its folder; it depends on contender and configuration alone, so that equal runs are one.
        contender: whose.
        purpose: ``tune`` (validation data only), ``final`` or ``front`` (measured on test data too).
        config: all of it.
    """

    name: str
    contender: Contender
    purpose: Purpose
    config: TrainingConfig


@dataclass(frozen=True)
class Choice:
    """What was chosen for a contender.

    Attributes:
        point: learning rate and options.
        name: folder of the tuning run that won.
        runs: tuning runs that were compared, those beyond the edges included.
        failed: tuning runs that failed or diverged.
        score: by the rule; lower is better.
        edge: True if the best learning rate is still the lowest or highest that was tried.
    """

    point: Point
    name: str
    runs: int
    failed: int
    score: float
    edge: bool


class Plan:
    """Everything a sweep may run.

    Its answers depend on what it was made from and on the results it is given, and on nothing else; what it remembers
    is only there so that it need not compute everything anew after each of many thousand runs.

    Args:
        asked: the sweep.
        contenders: who is compared.
        lrs: learning rates.
        experiment: its name, a part of what tells runs apart.
        tasks: of the problem.
        metrics: all of them; each task's main one is given by name.
        main: task to the name of the metric it is judged by.
        marks: name of a user's own file to a mark of its content: another content is another run.

    Attributes:
        main: each task's main metric.
        points: name of a contender to its first tuning runs.
        problem: what the problem says of its data and network.
        own_trainer: whether something else than détente's loop trains.
        base: the configuration without any contender's own flags, with fixed equal weights; None if it was not told.
        rule: how configurations are chosen. Without single tasks there is no Δm.

    Raises:
        ValueError: fewer tuning runs than learning rates.
    """

    def __init__(
        self,
        asked: SweepConfig,
        contenders: Sequence[Contender],
        lrs: Sequence[float],
        experiment: str,
        tasks: Sequence[str],
        metrics: Sequence[Metric],
        main: Mapping[str, str],
        marks: Mapping[str, str] | None = None,
    ) -> None:
        self.asked, self.contenders, self.experiment = asked, tuple(contenders), experiment
        self.tasks, self.metrics, self.marks = tuple(tasks), tuple(metrics), dict(marks or {})
        self.main = {metric.task: metric for metric in metrics if main[metric.task] == metric.name}
        self.problem: Mapping[str, Any] = {}
        self.own_trainer = False
        self.base: TrainingConfig | None = None
        self.lrs = tuple(sorted(lrs))
        # The single tasks come first: the others' Δm needs them.
        self._ordered = sorted(self.contenders, key=lambda one: one.kind != "single")
        compares = any(one.kind == "single" for one in self.contenders)
        self.rule: Rule = asked.choose or ("delta-m" if compares else "mean")
        # The draws of one contender do not depend on who else takes part.
        self.points = {
            one.name: points(one, self.lrs, asked.trials, np.random.default_rng(_digest(one.name)))
            for one in contenders
        }
        self._planned: dict[tuple[str, Point, int, Purpose], Planned] = {}
        self._first: dict[str, list[Planned]] = {}
        self._bests: dict[tuple[str, int, str], tuple[list[Any], Choice | None]] = {}
        self._after: dict[tuple[str, Point], list[Planned]] = {}

    def next(self, results: Mapping[str, Result | Failure]) -> list[Planned]:
        """The runs that can start now, without those that have a result or failed; none when all is done."""
        return self.lacking(self.known(results), results)

    def lacking(self, known: Sequence[Planned], results: Mapping[str, Result | Failure]) -> list[Planned]:
        """Those of some runs that have not ended, and those that must still be measured on test data."""
        wanted: dict[str, Planned] = {}
        for planned in known:
            found = results.get(planned.name)
            if found is None or (planned.purpose != "tune" and _lacks_test(found)):
                wanted.setdefault(planned.name, planned)
        return list(wanted.values())

    def size(self) -> int:
        """How many runs there are without those beyond the edges of the grids."""
        tuning = sum(len(found) for found in self.points.values())
        # The first seed of what is chosen was trained in tuning, if tuning lasts as long.
        shared = self.asked.tune_epochs is None or all(
            self.asked.tune_epochs == one.config.epochs for one in self.contenders
        )
        more = self.asked.seeds - shared
        front = len(lattice(len(self.tasks), self.asked.front)) * self.asked.seeds if self.asked.front else 0
        return tuning + more * len(self.contenders) + front

    def choices(self, results: Mapping[str, Result | Failure]) -> dict[str, Choice]:
        """What was chosen for every contender whose tuning has ended."""
        settled: dict[str, Choice] = {}
        for contender in self._ordered:
            _, choice = self._tuning(contender, results, self._baselines(contender, settled, results))
            if choice is not None:
                settled[contender.name] = choice
        return settled

    def hindered(self, results: Mapping[str, Result | Failure]) -> dict[str, str]:
        """For every contender of which nothing can be chosen although its tuning has ended: why."""
        choices = self.choices(results)
        reasons: dict[str, str] = {}
        for contender in self._ordered:
            runs = self._begun(contender)
            if contender.name in choices or any(planned.name not in results for planned in runs):
                continue
            if not any(self._is_finite(results[planned.name]) for planned in runs):
                reasons[contender.name] = "all its tuning runs failed or diverged"
            else:
                missing = [one.name for one in self._ordered if one.kind == "single" and one.name in reasons]
                reasons[contender.name] = (
                    f"Δm needs {', '.join(missing)}"
                    if missing
                    else "a single task has a main metric that is not above zero, to which Δm could be relative; use "
                    "--choose rank or mean"
                )
        return reasons

    def finals(self, contender: Contender, choice: Choice) -> list[Planned]:
        """The runs of a chosen configuration, one for each seed."""
        return [self.planned(contender, choice.point, seed, "final") for seed in range(self.asked.seeds)]

    def front(self, contender: Contender, choice: Choice) -> list[tuple[tuple[float, ...], list[Planned]]]:
        """Every weighting of the front with its runs."""
        return [
            (
                weights,
                [
                    self.planned(contender, weighted(choice.point, weights, self.tasks), seed, "front")
                    for seed in range(self.asked.seeds)
                ],
            )
            for weights in lattice(len(self.tasks), self.asked.front)
        ]

    def planned(self, contender: Contender, point: Point, seed: int, purpose: Purpose) -> Planned:
        """A run of a contender."""
        key = (contender.name, point, seed, purpose)
        if key in self._planned:
            return self._planned[key]
        others: dict[str, Any] = {"seed": seed, "test": purpose != "tune"}
        if purpose == "tune" and self.asked.tune_epochs is not None:
            others["epochs"] = self.asked.tune_epochs
        config = configured(contender, point, **others)
        name = folder_name(self.experiment, contender.name, config, self.marks)
        return self._planned.setdefault(key, Planned(name, contender, purpose, config))

    def known(self, results: Mapping[str, Result | Failure]) -> list[Planned]:
        """Every run that is known to be needed, whether it has ended or not; a run may be there for two purposes."""
        found: list[Planned] = []
        settled: dict[str, Choice] = {}
        for contender in self._ordered:
            baselines = self._baselines(contender, settled, results)
            runs, choice = self._tuning(contender, results, baselines)
            found += runs
            if choice is not None:
                settled[contender.name] = choice
                found += self._consequences(contender, choice)
        return found

    def _consequences(self, contender: Contender, choice: Choice) -> list[Planned]:
        """The runs that follow from a choice."""
        key = (contender.name, choice.point)
        if key not in self._after:
            found = self.finals(contender, choice)
            if contender.kind == "scalarisation":
                found += [planned for _, runs in self.front(contender, choice) for planned in runs]
            self._after[key] = found
        return self._after[key]

    # ---- tuning

    def _begun(self, contender: Contender) -> list[Planned]:
        """The first tuning runs."""
        if contender.name not in self._first:
            self._first[contender.name] = [
                self.planned(contender, point, 0, "tune") for point in self.points[contender.name]
            ]
        return self._first[contender.name]

    def _tuning(
        self,
        contender: Contender,
        results: Mapping[str, Result | Failure],
        baselines: Mapping[str, float] | None,
    ) -> tuple[list[Planned], Choice | None]:
        """The tuning runs so far, and the choice if no more are needed."""
        first = self._begun(contender)
        waits = self.rule == "delta-m" and contender.kind != "single" and baselines is None
        if waits or any(planned.name not in results for planned in first):
            return first, None
        tried, runs = list(self.points[contender.name]), list(first)
        for further in range(self.asked.extend + 1):
            best = self._remembered(contender, tried, runs, results, baselines)
            if best is None:
                return runs, None
            new = beyond(best.point, tried, self.lrs)
            if new is None or further == self.asked.extend:
                return runs, best
            tried.append(new)
            runs.append(self.planned(contender, new, 0, "tune"))
            if runs[-1].name not in results:
                return runs, None
        raise AssertionError("the loop ends with a choice")

    def _remembered(
        self,
        contender: Contender,
        tried: Sequence[Point],
        runs: Sequence[Planned],
        results: Mapping[str, Result | Failure],
        baselines: Mapping[str, float] | None,
    ) -> Choice | None:
        """What :meth:`_best` says, computed anew only where a result is another one than the last time."""
        key = (contender.name, len(runs), repr(baselines))
        given = [results[run.name] for run in runs]
        if key in self._bests:
            before, best = self._bests[key]
            if all(one is other for one, other in zip(before, given, strict=True)):
                return best
        best = self._best(contender, tried, runs, results, baselines)
        self._bests[key] = (given, best)
        return best

    def _best(
        self,
        contender: Contender,
        tried: Sequence[Point],
        runs: Sequence[Planned],
        results: Mapping[str, Result | Failure],
        baselines: Mapping[str, float] | None,
    ) -> Choice | None:
        done = [
            (point, planned.name, found["validation"])
            for point, planned in zip(tried, runs, strict=True)
            if isinstance(found := results[planned.name], Mapping) and self._is_finite(found)
        ]
        if not done:
            return None
        scores = self.scores(contender, [validation for _, _, validation in done], baselines)
        place = min(range(len(done)), key=lambda place: (scores[place], place))
        point, name, _ = done[place]
        rates = {tried_point.learning_rate for tried_point in tried}
        edge = len(rates) > 1 and point.learning_rate in (min(rates), max(rates))
        return Choice(point, name, len(runs), len(runs) - len(done), scores[place], edge)

    def scores(
        self,
        contender: Contender,
        validations: Sequence[Mapping[str, Mapping[str, float]]],
        baselines: Mapping[str, float] | None,
    ) -> list[float]:
        """By the rule of the sweep, lower being better; Δm is relative to the baselines."""
        tasks = list(validations[0])
        values = [{task: found[task][self.main[task].name] for task in tasks} for found in validations]
        higher = {task: self.main[task].higher_is_better for task in tasks}
        if contender.kind == "single" or self.rule == "mean":
            return [
                -sum(value if higher[task] else -value for task, value in row.items()) / len(row)
                for row in values
            ]
        directions = {task: {"main": flag} for task, flag in higher.items()}
        rows = [{task: {"main": value} for task, value in row.items()} for row in values]
        if self.rule == "rank":
            ranks = mean_ranks({str(place): row for place, row in enumerate(rows)}, directions)
            return [ranks[str(place)] for place in range(len(rows))]
        assert baselines is not None, "nothing is chosen before they are there"
        reference = {task: {"main": value} for task, value in baselines.items()}
        return [delta_m(row, reference, directions) for row in rows]

    def _is_finite(self, result: Result | Failure) -> bool:
        """Whether every task has a main metric: a network that diverged has none, nor has a run that failed."""
        return isinstance(result, Mapping) and all(
            _is_number(values.get(self.main[task].name)) for task, values in result["validation"].items()
        )

    def _baselines(
        self, contender: Contender, settled: Mapping[str, Choice], results: Mapping[str, Result | Failure]
    ) -> dict[str, float] | None:
        """Each task's main metric on validation data when trained alone; None unless all are there and above zero."""
        if contender.kind == "single" or self.rule != "delta-m":
            return None
        found = {}
        for one in self._ordered:
            if one.kind != "single":
                break
            if one.name not in settled:
                return None
            result = results[settled[one.name].name]
            assert isinstance(result, Mapping)
            (task,) = result["validation"]
            found[task] = result["validation"][task][self.main[task].name]
        complete = set(found) == set(self.tasks) and all(value > 0 for value in found.values())
        return found if complete else None


def _lacks_test(result: Result | Failure) -> bool:
    return isinstance(result, Mapping) and not result["metrics"] and not result.get("untested")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def folder_name(
    experiment: str, contender: str, config: TrainingConfig, marks: Mapping[str, str] | None = None
) -> str:
    """What a person can read, and a mark of everything that is configured unlike the defaults, with the files it names.

    An option that is added later, and left at its default, changes no name: a sweep goes on after an update.

    Example:
        >>> folder_name("toy", "mgda (exact)", TrainingConfig(method="mgda", seed=2)).rpartition("-")[0]
        'mgda-exact-lr0.01-seed2'
    """
    usual = type(config)()
    kept = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in VOLATILE and getattr(config, field.name) != getattr(usual, field.name)
    }
    files = [mark for name in (experiment, config.method) if (mark := (marks or {}).get(file_of(name)))]
    text = json.dumps([experiment, kept, files], sort_keys=True, default=str)
    readable = "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in contender)
    slug = "-".join(part for part in readable.split("-") if part)[:60]
    mark = hashlib.sha256(text.encode()).hexdigest()[:10]
    return f"{slug}-lr{config.learning_rate:g}-seed{config.seed}-{mark}"


def file_of(name: str) -> str:
    """The file that holds a user's own problem or method; empty for what comes with détente.

    Example:
        >>> file_of("examples/mine.py:Mine"), file_of("mgda")
        ('examples/mine.py', '')
    """
    path = name.rpartition(":")[0]
    return path if path.endswith(".py") else ""


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
