"""Carry out a sweep: start what the plan asks for, keep what ends, and say what came out."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from detente.experiments.registry import Experiment
from detente.methods import create, describe
from detente.records import RecordError, differences, read_run
from detente.records.atomic import plain, remove_unfinished, write_json
from detente.records.lock import locked
from detente.sweeps.asked import Failure, SweepConfig
from detente.sweeps.contenders import BadSweep, Contender, Point, configured, contenders, decided
from detente.sweeps.cost import costs
from detente.sweeps.outcome import outcome, write_outcome
from detente.sweeps.plan import VOLATILE, Plan, Planned, file_of
from detente.sweeps.watch import State, watched
from detente.sweeps.workers import InProcess, Job, OnRay, Outcome, Workers
from detente.training.config import TrainingConfig
from detente.training.order import absent_options, further_batches
from detente.values import MethodInfo

SCHEMA = 1
PLAN = "sweep.json"
RUNS = "runs"
# What may differ between the command that began a sweep and one that goes on with it.
_MAY_CHANGE = ("workers", "address", "retries", "cost")
# What may be added to: no run that is there depends on it. (The values of a grid are told with each contender.)
_MAY_GROW = ("asked.methods", "asked.also", "asked.grid", "asked.seeds")


class AnotherSweep(ValueError):
    """The folder holds a sweep under other conditions."""


class SweepStopped(RuntimeError):
    """No run can go on, such as with a full disk."""


def plan_of(
    experiment: Experiment,
    asked: SweepConfig,
    parse: Callable[[Sequence[str]], TrainingConfig],
    flags: Sequence[str] = (),
) -> Plan:
    """Everything that may have to run; whatever is wrong with it is found here.

    Args:
        experiment: what is learned; its data are read.
        asked: the sweep.
        parse: from flags of `detente run` to a configuration; ValueError where it does not understand them.
        flags: that hold for every run.

    Raises:
        BadSweep: unknown methods, options, spaces or grids, or conditions that do not go together; all are listed.
        OSError: the data cannot be read.
    """

    def parsed(further: Sequence[str]) -> TrainingConfig:
        config = parse((*flags, *further))
        # One thread for each run, so that its numbers do not depend on what runs beside it.
        return replace(config, threads=1) if config.threads is None else config

    mistakes = [
        f"{flag} is decided by the sweep: use --methods, --also, --grid, --lrs, --seeds."
        for flag in decided(flags)
    ]
    mistakes += asked.mistakes()
    try:
        base = parsed(())
        problem = experiment.build(base)
    except (ValueError, TypeError) as error:
        raise BadSweep([*mistakes, str(error)]) from error
    tasks = tuple(problem.tasks)
    losses = tuple(getattr(problem, "loss_names", tasks))
    found, wrong = contenders(asked, parsed, tasks, experiment.alone, losses)
    mistakes += wrong
    mistakes += [
        f"{one.name} trains {alone} alone, the others do not."
        for one in found
        if one.kind == "method" and (alone := experiment.task_of(one.config)) is not None and len(tasks) > 1
    ]
    if asked.choose == "delta-m" and asked.singles and len(tasks) == 1:
        mistakes.append("--choose delta-m compares several tasks with single ones; there is one task only.")
    lrs = asked.lrs or tuple(experiment.learning_rates)
    paths = {path for one in found for path in (file_of(experiment.name), file_of(one.config.method)) if path}
    marks = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in sorted(paths)}
    plan = None
    if asked.trials >= len(lrs) > 0 and not asked.mistakes():
        plan = Plan(asked, found, lrs, experiment.name, tasks, problem.metrics, problem.main_metric, marks)
        for one in found:
            names = losses if one.kind != "single" else None
            mistakes += _refused(one, plan.points[one.name], names, tasks, experiment.trainer is not None)
    elif asked.trials < len(lrs):
        mistakes.append(
            f"--trials is {asked.trials}, and there are {len(lrs)} learning rates: each is tried at least once."
        )
    if mistakes or plan is None:
        raise BadSweep(list(dict.fromkeys(mistakes)))
    describe = getattr(
        problem, "describe", dict
    )  # a protocol with a trainer of its own may have nothing to say
    plan.problem = plain(describe())
    plan.base, plan.own_trainer = base, experiment.trainer is not None
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
        SweepStopped: no run can go on; the same call will, once the reason is gone.
        RecordError: the record of the sweep itself cannot be read.
        OSError: the folder cannot be written.
    """
    folder = folder.resolve()
    with ExitStack() as held:
        held.enter_context(locked(folder))
        remove_unfinished(folder)
        _same_conditions(folder, plan, command)
        (folder / RUNS).mkdir(exist_ok=True)
        results = stored_results(folder, plan)
        if plan.next(results):
            with closing(_workers(plan, folder)) as workers:
                _carry_out(experiment, plan, folder, results, workers, quiet)
        # The workers are gone, so that nothing of the sweep runs beside what is measured.
        measured = costs(experiment, plan, plan.choices(results), folder, quiet) if plan.asked.cost else {}
        found = outcome(plan, results, command, measured)
        write_outcome(folder, found)
    return found


