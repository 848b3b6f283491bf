"""The interactive figures, as plain plotly data: built without importing plotly, drawn by the page.

Colours are tokens with an ``@`` (``"@m3"``, ``"@m3/0.2"`` with opacity); the page replaces them for the reader's
colour scheme. Texts that come from records are escaped, because plotly reads simple HTML in them.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from detente.records import Metric, Row
from detente.reports.groups import Group, Study
from detente.statistics import Spread

# A figure with more panels than this is not read; beyond it the extremes over tasks are shown.
MOST_PANELS = 6
_BINS = 60


@dataclass(frozen=True)
class Figure:
    """One drawing: its title as plain text, plotly's traces and layout, its height in pixels.

    ``shown`` holds the keys of the groups that are drawn at first, where the figure has buttons of its own for the
    others; None draws all.
    """

    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 300
    shown: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Section:
    """Rows of figures that belong together, with a text above them; no figures when ``text`` says why."""

    title: str
    text: str
    rows: tuple[tuple[Figure, ...], ...] = ()


def safe(text: str) -> str:
    """A text from a record, for plotly: its simple HTML must not be read as such."""
    return html.escape(text, quote=False)


def short(value: float | None) -> float | None:
    """Five significant digits are more than a screen shows, and keep the file small."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def axis(title: str, **more: Any) -> dict[str, Any]:
    """One axis with its title."""
    return {"title": {"text": safe(title)}, **more}


def scale_of(metric: Metric) -> float:
    """What a stored value is multiplied by before it is shown."""
    return 100.0 if metric.percent else 1.0


def loss_curves(study: Study) -> Section:
    """Training and validation loss of every task over epochs."""
    text = (
        "Lines are means over seeds, bands reach from the lowest to the highest seed. "
        "A ring marks the epoch whose weights were chosen on validation data."
    )
    tasks = study.tasks[:MOST_PANELS]
    figures = []
    for task in tasks:
        for kind, pick in (("training", _train_loss), ("validation", _validation_loss)):
            data = []
            for group in study.groups:
                if task in group.tasks:
                    data += _epoch_traces(group, partial(pick, task=task), kind == "validation")
            if data:
                layout = {"xaxis": axis("epoch"), "yaxis": axis("loss", **log_if_wide(data))}
                figures.append(Figure(f"{task}: {kind} loss", data, layout))
    if not figures:
        return Section("Loss curves", "No epochs were recorded.")
    if len(study.tasks) > len(tasks):
        text += f" The first {len(tasks)} of {len(study.tasks)} tasks are shown."
    return Section("Loss curves", text, (tuple(figures),))


def weight_curves(study: Study) -> Section:
    """The share of each task in the weights over steps."""
    title = "Weights"
    shares = {group.key: _points(group, _shares) for group in study.compared}
    lacking = [group.name for group in study.compared if not shares[group.key]]
    if len(lacking) == len(study.compared):
        return Section(title, "No weights of tasks were recorded.")
    text = (
        "Each task's share of the weights, so that methods with different scales can be compared: "
        "weight divided by the sum of the weights' sizes. Lines are medians over neighbouring steps "
        "(of all seeds), bands hold the middle half. Dotted: equal weights."
    )
    if lacking:
        text += f" No weights recorded: {', '.join(lacking)}."
    series: list[tuple[str, Callable[[Mapping[str, float]], float | None]]]
    if len(study.tasks) == 2 and not _any_negative(shares.values()):
        # The second panel would be the first one upside down.
        first, second = study.tasks
        series = [
            (f"{first}: share of the weights (the rest is that of {second})", partial(_share_of, task=first))
        ]
    elif len(study.tasks) <= MOST_PANELS:
        series = [(f"{task}: share of the weights", partial(_share_of, task=task)) for task in study.tasks]
    else:
        series = [
            ("largest share of a task", lambda found: max(found.values(), default=None)),
            ("smallest share of a task", lambda found: min(found.values(), default=None)),
        ]
    figures = []
    for name, pick in series:
        data: list[dict[str, Any]] = []
        for group in study.compared:
            data += step_traces(group, [(step, pick(found)) for step, found in shares[group.key]])
        layout: dict[str, Any] = {"xaxis": axis("step"), "yaxis": axis("share")}
        layout["shapes"] = [straight_line("y", 1 / len(study.tasks), "@muted", "dot", 1.5)]
        figures.append(Figure(name, data, layout))
    return Section(title, text, (tuple(figures),))


