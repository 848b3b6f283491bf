"""What optimizers with moments for each task have in common: groups, the order of a step, own parameters, saving."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

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
from detente.optim.groups import Role, known_tasks, read_groups, task_names
from detente.optim.kernels import Moments, Rule, real, subtract
from detente.optim.streams import Asked, altered, streamed
from detente.values import StepRecord

ROLES: tuple[Role, Role] = ("shared", "task-specific")


@dataclass(frozen=True)
class Part:
    """Parameters that go through a kernel together: of one group, one count of gradients, one device and dtype.

    Attributes:
        group: their parameter group.
        parameters: as the caller knows them.
        moments: real tensors, in the order of the parameters.
        states: where their moments are kept.
    """

    group: dict[str, Any]
    parameters: list[torch.Tensor] = field(default_factory=list)
    moments: Moments = field(default_factory=lambda: Moments([], [], [], 0))
    states: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Pass:
    """One step under way.

    Attributes:
        group_of: the group of every parameter.
        gauge: collects contributions, None if nobody asked.
        touched: shared parameters some task's moments took a gradient of, each with those tasks.
        states: whose counters go up by one when the step is made.
    """

    group_of: dict[torch.Tensor, dict[str, Any]]
    gauge: Gauge | None
    touched: dict[torch.Tensor, list[str]] = field(default_factory=dict)
    states: list[dict[str, Any]] = field(default_factory=list)

    def groups(self) -> Iterable[tuple[dict[str, Any], list[torch.Tensor]]]:
        """The touched parameters, group by group."""
        found: dict[int, tuple[dict[str, Any], list[torch.Tensor]]] = {}
        for parameter in self.touched:
            group = self.group_of[parameter]
            found.setdefault(id(group), (group, []))[1].append(parameter)
        return found.values()


class TaskOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer that is given losses and takes each task's gradient by itself.

    A subclass keeps moments for every task and shared parameter (``_take``, one task's gradient at a time) and moves
    the shared parameters after the last backward (``_settle``). Task-specific parameters take Adam steps here.

    Args:
        shared, task_specific: parameters, modules, or parameter groups.
        tasks: names, a count, or None to learn them from the losses.
        defaults: options of every group.
        transform: a method whose altered gradients are taken instead of the given ones, or None.
    """

    def __init__(
        self,
        shared: Any,
        task_specific: Any,
        tasks: Sequence[str] | int | None,
        defaults: dict[str, Any],
        transform: Method | None = None,
    ) -> None:
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
                parameter: nothing was changed. Or a gradient is not finite: parameters and counters are unchanged,
                and the message says which tasks' moments have already advanced (with ``transform``, none).
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
            for name, gradients in source:
                if shared and not gradients:
                    notes.append(f"task {name!r} reaches no shared parameter")
                self._take(name, gradients, current)
                del gradients  # held here, they would live through the next backward
            if not current.touched and (shared or not own):
                raise ValueError(
                    f"no loss reaches any of the {len(shared) or len(specific)} "
                    f"{'shared' if shared else 'task-specific'} parameters of this optimizer. Are they of another "
                    "model, or was the graph detached? Nothing was changed."
                )
            self._settle(current)
            self._move_own(own, current)
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
            ValueError: an option is out of range, the role is unknown, or a parameter is in a group already.

        Example:
            >>> import detente.optim
            >>> optimizer = detente.optim.MAO(torch.nn.Linear(2, 2))
            >>> optimizer.add_param_group({"params": torch.nn.Linear(2, 1), "lr": 0.1, "role": "task-specific"})
            >>> [group["lr"] for group in optimizer.param_groups]
            [0.001, 0.1]
        """
        groups, named = read_groups(param_group, "params", param_group.get("role", ROLES[0]))
        (group,) = groups
        check_options({**self.defaults, **group})
        super().add_param_group(group)
        self._name((name, parameter) for name, parameter in named if parameter not in self._names)

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
            ValueError: it is of another class, other tasks or other groups, or with another transform. Nothing was
                changed.

        Example:
            >>> import detente.optim
            >>> layer = torch.nn.Linear(2, 2)
            >>> first, second = detente.optim.MAO(layer), detente.optim.MAO(layer)
            >>> _ = first.step({"a": layer(torch.ones(2)).sum()})
            >>> second.load_state_dict(first.state_dict())
            >>> second.tasks
            ('a',)
        """
        kind, tasks, method = (state_dict.get(key) for key in ("optimizer", "tasks", "transform"))
        if kind != type(self).__name__:
            raise ValueError(
                f"the saved state is of {kind or 'another optimizer'}, not of {type(self).__name__}."
            )
        if self._closed and tasks is not None and tuple(tasks) != self.tasks:
            raise ValueError(
                f"the saved state is for tasks {', '.join(tasks)}; this optimizer was created for "
                f"{', '.join(self.tasks or ())}."
            )
        if (method is None) != (self.transform is None):
            raise ValueError(
                f"the state was saved {'without' if method is None else 'with'} transform=; create the optimizer alike."
            )
        roles = [group.get("role") for group in state_dict["param_groups"]]
        if roles != [group["role"] for group in self.param_groups]:
            raise ValueError(
                f"the saved state has groups with the roles {', '.join(map(str, roles))}; this optimizer has "
                f"{', '.join(group['role'] for group in self.param_groups)}."
            )
        if self.transform is not None and method is not None:
            deepcopy(self.transform).load_state_dict(method)  # fails here if it fails
        # Otherwise the moments would be the very tensors of the saved state, and of every optimizer loaded from it.
        super().load_state_dict(deepcopy(state_dict))
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

    # ---- for subclasses

    def _parts(self, gradients: Gradients, current: Pass, task: str | None) -> Iterable[Part]:
        """One task's gradients beside its moments (those of a task-specific parameter for None), kernel by kernel."""
        found: dict[tuple[Any, ...], Part] = {}
        for parameter, gradient in gradients:
            group = current.group_of[parameter]
            state = self.state[parameter]
            if task is None:
                if not state:
                    state.update(fresh_moments(parameter))
            else:
                state = state.setdefault(task, {})
                if not state:
                    state.update(self._fresh(parameter, group))
                current.touched.setdefault(parameter, []).append(task)
            square = real(state["exp_avg_sq"])
            key = (id(group), state["step"], square.device, square.dtype)
            part = found.get(key)
            if part is None:
                part = found[key] = Part(group, moments=Moments([], [], [], state["step"] + 1))
            part.parameters.append(parameter)
            part.states.append(state)
            part.moments.gradients.append(_laid_out(gradient, square))
            part.moments.exp_avg_sqs.append(square)
            if "exp_avg" in state:
                part.moments.exp_avgs.append(real(state["exp_avg"]))
            current.states.append(state)
        return found.values()

    def _move_own(self, own: dict[torch.Tensor, torch.Tensor], current: Pass) -> None:
        """Plain Adam with decoupled weight decay, as torch.optim.AdamW."""
        for part in self._parts(list(own.items()), current, None):
            parameters = [real(parameter) for parameter in part.parameters]
            decay(parameters, part.group)
            squares = part.moments.exp_avg_sqs
            # The kernel runs through memory: a parameter that lies there in another way is moved by way of a copy.
            aside = [
                None if tensor.stride() == square.stride() else torch.zeros_like(square)
                for tensor, square in zip(parameters, squares, strict=True)
            ]
            targets = [t if copy is None else copy for t, copy in zip(parameters, aside, strict=True)]
            subtract(rule_of(part.group, "adam"), part.moments, targets)
            for parameter, tensor, copy in zip(part.parameters, parameters, aside, strict=True):
                if copy is not None:
                    tensor.add_(copy)
                # A fused kernel does not tell autograd; a graph that still holds the old values must not be walked.
                torch.autograd.graph.increment_version(parameter)

    def _name_of(self, parameter: torch.Tensor) -> str:
        return self._names[parameter]

    def _name(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        taken = set(self._names.values())
        for name, parameter in named:
            unique, number = name, 2
            while unique in taken:
                unique, number = f"{name} #{number}", number + 1
            taken.add(unique)
            self._names[parameter] = unique


def fresh_moments(parameter: torch.Tensor) -> dict[str, Any]:
    """Zero moments in the parameter's layout; the counter is a plain number.

    Example:
        >>> fresh_moments(torch.ones(2))
        {'step': 0, 'exp_avg': tensor([0., 0.]), 'exp_avg_sq': tensor([0., 0.])}
    """
    return {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def rule_of(group: Mapping[str, Any], form: Any) -> Rule:
    """The numbers of a group, as they are now: schedulers change them."""
    beta1, beta2 = group["betas"]
    return Rule(form, float(group["lr"]), float(beta1), float(beta2), float(group["eps"]))


def decay(parameters: list[torch.Tensor], group: Mapping[str, Any]) -> None:
    """Decoupled weight decay: shrink by learning rate times weight decay, in place."""
    if group["weight_decay"]:
        torch._foreach_mul_(parameters, 1 - float(group["lr"]) * float(group["weight_decay"]))


def check_options(options: Mapping[str, Any]) -> None:
    """See that a group's options are in range.

    Raises:
        ValueError: one is not; it is named.

    Example:
        >>> check_options({"lr": -1.0})
        Traceback (most recent call last):
        ...
        ValueError: option lr is -1.0; give a finite number >= 0.
    """
    for name in ("lr", "eps", "weight_decay"):
        value = options.get(name, 0.0)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"option {name} is {value}; give a finite number >= 0.")
    betas = options.get("betas", (0.0, 0.0))
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"option betas is {betas}; give two numbers in [0, 1).")
    if options.get("role", ROLES[0]) not in ROLES:
        raise ValueError(f"option role is {options['role']!r}; give one of {', '.join(ROLES)}.")


def one_of(option: str, value: Any, allowed: Sequence[str]) -> Any:
    """``value`` if it is among the allowed ones.

    Raises:
        ValueError: it is not; the option is named.
    """
    if value not in allowed:
        raise ValueError(f"option {option} is {value!r}; give one of {', '.join(allowed)}.")
    return value


def _laid_out(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A gradient as a real tensor with the strides of ``like``; autograd may hand out any, expanded ones included."""
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    gradient = real(gradient)
    if gradient.stride() == like.stride() and gradient.dtype == like.dtype:
        return gradient
    return torch.empty_like(like).copy_(gradient)


def _check_call(losses: Any) -> None:
    if losses is None or callable(losses):
        raise TypeError(
            "step() takes the losses of the tasks, as a mapping from task name to loss or a list, and does the "
            "backwards itself; a closure is not supported."
        )
