"""Parameters as a caller hands them over: groups for ``torch.optim.Optimizer``, and a name for every tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from detente.optim.options import Role


def read_groups(
    given: Any, option: str, role: Role
) -> tuple[list[dict[str, Any]], list[tuple[str, torch.Tensor]]]:
    """Groups with flat lists of parameters, and the name of each.

    Args:
        given: a parameter, a module, named parameters, nested iterables or mappings of them, one parameter group (a
            mapping with the key ``params``), or a list of groups.
        option: what the caller named it, for messages.
        role: what the tasks do with these parameters.

    Raises:
        TypeError: an entry is neither a parameter nor a module, or groups and parameters are mixed.

    Example:
        >>> groups, named = read_groups(nn.Linear(2, 1), "shared", "shared")
        >>> [name for name, _ in named], groups[0]["role"]
        (['weight', 'bias'], 'shared')
        >>> read_groups([{"params": nn.Linear(2, 1), "lr": 0.1}], "shared", "shared")[0][0]["lr"]
        0.1
    """
    if _is_group(given):
        given = [given]
    if isinstance(given, Iterable) and not isinstance(given, (torch.Tensor, nn.Module, Mapping, str, bytes)):
        given = list(given)
        if given and all(_is_group(entry) for entry in given):
            groups, named = [], []
            for number, group in enumerate(given):
                prefix = f"{number}." if len(given) > 1 else ""
                found = _unique(named_tensors(group["params"], option, prefix))
                groups.append({"role": role, **group, "params": [tensor for _, tensor in found]})
                named += found
            return groups, named
        if any(_is_group(entry) for entry in given):
            raise TypeError(
                f"{option}= mixes parameter groups with parameters; put them into a group of their own."
            )
    found = _unique(named_tensors(given, option))
    return ([{"params": [tensor for _, tensor in found], "role": role}] if found else []), found


def named_tensors(given: Any, option: str, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor with a name: that of its module, or its position and shape.

    Raises:
        TypeError: an entry is neither a parameter nor a module; the option is named.

    Example:
        >>> [name for name, _ in named_tensors([nn.Linear(2, 1), torch.ones(3)], "shared")]
        ['0.weight', '0.bias', '1 [3]']
    """
    if isinstance(given, torch.Tensor):
        yield f"{prefix.removesuffix('.') or '0'} {list(given.shape)}", given
    elif isinstance(given, nn.Module):
        for name, parameter in given.named_parameters():
            yield f"{prefix}{name}", parameter
    elif isinstance(given, Mapping):
        for name, entry in given.items():
            yield from _named(str(name), entry, option, prefix)
    elif isinstance(given, Iterable) and not isinstance(given, (str, bytes)):
        for position, entry in enumerate(given):
            if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str):
                yield from _named(entry[0], entry[1], option, prefix)
            else:
                yield from named_tensors(entry, option, f"{prefix}{position}.")
    else:
        raise TypeError(f"{option}= takes parameters or modules, got {type(given).__name__}.")


def _named(name: str, entry: Any, option: str, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(entry, torch.Tensor):
        yield f"{prefix}{name}", entry
    else:
        yield from named_tensors(entry, option, f"{prefix}{name}.")


def known_tasks(known: Sequence[str] | None, names: Sequence[str], *, closed: bool) -> tuple[str, ...]:
    """The tasks known after a step with the tasks ``names``.

    Args:
        known: the tasks so far; None before the first step.
        names: the tasks of the step; unnamed ones are called by their positions.
        closed: True if no task may be added.

    Raises:
        ValueError: a task is unknown, or unnamed losses change in number or follow named ones, so that it cannot be
            told which loss is which task.

    Example:
        >>> known_tasks(("seg", "depth"), ["depth"], closed=False)
        ('seg', 'depth')
    """
    names = tuple(names)
    if known is None or names == tuple(known):
        return names
    positions, known_positions = _positional(len(names)), _positional(len(known))
    unnamed, were_unnamed = names == positions, tuple(known) == known_positions
    if unnamed and were_unnamed:
        raise ValueError(
            f"{len(known)} unnamed losses became {len(names)}; which task is absent cannot be told. Pass losses as a "
            "mapping from task name to loss."
        )
    new = [name for name in names if name not in known]
    if new and (closed or unnamed != were_unnamed):
        raise ValueError(
            f"task {new[0]!r} is not one of the tasks of this optimizer ({', '.join(known)}). Name the losses alike in "
            "every step, or create the optimizer for these tasks."
        )
    return (*known, *new)


def task_names(tasks: Sequence[str] | int | None) -> tuple[str, ...] | None:
    """The option ``tasks`` as names: given, or positions for a count; None stays None.

    Raises:
        ValueError: there are none, or one occurs twice.
        TypeError: it is a text, or no sequence.

    Example:
        >>> task_names(2)
        ('0', '1')
    """
    if tasks is None:
        return None
    if isinstance(tasks, (str, bytes)) or not isinstance(tasks, (int, Iterable)):
        raise TypeError(f"tasks is {tasks!r}; give a list of names, or their number.")
    names = _positional(tasks) if isinstance(tasks, int) else tuple(map(str, tasks))
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks is {tasks!r}; give at least one name, and every name once.")
    return names


def _positional(tasks: int) -> tuple[str, ...]:
    return tuple(map(str, range(tasks)))


def _is_group(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "params" in entry


def _unique(named: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    """Without the tensors that came before, as modules that share one name it twice."""
    found: dict[torch.Tensor, str] = {}
    for name, tensor in named:
        found.setdefault(tensor, name)
    return [(name, tensor) for tensor, name in found.items()]
