"""The shortest way to a problem of one's own: tensors, a network, losses and scores by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from detente.records import Metric
from detente.training.problem import SplitName

Tensors = tuple[torch.Tensor, Mapping[str, torch.Tensor]]


class TensorProblem(ABC):
    """A :class:`detente.training.Problem` on data that fit into memory: say four things, the rest is here.

    A subclass has ``metrics`` (each with its direction), and the methods :meth:`data`, :meth:`model`, :meth:`losses`
    and :meth:`scores`. The first metric of a task is the one it is judged by. Name the shared parameters by a method
    ``shared_parameters()`` of the network for optimizers and searches that ask for them; give
    :meth:`features` for methods that are solved on a representation.

    Example:
        >>> class Rows(TensorProblem):
        ...     metrics = (Metric("sum", "error", False, False), Metric("sign", "accuracy", True, True))
        ...     def data(self, name):
        ...         x = torch.randn(40, 3, generator=torch.Generator().manual_seed(len(name)))
        ...         return x, {"sum": x.sum(1), "sign": (x[:, 0] > 0).long()}
        ...     def model(self):
        ...         return torch.nn.Linear(3, 3)
        ...     def losses(self, output, labels):
        ...         return {
        ...             "sum": (output[:, 0] - labels["sum"]).square().mean(),
        ...             "sign": torch.nn.functional.cross_entropy(output[:, 1:], labels["sign"]),
        ...         }
        ...     def scores(self, output, labels):
        ...         return {
        ...             "sum": {"error": (output[:, 0] - labels["sum"]).abs()},
        ...             "sign": {"accuracy": (output[:, 1:].argmax(1) == labels["sign"]).float()},
        ...         }
        >>> problem = Rows()
        >>> problem.tasks, problem.main_metric["sign"], len(problem.split("train"))
        (('sum', 'sign'), 'accuracy', 40)
    """

    metrics: Sequence[Metric]

    @abstractmethod
    def data(self, name: SplitName) -> Tensors:
        """Inputs [N, ...] and for each task its labels [N, ...] of a split: ``train``, ``validation`` or ``test``."""

    @abstractmethod
    def model(self) -> nn.Module:
        """A fresh network, initialised from torch's global generator."""

    @abstractmethod
    def losses(self, output: Any, labels: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Task to its loss, the mean over the examples of a batch."""

    @abstractmethod
    def scores(self, output: Any, labels: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """Task to metric to a value for each example [B]; the mean over all examples is the metric."""

    # ---- what follows from these

    @property
    def tasks(self) -> Sequence[str]:
        """The tasks, in the order of the metrics."""
        return tuple(dict.fromkeys(metric.task for metric in self.metrics))

    @property
    def main_metric(self) -> Mapping[str, str]:
        """The first metric of each task."""
        return {metric.task: metric.name for metric in reversed(self.metrics)}

    def split(self, name: SplitName) -> _Rows:
        """The examples of a split; read once."""
        held: dict[str, _Rows] = self.__dict__.setdefault("_splits", {})
        if name not in held:
            held[name] = _Rows(*self.data(name))
        return held[name]

    def features(self, output: Any) -> Any:
        """The shared representation in an output: its ``features``, unless a subclass says otherwise."""
        found = getattr(output, "features", None)
        if found is None:
            raise ValueError(
                f"{type(self).__name__} does not say where the representation is: define features(output), return an "
                "output with an attribute features, or use gradients exact."
            )
        return found

    def from_features(self, model: nn.Module, features: Any) -> Any:
        """The heads on a representation, for the fast line search."""
        raise ValueError(
            f"{type(self).__name__} does not say how heads run on a representation: define from_features(model, "
            "features), or use another search."
        )

    def meter(self) -> _Means:
        """Means of the scores over all examples."""
        return _Means(self)

    def describe(self) -> dict[str, Any]:
        """The class's name and the number of examples."""
        return {"problem": type(self).__qualname__, "examples": len(self.split("train"))}

    def samples(self, model: nn.Module, count: int) -> Any:
        """No pictures, unless a subclass has some; see :class:`detente.training.Problem`."""
        return None


class OneTask:
    """A problem reduced to one of its tasks: the same data and network, one loss."""

    def __init__(self, problem: Any, task: str) -> None:
        if task not in problem.tasks:
            raise ValueError(f"there is no task {task!r}; the tasks are {', '.join(problem.tasks)}.")
        self.problem, self.task = problem, task
        self.tasks = (task,)
        self.metrics = [metric for metric in problem.metrics if metric.task == task]
        self.main_metric = {task: problem.main_metric[task]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.problem, name)

    def losses(self, output: Any, labels: Any) -> dict[str, torch.Tensor]:
        """The one loss."""
        return {self.task: self.problem.losses(output, labels)[self.task]}

    def meter(self) -> _OneMeter:
        """The metrics of the one task."""
        return _OneMeter(self.problem.meter(), self.task)

    def samples(self, model: nn.Module, count: int) -> None:
        """No pictures: they show all tasks."""


class _Rows:
    def __init__(self, inputs: torch.Tensor, labels: Mapping[str, torch.Tensor]) -> None:
        for task, values in labels.items():
            if len(values) != len(inputs):
                raise ValueError(f"task {task!r} has {len(values)} labels for {len(inputs)} inputs.")
        self.inputs, self.labels = inputs, dict(labels)

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.inputs[indices], {task: values[indices] for task, values in self.labels.items()}


class _Means:
    def __init__(self, problem: TensorProblem) -> None:
        self.problem, self.examples = problem, 0
        self.sums: dict[str, dict[str, float]] = {}

    def update(self, output: Any, labels: Mapping[str, torch.Tensor]) -> None:
        scores = self.problem.scores(output, labels)
        count = len(next(iter(labels.values())))
        for metric in self.problem.metrics:
            values = scores.get(metric.task, {}).get(metric.name)
            if values is None or values.shape != (count,):
                found = "none" if values is None else f"shape {tuple(values.shape)}"
                raise ValueError(
                    f"scores() must give {metric.name!r} of task {metric.task!r} as one value for each of {count} "
                    f"examples; found {found}."
                )
            sums = self.sums.setdefault(metric.task, {})
            sums[metric.name] = sums.get(metric.name, 0.0) + float(values.double().sum())
        self.examples += count

    def compute(self) -> dict[str, dict[str, float]]:
        return {
            task: {name: total / self.examples for name, total in sums.items()}
            for task, sums in self.sums.items()
        }


class _OneMeter:
    def __init__(self, meter: Any, task: str) -> None:
        self.meter, self.task = meter, task

    def update(self, output: Any, labels: Any) -> None:
        self.meter.update(output, labels)

    def compute(self) -> dict[str, dict[str, float]]:
        return {self.task: self.meter.compute()[self.task]}
