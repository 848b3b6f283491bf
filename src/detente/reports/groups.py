"""Sort stored runs into what is compared: studies, and in them groups of runs that differ by the seed only."""

from __future__ import annotations

import json
import statistics as basic
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from detente.records import Metric, Run
from detente.reports.published import PublishedRow
from detente.reports.style import SINGLE, Style, places, style_at
from detente.statistics import Spread, delta_m_spread, spread

# Parts of a run's configuration that say which run it is, or where and how it was carried out, and not
# under which conditions it was trained.
_NOT_SETTINGS = frozenset(
    (
        *("seed", "method", "option", "options", "gradients", "task", "tasks", "label", "name"),
        *("measure", "record_steps", "checkpoint_seconds", "logger", "test"),
        *("out", "output", "folder", "data_dir", "download", "json", "resume", "progress"),
        *("device", "devices", "threads", "workers"),
    )
)


@dataclass(frozen=True)
class Group:
    """Runs of one method with the same options and settings; they differ by the seed.

    ``key`` is a short identifier for the page, ``name`` what the reader sees.
    """

    key: str
    name: str
    runs: tuple[Run, ...]
    style: Style
    single: bool

    @property
    def method(self) -> str:
        """The method's name."""
        return self.runs[0].method

    @property
    def gradients(self) -> str:
        """Where the problem was solved: ``exact``, ``features``, ``layer`` or ``none``."""
        return self.runs[0].gradients

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks these runs learned."""
        return self.runs[0].tasks

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that have a result."""
        return tuple(run for run in self.runs if run.finished)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The different seeds of the finished runs."""
        return tuple(sorted({run.seed for run in self.finished}))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The conditions of training, nested keys joined by dots."""
        return settings_of(self.runs[0])

    @property
    def data(self) -> dict[str, Any]:
        """What was learned from, as far as the experiment describes it."""
        return {
            key: value for key, value in self.settings.items() if key.split(".")[:2] == ["problem", "data"]
        }

    def values(self, task: str) -> list[float]:
        """The main metric of a task on test data, one value for each finished run that has one."""
        return [value for run in self.finished if (value := run.main_value(task)) is not None]

    def median(self, key: str) -> float | None:
        """The median of a number in the results, as ``"seconds_per_epoch"``; None if no run has it."""
        found = [run.result[key] for run in self.finished if run.result and run.result.get(key) is not None]
        return float(basic.median(found)) if found else None


@dataclass(frozen=True)
class Study:
    """All runs of one experiment: its tasks, their main metrics, and the groups that are compared.

    ``outcome`` is what a sweep said of them, None where the runs come from elsewhere; ``published`` are rows of the
    papers' tables.
    """

    experiment: str
    tasks: tuple[str, ...]
    metrics: Mapping[str, Metric]
    groups: tuple[Group, ...]
    outcome: Mapping[str, Any] | None = None
    published: tuple[PublishedRow, ...] = ()

    @property
    def compared(self) -> tuple[Group, ...]:
        """The groups that learned several tasks (all groups when there are only single tasks)."""
        return tuple(group for group in self.groups if not group.single)

    @property
    def singles(self) -> tuple[Group, ...]:
        """The single-task baselines."""
        return tuple(group for group in self.groups if group.single)

    @property
    def runs(self) -> tuple[Run, ...]:
        """All runs, in the order of the groups."""
        return tuple(run for group in self.groups for run in group.runs)

    def baseline(self, task: str, beside: Group | None = None) -> Group | None:
        """The single-task group a task is held against.

        With ``beside``, the one trained under the same settings, else the only one that learned from the same data.
        """
        candidates = [group for group in self.singles if group.tasks == (task,) and group.values(task)]
        if beside is not None:
            candidates = [group for group in candidates if group.data == beside.data]
            same = [group for group in candidates if group.settings == beside.settings]
            if same:
                return same[0]
        return candidates[0] if len(candidates) == 1 else None

    @cached_property
    def alone(self) -> dict[str, Spread]:
        """The main metric of the single-task networks by task: what the first group with a baseline is held against."""
        found = {}
        for task in self.tasks:
            beside = (self.baseline(task, group) for group in self.compared or (None,))
            group = next((one for one in beside if one is not None), None)
            reached = spread(group.values(task)) if group else None
            if reached is not None:
                found[task] = reached
        return found

    def delta_m(self, group: Group) -> tuple[Spread | None, str]:
        """Δm of a group over its main metrics, in percent, or None with the reason in words."""
        if group.single:
            return None, "a single-task run is the baseline itself"
        baselines: dict[str, Sequence[float]] = {}
        for task in group.tasks:
            baseline = self.baseline(task, group)
            if baseline is None:
                others = [other for other in self.singles if other.tasks == (task,) and other.values(task)]
                if not others:
                    return None, "no finished single-task run"
                if all(other.data != group.data for other in others):
                    return None, f"the single-task runs of task {task} learned from other data"
                return None, f"several single-task runs, none with the same settings, for task {task}"
            baselines[task] = baseline.values(task)
        results = [
            {task: value for task, value in values.items() if value is not None}
            for values in ({task: run.main_value(task) for task in group.tasks} for run in group.finished)
        ]
        results = [result for result in results if len(result) == len(group.tasks)]
        if not results:
            return None, "no finished run with a result for every task"
        directions = {task: self.metrics[task].higher_is_better for task in group.tasks}
        try:
            return delta_m_spread(results, baselines, directions), ""
        except ValueError as error:
            return None, str(error)

    def uniform(self, beside: Group | None = None) -> Group | None:
        """The finished group with uniform weights, with the same settings as ``beside`` where there is one."""
        found = [group for group in self.compared if group.method == "uniform" and group.finished]
        if beside is not None:
            found.sort(key=lambda group: group.settings != beside.settings)
        return found[0] if found else None

    def relative_seconds(self, group: Group) -> float | None:
        """Seconds per epoch divided by those of uniform weights."""
        reference = self.uniform(group)
        ours = group.median("seconds_per_epoch")
        theirs = reference.median("seconds_per_epoch") if reference else None
        return ours / theirs if ours is not None and theirs else None

    def differing_settings(self) -> tuple[str, ...]:
        """The settings in which groups differ, single-task baselines included."""
        keys = dict.fromkeys(key for group in self.groups for key in group.settings)
        first = self.groups[0].settings
        return tuple(
            key for key in keys if any(group.settings.get(key) != first.get(key) for group in self.groups)
        )