def stored_results(folder: Path, plan: Plan) -> dict[str, Outcome]:
    """The outcome of every run that ended, by the name of its folder; a record that cannot be read is a failure.

    Nothing is written or removed.
    """
    found: dict[str, Outcome] = {}
    for path in sorted((folder / RUNS).glob("*/result.json")):
        try:
            result = read_run(path.parent).result
            if result is not None:
                found[path.parent.name] = kept(result, plan)
        except (RecordError, OSError) as error:
            found[path.parent.name] = Failure(f"its record cannot be used: {error}")
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
    contents = {path: Path(path).read_bytes() for path in plan.marks}
    known = plan.known(results)
    wanted = plan.lacking(known, results)
    state = State(folder / RUNS, plan.size(), plan.asked.workers)
    state.see(plan, known, results)
    running = state.running
    with watched(state, [one.name for one in plan.contenders], enabled=not quiet):
        while wanted or running:
            for planned in wanted[: workers.free]:
                workers.start(_job(experiment, planned, folder, contents))
                running[planned.name] = planned
            ended = workers.wait(1.0)
            for name, found in ended:
                del running[name]
                if isinstance(found, Failure) and found.everywhere:
                    raise SweepStopped(
                        f"the sweep stopped at {folder / RUNS / name}: {found.reason} Finished runs are kept, and the "
                        "same command goes on."
                    )
                results[name] = _merged(results.get(name), found, plan)
            if ended:
                known = plan.known(results)
                wanted = plan.lacking(known, results)
                state.see(plan, known, results)
            wanted = [planned for planned in wanted if planned.name not in running]


def _merged(before: Outcome | None, found: Outcome, plan: Plan) -> Outcome:
    """What is known of a run after it ended once more."""
    if isinstance(found, Failure):
        # What a run showed in tuning does not go away because it could not be measured on test data.
        return {**before, "untested": found.reason} if isinstance(before, Mapping) else found
    try:
        return kept(plain(found), plan)
    except RecordError as error:
        return Failure(str(error))


