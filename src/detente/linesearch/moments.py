"""Divide directions by running moments, entry by entry: Adam, RMSProp, Adagrad without their learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

Kind = Literal["adam", "rmsprop", "adagrad"]
State = dict[str, torch.Tensor]

KINDS: dict[str, tuple[str, ...]] = {
    "adam": ("mean", "square"),
    "rmsprop": ("square",),
    "adagrad": ("square",),
}
"""The moments that each keeps, beside the number of steps."""

BETAS = (0.9, 0.999)
ALPHA = 0.99
EPSILON = {"adam": 1e-8, "rmsprop": 1e-8, "adagrad": 1e-10}


def precondition(kind: Kind, gradient: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
    """Divide one direction; return it and the moments after it. The arguments are left as they were.

    These are the steps of ``torch.optim.Adam``, ``RMSprop`` and ``Adagrad`` with their default constants and a learning
    rate of 1: mean / (√square + ε) with both means corrected for their start (betas 0.9 and 0.999), gradient / (√square
    + ε) with a running mean of squares (0.99), and the same with a sum of squares.

    Args:
        kind: which of them.
        gradient: real, of any shape.
        state: ``steps`` and the moments of ``gradient``'s shape; empty at first.

    Example:
        >>> direction, state = precondition("adagrad", torch.tensor([4.0, -0.5]), {})
        >>> direction
        tensor([ 1., -1.])
    """
    if not state:
        state = {"steps": torch.zeros((), dtype=torch.float64)}
        state |= {name: torch.zeros_like(gradient) for name in KINDS[kind]}
    steps = state["steps"] + 1
    count = float(steps)
    if kind == "adagrad":
        square = state["square"] + gradient * gradient
        return gradient / (square.sqrt() + EPSILON[kind]), {"steps": steps, "square": square}
    if kind == "rmsprop":
        square = ALPHA * state["square"] + (1 - ALPHA) * gradient * gradient
        return gradient / (square.sqrt() + EPSILON[kind]), {"steps": steps, "square": square}
    mean = BETAS[0] * state["mean"] + (1 - BETAS[0]) * gradient
    square = BETAS[1] * state["square"] + (1 - BETAS[1]) * gradient * gradient
    length = (square / (1 - BETAS[1] ** count)).sqrt() + EPSILON[kind]
    return mean / (1 - BETAS[0] ** count) / length, {"steps": steps, "mean": mean, "square": square}


class Preconditioner:
    """Divide directions by running moments of the parameters, kept by position so that they can be saved.

    Args:
        kind: which preconditioner.
        parameters: all that may ever be moved, in a fixed order.
    """

    def __init__(self, kind: Kind, parameters: Sequence[torch.Tensor]) -> None:
        self.kind = kind
        self._parameters = list(parameters)
        self._position = {parameter: position for position, parameter in enumerate(parameters)}
        self._states: dict[int, State] = {}

    def propose(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], dict[int, State]]:
        """Divide the directions of parameters; return them and the moments to :meth:`commit` if the step is taken."""
        moved, proposed = [], {}
        for parameter, direction in pairs:
            place = self._position[parameter]
            if direction.layout is not torch.strided:
                direction = direction.to_dense()
            plain = torch.view_as_real(direction.resolve_conj()) if direction.is_complex() else direction
            divided, proposed[place] = precondition(self.kind, plain, self._states.get(place, {}))
            moved.append((parameter, torch.view_as_complex(divided) if direction.is_complex() else divided))
        return moved, proposed

    def commit(self, proposed: Mapping[int, State]) -> None:
        """Take what :meth:`propose` gave."""
        self._states.update(proposed)

    def state_dict(self) -> dict[str, Any]:
        """Save the kind, and position to moments."""
        return {
            "kind": self.kind,
            "states": {place: dict(state) for place, state in self._states.items()},
        }

    def read(self, saved: Mapping[str, Any]) -> dict[int, State]:
        """Read saved moments on the devices and in the dtypes of the parameters; nothing is changed yet.

        Raises:
            ValueError: they are of other parameters, or nothing that was saved.
        """
        try:
            return self._read(saved["states"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the saved moments are not what state_dict() returned ({error!r}).") from error

    def _read(self, saved: Mapping[int, State]) -> dict[int, State]:
        states: dict[int, State] = {}
        for place, state in saved.items():
            if not 0 <= int(place) < len(self._parameters):
                raise ValueError(f"the saved search has moments of parameter {place}, which this one lacks.")
            parameter = self._parameters[int(place)]
            shape = (*parameter.shape, 2) if parameter.is_complex() else tuple(parameter.shape)
            loaded = {"steps": state["steps"].detach().to("cpu", copy=True)}
            for name in KINDS[self.kind]:
                if tuple(state[name].shape) != shape:
                    raise ValueError(
                        f"the saved moments of parameter {place} have shape {tuple(state[name].shape)}, the parameter "
                        f"has {tuple(parameter.shape)}."
                    )
                loaded[name] = state[name].detach().to(parameter.device, parameter.dtype.to_real(), copy=True)
            states[int(place)] = loaded
        return states

    def load(self, states: dict[int, State]) -> None:
        """Take what :meth:`read` gave."""
        self._states = states


def read_moments(preconditioner: Preconditioner | None, saved: Any) -> dict[int, State]:
    """Read saved moments for a preconditioner, or none for none; nothing is changed yet.

    Raises:
        ValueError: they are of another preconditioner, of other parameters, or nothing that was saved.
    """
    if saved is not None and not isinstance(saved, Mapping):
        raise ValueError(f"the saved moments are a {type(saved).__name__}, not what state_dict() returned.")
    theirs = None if saved is None else saved.get("kind")
    mine = None if preconditioner is None else preconditioner.kind
    if theirs != mine or (saved is not None and mine is None):
        here = "this one has none" if mine is None else f"this one precondition={mine!r}"
        raise ValueError(f"the saved search has precondition={theirs!r}, {here}.")
    return {} if preconditioner is None or saved is None else preconditioner.read(saved)
