"""The plane of two tasks (Sener & Koltun 2018, Figure 3), and a row of dots for each of more tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detente.records import Metric, Run
from detente.reports.figures import Figure, Section, axis, safe, short, straight_line, trace_base
from detente.reports.groups import Group, Study, collect
from detente.reports.style import PALETTE, SHAPES
from detente.reports.sweeps import front_points
from detente.statistics import Spread, spread


def plane_section(study: Study) -> Section:
    """All methods against each other, by their results on test data.

    Two tasks span a plane with a point per run; for another number of tasks there is a row of dots per task. Without
    a finished run the section says so in words.
    """
    title = "The two tasks against each other" if len(study.tasks) == 2 else "Every task"
    done = [group for group in study.groups if group.finished]
    if not done:
        return Section(title, "No run has finished, so there is no result on test data to show.")
    return _plane(study, title) if len(study.tasks) == 2 else _dots(study, title)


def axis_title(metric: Metric) -> str:
    """Task, metric and unit, as an axis shows them.

    >>> axis_title(Metric("left", "accuracy", higher_is_better=True, percent=True))
    'left: accuracy (%)'
    """
    return f"{metric.task}: {metric.name}{' (%)' if metric.percent else ''}"


def _scale(metric: Metric) -> float:
    return 100.0 if metric.percent else 1.0


def _plane(study: Study, title: str) -> Section:
    first, second = (study.metrics[task] for task in study.tasks)
    data: list[dict[str, Any]] = []
    front = front_points(study)
    if front:
        data.append(_front_trace(front, first, second))
    for group in study.compared:
        data += _plane_traces(group, first, second)
    layout: dict[str, Any] = {"xaxis": axis(axis_title(first)), "yaxis": axis(axis_title(second))}
    alone = _baselines(study)
    layout["shapes"] = [
        straight_line(
            direction, short(_scale(metric) * alone[metric.task].mean) or 0.0, "@single", "dash", 1.5
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
            kept = [_scale(metric) * point["test"][metric.task] for point in front if not point["dominated"]]
            limits = (min([limits[0], *kept]), max([limits[1], *kept]))
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
    if front:
        text += " The grey line joins the fixed weightings that no other one dominates; its points tell their weights."
    absent = [group.name for group in study.compared if not group.finished]
    if absent:
        text += f" Not finished: {', '.join(absent)}."
    return Section(title, text, ((Figure("", data, layout, height=480),),))


def _front_trace(front: Sequence[Mapping[str, Any]], first: Metric, second: Metric) -> dict[str, Any]:
    """The fixed weightings that no other one dominates, in order, with their weights on hovering."""
    kept = sorted(
        (point for point in front if not point["dominated"]), key=lambda point: point["test"][first.task]
    )
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [short(_scale(first) * point["test"][first.task]) for point in kept],
        "y": [short(_scale(second) * point["test"][second.task]) for point in kept],
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
    colour = f"@{group.style.colour}"
    marker = {"color": colour, "size": 13, "symbol": group.style.symbol, "line": {"width": 2}}
    if group.style.filled:
        marker["line"] = {"width": 1, "color": "@card"}
    point: dict[str, Any] = {
        **trace_base(group),
        "x": [short(xs.mean)],
        "y": [short(ys.mean)],
        "mode": "markers",
        "marker": marker,
        "hovertemplate": f"{safe(first.task)} %{{x:.2f}}<br>{safe(second.task)} %{{y:.2f}}",
    }
    traces = []
    if len(pairs) > 1:
        for name, found in (("error_x", xs), ("error_y", ys)):
            point[name] = {
                "type": "data",
                "array": [short(found.deviation)],
                "color": colour,
                "thickness": 1.2,
            }
        small = {"color": colour, "size": 5, "symbol": group.style.symbol, "opacity": 0.55}
        where = {"x": [short(x) for x, _ in pairs], "y": [short(y) for _, y in pairs]}
        traces.append({**trace_base(group), **where, "mode": "markers", "marker": small, "hoverinfo": "skip"})
    return [*traces, point]


def _pairs(group: Group, first: Metric, second: Metric) -> list[tuple[float, float]]:
    pairs = []
    for run in group.finished:
        x, y = (
            run.main_value(metric.task) if metric.task in run.tasks else None for metric in (first, second)
        )
        if x is not None and y is not None:
            pairs.append((_scale(first) * x, _scale(second) * y))
    return pairs


def _baselines(study: Study) -> dict[str, Spread]:
    """The single-task results, by task, under the settings that most groups have."""
    beside = study.compared[0] if study.compared else None
    found = {}
    for task in study.tasks:
        group = study.baseline(task, beside)
        alone = spread(group.values(task)) if group else None
        if alone is not None:
            found[task] = alone
    return found


def _limits(study: Study, metric: Metric, alone: Spread | None) -> tuple[float, float] | None:
    values = [
        _scale(metric) * value
        for group in study.compared
        if metric.task in group.tasks
        for value in group.values(metric.task)
    ]
    if alone is not None:
        values.append(_scale(metric) * alone.mean)
    if not values:
        return None
    low, high = min(values), max(values)
    room = 0.12 * (high - low) or 0.02 * abs(high) or 1.0
    return low - room, high + room


def _line_label(direction: str, metric: Metric, alone: Spread) -> dict[str, Any]:
    value = _scale(metric) * alone.mean
    text = f"{safe(metric.task)} alone {value:.2f}"
    common = {"text": text, "showarrow": False, "font": {"color": "@single", "size": 11}}
    if direction == "x":
        turned = {"textangle": -90, "xanchor": "right", "yanchor": "bottom", "yref": "paper"}
        return {**common, **turned, "x": short(value), "y": 0.01}
    return {**common, "xref": "paper", "x": 0.01, "xanchor": "left", "y": short(value), "yanchor": "bottom"}


def _dots(study: Study, title: str) -> Section:
    """One row per task, one dot per method: relative to the single task where there is one for every task."""
    alone = _baselines(study)
    relative = all(task in alone and alone[task].mean > 0 for task in study.tasks) and len(study.tasks) > 1
    common = len({(study.metrics[t].name, study.metrics[t].percent) for t in study.tasks}) == 1
    text = "One row for each task. "
    if relative:
        name = "change against the single-task network (%), right is better"
        text += "Zero is a network trained for that task alone."
    elif common:
        metric = study.metrics[study.tasks[0]]
        name = f"{metric.name}{' (%)' if metric.percent else ''}"
        text += f"{'Right' if metric.higher_is_better else 'Left'} is better."
    else:
        name = "position between the worst (0) and the best (1) method here"
        text += "The tasks have different units, so each row is scaled from the worst to the best method."
    if not relative:
        text += " There are no single-task runs for all tasks to compare with."
    shown = study.compared or study.groups
    data = []
    for group in shown:
        x, y = [], []
        for task in group.tasks:
            found = spread(group.values(task))
            if found is None:
                continue
            x.append(short(_dot(study, task, found.mean, alone.get(task) if relative else None, common)))
            y.append(safe(task))
        if x:
            marker = {"color": f"@{group.style.colour}", "size": 11, "symbol": group.style.symbol}
            template = "%{y}: %{x:.4g}"
            trace = {**trace_base(group), "x": x, "y": y, "mode": "markers", "marker": marker}
            data.append({**trace, "hovertemplate": template})
    layout: dict[str, Any] = {
        "xaxis": axis(name),
        "yaxis": {"type": "category", "autorange": "reversed", "automargin": True},
    }
    if relative:
        layout["shapes"] = [straight_line("x", 0.0, "@single", "dash", 1.5)]
    height = 110 + max(26 * len(study.tasks), 120)
    return Section(title, text, ((Figure("", data, layout, height=height),),))


def _dot(study: Study, task: str, value: float, alone: Spread | None, common: bool) -> float:
    metric = study.metrics[task]
    sign = 1.0 if metric.higher_is_better else -1.0
    if alone is not None:
        return sign * 100 * (value - alone.mean) / alone.mean
    if common:
        return _scale(metric) * value
    everyone = [s.mean for g in study.compared if task in g.tasks and (s := spread(g.values(task)))]
    low, high = min(everyone), max(everyone)
    place = (value - low) / (high - low) if high > low else 1.0
    return place if metric.higher_is_better or high == low else 1.0 - place


def accuracy_plane_png(runs: Iterable[Run], path: Path) -> Path:
    """Draw the plane of two tasks as a picture for paper or README; the suffix of ``path`` chooses the format.

    Raises ValueError when the runs are not of one experiment with two tasks and at least one finished run.
    """
    studies = collect(runs)
    if len(studies) != 1 or len(studies[0].tasks) != 2:
        raise ValueError("the accuracy plane needs runs of one experiment with exactly two tasks")
    study = studies[0]
    first, second = (study.metrics[task] for task in study.tasks)
    points = [(group, _pairs(group, first, second)) for group in study.compared]
    if not any(pairs for _, pairs in points):
        raise ValueError("the accuracy plane needs at least one finished run on both tasks")

    # Figure instead of pyplot: no window, no state shared with the caller's own figures.
    from matplotlib.figure import Figure as Canvas

    colours = PALETTE["light"]
    with _paper_fonts():
        canvas = Canvas(figsize=(6.4, 4.0), layout="constrained")
        axes = canvas.add_subplot()
        axes.grid(color=colours["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        alone = _baselines(study)
        for metric, draw in ((first, axes.axvline), (second, axes.axhline)):
            if metric.task in alone:
                value = _scale(metric) * alone[metric.task].mean
                label = f"{metric.task} alone: {value:.2f}"
                draw(value, color=colours["single"], linestyle="--", linewidth=1.3, label=label, zorder=1)
        for group, pairs in points:
            if not pairs:
                continue
            xs, ys = spread(x for x, _ in pairs), spread(y for _, y in pairs)
            assert xs is not None
            assert ys is not None
            colour = colours[group.style.colour]
            axes.errorbar(
                [xs.mean],
                [ys.mean],
                xerr=xs.deviation,
                yerr=ys.deviation,
                fmt="none",
                ecolor=colour,
                elinewidth=1.2,
                capsize=2.5,
                capthick=1.2,
                zorder=2,
            )
            axes.plot(
                [xs.mean],
                [ys.mean],
                marker=SHAPES[group.style.shape],
                markersize=(11 if group.style.shape == "star" else 8.5) - (0 if group.style.filled else 1.2),
                markerfacecolor=colour if group.style.filled else "white",
                markeredgewidth=1.8 if not group.style.filled else 0.8,
                markeredgecolor=colour if not group.style.filled else "white",
                linestyle="none",
                label=group.name,
                zorder=3,
            )
        for metric, limit, name in (
            (first, axes.set_xlim, axes.set_xlabel),
            (second, axes.set_ylim, axes.set_ylabel),
        ):
            limits = _limits(study, metric, alone.get(metric.task))
            assert limits is not None
            limit(*(limits if metric.higher_is_better else limits[::-1]))
            name(_plain_math(axis_title(metric)))
        handles, labels = axes.get_legend_handles_labels()
        legend = [_plain_math(name) for name in labels]
        canvas.legend(handles, legend, loc="outside right upper", frameon=False, fontsize=9)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, dpi=200, facecolor="white")
    return Path(path)


def _paper_fonts() -> Any:
    import matplotlib as mpl

    return mpl.rc_context(
        {"font.size": 10, "axes.labelsize": 10, "axes.edgecolor": "#888888", "svg.fonttype": "none"}
    )


def _plain_math(text: str) -> str:
    """A dollar sign in a name is no formula."""
    return text.replace("$", r"\$")


__all__ = ["accuracy_plane_png", "axis_title", "plane_section"]