def conflict_curves(study: Study) -> Section:
    """Cosine, condition number and magnitude similarity over steps, raw and altered."""
    title = "Conflict between the gradients"
    cosine = "cosine" if len(study.tasks) == 2 else "smallest cosine of two tasks"
    measures: tuple[tuple[str, str, dict[str, Any], float | None], ...] = (
        ("minimal_cosine", cosine, {"range": [-1.05, 1.05]}, 0.0),
        ("condition_number", "condition number", {}, 10.0),
        ("magnitude_similarity", "magnitude similarity", {"range": [-0.05, 1.05]}, None),
        # Of two gradients the similarity of their lengths says the same.
        *((("norm_ratio", "longest over shortest gradient", {}, None),) if len(study.tasks) > 2 else ()),
    )
    rows = []
    largest: dict[str, float] = {}
    for which, when in (("raw", "as given"), ("altered", "altered")):
        figures = []
        for key, name, options, line in measures:
            data: list[dict[str, Any]] = []
            for group in study.compared:
                data += step_traces(group, _points(group, partial(_measure, which=which, key=key)))
            values = [value for trace in data for value in trace["y"] if value is not None]
            if not values:
                continue
            if key == "condition_number":
                # Never below 1; the same axis for given and altered gradients, with the papers' line in view.
                top = max(largest.get(key, 10.0), *values)
                largest[key] = top
                options = {**log_axis(1.0, top), "range": [-0.05, 1.04 * math.log10(top)]}
            if key == "norm_ratio":
                options = log_if_wide(data)
            layout: dict[str, Any] = {"xaxis": axis("step"), "yaxis": axis(name, **options)}
            if line is not None:
                layout["shapes"] = [straight_line("y", line, "@muted", "dot", 1.5)]
            figures.append(Figure(f"{name}, {when}", data, layout, height=260))
        if figures:
            rows.append(tuple(figures))
    measured = [group for group in study.compared if _points(group, lambda row: row.get("raw"))]
    if not measured or not rows:
        return Section(title, "No conflict measures were recorded.")
    text = (
        "Cosine below the dotted line: the tasks pull against each other. Condition number: largest over "
        "smallest singular value of the matrix of gradients; the line at 10 is the limit that Senushkin et al. "
        "(2023) draw. Magnitude similarity: 1 when the "
        "gradients are equally long. Broken lines are measured on the features, where the gradients are others "
        "than on the parameters."
    )
    altered = [group.name for group in study.compared if _points(group, lambda row: row.get("altered"))]
    if altered:
        text += f" “Altered”: after the method changed the gradients one by one, as {', '.join(altered)} did."
    else:
        text += " No method here alters the gradients one by one."
    lacking = [group.name for group in study.compared if group not in measured]
    if lacking:
        text += f" Not measured: {', '.join(lacking)}."
    share = _infinite_share(measured)
    if share > 0:
        text += f" In {100 * share:.2g} % of the steps the condition number was infinite."
    return Section(title, text, tuple(rows))


def _epoch_traces(
    group: Group, pick: Callable[[Row], float | None], mark_selected: bool
) -> list[dict[str, Any]]:
    values = [(row["epoch"], pick(row)) for run in group.runs for row in run.epochs]
    return epoch_lines(group, values, mark_selected)


