"""How a batch becomes a step of the network: a combined gradient, one Adam for each task, or a line search."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from detente.autograd.branches import branch
from detente.methods import Method, describe
from detente.optim import Contributions, optimizers
from detente.optim import create as create_optimizer
from detente.optim import info_of as optimizer_info
from detente.optim.base import TaskOptimizer
from detente.step import accumulate, backward, task_gradients
from detente.training.config import TrainingConfig
from detente.training.problem import Problem
from detente.values import StepRecord

if TYPE_CHECKING:
    from detente.linesearch import Closure, SearchRecord
    from detente.linesearch.search import Search

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Batch:
    """What a process works through at once: its part of a batch, or a micro-batch of that.

    Attributes:
        inputs, labels: as the problem gives them.
        examples: how many; None where they are the whole batch, which needs no weighting.
        further: independent ones of the same size, for a method that compares the gradients of several.
    """

    inputs: Any
    labels: Any
    examples: int | None = None
    further: tuple[Batch, ...] = ()


class Steps(Protocol):
    """What the loop asks for, whatever moves the parameters."""

    def step(
        self, batches: Sequence[Batch], *, measure: bool, balance: bool
    ) -> tuple[StepRecord, dict[str, Any]]:
        """Move the parameters by one batch; the record, and what else is to be stored with the step.

        ``measure`` asks for the conflict of the task gradients, ``balance`` for what each task contributes.
        """

    def rate(self, epoch: int) -> float:
        """Set the learning rate of an epoch, and return it."""

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """What is to be stored of the epoch that ended, in plain numbers; empty where there is nothing to tell."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beyond the network and the method."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""


