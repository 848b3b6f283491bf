"""Names to protocols."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detente.methods.options import near
from detente.training import train
from detente.training.config import TrainingConfig
from detente.training.problem import Problem


class UnknownExperiment(ValueError, LookupError):
    """No experiment of that name."""


@dataclass(frozen=True)
class Published:
    """One row of a published table.

    Attributes:
        method: as the paper calls it.
        metrics: task to metric to value, in the units of the experiment's own metrics.
        source: paper and table.
        protocol: the conditions of training in words.
        single: whether a network was trained for each task alone: what Δm is held against.
        decimals: task to metric to the digits after the point that are known of the value (97.23 %, stored as 0.9723,
            has 4); a value that is not named counts as exact.
        conditions: the settings of a run of this protocol that a shortened run would change, nested ones joined by
            dots.
    """

    method: str
    metrics: Mapping[str, Mapping[str, float]]
    source: str
    protocol: str = ""
    single: bool = False
    decimals: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)


def _several(config: Any) -> None:
    """A configuration that trains all tasks."""


@dataclass(frozen=True)
class Experiment:
    """A protocol: its configuration, the problem it builds, and what was published of it.

    Attributes:
        name: for the command line.
        summary: one line.
        source: papers and sections.
        config: the typed configuration; it is the command line.
        build: from a configuration to the problem; reads the data.
        published: rows of the papers' tables, with the conventions they hold for.
        learning_rates: the protocol's grid, where a sweep starts.
        alone: from a configuration and a task to the configuration that trains this task alone.
        task_of: the task that a configuration trains alone, None where it trains several.
        trainer: trains in place of :func:`detente.training.train`, with the same arguments; None for that one.
    """

    name: str
    summary: str
    source: str
    config: type[TrainingConfig]
    build: Callable[[Any], Problem]
    published: Sequence[Published] = ()
    learning_rates: Sequence[float] = (1e-4, 1e-3, 1e-2)
    alone: Callable[[Any, str], Any] | None = None
    task_of: Callable[[Any], str | None] = _several
    trainer: Callable[..., dict[str, Any]] | None = None

    def run(
        self,
        config: TrainingConfig,
        folder: Path,
        *,
        command: str,
        label: str | None = None,
        quiet: bool = False,
    ) -> dict[str, Any]:
        """Train what a configuration asks for, or go on, or give the result that is there.

        Args:
            config: an instance of :attr:`config`.
            folder: of the run.
            command: for the record.
            label: how tables call the run; None leaves that to the trainer.
            quiet: show no progress.

        Returns:
            The result as stored.

        Raises:
            ValueError: as :func:`detente.training.train`.
        """
        trainer = self.trainer or train
        return trainer(
            self.build(config),
            config,
            folder,
            experiment=self.name,
            command=command,
            label=label,
            quiet=quiet,
        )


def experiments() -> dict[str, Experiment]:
    """Every experiment: name to :class:`Experiment`, sorted by name.

    Example:
        >>> "multimnist" in experiments()
        True
    """
    found: dict[str, Experiment] = {}
    package = importlib.import_module("detente.experiments")
    for module in pkgutil.iter_modules(package.__path__):
        experiment = getattr(
            importlib.import_module(f"detente.experiments.{module.name}"), "EXPERIMENT", None
        )
        if isinstance(experiment, Experiment):
            found[experiment.name] = experiment
    return dict(sorted(found.items()))


def find(name: str) -> Experiment:
    """The experiment of that name, or that of a file: ``path/to/file.py:Name``.

    Raises:
        UnknownExperiment: there is none; close names are suggested.
    """
    if name.rpartition(":")[0].endswith(".py"):
        from detente.experiments.own import from_file

        return from_file(name)
    known = experiments()
    if name not in known:
        raise UnknownExperiment(
            f"unknown experiment {name!r}; {near(name, known)}There are {', '.join(known)}."
        )
    return known[name]
