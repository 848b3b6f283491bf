"""The toy problem of CAGrad, Nash-MTL and Aligned-MTL: a method's paths from five starts, as the papers draw them."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from detente.experiments.registry import Experiment
from detente.experiments.toy_paths import Descent, descend
from detente.methods import create, describe
from detente.optim import OptimizerName
from detente.problems import Toy
from detente.records import Metric, RunFolder
from detente.records.atomic import write_bytes
from detente.training.config import TrainingConfig
from detente.training.header import VOLATILE, header, result_of
from detente.training.method import seeded_options
from detente.training.processes import threads

PATHS = "paths.npz"

_USED = frozenset({"method", "option", "learning_rate", "max_steps", "seed"})
_WITHOUT_EFFECT = frozenset({"test", "threads", "data_dir", "checkpoint_seconds"})


@dataclass(frozen=True)
class ToyConfig(TrainingConfig):
    """Adam along a method's direction, from all five starts at once. The defaults are the papers'."""

    max_steps: int | None = 35_000
    """Steps of every path."""
    optimizer: OptimizerName = "adam"
    """Adam, in float64; the papers use no other."""
    learning_rate: float = 1e-3
    """Adam's step length."""
    scales: Literal["cagrad", "nash-mtl", "aligned-mtl"] = "cagrad"
    """Factors of the two losses: (1, 1), (0.1, 1) or (0.5, 0.5), as in the code of that paper."""
    positive: bool = False
    """Let the method see losses raised above zero, for those that take logarithms; gradients stay as they are."""
    points: int = 350
    """About how many points of every path are kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps is None:
            raise ValueError("max_steps is None; a path needs an end.")
        if self.points < 1:
            raise ValueError(f"points is {self.points}; it must be at least 1.")
        # Adam as it is configured where nothing else was asked for.
        untouched = replace(TrainingConfig(), optimizer="adam")
        for field in fields(untouched):
            if field.name in _USED | _WITHOUT_EFFECT:
                continue
            if getattr(self, field.name) != getattr(untouched, field.name):
                raise ValueError(
                    f"{field.name} is {getattr(self, field.name)!r}; the toy problem has no use for it."
                )


class ToyProblem:
    """What a run of the toy problem tells of its two losses: how close to the Pareto set its paths end."""

    metrics = tuple(Metric(task, "loss", False, False) for task in Toy.tasks)

    def __init__(self, config: ToyConfig) -> None:
        self.config, self.toy = config, Toy(config.scales)
        self.tasks: Sequence[str] = Toy.tasks
        self.main_metric = dict.fromkeys(Toy.tasks, "loss")

    def describe(self) -> dict[str, Any]:
        """The factors of the losses, and where paths start."""
        return {"scales": self.config.scales, "starts": [list(start) for start in Toy.starts]}

    def walk(self) -> Descent:
        """The paths."""
        config = self.config
        assert config.max_steps is not None
        return descend(
            self.toy,
            config.method,
            options=seeded_options(config),
            steps=config.max_steps,
            lr=config.learning_rate,
            stride=max(1, config.max_steps // config.points),
            positive=config.positive,
        )


def read_paths(folder: Path) -> dict[str, np.ndarray]:
    """What a run left: ``paths`` [S, K, 2], ``losses`` [S, K, 2], ``steps`` [K] of every kept point.

    Raises:
        OSError: the run is not finished.
    """
    with np.load(folder / PATHS, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def train_toy(
    problem: ToyProblem,
    config: ToyConfig,
    folder: Path,
    *,
    experiment: str,
    command: str,
    label: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """As :func:`detente.training.train`: the metrics are means over the five ends; the paths lie beside the result."""
    described = describe(create(config.method, **config.method_options()))
    stored = header(
        problem,
        config,
        experiment=experiment,
        label=label or described.name,
        gradients="exact" if described.takes_gradients else "none",
        command=command,
    )
    with RunFolder.open_or_create(folder, stored, ignore=VOLATILE) as records, threads(1):
        finished = records.read().result
        if finished is not None:
            return dict(finished)
        started = time.perf_counter()
        found = problem.walk()
        losses = problem.toy.losses(found.paths)
        file = io.BytesIO()
        np.savez_compressed(
            file, paths=found.paths.numpy(), losses=losses.numpy(), steps=np.array(found.steps)
        )
        write_bytes(folder / PATHS, file.getvalue())
        ends = losses[:, -1]
        metrics = {
            task: {"loss": float(value)} for task, value in zip(problem.tasks, ends.mean(dim=0), strict=True)
        }
        seconds = time.perf_counter() - started
        result = result_of(
            stored,
            epochs=1,
            steps=config.max_steps,
            metrics=metrics,
            validation=metrics,
            seconds=seconds,
            seconds_per_step=seconds / found.steps[-1],
            seconds_per_epoch=seconds,
            peak_memory_bytes=None,
            parameters=Toy.dimension,
            ends=found.paths[:, -1].tolist(),
            distance=distance_to_pareto_set(problem.toy, found.paths[:, -1]).tolist(),
            refused=list(found.refused),
            stationary=list(found.stationary),
            stopped=list(found.stopped),
        )
        records.write_result(result)
        return result


def distance_to_pareto_set(toy: Toy, points: torch.Tensor) -> torch.Tensor:
    """[S] Euclidean distances of points [S, 2] to the Pareto set (to 2001 points of it).

    Example:
        >>> distance_to_pareto_set(Toy(), Toy().optimum([1, 1])[None]) < 1e-3
        tensor([True])
    """
    return torch.cdist(points, toy.pareto_set(2001)).min(dim=1).values


EXPERIMENT = Experiment(
    name="toy",
    summary="two losses on a plane, paths of one method from five starts (no data needed)",
    source="Liu et al. 2021 (CAGrad); Navon et al. 2022 (Nash-MTL); Senushkin et al. 2023, Figures 1, 2 and 6",
    config=ToyConfig,
    build=ToyProblem,  # type: ignore[arg-type]  # its own trainer asks for nothing more
    learning_rates=(1e-3,),
    trainer=train_toy,
)
