"""What the finished runs of a sweep say: stored as JSON and CSV, printed as a table with its conditions."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from detente.methods import create, describe
from detente.metrics import delta_m
from detente.records import versions
from detente.records.atomic import write_json, write_text
from detente.records.schema import OUTCOME, OUTCOME_SCHEMA
from detente.statistics import compare, hypervolume, non_dominated, spread
from detente.sweeps.asked import Failure
from detente.sweeps.contenders import Contender
from detente.sweeps.cost import sentences
from detente.sweeps.plan import Choice, Plan, Planned
from detente.sweeps.workers import Outcome
from detente.training.method import seeded_options
from detente.training.order import further_batches

TABLE = "outcome.csv"

_RULES = {
    "delta-m": "the least Δm against the single-task networks",
    "mean": "the best mean of the tasks' main metrics",
    "rank": "the best mean rank over the tasks",
}


def outcome(
    plan: Plan,
    results: Mapping[str, Outcome],
    command: str,
    costs: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Everything that can be said, in plain values.

    Args:
        plan: of the sweep.
        results: of its runs; some may be missing or have failed.
        command: for the record.
        costs: of :func:`detente.sweeps.cost.costs`.
    """
    costs = costs or {}
    choices = plan.choices(results)
    finals = {one.name: plan.finals(one, choices[one.name]) for one in plan.contenders if one.name in choices}
    tested = {
        one.name: values
        for one in plan.contenders
        if one.kind != "single" and (values := _values(plan, finals.get(one.name, ()), results))
    }
    singles = [run for one in plan.contenders if one.kind == "single" for run in finals.get(one.name, ())]
    comparison, hindrance = _comparison(plan, tested, singles, results)
    told = conditions(plan, choices)
    told += [f"Nothing was chosen for {name}: {why}." for name, why in plan.hindered(results).items()]
    told += [f"Nothing was compared: {hindrance}."] if hindrance else []
    told += sentences(costs)
    return {
        "schema": OUTCOME_SCHEMA,
        "experiment": plan.experiment,
        "command": command,
        "versions": versions(),
        "conditions": told,
        "tasks": list(plan.tasks),
        "main_metric": {
            task: {
                "name": metric.name,
                "higher_is_better": metric.higher_is_better,
                "percent": metric.percent,
            }
            for task, metric in plan.main.items()
        },
        "contenders": [
            _contender(plan, one, choices.get(one.name), finals.get(one.name, ()), singles, results)
            for one in plan.contenders
        ],
        "comparison": comparison,
        "cost": {name: dict(cost) for name, cost in costs.items() if "reason" not in cost},
        "front": _front(plan, choices, results, tested),
        "failures": failures(plan, results),
    }


def failures(plan: Plan, results: Mapping[str, Outcome]) -> dict[str, str]:
    """Name of a run to why it did not end, or could not be measured on test data; sorted by name."""
    found = {}
    for name in sorted({planned.name for planned in plan.known(results)}):
        result = results.get(name)
        if isinstance(result, Failure):
            found[name] = result.reason
        elif result is not None and result.get("untested"):
            found[name] = f"not measured on test data: {result['untested']}"
    return found


