"""Record what one search did, in plain numbers, and name what may go wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from detente.values import StepRecord

SearchStatus = Literal["accepted", "small-step", "capped", "stationary", "refused"]


class _Advised(ValueError):
    """Say what happened to some tasks, and apart from it what to do, which a caller with other options may reword.

    Attributes:
        told: what happened.
        advice: what to do, in terms of this package's options.
        tasks: whom it concerns.
    """

    def __init__(self, told: str, advice: str = "", tasks: tuple[str, ...] = ()) -> None:
        super().__init__(told, advice, tasks)
        self.told, self.advice, self.tasks = told, advice, tuple(tasks)

    def __str__(self) -> str:
        return f"{self.told} {self.advice}".rstrip()


class NoDescent(_Advised):
    """Refuse a direction along which some loss does not fall: no length of the step can satisfy the condition.

    Attributes:
        told: which losses, and by how much they fall per unit of length.
        advice: what to do.
        tasks: the tasks whose losses do not fall.
    """


class SearchFailed(_Advised):
    """Report that no trial was accepted; parameters, buffers, random state and method are as they were before the step.

    Attributes:
        told: what was wrong at the last trial.
        advice: what to do.
        tasks: the tasks whose losses were wrong there.
    """


class ClosureChanged(ValueError):
    """Refuse a closure that does not give the same losses twice at one point: its batch or random numbers change."""


@dataclass(frozen=True)
class SearchRecord:
    """Record one step of a line search in plain numbers, ready for a log.

    Attributes:
        names: the T tasks of this step; every sequence below follows their order.
        status: ``accepted``: the last trial satisfied the condition and was taken; ``small-step``: the direction is no
            descent for some task and the constant step was taken; ``capped``: no trial was accepted and no parameter
            moved; ``stationary``: nothing to move along, or nothing that shows in the parameters; ``refused``: the
            method refused the step.
        losses_before: T losses where the step began.
        losses_after: T losses of the trial that was taken; for the fast search those of the moved representation. None
            if no parameter moved.
        eta: length of the step taken, 0 if none was.
        trials: how many lengths were tried.
        slopes: T numbers, by how much each loss falls per unit of η, to first order; None if the method refused.
        shared_slopes: the part of them that the shared direction contributes (in the representation for the fast
            search); the rest is that of the own parameters.
        lr_ub: the first length of this search, lowered as ``lower_ub`` of the search demanded.
        head_forwards, trunk_forwards: how often all heads, and the trunk, were run, with everything: the gradients'
            own forward, checks and trials.
        true_losses: T losses of the network after a fast step, where the options request them.
        true_condition: whether the condition holds for them, None where they do not.
        notes: sentences for the log.
        seconds: wall-clock time of the whole step.
        record: what the method saw and decided; its ``seconds`` are those until the direction was known.

    Example:
        >>> record = SearchRecord(("left",), "accepted", (0.5,), (0.25,), 0.1, 2, (2.0,), (1.5,), 0.2, 3, 3)
        >>> record.accepted, record.to_dict()["losses_after"]
        (True, [0.25])
    """

    names: tuple[str, ...]
    status: SearchStatus
    losses_before: tuple[float, ...]
    losses_after: tuple[float, ...] | None
    eta: float
    trials: int
    slopes: tuple[float, ...] | None
    shared_slopes: tuple[float, ...] | None
    lr_ub: float
    head_forwards: int
    trunk_forwards: int
    true_losses: tuple[float, ...] | None = None
    true_condition: bool | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    record: StepRecord | None = None

    @property
    def accepted(self) -> bool:
        """True if the parameters moved."""
        return self.status in ("accepted", "small-step")

    def to_dict(self) -> dict[str, Any]:
        """Write the record as lists of plain numbers and strings; without ``record``, which has its own ``to_dict``."""
        everything = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "record"}
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in everything.items()
        }
