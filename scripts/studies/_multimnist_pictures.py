"""The pictures of the MultiMNIST study: the plane of the two digits, and Δm of every contender."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detente.reports.style import PALETTE

_INK = PALETTE["light"]
_COLOURS = {
    "reference": _INK["ink"],
    "better": _INK["m3"],
    "worse": _INK["m2"],
    "no difference shown": _INK["m1"],
    "too few seeds": _INK["m1"],
}
# Not by colour alone.
_SHAPES = {"reference": "*", "better": "^", "worse": "v"}
# Named in the plane wherever they are, besides whoever is outermost; everybody is in the table.
_NAMED = ("uniform", "mgda (exact)", "mgda (features)", "aligned-mtl (exact)", "mao")


def plane(outcome: Mapping[str, Any], file: Path) -> None:
    """Means on test data: contenders, the front of fixed weightings, the single tasks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first, second = outcome["tasks"]
    compared = (outcome["comparison"] or {"methods": {}, "reference": None})["methods"]
    reference = (outcome["comparison"] or {"reference": None})["reference"]
    alone = {
        next(iter(entry["test"])): entry["test"][next(iter(entry["test"]))]["mean"]
        for entry in outcome["contenders"]
        if entry["kind"] == "single" and entry["test"]
    }
    tested = {
        entry["name"]: entry
        for entry in outcome["contenders"]
        if entry["kind"] != "single" and len(entry["test"]) == 2
    }
    points = {
        name: tuple(100 * entry["test"][task]["mean"] for task in (first, second))
        for name, entry in tested.items()
    }
    kept = _in_sight(points)
    canvas = Figure(figsize=(8.0, 5.4), layout="constrained")
    FigureCanvasAgg(canvas)  # measures how wide a name is
    axes = canvas.add_subplot()
    axes.grid(color=_INK["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for task, draw, along in ((first, axes.axvline, "x"), (second, axes.axhline, "y")):
        if task in alone:
            value = 100 * alone[task]
            draw(value, color=_INK["single"], linestyle="--", linewidth=1.3, zorder=1)
            _line_label(axes, along, value, f"{task} alone {value:.2f}")
    front = outcome["front"]["points"] if outcome["front"] else []
    if front:
        listed = sorted(front, key=lambda point: point["weights"][0])
        x, y = ([100 * point["test"][task] for point in listed] for task in (first, second))
        axes.plot(x, y, "-", color=_INK["muted"], linewidth=2, alpha=0.8, zorder=2, label="fixed weightings")
        axes.plot(x, y, "o", color="white", markeredgecolor=_INK["muted"], markersize=5, zorder=3)
        for across, up, point in zip(x, y, listed, strict=True):
            if any(np.allclose((across, up), point) for point in points.values()):  # a name stands there
                continue
            axes.annotate(
                f"{point['weights'][0]:.2g}",
                (across, up),
                xytext=(-3, -4),
                textcoords="offset points",
                ha="right",
                va="top",
                fontsize=7,
                color=_INK["muted"],
                zorder=3,
                annotation_clip=True,
            )
    for name in kept:
        verdict = "reference" if name == reference else compared.get(name, {}).get("verdict")
        colour = _COLOURS.get(verdict or "", _INK["m1"])
        spreads = [100 * (tested[name]["test"][task]["deviation"] or 0) for task in (first, second)]
        axes.errorbar(
            points[name][0],
            points[name][1],
            xerr=spreads[0],
            yerr=spreads[1],
            fmt=_SHAPES.get(verdict or "", "o"),
            color=colour,
            markersize=13 if name == reference else 6,
            markeredgecolor="white",
            elinewidth=0.7,
            ecolor=(colour, 0.28),
            zorder=5 if name == reference else 4,
        )
    _limit(axes, [points[name] for name in kept], alone, (first, second))
    axes.set(xlabel=f"{first} digit: test accuracy (%)", ylabel=f"{second} digit: test accuracy (%)")
    _label(canvas, axes, points, _together(points, _worth_naming(points, kept, reference), reference))
    _legend(
        canvas,
        {"reference" if n == reference else compared.get(n, {}).get("verdict") or "not tested" for n in kept},
        reference,
        bool(front),
    )
    outside = [name for name in points if name not in kept]
    if outside:
        axes.set_title(
            f"{len(outside)} contender{'s'[: len(outside) != 1]} far below and not shown: {_short(outside)}",
            fontsize=8,
            loc="left",
            color=_INK["muted"],
        )
    canvas.savefig(file, dpi=160, facecolor="white")


def forest(outcome: Mapping[str, Any], file: Path) -> None:
    """Δm of every contender, the best on top: mean, bootstrap interval, seeds."""
    from matplotlib.figure import Figure

    comparison = outcome["comparison"] or {"methods": {}, "reference": None, "score": ""}
    said = comparison["methods"]
    order = sorted(said, key=lambda name: said[name]["score"]["mean"])
    canvas = Figure(figsize=(8.0, 1.3 + 0.24 * max(len(order), 4)), layout="constrained")
    axes = canvas.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color=_INK["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    if not order:
        axes.text(0.5, 0.5, "nothing was compared", ha="center")
        canvas.savefig(file, dpi=150, facecolor="white")
        return
    low, high = _reach(said, order)
    axes.set_xlim(low, high)
    reference = comparison["reference"]
    if reference in said:
        axes.axvline(said[reference]["score"]["mean"], color=_INK["ink"], linewidth=1, linestyle=":")
    if comparison["score"] == "delta_m" and low < 0 < high:
        axes.axvline(0, color=_INK["single"], linewidth=1.2, linestyle="--")
        axes.text(
            0, -0.9, "single tasks", ha="center", va="bottom", fontsize=8, color=_INK["single"], clip_on=False
        )
    for place, name in enumerate(order):
        one = said[name]
        mean, interval = one["score"]["mean"], one["interval"]
        verdict = "reference" if name == reference else one["verdict"] or ""
        colour = _COLOURS.get(verdict, _INK["m1"])
        if mean > high:
            axes.annotate(
                f"{mean:+.1f} →",
                (high, place),
                ha="right",
                va="center",
                fontsize=8,
                color=colour,
                annotation_clip=False,
            )
            continue
        if interval["low"] is not None:
            axes.plot(
                [interval["low"], interval["high"]], [place, place], color=colour, linewidth=2.2, alpha=0.55
            )
        axes.plot(one["scores"], [place] * len(one["scores"]), ".", color=colour, markersize=3.5, alpha=0.7)
        axes.plot(
            mean,
            place,
            "*" if name == reference else "o",
            color=colour,
            markersize=10 - 4 * (name != reference),
        )
    axes.set_yticks(range(len(order)), order, fontsize=8)
    axes.set_ylim(len(order) - 0.4, -1.0)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(
        "Δm against the single tasks (%), left is better"
        if comparison["score"] == "delta_m"
        else "change of the main metrics (%), left is better"
    )
    verdicts = {"reference" if name == reference else said[name]["verdict"] for name in order}
    _legend(canvas, verdicts, reference, False)
    canvas.savefig(file, dpi=150, facecolor="white")


# ---- what is in sight


def _in_sight(points: Mapping[str, tuple[float, ...]]) -> list[str]:
    """The contenders without those that lie so far below the others that these would be one spot."""
    if not points:
        return []
    values = np.array(list(points.values()))
    middle = np.median(values, axis=0)
    room = 4 * np.maximum(np.median(np.abs(values - middle), axis=0), 0.25)
    return [name for name, value in zip(points, values, strict=True) if (value >= middle - room).all()]


def _reach(said: Mapping[str, Any], order: Sequence[str]) -> tuple[float, float]:
    """The scores that are shown in full: those far worse than the rest are told as numbers."""
    means = np.array([said[name]["score"]["mean"] for name in order])
    middle = float(np.median(means))
    room = 6 * max(float(np.median(np.abs(means - middle))), 0.25)
    near = [name for name in order if said[name]["score"]["mean"] <= middle + room]
    ends = [
        value
        for name in near
        for value in (*said[name]["scores"], said[name]["interval"]["low"], said[name]["interval"]["high"])
        if value is not None
    ]
    low, high = min(*ends, 0.0) if len(ends) > 1 else min(ends[0], 0.0), max(*ends, 0.0)
    margin = 0.04 * (high - low) or 1.0
    return low - margin, high + margin


def _limit(
    axes: Any, points: Sequence[tuple[float, ...]], alone: Mapping[str, float], tasks: tuple[str, str]
) -> None:
    """Around the contenders and the single tasks; the ends of the front, where one task is given up, lie outside."""
    for place, (task, limit) in enumerate(zip(tasks, (axes.set_xlim, axes.set_ylim), strict=True)):
        values = [point[place] for point in points] + ([100 * alone[task]] if task in alone else [])
        if values:
            room = 0.08 * (max(values) - min(values)) or 0.5
            limit(min(values) - room, max(values) + room)


def _worth_naming(
    points: Mapping[str, tuple[float, ...]], kept: Sequence[str], reference: str | None
) -> list[str]:
    """Whom nobody in sight beats in both tasks, the reference, and the best known."""
    outermost = [
        name
        for name in kept
        if not any(
            all(a >= b for a, b in zip(points[other], points[name], strict=True))
            and points[other] != points[name]
            for other in kept
        )
    ]
    return list(dict.fromkeys([name for name in (reference, *outermost, *_NAMED) if name and name in kept]))


def _together(
    points: Mapping[str, tuple[float, ...]], names: Sequence[str], reference: str | None
) -> dict[str, str]:
    """Name to what is written beside its point: of several with the same results one line, the reference first."""
    groups: dict[tuple[float, ...], list[str]] = {}
    for name in names:
        groups.setdefault(points[name], []).append(name)
    return {
        members[0]: " = ".join(sorted(members, key=lambda name: name != reference))
        for members in groups.values()
    }


def _label(canvas: Any, axes: Any, points: Mapping[str, tuple[float, ...]], names: Mapping[str, str]) -> None:
    """Each name where it covers the fewest points and other names."""
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Text

    canvas.draw_without_rendering()
    taken: list[Any] = []
    dots = axes.transData.transform(np.array(list(points.values())) if points else np.zeros((0, 2)))
    for name, written in names.items():
        best = None
        for radius in (8, 16, 28, 42, 60):
            for across, up in ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0)):
                text = axes.annotate(
                    written,
                    points[name],
                    xytext=(radius * across, radius * up),
                    textcoords="offset points",
                    ha={1: "left", 0: "center", -1: "right"}[across],
                    va={1: "bottom", 0: "center", -1: "top"}[up],
                    fontsize=8,
                    color=_INK["ink"],
                    zorder=6,
                    arrowprops={"arrowstyle": "-", "color": _INK["muted"], "linewidth": 0.6, "shrinkB": 3},
                )
                text.update_positions(canvas.canvas.get_renderer())
                box = Text.get_window_extent(text, canvas.canvas.get_renderer())  # without its arrow
                inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
                cost = 10 * sum(box.overlaps(other) for other in taken) + 100 * (not inside) + radius / 100
                cost += sum(box.contains(*dot) for dot in dots)
                if best is None or cost < best[0]:
                    if best is not None:
                        best[1].remove()
                    best = (cost, text, box)
                else:
                    text.remove()
        if best is not None:
            best[1].set_path_effects([withStroke(linewidth=2.5, foreground="white")])
            taken.append(best[2])


def _line_label(axes: Any, along: str, value: float, text: str) -> None:
    style = {"color": _INK["single"], "fontsize": 8}
    if along == "x":
        transform = axes.get_xaxis_transform()
        axes.text(value, 0.01, f"{text} ", rotation=90, ha="right", va="bottom", transform=transform, **style)
    else:
        axes.text(0.01, value, text, ha="left", va="bottom", transform=axes.get_yaxis_transform(), **style)


def _legend(canvas: Any, verdicts: set[str], reference: str | None, front: bool) -> None:
    from matplotlib.lines import Line2D

    entries = []
    if reference is not None:
        entries.append(
            Line2D(
                [],
                [],
                color=_COLOURS["reference"],
                marker="*",
                markersize=10,
                linestyle="none",
                label=reference,
            )
        )
    for verdict in ("better", "no difference shown", "worse", "too few seeds"):
        if verdict in verdicts:
            entries.append(
                Line2D(
                    [],
                    [],
                    color=_COLOURS[verdict],
                    marker=_SHAPES.get(verdict, "o"),
                    markersize=6,
                    linestyle="none",
                    label=verdict,
                )
            )
    if front:
        entries.append(Line2D([], [], color=_INK["muted"], linewidth=2, label="fixed weightings"))
    canvas.legend(
        handles=entries, loc="outside lower center", ncols=len(entries) or 1, frameon=False, fontsize=8
    )


def _short(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 5 else f"{', '.join(names[:4])} and {len(names) - 4} more"
