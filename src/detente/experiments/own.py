"""Problems of the user's own, from a file: a class with network, data, losses and metrics, or a training function."""

from __future__ import annotations

import importlib.util
import inspect
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detente.experiments.registry import Experiment, UnknownExperiment
from detente.methods import describe
from detente.records import Metric, RunFolder
from detente.records.atomic import write_json
from detente.training.config import TrainingConfig
from detente.training.header import VOLATILE, header, result_of
from detente.training.method import create_method
from detente.training.processes import threads
from detente.training.tensors import OneTask

_WITHHELD = "withheld.json"
_EXPECTED = "return {'validation': {task: {metric: value}}, 'test': ...}."
_TEST_DATA = "measured in every run by the training function, and kept back until a configuration was chosen"


@dataclass(frozen=True)
class OwnConfig(TrainingConfig):
    """A problem from a file."""

    task: str = "all"
    """Train this task alone: the single-task baseline."""


Trained = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class TrainingFunction:
    """An existing function that trains and measures, made comparable; see :func:`training_function`."""

    function: Callable[..., Trained]
    metrics: tuple[Metric, ...]
    learning_rates: tuple[float, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """In the order of the metrics."""
        return tuple(dict.fromkeys(metric.task for metric in self.metrics))

    @property
    def main_metric(self) -> dict[str, str]:
        """The first metric of each task."""
        return {metric.task: metric.name for metric in reversed(self.metrics)}

    def describe(self) -> dict[str, str]:
        """The function's name, and what becomes of the test data."""
        return {"function": self.function.__qualname__, "test data": _TEST_DATA}


def training_function(
    metrics: Sequence[Metric], learning_rates: Sequence[float] = (1e-4, 1e-3, 1e-2)
) -> Callable[[Callable[..., Trained]], TrainingFunction]:
    """Make a training function of your own a problem for ``detente run`` and ``detente sweep``.

    The function is called with a method that is ready to use and with the configuration (``learning_rate``, ``epochs``,
    ``batch_size``, ``seed`` and the rest; ``task`` other than ``"all"`` asks for that task alone), trains in its own
    way, and returns what it measured on validation and on test data. The global generators of torch, numpy and Python
    are seeded before. What was measured on test data is kept back until a configuration was chosen. A run that is
    interrupted starts anew: how far it came is the function's own affair.

    Args:
        metrics: of every task, the one it is judged by first.
        learning_rates: where a sweep starts.

    Example:
        >>> @training_function([Metric("a", "error", False, False), Metric("b", "error", False, False)])
        ... def train(method, config):
        ...     error = abs(config.learning_rate - 0.001)
        ...     measured = {"a": {"error": error}, "b": {"error": 2 * error}}
        ...     return {"validation": measured, "test": measured}
        >>> train.tasks, train.main_metric["b"]
        (('a', 'b'), 'error')
    """
    given = tuple(metrics)

    def wrap(function: Callable[..., Trained]) -> TrainingFunction:
        return TrainingFunction(function, given, tuple(learning_rates))

    return wrap


def from_file(name: str) -> Experiment:
    """The experiment ``path/to/file.py:NAME``: a class like :class:`detente.training.Problem`, or a training function.

    The file is run, as any file of Python that one starts. A class whose ``__init__`` has a parameter ``config`` is
    given the configuration, any other is made without arguments.

    Raises:
        UnknownExperiment: no such file, nothing of that name in it, or something else than a problem.
    """
    path, _, attribute = name.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise UnknownExperiment(f"problem file {path!r} does not exist; give path/to/file.py:Name.")
    spec = importlib.util.spec_from_file_location(f"detente_problem_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that dataclasses and type hints of the file find it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    found = getattr(module, attribute, None)
    summary = (inspect.getdoc(found) or file.name).splitlines()[0]
    if isinstance(found, TrainingFunction):
        summary = (inspect.getdoc(found.function) or file.name).splitlines()[0]
        return Experiment(
            name,
            summary,
            path,
            OwnConfig,
            lambda config: _checked(found, config),
            learning_rates=found.learning_rates,
            alone=_alone,
            task_of=_task_of,
            trainer=_train_by_function,
        )
    missing = [part for part in ("model", "split", "losses", "meter") if not hasattr(found, part)]
    if not isinstance(found, type) or missing:
        raise UnknownExperiment(
            f"{path} has no problem {attribute!r}: give a class with tasks, metrics, main_metric, model, split, losses "
            "and meter (detente.training.TensorProblem has most of them), or a function under training_function."
        )
    rates = tuple(getattr(found, "learning_rates", Experiment.learning_rates))
    return Experiment(
        name,
        summary,
        path,
        OwnConfig,
        lambda config: _built(found, config),
        learning_rates=rates,
        alone=_alone,
        task_of=_task_of,
    )


def _alone(config: OwnConfig, task: str) -> OwnConfig:
    return replace(config, task=task)


def _task_of(config: OwnConfig) -> str | None:
    return None if config.task == "all" else config.task


def _built(kind: type, config: OwnConfig) -> Any:
    problem = kind(config) if "config" in inspect.signature(kind).parameters else kind()
    return problem if config.task == "all" else OneTask(problem, config.task)


def _checked(found: TrainingFunction, config: OwnConfig) -> Any:
    if config.task == "all":
        return found
    if config.task not in found.tasks:
        raise ValueError(f"there is no task {config.task!r}; the tasks are {', '.join(found.tasks)}.")
    return replace(found, metrics=tuple(metric for metric in found.metrics if metric.task == config.task))


def _train_by_function(
    problem: TrainingFunction,
    config: OwnConfig,
    folder: Path,
    *,
    experiment: str,
    command: str,
    label: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """As :func:`detente.training.train`, with the user's function for the training itself."""
    if config.logger:
        raise ValueError(
            "logger: a training function logs by itself what it wants logged; leave --logger out."
        )
    method = create_method(problem, config)
    info = describe(method)
    stored = header(
        problem,
        config,
        experiment=experiment,
        label=label or info.name,
        gradients=config.gradients if info.takes_gradients else "none",
        command=command,
    )
    with RunFolder.open_or_create(folder, stored, ignore=VOLATILE) as records:
        result = records.read().result
        if result is None:
            started = time.perf_counter()
            with torch.random.fork_rng(), threads(config.threads):
                _seed(config.seed)
                told = problem.function(method, config)
            if not isinstance(told, Mapping):
                raise ValueError(
                    f"{problem.function.__qualname__} returned {type(told).__name__}; {_EXPECTED}"
                )
            found = {split: _measured(problem, split, told.get(split)) for split in ("validation", "test")}
            write_json(folder / _WITHHELD, {"test": found["test"]})
            result = result_of(
                stored,
                epochs=config.epochs,
                metrics=found["test"] if config.test else {},
                validation=found["validation"],
                seconds=time.perf_counter() - started,
                seconds_per_epoch=None,
                peak_memory_bytes=None,
                parameters=None,
            )
            records.write_result(result)
        elif config.test and not result["metrics"]:
            result = {**result, "metrics": json.loads((folder / _WITHHELD).read_text("utf-8"))["test"]}
            records.write_result(result)
        return dict(result)


def _measured(problem: TrainingFunction, split: str, values: Any) -> dict[str, dict[str, float]]:
    """Every metric of every task, as a number."""
    found: dict[str, dict[str, float]] = {}
    for metric in problem.metrics:
        try:
            found.setdefault(metric.task, {})[metric.name] = float(values[metric.task][metric.name])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{problem.function.__qualname__} returned no {metric.name!r} of task {metric.task!r} for {split} "
                f"data; {_EXPECTED}"
            ) from error
    return found


def _seed(seed: int) -> None:
    """All global generators, so that a run does not depend on the runs before it in this process."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the functions of others may draw from it
    torch.manual_seed(seed)
