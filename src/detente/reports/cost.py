"""What the methods cost against what they reach: seconds per step beside Δm, one point for each contender."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from detente.records import Run
from detente.reports.figures import (
    Figure,
    Section,
    axis,
    log_axis,
    point_traces,
    safe,
    scale_of,
    short,
    straight_line,
)
from detente.reports.groups import Group, Study
from detente.reports.labels import labels
from detente.reports.sweeps import cost_of
from detente.statistics import Spread, spread

TITLE = "Cost against result"
_HEIGHT = 440
_MARGINS = 52  # above and below the plot
# Costs that span more than this factor are read better on a logarithmic axis.
_WIDE = 4.0


@dataclass(frozen=True)
class Point:
    """One contender: its runs' costs and results, and the spread of both.

    ``pairs`` holds one pair for each run; with costs from elsewhere, the cost is the same in all of them.
    """

    group: Group
    pairs: tuple[tuple[float, float], ...]
    memory: int | None = None

    @property
    def cost(self) -> Spread:
        """Mean and deviation of the costs."""
        return _spread(x for x, _ in self.pairs)

    @property
    def result(self) -> Spread:
        """Mean and deviation of the results."""
        return _spread(y for _, y in self.pairs)


def cost_section(study: Study) -> Section:
    """One point for each contender, with those named that no other one beats in both cost and result.

    Costs are those of the sweep's outcome where it has any (``cost``: contender to ``seconds_per_step``, ``relative``
    and ``peak_memory_bytes``), else those the runs measured. Without single-task runs the mean main metric stands in
    for Δm.
    """
    result = _result_of(study)
    if result is None:
        return Section(
            TITLE,
            "Not drawn: without single-task runs there is no Δm, and the tasks have no metric in common whose mean "
            "could take its place.",
        )
    results, y_title, higher, what = result
    if not results:
        return Section(TITLE, "No run has finished, so there is no result to hold a cost against.")
    costs, x_title, source = _costs(study)
    points = [
        Point(group, tuple(pairs), costs.memory.get(group.key))
        for group in study.compared
        if group.key in results
        and (
            pairs := [
                (costs.of(group, run), value) for run, value in results[group.key] if costs.known(group, run)
            ]
        )
    ]
    if not points:
        return Section(TITLE, "The finished runs hold no seconds per step.")
    best = efficient([(point.cost.mean, point.result.mean) for point in points], higher)
    text = f"Left is cheaper, top is better. {what} {source}"
    if any(len(point.pairs) > 1 for point in points):
        text += " Points are means over seeds with their standard deviation; small points are single runs."
    if len(points) > 1:
        listed = ", ".join(points[place].group.name for place in best)
        text += f" Named and joined: those that no other one beats in both ({listed})."
    lacking = [
        group.name for group in study.compared if group.finished and group not in [p.group for p in points]
    ]
    if lacking:
        text += f" Not shown, for want of a cost or a result: {', '.join(lacking)}."
    return Section(TITLE, text, ((_figure(points, best, x_title, y_title, higher, costs.relative),),))


def efficient(points: Sequence[tuple[float, float]], higher: bool) -> list[int]:
    """The places of the points that no other one beats: cheaper and better, or one of them and equal in the other.

    Args:
        points: cost and result of each.
        higher: whether a higher result is better.

    Example:
        >>> efficient([(1.0, 5.0), (2.0, 6.0), (3.0, 5.5)], higher=True)
        [0, 1]
    """
    sign = 1.0 if higher else -1.0
    kept = [
        place
        for place, (cost, result) in enumerate(points)
        if not any(
            other[0] <= cost and sign * other[1] >= sign * result and other != (cost, result)
            for other in points
        )
    ]
    return sorted(kept, key=lambda place: points[place][0])


# ---- what the axes show


@dataclass(frozen=True)
class _Costs:
    """Seconds per step: of every contender (from a bench), or of every run divided by ``reference``."""

    relative: bool
    fixed: Mapping[str, float]
    memory: Mapping[str, int]
    references: Mapping[str, float]

    def known(self, group: Group, run: Run) -> bool:
        if self.fixed:
            return group.key in self.fixed
        return _seconds(run) is not None and (not self.relative or group.key in self.references)

    def of(self, group: Group, run: Run) -> float:
        if self.fixed:
            return self.fixed[group.key]
        seconds = _seconds(run)
        assert seconds is not None
        return seconds / self.references[group.key] if self.relative else seconds


def _costs(study: Study) -> tuple[_Costs, str, str]:
    """The costs, the title of their axis, and where they come from."""
    benched = _benched(study)
    if benched:
        found = {key: float(entry["relative"]) for key, entry in benched.items()}
        memory = {
            key: int(entry["peak_memory_bytes"])
            for key, entry in benched.items()
            if entry.get("peak_memory_bytes") is not None
        }
        return (
            _Costs(True, found, memory, {}),
            "seconds per step, uniform weights = 1",
            "Cost: seconds per step as a multiple of those with uniform weights, measured apart from the training, one "
            "contender after the other.",
        )
    references = {}
    for group in study.compared:
        uniform = study.uniform(group)
        reference = spread(s for run in uniform.finished if (s := _seconds(run))) if uniform else None
        if reference is not None:
            references[group.key] = reference.mean
    shared = "measured in the runs, which may have shared the machine"
    if references:
        return (
            _Costs(True, {}, {}, references),
            "seconds per step, uniform weights = 1",
            f"Cost: seconds per step as a multiple of those with uniform weights, {shared}.",
        )
    return (
        _Costs(False, {}, {}, {}),
        "seconds per step",
        f"Cost: seconds per step, {shared}; no finished run with uniform weights has a time to compare with.",
    )


def _benched(study: Study) -> dict[str, Mapping[str, Any]]:
    """What the outcome's ``cost`` says, by the groups' keys."""
    found = {}
    for group in study.compared:
        entry = cost_of(study, group.name) or cost_of(study, group.runs[0].label)
        if entry is not None and entry.get("relative") is not None:
            found[group.key] = entry
    return found


def _seconds(run: Run) -> float | None:
    """Seconds per step; for records without them those of an epoch divided by its steps."""
    if run.result is None:
        return None
    if run.result.get("seconds_per_step") is not None:
        return float(run.result["seconds_per_step"])
    if run.result.get("seconds_per_epoch") is not None and run.epochs:
        last = run.epochs[-1]
        return (
            float(run.result["seconds_per_epoch"]) * int(last["epoch"]) / int(last["step"])
            if last["step"]
            else None
        )
    return None


_Results = dict[str, list[tuple[Run, float]]]


def _result_of(study: Study) -> tuple[_Results, str, bool, str] | None:
    """Each run's Δm, or its mean main metric; title of the axis, whether higher is better, and a sentence."""
    found: _Results = {}
    for group in study.compared:
        for run in group.finished:
            delta, _ = study.delta_m(replace(group, runs=(run,)))
            if delta is not None:
                found.setdefault(group.key, []).append((run, delta.mean))
    if found:
        return (
            found,
            "Δm (%)",
            False,
            "Δm: mean change against one network per task, lower is better, so the axis points down.",
        )
    metric = study.metrics[study.tasks[0]]
    kinds = {(m.name, m.percent, m.higher_is_better) for m in study.metrics.values()}
    if len(kinds) > 1:
        return None
    for group in study.compared:
        for run in group.finished:
            values = [value for task in group.tasks if (value := run.main_value(task)) is not None]
            if values and len(values) == len(group.tasks):
                found.setdefault(group.key, []).append(
                    (run, scale_of(metric) * math.fsum(values) / len(values))
                )
    title = f"mean {metric.name}{' (%)' if metric.percent else ''}"
    what = f"Result: {title.removesuffix(' (%)')} over the tasks, for want of single-task runs to compute Δm from."
    return found, title, metric.higher_is_better, what


