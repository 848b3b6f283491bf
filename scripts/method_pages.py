"""Pages about the methods, as Markdown: one for each, made from its docstring and declarations, and a table of all.

Used by the docs hook while the docs are built; nothing of it is stored. A method appears here by being registered.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from docstring_markdown import Docstring, capital, code, escaped, prose, read_docstring, table

import detente
from detente import MethodInfo, Option

PICTURES = "images/methods"
TIMES = "results/method-times.csv"
NONE_DRAWN = "Not drawn yet: `python scripts/make_method_pictures.py {name}` draws it."

NEEDS = {
    "losses": "losses",
    "gramian": "Gramian",
    "jacobian": "gradients",
    "blocks": "Gramian per block",
    "activations": "activations",
    "after_step": "losses after the step",
    "epoch": "ends of epochs",
}
SCALES = {
    "sum": "of the summed gradient's order",
    "mean": "of the mean gradient's order",
    "simplex": "of a weighted mean of the gradients (weights sum to 1)",
    "unit": "unit length",
    "own": "its own",
}
STATIONARY = {
    "hull": "when 0 lies in the convex hull of the gradients",
    "affine": "when 0 lies in the affine hull of the gradients",
    "cone": "when 0 is a strictly positive combination of the gradients",
}
PERMUTATION = {"exact": "plays no part", "distribution": "plays no part in distribution", None: "matters"}
GIVES = {
    "weights": "one weight per task",
    "blocks": "weights that differ between blocks of parameters",
    "direction": "a direction that no weights of the tasks express",
}


# ---- what a method declares, in words


def cost_of(info: MethodInfo) -> tuple[str, str]:
    """Backward and forward passes of a step for T tasks, and the memory it takes beside plain training."""
    passes = "1 backward, as the plain sum"
    memory = "none"
    if info.takes_gradients:
        features = ", or 1 with `features=`" if "features" in info.spaces else ""
        passes, memory = f"T backwards through the shared part{features}", "T × P"
    if info.batches > 1:
        passes += f", on up to {info.batches} batches"
    if "after_step" in info.needs:
        passes += "; 1 more forward if `after_step` is called"
    return passes, memory


def needs_of(info: MethodInfo) -> str:
    """What it must be given."""
    words = [NEEDS.get(need, need.replace("batches:", "") + " batches") for need in sorted(info.needs)]
    return ", ".join(words) or "nothing"


def yes(value: bool) -> str:
    """Yes or no."""
    return "yes" if value else "no"


def tick(value: bool) -> str:
    """A mark or nothing."""
    return "✓" if value else ""


def homogeneity_of(info: MethodInfo) -> str:
    """How the direction scales with the gradients."""
    known: dict[float | None, str] = {None: "follows no power of s", 0: "does not change", 1: "scales by s"}
    return known.get(info.homogeneity) or f"scales by s to the power {info.homogeneity:g}"


def declared(info: MethodInfo) -> str:
    """The declarations as a table."""
    return table(
        [
            ("property", "declared"),
            ("needs", needs_of(info)),
            ("can be solved on", ", ".join(f"`{space}`" for space in sorted(info.spaces))),
            ("gives", GIVES[info.gives]),
            ("remembers something from step to step", yes(info.stateful)),
            ("length of its direction", SCALES[info.native_scale]),
            ("own parameters of a task take", "the plain gradient of their loss" if info.heads == "own"
             else "the gradient times the task's weight"),
            ("all gradients times s > 0: the direction", homogeneity_of(info)),
            ("never points against a task (inner product ≥ 0)", yes(info.nonconflict)),
            ("the direction vanishes exactly", STATIONARY.get(info.stationary or "", "no such law")),
            ("weights are non-negative and sum to 1", yes(info.simplex)),
            ("the order of the tasks", PERMUTATION[info.permutation]),
        ]
    )  # fmt: skip


def options_table(options: Mapping[str, Option], meanings: Mapping[str, str]) -> str:
    """Default, choices, default search grid and meaning of every option."""
    if not options:
        return "None."
    rows: list[tuple[str, ...]] = [("option", "default", "choices", "a search tries", "meaning")]
    for name, option in options.items():
        listed = [
            ", ".join(code(repr(entry)) for entry in entries) for entries in (option.choices, option.search)
        ]
        rows.append((code(name), code(repr(option.default)), *listed, meanings.get(name, "")))
    return table(rows)


# ---- measured and drawn


def read_times(docs: Path) -> dict[str, dict[int, float]]:
    """Method to number of tasks to seconds of one call, from docs/results/method-times.csv; empty without it."""
    found: dict[str, dict[int, float]] = {}
    if (docs / TIMES).exists():
        with (docs / TIMES).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault(row["method"], {})[int(row["T"])] = float(row["seconds"])
    return found


def microseconds(seconds: float | None) -> str:
    """Two digits are what a timing carries."""
    return "" if seconds is None else f"{float(f'{seconds * 1e6:.2g}'):,.0f} µs"


def read_paths(docs: Path) -> dict[str, Any]:
    """What was written beside the pictures; no methods without it."""
    stored = docs / PICTURES / "paths.json"
    return dict(json.loads(stored.read_text("utf-8"))) if stored.exists() else {"methods": {}}


def path_section(name: str, paths: Mapping[str, Any], picture: bool) -> str:
    """The picture and, in words and numbers, what it shows."""
    entry = paths["methods"].get(name)
    if entry is None or not picture:
        return NONE_DRAWN.format(name=name)
    first, second = paths["factors"]
    lines = [
        f"![Paths of {name} on the toy problem](../{PICTURES}/{name}.png)",
        f"*{paths['steps']} steps of Adam at {paths['lr']:g} from five starts (rings) to their ends (dots), with the "
        f"default options, on the [toy problem](../reference.md#toy-problem) with its losses multiplied by {first:g} "
        f"and {second:g}. Left: grey lines join points with an equal sum of both losses, each in its own unit. Right: "
        "the same paths among the losses. Published pictures take 35 000 steps at 0.001.*",
    ]
    if entry["raised"]:
        one, two = paths["raised_by"]
        lines.append(
            f"This method looks at the losses, and those of the toy become negative: it saw them raised by {one:g} "
            f"and {two:g}, which changes no gradient."
        )
    arrived = sum(distance <= paths["near"] for distance in entry["distance_to_pareto_set"])
    lines.append(
        f"{arrived} of {len(entry['ends'])} paths ended within {paths['near']:g} of the Pareto set, a curve from "
        "(-7, -8.4) to (7, -8.4)."
    )
    rows: list[tuple[str, ...]] = [("start", "end", "distance to the Pareto set", "what happened")]
    for number, start in enumerate(entry["starts"]):
        happened = []
        if entry["refused"][number]:
            happened.append(f"{entry['refused'][number]} steps refused")
        if entry["stationary"][number]:
            happened.append(f"{entry['stationary'][number]} steps with a direction of zero")
        if entry["stopped"][number]:
            happened.append("stopped: " + prose(entry["stopped"][number]))
        x, y = (round(value, 2) + 0.0 for value in entry["ends"][number])  # no "-0.00"
        rows.append(
            (
                f"({start[0]:g}, {start[1]:g})",
                f"({x:.2f}, {y:.2f})",
                f"{entry['distance_to_pareto_set'][number]:.2f}",
                "; ".join(happened),
            )
        )
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    return "\n\n".join([*lines, table(rows)])


# ---- pages


def method_page(
    info: MethodInfo,
    written: Docstring,
    *,
    paths: Mapping[str, Any],
    picture: bool,
    times: Mapping[int, float] | None = None,
) -> str:
    """The page of one method."""
    passes, memory = cost_of(info)
    held = "" if memory == "none" else f"; {memory} numbers for the gradients, with P shared parameters"
    cost = [written.cost, f"By what it declares: {passes}{held}."]
    if times:
        listed = ", ".join(f"T = {tasks}: {microseconds(times[tasks])}" for tasks in sorted(times))
        cost.append(f"Measured, one call of `detente.combine` with P = 2000: {listed}.")
    errors = "\n".join(f"- `{kind}`: {text}" for kind, text in written.errors)
    sections = [
        f"# {info.name}",
        f"**{written.summary}**",
        written.text,
        f"Source: {escaped(info.source)}.",
        "## When to use it" if written.when else "",
        written.when,
        "## On the toy problem",
        path_section(info.name, paths, picture),
        "## Options",
        f'```python\nmethod = detente.create("{info.name}")\n```',
        options_table(info.options, written.options),
        "## Cost",
        " ".join(filter(None, cost)),
        "## What it declares",
        "For the default options; the tests hold every method to these.",
        declared(info),
        "## Errors" if errors else "",
        errors,
        "## Example" if written.example else "",
        f"```pycon\n{written.example}\n```" if written.example else "",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def wrappers_page(wrappers: Mapping[str, Any], names: Iterable[str]) -> str:
    """The methods around methods, on one page."""
    sections = [
        "# Wrappers",
        "A wrapper is a method around a method: it is created from one, passed on and saved as one, and can be "
        "wrapped again. What it declares follows from what it is wrapped around. Where the test of `inexact` and "
        "`adaptive` comes from stands on the page about [guards](../guards.md).",
    ]
    for name, info in wrappers.items():
        written = read_docstring(info.factory, names)
        example = f"```pycon\n{written.example}\n```" if written.example else ""
        sections += [
            f"## {name}",
            f"**{written.summary}**",
            written.text,
            f"Source: {escaped(info.source)}." if info.source else "",
            f"When to use it: {written.when[:1].lower()}{written.when[1:]}" if written.when else "",
            f"Cost: {written.cost[:1].lower()}{written.cost[1:]}" if written.cost else "",
            options_table(info.options, written.options),
            example,
        ]
    return "\n\n".join(filter(None, sections)) + "\n"


def index_page(
    infos: Mapping[str, MethodInfo],
    written: Mapping[str, Docstring],
    times: Mapping[str, Mapping[int, float]],
) -> str:
    """The table of all methods: ideas and cost, then declarations."""
    columns = sorted({tasks for row in times.values() for tasks in row} & {2, 8, 40})
    costs = [("method", "idea", "cost of a step", "memory", *(f"T = {tasks}" for tasks in columns))]
    laws = [
        (
            "method", "needs", "solved on", "gives", "state", "length", "× s", "no conflict", "zero on", "simplex",
            "order", "own",
        )
    ]  # fmt: skip
    for name, info in infos.items():
        link = code(name, frozenset(infos))
        power = (
            ""
            if info.homogeneity is None
            else f"s^{info.homogeneity:g}".replace("s^1", "s").replace("s^0", "1")
        )
        title, _, idea = written[name].summary.partition(": ")
        measured = (microseconds(times.get(name, {}).get(tasks)) for tasks in columns)
        costs.append((link, capital(idea or title), *cost_of(info), *measured))
        laws.append(
            (
                link,
                needs_of(info),
                "everywhere" if len(info.spaces) == 3 else ", ".join(sorted(info.spaces)),
                info.gives,
                tick(info.stateful),
                info.native_scale,
                power,
                tick(info.nonconflict),
                info.stationary or "",
                tick(info.simplex),
                {"exact": "free", "distribution": "free in distribution"}.get(
                    info.permutation or "", "matters"
                ),
                "plain" if info.heads == "own" else "weighted",
            )
        )
    measured_words = (
        " The last columns are the measured time of one call of `detente.combine` with P = 2000."
        if columns
        else ""
    )
    return (
        "\n\n".join(
            [
                "---\nhide: [toc]\n---",
                "# All methods",
                f"{len(infos)} methods, made from what each declares of itself when these pages are built. For a "
                "choice between them see [Which method should I use?](../which-method.md); "
                "[wrappers](wrappers.md) go around any of them.",
                "## Ideas and cost",
                "T tasks, P shared parameters. Backwards are those through the shared part of the network, memory "
                f"is what the task gradients take.{measured_words}",
                table(costs),
                "## What they need and promise",
                LEGEND,
                table(laws),
            ]
        )
        + "\n"
    )


LEGEND = """\
For the default options; the tests hold every method to its row. An empty cell: no such law.

