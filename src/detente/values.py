"""Frozen values that pass between the rooms: task gradients in, a combination out, a record of the step.

Nothing here computes; nothing of ours is imported. Small matrices are float64 numpy arrays on the host,
everything of the size of the parameters is a torch tensor where the parameters live.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

Space = Literal["exact", "features", "layer", "none"]
Status = Literal["ok", "stationary", "refused"]

GRADIENT_NEEDS = frozenset({"gramian", "jacobian", "blocks", "activations"})
"""The needs that only task gradients meet."""

NEEDS = GRADIENT_NEEDS | {"losses", "after_step", "epoch"}
"""The needs a method may declare, beside ``batches:k``."""

EVERYWHERE = frozenset({"exact", "features", "layer"})
"""The spaces in which a method's problem may be solved."""


@dataclass(frozen=True)
class TaskGradients:
    """What a method may see of one step: T tasks, their losses and (where it asked for them) their gradients.

    Attributes:
        names: the T tasks present in this step, in the order of every other field.
        losses: [T] float64 on the host; None when the caller gave none.
        gramian: [T, T] float64 on the host, entry (i, j) is the inner product of the gradients of tasks i and j.
        jacobian: [T, P], one task gradient per row, in the dtype and on the device of the parameters. The engine
            reuses its memory: copy what must outlive the step.
        block_gramians: [B, T, T], one Gramian per shared tensor; they add up to ``gramian``.
        block_names: the B blocks' names.
        block_sizes: how many columns of the Jacobian each block has, in order.
        block_layers: which layer each block belongs to, counted from 0: a tensor with two or more dimensions starts
            a layer, one with fewer (a bias, a normalisation's scale) belongs to the layer before it.
        columns: key and number of columns of each shared tensor in the Jacobian, in order. A key stays with its
            parameter from step to step: state of the size of the parameters is kept by it. Empty where the Jacobian
            is not laid out over parameters.
        extra: the same tasks' gradients on further, independent batches, for methods that need ``batches:k``; empty
            when the caller gave none.
        activations: [P] the flattened representation, where the gradients are with respect to it.
        space: with respect to what the gradients were taken: ``exact`` (all shared parameters), ``features``
            (a shared representation), ``layer`` (some shared parameters), ``none`` (no gradients taken).

    Example:
        >>> TaskGradients(names=("left", "right"), gramian=np.eye(2)).tasks
        2
    """

    names: tuple[str, ...]
    losses: np.ndarray | None = None
    gramian: np.ndarray | None = None
    jacobian: torch.Tensor | None = None
    block_gramians: np.ndarray | None = None
    block_names: tuple[str, ...] = ()
    block_sizes: tuple[int, ...] = ()
    block_layers: tuple[int, ...] = ()
    columns: tuple[tuple[int, int], ...] = ()
    extra: tuple[TaskGradients, ...] = ()
    activations: torch.Tensor | None = None
    space: Space = "exact"

    @property
    def tasks(self) -> int:
        """The number of tasks T present in this step."""
        return len(self.names)


@dataclass(frozen=True)
class Combination:
    """What a method decided: one direction out of T task gradients.

    A method returns ``weights`` (and ``transform`` where it alters the gradients one by one), or a ``direction``
    when no weights of the tasks express it. :func:`detente.combine` fills the direction in from the weights.

    Attributes:
        weights: [T] float64 on the host, the direction is the sum of weight times gradient; None if no such
            weights exist.
        direction: [P], what the optimizer descends along, in the method's native scale.
        block_weights: [B, T] float64 on the host: weights that differ from block to block of the Jacobian (``weights``
            is then None), or None.
        transform: [T, T] float64 on the host or None. The altered gradient of task i is the sum over j of
            ``transform[i, j]`` times the gradient of task j.
        status: ``ok``; ``stationary``: the direction is exactly zero; ``refused``: the step should not be taken
            (the direction that was refused is still reported).
        kept_rank: the number of directions a spectral method kept, None for the others.
        dropped: names of tasks whose gradient the method could not represent and left out.
        notes: sentences for the record, for example which form of a method ran.
        residual: by how much the answer misses the conditions of the method's problem, relative to the size of the
            terms summed in them; None for methods that solve no problem, and where the answer has a closed form.

    Example:
        >>> Combination(weights=torch.tensor([0.5, 0.5], dtype=torch.float64)).accepted
        True
    """

    weights: torch.Tensor | None = None
    direction: torch.Tensor | None = None
    transform: torch.Tensor | None = None
    block_weights: torch.Tensor | None = None
    status: Status = "ok"
    kept_rank: int | None = None
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    residual: float | None = None

    @property
    def accepted(self) -> bool:
        """False only where the method refused the step."""
        return self.status != "refused"


