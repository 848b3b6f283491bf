"""Backtracking in the representation: every trial runs the heads only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, final

import torch

from detente.autograd.measure import Taken
from detente.linesearch.armijo import Array
from detente.linesearch.batch import Batch
from detente.linesearch.closure import Losses, Runs, check_graph, flat, like
from detente.linesearch.moves import Moves, merged, own_products
from detente.linesearch.plan import Along, Plan, falls
from detente.linesearch.search import Search, Taking
from detente.step import shared_gradients
from detente.values import Combination


@final
class FastBacktracking(Search):
    """Fast backtracking: the search of :class:`Backtracking`, in the representation Z instead of the parameters.

    The method is solved on ∂L_i/∂Z of the whole batch. A trial of length η moves the representation and the heads,

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
        >>> import detente
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
        >>> found = search.step(closure)
        >>> found.status, found.record.space, found.true_condition
        ('accepted', 'features', True)
    """

    space: ClassVar[Literal["exact", "features"]] = "features"
    counters: ClassVar[tuple[str, ...]] = (
        *Search.counters,
        "true_condition_checks",
        "true_condition_failures",
    )

    lacks: ClassVar[Mapping[str, str]] = {
        "precondition": (
            "The fast search moves the representation, whose entries belong to other examples in every step, so that "
            "running moments of them mean nothing. Use Backtracking."
        )
    }

    def _set_up(self) -> None:
        self.true_condition_checks = self.true_condition_failures = 0

    @property
    def true_condition_rate(self) -> float | None:
        """Share of the checked steps after which the condition failed for the network itself; None before any check."""
        checks = self.true_condition_checks
        return self.true_condition_failures / checks if checks else None

    def _first(self, runs: Runs) -> tuple[Any, Losses]:
        features, losses = runs.first()
        flat(features)
        check_graph(features)
        return features, runs.first_of_heads(features) if runs.draws else losses

    def _check(self, taken: Taken) -> None:
        if any(getattr(taken.graph, "direct", ())):
            raise ValueError(
                "some parameters named in shared= are reached past the representation, so that a move of it is not the "
                "whole step. Return every tensor by which the heads depend on shared parameters as features, or use "
                "Backtracking."
            )

    def _plan(
        self, taken: Taken, combination: Combination, along: Along | None, features: Any, epsilon: Array
    ) -> Plan:
        gradients, direction = taken.gradients, combination.direction
        assert gradients.losses is not None and gradients.jacobian is not None and direction is not None
        everyones = taken.graph.own_gradients()
        own = merged(everyones)
        moves = Moves(own.items())
        tensors = flat(features)
        # On several processes the columns may be those of all ranks' examples: of these only one's own are moved.
        mine = getattr(taken.graph, "mine", None)
        here = direction if mine is None else direction[mine]
        pieces = torch.split(here, [tensor.numel() for tensor in tensors])
        return Plan(
            taken,
            combination,
            gradients.losses,
            epsilon,
            moves,
            along or Along.by_products(gradients.jacobian, direction),
            own_products(taken.graph.own, moves),
            own_falls=falls(taken, everyones, own),
            in_parts=taken.graph.partial,
            features=features,
            along=[
                (tensor.detach(), piece.view(tensor.shape).to(tensor.device, tensor.dtype))
                for tensor, piece in zip(tensors, pieces, strict=True)
            ],
        )

    def _losses_at(self, runs: Runs, plan: Plan, eta: float) -> Losses:
        moved = [torch.sub(tensor, piece, alpha=eta) for tensor, piece in plan.along]
        return runs.heads(like(plan.features, moved))

    def _carry(self, runs: Runs, plan: Plan, eta: float, undo: list[Moves]) -> None:
        """The encoder's share of the step."""
        if plan.combination.status != "stationary":
            runs.leave()  # its graph may hold buffers, which the trials rewound: they must be what its forward left
            encoder = Moves(shared_gradients(plan.taken, plan.combination))
            undo.append(encoder)
            encoder.to(eta)

    def _settle(self, runs: Runs, batch: Batch, plan: Plan, taking: Taking) -> tuple[Array, bool] | None:
        """A look at the network itself where asked."""
        if (
            taking.status != "accepted"
            or not self.options.check_true
            or (self.steps + 1) % int(self.options.check_true)
        ):
            return None

        def look() -> Losses:
            features, losses = runs.again()
            return runs.heads(features) if runs.draws else losses

        values, _ = batch.losses(look)
        holds = bool(self._holds(plan, values, taking.eta).all())
        self.true_condition_checks += 1
        self.true_condition_failures += not holds
        return values, holds
