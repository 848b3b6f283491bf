"""Take one step of a line search: a direction to move along, the lengths to try, a condition to judge them."""

from __future__ import annotations

import time
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, final

import numpy as np

from detente.linesearch.armijo import Array, Condition, Slopes, repeats
from detente.linesearch.closure import Closure
from detente.linesearch.direction import Direction, Displacement
from detente.linesearch.engine import (
    Engine,
    Parameters,
    ProcessGroup,
    Samples,
    as_tensors,
    to_host,
    undone_on_failure,
)
from detente.linesearch.losses import BatchLosses
from detente.linesearch.moments import Preconditioner, read_moments
from detente.linesearch.options import (
    DEFAULTS,
    SearchOptions,
    check_method,
    check_roles,
    keywords_moved_to,
    modules_in,
    read_once,
)
from detente.linesearch.passes import Passes
from detente.linesearch.record import ClosureChanged, NoDescent, SearchFailed, SearchRecord, SearchStatus
from detente.linesearch.trials import Trials
from detente.methods import Method
from detente.methods.options import number, whole
from detente.values import StepRecord


@dataclass(frozen=True)
class SearchDeclaration:
    """Declare a search.

    Attributes:
        name: for the registry and the command line.
        source: paper and algorithm.
        direction: where the problem is solved, and what is moved.
        search: options to the values that a search for hyperparameters tries.
        lacks: fields of :class:`SearchOptions` that it does not have, each with the sentence that says why.
        label: how tables call it; empty for its name.
    """

    name: str
    source: str
    direction: type[Direction]
    search: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)
    label: str = ""


@dataclass(frozen=True)
class Ending:
    """Hold how the trials of one step ended.

    Attributes:
        status, eta, trials, notes: as in :class:`SearchRecord`.
        slopes: None if the method refused the step.
        after: [T] losses at the length that was taken.
        true_losses, true_condition: of the network itself, where it was run once more.
    """

    status: SearchStatus
    slopes: Slopes | None = None
    eta: float = 0.0
    trials: int = 0
    after: Array | None = None
    true_losses: Array | None = None
    true_condition: bool | None = None
    notes: tuple[str, ...] = ()


