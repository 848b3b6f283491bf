"""LeNet for MultiMNIST, with one head for each task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from detente.models.output import Branching, Output

__all__ = ["LeNet"]

_SMALLEST = 16
_FEATURES = 50


class LeNet(nn.Module):
    """The network of Sener and Koltun (2018) for MultiMNIST.

    **Representation**: ``features``, the 50 rectified outputs of the last shared layer, are what all heads
    read; everything before is shared, everything after belongs to one task.

    Shared part: convolution 5x5 to 10 channels, max-pooling 2, ReLU; convolution 5x5 to 20 channels, channel
    dropout, max-pooling 2, ReLU; linear to 50 features, ReLU. Each head: linear 50 to 50, ReLU, dropout,
    linear to the task's outputs, which are logits. A single-task network is the same class with one output.

    The dropout after the second convolution removes whole channels (``nn.Dropout2d``), as in the paper's
    code. That code draws one set of channels for the whole batch and does not rescale what remains; here
    every image has its own channels and what remains is divided by 1 - p, torch's usual form, so that
    training and evaluation see the same scale.

    Parameters are drawn from torch's global generator, as torch's own modules do: call
    ``torch.manual_seed`` before, inside ``torch.random.fork_rng`` to leave the surroundings untouched.

    Args:
        size: side of the square input in pixels, at least 16; 28 gives 320 and 36 gives 720 values before
            the linear layer.
        outputs: task name to number of outputs; None means ``{"left": 10, "right": 10}``.
        dropout: probability of both dropouts, 0 <= p < 1.

    Raises:
        ValueError: ``size``, ``outputs`` or ``dropout`` is out of range; in ``forward``, images of another
            shape.

    Example:
        >>> import torch
        >>> model = LeNet(size=28)
        >>> features, predictions = model(torch.zeros(4, 1, 28, 28))
        >>> features.shape, predictions["left"].shape
        (torch.Size([4, 50]), torch.Size([4, 10]))
    """

    def __init__(
        self, size: int = 28, outputs: Mapping[str, int] | None = None, dropout: float = 0.5
    ) -> None:
        super().__init__()
        outputs = {"left": 10, "right": 10} if outputs is None else dict(outputs)
        if size < _SMALLEST:
            raise ValueError(f"size is {size}: LeNet needs images of at least {_SMALLEST} pixels a side")
        if not outputs:
            raise ValueError("outputs is empty: name at least one task and its number of outputs")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}: expected a probability of at least 0 and below 1")
        for task, count in outputs.items():
            if count < 1:
                raise ValueError(f"task {task!r} has {count} outputs: expected at least 1")
        self.size = size
        side = ((size - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(1, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.channel_dropout = nn.Dropout2d(dropout)
        self.linear = nn.Linear(20 * side * side, _FEATURES)
        self.heads = nn.ModuleDict()
        for task, count in outputs.items():
            head = nn.Sequential(
                nn.Linear(_FEATURES, 50), nn.ReLU(), nn.Dropout(dropout), nn.Linear(50, count)
            )
            try:
                self.heads[task] = head
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"task name {task!r} cannot name a part of a torch module ({error}): choose another"
                ) from error

    def encode(self, images: Tensor) -> Tensor:
        """Compute the representation, [B, 50], of float images [B, 1, size, size]."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (1, self.size, self.size):
            raise ValueError(
                f"images have shape {tuple(images.shape)}: this LeNet expects "
                f"[B, 1, {self.size}, {self.size}]"
            )
        hidden = F.relu(F.max_pool2d(self.conv1(images), 2))
        hidden = F.relu(F.max_pool2d(self.channel_dropout(self.conv2(hidden)), 2))
        return F.relu(self.linear(hidden.flatten(1)))

    def predict(self, features: Tensor | Mapping[str, Any]) -> dict[str, Tensor]:
        """Run the heads alone on a representation [B, 50], or each on its branch: task name to logits [B, outputs]."""
        return {
            task: head(features if isinstance(features, Tensor) else features[task])
            for task, head in self.heads.items()
        }

    def forward(self, images: Tensor, branch: Branching | None = None) -> Output:
        """Compute representation and logits of float images [B, 1, size, size].

        With ``branch`` (:func:`detente.branch`) each head reads a branch of its own, and the branches are the output's
        representation.
        """
        shared = self.encode(images)
        features = shared if branch is None else branch(shared, list(self.heads))
        return Output(features, self.predict(features))

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters that all tasks share."""
        return [*self.conv1.parameters(), *self.conv2.parameters(), *self.linear.parameters()]

    def last_shared_parameters(self) -> list[nn.Parameter]:
        """Weight and bias of the last shared layer, for GradNorm and for ``solve_on=``."""
        return list(self.linear.parameters())

    def task_parameters(self, task: str) -> list[nn.Parameter]:
        """Parameters of the head of ``task``."""
        if task not in self.heads:
            raise ValueError(f"unknown task {task!r}: this network has {', '.join(self.heads)}")
        return list(self.heads[task].parameters())
