"""A representation in one branch per task: the heads' gradients then come out of one call of autograd."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from detente.autograd.graph import Edge, gradient_edge

Representation = torch.Tensor | tuple[torch.Tensor, ...]


class Branches:
    """Hold one branch of a representation for each task; made by :func:`branch`.

    It is a mapping from name to branch, though not a ``collections.abc.Mapping``: libraries that go through a model's
    output would take it apart and build a dictionary instead.

    Attributes:
        features: the tensors of the representation itself, with their graph.
    """

    def __init__(self, features: tuple[torch.Tensor, ...], names: tuple[str, ...], *, single: bool) -> None:
        self.features = features
        self._single = single
        self._of: dict[str, tuple[torch.Tensor, ...]] = {}
        leaves = [_leaf(feature) for feature in features]
        for name in names:
            self._of[name] = tuple(leaf.view_as(leaf) for leaf in leaves)

    def __getitem__(self, name: str) -> Representation:
        parts = self._of.get(str(name))
        if parts is None:
            raise KeyError(f"no branch for task {name!r}; there are branches for {', '.join(self._of)}.")
        return parts[0] if self._single else parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    def __contains__(self, name: object) -> bool:
        return str(name) in self._of

    def keys(self) -> tuple[str, ...]:
        """Return the names of the tasks."""
        return tuple(self._of)

    def values(self) -> list[Representation]:
        """Return the branches, in the order of the names."""
        return [self[name] for name in self._of]

    def items(self) -> list[tuple[str, Representation]]:
        """Return names and branches."""
        return [(name, self[name]) for name in self._of]

    def parts(self, name: str) -> tuple[torch.Tensor, ...]:
        """Return the tensors of one task's branch, one for each of ``features``; none for a task without a branch."""
        return self._of.get(name, ())

    def edges(self) -> list[Edge]:
        """Return where each branch begins in the graph, in the order of names and tensors."""
        return [gradient_edge(part) for parts in self._of.values() for part in parts if part.requires_grad]

    def of(self, features: Sequence[torch.Tensor]) -> Branches:
        """Return branches for the same tasks of another representation, for example one that a search has moved."""
        return Branches(tuple(features), tuple(self._of), single=self._single)


def branch(z: torch.Tensor | Sequence[torch.Tensor], names: Sequence[str] | int) -> Branches:
    """Branch a representation, so that each task's head reads a copy of its own without copying memory.

    Autograd adds up the gradients of all heads where they meet. With branches they stay apart, and one call of autograd
    over all losses gives the gradient of every task with respect to the representation. Beside a plain backward that
    costs a Gramian and some milliseconds, which count on small networks alone. Pass the result as ``features=`` to
    :func:`detente.backward`, which carries the combined gradient on through the encoder; a plain
    ``sum(losses).backward()`` ends at the branches.

    Args:
        z: the representation, one tensor or several (several scales).
        names: the tasks' names, or how many unnamed ones ("0", "1", …).

    Returns:
        A mapping from name to tensor, or to a tuple of tensors where ``z`` is several. The branches share the memory of
        ``z``: do not change them in place. Where ``z`` carries no graph (evaluation), each branch is as ``z`` is.

    Raises:
        ValueError: no tensors or no names, two names alike, or the same tensor twice.
        TypeError: ``z`` is neither a tensor nor a sequence of tensors, ``names`` neither names nor a number.

    Example:
        >>> import detente
        >>> trunk, heads = torch.nn.Linear(3, 4), {"left": torch.nn.Linear(4, 1), "right": torch.nn.Linear(4, 1)}
        >>> z = detente.branch(trunk(torch.ones(2, 3)), list(heads))
        >>> losses = {name: head(z[name]).square().mean() for name, head in heads.items()}
        >>> record = detente.backward(losses, detente.create("mgda"), features=z)
        >>> record.space, trunk.weight.grad is not None
        ('features', True)
    """
    single = isinstance(z, torch.Tensor)
    given: Any = (z,) if single else z
    if isinstance(given, Sequence) and not given:
        raise ValueError("branch was given no tensors; pass the representation that the heads read.")
    if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence):
        raise TypeError(f"branch takes a tensor or a sequence of tensors, got {type(z).__name__}.")
    for part in given:
        if not isinstance(part, torch.Tensor):
            raise TypeError(
                f"branch takes a tensor or a sequence of tensors; one entry is a {type(part).__name__}."
            )
    if len({id(part) for part in given}) < len(given):
        raise ValueError("branch was given the same tensor twice; the heads can read its branch twice.")
    if isinstance(names, (str, bool)) or not isinstance(names, (int, Iterable)):
        raise TypeError(f"names takes the tasks' names or their number, got {names!r}.")
    told = tuple(map(str, range(names) if isinstance(names, int) else names))
    if not told or len(set(told)) < len(told):
        raise ValueError(f"names is {names!r}; give at least one name for the tasks, and no name twice.")
    return Branches(tuple(given), told, single=single)


def _leaf(feature: torch.Tensor) -> torch.Tensor:
    if not (feature.requires_grad and torch.is_grad_enabled()):
        return feature
    leaf = feature.detach().requires_grad_()
    leaf._detente_branch = True  # type: ignore[attr-defined]
    return leaf


def is_branch(leaf: torch.Tensor) -> bool:
    """Return whether a leaf is where branches of a representation begin."""
    return getattr(leaf, "_detente_branch", False)