class Search(ABC):
    """Compose direction, trials and condition; the searches of this package differ in the direction alone.

    The arguments are those of :class:`Backtracking`.
    """

    declares: ClassVar[SearchDeclaration]
    counters: ClassVar[tuple[str, ...]] = ("steps", "capped", "in_a_row", "lowered")

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
        check_method(method, self.declares.direction.space)
        self.shared, self.task_specific = read_once(shared), read_once(task_specific)
        check_roles(self.shared, self.task_specific)
        self.lr_ub = lr_ub
        self.gamma = number("gamma", gamma, above=1)
        self.c = number("c", c, above=0, below=1)
        self.max_trials = whole("max_trials", max_trials, least=1)
        if not isinstance(options, SearchOptions):
            raise TypeError(f"options= takes SearchOptions, got {type(options).__name__}.")
        options.refuse(self.declares.lacks, type(self).__name__)
        self.options = options
        self.steps = self.capped = self.in_a_row = self.lowered = 0
        self.true_condition_checks = self.true_condition_failures = 0
        self._modules = [*modules_in(self.shared), *modules_in(self.task_specific), *options.named_modules]
        kind = options.precondition
        everyone = (*as_tensors(self.shared, "shared"), *as_tensors(self.task_specific, "task_specific"))
        self._preconditioner = None if kind is None else Preconditioner(kind, everyone)
        self._engine = Engine(
            method,
            self.shared,
            self.task_specific,
            on_features=self.declares.direction.space == "features",
            # Moments divide whole directions, whose products with the gradients are then taken again.
            whole=options.precondition is not None,
        )

    @property
    def method(self) -> Method:
        """The method that gives the direction."""
        return self._engine.method

    @property
    def lr_ub(self) -> float:
        """The first length as the caller or a schedule sets it between steps, > 0; see :attr:`first_length`."""
        return self._lr_ub

    @lr_ub.setter
    def lr_ub(self, value: float) -> None:
        self._lr_ub = number("lr_ub", value, above=0)

    @property
    def trials(self) -> Trials:
        """The lengths of the next search."""
        return Trials(self.lr_ub, self.gamma, self.max_trials, self.lowered, self.in_a_row)

    @property
    def first_length(self) -> float:
        """The length that the next search tries first: ``lr_ub`` divided by γ as often as ``lower_ub`` demanded.

        Raises:
            ValueError: that is too small for a number.
        """
        return self.trials.first

    @final
    def step(
        self, closure: Closure, process_group: ProcessGroup = None, samples: Samples = None
    ) -> SearchRecord:
        """Find a length and move the parameters by it; no ``.grad`` is touched.

        On several processes the direction, the slopes and the losses of every trial are those of the whole batch, so
        that all ranks take the same step. Call it on every rank; each runs its closure equally often. Under the
        caller's ``torch.autocast`` the closure alone runs in half precision.

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
            NoDescent: some loss does not fall along the direction, and no small step was requested.
            ClosureChanged: the closure gives other losses when it is called again at the same point.
            SearchFailed: no trial was accepted and a loss of the last one was NaN or infinite, or ``on_cap="error"``.
            ValueError: what :func:`detente.backward` raises for losses and gradients.
            TypeError: the closure returns something else.
            RankFailed: the closure failed on another process; its message is passed on.

            After any of them parameters, buffers, random state and method are as they were before the step.
        """
        started, lengths = time.perf_counter(), self.trials.lengths()
        passes = Passes(closure, self._modules, discover=self.options.modules is None)
        moved: list[Displacement] = []
        with passes.precision.left(), self._undone_on_failure(passes, moved):
            solved = self._engine.solve(lambda: self.declares.direction.first(passes), process_group, samples)
            decided = replace(solved.record, seconds=time.perf_counter() - started)
            if not solved.combination.accepted:
                return self._finish(passes, started, decided, Ending("refused"))
            direction = self.declares.direction.of(solved, self._preconditioner)
            moved.append(direction.moved)
            losses, numbers = BatchLosses.of(solved).agree(
                direction.check, direction.unread, direction.alike, self._settings()
            )
            decided = replace(decided, seconds=time.perf_counter() - started)
            run = _Run(self, passes, direction, losses, moved)
            ending = run.search(lengths, None if numbers is None else direction.slopes(numbers))
            if self._preconditioner is not None and ending.after is not None:
                self._preconditioner.commit(direction.moments)
            return self._finish(passes, started, decided, ending)

    # ---- saving

    def state_dict(self) -> dict[str, Any]:
        """Save what a new search needs to go on bit for bit, beside the network's own state and the random state.

        That is the first length, the counters, the moments of a preconditioner, and the state of the method.
        """
        counters = {name: getattr(self, name) for name in self.counters}
        state: dict[str, Any] = {
            "lr_ub": self.lr_ub,
            "counters": counters,
            "method": self.method.state_dict(),
        }
        if "precondition" not in self.declares.lacks:
            state["moments"] = None if self._preconditioner is None else self._preconditioner.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; options are those of this search.

        Raises:
            ValueError: the state is not that of such a search, or its moments are of another preconditioner or of
                other parameters; nothing is changed.
        """
        self._check_state(state)
        moments = read_moments(self._preconditioner, state.get("moments"))
        lr_ub = number("lr_ub", state["lr_ub"], above=0)
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
        if self._preconditioner is not None:
            self._preconditioner.load(moments)

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

    # ---- private

    def _settings(self) -> dict[str, object]:
        """Collect everything by which the steps of several processes could differ."""
        names = ("lr_ub", "gamma", "c", "max_trials", *self.counters)
        return {name: getattr(self, name) for name in names} | self.options.plain()

    def _finish(self, passes: Passes, started: float, decided: StepRecord, ending: Ending) -> SearchRecord:
        """Leave buffers and random state as the passes with a graph did, count, and write the record."""
        passes.leave()
        trials, first = self.trials, self.first_length
        lowered, notes = trials.after(ending.status, ending.trials, self.options)
        self.lowered, self.in_a_row = lowered.lowered, lowered.in_a_row
        self.steps += 1
        self.capped += ending.status == "capped"
        self.true_condition_checks += ending.true_condition is not None
        self.true_condition_failures += ending.true_condition is False
        slopes = ending.slopes
        return SearchRecord(
            names=decided.names,
            status=ending.status,
            losses_before=decided.losses,
            losses_after=_numbers(ending.after),
            eta=ending.eta,
            trials=ending.trials,
            slopes=None if slopes is None else _numbers(slopes.total),
            shared_slopes=None if slopes is None else _numbers(slopes.shared),
            lr_ub=first,
            head_forwards=passes.head_forwards,
            trunk_forwards=passes.trunk_forwards,
            true_losses=_numbers(ending.true_losses),
            true_condition=ending.true_condition,
            notes=(*ending.notes, *_untouched(decided), *notes),
            seconds=time.perf_counter() - started,
            record=decided,
        )

    @contextmanager
    def _undone_on_failure(self, passes: Passes, moved: Sequence[Displacement]) -> Iterator[None]:
        with passes.undone_on_failure(), undone_on_failure(self.method):
            try:
                yield
            except BaseException:
                for displacement in moved:
                    displacement.back()
                raise


@dataclass(frozen=True)
class _Run:
    """Run the trials of one step.

    Attributes:
        owner: whose options and constants hold.
        passes, direction, losses: of the step.
        moved: what is put back after a failure; the encoder is added once it moves.
    """

    owner: Search
    passes: Passes
    direction: Direction
    losses: BatchLosses
    moved: list[Displacement]

    @property
    def names(self) -> tuple[str, ...]:
        return self.losses.names

    def search(self, lengths: Sequence[float], slopes: Slopes | None) -> Ending:
        """Try the lengths one after the other, unless the slopes forbid it.

        Slopes that are still on a device (None) arrive with the losses of the first pass, where it is known that every
        loss falls.
        """
        owner, direction = self.owner, self.direction
        if owner.steps < owner.options.check_steps:
            again, slopes = self._evaluate(0.0, slopes)
            self._check_repeats(again)
        if slopes is None and not direction.descends:
            slopes = direction.slopes(to_host([direction.unread])[0])
        if slopes is not None and not slopes.moved.any():
            return Ending("stationary", slopes)
        if slopes is not None and slopes.against.any():
            return self._small_step(slopes)
        for trial, eta in enumerate(lengths, start=1):
            direction.moved.to(eta)
            after, slopes = self._evaluate(eta, slopes)
            condition = self._condition(slopes)
            holds = condition.holds(after, eta)
            if not holds.all():
                continue
            self._move_rest(eta)
            if (after == self.losses.before).all() and not any(moved.away() for moved in self.moved):
                notes = (f"a length of {eta:.3g} moves nothing: it is lost in rounding",)
                if trial == 1:  # and nothing was rejected
                    return Ending("stationary", slopes, trials=1, notes=notes)
                return self._capped(condition, after, Ending("capped", slopes, eta, trial, notes=notes))
            return self._look(condition, Ending("accepted", slopes, eta, trial, after))
        return self._capped(condition, after, Ending("capped", slopes, eta, trial))

    def _evaluate(self, eta: float, slopes: Slopes | None) -> tuple[Array, Slopes]:
        """[T] the losses at a distance ``eta``; slopes that are still on a device come with the same copy."""
        unread = self.direction.unread if slopes is None else ()
        values, numbers = self.losses.read(lambda: self.direction.losses_at(self.passes, eta), unread)
        return values, self.direction.slopes(numbers) if slopes is None else slopes

    def _condition(self, slopes: Slopes) -> Condition:
        owner, losses = self.owner, self.losses
        return Condition(losses.before, slopes.total, losses.epsilon, owner.c, owner.options.rounding)

    def _move_rest(self, eta: float) -> None:
        rest = self.direction.rest(self.passes)
        if rest is not None:
            self.moved.append(rest)
            rest.to(eta)

    def _look(self, condition: Condition, ending: Ending) -> Ending:
        """Run the network itself once more, where the options ask for it after this step."""
        every = int(self.owner.options.check_true)
        if not every or (self.owner.steps + 1) % every:
            return ending
        values, _ = self.losses.read(self.passes.whole)
        holds = bool(condition.holds(values, ending.eta).all())
        return replace(ending, true_losses=values, true_condition=holds)

    def _small_step(self, slopes: Slopes) -> Ending:
        """Take the constant step where some loss does not fall, or say what to change."""
        eta = self.owner.options.small_step
        if eta is None:
            raise self._no_descent(slopes)
        self.direction.moved.to(eta)
        after, _ = self._evaluate(eta, slopes)
        if not np.isfinite(after).all():
            self._put_back(after, f"after the constant small step of {eta:.3g}", "Lower small_step.")
        self._move_rest(eta)
        return Ending("small-step", slopes, eta, 1, after)

    def _capped(self, condition: Condition, after: Array, ending: Ending) -> Ending:
        """Put everything back where no trial was accepted, and complain if the options ask for it.

        Args:
            condition: of this search.
            after: [T] losses at the last trial.
            ending: with the length of the last trial, which is not taken.
        """
        where = f"at the last trial, a step of {ending.eta:.3g}"
        self._put_back(after, where, "Lower lr_ub, or raise max_trials.")
        if self.owner.options.on_cap == "error":
            holds = condition.holds(after, ending.eta)
            worst = tuple(name for name, ok in zip(self.names, holds, strict=True) if not ok)
            what = (
                f"the loss of task {worst[0]!r} does not fall enough"
                if worst
                else "no parameter moves any more"
            )
            raise SearchFailed(
                f"{what} {where}. The parameters are back where they were.",
                "Lower lr_ub, raise max_trials, or skip such steps with on_cap='skip'.",
                worst,
            )
        return replace(ending, eta=0.0)

    def _put_back(self, after: Array, where: str, advice: str) -> None:
        """Put the parameters back; tell a changed batch, and losses that are not finite, from a failure to fall."""
        self.direction.moved.back()
        again, _ = self.losses.read(lambda: self.direction.losses_at(self.passes, 0.0))
        self._check_repeats(again)
        bad = tuple(name for name, loss in zip(self.names, after, strict=True) if not np.isfinite(loss))
        if bad:
            raise SearchFailed(
                f"the loss of task {bad[0]!r} is not finite (NaN or Inf) {where}. The parameters are back where they "
                "were.",
                advice,
                bad,
            )

    def _check_repeats(self, again: Array) -> None:
        """Refuse a closure that gives other losses where the step began."""
        before = self.losses.before
        same = repeats(before, again, self.losses.epsilon)
        if not same.all():
            task = int(np.argmin(same))
            raise ClosureChanged(
                f"the closure gave task {self.names[task]!r} the loss {before[task]:.9g} and, called again with the "
                f"same parameters, {again[task]:.9g}. Fetch the batch outside the closure, and draw random numbers "
                "from torch's global generator only: the search rewinds that one. Nothing was changed."
            )

    def _no_descent(self, slopes: Slopes) -> NoDescent:
        named = zip(self.names, slopes.total, slopes.flat, slopes.against, strict=True)
        tasks = {
            name: "zero up to rounding" if flat else f"{slope:.3g}"
            for name, slope, flat, worse in named
            if worse
        }
        listed = ", ".join(f"{name!r} ({slope})" for name, slope in tasks.items())
        return NoDescent(
            f"the direction of {self.owner.method.declares.name} is no descent for task {listed} (in brackets what the "
            "loss falls by per unit of length): no length can satisfy the condition for all tasks. Nothing was "
            "changed.",
            f"{self._remedy(slopes)}, or take a constant step with on_no_descent='small-step' and small_step=.",
            tuple(tasks),
        )

    def _remedy(self, slopes: Slopes) -> str:
        """Say what to change where a loss does not fall: the moments, the heads, or the method."""
        kind = self.owner.options.precondition
        if kind is not None:
            return (
                "What is a descent for every task need not stay one when it is divided by running moments: leave "
                f"precondition={kind!r} out"
            )
        if (slopes.own[slopes.against] < 0).any():
            return (
                "Parameters named in task_specific= that several tasks use move along the sum of their gradients, here "
                "against a task: name them in shared="
            )
        return "Use a method whose direction descends for every task, such as mgda"


def _untouched(decided: StepRecord) -> tuple[str, ...]:
    """Note every task that says nothing about the shared parameters; some methods then move none of them."""
    norms = () if decided.raw is None else decided.raw.norms
    return tuple(
        f"task {name!r} has no gradient on what is shared"
        for name, norm in zip(decided.names, norms, strict=False)
        if norm == 0
    )


def _numbers(values: Array | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(values.tolist())