def settings_of(run: Run) -> dict[str, Any]:
    """The conditions under which a run was trained, flattened to dotted keys."""
    found: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                if prefix or key not in _NOT_SETTINGS:
                    walk(f"{prefix}.{key}" if prefix else key, item)
        else:
            found[prefix] = value

    walk("", run.config["config"])
    # What was learned from is a condition too, where the experiment describes it.
    walk("problem", run.config.get("problem", {}))
    return found


def collect(runs: Iterable[Run]) -> list[Study]:
    """Sort runs into studies by experiment, and each study into groups.

    Two runs belong to one group when label, method, options, gradients, tasks and settings are the same. The label
    counts because a sweep's contenders may agree in all else: fixed weights tuned to be equal are its static method.
    """
    runs = list(runs)
    place = places(run.method for run in runs)
    by_experiment: dict[str, list[Run]] = {}
    for run in runs:
        by_experiment.setdefault(run.experiment, []).append(run)
    studies = []
    for number, (experiment, members) in enumerate(sorted(by_experiment.items())):
        studies.append(_study(f"s{number}", experiment, members, place))
    return studies


def _study(prefix: str, experiment: str, runs: list[Run], place: Mapping[str, int]) -> Study:
    several = [run for run in runs if len(run.tasks) > 1]
    tasks = tuple(dict.fromkeys(task for run in (several or runs) for task in run.tasks))
    metrics = {task: run.main_metric(task) for run in reversed(runs) for task in run.tasks if task in tasks}
    sorted_runs: dict[str, list[Run]] = {}
    for run in runs:
        identity = [run.label, run.method, run.config["options"], run.gradients, run.tasks, settings_of(run)]
        sorted_runs.setdefault(json.dumps(identity, sort_keys=True), []).append(run)
    members = [tuple(sorted(group, key=lambda run: run.seed)) for group in sorted_runs.values()]
    single = [len(group[0].tasks) == 1 and bool(several) for group in members]
    members_single = sorted(
        zip(members, single, strict=True),
        key=lambda pair: (not pair[1], place[pair[0][0].method], pair[0][0].gradients),
    )
    names = _names([group[0] for group, _ in members_single])
    variants: dict[tuple[str, str], int] = {}
    groups = []
    for number, (group, is_single) in enumerate(members_single):
        first = group[0]
        variant = variants.get((first.method, first.gradients), 0)
        if not is_single:
            variants[first.method, first.gradients] = variant + 1
        style = SINGLE if is_single else style_at(place[first.method], first.gradients, variant)
        groups.append(Group(f"{prefix}g{number}", names[number], group, style, is_single))
    return Study(experiment, tasks, metrics, tuple(groups))


def _names(runs: Sequence[Run]) -> list[str]:
    """Each group's label, with the options and settings that tell it from others of the same label."""
    names = []
    for run in runs:
        twins = [other for other in runs if other.label == run.label]
        described = [{**other.config["options"], **settings_of(other)} for other in twins]
        mine = {**run.config["options"], **settings_of(run)}
        differing = [key for key in mine if any(other.get(key) != mine[key] for other in described)]
        # A checksum names only what nothing readable tells apart, and then its beginning is enough.
        readable = [key for key in differing if not key.endswith("sha256")]
        if sum(all(other.get(key) == mine[key] for key in readable) for other in described) == 1:
            differing = readable
        extra = ", ".join(f"{key.rsplit('.', 1)[-1]} {_short(key, mine[key])}" for key in differing)
        names.append(f"{run.label}, {extra}" if extra else run.label)
    return names


def _short(key: str, value: Any) -> str:
    return str(value)[:8] if key.endswith("sha256") else str(value)
