"""What sweeps cost beside the training itself, and what is left of one that is killed at random moments.

Promised: a run takes at most 2 % longer than a bare loop; 1 000 finished runs are listed in under 1 s and summarised in
under 20 s; 10 000 planned runs take under 500 MB; a sweep killed at 20 random moments ends with identical records.

The bare loop takes the same steps on the same data with the same method, validates after every epoch and tests once. It
keeps no folder, no records, no checkpoints and no weights. Both read the data themselves.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import detente
from benchmarks._nursery import ROOT, Nursery
from benchmarks._timing import interleaved, ratios
from detente.experiments import Experiment, find
from detente.records import find_runs, plain
from detente.sweeps import SweepConfig, plan_of, sweep
from detente.sweeps.plan import Plan, Planned
from detente.sweeps.workers import Job, carry_out
from detente.training import TrainingConfig, evaluate
from detente.training.loop import make_optimizer
from detente.training.order import epoch_order

ROUNDS = 5
KILLS = 20
OVERHEAD = 0.02
LISTED = 1.0
SUMMARISED = 20.0
MEMORY = 500e6

_FEW = (
    "--methods",
    "uniform",
    "mgda@features",
    "cagrad@features",
    "--trials",
    "3",
    "--lrs",
    "0.01",
    "0.1",
    "--seeds",
    "2",
    "--front",
    "4",
)
KILLED = (
    "sweep",
    str(ROOT / "examples" / "diabetes.py") + ":Diabetes",
    *_FEW,
    "--epochs",
    "8",
    "--batch-size",
    "64",
    "--no-cost",
)
_PASSING = ("seconds", "seconds_per_step", "seconds_per_epoch", "started", "command", "peak_memory_bytes")


# ---- a run beside a bare loop


def bare(experiment: Experiment, config: TrainingConfig) -> dict[str, dict[str, float]]:
    """The training that a run does, written down by hand; test metrics of the best epoch."""
    problem = experiment.build(config)
    torch.manual_seed(config.seed)
    model = problem.model()
    method = detente.create(config.method, tasks=tuple(problem.tasks), **config.method_options())
    optimizer = make_optimizer(model, config)
    data = problem.split("train")
    best, kept = float("-inf"), model.state_dict()
    for epoch in range(config.epochs):
        for indices in torch.split(epoch_order(len(data), config.seed, epoch), config.batch_size):
            inputs, labels = data.batch(indices)
            output = model(inputs)
            detente.backward(
                problem.losses(output, labels),
                method,
                features=problem.features(output),
            )
            optimizer.step()
            optimizer.zero_grad()
        found = evaluate(problem, model, "validation")
        mean = statistics.mean(found[task][name] for task, name in problem.main_metric.items())
        if mean > best:
            best, kept = mean, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)
    return evaluate(problem, model, "test")


def overhead(rounds: int = ROUNDS, epochs: int = 3) -> list[float]:
    """Seconds of runs over seconds of bare loops, in turns; both end with the same test metrics."""
    experiment = find("multimnist")
    config = replace(
        experiment.config(), method="mgda", gradients="features", epochs=epochs, learning_rate=0.05, threads=1
    )
    measured: dict[str, Any] = {}

    def run() -> None:
        with tempfile.TemporaryDirectory() as place:
            job = Job("run", Path(place) / "run", "multimnist", config, None, "benchmark", {}, Path.cwd())
            measured["run"] = carry_out(job)["metrics"]  # type: ignore[index]

    def loop() -> None:
        measured["bare"] = bare(experiment, config)

    processor: dict[str, list[float]] = {"run": [], "bare": []}

    def counted(name: str, work: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            started = time.process_time()
            work()
            processor[name].append(time.process_time() - started)

        return call

    torch.set_num_threads(1)
    seconds = interleaved({"run": counted("run", run), "bare": counted("bare", loop)}, rounds)
    same = measured["run"] == measured["bare"]
    middle, low, high = ratios(seconds, "run", "bare")
    used, least, most = ratios(processor, "run", "bare")
    print(f"bare loop of {epochs} epochs    {statistics.median(seconds['bare']):8.2f} s")
    print(f"run of a sweep            {statistics.median(seconds['run']):8.2f} s")
    print(
        f"ratio                     {middle:8.3f}   ({low:.3f} to {high:.3f}), promised at most {1 + OVERHEAD}"
    )
    print(f"ratio of processor time   {used:8.3f}   ({least:.3f} to {most:.3f})")
    print(f"equal test metrics        {'yes' if same else 'NO':>8}")
    return [middle, low, high]


# ---- many runs


def _plan(methods: Sequence[str], trials: int, seeds: int) -> Plan:
    experiment = find("toy")
    asked = SweepConfig(tuple(methods), lrs=(1e-4, 1e-3, 1e-2), trials=trials, seeds=seeds, singles=False)

    def parse(flags: Sequence[str]) -> TrainingConfig:
        names = [flag.removeprefix("--").replace("-", "_") for flag in flags[::2]]
        return experiment.config(**dict(zip(names, flags[1::2], strict=True)))

    return plan_of(experiment, asked, parse)


def _made_up(planned: Planned) -> dict[str, Any]:
    draw = np.random.default_rng(list(planned.name.encode()))
    losses = {task: {"loss": float(draw.random())} for task in ("first", "second")}
    return losses


def finished(folder: Path, count: int) -> tuple[Experiment, Plan]:
    """A sweep with so many finished runs whose numbers are made up; their records have the usual size."""
    methods = ("uniform", "rlw", "dwa", "uncertainty", "stch", "famo", "mgda", "cagrad", "fairgrad", "imtl")
    plan = _plan(methods, count // len(methods) - 2, 3)
    step = {
        "names": ["first", "second"],
        "losses": [0.1, 0.2],
        "weights": [0.5, 0.5],
        "cosines": [[1.0, 0.1]] * 2,
    }
    steps = "".join(
        json.dumps({"step": n, "epoch": 1 + n // 2, **step, "norms": [1.0, 2.0], "seconds": 0.01}) + "\n"
        for n in range(1, 201)
    )
    results: dict[str, Any] = {}
    while wanted := plan.next(results):
        for planned in wanted:
            values = _made_up(planned)
            metrics = values if planned.config.test else {}
            results[planned.name] = {"validation": values, "metrics": metrics, "seconds": 60.0}
            _write(folder / "runs" / planned.name, planned, values, metrics, steps)
    return find("toy"), plan


def _write(place: Path, planned: Planned, values: Any, metrics: Any, steps: str) -> None:
    place.mkdir(parents=True, exist_ok=True)
    metric = [{"task": task, "name": "loss", "higher_is_better": False, "percent": False} for task in values]
    config = {
        **{
            "schema": 1,
            "experiment": "toy",
            "label": planned.contender.name,
            "method": planned.config.method,
        },
        **{"options": planned.config.method_options(), "gradients": "exact", "tasks": list(values)},
        **{"main_metric": dict.fromkeys(values, "loss"), "metrics": metric, "seed": planned.config.seed},
        **{"config": plain(asdict(planned.config)), "versions": {}, "command": "", "started": ""},
    }
    epochs = [
        {"epoch": n, "step": 2 * n, "train_loss": {"first": 0.1, "second": 0.2}, "validation": values}
        for n in range(1, 101)
    ]
    (place / "config.json").write_text(json.dumps(config))
    (place / "epochs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in epochs))
    (place / "steps.jsonl").write_text(steps)
    result = {
        "schema": 1,
        "status": "done",
        "epochs": 100,
        "validation": values,
        "metrics": metrics,
        "seconds": 60.0,
    }
    (place / "result.json").write_text(json.dumps(result))


def many(count: int = 1000) -> tuple[float, float]:
    """Seconds to list and to summarise so many finished runs."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        experiment, plan = finished(folder, count)
        started = time.perf_counter()
        runs = find_runs(folder)
        listed = time.perf_counter() - started
        started = time.perf_counter()
        found = sweep(experiment, plan, folder, command="benchmark", quiet=True)
        summarised = time.perf_counter() - started
        assert found["comparison"] is not None and not found["failures"]
    print(f"{len(runs)} finished runs listed      {listed:8.2f} s, promised under {LISTED} s")
    print(f"{len(runs)} finished runs summarised  {summarised:8.2f} s, promised under {SUMMARISED} s")
    return listed, summarised


