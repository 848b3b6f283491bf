"""Declare the searches of this package, and make one by name."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar, Literal, final

from detente.linesearch.direction import FeatureDirection, ParameterDirection
from detente.linesearch.engine import Parameters
from detente.linesearch.options import DEFAULTS, SearchOptions
from detente.linesearch.search import Search, SearchDeclaration
from detente.methods import Method
from detente.methods.options import near
from detente.values import Option


@final
class Backtracking(Search):
    """Backtrack in the parameters: take the longest step lr_ub / γᵏ by which every loss falls as promised.

    The direction d is the method's, the heads move along the plain gradients of their own losses, and a step of length
    η is taken if for every task i

        L_i(θ̃) <= L_i(θ) - c η (<g_i, d> + ‖∇_θi L_i‖²) + rounding,

    with θ̃_sh = θ_sh - η d and θ̃_i = θ_i - η ∇_θi L_i (Filatov 2021, algorithm 3.1; the condition after Fliege & Svaiter
    2000, with the second term because the heads move too). The text of the paper that we know prints neither the
    condition nor γ, c, lr_ub and the number of trials: those are ours. The search moves the parameters by itself; no
    optimizer, no momentum, no weight decay.

    Every forward pass of one step starts from the same random state (torch's own, on the CPU and on CUDA devices) and
    the same buffers, so that all see the same dropout masks; afterwards random state and batch-norm statistics are as
    one forward pass leaves them, however many trials there were. Random numbers from elsewhere (numpy, a
    ``torch.Generator`` of yours) cannot be rewound: such a closure is recognised and refused. A closure that
    differentiates inside does so under ``torch.enable_grad()``, for only the first pass has a graph.

    Rounding: a decrease of less than 4 machine epsilons of the loss's dtype times its size is no more than rounding and
    is not required. Compute losses in float32, also of a network in bfloat16 or float16: in bfloat16 those 4 epsilons
    are three per cent of the loss. Inside ``torch.autocast`` the closure alone runs in half precision; what that costs
    the losses, ``rounding`` higher allows for. A slope that is zero up to rounding in float64 does not count as
    falling.

    What follows where a step is not plainly accepted:

    - Some slope <g_i, d> + ‖∇_θi L_i‖² is not positive: no small step satisfies the condition, and no trial is run.
      ``on_no_descent`` says what then. It is the whole slope that counts: where <g_i, d> < 0 and the head's own move
      outweighs it, the loss falls and the search goes on. A task whose gradient is exactly zero is not held against the
      direction; its loss may not rise.
    - ``max_trials`` trials were rejected: the parameters go back, bit for bit, and the closure is run once more there;
      other losses than at first mean that its batch changes, and raise. Otherwise the step is skipped (``capped``) or
      raises, as ``on_cap`` says; a loss that is not finite at the last trial raises in any case. A length so short
      that nothing moves is no step and ends the search (``stationary`` if it was the first).
    - The method refuses the step: nothing moves. Its direction is exactly zero: the heads alone are searched.

    When to use it: the length of the step matters and the learning rate is unknown; the batch is large enough for its
    losses to mean something. Cost of a step: one forward pass, the method's task gradients, and one forward pass per
    trial; a copy of the parameters. Numbers go to the host once per forward pass, and once more where a slope along the
    shared direction is not positive, or the weights do not give it.

    Args:
        method: any method that runs in the space ``exact``; of its weights only the direction is used, and the heads
            take plain gradients also where they would be weighted.
        shared: the parameters, or modules, that the tasks share.
        task_specific: those of the tasks: a mapping from task to parameters or module, or all together; which loss
            reaches what is then discovered. May be empty.
        lr_ub: the first length that is tried, > 0. ``search.lr_ub`` is the caller's, to be set by a schedule.
        gamma: divisor of the length after a rejection, > 1.
        c: share of the promised decrease that is required, in (0, 1).
        max_trials: trials of one search, >= 1.
        options: everything else, see :class:`SearchOptions`; all but ``check_true``.

    Raises:
        ValueError: an option is out of range, the method cannot be solved on parameters, a parameter has two roles.
        TypeError: ``method`` is no method, or a role is given something that is neither a parameter nor a module.

    Example:
        On ½‖θ - a‖² for two a the direction of MGDA is θ minus their middle, and a length of 1 leads there.

        >>> import detente, torch
        >>> theta, targets = torch.nn.Parameter(torch.tensor([2.0, 2.0])), torch.eye(2)
        >>> def closure(features=None):
        ...     return None, {name: (theta - a).square().sum() / 2 for name, a in zip("ab", targets)}
        >>> search = Backtracking(detente.create("mgda"), [theta], [], lr_ub=4.0)
        >>> record = search.step(closure)
        >>> record.status, record.eta, record.trials, theta.detach()
        ('accepted', 1.0, 3, tensor([0.5000, 0.5000]))
    """

    declares: ClassVar[SearchDeclaration] = SearchDeclaration(
        name="backtracking",
        source="Filatov (2021), algorithm 3.1; Fliege and Svaiter (2000)",
        direction=ParameterDirection,
        search={"gamma": (2.0, 10.0), "c": (1e-4, 0.1), "precondition": (None, "adam")},
        lacks={
            "check_true": "It tries every length on the network itself; FastBacktracking alone needs such a check."
        },
    )


@final
class FastBacktracking(Search):
    """Backtrack in the representation Z instead of the parameters: a trial runs the heads alone.

    The search is that of :class:`Backtracking`, with the method solved on ∂L_i/∂Z of the whole batch. A trial of length
    η moves the representation and the heads,

        Z̃ = Z - η d_Z,    θ̃_i = θ_i - η ∇_θi L_i,

    and runs the heads alone; <∂L_i/∂Z, d_Z> takes the place of <g_i, d> in the condition. Once a length is accepted,
    one backward through the encoder carries it to the shared parameters, θ_sh <- θ_sh - η (∂Z/∂θ_sh)ᵀ d_Z (Filatov
    2021, algorithm 3.2).

    What is accepted is a move of Z that no step of the parameters makes: the encoder, with Jacobian J, moves Z by about
    -η J Jᵀ d_Z. So the condition may fail for the network itself. ``check_true`` runs the network once more after the
    step and records whether it holds there, with the same right-hand side; ``search.true_condition_rate`` is the share
    of failures. It only tells; the step stays taken.

    The first length is a learning rate, to be tuned like one: the encoder's own step is not bounded by the search, and
    a length far too high for it is mostly accepted all the same.

    Losses that are means over a batch of N have gradients of 1/N in Z: d_Z shortens as N grows and with it the slopes,
    while the move of the shared parameters does not. ``lr_ub`` has the meaning of a learning rate of the parameters.

    Random numbers: the heads of every trial start from the state that the whole network left behind. If the network
    drew any (dropout), the heads are run once more with a graph before the search, for losses whose masks the trials
    can repeat: those are the losses the gradients belong to, and torch's random state is afterwards as that second pass
    of the heads leaves it. If the network drew none, that pass is not needed. Buffers are as one pass leaves them.

    Everything else (rounding, frozen buffers, what happens without a descent direction or at the cap) is as in
    :class:`Backtracking`. Not offered: ``precondition``. The entries of d_Z belong to the examples of one batch, so
    that moments over several steps have no meaning, and a preconditioned step of the parameters would not be the step
    that was searched.

    When to use it: an encoder much larger than the heads, and one representation through which everything shared acts.
    Cost of a step: a forward pass, each head's backward, one backward through the encoder, and the heads once per trial
    (and once more with dropout). Numbers go to the host once per pass whose losses are read, and once for the check of
    the encoder's gradient.

    Args:
        method: any method that runs in the space ``features``.
        shared: the parameters, or modules, of the encoder.
        task_specific: those of the heads, as for :class:`Backtracking`.
        lr_ub, gamma, c, max_trials: as for :class:`Backtracking`.
        options: everything else, see :class:`SearchOptions`; all but ``precondition``. The closure is checked on the
            heads.

    Raises:
        ValueError: an option is out of range, the method cannot be solved on a representation, a parameter has two
            roles. In a step also: shared parameters are reached past the representation (a skip connection, a layer
            that several heads use), so that moving Z alone is not the step.
        TypeError: as for :class:`Backtracking`.

    Example:
        >>> import detente, torch
        >>> from detente.linesearch import SearchOptions
        >>> _ = torch.manual_seed(0)
        >>> encoder = torch.nn.Linear(4, 8)
        >>> heads = torch.nn.ModuleDict({task: torch.nn.Linear(8, 1) for task in ("a", "b")})
        >>> x = torch.randn(16, 4)
        >>> def closure(features=None):
        ...     z = encoder(x).relu() if features is None else features
        ...     return z, {name: (head(z) - x[:, :1]).square().mean() for name, head in heads.items()}
        >>> options = SearchOptions(check_true=True)
        >>> search = FastBacktracking(detente.create("mgda"), encoder, heads, lr_ub=1.0, options=options)
        >>> record = search.step(closure)
        >>> record.status, record.record.space, record.true_condition
        ('accepted', 'features', True)
    """

    declares: ClassVar[SearchDeclaration] = SearchDeclaration(
        name="fast",
        source="Filatov (2021), algorithm 3.2",
        label="fast search",
        direction=FeatureDirection,
        search={"gamma": (2.0, 10.0), "c": (1e-4, 0.1)},
        lacks={
            "precondition": (
                "The fast search moves the representation, whose entries belong to other examples in every step, so "
                "that running moments of them mean nothing. Use Backtracking."
            )
        },
    )
    counters: ClassVar[tuple[str, ...]] = (
        *Search.counters,
        "true_condition_checks",
        "true_condition_failures",
    )

    @property
    def true_condition_rate(self) -> float | None:
        """Share of the checked steps after which the condition failed for the network itself; None before any check."""
        checks = self.true_condition_checks
        return self.true_condition_failures / checks if checks else None


SearchName = Literal["backtracking", "fast"]
"""Every name of :func:`searches`."""

_SEARCHES: tuple[type[Search], ...] = (Backtracking, FastBacktracking)


@dataclass(frozen=True)
class SearchInfo:
    """Tell what a search declares, as :class:`detente.MethodInfo` does of a method.

    Attributes:
        name: the name for :func:`create`, and on the command line.
        summary: one line.
        source: paper and algorithm.
        space: where its problem is solved, ``exact`` or ``features``; a method must offer it.
        options: name to :class:`detente.values.Option`: the constants of the constructor and the fields of
            :class:`SearchOptions` that the search has. The first length, ``lr_ub``, is a learning rate and none of
            them; nor are ``modules``.
        label: how tables call it.
        lacks: options of other searches that it does not have, each with the sentence that says why.
    """

    name: str
    summary: str
    source: str
    space: Literal["exact", "features"]
    options: Mapping[str, Option]
    label: str
    lacks: Mapping[str, str]


class UnknownSearch(ValueError, LookupError):
    """No search of that name is declared."""


def searches() -> dict[str, SearchInfo]:
    """List every search: name to :class:`SearchInfo`, sorted by name.

    Example:
        >>> {name: info.space for name, info in searches().items()}
        {'backtracking': 'exact', 'fast': 'features'}
        >>> searches()["fast"].options["gamma"].default
        2.0
    """
    rows = [describe(kind) for kind in _SEARCHES]
    return {info.name: info for info in sorted(rows, key=lambda info: info.name)}


def describe(kind: type[Search]) -> SearchInfo:
    """Read what a search declares, with its summary from the docstring and its options from the signatures.

    Raises:
        TypeError: it declares a grid over something that is none of its options.
    """
    declared, hints = kind.declares, typing.get_type_hints(SearchOptions)
    defaults = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
    constants = {name: value for name, value in defaults.items() if isinstance(value, (int, float))}
    further = {name: value for name, value in DEFAULTS.plain().items() if name not in declared.lacks}
    options = {
        name: Option(value, _choices(hints.get(name)), tuple(declared.search.get(name, ())))
        for name, value in {**constants, **further}.items()
    }
    for name in declared.search:
        if name not in options:
            raise TypeError(f"{kind.__name__} declares a grid over {name!r}, which is none of its options.")
    summary = (inspect.getdoc(kind) or "").split("\n")[0]
    return SearchInfo(
        declared.name,
        summary,
        declared.source,
        declared.direction.space,
        MappingProxyType(options),
        declared.label or declared.name,
        MappingProxyType(dict(declared.lacks)),
    )


def create(
    name: str,
    method: Method,
    shared: Parameters,
    task_specific: Parameters | Mapping[str, Any],
    lr_ub: float,
    **options: Any,
) -> Search:
    """Make a search by name.

    Args:
        name: a declared name, see :func:`searches`.
        method, shared, task_specific, lr_ub: as for :class:`Backtracking`.
        **options: the constructor's constants and fields of :class:`SearchOptions`, all by name.

    Raises:
        UnknownSearch: no such search; close names are suggested.
        TypeError: no search has such an option.
        ValueError: as for :class:`Backtracking`.

    Example:
        >>> import detente, torch
        >>> theta = torch.nn.Parameter(torch.zeros(2))
        >>> create("backtracking", detente.create("mgda"), [theta], [], 0.1, c=0.3, patience=3).options.patience
        3
    """
    kinds = {kind.declares.name: kind for kind in _SEARCHES}
    if name not in kinds:
        raise UnknownSearch(
            f"unknown search {name!r}; {near(name, kinds)}Declared: {', '.join(sorted(kinds))}."
        )
    names = {field.name for field in fields(SearchOptions)}
    further = SearchOptions(**{option: value for option, value in options.items() if option in names})
    constants = {option: value for option, value in options.items() if option not in names}
    return kinds[name](method, shared, task_specific, lr_ub, **constants, options=further)


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values that a literal, perhaps an optional one, allows; none listed for any other hint."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if any(part is not type(None) and typing.get_origin(part) is not Literal for part in parts):
        return ()
    return tuple(
        value for part in parts for value in ((None,) if part is type(None) else typing.get_args(part))
    )
