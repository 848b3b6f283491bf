"""One step of a line search: what both searches have in common."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final

import numpy as np

from detente.autograd.host import to_host
from detente.autograd.measure import Taken
from detente.autograd.partition import Memory, Parameters
from detente.autograd.ranks import ProcessGroup, ranks_of
from detente.autograd.reduce import Samples
from detente.autograd.where import Where
from detente.linesearch.armijo import Array, repeats, rounding_tolerance, sufficient_decrease
from detente.linesearch.batch import Batch
from detente.linesearch.begin import begin
from detente.linesearch.closure import Closure, Losses, Runs
from detente.linesearch.moves import Moves
from detente.linesearch.options import (
    DEFAULTS,
    SearchOptions,
    check_method,
    check_roles,
    in_range,
    keywords_moved_to,
    modules_in,
    read_once,
    whole,
)
from detente.linesearch.plan import Along, Plan
from detente.linesearch.record import ClosureChanged, NoDescent, Outcome, SearchFailed, SearchRecord
from detente.methods import Method
from detente.step import of_first_rank, record_of, undone_on_failure, with_direction
from detente.values import Combination, StepRecord


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
    counters: ClassVar[tuple[str, ...]] = ("steps", "capped", "in_a_row", "lowered")
    lacks: ClassVar[Mapping[str, str]]

    @keywords_moved_to(SearchOptions, "options")
    def __init__(
        self,
        method: Method,
        shared: Parameters,
        task_specific: Parameters | Mapping[str, Any],
        lr_ub: float,
        gamma: float = 2.0,
        c: float = 1e-4,
        max_trials: int = 20,
        options: SearchOptions = DEFAULTS,
    ) -> None:
        self.method = check_method(method, self.space)
        self.shared, self.task_specific = read_once(shared), read_once(task_specific)
        check_roles(self.shared, self.task_specific)
        self.lr_ub = lr_ub
        self.gamma = in_range("gamma", gamma, above=1)
        self.c = in_range("c", c, below=1)
        self.max_trials = whole("max_trials", max_trials, least=1)
        if not isinstance(options, SearchOptions):
            raise TypeError(f"options= takes SearchOptions, got {type(options).__name__}.")
        options.refuse(self.lacks, type(self).__name__)
        self.options = options
        self._modules = [
            *modules_in(self.shared),
            *modules_in(self.task_specific),
            *options.named_modules,
        ]
        self._memory = Memory()
        self.steps = self.capped = self.in_a_row = self.lowered = 0
        self._set_up()

    @property
    def lr_ub(self) -> float:
        """The first length as the caller or a schedule sets it between steps, > 0; see :attr:`first_length`."""
        return self._lr_ub

    @lr_ub.setter
    def lr_ub(self, value: float) -> None:
        self._lr_ub = in_range("lr_ub", value)

    @property
    def first_length(self) -> float:
        """The length that the next search tries first: ``lr_ub`` divided by γ as often as ``lower_ub`` asked.

        Raises:
            ValueError: that is too small for a number.
        """
        found = self._divided(self.lowered)
        if not found > 0:
            raise ValueError(
                f"lr_ub is {self.lr_ub:g} and was divided by gamma {self.lowered} times, which leaves nothing: set "
                "search.lowered = 0 to start again from lr_ub, or lr_ub higher."
            )
        return found

    @final
    def step(
        self, closure: Closure, process_group: ProcessGroup = None, samples: Samples = None
    ) -> SearchRecord:
        """Find a length and move the parameters by it; no ``.grad`` is touched.

        On several processes the direction, the slopes and the losses of every trial are those of the whole batch, so
        that all ranks take the same step. Call it on every rank; each runs its closure equally often.

        Args:
            closure: ``closure()`` runs the network on the batch of this step and returns (features, losses);
                ``closure(features)`` runs the heads alone. See :class:`~detente.linesearch.closure.Closure`. On several
                processes on this rank's part of the batch; a task may be absent there.
            process_group: the processes among which the batch is split: None is torch.distributed's default group
                where it is initialized, False this process alone.
            samples: examples behind this rank's losses (a number, or one for each task), by which the ranks' means
                are weighted; None counts every rank once.

        Returns:
            What was done, in plain numbers; on several processes the same on all, but for seconds.

        Raises:
            NoDescent: some loss does not fall along the direction, and no small step was asked for.
            ClosureChanged: the closure gives other losses when it is called again at the same point.
            SearchFailed: no trial was accepted and a loss of the last one was NaN or infinite, or ``on_cap="error"``.
            ValueError: what :func:`detente.backward` raises for losses and gradients.
            TypeError: the closure returns something else.
            RankFailed: the closure failed on another process; its message is passed on.

            After any of them parameters, buffers, random state and method are as they were before the step.
        """
        started, lengths = time.perf_counter(), self._lengths()
        ranks = ranks_of(process_group)
        runs = Runs(closure, self._modules, discover=self.options.modules is None)
        undo: list[Moves] = []
        with self._undone_on_failure(runs, undo):
            ready, taken, features, losses = begin(
                lambda: self._first(runs),
                lambda features: Where.given(
                    features if self.space == "features" else None, self.shared, self.task_specific, None
                ),
                self.method,
                self._memory,
                ranks,
                samples,
                # Moments divide whole directions, whose products with the gradients are then taken again.
                whole=self.options.precondition is not None,
            )
            batch = Batch(ready, losses)
            combination = of_first_rank(self.method.combine(taken.gradients), ready)
            decided = record_of(taken.gradients, combination)
            if not combination.accepted:
                return self._end(runs, started, decided, None, None, "refused")
            along = Along.by_gramian(taken.gradients, combination)
            combination = with_direction(combination, taken.gradients)
            plan = self._plan(taken, combination, along, features, batch.epsilon)
            undo.append(plan.moves)
            settings = {
                name: getattr(self, name) for name in ("lr_ub", "gamma", "c", "max_trials", *self.counters)
            } | self.options.plain()
            batch.settle(plan, lambda: self._check(taken), settings)
            decided = replace(decided, seconds=time.perf_counter() - started)
            return self._search(runs, started, decided, batch, plan, undo, lengths)

    # ---- saving

    def state_dict(self) -> dict[str, Any]:
        """What a new search needs to go on bit for bit, beside the network's own state and the random state.

        That is the first length, the counters, and the state of the method.
        """
        counters = {name: getattr(self, name) for name in self.counters}
        return {"lr_ub": self.lr_ub, "counters": counters, "method": self.method.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; options are those of this search.

        Raises:
            ValueError: the state is not that of such a search; nothing is changed.
        """
        self._check_state(state)
        lr_ub = in_range("lr_ub", state["lr_ub"])
        counters = {name: whole(name, value, least=0) for name, value in state["counters"].items()}
        with undone_on_failure(self.method):
            try:
                self.method.load_state_dict(state["method"])
            except (RuntimeError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"the method's part of the saved search does not fit {self.method.declares.name}: {error}"
                ) from error
        self._lr_ub = lr_ub
        for name, value in counters.items():
            setattr(self, name, value)

    def _check_state(self, state: Any) -> None:
        counters = state.get("counters") if isinstance(state, Mapping) else None
        if (
            not isinstance(counters, Mapping)
            or state.keys() != self.state_dict().keys()
            or counters.keys() != set(self.counters)
        ):
            raise ValueError(
                f"this is not the state of a {type(self).__name__}: pass what its state_dict() returned."
            )

    # ---- what a trial is

    @abstractmethod
    def _set_up(self) -> None:
        """Make what a search of this kind keeps between steps."""

    @abstractmethod
    def _first(self, runs: Runs) -> tuple[Any, Losses]:
        """Representation and losses, with a graph."""

    @abstractmethod
    def _plan(
        self, taken: Taken, combination: Combination, along: Along | None, features: Any, epsilon: Array
    ) -> Plan:
        """What to move, and along what; ``along`` the method's direction, where the Gramian tells it."""

    def _check(self, taken: Taken) -> None:  # noqa: B027, most have nothing to add
        """See that such gradients can be searched along."""

    @abstractmethod
    def _losses_at(self, runs: Runs, plan: Plan, eta: float) -> Losses:
        """The losses at a distance ``eta``, the plan's parameters moved already."""

    @abstractmethod
    def _carry(self, runs: Runs, plan: Plan, eta: float, undo: list[Moves]) -> None:
        """Move what the trials did not; add it to what is undone after a failure."""

    @abstractmethod
    def _settle(self, runs: Runs, batch: Batch, plan: Plan, taking: Taking) -> tuple[Array, bool] | None:
        """Finish an accepted step; the network's own losses and whether the condition holds for them, where asked."""

    # ---- private

    def _search(
        self,
        runs: Runs,
        started: float,
        decided: StepRecord,
        batch: Batch,
        plan: Plan,
        undo: list[Moves],
        lengths: list[float],
    ) -> SearchRecord:
        if self.steps < self.options.check_steps:
            self._check_closure(runs, batch, plan)
        if plan.slopes is None and not plan.descends:
            plan.read(*to_host([plan.unread]))
        searched = True
        if plan.slopes is not None:
            moved = plan.moved()
            if not moved.any():
                return self._end(runs, started, decided, plan, None, "stationary")
            against = plan.against(moved)
            if against.any():
                lengths, searched = [self._without_descent(plan, against)], False
        notes: tuple[str, ...] = ()
        for trial, eta in enumerate(lengths, start=1):
            plan.moves.to(eta)
            after = self._evaluate(runs, batch, plan, eta)
            if not (self._holds(plan, after, eta) if searched else np.isfinite(after)).all():
                continue
            self._carry(runs, plan, eta, undo)
            if searched and (after == plan.before).all() and not any(moves.away() for moves in undo):
                notes = (f"a length of {eta:.3g} moves nothing: it is lost in rounding",)
                if trial == 1:  # and nothing was rejected
                    return self._end(runs, started, decided, plan, None, "stationary", trials=1, notes=notes)
                break
            taking = Taking("accepted" if searched else "small-step", eta, trial, after)
            seen = self._settle(runs, batch, plan, taking)
            return self._end(runs, started, decided, plan, taking, taking.status, seen)
        self._check_failure(runs, batch, plan, after, eta, searched)
        return self._end(runs, started, decided, plan, None, "capped", trials=trial, notes=notes)

    def _divided(self, times: int) -> float:
        try:
            return self.lr_ub / self.gamma**times
        except OverflowError:
            return 0.0

    def _lengths(self) -> list[float]:
        lengths = [self.first_length]
        while len(lengths) < self.max_trials and lengths[-1] / self.gamma > 0:
            lengths.append(lengths[-1] / self.gamma)
        return lengths

    def _evaluate(self, runs: Runs, batch: Batch, plan: Plan, eta: float) -> Array:
        """[T] the losses at a distance ``eta``; slopes that are still on a device come with the same copy."""
        values, numbers = batch.losses(lambda: self._losses_at(runs, plan, eta), plan.unread)
        plan.read(numbers)
        return values

    def _holds(self, plan: Plan, after: Array, eta: float) -> np.ndarray:
        assert plan.slopes is not None
        tolerance = rounding_tolerance(plan.before, after, plan.epsilon, self.options.rounding)
        return sufficient_decrease(plan.before, after, plan.slopes, eta, self.c, tolerance)

    def _check_closure(self, runs: Runs, batch: Batch, plan: Plan) -> None:
        """See that the closure gives the same losses again where the step began."""
        again = self._evaluate(runs, batch, plan, 0.0)
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
        if self.options.small_step is not None:
            return self.options.small_step
        assert plan.slopes is not None
        named = zip(plan.taken.gradients.names, plan.slopes, plan.flat(), against, strict=True)
        tasks = {
            name: "zero up to rounding" if flat else f"{slope:.3g}"
            for name, slope, flat, worse in named
            if worse
        }
        listed = ", ".join(f"{name!r} ({slope})" for name, slope in tasks.items())
        raise NoDescent(
            f"the direction of {self.method.declares.name} is no descent for task {listed} (in brackets what the loss "
            "falls by per unit of length): no length can satisfy the condition for all tasks. Nothing was changed.",
            f"{self._instead(plan, against)}, or take a constant step with on_no_descent='small-step' and small_step=.",
            tuple(tasks),
        )

    def _instead(self, plan: Plan, against: np.ndarray) -> str:
        """Whose fault it is that a loss does not fall: the moments', the heads', or the method's."""
        assert plan.slopes is not None
        if self.options.precondition is not None:
            return (
                "What is a descent for every task need not stay one when it is divided by running moments: leave "
                f"precondition={self.options.precondition!r} out"
            )
        if ((plan.slopes - plan.shared_slopes)[against] < 0).any():
            return (
                "Parameters named in task_specific= that several tasks use move along the sum of their gradients, here "
                "against a task: name them in shared="
            )
        return "Use a method whose direction descends for every task, such as mgda"

    def _check_failure(
        self, runs: Runs, batch: Batch, plan: Plan, after: Array, eta: float, searched: bool
    ) -> None:
        """No trial was accepted: put everything back, tell a changed batch from a real failure, complain if asked."""
        plan.moves.back()
        self._check_closure(runs, batch, plan)
        names = plan.taken.gradients.names
        back = "The parameters are back where they were."
        bad = tuple(name for name, loss in zip(names, after, strict=True) if not np.isfinite(loss))
        if bad:
            where = "at the last trial, a step" if searched else "after the constant small step"
            raise SearchFailed(
                f"the loss of task {bad[0]!r} is not finite (NaN or Inf) {where} of {eta:.3g}. {back}",
                "Lower lr_ub, or raise max_trials." if searched else "Lower small_step.",
                bad,
            )
        if self.options.on_cap == "error":
            holds = self._holds(plan, after, eta)
            worst = tuple(name for name, ok in zip(names, holds, strict=True) if not ok)
            told = (
                f"the loss of task {worst[0]!r} does not fall enough"
                if worst
                else "no parameter moves any more"
            )
            raise SearchFailed(
                f"{told} at the last trial, a step of {eta:.3g}. {back}",
                "Lower lr_ub, raise max_trials, or skip such steps with on_cap='skip'.",
                worst,
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
        trials: int = 0,
        notes: tuple[str, ...] = (),
    ) -> SearchRecord:
        """Leave buffers and random state as the passes with a graph did, count, and write the record."""
        runs.leave()
        self.steps += 1
        self.capped += status == "capped"
        trials = trials if taking is None else taking.trials
        first, notes = self.first_length, notes + _untouched(decided) + self._lower(status, trials)
        return SearchRecord(
            names=decided.names,
            status=status,
            losses_before=decided.losses,
            losses_after=None if taking is None else _numbers(taking.losses),
            eta=0.0 if taking is None else taking.eta,
            trials=trials,
            slopes=None if plan is None or plan.slopes is None else _numbers(plan.slopes),
            shared_slopes=None if plan is None else _numbers(np.asarray(plan.shared_slopes)),
            lr_ub=first,
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
        if self.options.lower_ub is None or status not in ("accepted", "capped"):
            return ()
        asked = status == "capped" or (self.options.lower_ub == "divided" and trials > 1)
        self.in_a_row = self.in_a_row + 1 if asked else 0
        if self.in_a_row < self.options.patience:
            return ()
        self.in_a_row = 0
        if not self._divided(self.lowered + 1) > 0:
            return (f"the first length, {self.first_length:.6g}, cannot be lowered any further",)
        self.lowered += 1
        return (
            f"first length lowered to {self.first_length:.6g} after {self.options.patience} searches in a row",
        )

    @contextmanager
    def _undone_on_failure(self, runs: Runs, undo: list[Moves]) -> Iterator[None]:
        with runs.undone_on_failure(), undone_on_failure(self.method):
            try:
                yield
            except BaseException:
                for moves in undo:
                    moves.back()
                raise


def _untouched(decided: StepRecord) -> tuple[str, ...]:
    """A note for every task that says nothing about the shared parameters; some methods then move none of them."""
    norms = () if decided.raw is None else decided.raw.norms
    return tuple(
        f"task {name!r} has no gradient on what is shared"
        for name, norm in zip(decided.names, norms, strict=False)
        if norm == 0
    )


def _numbers(values: Array) -> tuple[float, ...]:
    return tuple(values.tolist())
