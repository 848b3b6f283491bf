"""Measure a network on a whole split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detente.training import checkpoint
from detente.training.problem import Problem, SplitName

_BATCH = 1000


def evaluate(problem: Problem, model: nn.Module, split: SplitName) -> dict[str, dict[str, float]]:
    """Measure a network on a whole split.

    The network's mode (training or evaluation) and its gradients are left as they are.

    Args:
        problem: gives the examples and the meter.
        model: the network, on whichever device.
        split: ``train``, ``validation`` or ``test``.

    Returns:
        Task to metric to value; metrics in percent are fractions in [0, 1].
    """
    was_training = model.training
    device = next(model.parameters()).device
    examples, meter = problem.split(split), problem.meter()
    model.eval()
    try:
        with torch.no_grad():
            for indices in torch.split(torch.arange(len(examples)), _BATCH):
                inputs, labels = to_device(examples.batch(indices), device)
                meter.update(model(inputs), labels)
    finally:
        model.train(was_training)
    return meter.compute()


def to_device(batch: Any, device: torch.device) -> Any:
    """Inputs and labels, however nested, on the device."""
    if device.type == "cpu":
        return batch
    from lightning_fabric.utilities import move_data_to_device

    return move_data_to_device(batch, device)


def measured(
    problem: Problem, model: nn.Module, folder: Path, epochs: Sequence[int], split: SplitName
) -> dict[str, dict[str, float]]:
    """Every metric's mean over the weights of some epochs of a run; ``model`` is left with the last.

    Args:
        problem, model, split: as for :func:`evaluate`.
        folder: of the run.
        epochs: counted from 1.

    Raises:
        CheckpointError: their weights are missing or damaged.
    """
    found = []
    for epoch in epochs:
        model.load_state_dict(checkpoint.load(checkpoint.weights_file(folder, epoch)))
        found.append(evaluate(problem, model, split))
    return averaged(found)


def averaged(
    found: Sequence[Mapping[str, Mapping[str, float | None]]],
) -> dict[str, dict[str, float]]:
    """Every metric's mean over several measurements; NaN where one of them was not finite, as records store it.

    Example:
        >>> averaged([{"a": {"error": 0.25}}, {"a": {"error": 0.75}}])
        {'a': {'error': 0.5}}
    """

    def mean(task: str, name: str) -> float:
        values = [each[task][name] for each in found]
        return sum(math.nan if value is None else value for value in values) / len(values)

    return {task: {name: mean(task, name) for name in values} for task, values in found[0].items()}
