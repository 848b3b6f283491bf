"""Names to protocols."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

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
    """

    method: str
    metrics: Mapping[str, Mapping[str, float]]
    source: str


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
    """

    name: str
    summary: str
    source: str
    config: type[TrainingConfig]
    build: Callable[[Any], Problem]
    published: Sequence[Published] = ()


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
    """The experiment of that name.

    Raises:
        UnknownExperiment: there is none; close names are suggested.
    """
    known = experiments()
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UnknownExperiment(f"unknown experiment {name!r}; {hint}There are {', '.join(known)}.")
    return known[name]
