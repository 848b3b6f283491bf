"""Which runs a sweep needs next, as a function of what was asked for and of the results there are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from detente.metrics import delta_m
from detente.records import Metric
from detente.statistics.ranks import mean_ranks
from detente.sweeps.asked import Failure, SweepConfig
from detente.sweeps.contenders import Contender, Point, beyond, configured, lattice, points, weighted
from detente.training.config import TrainingConfig

Result = Mapping[str, Any]
Purpose = Literal["tune", "final", "front"]

# Changes no number of a run.
_VOLATILE = ("test", "data_dir", "checkpoint_seconds")


@dataclass(frozen=True)
class Planned:
    """One run.

    Attributes:
        name: of its folder; it depends on the configuration alone, so that equal runs are one.
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

    Args:
        asked: the sweep.
        contenders: who is compared.
        lrs: learning rates.
        experiment: its name, a part of what tells runs apart.
        tasks: of the problem.
        main: each task's main metric.
    """

    def __init__(
        self,
        asked: SweepConfig,
        contenders: Sequence[Contender],
        lrs: Sequence[float],
        experiment: str,
        tasks: Sequence[str],
        main: Mapping[str, Metric],
    ) -> None:
        self.asked, self.contenders, self.experiment = asked, tuple(contenders), experiment
        self.tasks, self.main = tuple(tasks), dict(main)
        # The draws of one contender do not depend on who else takes part.
        self.points = {
            one.name: points(one, lrs, asked.trials, np.random.default_rng(_digest(one.name)))
            for one in contenders
        }
        self._planned: dict[tuple[str, Point, int, Purpose], Planned] = {}

    def next(self, results: Mapping[str, Result | Failure]) -> list[Planned]:
        """The runs that can start now, without those that have a result or failed; none when all is done."""
        wanted: dict[str, Planned] = {}
        for planned in self.known(results):
            found = results.get(planned.name)
            lacks_test = planned.purpose != "tune" and isinstance(found, Mapping) and not found["metrics"]
            if found is None or lacks_test:
                wanted.setdefault(planned.name, planned)
        return list(wanted.values())

    def size(self) -> int:
        """How many runs there are without those beyond the edges of the grids."""
        tuning = sum(len(found) for found in self.points.values())
        # The first seed of what is chosen was trained in tuning, if tuning lasts as long.
        more = self.asked.seeds - (self.asked.tune_epochs is None)
        front = len(lattice(len(self.tasks), self.asked.front)) * self.asked.seeds if self.asked.front else 0
        return tuning + more * len(self.contenders) + front

    def choices(self, results: Mapping[str, Result | Failure]) -> dict[str, Choice]:
        """What was chosen for every contender whose tuning has ended."""
        settled: dict[str, Choice] = {}
        for contender in sorted(self.contenders, key=lambda one: one.kind != "single"):
            _, choice = self._tuning(contender, results, self._baselines(settled, results))
            if choice is not None:
                settled[contender.name] = choice
        return settled

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
        name = folder_name(self.experiment, contender.name, config)
        return self._planned.setdefault(key, Planned(name, contender, purpose, config))

    def known(self, results: Mapping[str, Result | Failure]) -> list[Planned]:
        """Every run that is known to be needed, whether it has ended or not; a run may be there for two purposes."""
        found: list[Planned] = []
        settled: dict[str, Choice] = {}
        for contender in sorted(self.contenders, key=lambda one: one.kind != "single"):
            runs, choice = self._tuning(contender, results, self._baselines(settled, results))
            found += runs
            if choice is None:
                continue
            settled[contender.name] = choice
            found += self.finals(contender, choice)
            if contender.kind == "scalarisation":
                found += [planned for _, runs in self.front(contender, choice) for planned in runs]
        return found

    # ---- tuning

    def _tuning(
        self,
        contender: Contender,
        results: Mapping[str, Result | Failure],
        baselines: Mapping[str, float] | None,
    ) -> tuple[list[Planned], Choice | None]:
        """The tuning runs so far, and the choice if no more are needed."""
        tried = list(self.points[contender.name])
        runs = [self.planned(contender, point, 0, "tune") for point in tried]
        if any(planned.name not in results for planned in runs):
            return runs, None
        for further in range(self.asked.extend + 1):
            best = self._best(contender, tried, runs, results, baselines)
            if best is None:
                return runs, None
            new = beyond(best.point, tried)
            if new is None or further == self.asked.extend:
                return runs, best
            tried.append(new)
            runs.append(self.planned(contender, new, 0, "tune"))
            if runs[-1].name not in results:
                return runs, None
        raise AssertionError("the loop ends with a choice")

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
            if isinstance(found := results[planned.name], Mapping) and self._is_finite(found["validation"])
        ]
        if not done:
            return None
        scores = self.scores(contender, [validation for _, _, validation in done], baselines)
        if scores is None:
            return None
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
    ) -> list[float] | None:
        """By the rule of the sweep, lower being better; None while the single tasks are not settled."""
        tasks = list(validations[0])
        values = [{task: found[task][self.main[task].name] for task in tasks} for found in validations]
        higher = {task: self.main[task].higher_is_better for task in tasks}
        if contender.kind == "single" or self.asked.rule == "mean":
            return [
                -sum(value if higher[task] else -value for task, value in row.items()) / len(row)
                for row in values
            ]
        directions = {task: {"main": flag} for task, flag in higher.items()}
        rows = [{task: {"main": value} for task, value in row.items()} for row in values]
        if self.asked.rule == "rank":
            ranks = mean_ranks({str(place): row for place, row in enumerate(rows)}, directions)
            return [ranks[str(place)] for place in range(len(rows))]
        if baselines is None:
            return None
        reference = {task: {"main": value} for task, value in baselines.items()}
        return [delta_m(row, reference, directions) for row in rows]

    def _is_finite(self, validation: Mapping[str, Mapping[str, float | None]]) -> bool:
        """Whether every task has a main metric: a network that diverged has none."""
        return all(values[self.main[task].name] is not None for task, values in validation.items())

    def _baselines(
        self, settled: Mapping[str, Choice], results: Mapping[str, Result | Failure]
    ) -> dict[str, float] | None:
        """Each task's main metric on validation data when it is trained alone; None while one is missing."""
        found = {}
        for contender in self.contenders:
            if contender.kind == "single":
                choice = settled.get(contender.name)
                if choice is None:
                    return None
                result = results[choice.name]
                assert isinstance(result, Mapping)
                (task,) = result["validation"]
                found[task] = result["validation"][task][self.main[task].name]
        return found if set(found) == set(self.tasks) else None


def folder_name(experiment: str, contender: str, config: TrainingConfig) -> str:
    """What a person can read, and a mark of the whole configuration with the files it names.

    Example:
        >>> folder_name("toy", "mgda (exact)", TrainingConfig(method="mgda", seed=2)).rpartition("-")[0]
        'mgda-exact-lr0.01-seed2'
    """
    kept = {
        field.name: getattr(config, field.name) for field in fields(config) if field.name not in _VOLATILE
    }
    text = json.dumps([experiment, kept, _file_marks(experiment, config.method)], sort_keys=True, default=str)
    readable = "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in contender)
    slug = "-".join(part for part in readable.split("-") if part)[:60]
    mark = hashlib.sha256(text.encode()).hexdigest()[:10]
    return f"{slug}-lr{config.learning_rate:g}-seed{config.seed}-{mark}"


def _file_marks(*names: str) -> list[str]:
    """What is in the files of a user's own problem and method: another content is another run."""
    paths = [Path(name.rpartition(":")[0]) for name in names if name.rpartition(":")[0].endswith(".py")]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