def kept(result: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """What plan and outcome need of a result, the same whether it was just made or read.

    Raises:
        RecordError: it has no validation metrics by which it could be chosen.
    """
    validation = result.get("validation")
    if not validation or any(
        plan.main[task].name not in values if task in plan.main else True
        for task, values in validation.items()
    ):
        raise RecordError(
            "the result has no main metrics of these tasks on validation data, as those of earlier versions; move the "
            "folder away to run it again."
        )
    return {
        "validation": validation,
        "metrics": result.get("metrics") or {},
        "seconds": result.get("seconds") or 0.0,
    }


def _workers(plan: Plan, folder: Path) -> Workers:
    asked = plan.asked
    if asked.workers == 1 and asked.address is None:
        return InProcess()
    threads = max(one.config.threads or 1 for one in plan.contenders)
    return OnRay(asked.workers, threads, asked.address, asked.retries, folder)


def _job(experiment: Experiment, planned: Planned, folder: Path, contents: Mapping[str, bytes]) -> Job:
    place = folder / RUNS / planned.name
    command = ["detente", "run", experiment.name, *flags_of(planned.config), "--out", str(place)]
    return Job(
        name=planned.name,
        folder=place,
        experiment=experiment.name,
        config=planned.config,
        label=planned.contender.name,
        command=shlex.join(command),
        files=contents,
        place=Path.cwd(),
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


def _refused(
    contender: Contender,
    points: Sequence[Point],
    names: Sequence[str] | None,
    tasks: Sequence[str],
    own_trainer: bool,
) -> list[str]:
    """What the method or the configuration of a contender's runs refuses."""
    try:
        if contender.kind != "single":
            contender.config.baselines(tasks)
        for point in {point.options: point for point in points}.values():
            config = configured(contender, point)
            method = create(config.method, tasks=names, **config.method_options())
            if not own_trainer:
                further_batches(describe(method), config)
    except (ValueError, TypeError) as error:
        return [f"{contender.name}: {error}"]
    return []


def _same_conditions(folder: Path, plan: Plan, command: str) -> None:
    """Write the plan, or see that the one there is the same, or a part of it.

    Raises:
        AnotherSweep: it is neither.
        RecordError: it cannot be read.
    """
    conditions = plain(
        {
            "schema": SCHEMA,
            "experiment": plan.experiment,
            "asked": {name: value for name, value in asdict(plan.asked).items() if name not in _MAY_CHANGE},
            "learning_rates": plan.lrs,
            "contenders": {
                one.name: {
                    "config": {k: v for k, v in asdict(one.config).items() if k not in VOLATILE},
                    "tuned": one.space,
                }
                for one in plan.contenders
            },
            "problem": plan.problem,
            "files": plan.marks,
        }
    )
    path = folder / PLAN
    if not path.exists():
        write_json(path, {**conditions, "command": command})
        return
    try:
        there = json.loads(path.read_bytes())
        known = there["schema"] == SCHEMA and isinstance(there["command"], str)
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(
            f"{path} cannot be read ({type(error).__name__}: {error}); restore it, or move it away: finished runs are "
            "kept."
        ) from error
    if not known:
        raise RecordError(
            f"{path} has schema {there['schema']!r}, and this version of detente reads {SCHEMA}: go on with the "
            "version that wrote it, or choose another --out."
        )
    added = [f"contenders.{name}" for name in conditions["contenders"] if name not in there["contenders"]]
    files = [f"files.{name}" for name in conditions["files"] if name not in there["files"]]
    # A sweep of an earlier version, which did not know some options, goes on under what they stand for.
    known_as = {
        f"contenders.{one.name}.config.{key}": value
        for one in plan.contenders
        for key, value in absent_options(_described(one.config), one.config).items()
    }
    found = differences(there, conditions, ignore=("command", *_MAY_GROW, *added, *files), defaults=known_as)
    seeds = there["asked"]["seeds"]
    if conditions["asked"]["seeds"] < seeds:
        found.append(("asked.seeds", seeds, conditions["asked"]["seeds"]))
    if found:
        shown = [f"{key} is {one!r} there and {other!r} here" for key, one, other in found[:6]]
        shown += [f"and {len(found) - 6} more"] if len(found) > 6 else []
        raise AnotherSweep(
            f"{folder} holds a sweep under other conditions: {'; '.join(shown)}. Its command was: {there['command']}. "
            "Repeat that (further methods and more seeds may be added to it), or choose another --out."
        )
    if differences(there, conditions, ignore=("command",), defaults=known_as):
        write_json(path, {**conditions, "command": command})


def _described(config: TrainingConfig) -> MethodInfo:
    return describe(create(config.method, **config.method_options()))
