"""What the finished runs of a sweep say: stored as JSON and CSV, printed as a table with its conditions."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detente.methods import create, describe
from detente.records import versions
from detente.records.atomic import write_json, write_text
from detente.statistics import compare, hypervolume, non_dominated
from detente.sweeps.asked import Failure
from detente.sweeps.contenders import Contender
from detente.sweeps.plan import Choice, Plan, Planned
from detente.sweeps.workers import Outcome

FILE = "outcome.json"
TABLE = "outcome.csv"
SCHEMA = 1

_RULES = {
    "delta-m": "the least Δm against the single-task networks",
    "mean": "the best mean of the tasks' main metrics",
    "rank": "the best mean rank over the tasks",
}


def outcome(plan: Plan, results: Mapping[str, Outcome], command: str) -> dict[str, Any]:
    """Everything that can be said, in plain values.

    Args:
        plan: of the sweep.
        results: of its runs; some may be missing or have failed.
        command: for the record.
    """
    choices = plan.choices(results)
    finals = {one.name: plan.finals(one, choices[one.name]) for one in plan.contenders if one.name in choices}
    tested = {
        one.name: values
        for one in plan.contenders
        if one.kind != "single" and (values := _values(plan, finals.get(one.name, ()), results))
    }
    return {
        "schema": SCHEMA,
        "experiment": plan.experiment,
        "command": command,
        "versions": versions(),
        "conditions": conditions(plan, choices),
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
            _contender(plan, one, choices.get(one.name), finals, results) for one in plan.contenders
        ],
        "comparison": _comparison(plan, tested, finals, results),
        "front": _front(plan, choices, results, tested),
        "failures": {name: found.reason for name, found in results.items() if isinstance(found, Failure)},
    }


def conditions(plan: Plan, choices: Mapping[str, Choice]) -> list[str]:
    """What was equal for everyone, and what was not, in sentences."""
    asked = plan.asked
    first = plan.contenders[0].config
    tuned = asked.tune_epochs or first.epochs
    scales = sorted({one.config.scale for one in plan.contenders if one.kind == "method"})
    told = [
        f"Every contender had {asked.trials} tuning runs of {_count(tuned, 'epoch')} over its declared options and the "
        f"learning rate, with seed 0; what was chosen was trained for {_count(first.epochs, 'epoch')} with "
        f"{_count(asked.seeds, 'seed')}.",
        f"Configurations were chosen on validation data by {_RULES[asked.rule]}"
        + (", single tasks by their own main metric." if asked.singles and len(plan.tasks) > 1 else "."),
        "Test data were read by the chosen configurations alone, once for each run.",
        "Steps have "
        + (
            "each method's native length."
            if scales == ["native"]
            else f"the length of scale {', '.join(scales)}."
        ),
    ]
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
    unsettled = [one.name for one in plan.contenders if one.name not in choices]
    if unsettled:
        told.append(f"Nothing could be chosen for: {', '.join(unsettled)}.")
    return told


def write_outcome(folder: Path, found: Mapping[str, Any]) -> None:
    """Store it: `outcome.json`, and `outcome.csv` with a line for every contender."""
    write_json(folder / FILE, found)
    write_text(folder / TABLE, _csv(found))


def table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, the best first; with one seed there are no spreads and no tests."""
    metrics = found["main_metric"]
    comparison = found["comparison"]
    header = ["contender", "learning rate", "options"]
    header += [f"{task} {metric['name']}" for task, metric in metrics.items()]
    header += ["Δm %" if comparison and comparison["score"] == "delta_m" else "change %", "mean rank"]
    reference = comparison["reference"] if comparison else None
    header += [f"against {reference}"] if reference else []
    rows: list[tuple[float, list[str]]] = []
    for entry in found["contenders"]:
        choice = entry["choice"]
        row = [
            entry["name"],
            *(["-", "-"] if choice is None else [f"{choice['learning_rate']:g}", _shown(choice)]),
        ]
        for task, metric in metrics.items():
            row.append(_spread(entry["test"].get(task), metric["percent"]))
        said = (comparison or {"methods": {}})["methods"].get(entry["name"])
        if said is None:
            rows.append((float("inf"), [*row, "", "", *([""] if reference else [])]))
            continue
        score = said["score"]
        spread = "" if score["deviation"] is None else f" ± {score['deviation']:.2f}"
        row += [f"{score['mean']:.2f}{spread}", f"{said['mean_rank']:.2f}"]
        if reference:
            row.append(_against(said))
        rows.append((said["score"]["mean"], row))
    return header, [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s'[: number != 1]}"


def _against(said: Mapping[str, Any]) -> str:
    against = said["against_reference"]
    if against is None:
        return "the reference"
    adjusted = against["adjusted"]
    return f"{said['verdict']} (p {adjusted:.2g})" if adjusted is not None else str(said["verdict"])


def _shown(choice: Mapping[str, Any]) -> str:
    return ", ".join(choice["options"]) or "defaults"


def _spread(found: Mapping[str, Any] | None, percent: bool) -> str:
    """Mean ± deviation; what is in percent has two decimals, everything else four digits."""
    if found is None:
        return "-"
    factor, form = (100.0, ".2f") if percent else (1.0, ".4g")
    mean = f"{found['mean'] * factor:{form}}"
    return mean if found["deviation"] is None else f"{mean} ± {found['deviation'] * factor:.2g}"


def _contender(
    plan: Plan,
    one: Contender,
    choice: Choice | None,
    finals: Mapping[str, Sequence[Planned]],
    results: Mapping[str, Outcome],
) -> dict[str, Any]:
    from detente.statistics import spread

    runs = finals.get(one.name, ())
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
    }