@dataclass(frozen=True)
class Conflict:
    """How much T gradients disagree, in plain numbers.

    Attributes:
        norms: T Euclidean norms.
        cosines: T rows of T cosines; 0 where a gradient vanishes.
        condition_number: largest over smallest singular value of the gradient matrix, infinite if it is singular.
        magnitude_similarity: mean over pairs of 2 a b / (a² + b²) for norms a, b; 1 for a single task.
        minimal_cosine: the smallest cosine between two tasks; 1 for a single task.
        norm_ratio: the largest norm over the smallest, infinite if one gradient vanishes.

    Example:
        >>> Conflict((1.0,), ((1.0,),), 1.0, 1.0, 1.0, 1.0).norm_ratio
        1.0
    """

    norms: tuple[float, ...]
    cosines: tuple[tuple[float, ...], ...]
    condition_number: float
    magnitude_similarity: float
    minimal_cosine: float
    norm_ratio: float


@dataclass(frozen=True)
class StepRecord:
    """One step in plain numbers, ready for a log.

    Attributes:
        names: the T tasks of this step; every sequence below follows their order.
        losses: T losses.
        weights: T weights of the tasks, None for a task that was left out, or that has none because the method's
            direction is no weighted sum. (None as a whole in records of earlier versions.)
        status: ``ok``, ``stationary`` or ``refused``; ``accumulating`` for a micro-batch that is not the last.
        space: where the problem was solved: ``exact``, ``features``, ``layer``; ``none`` if no task gradients
            were taken (loss weightings) or no parameter is shared.
        raw: conflict of the gradients as given, None if none were taken.
        altered: conflict of the gradients after the method altered them one by one, None if it does not.
        kept_rank, dropped, notes, residual: as in :class:`Combination`; above 1e-10 a note tells of the residual.
        seconds: wall-clock time of the whole call.

    Example:
        >>> record = StepRecord(("left",), (0.5,), (1.0,))
        >>> record.accepted, record.to_dict()["losses"]
        (True, [0.5])
    """

    names: tuple[str, ...]
    losses: tuple[float, ...]
    weights: tuple[float | None, ...] | None
    status: Status | Literal["accumulating"] = "ok"
    space: Space = "none"
    raw: Conflict | None = None
    altered: Conflict | None = None
    kept_rank: int | None = None
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    residual: float | None = None
    seconds: float = 0.0

    @property
    def accepted(self) -> bool:
        """False where every ``.grad`` was left as found: the step was refused, or more micro-batches are to come."""
        return self.status not in ("refused", "accumulating")

    @property
    def gradient_norms(self) -> tuple[float, ...] | None:
        """T Euclidean norms of the given gradients, None if none were taken."""
        return None if self.raw is None else self.raw.norms

    @property
    def cosines(self) -> tuple[tuple[float, ...], ...] | None:
        """T rows of T cosines between the given gradients, None if none were taken."""
        return None if self.raw is None else self.raw.cosines

    @property
    def condition_number(self) -> float | None:
        """Condition number of the given gradients, None if none were taken."""
        return None if self.raw is None else self.raw.condition_number

    @property
    def magnitude_similarity(self) -> float | None:
        """Mean magnitude similarity of the given gradients, None if none were taken."""
        return None if self.raw is None else self.raw.magnitude_similarity

    def to_dict(self) -> dict[str, Any]:
        """The record as nested dictionaries and lists of plain numbers and strings."""
        return {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}


def _plain(value: Any) -> Any:
    if isinstance(value, Conflict):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return value


@dataclass(frozen=True)
class Option:
    """One option of a method: its default, its allowed choices (empty: any value) and its default search grid.

    Example:
        >>> Option(default="exact", choices=("exact", "frank-wolfe")).default
        'exact'
    """

    default: Any
    choices: tuple[Any, ...] = ()
    search: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """Hold what a registry tells of one name, whether of a method, a wrapper or anything else made from options.

    Attributes:
        name: what it is created by.
        summary: one line.
        source: paper and equation, or where the idea comes from.
        options: name to :class:`Option`.
        factory: takes the options as keywords (and first what it is put around, if anything).

    Example:
        >>> import detente
        >>> row = detente.wrappers.registered()["every"]
        >>> row.options["k"].default, row.factory(detente.create("mgda"), k=3).declares.name
        (5, 'every(mgda)')
    """

    name: str
    summary: str
    source: str
    options: Mapping[str, Option] = field(default_factory=dict)
    factory: Callable[..., Any]


