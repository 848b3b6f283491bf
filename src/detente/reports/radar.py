"""Results on many tasks: a radar of the best few methods, and a row of dots for each task as the exact reading."""

from __future__ import annotations

from typing import Any

from detente.reports.figures import Figure, Section, axis, safe, scale_of, short, straight_line, trace_base
from detente.reports.groups import Group, Study
from detente.statistics import Spread, spread

# More polygons than this cover each other; the buttons of the figure bring the others.
MOST_SHOWN = 5
_NAME = 12
_MANY = 16
_RADAR, _LARGE = 460, 680


def tasks_section(study: Study, title: str) -> Section:
    """Every method on every task: dots, and from three tasks on a radar beside them.

    Both are relative to the single-task networks where every task has one. Otherwise the radar goes from the worst to
    the best method, and the dots show the metric itself where all tasks have the same.

    Args:
        study: with at least one finished run.
        title: of the section.
    """
    relative = len(study.tasks) > 1 and all(
        task in study.alone and study.alone[task].mean > 0 for task in study.tasks
    )
    dots, text = _dots(study, relative)
    if len(study.tasks) < 3:
        return Section(title, text, ((dots,),))
    radar, told = _radar(study, relative)
    # The names of many tasks need the whole width.
    rows = ((radar,), (dots,)) if len(study.tasks) > _MANY else ((radar, dots),)
    return Section(title, f"{told} {text}", rows)


def _radar(study: Study, relative: bool) -> tuple[Figure, str]:
    """Spokes are tasks; the further out the better."""
    radii = {
        group.key: [_reached(study, group, task, relative, common=False) for task in study.tasks]
        for group in study.compared
    }
    drawn = [group for group in study.compared if any(value is not None for value in radii[group.key])]
    shown = _best(drawn, radii)
    # Names that were cut may be the same: a spoke is found by its angle.
    names = [_two_lines(task) for task in study.tasks]
    angles = [360 * number / len(names) for number in range(len(names))]
    around = [*angles, 0.0]
    unit = " %" if relative else ""
    data: list[dict[str, Any]] = []
    for group in drawn:
        values = [short(value) for value in radii[group.key]]
        colour = f"@{group.style.colour}"
        data.append(
            {
                **trace_base(group),
                "type": "scatterpolar",
                "r": [*values, values[0]],
                "theta": around,
                "text": [safe(task) for task in (*study.tasks, study.tasks[0])],
                "mode": "lines+markers",
                "line": {"color": colour, "width": 2, "dash": group.style.dash},
                "marker": {"color": colour, "size": 7, "symbol": group.style.symbol},
                "hovertemplate": f"%{{text}}: %{{r:.4g}}{unit}",
            }
        )
    if relative:
        data.append(
            {
                "type": "scatterpolar",
                "name": "one network for each task",
                "r": [0.0] * 73,
                "theta": [5.0 * place for place in range(73)],
                "mode": "lines",
                "line": {"color": "@single", "width": 1.5, "dash": "dash"},
                "hoverinfo": "skip",
            }
        )
    lines = {"gridcolor": "@grid", "linecolor": "@grid", "tickcolor": "@grid"}
    spokes = {
        **lines,
        "tickvals": angles,
        "ticktext": names,
        "rotation": 90,
        "direction": "clockwise",
        "tickfont": {"color": "@ink", "size": 11 if len(names) <= 12 else 9},
    }
    rings = {
        **lines,
        "angle": 90,
        "tickangle": 90,
        "nticks": 5,
        "ticksuffix": unit,
        "tickfont": {"color": "@muted", "size": 10},
        **({} if relative else {"range": [-0.1, 1.05], "tickvals": [0, 0.5, 1]}),
    }
    layout = {
        "polar": {"angularaxis": spokes, "radialaxis": rings, "bgcolor": "rgba(0,0,0,0)"},
        "margin": {"l": 78, "r": 78, "t": 38, "b": 38},
    }
    if relative:
        text = (
            "Radar: each spoke is a task's main metric as its change in percent against the network trained for that "
            "task alone (the dashed ring), further out is better; the centre is a little below the worst value shown."
        )
    else:
        text = (
            "Radar: each spoke is a task's main metric, scaled from the worst (0) to the best (1) method here, further "
            "out is better."
        )
    if len(drawn) > len(shown):
        listed = ", ".join(group.name for group in drawn if group.key in shown)
        text += (
            f" It shows {listed} at first, those with the best mean over the spokes and uniform weights; the buttons "
            f"above it show and hide all {len(drawn)}."
        )
    title = (
        "Radar: change against one network per task"
        if relative
        else "Radar: from the worst to the best method"
    )
    height = _LARGE if len(names) > _MANY else _RADAR
    return Figure(title, data, layout, height, shown if len(drawn) > len(shown) else None), text


