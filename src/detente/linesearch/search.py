"""One step of a line search: what both searches have in common."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final

import numpy as np
from torch import nn

from detente.autograd.host import to_host
from detente.autograd.measure import Taken
from detente.autograd.partition import Memory
from detente.autograd.ranks import ranks_of
from detente.linesearch.armijo import (
    Array,
    ascends,
    repeats,
    rounding_tolerance,
    sufficient_decrease,
)
from detente.linesearch.closure import Closure, Losses, Runs, in_order
from detente.linesearch.moves import Moves
from detente.linesearch.options import (
    check_method,
    check_modules,
    check_roles,
    choice,
    in_range,
    kept,
    modules_in,
    whole,
)
from detente.linesearch.plan import Plan
from detente.linesearch.record import ClosureChanged, NoDescent, Outcome, SearchFailed, SearchRecord
from detente.methods import Method
from detente.step import record_of, task_gradients, undone_on_failure, with_direction
from detente.values import Combination, StepRecord, TaskGradients

Descent = Literal["error", "small-step"]
Cap = Literal["skip", "error"]
Lower = Literal["cap", "divided"] | None
Modules = nn.Module | Iterable[nn.Module] | None


@dataclass(frozen=True)
class Taking:
    """An accepted trial."""

    status: Outcome
    eta: float
    trials: int
    losses: Array


class Search(ABC):
    """The loop of both searches; :class:`Backtracking` and :class:`FastBacktracking` say what a trial is.

    The options are those of :class:`Backtracking`.
    """

    space: ClassVar[Literal["exact", "features"]]
    counters: ClassVar[tuple[str, ...]] = ("steps", "capped", "in_a_row")

    def __init__(
        self,
        method: Method,
        shared: Any,
        task_specific: Any,
        lr_ub: float,
        gamma: float,
        c: float,
        max_trials: int,
        *,
        on_cap: Cap,
        on_no_descent: Descent,
        small_step: float | None,
        lower_ub: Lower,
        patience: int,
        modules: Modules,
        check_steps: int,
        rounding: float,
    ) -> None:
        self.method = check_method(method, self.space)
        self.shared, self.task_specific = kept(shared), kept(task_specific)
        check_roles(self.shared, self.task_specific)
        self.lr_ub = lr_ub
        self.gamma = in_range("gamma", gamma, above=1)
        self.c = in_range("c", c, below=1)
        self.max_trials = whole("max_trials", max_trials, least=1)
        self.on_cap = choice("on_cap", on_cap, ("skip", "error"))
        self.on_no_descent = choice("on_no_descent", on_no_descent, ("error", "small-step"))
        if (on_no_descent == "small-step") != (small_step is not None):
            raise ValueError(
                "options on_no_descent='small-step' and small_step= belong together: give both, or neither."
            )
        self.small_step = None if small_step is None else in_range("small_step", small_step)
        self.lower_ub = choice("lower_ub", lower_ub, (None, "cap", "divided"))
        if lower_ub == "cap" and on_cap == "error":
            raise ValueError(
                "option lower_ub='cap' counts searches that end at the cap: use on_cap='skip' with it."
            )
        self.patience = whole("patience", patience, least=1)
        self._discover = modules is None
        self._modules = [*modules_in(self.shared), *modules_in(self.task_specific), *check_modules(modules)]
        self.check_steps = whole("check_steps", check_steps, least=0)
        self.rounding = in_range("rounding", rounding, least=0)
        self._memory = Memory()
        self.steps = self.capped = self.in_a_row = 0

    @property
    def lr_ub(self) -> float:
        """The first length that is tried, > 0; may be set between steps, by a schedule."""
        return self._lr_ub

    @lr_ub.setter
    def lr_ub(self, value: float) -> None:
        self._lr_ub = in_range("lr_ub", value)

    @final
    def step(self, closure: Closure) -> SearchRecord:
        """Find a length and move the parameters by it; no ``.grad`` is touched.

        Args:
            closure: ``closure()`` runs the network on the batch of this step and returns (features, losses);
                ``closure(features)`` runs the heads alone. See :class:`~detente.linesearch.closure.Closure`.

        Returns:
            What was done, in plain numbers.

        Raises:
            NoDescent: some loss does not fall along the direction, and no small step was asked for.
            ClosureChanged: the closure gives other losses when it is called again at the same point.
            SearchFailed: no trial was accepted and a loss of the last one was NaN or infinite, or ``on_cap="error"``.
            ValueError: what :func:`detente.backward` raises for losses and gradients.
            TypeError: the closure returns something else.

            After any of them parameters, buffers, random state and method are as they were before the step.
        """
        started = time.perf_counter()
        if ranks_of(None) is not None:
            raise RuntimeError(
                "the line searches do not average their trials over processes, and training on would let the ranks "
                "drift apart. Run on one process."
            )
        runs = Runs(closure, self._modules, discover=self._discover)
        undo: list[Moves] = []
        with self._undone_on_failure(runs, undo):
            features, losses = self._first(runs)
            taken = self._take(features, losses)
            combination = self.method.combine(taken.gradients)
            decided = record_of(taken.gradients, combination)
            if not combination.accepted:
                return self._end(runs, started, decided, None, None, "refused")
            slopes = slopes_by_gramian(taken.gradients, combination)
            combination = with_direction(combination, taken.gradients)
            plan = self._plan(taken, combination, slopes, features, in_order(losses, decided.names))
            undo.append(plan.moves)
            decided = replace(decided, seconds=time.perf_counter() - started)
            return self._search(runs, started, decided, plan, undo)

    # ---- saving

    def state_dict(self) -> dict[str, Any]:
        """What a new search needs to go on bit for bit, beside the network's own state and the random state.

        That is the first length as it is now, the counters, and the state of the method.
        """
        counters = {name: getattr(self, name) for name in self.counters}
        return {"lr_ub": self.lr_ub, "counters": counters, "method": self.method.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; options are those of this search.

        Raises:
            ValueError: the state is not that of such a search; nothing is changed.
        """
        if state.keys() != self.state_dict().keys() or state["counters"].keys() != set(self.counters):
            raise ValueError(
                f"this is not the state of a {type(self).__name__}: pass what its state_dict() returned."
            )
        lr_ub = in_range("lr_ub", state["lr_ub"])
        counters = {name: whole(name, value, least=0) for name, value in state["counters"].items()}
        self.method.load_state_dict(state["method"])
        self._lr_ub = lr_ub
        for name, value in counters.items():
            setattr(self, name, value)

    # ---- what a trial is

    @abstractmethod
    def _first(self, runs: Runs) -> tuple[Any, Losses]:
        """Representation and losses, with a graph."""

    @abstractmethod
    def _plan(
        self, taken: Taken, combination: Combination, slopes: Array | None, features: Any, losses: list[Any]
    ) -> Plan:
        """What to move, and along what; ``slopes`` [T] along the method's direction where the Gramian gives them."""

    @abstractmethod
    def _losses_at(self, runs: Runs, plan: Plan, eta: float) -> Losses:
        """The losses at a distance ``eta``, the plan's parameters moved already."""

    @abstractmethod
    def _settle(self, runs: Runs, plan: Plan, taking: Taking, undo: list[Moves]) -> tuple[Array, bool] | None:
        """Finish an accepted step; the network's own losses and whether the condition holds for them, where asked."""

    # ---- private

    def _take(self, features: Any, losses: Losses) -> Taken:
        taken = task_gradients(
            losses,
            features=features if self.space == "features" else None,
            shared=self.shared,
            task_specific=self.task_specific,
            blocks="blocks" in self.method.needs_now(),
            workspace=self._memory,
        )
        if taken is None:
            raise ValueError(
                "no parameter named in shared= requires a gradient, so there is nothing to search along."
            )
        return taken

    def _search(
        self, runs: Runs, started: float, decided: StepRecord, plan: Plan, undo: list[Moves]
    ) -> SearchRecord:
        if self.steps < self.check_steps:
            self._check_closure(runs, plan)
        if plan.slopes is None and not plan.descends:
            plan.read(*to_host([plan.unread]))
        lengths, status = self._lengths(), "accepted"
        if plan.slopes is not None:
            moved = plan.moved()
            if not moved.any():
                return self._end(runs, started, decided, plan, None, "stationary")
            against = ascends(plan.slopes, moved)
            if against.any():
                lengths, status = [self._without_descent(plan, against)], "small-step"
        for trial, eta in enumerate(lengths, start=1):
            plan.moves.to(eta)
            after = self._evaluate(runs, plan, eta)
            if (self._holds(plan, after, eta) if status == "accepted" else np.isfinite(after)).all():
                taking = Taking("accepted" if status == "accepted" else "small-step", eta, trial, after)
                seen = self._settle(runs, plan, taking, undo)
                return self._end(runs, started, decided, plan, taking, taking.status, seen)
        self._check_failure(runs, plan, after, eta)
        return self._end(runs, started, decided, plan, None, "capped")

    def _lengths(self) -> list[float]:
        lengths = [self.lr_ub]
        while len(lengths) < self.max_trials:
            lengths.append(lengths[-1] / self.gamma)
        return lengths

    def _evaluate(self, runs: Runs, plan: Plan, eta: float) -> Array:
        """[T] the losses at a distance ``eta``; slopes that are still on a device come with the same copy."""
        losses = in_order(self._losses_at(runs, plan, eta), plan.taken.gradients.names)
        values, numbers = to_host([losses, plan.unread])
        plan.read(numbers)
        return values

    def _holds(self, plan: Plan, after: Array, eta: float) -> np.ndarray:
        assert plan.slopes is not None
        tolerance = rounding_tolerance(plan.before, after, plan.epsilon, self.rounding)
        return sufficient_decrease(plan.before, after, plan.slopes, eta, self.c, tolerance)

    def _check_closure(self, runs: Runs, plan: Plan) -> None:
        """See that the closure gives the same losses again where the step began."""
        again = self._evaluate(runs, plan, 0.0)
        same = repeats(plan.before, again, plan.epsilon)
        if not same.all():
            task = int(np.argmin(same))
            raise ClosureChanged(
                f"the closure gave task {plan.taken.gradients.names[task]!r} the loss {plan.before[task]:.9g} and, "
                f"called again with the same parameters, {again[task]:.9g}. Fetch the batch outside the closure, and "
                "draw random numbers from torch's global generator only: the search rewinds that one. Nothing was "
                "changed."
            )

    def _without_descent(self, plan: Plan, against: np.ndarray) -> float:
        """The constant small step."""
        if self.small_step is not None:
            return self.small_step
        assert plan.slopes is not None
        named = zip(plan.taken.gradients.names, plan.slopes, against, strict=True)
        listed = ", ".join(f"{name!r} ({slope:.3g})" for name, slope, worse in named if worse)
        raise NoDescent(
            f"the direction of {self.method.declares.name} is no descent for task {listed} (in brackets what the loss "
            "falls by per unit of length): no length can satisfy the condition for all tasks. Use a method without "
            "conflict such as mgda, or on_no_descent='small-step' with small_step=. Nothing was changed."
        )

    def _check_failure(self, runs: Runs, plan: Plan, after: Array, eta: float) -> None:
        """No trial was accepted: put everything back, tell a changed batch from a real failure, complain if asked."""
        plan.moves.back()
        self._check_closure(runs, plan)
        names = plan.taken.gradients.names
        bad = [name for name, loss in zip(names, after, strict=True) if not np.isfinite(loss)]
        if bad:
            raise SearchFailed(
                f"the loss of task {bad[0]!r} is not finite (NaN or Inf) at the last trial, a step of {eta:.3g}. The "
                "parameters are back where they were. Lower lr_ub, or raise max_trials."
            )
        if self.on_cap == "error":
            worse = [n for n, ok in zip(names, self._holds(plan, after, eta), strict=True) if not ok]
            raise SearchFailed(
                f"the loss of task {worse[0]!r} does not fall enough at the last trial, a step of {eta:.3g}. The "
                "parameters are back where they were. Lower lr_ub, raise max_trials, or skip such steps with "
                "on_cap='skip'."
            )

    def _end(
        self,
        runs: Runs,
        started: float,
        decided: StepRecord,
        plan: Plan | None,
        taking: Taking | None,
        status: Outcome,
        seen: tuple[Array, bool] | None = None,
    ) -> SearchRecord:
        """Leave buffers and random state as one forward pass does, count, and write the record."""
        runs.leave()
        self.steps += 1
        self.capped += status == "capped"
        trials = self.max_trials if status == "capped" else 0 if taking is None else taking.trials
        lr_ub, notes = self.lr_ub, self._lower(status, trials)
        return SearchRecord(
            names=decided.names,
            status=status,
            losses_before=decided.losses,
            losses_after=None if taking is None else _numbers(taking.losses),
            eta=0.0 if taking is None else taking.eta,
            trials=trials,
            slopes=None if plan is None or plan.slopes is None else _numbers(plan.slopes),
            shared_slopes=None if plan is None else _numbers(np.asarray(plan.shared_slopes)),
            lr_ub=lr_ub,
            head_forwards=runs.head_forwards,
            trunk_forwards=runs.trunk_forwards,
            true_losses=None if seen is None else _numbers(seen[0]),
            true_condition=None if seen is None else seen[1],
            notes=notes,
            seconds=time.perf_counter() - started,
            record=decided,
        )

    def _lower(self, status: Outcome, trials: int) -> tuple[str, ...]:
        """Lower the first length where enough searches in a row asked for it."""
        if self.lower_ub is None or status not in ("accepted", "capped"):
            return ()
        asked = status == "capped" or (self.lower_ub == "divided" and trials > 1)
        self.in_a_row = self.in_a_row + 1 if asked else 0
        if self.in_a_row < self.patience:
            return ()
        self.in_a_row = 0
        self.lr_ub = self.lr_ub / self.gamma
        return (f"lr_ub lowered to {self.lr_ub:.6g} after {self.patience} searches in a row",)

    @contextmanager
    def _undone_on_failure(self, runs: Runs, undo: list[Moves]) -> Iterator[None]:
        with runs.undone_on_failure(), undone_on_failure(self.method):
            try:
                yield
            except BaseException:
                for moves in undo:
                    moves.back()
                raise


def slopes_by_gramian(gradients: TaskGradients, combination: Combination) -> Array | None:
    """[T] inner products of the gradients with the direction of a combination; None where its weights do not give it.

    Example:
        >>> import torch
        >>> gradients = TaskGradients(names=("a", "b"), gramian=np.array([[4.0, 1.0], [1.0, 9.0]]))
        >>> slopes_by_gramian(gradients, Combination(weights=torch.tensor([0.5, 0.5], dtype=torch.float64)))
        array([2.5, 5. ])
    """
    if combination.status == "stationary":
        return np.zeros(gradients.tasks)
    if combination.weights is None or combination.direction is not None:
        return None
    assert gradients.gramian is not None
    return np.asarray(gradients.gramian @ combination.weights.numpy())


def _numbers(values: Array) -> tuple[float, ...]:
    return tuple(values.tolist())
