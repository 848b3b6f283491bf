"""Runs of a study: resumable, several at a time, each a run folder like any other."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from detente.experiments import find
from detente.records import Run, read_run
from detente.training import train


def arguments(description: str | None, epochs: int) -> argparse.ArgumentParser:
    """What every study is told on its command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--data-dir", type=Path, help="folder of the four MNIST files")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="start no further run after this time")
    return parser


def run_all(
    configs: Mapping[str, Any],
    out: Path,
    *,
    experiment: str,
    workers: int,
    seconds: float | None = None,
    label: Callable[[str], str] = str,
) -> dict[str, Run]:
    """Train every configuration that has no result yet, and read all of them.

    Args:
        configs: name of the run folder to configuration.
        out: folder of the run folders.
        experiment: name of the experiment.
        workers: processes, each on one thread.
        seconds: start no further run after this time; call again to go on. None: no limit.
        label: from the name of the folder to how tables and figures call the run.

    Raises:
        SystemExit: some runs are not finished.
    """
    started = time.monotonic()
    waiting = [name for name in configs if not (out / name / "result.json").exists()]
    command = " ".join(["python", *sys.argv])
    left = list(waiting)
    with ProcessPoolExecutor(workers) as pool:
        running: dict[Any, str] = {}
        while left or running:
            while left and len(running) < workers:
                if seconds is not None and time.monotonic() - started > seconds:
                    left.clear()
                    break
                name = left.pop(0)
                running[pool.submit(_run, configs[name], out / name, experiment, label(name), command)] = name
            if not running:
                break
            done = next(as_completed(running))
            name = running.pop(done)
            done.result()
            finished = sum((out / one / "result.json").exists() for one in configs)
            print(f"{finished}/{len(configs)} {name} ({time.monotonic() - started:.0f} s)", flush=True)
    missing = [name for name in configs if not (out / name / "result.json").exists()]
    if missing:
        raise SystemExit(f"{len(missing)} runs are left; call again to go on.")
    return {name: read_run(out / name) for name in configs}


def _run(config: Any, folder: Path, experiment: str, label: str, command: str) -> None:
    torch.set_num_threads(1)
    problem = find(experiment).build(config)
    train(problem, config, folder, experiment=experiment, command=command, label=label, quiet=True)
