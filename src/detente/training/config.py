"""The configuration every experiment shares; an experiment adds its own fields."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from detente.linesearch import SearchName, searches
from detente.optim import OptimizerName
from detente.optim import info_of as optimizer_info

CHECK_EVERY = 7
"""Steps of the fast search from one look at the network itself to the next: often enough to tell, and with no period
that the batches of an epoch are likely to have."""

_SEARCH_OPTIONS = {
    "search_gamma": "gamma",
    "search_c": "c",
    "search_trials": "max_trials",
    "search_check": "check_true",
    "search_small_step": "small_step",
    "search_lower": "lower_ub",
    "search_precondition": "precondition",
}
"""Fields of the configuration to the options of a search that they set."""


@dataclass(frozen=True)
class TrainingConfig:
    """One training run: every field is a flag of `detente run`.

    Experiments derive from it and change defaults or add fields of their own.
    """

    method: str = "uniform"
    """Name of a method (see `detente methods`), or path/to/file.py:ClassName."""
    option: tuple[str, ...] = ()
    """Options of the method, each as name=value, such as normalize=l2 or preference={"left":2,"right":1}."""
    gradients: Literal["exact", "features", "layer"] = "exact"
    """Where the method is solved: on the shared parameters, on the representation, or on the last shared layer."""
    scale: Literal["native", "sum", "mean", "unit"] = "native"
    """Length of the shared direction: the method's own, or that of the summed, the mean or a unit gradient."""
    data_dir: Path | None = None
    """Folder of the data; without it the data packaged with detente are used where there are any."""
    epochs: int = 100
    """Passes over the training data."""
    max_steps: int | None = None
    """Stop after this many steps, whatever the epochs."""
    batch_size: int = 256
    """Examples of one step."""
    devices: int = 1
    """Processes that share every batch, one for each device; on a machine without accelerators they share its cores."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Precision of the network's forward pass in training (autocast); 16-mixed scales the losses. Evaluation is in
    float32."""
    accumulate: int = 1
    """Work through every batch in so many micro-batches, one after the other; the method still decides once, for all
    of them."""
    memory: Literal["fast", "batched", "low"] = "fast"
    """With gradients exact: one backward for each task, all tasks batched, or the Gramian layer by layer with no
    task's gradient kept."""
    further_batches: Literal["independent", "same"] = "independent"
    """For methods that compare the gradients of several batches (modo, and sdmgrad with solver=sgd): draw each of them
    anew at every step, or let the step's own batch serve for all."""
    clip_norm: float | None = None
    """Shorten the combined gradient of all parameters to this norm where it is longer."""
    optimizer: OptimizerName = "sgd"
    """The optimizer that takes the steps; mao and mtadam keep moments of every task and replace the method."""
    search: Literal["none", SearchName] = "none"
    """Find the length of every step by a line search, in the parameters or (fast) in the representation, starting from
    the learning rate."""
    search_gamma: float = 2.0
    """Divisor of the length after a rejected trial."""
    search_c: float = 1e-4
    """Share of the predicted decrease that a trial must reach."""
    search_trials: int = 20
    """Trials of one search."""
    search_check: int | None = None
    """With the fast search: look after every so many steps whether the condition holds for the network itself, and warn
    where it often does not. Left out, after every 7th; 0 never."""
    search_small_step: float | None = None
    """Length of the constant step where some loss does not fall along the direction; left out, such a step is an
    error."""
    search_lower: Literal["none", "cap", "divided"] = "none"
    """Divide the first length after ten searches in a row that found none (cap), or that needed more than one trial
    (divided)."""
    search_precondition: Literal["none", "adam", "rmsprop", "adagrad"] = "none"
    """With backtracking: divide the directions by the running moments of that optimizer."""
    learning_rate: float = 0.01
    """Learning rate at the start; with a search the first length that is tried."""
    momentum: float | None = None
    """Momentum of SGD. Left out, 0.9, and 0 with a search."""
    nesterov: bool = False
    """Nesterov momentum for SGD."""
    weight_decay: float = 0.0
    """Weight decay (decoupled for adamw)."""
    halve_every: int = 30
    """Halve the learning rate every so many epochs; 0 never does."""
    selection: Literal["mean", "delta-m", "last", "last-k", "non-dominated"] = "mean"
    """Which epochs are tested, chosen on validation data: the best mean of the tasks' main metrics; the best Δm
    against the baselines; the last; the mean over the last k; the latest that no other epoch dominates."""
    baseline: tuple[str, ...] = ()
    """Main metric of a network trained for one task alone, as task=value, for the rule delta-m."""
    selection_k: int = 10
    """k of the rule last-k."""
    test: bool = True
    """Measure the chosen epochs on test data. A run finished without is measured when it is asked for again."""
    threads: int | None = None
    """Threads a process computes with; left out, as many as torch chooses. Rounding depends on it."""
    seed: int = 0
    """Seeds the network, the order of the data and the method."""
    record_steps: int = 200
    """About how many steps of the run are recorded in full."""
    measure: bool = False
    """Take task gradients at recorded steps also for methods that do not need them."""
    balance: bool = False
    """Record at recorded steps what each task contributes to the update of every layer, with an optimizer of Adam's
    kind. Under adam and adamw it takes every task's gradient at every step, beside what the method needs."""
    logger: tuple[Literal["tensorboard", "csv", "wandb", "mlflow"], ...] = ()
    """Also send losses, metrics, weights and refusals to these, beside the records."""
    checkpoint_seconds: float = 60.0
    """Save a checkpoint at least this often within an epoch (one is always saved at its end)."""

    def __post_init__(self) -> None:
        # What was left out is stored as the number it stands for, so that the record of a run tells it.
        if self.momentum is None:
            object.__setattr__(self, "momentum", 0.9 if self.search == "none" else 0.0)
        if self.search_check is None:
            object.__setattr__(self, "search_check", CHECK_EVERY if self._has("check_true") else 0)
        for name in ("epochs", "batch_size", "devices", "accumulate", "selection_k", "record_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; it must be at least 1.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps is {self.max_steps}; it must be at least 1.")
        if self.halve_every < 0:
            raise ValueError(f"halve_every is {self.halve_every}; it must be 0 (never) or more.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be positive and finite.")
        self._check_scale()
        self._check_search()

    def _check_scale(self) -> None:
        """What serves large networks goes with a combined gradient and one of torch's optimizers."""
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm is {self.clip_norm}; it must be positive and finite.")
        if self.batch_size < self.devices * self.accumulate:
            raise ValueError(
                f"a batch of {self.batch_size} cannot be cut into devices x accumulate = {self.devices} x "
                f"{self.accumulate} parts; raise batch_size."
            )
        mover = f"search {self.search}" if self.search != "none" else f"optimizer {self.optimizer}"
        if self.search != "none" or self.per_task:
            for name in ("accumulate", "memory", "clip_norm"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(
                        f"{name} is {getattr(self, name)}; {mover} does not go with it, leave one of them out."
                    )
            if self.precision == "16-mixed" or (self.search != "none" and self.precision != "32-true"):
                raise ValueError(
                    f"precision is {self.precision}; {mover} "
                    + (
                        "compares losses that differ in their last digits: use precision 32-true."
                        if self.search != "none"
                        else "takes the gradients itself and knows no scaler: use precision bf16-mixed or 32-true."
                    )
                )
        elif self.balance:
            for name in ("devices", "accumulate", "memory", "precision", "clip_norm"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(
                        f"{name} is {getattr(self, name)}; balance under {self.optimizer} watches one process's whole "
                        "batch in full precision: leave one of them out, or use optimizer mao."
                    )
        if self.gradients != "exact":
            for name in ("accumulate", "memory"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(
                        f"{name} is {getattr(self, name)}; it works on the gradients of the parameters: use gradients "
                        f"exact instead of {self.gradients}."
                    )
        if self.accumulate > 1 and self.memory != "fast":
            raise ValueError(
                f"memory is {self.memory}; accumulate keeps every task's gradient: leave one of them out."
            )

    def _check_search(self) -> None:
        if self.search == "none":
            for name in _SEARCH_OPTIONS:
                if getattr(self, name) != _without_search(type(self), name):
                    raise ValueError(f"{name} is {getattr(self, name)!r}; it needs a search, see --search.")
            return
        if not 1 < self.search_gamma < math.inf:
            raise ValueError(f"search_gamma is {self.search_gamma}; it must be finite and greater than 1.")
        if not 0 < self.search_c < 1:
            raise ValueError(f"search_c is {self.search_c}; it must lie between 0 and 1.")
        if self.search_trials < 1:
            raise ValueError(f"search_trials is {self.search_trials}; it must be at least 1.")
        if self.search_small_step is not None and not 0 < self.search_small_step < math.inf:
            raise ValueError(
                f"search_small_step is {self.search_small_step}; it must be positive and finite."
            )
        if self.search_check is not None and self.search_check < 0:
            raise ValueError(f"search_check is {self.search_check}; it must be 0 (never) or more.")
        declared = searches()[self.search]
        for name, option in _SEARCH_OPTIONS.items():
            if option not in declared.options and getattr(self, name) != _without_search(type(self), name):
                others = " or ".join(other for other, info in searches().items() if option in info.options)
                raise ValueError(
                    f"{name} is {getattr(self, name)}; search {self.search} has no such option. "
                    f"{declared.lacks[option]} Leave it out, or use --search {others}."
                )
        plain = {"optimizer": "sgd", "momentum": 0, "nesterov": False, "weight_decay": 0, "scale": "native"}
        for name, value in plain.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; search {self.search} takes plain steps along the method's "
                    "direction: use optimizer sgd, momentum 0, no nesterov, weight_decay 0 and scale native."
                )
        if self.gradients != declared.space:
            raise ValueError(
                f"gradients is {self.gradients}; search {self.search} needs gradients {declared.space}."
            )
        if self.balance:
            raise ValueError(
                "balance follows from the moments of an optimizer of Adam's kind: use it without a search."
            )

    @property
    def per_task(self) -> bool:
        """Whether the optimizer keeps moments of every task and takes the step itself."""
        return optimizer_info(self.optimizer).per_task

    def _has(self, option: str) -> bool:
        """Tell whether there is a search, and it has the option."""
        return self.search != "none" and option in searches()[self.search].options

    def baselines(self, tasks: Sequence[str]) -> dict[str, float]:
        """The single-task baselines by task; empty unless the rule delta-m asks for them.

        Raises:
            ValueError: an entry is not task=number, names no task, is zero, or a task has none.

        Example:
            >>> TrainingConfig(selection="delta-m", baseline=("a=0.9", "b=0.8")).baselines(("a", "b"))
            {'a': 0.9, 'b': 0.8}
        """
        if self.selection != "delta-m":
            return {}
        found = by_task("baseline", self.baseline, tasks)
        for task in tasks:
            if task not in found:
                raise ValueError(
                    f"selection delta-m needs a baseline for task {task!r}: --baseline {task}=VALUE."
                )
            if found[task] == 0:
                raise ValueError(f"baseline of task {task!r} is 0; Δm divides by it.")
        return found

    def method_options(self) -> dict[str, Any]:
        """The options of the method: numbers, mappings and sequences as Python values, everything else as text.

        Raises:
            ValueError: an entry is not name=value.

        Example:
            >>> TrainingConfig(option=("c=0.4", "solver=exact")).method_options()
            {'c': 0.4, 'solver': 'exact'}
        """
        options: dict[str, Any] = {}
        for entry in self.option:
            name, equals, value = entry.partition("=")
            if not equals or not name:
                raise ValueError(f"option {entry!r} is not of the form name=value.")
            try:
                options[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                options[name] = value
        return options


def _without_search(kind: type[TrainingConfig], name: str) -> Any:
    return 0 if name == "search_check" else getattr(kind, name)


def by_task(option: str, entries: Sequence[str], tasks: Sequence[str]) -> dict[str, float]:
    """Numbers given on the command line as task=number.

    Args:
        option: name of the option, for messages.
        entries: each of the form task=number; the last of a task counts.
        tasks: the known tasks.

    Raises:
        ValueError: an entry has another form, names no task, or its number is not finite.

    Example:
        >>> by_task("loss_factor", ("left=100",), ("left", "right"))
        {'left': 100.0}
    """
    found: dict[str, float] = {}
    for entry in entries:
        task, _, value = entry.partition("=")
        try:
            found[task] = float(value)
        except ValueError as error:
            raise ValueError(f"{option} {entry!r} is not of the form task=number.") from error
        if task not in tasks:
            raise ValueError(f"{option} names the unknown task {task!r}; the tasks are {', '.join(tasks)}.")
        if not math.isfinite(found[task]):
            raise ValueError(f"{option} of task {task!r} is {value}; give a finite number.")
    return found