def conditions(plan: Plan, choices: Mapping[str, Choice]) -> list[str]:
    """What was equal for everyone, and what was not, in sentences."""
    asked = plan.asked
    common = next((one for one in plan.contenders if one.kind == "method"), plan.contenders[0]).config
    tuned = asked.tune_epochs or common.epochs
    scales = sorted({one.config.scale for one in plan.contenders if one.kind == "method"})
    singles = any(one.kind == "single" for one in plan.contenders)
    front = any(one.kind == "scalarisation" for one in plan.contenders)
    most = "" if common.max_steps is None else f" (at most {common.max_steps} steps)"
    told = [
        f"Every contender had {_count(asked.trials, 'tuning run')} of {_count(tuned, 'epoch')}{most} over its declared "
        f"options and the learning rate, with seed 0; what was chosen was trained for "
        f"{_count(common.epochs, 'epoch')} with {_count(asked.seeds, 'seed')}.",
        f"Configurations were chosen on validation data by {_RULES[plan.rule]}"
        + (", single tasks by their own main metric." if singles else "."),
        # A training function of the user's own measures both kinds of data in one go.
        f"Test data were {plan.problem['test data']}."
        if "test data" in plan.problem
        else "Test data were read by the chosen configurations"
        + (" and the weightings of the front" if front else "")
        + " alone, once for each run.",
        "Steps have "
        + (
            "each method's native length."
            if scales == ["native"]
            else f"the length of scale {', '.join(scales)}."
        ),
    ]
    compared = {
        name: count for name, choice in choices.items() if (count := _batches(plan, name, choice)) > 1
    }
    if compared:
        listed = ", ".join(f"{name} {count}" for name, count in compared.items())
        told.append(
            f"Methods that compare the gradients of several batches drew all of them anew for every step: {listed}."
        )
    for one in plan.contenders:
        others = _others(one, common)
        if one.kind == "method" and others:
            told.append(f"{one.name} differs from the first method by {', '.join(others)}.")
    extended = {
        name: choice.runs - asked.trials for name, choice in choices.items() if choice.runs > asked.trials
    }
    if extended:
        listed = ", ".join(f"{name} {count}" for name, count in extended.items())
        told.append(f"Learning rates beyond the edge of the grid were tried besides: {listed}.")
    fewer = {name: choice.runs for name, choice in choices.items() if choice.runs < asked.trials}
    if fewer:
        listed = ", ".join(f"{name} {count}" for name, count in fewer.items())
        told.append(f"Fewer tuning runs, for want of further points: {listed}.")
    at_edge = [name for name, choice in choices.items() if choice.edge]
    if at_edge:
        told.append(f"The best learning rate is still at an edge for: {', '.join(at_edge)}.")
    failed = {name: choice.failed for name, choice in choices.items() if choice.failed}
    if failed:
        listed = ", ".join(f"{name} {count}" for name, count in failed.items())
        told.append(f"Tuning runs that failed or diverged were left out of the choice: {listed}.")
    return told


def write_outcome(folder: Path, found: Mapping[str, Any]) -> None:
    """Store it: `outcome.json`, and `outcome.csv` with a line for every contender."""
    write_json(folder / OUTCOME, found)
    write_text(folder / TABLE, _csv(found))


def _batches(plan: Plan, name: str, choice: Choice) -> int:
    """How many batches a step of the chosen configuration learns from."""
    if plan.own_trainer:  # it draws what it likes
        return 1
    contender = next(one for one in plan.contenders if one.name == name)
    config = plan.finals(contender, choice)[0].config
    return 1 + further_batches(describe(create(config.method, **seeded_options(config))), config)


def _others(one: Contender, common: Any) -> list[str]:
    """What else than the method a further contender does in its own way."""
    own = ("method", "option", "gradients")
    if type(one.config) is not type(common):
        return []
    return [
        f"{field.name} {getattr(one.config, field.name)}"
        for field in fields(common)
        if field.name not in own and getattr(one.config, field.name) != getattr(common, field.name)
    ]


