"""What a step of every chosen configuration costs beside a step with fixed equal weights, measured when all is done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from detente.experiments.registry import Experiment
from detente.records import RecordError
from detente.records.atomic import write_json
from detente.sweeps.plan import Choice, Plan
from detente.training.config import TrainingConfig
from detente.training.cost import measure_cost
from detente.training.progress import progress

FILE = "cost.json"
SCHEMA = 1
# A process that has less of a core than this shares it.
_QUIET = 0.9


def costs(
    experiment: Experiment, plan: Plan, choices: Mapping[str, Choice], folder: Path, quiet: bool
) -> dict[str, Any]:
    """Name of a contender to its :class:`detente.training.cost.Cost`, or to ``{"reason": why there is none}``.

    One is measured after the other, in this process, in turns with the reference. What was measured for the same
    configuration before stands in ``cost.json``; without that file all are measured anew.

    Raises:
        RecordError: the file cannot be read.
    """
    assert plan.base is not None, "made by plan_of"
    kept = _stored(folder / FILE)
    found: dict[str, Any] = {}
    wanted = [one for one in plan.contenders if one.name in choices]
    with progress("cost of a step", len(wanted), enabled=not quiet) as report:
        for number, one in enumerate(wanted, 1):
            planned = plan.finals(one, choices[one.name])[0]
            if planned.name not in kept:
                kept[planned.name] = _measured(experiment, planned.config, plan.base)
                write_json(folder / FILE, {"schema": SCHEMA, "costs": kept})
            found[one.name] = kept[planned.name]
            report(number, one.name)
    return found


def sentences(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How the costs were measured, and what may be wrong with them."""
    measured = {name: cost for name, cost in found.items() if "reason" not in cost}
    told = []
    if measured:
        told.append(
            "Costs were measured when all runs were done: steps of the chosen configuration in turns with steps of the "
            "method uniform, in one process; medians of the turns."
        )
    busy = [name for name, cost in measured.items() if cost["processor_share"] < _QUIET]
    if busy:
        told.append(
            f"Other work shared the processor while costs were measured ({', '.join(busy)}); delete {FILE} and repeat "
            "the command on a quiet machine."
        )
    reasons: dict[str, list[str]] = {}
    for name, cost in found.items():
        if "reason" in cost:
            reasons.setdefault(cost["reason"], []).append(name)
    return told + [f"No cost of {', '.join(names)}: {reason}." for reason, names in reasons.items()]


def _measured(experiment: Experiment, config: TrainingConfig, reference: TrainingConfig) -> dict[str, Any]:
    if experiment.trainer is not None:
        return {"reason": "what trains is not détente's loop, so that its steps cannot be told apart"}
    if config.devices > 1:
        return {"reason": "it trains on several devices"}
    try:
        return asdict(measure_cost(experiment.build, config, reference))
    except (ValueError, RuntimeError) as error:
        return {"reason": " ".join(str(error).split())}


def _stored(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_bytes())
        if stored["schema"] != SCHEMA:
            raise ValueError(f"it has schema {stored['schema']!r}, this version reads {SCHEMA}")
        return dict(stored["costs"])
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(
            f"{path} cannot be used ({error}); delete it to measure the costs again."
        ) from error
