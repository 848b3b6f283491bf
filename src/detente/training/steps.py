"""How a batch becomes a step of the network: a combined gradient, one Adam for each task, or a line search."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from detente.methods import Method, describe
from detente.step import backward, task_gradients
from detente.training.config import TrainingConfig
from detente.training.problem import Problem
from detente.values import StepRecord

if TYPE_CHECKING:
    from detente.linesearch.search import Search
    from detente.optim import Contributions

Forward = Callable[[Any], Any]


class Steps(Protocol):
    """What the loop asks for, whatever moves the parameters."""

    def step(
        self, inputs: Any, labels: Any, *, measure: bool, balance: bool
    ) -> tuple[StepRecord, dict[str, Any]]:
        """Move the parameters by one batch; the record, and what else is to be stored with the step.

        ``measure`` asks for the conflict of the task gradients, ``balance`` for what each task contributes.
        """

    def rate(self, epoch: int) -> float:
        """Set the learning rate of an epoch, and return it."""

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
        self.contributions = _contributions(config, module, optimizer)

    def step(
        self, inputs: Any, labels: Any, *, measure: bool, balance: bool
    ) -> tuple[StepRecord, dict[str, Any]]:
        """Fill ``.grad``, in the space the configuration names; take the step unless it was refused."""
        output = self.forward(inputs)
        losses = self.problem.losses(output, labels)
        taken = None
        if self.contributions is not None:  # at every step: Adam's averages remember all of them
            taken = task_gradients(losses, shared=self.shared, retain_graph=True)
        record = self._backward(output, losses, measure)
        further: dict[str, Any] = {}
        if record.accepted:
            self.optimizer.step()
            if self.contributions is not None and taken is not None:
                seen = self.contributions.measure(taken, _known_weights(record, self.info.name))
                further = {"balance": seen.to_dict()} if balance else {}
        self.optimizer.zero_grad()
        return record, further

    def rate(self, epoch: int) -> float:
        """The configured rate, halved every so many epochs."""
        return _set_rate(self.optimizer, self.config, epoch)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, and what the tasks contributed so far."""
        watched = None if self.contributions is None else self.contributions.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "contributions": watched}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.contributions is not None:
            self.contributions.load_state_dict(state["contributions"])

    def _backward(self, output: Any, losses: Mapping[str, torch.Tensor], measure: bool) -> StepRecord:
        config = self.config
        used = self.info.takes_gradients or measure or config.scale != "native"
        space = config.gradients if used else "none"
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
            measure=measure,
        )


class PerTaskSteps:
    """An optimizer that takes the losses themselves and keeps moments of every task."""

    def __init__(
        self, problem: Problem, config: TrainingConfig, method: Method, module: nn.Module, forward: Forward
    ) -> None:
        from detente.optim import MAO, MTAdam

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
        self.problem, self.config, self.forward = problem, config, forward
        shared, own = roles(module, f"optimizer {config.optimizer}")
        transform = _altering(config, method)
        make = {"mao": MAO, "mtadam": MTAdam}[config.optimizer]
        options: dict[str, Any] = {} if transform is None else {"transform": transform}
        named = {parameter: name for name, parameter in module.named_parameters()}
        self.optimizer = make(
            [(named[parameter], parameter) for parameter in shared],
            [(named[parameter], parameter) for parameter in own],
            tasks=tuple(problem.tasks),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            **options,
        )

    def step(
        self, inputs: Any, labels: Any, *, measure: bool, balance: bool
    ) -> tuple[StepRecord, dict[str, Any]]:
        """One backward for each task, one move; with ``balance`` also what each task contributes to it."""
        losses = self.problem.losses(self.forward(inputs), labels)
        record = self.optimizer.step(losses, measure=balance)
        seen = self.optimizer.balance
        return record, {} if seen is None else {"balance": seen.to_dict()}

    def rate(self, epoch: int) -> float:
        """The configured rate, halved every so many epochs."""
        return _set_rate(self.optimizer, self.config, epoch)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's."""
        return dict(self.optimizer.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The optimizer's."""
        self.optimizer.load_state_dict(state)


class SearchedSteps:
    """A line search along the method's direction; the learning rate is the first length it tries."""

    def __init__(
        self, problem: Problem, config: TrainingConfig, method: Method, module: nn.Module, forward: Forward
    ) -> None:
        from detente.linesearch import Backtracking, FastBacktracking

        if config.optimizer != "sgd" or config.momentum or config.weight_decay or config.scale != "native":
            raise ValueError(
                f"search {config.search} takes plain steps along the method's direction: use optimizer sgd, momentum "
                "0, weight decay 0 and scale native."
            )
        _no_balance(config)
        self.problem, self.config, self.module, self.forward = problem, config, module, forward
        shared, own = roles(module, f"search {config.search}")
        self.fast = config.search == "fast"
        if config.gradients != ("features" if self.fast else "exact"):
            raise ValueError(
                f"search {config.search} needs gradients {'features' if self.fast else 'exact'}, not "
                f"{config.gradients}."
            )
        options: dict[str, Any] = {
            "gamma": config.search_gamma,
            "c": config.search_c,
            "max_trials": config.search_trials,
        }
        self.search: Search = (
            FastBacktracking(
                method, shared, own, config.learning_rate, check_true=config.search_check or False, **options
            )
            if self.fast
            else Backtracking(method, shared, own, config.learning_rate, **options)
        )

    def step(
        self, inputs: Any, labels: Any, *, measure: bool, balance: bool
    ) -> tuple[StepRecord, dict[str, Any]]:
        """One search on one batch; the search's own record tells the conflict."""

        def closure(features: Any = None) -> tuple[Any, dict[str, torch.Tensor]]:
            output = (
                self.forward(inputs)
                if features is None
                else self.problem.from_features(self.module, features)
            )
            return self.problem.features(output), self.problem.losses(output, labels)

        found = self.search.step(closure)
        assert found.record is not None
        record = found.record
        if found.status == "capped":
            record = replace(
                record, status="refused", notes=(*record.notes, "no length of the search was accepted")
            )
        return record, {"search": found.to_dict()}

    def rate(self, epoch: int) -> float:
        """The first length, halved every so many epochs like a learning rate."""
        self.search.lr_ub = _scheduled(self.config, epoch)
        return self.search.lr_ub

    def state_dict(self) -> dict[str, Any]:
        """The search's."""
        return self.search.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The search's."""
        self.search.load_state_dict(state)


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
    from detente.optim import Contributions

    if config.optimizer not in ("adam", "adamw"):
        _no_balance(config)
    if config.scale != "native":
        raise ValueError("balance knows gradients by the method's weights: use scale native.")
    shared, _ = roles(module, "balance")
    named = {parameter: name for name, parameter in module.named_parameters()}
    return Contributions(optimizer, [(named[parameter], parameter) for parameter in shared])


def _no_balance(config: TrainingConfig) -> None:
    if config.balance:
        raise ValueError(
            "balance follows from the moments of an optimizer of Adam's kind: use optimizer adam, adamw, mao or mtadam "
            "without a search."
        )


def _known_weights(record: StepRecord, method: str) -> tuple[float, ...]:
    if record.weights is None:
        raise ValueError(
            f"method {method} gives no weight for each task, so a task's contribution to the step is not defined: "
            "leave balance out."
        )
    return record.weights


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