def tables(found: Mapping[str, Any], width: int) -> list[tuple[list[str], list[list[str]]]]:
    """What came out as headers and rows, the best contender first, in as many tables as such a width needs.

    The first says how the contenders compare and what was chosen for them, the others the tasks' main metrics.
    """
    comparison = found["comparison"] or {"methods": {}, "reference": None, "score": "", "columns": {}}
    said = comparison["methods"]
    order = sorted(
        found["contenders"],
        key=lambda entry: (
            entry["kind"] == "single",
            said[entry["name"]]["score"]["mean"] if entry["name"] in said else float("inf"),
        ),
    )
    score = "Δm %" if comparison["score"] == "delta_m" else "change %"
    cost = found["cost"]
    header = ["contender", score, "rank", "verdict", "p", *(["cost"] if cost else []), "lr", "options"]
    rows = []
    for entry in order:
        choice, this = entry["choice"], said.get(entry["name"])
        row = [entry["name"], "", "", "", ""]
        if this is not None:
            best = comparison["best"]["stars"] if entry["name"] == comparison["best"]["best"] else ""
            row[1:] = [_plus_minus(this["score"], 1.0, ".2f") + best, f"{this['mean_rank']:.2f}"]
            row += _against(this)
        if cost:
            row.append(f"{cost[entry['name']]['relative']:.2f}" if entry["name"] in cost else "")
        row += ["nothing", "chosen"] if choice is None else [f"{choice['learning_rate']:g}", _shown(choice)]
        rows.append(row)
    metrics = found["main_metric"]
    columns: list[list[str]] = []
    for task, metric in metrics.items():
        marked = comparison["columns"].get(task, {"best": None, "stars": ""})
        cells = [
            _spread(entry["test"].get(task), metric["percent"])
            + (marked["stars"] if entry["name"] == marked["best"] else "")
            for entry in order
        ]
        unit = " %" if metric["percent"] else ""
        arrow = "↑" if metric["higher_is_better"] else "↓"
        columns.append([f"{task} {metric['name']}{unit} {arrow}", *cells])
    names = [header[0], *(entry["name"] for entry in order)]
    return [(header, rows), *_side_by_side(names, columns, width)]


def _side_by_side(
    names: Sequence[str], columns: Sequence[Sequence[str]], width: int
) -> list[tuple[list[str], list[list[str]]]]:
    """Columns beside the names, as many in each table as fit into the width."""
    found: list[list[Sequence[str]]] = []
    room = 0
    for column in columns:
        needed = max(map(len, column)) + 2
        if not found or needed > room:
            found.append([])
            room = width - max(map(len, names)) - 2
        found[-1].append(column)
        room -= needed
    tables = []
    for group in found:
        lines = [list(line) for line in zip(names, *group, strict=True)]
        tables.append((lines[0], lines[1:]))
    return tables


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s'[: number != 1]}"


def _against(said: Mapping[str, Any]) -> list[str]:
    """Verdict and p value."""
    against = said["against_reference"]
    if against is None:
        return ["reference" if said["verdict"] is None else "", ""]
    adjusted = against["adjusted"]
    return [str(said["verdict"]), "" if adjusted is None else f"{adjusted:.2g}"]


def _shown(choice: Mapping[str, Any]) -> str:
    return ", ".join(choice["options"]) or "defaults"


def _spread(found: Mapping[str, Any] | None, percent: bool) -> str:
    """Mean ± deviation; what is in percent has two decimals, everything else four digits."""
    if found is None:
        return ""
    return _plus_minus(found, 100.0, ".2f") if percent else _plus_minus(found, 1.0, ".4g")


def _plus_minus(found: Mapping[str, Any], factor: float, form: str) -> str:
    mean = f"{found['mean'] * factor:{form}}"
    if found["deviation"] is None:
        return mean
    return f"{mean} ± {found['deviation'] * factor:{'.2g' if form.endswith('g') else form}}"


def _contender(
    plan: Plan,
    one: Contender,
    choice: Choice | None,
    runs: Sequence[Planned],
    singles: Sequence[Planned],
    results: Mapping[str, Outcome],
) -> dict[str, Any]:
    values = _values(plan, runs, results)
    tasks = list(next(iter(values.values()))) if values else []
    test = {}
    for task in tasks:
        found = spread(values[seed][task] for seed in values)
        assert found is not None
        test[task] = {"mean": found.mean, "deviation": found.deviation, "count": found.count}
    return {
        "name": one.name,
        "kind": one.kind,
        "method": one.config.method,
        "gradients": one.config.gradients,
        "choice": None
        if choice is None
        else {
            "learning_rate": choice.point.learning_rate,
            "options": list(choice.point.options),
            "tuning_runs": choice.runs,
            "failed": choice.failed,
            "score": choice.score,
            "edge": choice.edge,
        },
        "runs": [planned.name for planned in runs],
        "test": test,
        "seeds": {str(seed): row for seed, row in values.items()},
        "all_metrics": _all_metrics(runs, results),
        "delta_m": None if one.kind == "single" else _delta_m(plan, runs, singles, results),
    }


