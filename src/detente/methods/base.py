"""The contract of a method: from task gradients (or only losses) to a combination.

A method is a ``torch.nn.Module`` without trainable parameters. Its state lives in buffers, so that
``state_dict`` saves all of it, and is kept by task name, so that a batch without some task loses nothing.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Self, final

import numpy as np
import torch
from torch import nn

from detente.geometry.gramian import one_thread
from detente.methods.options import Preference, check_preference, one_of, weight_by_name, whole_or_none
from detente.values import Combination, Declaration, TaskGradients

__all__ = [
    "Declaration",
    "Method",
    "Preference",
    "check_names",
    "one_of",
    "positional",
]


@cache
def positional(tasks: int) -> tuple[str, ...]:
    """Name unnamed tasks by their positions.

    Example:
        >>> positional(2)
        ('0', '1')
    """
    return tuple(str(position) for position in range(tasks))


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names as a tuple.

    Raises:
        ValueError: there are none, or one occurs twice.

    Example:
        >>> check_names(["left", "right"])
        ('left', 'right')
    """
    names = tuple(str(name) for name in names)
    if not names:
        raise ValueError("no tasks: give at least one task name or loss.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"task {twice!r} occurs twice; task names must differ.")
    return names


class Method(nn.Module, ABC):
    """Base of every method. An author writes ``declares``, ``__init__`` (options as keywords) and ``solve``.

    A method with memory also writes ``allocate``, which registers buffers whose first axis is the task (it is
    called when the tasks become known, and again with more tasks when a new name appears; a second axis may run over
    the tasks too), and updates them at ``self.positions(gradients.names)`` inside ``solve``, after everything that
    can fail. A buffer whose size only the first step tells is registered there as None or with zero columns.

    ``load_state_dict`` takes names and sizes from what is loaded, into a fresh method too, which then goes on bit for
    bit. Which parameters are shared is not part of the state: where ``backward`` discovers them, the first step after
    loading (or copying) must have all tasks of the state, or it raises ``ValueError``; with ``shared=`` any batch will
    do. A preference by position asks for the tasks in the order in which they were saved. Buffers follow ``.to()`` to
    a device, and keep their dtype.

    Args:
        preference: relative importance of the tasks, by name or by position; None means all alike.
        seed: seeds ``self.generator``, the only source of randomness a method may use; None for methods that
            draw nothing.

    Example:
        >>> import detente
        >>> method = detente.create("mgda")
        >>> detente.combine(method, torch.eye(2)).weights
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    declares: (
        Declaration  # of the class; of the instance where an option or a wrapped method changes what holds
    )
    generator: torch.Generator | None
    column_layout: torch.Tensor | None
    _preference_option: ClassVar[str] = "preference"  # what the option is called in messages

    def __init__(self, *, preference: Preference = None, seed: int | None = None) -> None:
        super().__init__()
        self.tasks: tuple[str, ...] | None = None
        # The tasks of a loaded state, until the engine has taken notice: it remembers nothing of what they share.
        self.awaited: tuple[str, ...] | None = None
        self._constructed: frozenset[str] = frozenset()  # buffers that do not depend on the tasks
        self._preference = check_preference(self._preference_option, preference)
        seed = whole_or_none("seed", seed)
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        # Which parameters the columns of a state of their size belong to; of this process alone, so never saved.
        self.register_buffer("column_layout", None, persistent=False)

    # ---- what an author writes

    @abstractmethod
    def solve(self, gradients: TaskGradients) -> Combination:
        """Turn the tasks' gradients of one step into weights, a transform, or a direction."""

    def solve_blocks(self, blocks: Sequence[TaskGradients]) -> list[Combination]:
        """Solve for several blocks of parameters; worth writing where the mathematics takes a batch of Gramians."""
        return [self.solve(block) for block in blocks]

    def needs_now(self) -> frozenset[str]:
        """Return what the next call needs: the declared needs, or fewer in a method that does not always look."""
        return self.declares.needs

    def allocate(self, tasks: int) -> None:
        """Register the buffers of a method with memory for ``tasks`` tasks; methods without need nothing."""

    def end_epoch(self) -> None:
        """Tell the method that an epoch ended. Methods that do not need epochs ignore it."""

    def epoch_record(self) -> dict[str, Any]:
        """Return plain numbers by name worth storing with the epoch that just ended; most methods have none."""
        return {}

    def after_step(self, losses: Mapping[str, Any] | Sequence[Any]) -> None:
        """Give the method the losses of the same batch after the step. Methods that do not need them ignore it."""

    # ---- what everybody calls

    @final
    def combine(self, gradients: TaskGradients) -> Combination:
        """Make one training step of the method on ``gradients``.

        Raises:
            ValueError: a need is not met, a task is unknown, or the method rejects the input (each named). The
                state is then as it was before.
        """
        return self.combine_blocks((gradients,))[0]

    @final
    def combine_blocks(self, blocks: Sequence[TaskGradients]) -> list[Combination]:
        """Make one training step of the method on the same tasks' gradients in several blocks of parameters.

        Args:
            blocks: for each block what :meth:`combine` takes, as if there were no other parameters.

        Raises:
            ValueError: as :meth:`combine`.
        """
        for gradients in blocks:
            self._check(gradients)
        names = blocks[0].names
        before = []
        for module in self.modules():  # this method and those inside
            if isinstance(module, Method):
                drawn = None if module.generator is None else module.generator.get_state()
                before.append((module, module.tasks, dict(module._buffers), drawn))
        try:
            if names != self.tasks:  # as they are in nearly every step
                self.bind(names if self.tasks is not None else self._everyone(names))
            with one_thread(len(names)):
                return self.solve_blocks(blocks) if len(blocks) > 1 else [self.solve(blocks[0])]
        except BaseException:  # also when the user interrupts
            for method, tasks, buffers, drawn in before:
                method.tasks = tasks
                method._buffers.clear()
                method._buffers.update(buffers)
                if method.generator is not None and drawn is not None:
                    method.generator.set_state(drawn)
            raise

    @final
    def bind(self, names: Sequence[str]) -> None:
        """Learn the tasks' names: on the first call all of them, later calls may name fewer or further tasks.

        Raises:
            ValueError: names are missing or duplicate, a preference does not fit them, or unnamed losses change
                in number.
        """
        if names == self.tasks:
            return  # as in nearly every step
        names = check_names(names)
        if self.tasks is None:
            weight_by_name(self._preference, names, self._preference_option)
            for method in self._inside():
                method.bind(names)
            self._constructed = frozenset(self._buffers)
            self.allocate(len(names))
            self.tasks = names
            return
        new = tuple(name for name in names if name not in self.tasks)
        unnamed, were_unnamed = names == positional(len(names)), self.tasks == positional(len(self.tasks))
        if unnamed and were_unnamed and len(names) != len(self.tasks):
            raise ValueError(
                f"{self.declares.name}: {len(self.tasks)} unnamed losses became {len(names)}; which task is absent "
                "cannot be told. Pass losses as a mapping from task name to loss, or create a new method."
            )
        if new and unnamed != were_unnamed:
            known = f"{len(self.tasks)} unnamed tasks" if were_unnamed else f"tasks {', '.join(self.tasks)}"
            given = f"{len(names)} unnamed losses" if unnamed else f"losses named {', '.join(names)}"
            raise ValueError(
                f"{self.declares.name} knows {known} and was given {given}; which loss is which task cannot be told. "
                "Name the losses in every step or in none, or create a new method."
            )
        for method in self._inside():
            method.bind(names)
        if new:
            if isinstance(self._preference, tuple):
                raise ValueError(
                    f"{self.declares.name}: task {new[0]!r} appeared after the first step, and the "
                    f"{self._preference_option} is given by position for {len(self._preference)} tasks. Give it by "
                    "name."
                )
            weight_by_name(self._preference, self.tasks + new, self._preference_option)
            self._grow(self.tasks + new)

    def positions(self, names: Sequence[str]) -> np.ndarray:
        """Return where [len(names)] the present tasks stand in the method's buffers, as int64."""
        assert self.tasks is not None, "bind() comes first"
        if names == self.tasks:
            return np.arange(len(names), dtype=np.int64)
        index = {name: position for position, name in enumerate(self.tasks)}
        return np.array([index[name] for name in names], dtype=np.int64)

    def preference(self, names: Sequence[str], *, rescale: bool = True) -> np.ndarray | None:
        """Return the preference [len(names)] of the present tasks in float64; None if none was given.

        With every task present these are the numbers as given. With some absent and ``rescale`` they are brought
        to the same sum.

        Raises:
            ValueError: every task present has preference 0.
        """
        if self._preference is None:
            return None
        everyone = tuple(names) if self.tasks is None else self.tasks
        values = weight_by_name(self._preference, everyone, self._preference_option)
        assert values is not None
        present = values[[everyone.index(name) for name in names]]
        if present.sum() == 0:
            raise ValueError(
                f"{self.declares.name}: every task present in this step ({', '.join(names)}) has "
                f"{self._preference_option} 0; give at least one of them a positive one."
            )
        return present * (values.sum() / present.sum()) if rescale and len(present) < len(values) else present

    # ---- saving

    def get_extra_state(self) -> dict[str, Any]:
        """Return the tasks' names and the generator's state, saved by ``state_dict`` beside the buffers."""
        state: dict[str, Any] = {"tasks": None if self.tasks is None else list(self.tasks)}
        if self.generator is not None:
            state["generator"] = self.generator.get_state()
        return state

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`get_extra_state` saved."""
        self.tasks = None if state["tasks"] is None else tuple(state["tasks"])
        if self.generator is not None:
            self.generator.set_state(state["generator"].cpu())

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Also the methods inside, whose turn comes later: nothing has changed yet.
        for path, module in self.named_modules():
            if isinstance(module, Method):
                told = state_dict.get(f"{prefix}{path}{'.' if path else ''}_extra_state", {})
                module._check_saved(told.get("tasks"))
        # A fresh method has no sized buffers yet: take names and sizes from what is loaded.
        saved = state_dict.get(prefix + "_extra_state", {}).get("tasks")
        self._unbind()
        if saved is not None:
            self.bind(saved)
        self.awaited = None if saved is None else tuple(saved)
        self._buffers["column_layout"] = None
        for name, buffer in self._buffers.items():
            loaded = state_dict.get(prefix + name)
            if loaded is not None and (buffer is None or buffer.shape != loaded.shape):
                self._buffers[name] = torch.empty_like(loaded)  # sized by the first step, not by the tasks
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # State follows a model to another device, not to another dtype: bfloat16 is no place for statistics.
        def moved(buffer: torch.Tensor) -> torch.Tensor:
            there = fn(buffer)
            return there if there.dtype == buffer.dtype else buffer.to(there.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Generators can be neither copied nor pickled; their state can. The engine's memory is not ours to copy.
        state = {key: value for key, value in self.__dict__.items() if key not in ("generator", "workspace")}
        if "workspace" in self.__dict__:
            state["awaited"] = self.tasks
        state["generator_state"] = None if self.generator is None else self.generator.get_state()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        drawn = state.pop("generator_state")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.generator = None
        if drawn is not None:
            self.generator = torch.Generator()
            self.generator.set_state(drawn)

    # ---- private

    def _check_saved(self, saved: Sequence[str] | None) -> None:
        """Check that the tasks of a saved state are those of this method, in its order where that counts."""
        if saved is None or self.tasks is None or tuple(saved) == self.tasks:
            return
        name, there, here = self.declares.name, ", ".join(saved), ", ".join(self.tasks)
        if set(saved) != set(self.tasks):
            raise ValueError(
                f"{name}: the saved state is for tasks {there}, this method was created for {here}. Create it for the "
                "same tasks, or without tasks."
            )
        if isinstance(self._preference, tuple):
            raise ValueError(
                f"{name}: the saved state has the tasks in the order {there}, this method in the order {here}, and the "
                f"{self._preference_option} is given by position. Give it by name."
            )

    def _inside(self) -> list[Method]:
        """Return the methods this one is wrapped around, at any depth."""
        return [module for module in self.modules() if isinstance(module, Method) and module is not self]

    def _check(self, gradients: TaskGradients) -> None:
        name, needs = self.declares.name, self.needs_now()
        if "losses" in needs and gradients.losses is None:
            raise ValueError(f"{name} needs the losses: pass losses= with one number per task.")
        if "gramian" in needs and gradients.gramian is None:
            raise ValueError(f"{name} needs the Gramian of the task gradients, and none was computed.")
        if "jacobian" in needs and gradients.jacobian is None:
            raise ValueError(
                f"{name} needs the task gradients themselves, and only their Gramian was computed."
            )
        if "blocks" in needs and gradients.block_gramians is None:
            raise ValueError(f"{name} needs one Gramian per block of parameters, and none was computed.")
        if "activations" in needs and gradients.space == "features" and gradients.activations is None:
            raise ValueError(f"{name} needs the representation beside its gradients, and it was not given.")
        if gradients.space != "none" and gradients.space not in self.declares.spaces:
            raise ValueError(
                f"{name} cannot be solved in the space {gradients.space!r}; it runs on "
                f"{', '.join(sorted(self.declares.spaces))}."
            )

    def _everyone(self, names: Sequence[str]) -> tuple[str, ...]:
        # A preference by name names every task, also those absent from the first step; and a wrapped method may
        # have been told the names.
        further: dict[str, None] = {}
        for method in (self, *self._inside()):
            further.update(dict.fromkeys(method._preference if isinstance(method._preference, dict) else ()))
            further.update(dict.fromkeys(method.tasks or ()))
        return (*names, *(name for name in further if name not in names))

    def _unbind(self) -> None:
        if self.tasks is None:
            return  # no buffer depends on the tasks yet
        self.tasks = None
        for name in list(self._buffers):
            if name not in self._constructed:
                del self._buffers[name]

    def _grow(self, names: tuple[str, ...]) -> None:
        kept = {name: old for name, old in self._buffers.items() if name not in self._constructed}
        known = len(self.tasks or ())
        self._unbind()
        self.allocate(len(names))
        for name, old in kept.items():
            fresh = self._buffers.get(name)
            if (
                old is None
                or old.dim() == 0
                or len(old) != known
                or (fresh is not None and fresh.shape == old.shape)
            ):
                self._buffers[name] = old
                continue
            if fresh is None or fresh.dim() != old.dim():
                fresh = old.new_zeros(len(names), *old.shape[1:])
            elif any(map(operator.lt, fresh.shape, old.shape)):
                # Sized by the first step: the new tasks start from zero, as the others did.
                fresh = old.new_zeros(tuple(map(max, fresh.shape, old.shape)))
            fresh[tuple(map(slice, old.shape))] = (
                old  # the leading corner: the second axis may run over tasks too
            )
            self._buffers[name] = fresh
        self.tasks = names
