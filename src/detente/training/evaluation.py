"""Measure a network on a whole split."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

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


def average(results: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Every metric's mean over several evaluations."""
    return {
        task: {name: sum(result[task][name] for result in results) / len(results) for name in values}
        for task, values in results[0].items()
    }
