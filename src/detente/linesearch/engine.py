"""Use the engine for a search: the task gradients of the first pass, and what the method decides on them.

All that a search takes from `autograd` and `step` is named here, and nowhere else in this package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from detente.autograd.branches import Branches
from detente.autograd.buffers import Buffers, read_buffers, write_buffers
from detente.autograd.engine import Taken, full_precision, task_gradients
from detente.autograd.features import FeaturesPass
from detente.autograd.layout import Gradients
from detente.autograd.losses import Losses
from detente.autograd.numbers import to_host
from detente.autograd.ranks import ProcessGroup, Ranks
from detente.autograd.reduction import Samples
from detente.autograd.roles import Memory, Named, Parameters, as_tensors
from detente.autograd.step import Request, Step, prepare
from detente.methods import Method
from detente.step import (
    NUMBERS,
    decide,
    record_of,
    shared_gradients,
    undone_on_failure,
    with_direction,
)
from detente.values import Combination, StepRecord, TaskGradients

__all__ = [
    "Branches",
    "Buffers",
    "Engine",
    "Gradients",
    "Losses",
    "Parameters",
    "ProcessGroup",
    "Ranks",
    "Samples",
    "Solved",
    "as_tensors",
    "full_precision",
    "read_buffers",
    "to_host",
    "undone_on_failure",
    "write_buffers",
]


@dataclass(frozen=True)
class Solved:
    """Hold the task gradients of one step, what the method decided on them, and the graph behind them.

    Attributes:
        taken: gradients and graph, as the engine gives them.
        combination: the method's decision, on several processes with the weights of the first.
        direction: [P] of the shared parameters, or of the representation; None if the step is refused.
        record: the decision in plain numbers.
        features, given: representation and losses as the closure gave them.
    """

    taken: Taken
    combination: Combination
    direction: torch.Tensor | None
    record: StepRecord
    features: Any
    given: Losses

    @property
    def gradients(self) -> TaskGradients:
        """What the method saw: the tasks of the shared problem."""
        return self.taken.gradients

    @property
    def step(self) -> Step:
        """The T tasks, with the losses of the pass (this rank's shares of them)."""
        return self.taken.step

    @property
    def ranks(self) -> Ranks | None:
        """The processes among which the batch is split; None on a single one."""
        return None if self.step.reduction is None else self.step.reduction.ranks

    @property
    def own(self) -> Sequence[Gradients]:
        """For each task its own parameters with their gradients, on several processes this rank's part."""
        return self.taken.walked.own

    @property
    def in_parts(self) -> bool:
        """Whether the Jacobian and the direction are this rank's part of them."""
        return self.taken.walked.partial

    @property
    def alone(self) -> bool:
        """Whether the batch is all on this process, and nothing was added up."""
        return self.ranks is None

    @property
    def columns(self) -> Sequence[torch.Tensor]:
        """The shared parameters in the order of the Jacobian's columns."""
        return self.taken.columns

    @property
    def local_direction(self) -> torch.Tensor:
        """[p] the direction in this rank's part of the representation."""
        assert self.direction is not None and isinstance(self.taken.walked, FeaturesPass)
        part = self.taken.walked.mine
        return self.direction if part is None else self.direction[part]

    @property
    def past_features(self) -> bool:
        """Whether a loss reaches shared parameters past the representation."""
        return isinstance(self.taken.walked, FeaturesPass) and any(self.taken.walked.direct)

    def of_all(self, values: np.ndarray) -> np.ndarray:
        """Spread numbers of the tasks of the shared problem over all T; a task outside of it has 0."""
        if len(self.step.inside) == len(self.step.names):
            return values
        spread = np.zeros(len(self.step.names))
        spread[list(self.step.inside)] = values
        return spread

    def own_gradients(self) -> Gradients:
        """Pair the own parameters with the gradients of the whole batch, one pair for each task that reaches one."""
        return self.taken.own_gradients()

    def shared_gradients(self) -> Gradients:
        """Pair the shared parameters with what the direction gives each of them; none where it is stationary.

        The graph is used up. In the space of the features this is one backward through the encoder.

        Raises:
            ValueError: a gradient behind the representation is not finite.
        """
        if self.combination.status == "stationary":
            return []
        return shared_gradients(self.taken, replace(self.combination, direction=self.direction))


@dataclass(frozen=True)
class Engine:
    """Take and combine the task gradients of a search's first pass.

    Attributes:
        method: what decides.
        shared, task_specific: parameters by their role, as the caller gave them.
        on_features: solve on the representation that the closure returns.
        whole: on several processes, let every rank have all of the gradients also where the method needs only numbers.
        memory: what the engine remembers of earlier steps.
    """

    method: Method
    shared: Any
    task_specific: Any
    on_features: bool
    whole: bool
    memory: Memory = field(default_factory=Memory)

    def solve(
        self, first: Callable[[], tuple[Any, Losses]], process_group: ProcessGroup, samples: Samples
    ) -> Solved:
        """Run the first pass, take every task's gradient, and let the method decide.

        Args:
            first: the pass, with a graph; on several processes its error is announced to the others.
            process_group: the processes among which the batch is split.
            samples: examples behind the losses of this rank.

        Raises:
            ValueError: as :func:`detente.backward`, or there is nothing to search along.
            RankFailed: another rank raised something.
        """
        features: Any = None
        losses: Losses = {}
        failed: Exception | None = None
        try:
            features, losses = first()
        except Exception as error:
            failed = error
        needs = self.method.needs_now()
        request = Request(
            Named.read(features if self.on_features else None, self.shared, self.task_specific),
            needs,
            whole=self.whole or not needs <= NUMBERS,
            samples=samples,
            process_group=process_group,
            refused=failed,
        )
        with full_precision():
            taken = task_gradients(prepare(losses, request, self.memory, self.method.tasks))
            if taken is None:
                raise ValueError(
                    "no parameter named in shared= requires a gradient, so there is nothing to search along."
                )
            combination = decide(self.method, taken)
            record = record_of(taken, combination)
            direction = None
            if combination.accepted:
                direction = with_direction(combination, taken.gradients).direction
        return Solved(taken, combination, direction, record, features, losses)
