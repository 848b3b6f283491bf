"""What optimizers with moments for each task have in common: groups, the order of a step, own parameters, saving."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar

import torch

from detente.autograd.flat import Gradients
from detente.autograd.host import to_host
from detente.autograd.losses import Losses, check_losses, named_losses
from detente.autograd.partition import Memory
from detente.autograd.ranks import ProcessGroup, ranks_of
from detente.autograd.reduce import Samples, losses_of_all, prepare
from detente.autograd.where import Where
from detente.methods import Method
from detente.optim.balance import Gauge, TaskBalance
from detente.optim.groups import known_tasks, read_groups, task_names
from detente.optim.kernels import Moments, alike, real, subtract
from detente.optim.options import ROLES, check_options
from detente.optim.parts import (
    OwnMove,
    Part,
    Pass,
    decay,
    dense,
    fresh_moments,
    laid_out,
    rule_of,
    shrinkage,
)
from detente.optim.saved import check_kind, check_moments, fit
from detente.optim.streams import Asked, altered, streamed
from detente.values import StepRecord


class TaskOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer that is given losses and takes each task's gradient by itself.

    A subclass keeps moments for every task and shared parameter (``_take``, one task's gradient at a time) and moves
    the shared parameters after the last backward (``_settle``). Task-specific parameters take Adam steps here.

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
        """The moments of a task that meets a shared parameter for the first time."""

    @abstractmethod
    def _take(self, name: str, gradients: Gradients, current: Pass) -> None:
        """Move one task's moments by its gradients of the shared parameters; the parameters stay."""

    @abstractmethod
    def _settle(self, current: Pass) -> None:
        """Move the shared parameters that were touched, once."""

    def _check_options(self, options: Mapping[str, Any]) -> None:
        """See that a group's options are in range; a subclass looks at its own as well."""
        check_options(options)

    # ---- what everybody calls

    @torch.no_grad()
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
        from ``losses`` has no part in the step; its moments and counters stay as they are.

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
                finite: parameters and counters are unchanged, and the message says which tasks' moments have already
                advanced (with ``transform``, none).
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
        self._check_moments(group_of)
        ranks, reduction = ranks_of(process_group), None
        if ranks is None:
            names, scalars = named_losses(losses)
            tasks = known_tasks(self.tasks, names, closed=self._closed)
            (values,) = to_host([scalars])
        else:
            where = Where(None, tuple(shared), tuple(specific), None)
            with torch.enable_grad():  # this rank's share of each loss keeps its graph
                ready = prepare(losses, where, self._workspace, ranks, samples=samples, known=self.tasks)
            names, scalars, reduction = ready.names, ready.losses, ready.reduction
            tasks = known_tasks(self.tasks, names, closed=self._closed)
            values = losses_of_all(scalars, reduction)
        check_losses(names, values)
        # In the order in which the tasks became known, so that the order of a mapping changes nothing.
        order = sorted(range(len(names)), key=lambda task: tasks.index(names[task]))
        asked = Asked(
            tuple(names[task] for task in order),
            [scalars[task] for task in order],
            shared,
            specific,
            self._name_of,
            self._remembers,
            reduction,
        )
        self.balance = None
        current = Pass(group_of, Gauge(asked.names, shared, self._name_of) if measure else None)
        own: dict[torch.Tensor, torch.Tensor] = {}
        record = StepRecord(
            names=asked.names,
            losses=tuple(values[order].tolist()),
            weights=None,
            space="exact" if shared else "none",
        )
        source = streamed(asked, own)
        if self.transform is not None and shared:
            record, source = altered(asked, self.transform, self._workspace, own)
        notes = list(record.notes)
        if record.accepted:
            try:
                notes += self._advance(source, own, current, held=record.status == "stationary")
            except BaseException:
                self._forget(current)
                raise
            for state in current.states:
                state["step"] += 1
            self.tasks = tasks
            self.balance = None if current.gauge is None else current.gauge.read()
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

    # ---- moments and moves

    def _parts(self, gradients: Gradients, current: Pass, task: str | None) -> Iterable[Part]:
        """One task's gradients beside its moments (those of a task-specific parameter for None), kernel by kernel."""
        found: dict[tuple[Any, ...], Part] = {}
        for parameter, gradient in gradients:
            group = current.group_of[parameter]
            state = self.state[parameter]
            if task is not None:
                state = state.setdefault(task, {})
                current.touched.setdefault(parameter, []).append(task)
            if not state:
                current.born.append((parameter, task))
                state.update(fresh_moments(parameter) if task is None else self._fresh(parameter, group))
            square, found_here = real(state["exp_avg_sq"]), dense(gradient)
            if found_here.shape != square.shape:
                raise self._misfit(parameter)
            key = (id(group), state["step"], square.device, square.dtype)
            part = found.get(key)
            if part is None:
                part = found[key] = Part(group, moments=Moments([], [], [], state["step"] + 1))
            part.parameters.append(parameter)
            part.states.append(state)
            part.moments.gradients.append(laid_out(found_here, square))
            part.moments.exp_avg_sqs.append(square)
            if "exp_avg" in state:
                part.moments.exp_avgs.append(real(state["exp_avg"]))
            current.states.append(state)
        return found.values()

    def _prepare_own(self, own: dict[torch.Tensor, torch.Tensor], current: Pass) -> list[OwnMove]:
        """What the task-specific parameters need to move; whatever can fail fails here, before anything moves."""
        moves = []
        for part in self._parts(list(own.items()), current, None):
            # The kernel runs through memory and knows one dtype: a parameter that lies there in another way, or was
            # cast after its moments were made, is moved by way of zeros beside it.
            targets = [
                tensor if alike(tensor, square) else torch.zeros_like(square)
                for tensor, square in zip(map(real, part.parameters), part.moments.exp_avg_sqs, strict=True)
            ]
            moves.append(OwnMove(part, rule_of(part.group, "adam"), shrinkage(part.group), targets))
        return moves

    def _move_own(self, moves: Iterable[OwnMove]) -> None:
        """Plain Adam with decoupled weight decay, as torch.optim.AdamW."""
        for move in moves:
            parameters = [real(parameter) for parameter in move.part.parameters]
            decay(parameters, move.shrinkage)
            subtract(move.rule, move.part.moments, move.targets)
            for parameter, tensor, target in zip(move.part.parameters, parameters, move.targets, strict=True):
                if not alike(tensor, target):
                    tensor.add_(target)
                # A fused kernel does not tell autograd; a graph that still holds the old values must not be walked.
                torch.autograd.graph.increment_version(parameter)

    # ---- private

    def _advance(
        self,
        source: Iterable[tuple[str, Gradients]],
        own: dict[torch.Tensor, torch.Tensor],
        current: Pass,
        *,
        held: bool,
    ) -> list[str]:
        """Take every task's gradients, then move; the notes. ``held``: the shared parameters may stay."""
        notes = []
        shared = any(group["role"] == ROLES[0] for group in current.group_of.values())
        for name, gradients in source:
            if shared and not gradients:
                notes.append(f"task {name!r} reaches no shared parameter")
            self._take(name, gradients, current)
            del gradients  # held here, they would live through the next backward
        if not current.touched and not held and (shared or not own):
            kind = ROLES[0 if shared else 1]
            count = sum(group["role"] == kind for group in current.group_of.values())
            raise ValueError(
                f"no loss reaches any of the {count} {kind} parameters of this optimizer. Are they of another model, "
                "or was the graph detached? Nothing was changed."
            )
        moves = self._prepare_own(own, current)
        self._settle(current)
        self._move_own(moves)
        return notes

    def _forget(self, current: Pass) -> None:
        """Drop the moments that a failed step made: they may be of a task whose name was mistyped."""
        for parameter, task in current.born:
            if task is None:
                del self.state[parameter]
                continue
            self.state[parameter].pop(task, None)
            if not self.state[parameter]:
                del self.state[parameter]

    def _remembers(self, task: str) -> bool:
        """Whether a task has moments from earlier steps."""
        states = (
            self.state.get(p, {}) for g in self.param_groups if g["role"] == ROLES[0] for p in g["params"]
        )
        return any(task in kept and kept[task]["step"] > 0 for kept in states)

    def _check_moments(self, group_of: Mapping[torch.Tensor, Mapping[str, Any]]) -> None:
        """See that parameters still have the shape and device of their moments: kernels do not look."""
        for parameter, group in group_of.items():
            kept = self.state.get(parameter)
            if not kept:
                continue
            shape, device = parameter.shape, parameter.device
            for moments in [kept] if group["role"] == ROLES[1] else kept.values():
                square = moments["exp_avg_sq"]
                if square.shape != shape or moments.get("exp_avg", square).shape != shape:
                    raise self._misfit(parameter)
                if square.device != device:
                    raise ValueError(
                        f"parameter {self._name_of(parameter)} is on {device}, and its moments on {square.device}. Let "
                        "them follow with optimizer.load_state_dict(optimizer.state_dict()). Nothing was changed."
                    )

    def _misfit(self, parameter: torch.Tensor) -> ValueError:
        return ValueError(
            f"parameter {self._name_of(parameter)} has another shape than its moments or its gradient. Make a new "
            "optimizer, or delete optimizer.state[parameter], and compute the losses after the change. The parameters "
            "were not changed."
        )

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