def epoch_lines(
    group: Group, values: Iterable[tuple[int, float | None]], mark_selected: bool = False
) -> list[dict[str, Any]]:
    """The mean over a group's runs for each epoch, and the band from the lowest to the highest of them."""
    by_epoch: dict[int, list[float]] = {}
    for epoch, value in values:
        if value is not None:
            by_epoch.setdefault(epoch, []).append(value)
    if not by_epoch:
        return []
    epochs = sorted(by_epoch)
    means = [short(math.fsum(by_epoch[epoch]) / len(by_epoch[epoch])) for epoch in epochs]
    low, high = ([short(pick_(by_epoch[epoch])) for epoch in epochs] for pick_ in (min, max))
    traces = _band(group, epochs, low, high) if len(group.runs) > 1 else []
    traces.append(_curve(group, epochs, means))
    chosen = _selected(group)
    if mark_selected and chosen in by_epoch:
        ring = {
            "size": 15,
            "symbol": "circle-open",
            "color": f"@{group.style.colour}",
            "line": {"width": 1.5},
        }
        place = epochs.index(chosen)
        traces.append(
            {
                **trace_base(group),
                "x": [chosen],
                "y": [means[place]],
                "mode": "markers",
                "marker": ring,
                "hoverinfo": "skip",
            }
        )
    return traces


