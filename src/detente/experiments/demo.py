"""The main job: seven short runs on the packaged digits."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from detente.data import load_multimnist
from detente.experiments.multimnist import MultiMNIST, MultiMNISTConfig
from detente.training import train


@dataclass(frozen=True)
class Entry:
    """One run of the demonstration."""

    folder: str
    method: str
    gradients: Literal["exact", "features"] = "exact"
    tasks: Literal["both", "left", "right"] = "both"


# One rate of the paper's grid, large enough for so short a training; the same for every run and not tuned.
LEARNING_RATE = 0.05

RUNS = (
    Entry("single-left", "uniform", tasks="left"),
    Entry("single-right", "uniform", tasks="right"),
    Entry("uniform", "uniform"),
    Entry("mgda-exact", "mgda"),
    Entry("mgda-features", "mgda", "features"),
    Entry("aligned-mtl-exact", "aligned-mtl"),
    Entry("aligned-mtl-features", "aligned-mtl", "features"),
)


def demo(out: Path, *, epochs: int, seed: int, quiet: bool = False) -> list[dict[str, Any]]:
    """Train every entry with the same budget.

    Args:
        out: folder for the run folders; finished runs in it are kept.
        epochs: passes over the training images of every run.
        seed: seed of every run.
        quiet: show no progress.

    Returns:
        The results in the order of :data:`RUNS`.
    """
    digits = load_multimnist(size=28)
    results = []
    for number, entry in enumerate(RUNS, 1):
        config = MultiMNISTConfig(
            method=entry.method,
            gradients=entry.gradients,
            tasks=entry.tasks,
            epochs=epochs,
            learning_rate=LEARNING_RATE,
            seed=seed,
            measure=entry.tasks == "both",
        )
        if not quiet:
            print(f"[{number}/{len(RUNS)}] {entry.folder}", file=sys.stderr)
        result = train(
            MultiMNIST(config, digits),
            config,
            out / entry.folder,
            experiment="multimnist",
            command=command_of(entry, config, out),
            label=None if entry.tasks == "both" else f"single task: {entry.tasks}",
            quiet=quiet,
        )
        results.append(result)
        if not quiet:
            told = ", ".join(f"{task} {values['accuracy']:.1%}" for task, values in result["metrics"].items())
            print(f"        {told}  ({result['seconds']:.0f} s)", file=sys.stderr)
    return results


def command_of(entry: Entry, config: MultiMNISTConfig, out: Path) -> str:
    """The command that repeats one entry alone."""
    words = ["detente", "run", "multimnist", "--method", entry.method, "--gradients", entry.gradients]
    words += ["--tasks", entry.tasks, "--epochs", str(config.epochs), "--seed", str(config.seed)]
    words += ["--learning-rate", str(config.learning_rate)]
    words += ["--measure"] if config.measure else []
    return shlex.join([*words, "--out", str(out / entry.folder)])
