"""The plane of two tasks (Sener & Koltun 2018, Figure 3); more tasks have a radar and dots instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detente.records import Metric
from detente.reports.figures import Figure, Section, axis, point_traces, safe, scale_of, short, straight_line
from detente.reports.groups import Group, Study
from detente.reports.labels import labels
from detente.reports.published import heading, number, rows_of
from detente.reports.radar import tasks_section
from detente.reports.style import PUBLISHED
from detente.reports.sweeps import front_points
from detente.statistics import Spread, spread


def plane_section(study: Study) -> Section:
    """All methods against each other, by their results on test data.

    Two tasks span a plane with a point per run; for another number of tasks there is a row of dots per task, and from
    three on a radar. Without a finished run the section says so in words.
    """
    title = "The two tasks against each other" if len(study.tasks) == 2 else "Every task"
    done = [group for group in study.groups if group.finished]
    if not done:
        return Section(title, "No run has finished, so there is no result on test data to show.")
    return _plane(study, title) if len(study.tasks) == 2 else tasks_section(study, title)


def axis_title(metric: Metric) -> str:
    """Task, metric and unit, as an axis shows them.

    >>> axis_title(Metric("left", "accuracy", higher_is_better=True, percent=True))
    'left: accuracy (%)'
    """
    return f"{metric.task}: {metric.name}{' (%)' if metric.percent else ''}"


def _plane(study: Study, title: str) -> Section:
    first, second = (study.metrics[task] for task in study.tasks)
    data: list[dict[str, Any]] = []
    front = front_points(study)
    if front:
        data.append(_front_trace(front, first, second))
    for group in study.compared:
        data += _plane_traces(group, first, second)
    layout: dict[str, Any] = {"xaxis": axis(axis_title(first)), "yaxis": axis(axis_title(second))}
    alone = study.alone
    layout["shapes"] = [
        straight_line(
            direction, short(scale_of(metric) * alone[metric.task].mean) or 0.0, "@single", "dash", 1.5
        )
        for direction, metric in (("x", first), ("y", second))
        if metric.task in alone
    ]
    layout["annotations"] = [
        _line_label(direction, metric, alone[metric.task])
        for direction, metric in (("x", first), ("y", second))
        if metric.task in alone
    ]
    for name, metric in (("xaxis", first), ("yaxis", second)):
        limits = _limits(study, metric, alone.get(metric.task))
        if limits:
            kept = [
                scale_of(metric) * point["test"][metric.task] for point in front if not point["dominated"]
            ]
            room = 0.05 * (limits[1] - limits[0])
            limits = (
                min([limits[0], *(value - room for value in kept)]),
                max([limits[1], *(value + room for value in kept)]),
            )
            # Top right is always better.
            layout[name]["range"] = [short(x) for x in (limits if metric.higher_is_better else limits[::-1])]
    text = "Each point is a method's result on test data; top right is better. "
    missing = [task for task in study.tasks if task not in alone]
    if not missing:
        text += "Dashed lines: a network trained for that task alone."
    elif len(missing) == 2:
        text += "There are no finished single-task runs, so no lines to compare with."
    else:
        text += f"Dashed line: a network trained for that task alone; there is none for {missing[0]}."
    if any(len(group.finished) > 1 for group in study.compared):
        text += " Points are means over seeds with their standard deviation; small points are single runs."
    papers, said = _published_traces(study, first, second, layout)
    data += papers
    text += said
    if front:
        text += " The grey line joins the fixed weightings that no other one dominates; its points tell their weights."
    absent = [group.name for group in study.compared if not group.finished]
    if absent:
        text += f" Not finished: {', '.join(absent)}."
    return Section(title, text, ((Figure("", data, layout, height=480),),))


# The published points may widen the plane to so many times what the runs take; beyond it these would be one dot.
_WIDEST = 2.5


def _published_traces(
    study: Study, first: Metric, second: Metric, layout: dict[str, Any]
) -> tuple[list[dict[str, Any]], str]:
    """Hollow marks for the papers' rows, with what the text says of them; widens the axes where that shows them."""
    found = [
        (row, scale_of(first) * x, scale_of(second) * y)
        for row in rows_of(study)
        if (x := number(row, first)) is not None and (y := number(row, second)) is not None
    ]
    ranges = [layout[name].get("range") for name in ("xaxis", "yaxis")]
    if not found or None in ranges:
        return [], ""
    sources = ", ".join(dict.fromkeys(heading(study, row.source) for row, _, _ in found))
    wider = []
    for limits, values in zip(ranges, ([x for _, x, _ in found], [y for _, _, y in found]), strict=True):
        room = 0.1 * abs(limits[1] - limits[0])
        low, high = (
            min(*limits, *(value - room for value in values)),
            max(*limits, *(value + room for value in values)),
        )
        if high - low > _WIDEST * abs(limits[1] - limits[0]):
            return (
                [],
                f" The published results lie far outside this plane; they stand in the table ({sources}).",
            )
        wider.append([low, high] if limits[0] < limits[1] else [high, low])
    for name, limits in zip(("xaxis", "yaxis"), wider, strict=True):
        layout[name]["range"] = [short(limit) for limit in limits]
    traces = [
        {
            "type": "scatter",
            "name": f"{safe(row.method)} (published)",
            "x": [short(x)],
            "y": [short(y)],
            "mode": "markers",
            "marker": {
                "color": f"@{PUBLISHED.colour}",
                "size": 11,
                "symbol": PUBLISHED.symbol,
                "line": {"width": 1.5},
            },
            "hovertemplate": f"{safe(first.task)} %{{x:.2f}}<br>{safe(second.task)} %{{y:.2f}}",
            "showlegend": False,
        }
        for row, x, y in found
    ]
    named = [(x, y, row.method, None) for row, x, y in found]
    names = labels(named, (wider[0], wider[1]), f"@{PUBLISHED.colour}", 480 - 52)
    return [*traces, *names], f" Hollow grey diamonds: {sources}."


