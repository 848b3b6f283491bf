"""What the folder of a run tells of it before the first step, and what its result repeats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Protocol

from detente.records import SCHEMA, Metric, versions
from detente.records.atomic import plain
from detente.training.config import TrainingConfig

# What may differ between the command that started a run and one that resumes it.
VOLATILE = (
    *("command", "started", "versions"),
    *("config.checkpoint_seconds", "config.data_dir", "config.logger", "config.test"),
)
_REPEATED = ("experiment", "method", "options", "gradients", "label", "seed", "tasks")


class Measured(Protocol):
    """What is measured in a run, of whatever is trained."""

    @property
    def tasks(self) -> Sequence[str]:
        """The tasks' names."""

    @property
    def metrics(self) -> Sequence[Metric]:
        """Every metric, with its direction."""

    @property
    def main_metric(self) -> Mapping[str, str]:
        """For each task the metric it is judged by."""

    def describe(self) -> Mapping[str, Any]:
        """The data and the network in plain values."""


def header(
    problem: Measured, config: TrainingConfig, *, experiment: str, label: str, gradients: str, command: str
) -> dict[str, Any]:
    """The header of a run folder, in the values that JSON has.

    Args:
        problem: what is learnt.
        config: how.
        experiment: name of the protocol.
        label: how tables call the run.
        gradients: where the method is solved; ``none`` for a method that takes no gradients.
        command: the command line.
    """
    return {
        "schema": SCHEMA,
        "experiment": experiment,
        "label": label,
        "method": config.method,
        "options": config.method_options(),
        "gradients": gradients,
        "tasks": list(problem.tasks),
        "metrics": [asdict(metric) for metric in problem.metrics],
        "main_metric": dict(problem.main_metric),
        "seed": config.seed,
        "config": plain(asdict(config)),
        "problem": problem.describe(),
        "command": command,
        "versions": versions(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def result_of(stored: Mapping[str, Any], **found: Any) -> dict[str, Any]:
    """The result of a finished run: what was found, after what it repeats of the header.

    Example:
        >>> stored = dict.fromkeys(("experiment", "method", "options", "gradients", "label", "seed", "tasks"))
        >>> list(result_of(stored, epochs=3))[:3], result_of(stored, epochs=3)["status"]
        (['schema', 'status', 'experiment'], 'done')
    """
    return {"schema": SCHEMA, "status": "done", **{key: stored[key] for key in _REPEATED}, **found}