def _spread(values: Any) -> Spread:
    found = spread(values)
    assert found is not None
    return found


# ---- the drawing


def _reach(found: Spread, values: Sequence[float]) -> list[float]:
    """The runs and the ends of the bar around their mean; an end below zero, where a run is not, is left out."""
    bar = [found.mean - found.deviation, found.mean + found.deviation] if found.deviation else []
    return [*values, *(end for end in bar if end > 0 or min(values) <= 0)]


def _figure(
    points: Sequence[Point], best: Sequence[int], x_title: str, y_title: str, higher: bool, relative: bool
) -> Figure:
    xs = [x for point in points for x in _reach(point.cost, [x for x, _ in point.pairs])]
    ys = [y for point in points for y in _reach(point.result, [y for _, y in point.pairs])]
    wide = min(xs) > 0 and max(xs) > _WIDE * min(xs)
    low, high = min(ys), max(ys)
    room = 0.12 * (high - low) or 0.02 * abs(high) or 1.0
    # Top is always better.
    y_range = [low - room, high + room] if higher else [high + room, low - room]
    x_low, x_high = (math.log10(min(xs)), math.log10(max(xs))) if wide else (min(xs), max(xs))
    # Room for the names, which stand left of their points.
    span = x_high - x_low or 0.1 * abs(x_high) or 1.0
    x_range = [x_low - 0.3 * span, x_high + 0.08 * span]
    data: list[dict[str, Any]] = []
    if len(best) > 1:
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [short(points[place].cost.mean) for place in best],
                "y": [short(points[place].result.mean) for place in best],
                "line": {"color": "@muted", "width": 1.5, "dash": "dot", "shape": "hv"},
                "hoverinfo": "skip",
                "showlegend": False,
            }
        )
    for point in points:
        data += _point_traces(point, relative, y_title)
    if len(points) > 1:
        named = [(p.cost.mean, p.result.mean, p.group.name, p.group.key) for p in (points[n] for n in best)]
        data += labels(named, (x_range, y_range), "@ink", _HEIGHT - _MARGINS, log=wide)
    x_axis = axis(x_title, **(log_axis(min(xs), max(xs)) if wide else {}), range=[short(x) for x in x_range])
    layout: dict[str, Any] = {"xaxis": x_axis, "yaxis": axis(y_title, range=[short(y) for y in y_range])}
    if relative:
        layout["shapes"] = [straight_line("x", 1.0, "@muted", "dash", 1.2)]
    return Figure("", data, layout, height=_HEIGHT)


def _point_traces(point: Point, relative: bool, y_title: str) -> list[dict[str, Any]]:
    unit = "× uniform" if relative else "s per step"
    memory = "" if point.memory is None else f"<br>peak memory {point.memory / 2**20:.0f} MiB"
    hover = f"%{{x:.3g}} {unit}<br>{safe(y_title)} %{{y:.2f}}{memory}"
    return point_traces(point.group, point.pairs, (point.cost, point.result), hover)


__all__ = ["Point", "cost_section", "efficient"]