def _values(
    plan: Plan, runs: Sequence[Planned], results: Mapping[str, Outcome]
) -> dict[int, dict[str, float]]:
    """Seed to task to main metric on test data, of the runs that have all."""
    found = {}
    for planned in runs:
        result = results.get(planned.name)
        if not isinstance(result, Mapping) or not result["metrics"]:
            continue
        row = {task: values[plan.main[task].name] for task, values in result["metrics"].items()}
        if all(value is not None for value in row.values()):
            found[planned.config.seed] = row
    return found


def _comparison(
    plan: Plan,
    tested: Mapping[str, Mapping[int, Mapping[str, float]]],
    finals: Mapping[str, Sequence[Planned]],
    results: Mapping[str, Outcome],
) -> dict[str, Any] | None:
    if not tested:
        return None
    singles: dict[str, dict[int, float]] = {}
    for one in plan.contenders:
        if one.kind == "single":
            for seed, row in _values(plan, finals.get(one.name, ()), results).items():
                for task, value in row.items():
                    singles.setdefault(task, {})[seed] = value
    whole = set(singles) == set(plan.tasks)
    return compare(
        tested,
        higher_is_better={task: metric.higher_is_better for task, metric in plan.main.items()},
        reference=_reference(plan, tested),
        baselines=singles if whole else None,
        generator=np.random.default_rng(0),
    ).to_dict()


def _reference(plan: Plan, tested: Mapping[str, Any]) -> str | None:
    """Whom everyone is held against: the tuned scalarisation, or fixed weights where it was not asked for."""
    fixed = [
        one.name
        for one in plan.contenders
        if one.name in tested
        and (
            one.kind == "scalarisation"
            or (one.kind == "method" and not describe(create(one.config.method)).needs)
        )
        and one.config.optimizer not in ("mao", "mtadam")
    ]
    tuned = [one.name for one in plan.contenders if one.kind == "scalarisation" and one.name in tested]
    return next(iter([*tuned, *fixed]), None)


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
    writer.writerow(
        ["contender", "kind", "learning rate", "options", "tuning runs", "seeds", *columns, *tests]
    )
    methods = (found["comparison"] or {"methods": {}})["methods"]
    for entry in found["contenders"]:
        choice = entry["choice"] or {"learning_rate": None, "options": [], "tuning_runs": None}
        row = [entry["name"], entry["kind"], choice["learning_rate"], "; ".join(choice["options"])]
        row += [choice["tuning_runs"], len(entry["seeds"])]
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
