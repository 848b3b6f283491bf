"""Carry out a sweep: start what the plan asks for, keep what ends, and say what came out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from detente.experiments.registry import Experiment
from detente.methods import create
from detente.records import RecordError, read_run
from detente.records.atomic import plain, write_json
from detente.records.lock import locked
from detente.sweeps.asked import Failure, SweepConfig
from detente.sweeps.contenders import BadSweep, Contender, configured, contenders
from detente.sweeps.outcome import outcome, write_outcome
from detente.sweeps.plan import Plan, Planned
from detente.sweeps.watch import State, watched
from detente.sweeps.workers import InProcess, Job, OnRay, Outcome, Workers
from detente.training.config import TrainingConfig

PLAN = "sweep.json"
RUNS = "runs"
# What may differ between the command that began a sweep and one that goes on with it.
_MAY_CHANGE = ("workers", "address", "retries")
# What the sweep itself decides.
_DECIDED = ("method", "option", "learning_rate", "seed", "test")


class AnotherSweep(ValueError):
    """The folder holds a sweep under other conditions."""


def plan_of(
    experiment: Experiment, asked: SweepConfig, parse: Callable[[Sequence[str]], TrainingConfig]
) -> Plan:
    """Everything that may have to run; whatever is wrong with it is found here.

    Args:
        experiment: what is learned; its data are read.
        asked: the sweep.
        parse: from flags of `detente run` to a configuration.

    Raises:
        BadSweep: unknown methods, options, spaces or grids, or conditions that do not go together; all are listed.
    """

    def parsed(flags: Sequence[str]) -> TrainingConfig:
        config = parse(flags)
        # One thread for each run, so that its numbers do not depend on what runs beside it.
        return replace(config, threads=1) if config.threads is None else config

    base = parsed(())
    set_here = [name for name in _DECIDED if getattr(base, name) != getattr(type(base)(), name)]
    if set_here:
        raise BadSweep(
            [
                f"--{name.replace('_', '-')} is decided by the sweep: use --methods, --grid, --lrs, --seeds."
                for name in set_here
            ]
        )
    problem = experiment.build(base)
    found = contenders(asked, parsed, problem.tasks, experiment.alone)
    main = {
        metric.task: metric for metric in problem.metrics if problem.main_metric[metric.task] == metric.name
    }
    try:
        plan = Plan(
            asked, found, asked.lrs or experiment.learning_rates, experiment.name, problem.tasks, main
        )
    except ValueError as error:
        raise BadSweep([str(error)]) from error
    mistakes = dict.fromkeys(
        told
        for one in found
        for point in plan.points[one.name]
        for told in _mistakes(one, point, problem.tasks)
    )
    if mistakes:
        raise BadSweep(list(mistakes))
    return plan


def sweep(
    experiment: Experiment,
    plan: Plan,
    folder: Path,
    *,
    command: str,
    quiet: bool = False,
) -> dict[str, Any]:
    """Carry out a plan; the same call goes on where another one was ended, at whatever moment.

    Args:
        experiment: what is learned.
        plan: from :func:`plan_of`.
        folder: of the sweep: the plan, a folder for every run, the outcome.
        command: for the record.
        quiet: show no progress.

    Returns:
        The outcome as stored.

    Raises:
        AnotherSweep: the folder holds a sweep under other conditions.
        FolderInUse: another process carries out a sweep there.
        UnwritableFolder: the folder cannot be written.
    """
    with ExitStack() as held:
        held.enter_context(locked(folder))
        _same_conditions(folder, plan, command)
        (folder / RUNS).mkdir(exist_ok=True)
        results = stored_results(folder)
        workers: Workers = held.enter_context(closing(_workers(plan, folder)))
        _carry_out(experiment, plan, folder, results, workers, quiet)
        found = outcome(plan, results, command)
        write_outcome(folder, found)
    return found


def stored_results(folder: Path) -> dict[str, Outcome]:
    """The outcome of every run that ended, by the name of its folder; a record that cannot be read is a failure.

    Nothing is written or removed.
    """
    found: dict[str, Outcome] = {}
    for path in sorted((folder / RUNS).glob("*/result.json")):
        try:
            result = read_run(path.parent).result
        except RecordError as error:
            found[path.parent.name] = Failure(f"its record cannot be read: {error}")
            continue
        if result is not None:
            found[path.parent.name] = _kept(result)
    return found


def _carry_out(
    experiment: Experiment,
    plan: Plan,
    folder: Path,
    results: dict[str, Outcome],
    workers: Workers,
    quiet: bool,
) -> None:
    """Until no run is wanted any more."""
    running: dict[str, Planned] = {}
    files = _files(experiment, plan)
    state = State(plan.size(), plan.asked.workers)
    wanted = plan.next(results)
    state.total = max(state.total, len(wanted))
    _count(state, plan, results)
    with watched(state, [one.name for one in plan.contenders], enabled=not quiet) as show:
        while wanted or running:
            for planned in wanted[: workers.free]:
                workers.start(_job(experiment, planned, folder, files))
                running[planned.name] = planned
                state.running[planned.contender.name] += 1
            show()
            ended = workers.wait(1.0)
            for name, found in ended:
                planned = running.pop(name)
                state.running[planned.contender.name] -= 1
                before = results.get(name)
                results[name] = found if isinstance(found, Failure) else _kept(found)
                if isinstance(found, Mapping) and before is None:
                    state.seconds.append(found["seconds"])
            if ended:
                _count(state, plan, results)
                show()
                wanted = plan.next(results)
            wanted = [planned for planned in wanted if planned.name not in running]


def _count(state: State, plan: Plan, results: Mapping[str, Outcome]) -> None:
    """How far each contender is."""
    state.done.clear()
    state.failed.clear()
    for planned in plan.known(results):
        found = results.get(planned.name)
        if isinstance(found, Failure):
            state.failed[planned.contender.name] += 1
        elif found is not None:
            state.done[planned.contender.name] += 1
    state.total = max(state.total, state.ended + state.running.total())


def _kept(result: Mapping[str, Any]) -> dict[str, Any]:
    """What plan and outcome need of a result."""
    names = ("validation", "metrics", "seconds", "seconds_per_step", "peak_memory_bytes", "selected_epochs")
    return {name: result.get(name) for name in names} | {"metrics": result.get("metrics") or {}}


def _workers(plan: Plan, folder: Path) -> Workers:
    asked = plan.asked
    if asked.workers == 1 and asked.address is None:
        return InProcess()
    threads = max((one.config.threads or 1) * one.config.devices for one in plan.contenders)
    return OnRay(asked.workers, threads, asked.address, asked.retries, folder)


def _job(experiment: Experiment, planned: Planned, folder: Path, files: Mapping[str, bytes]) -> Job:
    place = folder.resolve() / RUNS / planned.name
    label = planned.contender.name
    flags = flags_of(planned.config)
    return Job(
        planned.name,
        place,
        experiment.name,
        planned.config,
        label,
        shlex.join(["detente", "run", experiment.name, *flags, "--out", str(place)]),
        files,
    )


def flags_of(config: TrainingConfig) -> list[str]:
    """The flags of `detente run` that give a configuration.

    Example:
        >>> flags_of(TrainingConfig(method="mgda", nesterov=True))
        ['--method', 'mgda', '--nesterov']
    """
    found: list[str] = []
    for field in fields(config):
        value, default = getattr(config, field.name), getattr(type(config)(), field.name)
        if value == default:
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            for entry in value:
                found += [f"--{flag}", str(entry)]
        else:
            found += [f"--{flag}", str(value)]
    return found


def _mistakes(contender: Contender, point: Any, tasks: Sequence[str]) -> list[str]:
    """What the method or the configuration of a run refuses."""
    try:
        config = configured(contender, point)
        names = tasks if contender.kind != "single" else None
        create(config.method, tasks=names, **config.method_options())
    except (ValueError, TypeError) as error:
        return [f"{contender.name}: {error}"]
    return []


def _same_conditions(folder: Path, plan: Plan, command: str) -> None:
    """Write the plan, or see that the one there is the same.

    Raises:
        AnotherSweep: it is not.
    """
    conditions = plain(
        {
            "experiment": plan.experiment,
            "asked": {name: value for name, value in asdict(plan.asked).items() if name not in _MAY_CHANGE},
            "contenders": {one.name: plain(asdict(one.config)) for one in plan.contenders},
        }
    )
    path = folder / PLAN
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        differing = [
            f"{key}: {value!r} there, {conditions['asked'].get(key)!r} here"
            for key, value in there["asked"].items()
            if value != conditions["asked"].get(key)
        ]
        if there["experiment"] != conditions["experiment"]:
            differing.insert(0, f"experiment: {there['experiment']} there, {conditions['experiment']} here")
        if not differing and there["contenders"] != conditions["contenders"]:
            differing = ["options of the training, or the methods' own, were others"]
        if differing:
            raise AnotherSweep(
                f"{folder} holds a sweep under other conditions ({'; '.join(differing)}). Its command was: "
                f"{there['command']}. Repeat that, or choose another --out: finished runs there are kept."
            )
        return
    write_json(path, {**conditions, "command": command})


def _files(experiment: Experiment, plan: Plan) -> dict[str, bytes]:
    """The user's own files by name."""
    names = {experiment.name, *(one.config.method for one in plan.contenders)}
    paths = [Path(name.rpartition(":")[0]) for name in names if name.rpartition(":")[0].endswith(".py")]
    return {str(path.resolve()): path.read_bytes() for path in paths}
