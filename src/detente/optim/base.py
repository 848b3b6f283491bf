"""Take steps with moments for each task: groups, the order of a step, own parameters, saving."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar

import torch

from detente.autograd.entries import dense, real
from detente.methods import Method
from detente.optim.balance import Gauge, TaskBalance
from detente.optim.groups import known_tasks, read_groups, task_names
from detente.optim.kernels import (
    Bundle,
    Form,
    Rule,
    all_finite,
    fresh_moments,
    laid_out,
    largest_entry,
    norms,
    subtract,
)
from detente.optim.options import ROLES, check_options
from detente.optim.saved import check_current, check_kind, check_moments, fit, misfit
from detente.optim.streams import (
    Gradients,
    Losses,
    Memory,
    ProcessGroup,
    Samples,
    Share,
    altered,
    check_losses,
    full_precision,
    read,
    streamed,
)
from detente.optim.update import Update
from detente.values import StepRecord


class TaskOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer that is given losses and takes each task's gradient by itself.

    A subclass keeps moments for every task and shared parameter (``_take``, one task's gradient at a time) and gives
    after the last backward what moves them (``_moves``). Task-specific parameters take Adam steps here.

    Args:
        shared, task_specific: parameters, modules, or parameter groups.
        tasks: names, a count, or None to learn them from the losses.
        defaults: options of every group.
        transform: a method whose altered gradients are taken instead of the given ones, or None.

    Attributes:
        takes_transform: True if a class has the option ``transform``.
    """

    takes_transform: ClassVar[bool] = False

    def __init__(
        self,
        shared: Any,
        task_specific: Any,
        tasks: Sequence[str] | int | None,
        defaults: dict[str, Any],
        transform: Method | None = None,
    ) -> None:
        self._check_options(defaults)
        self.tasks = task_names(tasks)
        self.transform = transform
        self.balance: TaskBalance | None = None
        self._closed = self.tasks is not None
        self._names: dict[torch.Tensor, str] = {}
        self._workspace = Memory()
        groups = []
        for given, option, role in ((shared, "shared", ROLES[0]), (task_specific, "task_specific", ROLES[1])):
            found, named = read_groups(given, option, role)
            groups += found
            self._name(named)
        super().__init__(groups, {**defaults, "role": ROLES[0]})

    # ---- what a subclass writes

    @abstractmethod
    def _fresh(self, parameter: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """Make the moments of a task that meets a shared parameter for the first time."""

    @abstractmethod
    def _take(
        self, task: str, bundles: Sequence[Bundle], lengths: Mapping[torch.Tensor, float], update: Update
    ) -> None:
        """Move one task's moments by its gradients of shared parameters, of these lengths; the parameters stay."""

    @abstractmethod
    def _moves(
        self, group: Mapping[str, Any], parameters: Sequence[torch.Tensor], update: Update
    ) -> list[torch.Tensor]:
        """Give what is to be added to shared parameters that were touched, as real numbers, weight decay left out."""

    def _form(self, group: Mapping[str, Any]) -> Form:
        """Name the form of the contributions to shared parameters."""
        return "adam"

    def _check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse a group's options that are out of range; a subclass looks at its own as well."""
        check_options(options)

    # ---- what everybody calls

    @torch.no_grad()
    @full_precision()
    def step(  # type: ignore[override]
        self,
        losses: Losses,
        *,
        measure: bool = False,
        process_group: ProcessGroup = None,
        samples: Samples = None,
    ) -> StepRecord:
        """Take the gradient of every loss and move the parameters once, after the last backward.

        ``.grad`` is neither read nor written; gradients are taken with ``torch.autograd.grad``, so post-accumulate
        hooks do not run. A parameter that no loss reaches is left alone: no update, no weight decay. A task absent
        from ``losses`` has no part in the step; its moments and counters stay as they are. ``torch.autocast`` around
        the call changes nothing: it is for the forward.

        Args:
            losses: scalars with their graph, by task name or in sequence (named "0", "1", …); not scaled by a
                gradient scaler.
            measure: leave each task's mean gradient and contribution per layer in ``balance``; costs one more pass
                over the moments.
            process_group, samples: as for :func:`detente.backward`: on several processes every task's gradient is
                added over the ranks before its moments see it.

        Returns:
            A record with names (in the order of ``tasks``), losses, status and seconds; there are no weights. With
            ``transform`` also the conflict of the gradients, as given and as altered; ``status`` is then the method's,
            and ``accepted`` False if it refused the step, in which case nothing moved.

        Raises:
            ValueError: a loss is not a finite scalar with a graph, a task is unknown, no loss reaches a shared
                parameter, a parameter has another shape than its moments: nothing was changed. Or a gradient is not
                finite, its square overflows, or the step that follows is not finite: parameters and counters are
                unchanged, and the message says which tasks' moments have already advanced (with ``transform``, none by
                a gradient that is not finite).
            TypeError: a closure was given instead of losses.

        Example:
            >>> import detente.optim
            >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
            >>> optimizer = detente.optim.MAO([weight], lr=0.1)
            >>> record = optimizer.step({"a": weight.square().sum(), "b": 100 * weight.square().sum()})
            >>> weight.data, record.names
            (tensor([ 0.8000, -1.8000]), ('a', 'b'))
        """
        started = time.perf_counter()
        _check_call(losses)
        group_of = {
            parameter: group
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.requires_grad  # frozen ones may be named and are left alone
        }
        shared, specific = (
            [parameter for parameter, group in group_of.items() if group["role"] == role] for role in ROLES
        )
        check_current(self.state, group_of, self._name_of)
        request = read(losses, (shared, specific), self._workspace, process_group, samples, self.tasks)
        tasks = known_tasks(self.tasks, request.names, closed=self._closed)
        check_losses(request.names, request.values)
        request = request.in_order(tasks)
        self.balance = None
        update = Update(group_of, Gauge(request.names, shared, self._name_of) if measure else None)
        record = StepRecord(
            names=request.names,
            losses=tuple(request.values.tolist()),
            weights=(None,) * len(request.names),
            space="exact" if shared else "none",
        )
        source = streamed(request)
        if self.transform is not None and shared:
            record, source = altered(request, self.transform, self._workspace)
        notes = list(record.notes)
        if record.accepted:
            try:
                notes += self._advance(source, update, held=record.status == "stationary")
            except BaseException:
                self._forget()
                raise
            self.tasks = tasks
            self.balance = None if update.gauge is None else update.gauge.read()
        return replace(record, notes=tuple(notes), seconds=time.perf_counter() - started)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own where given.

        Args:
            param_group: ``params`` (parameters or modules), options, and ``role``: ``shared`` (the default) or
                ``task-specific``.

        Raises:
            ValueError: an option is out of range, the role is unknown, ``params`` is missing, or a parameter is in a
                group already.
            TypeError: an option is no number, or ``param_group`` no mapping.

        Example:
            >>> import detente.optim
            >>> optimizer = detente.optim.MAO(torch.nn.Linear(2, 2))
            >>> optimizer.add_param_group({"params": torch.nn.Linear(2, 1), "lr": 0.1, "role": "task-specific"})
            >>> [group["lr"] for group in optimizer.param_groups]
            [0.001, 0.1]
        """
        if not isinstance(param_group, Mapping):
            raise TypeError(
                f"a parameter group is a mapping with params and options, got {type(param_group).__name__}."
            )
        if "params" not in param_group:
            raise ValueError("a parameter group needs params: its parameters or modules.")
        groups, named = read_groups(param_group, "params", param_group.get("role", ROLES[0]))
        (group,) = groups
        self._check_options({**self.defaults, **group})
        self._check_new(group, named)
        super().add_param_group(group)
        self._name(named)

    def state_dict(self) -> dict[str, Any]:
        """Groups, moments and counters as ``torch.optim`` saves them, with the tasks and the transform's state.

        Example:
            >>> import detente.optim
            >>> sorted(detente.optim.MAO(torch.nn.Linear(2, 2)).state_dict())
            ['optimizer', 'param_groups', 'state', 'tasks', 'transform']
        """
        packed = dict(super().state_dict())
        packed["optimizer"] = type(self).__name__
        packed["tasks"] = None if self.tasks is None else list(self.tasks)
        packed["transform"] = None if self.transform is None else deepcopy(self.transform.state_dict())
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, bit for bit; a copy is taken.

        Args:
            state_dict: of an optimizer of this class, for the same groups of parameters.

        Raises:
            ValueError: it is incomplete, of another class, other tasks, other groups or parameters of other shapes, or
                with another transform. Nothing was changed.
            TypeError: it is no mapping.

        Example:
            >>> import detente.optim
            >>> layer = torch.nn.Linear(2, 2)
            >>> first, second = detente.optim.MAO(layer), detente.optim.MAO(layer)
            >>> _ = first.step({"a": layer(torch.ones(2)).sum()})
            >>> second.load_state_dict(first.state_dict())
            >>> second.tasks
            ('a',)
        """
        check_kind(state_dict, type(self).__name__)
        tasks, method = state_dict.get("tasks"), state_dict.get("transform")
        if self._closed and tasks is not None and tuple(tasks) != self.tasks:
            raise ValueError(
                f"the saved state is for tasks {', '.join(tasks)}; this optimizer was created for "
                f"{', '.join(self.tasks or ())}."
            )
        if (method is None) != (self.transform is None):
            raise ValueError(
                f"the state was saved {'without' if method is None else 'with'} transform=; create the optimizer alike."
            )
        check_moments(state_dict, self.param_groups, self._name_of)
        for group in state_dict["param_groups"]:
            self._check_options(group)
        if self.transform is not None and method is not None:
            deepcopy(self.transform).load_state_dict(method)  # fails here if it fails
        # Otherwise the moments would be the very tensors of the saved state, and of every optimizer loaded from it.
        super().load_state_dict(deepcopy(state_dict))
        for group in self.param_groups:
            for parameter in group["params"]:
                kept = self.state.get(parameter, {})
                for moments in [kept] if group["role"] == ROLES[1] else kept.values():
                    fit(parameter, moments)
        if self.transform is not None and method is not None:
            self.transform.load_state_dict(method)
        if not self._closed:
            self.tasks = None if tasks is None else tuple(tasks)

    def __getstate__(self) -> dict[str, Any]:
        own = ("tasks", "transform", "balance", "_closed", "_names")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._workspace = Memory()

    # ---- one step

    def _advance(self, source: Iterable[Share], update: Update, *, held: bool) -> list[str]:
        """Take every task's gradients, then move; the notes. ``held``: the shared parameters may stay."""
        notes = []
        shared = any(group["role"] == ROLES[0] for group in update.group_of.values())
        for task, gradients, own in source:
            if shared and not gradients and not held:
                notes.append(f"task {task!r} reaches no shared parameter")
            lengths = self._lengths(task, [*gradients, *own], update)
            self._take(task, self._bundles(gradients, task, update), lengths, update)
            update.owner |= dict.fromkeys((parameter for parameter, _ in own), task)
            update.taken.append(task)
            for (
                parameter,
                gradient,
            ) in own:  # not added in place: autograd may hand out one tensor for two inputs
                before = update.own.get(parameter)
                update.own[parameter] = gradient if before is None else before + gradient
            del gradients, own  # held here, they would live through the next backward
        if not update.touched and not held and (shared or not update.own):
            kind = ROLES[0 if shared else 1]
            count = sum(group["role"] == kind for group in update.group_of.values())
            raise ValueError(
                f"no loss reaches any of the {count} {kind} parameters of this optimizer. Are they of another model, "
                "or was the graph detached? Nothing was changed."
            )
        self._move(update)
        return notes

    def _move(self, update: Update) -> None:
        """Move every parameter, once; whatever can fail fails before the first one moves."""
        moves = self._own_moves(update)
        plan = []
        for group, parameters in update.groups():
            if group["role"] == ROLES[0]:
                moves.update(zip(parameters, self._moves(group, parameters, update), strict=True))
            plan.append((parameters, 1 - float(group["lr"]) * float(group["weight_decay"])))
        for parameter, fine in zip(moves, all_finite(list(moves.values())), strict=True):
            if not fine:
                raise ValueError(
                    f"the step of {self._name_of(parameter)} is not finite (NaN or Inf). "
                    f"{self._standing(update.taken)} Look for eps 0, or for one too small for the parameters' dtype."
                )
        for parameters, shrinkage in plan:
            moving = [real(parameter) for parameter in parameters]
            if shrinkage != 1:
                torch._foreach_mul_(moving, shrinkage)
            torch._foreach_add_(moving, [moves[parameter] for parameter in parameters])
        for parameter, tasks in update.touched.items():
            for task in tasks:
                self.state[parameter][task]["step"] += 1
        for parameter in update.own:
            self.state[parameter]["step"] += 1

    def _own_moves(self, update: Update) -> dict[torch.Tensor, torch.Tensor]:
        """Take plain Adam steps with the task-specific parameters, as torch.optim.AdamW without weight decay."""
        moves: dict[torch.Tensor, torch.Tensor] = {}
        bundles = self._bundles(update.own.items(), None, update)
        for bundle in bundles:
            lengths = dict(zip(bundle.parameters, norms(bundle.gradients), strict=True))
            self._check_range(None, bundle, lengths, update)
        for bundle in bundles:
            zeros = [torch.zeros_like(square) for square in bundle.exp_avg_sqs]
            subtract(bundle, zeros)
            moves.update(zip(bundle.parameters, zeros, strict=True))
        return moves

    def _lengths(self, task: str, gradients: Gradients, update: Update) -> dict[torch.Tensor, float]:
        """Measure one task's gradients before anything takes them in.

        Raises:
            ValueError: one is not finite; task and parameter are named.
        """
        entries = [real(dense(gradient)) for _, gradient in gradients]
        lengths = dict(zip((parameter for parameter, _ in gradients), norms(entries), strict=True))
        for parameter, length in lengths.items():
            if not math.isfinite(length):
                raise ValueError(
                    f"the gradient of task {task!r} is not finite (NaN or Inf), first in {self._name_of(parameter)}. "
                    f"{self._standing(update.taken)} Look for a division by zero, a logarithm of zero, or a learning "
                    "rate too high for this task."
                )
        return lengths

    def _check_range(
        self,
        task: str | None,
        bundle: Bundle,
        lengths: Mapping[torch.Tensor, float],
        update: Update,
        ratios: Mapping[torch.Tensor, float] | None = None,
    ) -> None:
        """Refuse gradients, times ``ratios`` where given, whose squares the averages cannot hold."""
        limit = math.sqrt(torch.finfo(bundle.exp_avg_sqs[0].dtype).max)
        for parameter, gradient in zip(bundle.parameters, bundle.gradients, strict=True):
            factor = 1.0 if ratios is None else ratios[parameter]
            # No entry is larger than the whole.
            if lengths[parameter] * factor <= limit or float(largest_entry(gradient)) * factor <= limit:
                continue
            rescaled, whose = (
                ("", "this") if ratios is None else (", rescaled to the first task's length,", "the first")
            )
            name = update.owner[parameter] if task is None else task
            raise ValueError(
                f"the gradient of task {name!r}{rescaled} is too large for its square to be held in {gradient.dtype}, "
                f"first in {self._name_of(parameter)}. {self._standing(update.taken)} Multiply {whose} task's loss by "
                "a smaller constant, or keep the parameters in a wider type."
            )

    def _bundles(
        self, gradients: Iterable[tuple[torch.Tensor, torch.Tensor]], task: str | None, update: Update
    ) -> list[Bundle]:
        """Lay one task's gradients beside its moments (those of a task-specific parameter for None), by kernel."""
        found: dict[tuple[Any, ...], Bundle] = {}
        for parameter, gradient in gradients:
            group = update.group_of[parameter]
            state = self.state[parameter]
            if task is not None:
                state = state.setdefault(task, {})
                update.touched.setdefault(parameter, []).append(task)
            if not state:
                state.update(fresh_moments(parameter) if task is None else self._fresh(parameter, group))
            square, entries = real(state["exp_avg_sq"]), real(dense(gradient))
            if entries.shape != square.shape:
                raise misfit(self._name_of(parameter))
            key = (id(group), state["step"], square.device, square.dtype)
            if key not in found:
                rule = Rule.of(group, "adam" if task is None else self._form(group))
                found[key] = Bundle(rule, state["step"] + 1)
            bundle = found[key]
            bundle.parameters.append(parameter)
            bundle.states.append(state)
            bundle.gradients.append(laid_out(entries, square))
            bundle.exp_avg_sqs.append(square)
            if "exp_avg" in state:
                bundle.exp_avgs.append(real(state["exp_avg"]))
        return list(found.values())

    def _forget(self) -> None:
        """Drop the moments that a failed step made: they may be of a task whose name was mistyped."""
        for parameter, kept in list(self.state.items()):
            new = [task for task, value in kept.items() if isinstance(value, dict) and not value.get("step")]
            for task in new:
                del kept[task]
            if not kept or kept.get("step") == 0:
                del self.state[parameter]

    def _standing(self, taken: Sequence[str]) -> str:
        """Say what a step has changed that fails after the gradients of the tasks ``taken`` were taken in."""
        # The moments of others are dropped again.
        before = [repr(task) for task in taken if self._remembers(task)]
        if not before:
            return "Nothing was changed."
        return (
            f"Parameters, step counters and the moments of this task are as they were; the moments of "
            f"task{'s' if len(before) > 1 else ''} {', '.join(before)}, whose backward came first, have already taken "
            "in their gradient of this step."
        )

    def _remembers(self, task: str) -> bool:
        """Whether a task has moments from earlier steps."""
        states = (
            self.state.get(p, {}) for g in self.param_groups if g["role"] == ROLES[0] for p in g["params"]
        )
        return any(task in kept and kept[task]["step"] > 0 for kept in states)

    def _check_new(self, group: Mapping[str, Any], named: Iterable[tuple[str, torch.Tensor]]) -> None:
        role_of = {parameter: old["role"] for old in self.param_groups for parameter in old["params"]}
        for name, parameter in named:
            if parameter in role_of:
                raise ValueError(
                    f"parameter {self._names.get(parameter, name)} is in two groups, as {role_of[parameter]} and as "
                    f"{group['role']}: give every parameter once. A module holds the parameters of those inside it."
                )

    def _name_of(self, parameter: torch.Tensor) -> str:
        return self._names[parameter]

    def _name(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        taken = set(self._names.values())
        for name, parameter in named:
            if parameter in self._names:
                continue
            unique, number = name, 2
            while unique in taken:
                unique, number = f"{name} #{number}", number + 1
            taken.add(unique)
            self._names[parameter] = unique


def _check_call(losses: Any) -> None:
    if losses is None or callable(losses):
        raise TypeError(
            "step() takes the losses of the tasks, as a mapping from task name to loss or a list, and does the "
            "backwards itself; a closure is not supported."
        )