def _front_trace(front: Sequence[Mapping[str, Any]], first: Metric, second: Metric) -> dict[str, Any]:
    """The fixed weightings that no other one dominates, in order, with their weights on hovering."""
    kept = sorted(
        (point for point in front if not point["dominated"]), key=lambda point: point["test"][first.task]
    )
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [short(scale_of(first) * point["test"][first.task]) for point in kept],
        "y": [short(scale_of(second) * point["test"][second.task]) for point in kept],
        "text": [", ".join(f"{weight:g}" for weight in point["weights"]) for point in kept],
        "hovertemplate": "fixed weights %{text}<extra></extra>",
        "line": {"color": "@muted", "width": 2},
        "marker": {"color": "@muted", "size": 6},
        "showlegend": False,
    }


def _plane_traces(group: Group, first: Metric, second: Metric) -> list[dict[str, Any]]:
    pairs = _pairs(group, first, second)
    if not pairs:
        return []
    xs, ys = spread(x for x, _ in pairs), spread(y for _, y in pairs)
    assert xs is not None
    assert ys is not None
    hover = f"{safe(first.task)} %{{x:.2f}}<br>{safe(second.task)} %{{y:.2f}}"
    return point_traces(group, pairs, (xs, ys), hover)


def _pairs(group: Group, first: Metric, second: Metric) -> list[tuple[float, float]]:
    pairs = []
    for run in group.finished:
        x, y = (
            run.main_value(metric.task) if metric.task in run.tasks else None for metric in (first, second)
        )
        if x is not None and y is not None:
            pairs.append((scale_of(first) * x, scale_of(second) * y))
    return pairs


def _limits(study: Study, metric: Metric, alone: Spread | None) -> tuple[float, float] | None:
    values = [
        scale_of(metric) * value
        for group in study.compared
        if metric.task in group.tasks
        for value in group.values(metric.task)
    ]
    if alone is not None:
        values.append(scale_of(metric) * alone.mean)
    if not values:
        return None
    low, high = min(values), max(values)
    room = 0.12 * (high - low) or 0.02 * abs(high) or 1.0
    return low - room, high + room


def _line_label(direction: str, metric: Metric, alone: Spread) -> dict[str, Any]:
    value = scale_of(metric) * alone.mean
    text = f"{safe(metric.task)} alone {value:.2f}"
    common = {"text": text, "showarrow": False, "font": {"color": "@single", "size": 11}}
    if direction == "x":
        turned = {"textangle": -90, "xanchor": "right", "yanchor": "bottom", "yref": "paper"}
        return {**common, **turned, "x": short(value), "y": 0.01}
    return {**common, "xref": "paper", "x": 0.01, "xanchor": "left", "y": short(value), "yanchor": "bottom"}


__all__ = ["axis_title", "plane_section"]
