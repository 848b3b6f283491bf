"""Backtracking in the parameters: every trial runs the whole network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, final

import torch

from detente.autograd.measure import Taken
from detente.autograd.partition import as_tensors
from detente.linesearch.armijo import Array
from detente.linesearch.batch import Batch
from detente.linesearch.closure import Losses, Runs
from detente.linesearch.moments import Moments, State
from detente.linesearch.moves import Moves, merged, own_products, real
from detente.linesearch.plan import Along, Plan, falls
from detente.linesearch.search import Search, Taking
from detente.step import shared_gradients
from detente.values import Combination


@final
class Backtracking(Search):
    """Backtracking for several tasks: the longest step lr_ub / γᵏ that lets every loss fall as promised.

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

    Rounding: a decrease of less than 4 machine epsilons of the loss's dtype times its size cannot be told from none and
    is not asked for. Compute losses in float32, also of a network in bfloat16 or float16: in bfloat16 those 4 epsilons
    are three per cent of the loss. What half precision before the loss costs, ``rounding`` higher allows for. A slope
    that is zero up to rounding in float64 does not count as falling.

    What happens where a step cannot be found:

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
            reaches what is then found. May be empty.
        lr_ub: the first length that is tried, > 0. ``search.lr_ub`` is the caller's, to be set by a schedule.
        gamma: divisor of the length after a rejection, > 1.
        c: share of the promised decrease that is asked for, in (0, 1).
        max_trials: trials of one search, >= 1.
        options: everything else, see :class:`SearchOptions`; all but ``check_true``.

    Raises:
        ValueError: an option is out of range, the method cannot be solved on parameters, a parameter has two roles.
        TypeError: ``method`` is no method, or a role is given something that is neither a parameter nor a module.

    Example:
        On ½‖θ - a‖² for two a the direction of MGDA is θ minus their middle, and a length of 1 leads there.

        >>> import detente
        >>> theta, targets = torch.nn.Parameter(torch.tensor([2.0, 2.0])), torch.eye(2)
        >>> def closure(features=None):
        ...     return None, {name: (theta - a).square().sum() / 2 for name, a in zip("ab", targets)}
        >>> search = Backtracking(detente.create("mgda"), [theta], [], lr_ub=4.0)
        >>> found = search.step(closure)
        >>> found.status, found.eta, found.trials, theta.detach()
        ('accepted', 1.0, 3, tensor([0.5000, 0.5000]))
    """

    space: ClassVar[Literal["exact", "features"]] = "exact"

    lacks: ClassVar[Mapping[str, str]] = {
        "check_true": "It tries every length on the network itself; FastBacktracking alone needs such a check."
    }

    def _set_up(self) -> None:
        kind = self.options.precondition
        everyone = (*as_tensors(self.shared, "shared"), *as_tensors(self.task_specific, "task_specific"))
        self._moments = None if kind is None else Moments(kind, everyone)

    def state_dict(self) -> dict[str, Any]:
        """What a new search needs to go on bit for bit, beside the network's own state and the random state.

        That is the first length, the counters, the moments, and the state of the method.
        """
        return super().state_dict() | {
            "moments": None if self._moments is None else self._moments.state_dict()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; options are those of this search.

        Raises:
            ValueError: the state is not that of such a search, or its moments are of another preconditioner or of
                other parameters; nothing is changed.
        """
        self._check_state(state)
        saved = state["moments"]
        if saved is not None and not isinstance(saved, Mapping):
            raise ValueError(
                f"the saved moments are a {type(saved).__name__}, not what state_dict() returned."
            )
        if self._moments is None and saved is not None:
            raise ValueError(f"the saved search has precondition={saved.get('kind')!r}, this one has none.")
        moments = None if self._moments is None else self._moments.read(saved)
        super().load_state_dict(state)
        if self._moments is not None and moments is not None:
            self._moments.load(moments)

    def _first(self, runs: Runs) -> tuple[Any, Losses]:
        return runs.first()

    def _plan(
        self, taken: Taken, combination: Combination, along: Along | None, features: Any, epsilon: Array
    ) -> Plan:
        gradients, direction = taken.gradients, combination.direction
        assert gradients.losses is not None and gradients.jacobian is not None and direction is not None
        shared = [] if combination.status == "stationary" else shared_gradients(taken, combination)
        everyones = taken.graph.own_gradients()
        own = list(merged(everyones).items())
        moments: dict[int, State] = {}
        if self._moments is not None:
            moved, moments = self._moments.propose([*shared, *own])
            shared, own = moved[: len(shared)], moved[len(shared) :]
            if shared:
                along, direction = None, _row(taken, dict(shared))
        moves = Moves([*shared, *own])
        return Plan(
            taken,
            combination,
            gradients.losses,
            epsilon,
            moves,
            along or Along.by_products(gradients.jacobian, direction),
            own_products(taken.graph.own, moves),
            own_falls=self._moments is None and falls(taken, everyones, own),
            in_parts=taken.graph.partial,
            moments=moments,
        )

    def _losses_at(self, runs: Runs, plan: Plan, eta: float) -> Losses:
        return runs.again()[1]

    def _carry(self, runs: Runs, plan: Plan, eta: float, undo: list[Moves]) -> None:
        pass

    def _settle(self, runs: Runs, batch: Batch, plan: Plan, taking: Taking) -> tuple[Array, bool] | None:
        if self._moments is not None:
            self._moments.commit(plan.moments)
        return None


def _row(taken: Taken, pieces: Mapping[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """[P] one direction out of the pieces of the parameters, in the order of the Jacobian's columns."""
    return torch.cat(
        [
            real(pieces[column] if column in pieces else torch.zeros_like(column))
            for column in taken.graph.columns
        ]
    )