def _all_metrics(
    runs: Sequence[Planned], results: Mapping[str, Outcome]
) -> dict[str, dict[str, float | None]]:
    """Task to metric to its mean on test data; None where a run has no finite value."""
    given = [found["metrics"] for run in runs if isinstance(found := results.get(run.name), Mapping)]
    values: dict[str, dict[str, list[float | None]]] = {}
    for metrics in given:
        for task, row in metrics.items():
            for name, value in row.items():
                values.setdefault(task, {}).setdefault(name, []).append(value)
    return {
        task: {
            name: None if None in listed else float(np.mean(np.array(listed, dtype=float)))
            for name, listed in row.items()
        }
        for task, row in values.items()
    }


def _delta_m(
    plan: Plan, runs: Sequence[Planned], singles: Sequence[Planned], results: Mapping[str, Outcome]
) -> dict[str, float] | None:
    """Δm of the mean metrics over all metrics, averaged by task and by metric; None where it means nothing."""
    directions: dict[str, dict[str, bool]] = {}
    for metric in plan.metrics:
        directions.setdefault(metric.task, {})[metric.name] = metric.higher_is_better
    mine, base = _all_metrics(runs, results), _all_metrics(singles, results)
    try:
        return {
            "per_task": delta_m(mine, base, directions, per="task"),  # type: ignore[arg-type]  # refuses None
            "per_metric": delta_m(mine, base, directions, per="metric"),  # type: ignore[arg-type]
        }
    except ValueError:
        return None


def _values(
    plan: Plan, runs: Sequence[Planned], results: Mapping[str, Outcome]
) -> dict[int, dict[str, float]]:
    """Seed to task to main metric on test data, of the runs that have all."""
    found = {}
    for planned in runs:
        result = results.get(planned.name)
        if not isinstance(result, Mapping) or not result["metrics"]:
            continue
        row = {task: values.get(plan.main[task].name) for task, values in result["metrics"].items()}
        if all(value is not None for value in row.values()):
            found[planned.config.seed] = row
    return found


def _comparison(
    plan: Plan,
    tested: Mapping[str, Mapping[int, Mapping[str, float]]],
    singles: Sequence[Planned],
    results: Mapping[str, Outcome],
) -> tuple[dict[str, Any] | None, str]:
    """The tests, or why there are none."""
    if not tested:
        return None, "no chosen configuration has been measured"
    baselines: dict[str, dict[int, float]] = {}
    for run in singles:
        for seed, row in _values(plan, [run], results).items():
            for task, value in row.items():
                baselines.setdefault(task, {})[seed] = value
    try:
        return compare(
            tested,
            higher_is_better={task: metric.higher_is_better for task, metric in plan.main.items()},
            reference=_reference(plan, tested),
            baselines=baselines if set(baselines) == set(plan.tasks) else None,
            generator=np.random.default_rng(0),
        ).to_dict(), ""
    except ValueError as error:  # what a relative change is taken from is not above zero
        return None, str(error)


def _reference(plan: Plan, tested: Mapping[str, Any]) -> str | None:
    """Whom everyone is held against: the tuned scalarisation, or fixed weights where it was not asked for."""
    fixed = [one.name for one in plan.contenders if one.kind == "method" and _has_fixed_weights(one)]
    tuned = [one.name for one in plan.contenders if one.kind == "scalarisation"]
    return next((name for name in (*tuned, *fixed) if name in tested), None)