@dataclass(frozen=True)
class Declaration:
    """Declare what a method needs and promises; the engine, tests, benchmarks and tables read nothing else.

    The author of a method writes it down; the registry adds summary and options to make a :class:`MethodInfo`.

    Args:
        name: the name for :func:`detente.create`.
        source: paper and equation.
        needs: what the method must be given, out of ``losses``, ``gramian``, ``jacobian``, ``blocks``,
            ``activations``, ``after_step``, ``batches:k``, ``epoch``. Empty for fixed weights.
        spaces: where its problem can be solved: ``exact``, ``features``, ``layer``.
        stateful: True if a call changes what the next call returns.
        native_scale: length of its direction: ``sum``, ``mean``, ``simplex``, ``unit`` or ``own``.
        homogeneity: degree k: scaling all gradients by s scales the direction by s to the k; None if none holds.
        nonconflict: True if the direction has a non-negative inner product with every task gradient.
        stationary: the direction vanishes exactly when zero lies in the convex ``hull``, the ``affine`` hull,
            or is a strictly positive combination (``cone``) of the gradients; None if none holds.
        simplex: True if the weights are non-negative and sum to one.
        permutation: ``exact`` if permuting the tasks permutes the weights, ``distribution`` if in distribution.
        heads: what own parameters take unless the caller says otherwise: ``own``, the plain gradient of their loss,
            or ``weighted`` by the task's weight, as every weighting of the losses does by its formula. None becomes
            ``weighted`` for a method that takes no gradients and ``own`` for the others.
        gives: ``weights`` of the tasks; weights that differ between ``blocks`` of parameters; or only a ``direction``.
        search: option name to the values a default search tries.

    The laws are declared for the default options.

    Raises:
        ValueError: a need or a space that nothing could meet, most likely a slip of the pen.

    Example:
        >>> Declaration(name="mine", source="this file", needs=frozenset({"gramian"})).heads
        'own'
    """

    name: str
    source: str
    needs: frozenset[str] = frozenset()
    spaces: frozenset[str] = EVERYWHERE
    stateful: bool = False
    native_scale: Literal["sum", "mean", "simplex", "unit", "own"] = "own"
    homogeneity: float | None = None
    nonconflict: bool = False
    stationary: Literal["hull", "affine", "cone"] | None = None
    simplex: bool = False
    permutation: Literal["exact", "distribution"] | None = None
    heads: Literal["own", "weighted"] | None = None
    gives: Literal["weights", "blocks", "direction"] = "weights"
    search: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for need in self.needs:
            kind, _, batches = need.partition(":")
            if need not in NEEDS and not (kind == "batches" and batches.isdigit() and int(batches) >= 2):
                raise ValueError(
                    f"{self.name} declares the unknown need {need!r}; needs are {', '.join(sorted(NEEDS))} and "
                    "batches:k with k >= 2."
                )
        if not self.spaces or self.spaces - EVERYWHERE:
            unknown = ", ".join(map(repr, sorted(self.spaces - EVERYWHERE)))
            raise ValueError(
                f"{self.name} declares {f'the unknown space {unknown}' if unknown else 'no space'}; name at least one "
                f"of {', '.join(sorted(EVERYWHERE))}."
            )
        if self.heads is None:
            object.__setattr__(self, "heads", "own" if self.takes_gradients else "weighted")

    @property
    def takes_gradients(self) -> bool:
        """Tell whether the method must see task gradients; a weighting of the losses does not."""
        return bool(self.needs & GRADIENT_NEEDS)

    @property
    def batches(self) -> int:
        """Return how many independent batches it compares in a step, k of ``batches:k``; 1 without that need."""
        return max(
            (int(need.partition(":")[2]) for need in self.needs if need.startswith("batches:")), default=1
        )


@dataclass(frozen=True, kw_only=True)
class MethodInfo(Row, Declaration):
    """Hold what a method declares of itself, as :class:`Declaration` and :class:`Row` list it.

    Example:
        >>> import detente
        >>> detente.methods()["mgda"].stationary
        'hull'
    """