def _two_lines(name: str) -> str:
    """A name as it fits beside a spoke: at most two lines, escaped for plotly; the dots have it in full."""
    first, second = name, ""
    if len(name) > _NAME:
        cut = max(name.rfind(" ", 0, _NAME + 1), name.rfind("_", 0, _NAME))
        first, second = (
            (name[: cut + 1].rstrip(), name[cut + 1 :]) if cut > 0 else (name[:_NAME], name[_NAME:])
        )
    second = f"{second[: _NAME - 1]}…" if len(second) > _NAME else second
    return "<br>".join(safe(line) for line in (first, second) if line)


def _best(groups: list[Group], radii: dict[str, list[float | None]]) -> tuple[str, ...]:
    """The keys of uniform weights, which all are held against, and of the groups with the best mean over the tasks."""

    def mean(group: Group) -> float:
        found = [value for value in radii[group.key] if value is not None]
        return sum(found) / len(found)

    ranked = sorted(groups, key=mean, reverse=True)
    uniform = [group for group in ranked if group.method == "uniform"][:1]
    others = [group for group in ranked if group not in uniform]
    return tuple(group.key for group in (*uniform, *others)[:MOST_SHOWN])


def _dots(study: Study, relative: bool) -> tuple[Figure, str]:
    """One row per task, one dot per method: relative to the single task where there is one for every task."""
    common = len({(study.metrics[t].name, study.metrics[t].percent) for t in study.tasks}) == 1
    text = "Dots: one row for each task. "
    if relative:
        name = "change against the single task (%)"
        text += "Zero is a network trained for that task alone, right is better."
    elif common:
        metric = study.metrics[study.tasks[0]]
        name = f"{metric.name}{' (%)' if metric.percent else ''}"
        text += f"{'Right' if metric.higher_is_better else 'Left'} is better."
    else:
        name = "from worst (0) to best (1)"
        text += "The units differ, so each row is scaled from the worst to the best method; right is better."
    if not relative:
        text += " There are no single-task runs for all tasks to compare with."
    data = []
    for group in study.compared or study.groups:
        x, y = [], []
        for task in group.tasks:
            value = _reached(study, group, task, relative, common)
            if value is not None:
                x.append(short(value))
                y.append(safe(task))
        if x:
            marker = {"color": f"@{group.style.colour}", "size": 11, "symbol": group.style.symbol}
            trace = {**trace_base(group), "x": x, "y": y, "mode": "markers", "marker": marker}
            data.append({**trace, "hovertemplate": "%{y}: %{x:.4g}"})
    layout: dict[str, Any] = {
        "xaxis": axis(name),
        "yaxis": {"type": "category", "autorange": "reversed", "automargin": True},
    }
    if relative:
        layout["shapes"] = [straight_line("x", 0.0, "@single", "dash", 1.5)]
    height = 110 + max(26 * len(study.tasks), 120)
    title = "Each task" if len(study.tasks) > 2 else ""
    return Figure(title, data, layout, height=height), text


def _reached(study: Study, group: Group, task: str, relative: bool, common: bool) -> float | None:
    """Where a group stands on a task, on the scale of the figure; None without a result."""
    found: Spread | None = spread(group.values(task)) if task in group.tasks else None
    if found is None:
        return None
    metric, value = study.metrics[task], found.mean
    sign = 1.0 if metric.higher_is_better else -1.0
    if relative:
        alone = study.alone[task].mean
        return sign * 100 * (value - alone) / alone
    if common:
        return scale_of(metric) * value
    compared = study.compared or study.groups
    everyone = [sign * s.mean for g in compared if task in g.tasks and (s := spread(g.values(task)))]
    low, high = min(everyone), max(everyone)
    return (sign * value - low) / (high - low) if high > low else 1.0


__all__ = ["tasks_section"]