def planning(count: int = 10_000) -> tuple[float, float]:
    """Bytes at the highest moment of planning and scheduling so many runs, and seconds of asking what comes next."""
    methods = sorted(
        name for name, info in detente.methods().items() if "gramian" in info.needs or not info.needs
    )
    half = -(-count // len(methods) // 2)

    def scheduled() -> tuple[int, list[float]]:
        plan = _plan(methods, half, half + 1)
        results: dict[str, Any] = {}
        seconds = []
        while wanted := plan.next(results):
            for place, planned in enumerate(wanted):
                values = _made_up(planned)
                asks = place % 100 == 99
                if asks:
                    plan.next(results)
                results[planned.name] = {"validation": values, "metrics": values, "seconds": 60.0}
                if asks:  # as a sweep does after every run
                    started = time.perf_counter()
                    plan.next(results)
                    seconds.append(time.perf_counter() - started)
        return len(results), seconds

    tracemalloc.start()
    runs, _ = scheduled()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    _, seconds = scheduled()
    middle, slowest = 1e3 * statistics.median(seconds), 1e3 * max(seconds)
    print(f"{runs} planned runs              {peak / 1e6:8.1f} MB, promised under {MEMORY / 1e6:.0f} MB")
    print(f"what comes next of them       {middle:8.1f} ms after a run has ended ({slowest:.1f} ms at most)")
    return float(peak), max(seconds)


# ---- kills


def without_passing(value: Any) -> Any:
    """A record without seconds, and without what names folder or moment."""
    if isinstance(value, dict):
        return {key: without_passing(entry) for key, entry in value.items() if key not in _PASSING}
    return [without_passing(entry) for entry in value] if isinstance(value, list) else value


def left_behind(folder: Path) -> dict[str, Any]:
    """Every record and every weight of a sweep, by the name of its file; of other files, that they are there."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = without_passing(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            found[name] = [without_passing(json.loads(line)) for line in lines]
        elif path.suffix == ".csv":
            found[name] = path.read_text(encoding="utf-8")
        elif path.name.startswith("weights-"):
            state = torch.load(path, weights_only=True)
            found[name] = {key: tensor.tolist() for key, tensor in state.items()}
        elif path.is_file() and path.name not in (".lock", "checkpoint.pt"):
            found[name] = "there"
    return found


def kill_sweep(nursery: Nursery, arguments: Sequence[str], folder: Path, kills: int, seed: int = 0) -> int:
    """Start a sweep, kill it after a random while, start it again, so many times; then let it end.

    Returns:
        How often it was killed: fewer times if it ended before.

    Raises:
        RuntimeError: it ended with an error.
    """
    draw = random.Random(seed)
    killed, longest = 0, 0.4
    command = [*arguments, "--out", str(folder)]
    while killed < kills:
        code = nursery.run(command, draw.uniform(0.02, longest))
        if code == 0:
            return killed
        if code != -9:
            raise RuntimeError(f"the sweep ended with {code} instead of being killed")
        killed += 1
    if nursery.run(command, None) != 0:
        raise RuntimeError("the sweep did not end well after the last kill")
    return killed


def kills(count: int = KILLS) -> bool:
    """Whether a sweep killed so often leaves the same records and weights as an undisturbed one."""
    with tempfile.TemporaryDirectory() as place, Nursery() as nursery:
        undisturbed, disturbed = Path(place) / "undisturbed", Path(place) / "disturbed"
        started = time.perf_counter()
        assert nursery.run([*KILLED, "--out", str(undisturbed)], None) == 0
        seconds = time.perf_counter() - started
        killed = 0
        for attempt in range(10):  # a sweep that ended too soon for so many kills is begun anew
            shutil.rmtree(disturbed, ignore_errors=True)
            killed = kill_sweep(nursery, KILLED, disturbed, count, seed=attempt)
            if killed == count:
                break
        same = left_behind(disturbed) == left_behind(undisturbed)
        runs = len(list(undisturbed.glob("runs/*/result.json")))
    print(f"a sweep of {runs} runs ({seconds:.1f} s), killed at {killed} random moments: ", end="")
    print("identical records and weights" if same else "THE RECORDS DIFFER")
    return same


def main() -> None:
    """Print all of it."""
    overhead()
    many()
    planning()
    kills()