def step_traces(group: Group, points: Sequence[tuple[int, float | None]]) -> list[dict[str, Any]]:
    """Median and middle half over neighbouring steps; infinite values count as larger than all others."""
    found = [(step, value) for step, value in points if value is not None]
    if not found:
        return []
    found.sort(key=lambda point: point[0])
    bins = min(_BINS, len(found))
    x: list[int] = []
    quartiles: list[tuple[float | None, ...]] = []
    for number in range(bins):
        part = found[number * len(found) // bins : (number + 1) * len(found) // bins]
        values = sorted(value for _, value in part)
        x.append(part[len(part) // 2][0])
        quartiles.append(tuple(short(_quantile(values, share)) for share in (0.25, 0.5, 0.75)))
    low, middle, high = (list(column) for column in zip(*quartiles, strict=True))
    # A band needs both of its edges; where one is infinite there is none.
    whole = [i for i in range(bins) if low[i] is not None and high[i] is not None]
    band = _band(group, [x[i] for i in whole], [low[i] for i in whole], [high[i] for i in whole])
    return [*(band if len(found) > bins else []), _curve(group, x, middle)]


def _band(
    group: Group, x: Sequence[int], low: Sequence[float | None], high: Sequence[float | None]
) -> list[dict[str, Any]]:
    if len(x) < 2:
        return []
    return [
        {
            **trace_base(group),
            "x": [*x, *reversed(x)],
            "y": [*low, *reversed(high)],
            "mode": "lines",
            "line": {"width": 0},
            "fill": "toself",
            "fillcolor": f"@{group.style.colour}/0.14",
            "hoverinfo": "skip",
        }
    ]


def _curve(group: Group, x: Sequence[int], y: Sequence[float | None]) -> dict[str, Any]:
    colour = f"@{group.style.colour}"
    return {
        **trace_base(group),
        "x": list(x),
        "y": list(y),
        "mode": "lines+markers",
        "line": {"color": colour, "width": 2, "dash": group.style.dash},
        "marker": {"color": colour, "size": 7, "symbol": group.style.symbol, "maxdisplayed": 8},
        "hovertemplate": "%{x}: %{y:.4g}",
    }


def trace_base(group: Group) -> dict[str, Any]:
    """What every trace of a group has; ``meta`` lets the legend switch the group off everywhere."""
    return {"type": "scatter", "name": safe(group.name), "meta": group.key}


def straight_line(direction: str, value: float, colour: str, dash: str, width: float) -> dict[str, Any]:
    """A straight line across the whole figure at one value of ``direction``."""
    other = "x" if direction == "y" else "y"
    return {
        "type": "line",
        "layer": "above",
        f"{direction}0": value,
        f"{direction}1": value,
        f"{other}ref": "paper",
        f"{other}0": 0,
        f"{other}1": 1,
        "line": {"color": colour, "dash": dash, "width": width},
    }


def _points(group: Group, pick: Callable[[Row], Any]) -> list[tuple[int, Any]]:
    return [
        (row["step"], value) for run in group.runs for row in run.steps if (value := pick(row)) is not None
    ]


def _train_loss(row: Row, task: str) -> float | None:
    return number_of(row.get("train_loss", {}).get(task))


def _validation_loss(row: Row, task: str) -> float | None:
    return number_of(row.get("validation", {}).get(task, {}).get("loss"))


def _shares(row: Row) -> dict[str, float] | None:
    weights = row.get("weights")
    known = {
        name: weight
        for name, weight in zip(row["names"], weights or (None,) * len(row["names"]), strict=True)
        if number_of(weight) is not None
    }
    size = math.fsum(map(abs, known.values()))
    return {name: weight / size for name, weight in known.items()} if size else None


def _share_of(found: Mapping[str, float], task: str) -> float | None:
    return found.get(task)


def _measure(row: Row, which: str, key: str) -> float | None:
    measured = row.get(which)
    if not isinstance(measured, dict) or key not in measured:
        return None
    value = number_of(measured[key])
    # JSON has no infinity: the record stores null where the matrix of gradients is singular.
    return math.inf if value is None and key in ("condition_number", "norm_ratio") else value


def _infinite_share(groups: Iterable[Group]) -> float:
    values = [v for g in groups for _, v in _points(g, lambda row: _measure(row, "raw", "condition_number"))]
    return sum(1 for value in values if math.isinf(value)) / len(values) if values else 0.0


def _selected(group: Group) -> int | None:
    """The chosen epoch, where one run chose one epoch."""
    if len(group.runs) != 1 or group.runs[0].result is None:
        return None
    chosen = group.runs[0].result.get("selected_epochs")
    return chosen[0] if isinstance(chosen, list) and len(chosen) == 1 and isinstance(chosen[0], int) else None


def number_of(value: Any) -> float | None:
    """The value where it is a number, else None; true and false are none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between ordered values; infinite when a neighbour is."""
    place = share * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    if place == below or values[below] == values[above]:
        return values[below]
    return values[below] + (place - below) * (values[above] - values[below])


def _any_negative(series: Iterable[Sequence[tuple[int, Mapping[str, float]]]]) -> bool:
    return any(share < 0 for points in series for _, shares in points for share in shares.values())


def log_axis(low: float, high: float) -> dict[str, Any]:
    """A logarithmic axis with a tick at 1, 2 and 5 of every decade it covers, one per decade where it is long."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:.4g}" for tick in ticks]}


def log_if_wide(data: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A logarithmic axis where the losses span more than a factor of five and are all positive."""
    values = [value for trace in data for value in trace["y"] if value is not None]
    wide = bool(values) and min(values) > 0 and max(values) > 5 * min(values)
    return log_axis(min(values), max(values)) if wide else {}


def point_traces(
    group: Group, pairs: Sequence[tuple[float, float]], spreads: tuple[Spread, Spread], hover: str
) -> list[dict[str, Any]]:
    """A group's mean in a plane; with several runs its deviations both ways, and each run as a small point.

    Args:
        group: whose runs they are.
        pairs: x and y of every run.
        spreads: of x and of y.
        hover: what the point says of itself.
    """
    colour = f"@{group.style.colour}"
    marker: dict[str, Any] = {"color": colour, "size": 13, "symbol": group.style.symbol, "line": {"width": 2}}
    if group.style.filled:
        marker["line"] = {"width": 1, "color": "@card"}
    point: dict[str, Any] = {
        **trace_base(group),
        "x": [short(spreads[0].mean)],
        "y": [short(spreads[1].mean)],
        "mode": "markers",
        "marker": marker,
        "hovertemplate": hover,
    }
    if len(pairs) < 2:
        return [point]
    for name, found in zip(("error_x", "error_y"), spreads, strict=True):
        if found.deviation:
            length = [short(found.deviation)]
            point[name] = {"type": "data", "array": length, "color": colour, "thickness": 1.2}
    small = {"color": colour, "size": 5, "symbol": group.style.symbol, "opacity": 0.55}
    where = {"x": [short(x) for x, _ in pairs], "y": [short(y) for _, y in pairs]}
    return [{**trace_base(group), **where, "mode": "markers", "marker": small, "hoverinfo": "skip"}, point]