- **solved on**: where the problem can be solved: `exact` (all shared parameters), `features` (a shared representation),
  `layer` (some shared parameters, `solve_on=`).
- **state**: the method remembers something from step to step.
- **length** of the direction: as that of the summed or mean gradient, of weights that sum to 1 (`simplex`), 1 (`unit`),
  or its own.
- **× s**: what the direction is multiplied by when all gradients are multiplied by s > 0.
- **no conflict**: the direction has no negative inner product with any task's gradient.
- **zero on**: the direction vanishes exactly when 0 lies in the convex hull (`hull`) or the affine hull (`affine`) of
  the gradients, or is a strictly positive combination of them (`cone`).
- **simplex**: the weights are non-negative and sum to 1.
- **order** of the tasks: plays no part (free), none in distribution, or matters.
- **own** parameters of a task take the plain gradient of its loss, or one weighted by the task's weight."""


def pages(docs: Path) -> dict[str, str]:
    """Path below the docs folder to Markdown, for every page made here; the table first, then by name."""
    infos = {name: info for name, info in detente.methods().items() if name_is_ours(name)}
    names = frozenset(infos)
    written = {name: read_docstring(infos[name].factory, names - {name}) for name in infos}
    times, paths = read_times(docs), read_paths(docs)
    found = {"methods/index.md": index_page(infos, written, times)}
    for name, info in infos.items():
        picture = (docs / PICTURES / f"{name}.png").exists()
        found[f"methods/{name}.md"] = method_page(
            info, written[name], paths=paths, picture=picture, times=times.get(name)
        )
    found["methods/wrappers.md"] = wrappers_page(detente.wrappers.registered(), names)
    return found


def name_is_ours(name: str) -> bool:
    """False for what a process registered beside the package's own methods."""
    return type(detente.create(name)).__module__.startswith("detente.")
