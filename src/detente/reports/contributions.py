"""What each task contributes to the updates, layer by layer and over the steps, from stored runs.

These are Figures 4 and 5 of Hervella et al. 2024, for every group of runs that recorded it (``--balance``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detente.records import Run
from detente.reports.figures import Figure, Section, axis, safe, short
from detente.reports.groups import Group, Study, collect
from detente.reports.style import COLOURS, PALETTE, SHAPES

KINDS = ("gradients", "contributions")
_POINTS = 60
# Cells with a number in them, names along the axes, and letters of a name: what can still be read.
_MOST_NUMBERS = 120
_MOST_DOWN = 48
_MOST_ACROSS = 20
_MOST_STEPS = 6
_NAME = 22
_NAMES = {"gradients": "mean |gradient|", "contributions": "mean |contribution|"}
_SHAPES = tuple(SHAPES)


@dataclass(frozen=True)
class Balance:
    """The recorded balance of one or several runs.

    Attributes:
        tasks: T names.
        layers: L names of shared tensors.
        steps: [S] numbers of the recorded steps.
        gradients: [S, L, T] mean absolute gradients, averaged over runs; units of loss per unit of parameter.
        contributions: [S, L, T] mean absolute contributions to the update, likewise; units of the parameters.
        sizes: [L] numbers of entries.
    """

    tasks: tuple[str, ...]
    layers: tuple[str, ...]
    steps: np.ndarray
    gradients: np.ndarray
    contributions: np.ndarray
    sizes: np.ndarray

    def by_layer(self, kind: str) -> np.ndarray:
        """[L, T] means over the steps (Figure 4)."""
        return np.asarray(getattr(self, kind).mean(axis=0))

    def by_step(self, kind: str) -> np.ndarray:
        """[S, T] means over all entries of all layers (Figure 5)."""
        return np.asarray(np.einsum("slt,l->st", getattr(self, kind), self.sizes / self.sizes.sum()))


def balance_of(runs: Sequence[Run]) -> Balance | None:
    """The balance that runs of one group recorded, at the steps all of them have; None if they have none.

    Args:
        runs: runs that differ by the seed only.

    Raises:
        ValueError: the runs recorded other tasks or layers.

    Example:
        >>> balance_of([]) is None
        True
    """
    found = [{row["step"]: row["balance"] for row in run.steps if row.get("balance")} for run in runs]
    if not found or not all(found):
        return None
    steps = sorted(set.intersection(*(set(rows) for rows in found)))
    if not steps:
        return None
    # A task that comes later is missing from the first records, and contributed nothing then.
    last = found[0][steps[-1]]
    tasks, layers = tuple(last["tasks"]), tuple(last["layers"])
    values = {kind: np.zeros((len(runs), len(steps), len(layers), len(tasks))) for kind in KINDS}
    for number, rows in enumerate(found):
        for place, step in enumerate(steps):
            row = rows[step]
            if tuple(row["layers"]) != layers or not set(row["tasks"]) <= set(tasks):
                raise ValueError(
                    f"{runs[number].path}: step {step} recorded the balance of other tasks or layers "
                    f"({', '.join(row['tasks'])}; {len(row['layers'])} layers) than {', '.join(tasks)}; "
                    f"{len(layers)} layers."
                )
            columns = [tasks.index(task) for task in row["tasks"]]
            for kind in KINDS:
                values[kind][number, place][:, columns] = row[kind]
    means = {kind: array.mean(axis=0) for kind, array in values.items()}
    return Balance(tasks, layers, np.array(steps), sizes=np.array(last["sizes"], dtype=float), **means)


def balance_section(study: Study) -> Section | None:
    """Gradients and contributions of every group that recorded them; None if no group did."""
    rows, problems = [], []
    for group in study.compared:
        try:
            balance = balance_of(group.runs)
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{group.name}: {error}")
            continue
        if balance is not None:
            many = len(balance.tasks) > COLOURS
            lines = (_heat_steps,) if many else (_layer_figure, _step_figure)
            for draw in (*lines, _heat_figure):
                rows.append(tuple(draw(group, balance, kind) for kind in KINDS))
    if not rows and not problems:
        return None
    text = (
        "What each task pulls at each shared tensor, and what of it arrives in the update of the parameters "
        "(learning rate included): means of absolute values, over recorded steps layer by layer, and over all "
        "entries step by step. Contributions that lie together mean that the tasks move the network equally. "
        "The tables of colour show each task's share of a tensor or step, in percent of the sum over the tasks."
    )
    if problems:
        text += f" Not drawn, because the record cannot be read: {'; '.join(problems)}."
    return Section("Contributions of the tasks", text, tuple(rows))


def balance_png(runs: Iterable[Run], path: Path, *, over: str = "layers") -> Path:
    """Draw gradients and contributions of stored runs as a picture, one column for each group of runs.

    Args:
        runs: runs of one experiment that were trained with ``--balance``; those that differ by the seed are averaged.
        path: the file; its suffix chooses the format, and its folder is made.
        over: ``layers`` (Figure 4 of Hervella et al. 2024) or ``steps`` (Figure 5).

    Returns:
        The path.

    Raises:
        ValueError: no run recorded its balance, they belong to several experiments, or ``over`` is something else.
    """
    if over not in ("layers", "steps"):
        raise ValueError(f"over is {over!r}; choose layers or steps.")
    studies = collect(runs)
    if len(studies) != 1:
        raise ValueError(f"the runs belong to {len(studies)} experiments; give those of one.")
    found = [(group, seen) for group in studies[0].compared if (seen := balance_of(group.runs))]
    if not found:
        raise ValueError("no run recorded what its tasks contribute; train with --balance.")

    # Figure instead of pyplot: no window, no state shared with the caller's own figures.
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(3.2 * len(found) + 0.8, 5.6), layout="constrained")
    grid = canvas.subplots(2, len(found), sharex="col", sharey="row", squeeze=False)
    for column, (group, balance) in enumerate(found):
        for row, kind in enumerate(KINDS):
            axes = grid[row][column]
            for task, name in enumerate(balance.tasks):
                look = {
                    "color": PALETTE["light"][f"m{(task + 1) % COLOURS}"],
                    "label": name.replace("$", r"\$"),
                }
                if over == "layers":
                    shape = SHAPES[_SHAPES[task % len(_SHAPES)]]
                    axes.plot(balance.layers, balance.by_layer(kind)[:, task], marker=shape, **look)
                else:
                    steps, values = _smooth(balance.steps, balance.by_step(kind)[:, task])
                    axes.plot(steps, values, **look)
            axes.set_yscale("log")
            axes.grid(color=PALETTE["light"]["grid"], linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
            if over == "layers":
                axes.tick_params(axis="x", rotation=60, labelsize=7)
            elif row == len(KINDS) - 1:
                axes.set_xlabel("step")
        grid[0][column].set_title(group.name.replace("$", r"\$"), fontsize=9)
    for row, kind in enumerate(KINDS):
        grid[row][0].set_ylabel(_NAMES[kind])
    grid[0][0].legend(frameon=False, fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=130, facecolor="white")
    return Path(path)


def _layer_figure(group: Group, balance: Balance, kind: str) -> Figure:
    values = balance.by_layer(kind)
    layers = [safe(layer) for layer in balance.layers]
    data = [
        _trace(group, balance, task, layers, values[:, task], "lines+markers") for task in _tasks(balance)
    ]
    return Figure(f"{group.name}: {_NAMES[kind]} by layer", data, _layout("", kind, values))


def _step_figure(group: Group, balance: Balance, kind: str) -> Figure:
    curves = [_smooth(balance.steps, balance.by_step(kind)[:, task]) for task in _tasks(balance)]
    data = [
        _trace(group, balance, task, steps.tolist(), values, "lines")
        for task, (steps, values) in enumerate(curves)
    ]
    return Figure(
        f"{group.name}: {_NAMES[kind]} over the steps",
        data,
        _layout("step", kind, np.array([values for _, values in curves])),
    )


def _heat_figure(group: Group, balance: Balance, kind: str) -> Figure:
    """Layers and tasks: the share of each task in the sum over the tasks."""
    shares = _shares(balance.by_layer(kind))
    places = [[f"{layer}, {task}" for task in balance.tasks] for layer in balance.layers]
    if len(balance.tasks) > COLOURS:  # the longer list stands upright, where there is room for its names
        trace = _heat(group, shares.T, [list(column) for column in zip(*places, strict=True)])
        rows, columns = balance.tasks, balance.layers
    else:
        trace, rows, columns = _heat(group, shares, places), balance.layers, balance.tasks
    return _heat_layout(
        f"{group.name}: share of each task, {_NAMES[kind]}", trace, rows, columns, _MOST_ACROSS
    )


def _heat_steps(group: Group, balance: Balance, kind: str) -> Figure:
    """Tasks and steps, where the tasks are too many for lines."""
    curves = [_smooth(balance.steps, balance.by_step(kind)[:, task]) for task in _tasks(balance)]
    steps = [str(step) for step in curves[0][0].tolist()]
    shares = _shares(np.array([values for _, values in curves]).T).T
    places = [[f"{task}, step {step}" for step in steps] for task in balance.tasks]
    trace = _heat(group, shares, places)
    title = f"{group.name}: share over the steps, {_NAMES[kind]}"
    figure = _heat_layout(title, trace, balance.tasks, steps, _MOST_STEPS)
    figure.layout["xaxis"].update(axis("step"))
    return figure


def _shares(values: np.ndarray) -> np.ndarray:
    """In percent of the sum over the last axis; NaN where that is zero."""
    sums = values.sum(axis=-1, keepdims=True)
    return np.asarray(100 * np.divide(values, sums, out=np.full_like(values, np.nan), where=sums > 0))


def _heat(group: Group, shares: np.ndarray, places: Sequence[Sequence[str]]) -> dict[str, Any]:
    rows, columns = shares.shape
    few = shares.size <= _MOST_NUMBERS and columns <= COLOURS
    known = shares[np.isfinite(shares)]
    # Two of forty tasks never reach 100: their differences would not show.
    top = 100.0 if few or not known.size else float(known.max())
    return {
        "type": "heatmap",
        "meta": group.key,
        "x": list(range(columns)),
        "y": list(range(rows)),
        "z": [[short(value) for value in row] for row in shares.tolist()],
        "customdata": [[safe(place) for place in row] for row in places],
        "hovertemplate": "%{customdata}: %{z:.3g} %<extra></extra>",
        "texttemplate": "%{z:.0f}" if few else "",
        "zmin": 0,
        "zmax": short(top),
        "colorscale": [[0, "@card"], [1, "@m1"]],
        "xgap": 1 if few else 0,
        "ygap": 1,
        "showscale": not few,
        "colorbar": {"thickness": 8, "ticksuffix": " %", "outlinewidth": 0, "tickfont": {"color": "@muted"}},
    }


def _heat_layout(
    title: str, trace: dict[str, Any], rows: Sequence[str], columns: Sequence[str], most: int
) -> Figure:
    layout = {
        "xaxis": {**_ticks(columns, most), "showgrid": False},
        "yaxis": {**_ticks(rows, _MOST_DOWN), "showgrid": False, "autorange": "reversed"},
    }
    height = 90 + min(18 * _MOST_DOWN, max(18 * len(rows), 110))
    return Figure(title, [trace], layout, height=height)


def _ticks(names: Sequence[str], most: int) -> dict[str, Any]:
    """An axis of names; by number, because plotly reads equal names as one place, and "1" as a number."""
    shown = [f"{name[: _NAME - 1]}…" if len(name) > _NAME else name for name in names]
    step = -(-len(names) // most)
    return {"tickvals": list(range(0, len(names), step)), "ticktext": [safe(name) for name in shown[::step]]}


def _tasks(balance: Balance) -> range:
    return range(len(balance.tasks))


def _layout(x: str, kind: str, values: np.ndarray) -> dict[str, Any]:
    """With a legend of the tasks: the colours of this figure are not those of the methods."""
    scale: dict[str, Any] = {"type": "log", "exponentformat": "power"} if (values > 0).all() else {}
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    return {
        "xaxis": axis(x),
        "yaxis": axis(_NAMES[kind], **scale),
        "showlegend": True,
        "legend": legend,
        "margin": {"l": 60, "r": 12, "t": 34, "b": 42},
    }


def _trace(
    group: Group, balance: Balance, task: int, x: Sequence[Any], values: np.ndarray, mode: str
) -> dict[str, Any]:
    colour = f"@m{(task + 1) % COLOURS}"
    return {
        "type": "scatter",
        "meta": group.key,
        "name": safe(balance.tasks[task]),
        "x": list(x),
        "y": [short(value) for value in values.tolist()],
        "mode": mode,
        "line": {"color": colour, "width": 2},
        "marker": {"color": colour, "symbol": _SHAPES[task % len(_SHAPES)], "size": 7},
    }


def _smooth(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over neighbouring steps, at most sixty of them."""
    parts = np.array_split(np.arange(len(steps)), min(_POINTS, len(steps)))
    return np.array([steps[part[-1]] for part in parts]), np.array([values[part].mean() for part in parts])
