"""What the training loop needs to know of a problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import nn

from detente.records import Metric

SplitName = Literal["train", "validation", "test"]


class Split(Protocol):
    """Examples that can be fetched by position.

    Any object with ``len`` and ``batch`` will do: the loop draws the positions and moves what it gets to the device.
    """

    def __len__(self) -> int:
        """The number of examples."""

    def batch(self, indices: torch.Tensor) -> tuple[Any, Any]:
        """Inputs of the network and labels at ``indices`` int64 [B]."""


class Meter(Protocol):
    """Adds up metrics over the batches of a split."""

    def update(self, output: Any, labels: Any) -> None:
        """Add a batch."""

    def compute(self) -> dict[str, dict[str, float]]:
        """Task to metric to value over all batches."""


class Problem(Protocol):
    """A network with several losses on some data: everything the loop does not know by itself.

    A problem whose losses are not named like its tasks also has ``loss_names``.

    Attributes:
        tasks: the tasks' names.
        metrics: every metric the meter computes, with its direction.
        main_metric: for each task the metric it is judged by.
    """

    tasks: Sequence[str]
    metrics: Sequence[Metric]
    main_metric: Mapping[str, str]

    def model(self) -> nn.Module:
        """A fresh network, initialised from torch's global generator (the loop seeds it, and restores it after).

        ``shared_parameters()`` and ``last_shared_parameters()`` of it are used where they exist.
        """

    def split(self, name: SplitName) -> Split:
        """The examples of a split."""

    def features(self, output: Any) -> Any:
        """The shared representation in an output of the network: one tensor or several."""

    def from_features(self, model: nn.Module, features: Any) -> Any:
        """The output of the heads alone on a representation, for a line search in it."""

    def losses(self, output: Any, labels: Any) -> dict[str, torch.Tensor]:
        """The loss of each task for a batch."""

    def meter(self) -> Meter:
        """An empty meter."""

    def describe(self) -> dict[str, Any]:
        """The data and the network in plain values, for the record."""

    def samples(
        self, model: nn.Module, count: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]] | None:
        """A few test images uint8 [N, H, W] with labels and predictions by task, or None."""