def _has_fixed_weights(one: Contender) -> bool:
    info = describe(create(one.config.method))
    # Such an optimizer rescales the tasks itself.
    alters = one.config.per_task
    return not (info.needs or info.stateful or alters)


def _front(
    plan: Plan,
    choices: Mapping[str, Choice],
    results: Mapping[str, Outcome],
    tested: Mapping[str, Mapping[int, Mapping[str, float]]],
) -> dict[str, Any] | None:
    """The fixed weightings with their means on test data, and the volumes that fronts and methods dominate."""
    one = next((one for one in plan.contenders if one.kind == "scalarisation"), None)
    if one is None or one.name not in choices:
        return None
    rows: list[dict[str, Any]] = []
    for weights, runs in plan.front(one, choices[one.name]):
        values = _values(plan, runs, results)
        if values:
            rows.append({"weights": list(weights), "test": _means(plan, values), "seeds": len(values)})
    if not rows:
        return None
    higher = [plan.main[task].higher_is_better for task in plan.tasks]
    front = [[row["test"][task] for task in plan.tasks] for row in rows]
    means = {name: [_means(plan, values)[task] for task in plan.tasks] for name, values in tested.items()}
    # The worst value of each task that occurs: every point lies beyond it or on its edge.
    all_points = np.array([*front, *means.values()])
    reference = [
        float(column.min() if up else column.max()) for column, up in zip(all_points.T, higher, strict=True)
    ]
    kept = set(non_dominated(front, higher))
    volume = hypervolume(front, reference, higher).volume
    return {
        "learning_rate": choices[one.name].point.learning_rate,
        "points": [{**row, "dominated": place not in kept} for place, row in enumerate(rows)],
        "reference_point": dict(zip(plan.tasks, reference, strict=True)),
        "hypervolume": volume,
        # What a method's mean adds to the front: zero where some fixed weighting is at least as good in every task.
        "gain": {
            name: hypervolume([*front, point], reference, higher).volume - volume
            for name, point in means.items()
        },
    }


def _means(plan: Plan, values: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    return {task: float(np.mean([row[task] for row in values.values()])) for task in plan.tasks}


def _csv(found: Mapping[str, Any]) -> str:
    tasks = found["tasks"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = [f"{task} {part}" for task in tasks for part in ("mean", "deviation")]
    tests = ["score", "score deviation", "mean rank", "difference to reference", "p", "p adjusted", "verdict"]
    spent = ["seconds_per_step", "relative", "peak_memory_bytes"]
    writer.writerow(
        [
            *("contender", "kind", "learning rate", "options", "tuning runs", "seeds"),
            *("seconds per step", "seconds relative to uniform", "peak memory bytes"),
            *columns,
            *tests,
        ]
    )
    methods = (found["comparison"] or {"methods": {}})["methods"]
    for entry in found["contenders"]:
        choice = entry["choice"] or {"learning_rate": None, "options": [], "tuning_runs": None}
        row = [entry["name"], entry["kind"], choice["learning_rate"], "; ".join(choice["options"])]
        row += [choice["tuning_runs"], len(entry["seeds"])]
        row += [found["cost"].get(entry["name"], {}).get(part) for part in spent]
        for task in tasks:
            test = entry["test"].get(task, {"mean": None, "deviation": None})
            row += [test["mean"], test["deviation"]]
        said = methods.get(entry["name"])
        if said is None:
            writer.writerow([*row, *[None] * len(tests)])
            continue
        against = said["against_reference"]
        row += [said["score"]["mean"], said["score"]["deviation"], said["mean_rank"]]
        row += (
            [None] * 3
            if against is None
            else [against["test"]["difference"], against["test"]["p_value"], against["adjusted"]]
        )
        writer.writerow([*row, said["verdict"]])
    return file.getvalue()
