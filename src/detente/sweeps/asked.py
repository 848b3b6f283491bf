"""What a sweep is asked for: every field is a flag of `detente sweep`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Rule = Literal["delta-m", "mean", "rank"]


@dataclass(frozen=True)
class SweepConfig:
    """Many runs of one experiment under equal conditions.

    Every contender is tuned with as many runs; what is chosen on validation data is trained with several seeds and
    measured on test data.

    Raises:
        ValueError: a number is out of range, or the rule needs single tasks that are left out.

    Example:
        >>> SweepConfig(methods=("uniform", "mgda"), seeds=5).trials
        12
    """

    methods: tuple[str, ...] = ("uniform",)
    """Methods to compare, as NAME, NAME@SPACE (exact, features or layer) or path/to/file.py:ClassName; all stands for
    every registered method."""
    also: tuple[str, ...] = ()
    """Further contenders, each as 'LABEL: FLAGS' with flags of `detente run`, such as 'mao: --optimizer mao'."""
    lrs: tuple[float, ...] = ()
    """Learning rates that are tried for everything; left out, those of the protocol."""
    grid: tuple[str, ...] = ()
    """Values that are tried of a method's option, as METHOD.OPTION=V1,V2,…, in place of those it declares."""
    trials: int = 12
    """Tuning runs of every contender, over learning rates and options."""
    extend: int = 2
    """At most so many further learning rates where the best one is the lowest or the highest that was tried."""
    tune_epochs: int | None = None
    """Epochs of tuning runs; left out, as many as of the final runs."""
    choose: Rule | None = None
    """How a contender's configuration is chosen on validation data: least Δm against the single tasks, best mean of the
    tasks' main metrics, or best mean rank over the tasks. Left out, delta-m, or mean without single tasks."""
    front: int = 0
    """Run the front of fixed weightings too: each task's share of the whole weight a multiple of 1/FRONT, none zero.
    They are also what the tuned scalarisation is chosen from. 0 leaves both out."""
    singles: bool = True
    """Train every task alone as well, tuned like the rest."""
    seeds: int = 3
    """Seeds of every chosen configuration, from 0 on; tuning uses seed 0."""
    workers: int = 1
    """Runs at the same time. One works in this process, more through Ray."""
    address: str | None = None
    """Join the Ray cluster at this address; all its machines must see the folder of the runs."""
    retries: int = 1
    """How often a run is started again whose worker died."""
    cost: bool = True
    """Measure at the end what a step of every chosen configuration costs beside one with fixed equal weights."""

    def mistakes(self) -> list[str]:
        """What is wrong with these numbers, whatever the problem; empty if nothing is.

        Example:
            >>> SweepConfig(seeds=0, lrs=(0.1, 0.1)).mistakes()
            ['--seeds is 0; it must be at least 1.', '--lrs names 0.1 twice.']
        """
        least = {"trials": 1, "extend": 0, "front": 0, "seeds": 1, "workers": 1, "retries": 0}
        found = [
            f"--{name} is {getattr(self, name)}; it must be at least {smallest}."
            for name, smallest in least.items()
            if getattr(self, name) < smallest
        ]
        if self.tune_epochs is not None and self.tune_epochs < 1:
            found.append(f"--tune-epochs is {self.tune_epochs}; it must be at least 1.")
        for rate in dict.fromkeys(self.lrs):
            if not 0 < rate < math.inf:
                found.append(f"--lrs names {rate}; a learning rate is positive and finite.")
            if self.lrs.count(rate) > 1:
                found.append(f"--lrs names {rate} twice.")
        if not self.methods and not self.also:
            found.append("--methods names nothing to compare.")
        if self.choose == "delta-m" and not self.singles:
            found.append(
                "--choose delta-m compares with single tasks: leave out --no-singles, or choose another rule."
            )
        return found


@dataclass(frozen=True)
class Failure:
    """A run that did not end.

    Attributes:
        reason: why, in one line.
        everywhere: True if no other run could go on either: the disk is full.
    """

    reason: str
    everywhere: bool = False