class GradientSteps:
    """One combined gradient, and one of torch's optimizers over all parameters."""

    def __init__(
        self,
        problem: Problem,
        config: TrainingConfig,
        method: Method,
        module: nn.Module,
        forward: Forward,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.problem, self.config, self.method, self.module = problem, config, method, module
        self.forward, self.optimizer = forward, optimizer
        self.info = describe(method)
        named = getattr(module, "shared_parameters", None)
        self.shared = None if named is None else list(named())
        self.device = next(module.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type) if config.precision == "16-mixed" else None
        self.contributions = _contributions(config, module, optimizer)
        # Contributions are taken on the parameters, which gradients behind branches do not reach.
        offered = "branch" in inspect.signature(module.forward).parameters
        self.branches = offered and self.contributions is None

    def step(
        self, batches: Sequence[Batch], *, measure: bool, balance: bool
    ) -> tuple[StepRecord, dict[str, Any]]:
        """Fill ``.grad``, in the space the configuration names; take the step unless it was refused."""
        taken = None
        with nullcontext() if len(batches) == 1 else accumulate(self.method, len(batches)):
            for batch in batches:
                with autocast(self.config, self.device):
                    output = self._output(batch.inputs, measure)
                    losses = self.problem.losses(output, batch.labels)
                    extra = [self._further(losses, other) for other in batch.further]
                if self.contributions is not None:  # at every step: Adam's averages remember all of them
                    taken = task_gradients(losses, shared=self.shared, retain_graph=True)
                record = self._backward(output, losses, extra, batch.examples, measure)
        further: dict[str, Any] = {}
        if record.accepted:
            self._move()
            if self.contributions is not None and taken is not None:
                seen = self.contributions.measure(taken, _known_weights(record, self.info.name))
                further = {"balance": seen.to_dict()} if balance else {}
        self.optimizer.zero_grad()
        return record, further

    def rate(self, epoch: int) -> float:
        """The configured rate, halved every so many epochs."""
        return _set_rate(self.optimizer, self.config, epoch)

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """Nothing to tell."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's and the scaler's, and what the tasks contributed so far."""
        watched = None if self.contributions is None else self.contributions.state_dict()
        state = {"optimizer": self.optimizer.state_dict(), "contributions": watched}
        return state if self.scaler is None else {**state, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.contributions is not None:
            self.contributions.load_state_dict(state["contributions"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])

    def _move(self) -> None:
        """Clip, and move the parameters; a scaler skips the step where a gradient overflowed."""
        if self.config.clip_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def _space(self, measure: bool) -> str:
        """Name the space in which task gradients are taken; ``none`` where the method looks at no gradients."""
        used = self.info.takes_gradients or measure or self.config.scale != "native"
        return self.config.gradients if used else "none"

    def _output(self, inputs: Any, measure: bool) -> Any:
        """Run the network; on features each head reads a branch of its own, where the network offers that."""
        if self.branches and self._space(measure) == "features":
            return self.forward(inputs, branch=branch)
        return self.forward(inputs)

    def _further(self, losses: Mapping[str, torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
        """The losses of another batch, of the same tasks."""
        others = self.problem.losses(self.forward(batch.inputs), batch.labels)
        if set(others) != set(losses):
            raise ValueError(
                f"the step's batch has the tasks {', '.join(losses)}, and one that {self.info.name} compares it with "
                f"has {', '.join(others)}. Where tasks may be absent, use further_batches same."
            )
        return others

    def _backward(
        self,
        output: Any,
        losses: Mapping[str, torch.Tensor],
        extra: Sequence[Mapping[str, torch.Tensor]],
        examples: int | None,
        measure: bool,
    ) -> StepRecord:
        config, space = self.config, self._space(measure)
        last: Any = getattr(self.module, "last_shared_parameters", None)
        if space == "layer" and last is None:
            raise ValueError(
                "the network names no last_shared_parameters(); use gradients exact or features."
            )
        return backward(
            losses,
            self.method,
            features=self.problem.features(output) if space == "features" else None,
            shared=self.shared,
            solve_on=last() if space == "layer" else None,
            scale=config.scale,
            memory=config.memory,
            measure=measure,
            extra=extra,
            scaler=self.scaler,
            samples=examples,
        )


class PerTaskSteps:
    """An optimizer that takes the losses themselves and keeps moments of every task."""

    def __init__(
        self, problem: Problem, config: TrainingConfig, method: Method, module: nn.Module, forward: Forward
    ) -> None:
        if config.gradients != "exact" or config.scale != "native":
            raise ValueError(
                f"optimizer {config.optimizer} works on the gradients of the shared parameters: use gradients exact "
                "and scale native."
            )
        if config.measure:
            raise ValueError(
                f"optimizer {config.optimizer} takes one task's gradient after the other, so their conflict is not "
                "measured: leave measure out; balance records what each task contributes."
            )
        takes_transform = optimizer_info(config.optimizer).takes_transform
        asked = describe(method).takes_gradients or config.method != TrainingConfig.method
        if asked and not takes_transform:
            others = " or ".join(name for name, info in optimizers().items() if info.takes_transform)
            raise ValueError(
                f"optimizer {config.optimizer} rescales the gradients of the tasks itself and takes no method: leave "
                f"method {config.method} out, or use optimizer {others}."
            )
        self.problem, self.config, self.forward = problem, config, forward
        self.device = next(module.parameters()).device
        shared, own = roles(module, f"optimizer {config.optimizer}")
        transform = _altering(config, method)
        options: dict[str, Any] = {} if transform is None else {"transform": transform}
        named = {parameter: name for name, parameter in module.named_parameters()}
        optimizer = create_optimizer(
            config.optimizer,
            [(named[parameter], parameter) for parameter in shared],
            [(named[parameter], parameter) for parameter in own],
            tasks=tuple(problem.tasks),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            **options,
        )
        assert isinstance(optimizer, TaskOptimizer), "see the declaration"
        self.optimizer = optimizer

    def step(
        self, batches: Sequence[Batch], *, measure: bool, balance: bool
    ) -> tuple[StepRecord, dict[str, Any]]:
        """One backward for each task, one move; with ``balance`` also what each task contributes to it."""
        (batch,) = batches
        with autocast(self.config, self.device):
            losses = self.problem.losses(self.forward(batch.inputs), batch.labels)
        record = self.optimizer.step(losses, measure=balance, samples=batch.examples)
        seen = self.optimizer.balance
        return record, {} if seen is None else {"balance": seen.to_dict()}

    def rate(self, epoch: int) -> float:
        """The configured rate, halved every so many epochs."""
        return _set_rate(self.optimizer, self.config, epoch)

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """Nothing to tell."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's."""
        return dict(self.optimizer.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The optimizer's."""
        self.optimizer.load_state_dict(state)


class TooLongWarning(UserWarning):
    """The first length of a fast search is most likely too long."""


@dataclass
class Tally:
    """What the searches of one epoch did.

    Attributes:
        length: the first length when the epoch began; None before.
        steps, trials: how many.
        first: steps that took the first length they tried.
        capped: steps for which no length was accepted.
        checks, failures: steps after which the network itself was looked at, and those after which the condition did
            not hold for it.
    """

    length: float | None = None
    steps: int = 0
    trials: int = 0
    first: int = 0
    capped: int = 0
    checks: int = 0
    failures: int = 0

    def add(self, found: SearchRecord) -> None:
        """One more step."""
        self.steps += 1
        self.trials += found.trials
        self.first += found.status == "accepted" and found.trials == 1
        self.capped += found.status == "capped"
        self.checks += found.true_condition is not None
        self.failures += found.true_condition is False


class SearchedSteps:
    """A line search along the method's direction; the learning rate is the first length it tries."""

    def __init__(
        self, problem: Problem, config: TrainingConfig, method: Method, module: nn.Module, forward: Forward
    ) -> None:
        from detente.linesearch import create

        self.problem, self.config, self.module, self.forward = problem, config, module, forward
        shared, own = roles(module, f"search {config.search}")
        small, lower, divisor = config.search_small_step, config.search_lower, config.search_precondition
        options: dict[str, Any] = {
            "gamma": config.search_gamma,
            "c": config.search_c,
            "max_trials": config.search_trials,
            "on_no_descent": "error" if small is None else "small-step",
            "small_step": small,
            "lower_ub": None if lower == "none" else lower,
            "precondition": None if divisor == "none" else divisor,
            "check_true": config.search_check or False,
        }
        self.search: Search = create(config.search, method, shared, own, config.learning_rate, **options)
        self.tally, self.warned = Tally(), False

    def step(
        self, batches: Sequence[Batch], *, measure: bool, balance: bool
    ) -> tuple[StepRecord, dict[str, Any]]:
        """One search on one batch; the search's own record tells the conflict."""
        (batch,) = batches

        def closure(features: Any = None) -> tuple[Any, dict[str, torch.Tensor]]:
            output = (
                self.forward(batch.inputs)
                if features is None
                else self.problem.from_features(self.module, features)
            )
            return self.problem.features(output), self.problem.losses(output, batch.labels)

        found = self._search(closure, batch.examples)
        self.tally.add(found)
        assert found.record is not None
        record = found.record
        if found.status == "capped":
            record = replace(
                record, status="refused", notes=(*record.notes, "no length of the search was accepted")
            )
        return record, {"search": found.to_dict()}

    def rate(self, epoch: int) -> float:
        """The first length, halved every so many epochs like a learning rate, and lowered as the search asked.

        An epoch that is resumed has the length it began with.
        """
        self.search.lr_ub = _scheduled(self.config, epoch)
        if self.tally.length is None:
            self.tally.length = self.search.first_length
        return self.tally.length

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """What the searches of the epoch did; a warning, once, where the fast one moves the encoder too far."""
        tally, self.tally = self.tally, Tally()
        if not self.warned and tally.failures > 0.1 * tally.checks:
            self.warned = True
            warnings.warn(
                f"the fast search took its first length {tally.length:g} in {tally.first} of {tally.steps} steps of "
                f"epoch {epoch + 1}, but after {tally.failures} of {tally.checks} steps that were checked some loss of "
                "the network itself had not fallen as promised. This search moves the representation and does not "
                "bound the step of the encoder, so the first length acts like a learning rate, here most likely too "
                "high a one: training can end at chance. Lower --learning-rate, or use --search backtracking "
                "--gradients exact, which tries every length on the network itself.",
                TooLongWarning,
                stacklevel=2,
            )
        return asdict(tally)

    def state_dict(self) -> dict[str, Any]:
        """The search's, and the tally of the epoch so far."""
        return {"search": self.search.state_dict(), "tally": asdict(self.tally), "warned": self.warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        tally = Tally(**state["tally"])
        self.search.load_state_dict(state["search"])
        self.tally, self.warned = tally, state["warned"]

    def _search(self, closure: Closure, examples: int | None) -> SearchRecord:
        """A step of the search; what it advises is told in flags."""
        from detente.linesearch import NoDescent, SearchFailed

        try:
            return self.search.step(closure, samples=examples)
        except NoDescent as error:
            divisor = self.config.search_precondition
            other = (
                "a method whose direction descends for every task, such as mgda (--method)"
                if divisor == "none"
                else f"no --search-precondition {divisor}, by which a descent for all tasks need not stay one"
            )
            raise NoDescent(
                error.told,
                f"Use {other}, or take a constant step there with --search-small-step LENGTH.",
                error.tasks,
            ) from error
        except SearchFailed as error:
            advice = "Lower --learning-rate, or raise --search-trials."
            if self.config.search_small_step is not None:
                advice = "Lower --search-small-step or --learning-rate."
            raise SearchFailed(error.told, advice, error.tasks) from error


def autocast(config: TrainingConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The precision of a forward pass and its losses."""
    if config.precision == "32-true":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if config.precision == "bf16-mixed" else torch.float16)


def roles(module: nn.Module, what: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Shared parameters as the network names them, and all the others.

    Raises:
        ValueError: the network does not name them.
    """
    named = getattr(module, "shared_parameters", None)
    if named is None:
        raise ValueError(
            f"{what} must know which parameters are shared: give the network a method shared_parameters()."
        )
    shared = list(named())
    known = set(shared)
    return shared, [parameter for parameter in module.parameters() if parameter not in known]


def _contributions(
    config: TrainingConfig, module: nn.Module, optimizer: torch.optim.Optimizer
) -> Contributions | None:
    """What watches the tasks' contributions to Adam's updates; None unless the configuration asks for it."""
    if not config.balance:
        return None
    if not optimizer_info(config.optimizer).shares_updates:
        known = " or ".join(name for name, info in optimizers().items() if info.shares_updates)
        raise ValueError(
            f"balance follows from the moments of an optimizer of Adam's kind: use optimizer {known} without a search."
        )
    if config.scale != "native":
        raise ValueError("balance knows gradients by the method's weights: use scale native.")
    shared, _ = roles(module, "balance")
    named = {parameter: name for name, parameter in module.named_parameters()}
    return Contributions(optimizer, [(named[parameter], parameter) for parameter in shared])


def _known_weights(record: StepRecord, method: str) -> tuple[float, ...]:
    """Give the weights by which the gradients became the step, of the tasks that took part in the shared problem."""
    weights = tuple(weight for weight in record.weights or () if weight is not None)
    if record.status == "stationary":
        return (0.0,) * (len(weights) or len(record.names))
    if not weights:
        raise ValueError(
            f"method {method} gives no weight for each task, so a task's contribution to the step is not defined: "
            "leave balance out."
        )
    return weights


def _altering(config: TrainingConfig, method: Method) -> Method | None:
    """The method whose altered gradients the optimizer uses; None if the configuration asks for none."""
    if describe(method).takes_gradients:
        return method
    if config.method != TrainingConfig.method:
        raise ValueError(
            f"optimizer {config.optimizer} takes every task's gradient at its own scale, so weights of the losses "
            f"change nothing: leave method {config.method} out, or name one that alters gradients, such as pcgrad."
        )
    return None


def _scheduled(config: TrainingConfig, epoch: int) -> float:
    return config.learning_rate * (0.5 ** (epoch // config.halve_every) if config.halve_every else 1.0)


def _set_rate(optimizer: torch.optim.Optimizer, config: TrainingConfig, epoch: int) -> float:
    rate = _scheduled(config, epoch)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
