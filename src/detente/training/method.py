"""The method that a configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from detente.methods import Method, create, describe
from detente.training.config import TrainingConfig


class Tasks(Protocol):
    """What has named tasks; ``loss_names`` beside them where the losses are called otherwise."""

    @property
    def tasks(self) -> Sequence[str]:
        """The tasks' names."""


def seeded_options(config: TrainingConfig) -> dict[str, Any]:
    """The method's options; a random method is seeded with the run's seed unless told otherwise.

    Example:
        >>> seeded_options(TrainingConfig(method="rlw", seed=3))
        {'seed': 3}
        >>> seeded_options(TrainingConfig(method="rlw", seed=3, option=("seed=7",)))
        {'seed': 7}
    """
    options = config.method_options()
    if "seed" in describe(create(config.method, **options)).options:
        options.setdefault("seed", config.seed)
    return options


def create_method(problem: Tasks, config: TrainingConfig) -> Method:
    """The method of a configuration for a problem's tasks; see :func:`seeded_options`."""
    tasks = tuple(getattr(problem, "loss_names", problem.tasks))
    return create(config.method, tasks=tasks, **seeded_options(config))
