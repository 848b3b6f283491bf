"""Where a run stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Position:
    """Where a run stands: saved in every checkpoint.

    Attributes:
        loss_sums: of this epoch, for each task the losses of its examples added up.
        examples: of this epoch, for each task the examples behind that sum: a task may be absent from a batch.
        refused: of this epoch, the steps that moved nothing.
        epoch_seconds, seconds, step_seconds: of this epoch, of the run, and of each step that measured nothing.
        history: for each epoch that ended every task's main metric on validation data, higher being better.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sums: dict[str, float] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    epoch_seconds: float = 0.0
    seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> Position:
        """As a checkpoint holds it; an older one counts the examples of all tasks together."""
        at = cls(**saved)
        if isinstance(at.examples, int):
            at.examples = dict.fromkeys(at.loss_sums, at.examples)
        return at
