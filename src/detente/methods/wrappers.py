"""Methods around methods: weights every k steps, smoothed weights, one problem per block, normalised gradients.

The guards, which refuse a step, have files of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from detente.methods.adaptive import Adaptive
from detente.methods.base import Method, one_of
from detente.methods.checks import count, number, positive_losses
from detente.methods.guard import EarlyTerminationWarning, Guard, Inexact
from detente.methods.wrapping import Wrapper, WrapperInfo, register_wrapper, registered, wrap
from detente.values import Combination, TaskGradients

__all__ = [
    "Adaptive",
    "EarlyTerminationWarning",
    "Every",
    "Guard",
    "Inexact",
    "Normalize",
    "PerBlock",
    "Smooth",
    "Wrapper",
    "WrapperInfo",
    "register_wrapper",
    "registered",
    "wrap",
]


@register_wrapper
class Every(Wrapper):
    """Every k steps: let the wrapped method choose weights in every k-th step, and reuse them in between.

    In between no task gradients are taken: a step costs one backward of the weighted losses (and one more through the
    heads, where they take plain gradients). Nash-MTL's experiments do this (Navon et al. 2022, section 5). Only the
    weights of an accepted step that is not stationary are reused; after any other the wrapped method is asked again.

    The wrapped method sees nothing of the steps in between, except the ends of epochs. A task that was absent when the
    weights were chosen keeps its weight from before; if it has none, it takes the mean weight of the tasks present.
    Weights that add up to one by the method's declaration are rescaled to do so for the tasks present. Weights that
    differ between blocks are reused too, but need the task gradients in every step.

    When to use it: many tasks, where the task gradients or the method are what a step costs.

    Args:
        method: any method that gives weights.
        k: whole number >= 1; 1 changes nothing.

    Raises:
        ValueError: ``k`` is out of range, the method gives only a direction, or the number of blocks changed.

    Example:
        >>> import detente
        >>> method = detente.wrappers.Every(detente.create("mgda"), k=2)
        >>> detente.combine(method, torch.tensor([[1.0, 0.0], [0.0, 2.0]])).weights
        tensor([0.8000, 0.2000], dtype=torch.float64)
        >>> detente.combine(method, torch.eye(2)).weights
        tensor([0.8000, 0.2000], dtype=torch.float64)
        >>> detente.combine(method, torch.eye(2)).weights
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    name = "every"
    source = "Navon et al. 2022, section 5"
    accepts = frozenset({"weights", "blocks"})
    search = {"k": (1, 5, 25)}  # noqa: RUF012

    kept: torch.Tensor
    known: torch.Tensor
    age: torch.Tensor
    asked: torch.Tensor

    def __init__(self, method: Method, *, k: int = 5) -> None:
        super().__init__(method)
        checked = count("k", k, least=1)
        if checked is None:
            raise ValueError("option k is None; give a whole number >= 1.")
        self.k = checked
        self.register_buffer("age", torch.zeros((), dtype=torch.int64))
        self.register_buffer("asked", torch.zeros((), dtype=torch.bool))
        self.derive(stateful=True, nonconflict=False, stationary=None)

    def allocate(self, tasks: int) -> None:
        """Weights sized by the first step, and which tasks have one."""
        self.register_buffer("kept", torch.zeros(tasks, 0, dtype=torch.float64))
        self.register_buffer("known", torch.zeros(tasks, dtype=torch.bool))

    def needs_now(self) -> frozenset[str]:
        """Nothing in between, where one weight for each task is known."""
        if int(self.age) > 0 and self.method.declares.gives == "weights":
            return frozenset()
        return super().needs_now()

    def after_step(self, losses: Mapping[str, Any] | Sequence[Any]) -> None:
        """Hand the losses on, if the wrapped method chose the weights of the step."""
        if self.asked:
            self.method.after_step(losses)

    def solve(self, gradients: TaskGradients) -> Combination:
        """The wrapped method's weights, now or then."""
        at = torch.from_numpy(self.positions(gradients.names))
        age = int(self.age)
        if age > 0:
            weights, known = self.kept[at].numpy(), self.known[at].numpy()
            some = weights[known] if known.any() else self.kept[self.known].numpy()
            weights = np.where(known[:, None], weights, some.mean(axis=0))
            self.age = self.age.new_tensor((age + 1) % self.k)
            self.asked = self.asked.new_tensor(False)
            return _weighted(self, weights, (f"weights of {age} step{'s' if age > 1 else ''} ago",))
        result = self.method.combine(gradients)
        if result.status == "ok" and self.k > 1:
            weights = self.weights_of(result, gradients)
            kept = _fitting(self, self.kept, weights)
            self.kept = kept.index_copy(0, at, torch.from_numpy(weights))
            self.known = self.known.index_fill(0, at, True)
            self.age = self.age.new_tensor(1)
        self.asked = self.asked.new_tensor(True)
        return result


@register_wrapper
class Smooth(Wrapper):
    """Smooth: let the weights follow those of the wrapped method slowly.

    w ← β w + (1 - β) ŵ with the wrapped method's weights ŵ, starting from the first ŵ: the correction CR-MOGM (Zhou et
    al. 2022, Algorithm 1), which takes away the bias that noisy weights and noisy gradients of the same batch have
    together. The paper lets β grow as the learning rate falls; here it stays.

    A task starts from its own first weight. Only the weights of an accepted step that is not stationary enter; any
    other step is handed on as it is. Weights that add up to one by the method's declaration do so for the tasks
    present. There is no transform: smoothed weights do not say how each gradient was altered.

    When to use it: weights that jump from batch to batch. Cost: none of note.

    Args:
        method: any method that gives weights.
        beta: in [0, 1), how much of the old weights stays; 0 changes nothing.

    Raises:
        ValueError: ``beta`` is out of range, the method gives only a direction, or the number of blocks changed.

    Example:
        >>> import detente
        >>> method = detente.wrappers.Smooth(detente.create("mgda"), beta=0.5)
        >>> _ = detente.combine(method, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))  # weights 0.8, 0.2
        >>> detente.combine(method, torch.eye(2)).weights
        tensor([0.6500, 0.3500], dtype=torch.float64)
    """

    name = "smooth"
    source = "CR-MOGM, Zhou et al. 2022, Algorithm 1"
    accepts = frozenset({"weights", "blocks"})
    search = {"beta": (0.0, 0.5, 0.9, 0.99)}  # noqa: RUF012

    kept: torch.Tensor
    known: torch.Tensor

    def __init__(self, method: Method, *, beta: float = 0.9) -> None:
        super().__init__(method)
        self.beta = number("beta", beta, least=0)
        if not beta < 1:
            raise ValueError(f"option beta is {beta}; give a number in [0, 1).")
        self.derive(stateful=True, nonconflict=False, stationary=None)

    def allocate(self, tasks: int) -> None:
        """Weights sized by the first step, and which tasks have one."""
        self.register_buffer("kept", torch.zeros(tasks, 0, dtype=torch.float64))
        self.register_buffer("known", torch.zeros(tasks, dtype=torch.bool))

    def solve(self, gradients: TaskGradients) -> Combination:
        """The smoothed weights."""
        result = self.method.combine(gradients)
        if result.status != "ok":
            return result
        at = torch.from_numpy(self.positions(gradients.names))
        new = self.weights_of(result, gradients)
        kept = _fitting(self, self.kept, new)
        known = self.known[at].numpy()[:, None]
        weights = np.where(known, self.beta * kept[at].numpy() + (1 - self.beta) * new, new)
        self.kept = kept.index_copy(0, at, torch.from_numpy(weights))
        self.known = self.known.index_fill(0, at, True)
        smoothed = _weighted(self, weights, result.notes)
        return replace(smoothed, kept_rank=result.kept_rank, dropped=result.dropped)


@register_wrapper
class PerBlock(Wrapper):
    """Per block: let the wrapped method solve one problem for each layer or tensor instead of one for the model.

    Tasks that agree in one layer and conflict in another are then weighed differently in each. The blocks' directions
    are put together to one. A layer is a tensor of two or more dimensions with the smaller ones after it (biases,
    scales of a normalisation).

    A method without memory solves the blocks together, as one batch where its mathematics allows. One with memory is
    copied for each block: every copy has its own state, saved under ``blocks.``. A block that the method refuses does
    not move, and the step is refused only if every block is; the record counts them. Heads take the plain gradient
    of their loss. On ``detente.combine`` a matrix is
    one block.

    When to use it: layers that differ in how much the tasks conflict, with a method that is cheap to solve. Cost: one
    Gramian and one problem for each block; the task gradients as always.

    Args:
        method: any method that runs on the gradients of the parameters and does not look at blocks itself.
        by: ``layer`` or ``tensor``.

    Raises:
        ValueError: ``by`` is neither, the method looks at blocks itself, or the number of blocks changed.

    Example:
        >>> import detente
        >>> method = detente.wrappers.PerBlock(detente.create("mgda"), by="tensor")
        >>> a, b = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> _ = detente.backward([2 * a + b, a + 4 * b], method)
        >>> a.grad.item(), b.grad.item()  # the shorter gradient in each
        (1.0, 1.0)
    """

    name = "per-block"
    source = "layer-wise groups as in Wang et al. 2021, section 3"
    accepts = frozenset({"weights", "direction"})
    search = {"by": ("layer", "tensor")}  # noqa: RUF012

    def __init__(self, method: Method, *, by: Literal["layer", "tensor"] = "layer") -> None:
        super().__init__(method)
        self.by = one_of("by", by, ("layer", "tensor"))
        self.blocks = nn.ModuleList()
        given = self.inner_info()
        self.derive(
            needs=(given.needs - {"activations"}) | {"gramian", "blocks"},
            spaces=frozenset({"exact"}),
            gives="blocks" if given.gives == "weights" else "direction",
            heads="own",
            native_scale="own" if given.native_scale == "unit" else given.native_scale,
            stationary=None,
            simplex=False,
        )

    def needs_now(self) -> frozenset[str]:
        """Always the Gramian of each block."""
        return self.declares.needs

    def end_epoch(self) -> None:
        """Tell the wrapped method, or every copy of it."""
        for method in self._copies() or [self.method]:
            method.end_epoch()

    def after_step(self, losses: Mapping[str, Any] | Sequence[Any]) -> None:
        """Hand the losses to the wrapped method, or to every copy of it."""
        for method in self._copies() or [self.method]:
            method.after_step(losses)

    def solve(self, gradients: TaskGradients) -> Combination:
        """One problem for each block, put together."""
        layers = gradients.block_layers if self.by == "layer" else tuple(range(len(gradients.block_sizes)))
        starts = [i for i, layer in enumerate(layers) if i == 0 or layer != layers[i - 1]]
        blocks = _split(gradients, starts, "jacobian" in self.method.declares.needs)
        results = self._results(blocks)
        refused = [result for result in results if result.status == "refused"]
        notes = tuple(dict.fromkeys(note for result in results for note in result.notes))
        if refused:
            notes = (*notes, f"refused in {len(refused)} of {len(results)} blocks")
        whole = Combination(
            status="refused" if len(refused) == len(results) else _status(results),
            dropped=tuple(dict.fromkeys(name for result in results for name in result.dropped)),
            notes=notes,
        )
        everyone_refused = whole.status == "refused"
        still = [
            r.status == "stationary" or (r.status == "refused" and not everyone_refused) for r in results
        ]
        if self.declares.gives == "direction":
            assert gradients.jacobian is not None
            pieces = [
                result.direction
                if result.direction is not None and not idle
                else gradients.jacobian.new_zeros(width)
                for result, idle, width in zip(
                    results, still, _sums(gradients.block_sizes, starts), strict=True
                )
            ]
            return replace(whole, direction=torch.cat(pieces))
        weights = np.stack([self.weights_of(result, gradients)[:, 0] for result in results])
        weights[still] = 0.0
        repeats = np.diff([*starts, len(layers)])
        return replace(whole, block_weights=torch.from_numpy(np.repeat(weights, repeats, axis=0)))

    def _results(self, blocks: list[TaskGradients]) -> list[Combination]:
        if not any(True for _ in self.method.buffers()):
            return self.method.combine_blocks(blocks)
        copies = self._copies() or [copy.deepcopy(self.method) for _ in blocks]
        if len(copies) != len(blocks):
            raise ValueError(
                f"{self.declares.name} has one {self.method.declares.name} for each of {len(copies)} blocks and was "
                f"given {len(blocks)}. Name the shared parameters with shared=, so that they stay the same, or "
                "create a new method."
            )
        results = [method.combine(block) for method, block in zip(copies, blocks, strict=True)]
        if len(self.blocks) == 0:
            self.blocks.extend(copies)
        return results

    def _copies(self) -> list[Method]:
        return [method for method in self.blocks if isinstance(method, Method)]

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        start = f"{prefix}blocks."
        numbers = {key[len(start) :].partition(".")[0] for key in state_dict if key.startswith(start)}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # Fresh copies of the wrapped method; what each remembers is loaded after this.
        self.blocks = nn.ModuleList(copy.deepcopy(self.method) for _ in numbers)


@register_wrapper
class Normalize(Wrapper):
    """Normalize: bring the tasks' gradients to comparable size before the wrapped method sees them.

    The gradient of task i is divided by n_i: its length (``l2``), its loss (``loss``, the gradient of log L), or both
    (``loss+``), and the n_i by their mean, so that the gradients keep their common scale. The wrapped method combines
    the normalised gradients, and so does the direction: g_i counts w_i / n_i. With ``apply="raw"`` the weights found
    for the normalised gradients are applied to the gradients as they are, as ``mgda(normalize=…)`` does; public codes
    do the one or the other.

    A gradient that vanishes stays as it is. Lengths are those in the space where the problem is solved.

    When to use it: losses of different units, around a method that follows the longest gradient.

    Args:
        method: any method; one that gives weights for ``apply="raw"``.
        by: ``l2``, ``loss`` or ``loss+``.
        apply: ``normalized``: combine the normalised gradients; ``raw``: apply the weights to the given ones.

    Raises:
        ValueError: an option is out of range; a loss that divides is not positive (the task is named).

    Example:
        >>> import detente
        >>> method = detente.wrappers.Normalize(detente.create("uniform"))
        >>> detente.combine(method, torch.tensor([[1.0, 0.0], [0.0, 3.0]])).direction
        tensor([2., 2.])
    """

    name = "normalize"
    source = "Sener & Koltun 2018, section 4 (normalisation in the published code)"
    search = {"by": ("l2", "loss", "loss+")}  # noqa: RUF012

    def __init__(
        self,
        method: Method,
        *,
        by: Literal["l2", "loss", "loss+"] = "l2",
        apply: Literal["normalized", "raw"] = "normalized",
    ) -> None:
        super().__init__(method)
        self.by = one_of("by", by, ("l2", "loss", "loss+"))
        self.onto = one_of("apply", apply, ("normalized", "raw"))
        given = self.inner_info()
        if apply == "raw" and given.gives == "direction":
            raise ValueError(
                f"normalize(apply='raw') applies weights, and {given.name} gives only a direction; use 'normalized'."
            )
        self.looks_at = frozenset({"l2": {"gramian"}, "loss": {"losses"}, "loss+": {"gramian", "losses"}}[by])
        self.derive(
            needs=given.needs | self.looks_at,
            native_scale="own",
            simplex=given.simplex and apply == "raw",
            nonconflict=given.nonconflict and apply == "normalized",
            stationary=None if given.stationary == "affine" else given.stationary,
        )

    def needs_now(self) -> frozenset[str]:
        """What the sizes take, and what the wrapped method needs now."""
        return self.looks_at | self.method.needs_now()

    def solve(self, gradients: TaskGradients) -> Combination:
        """What the wrapped method makes of the normalised gradients."""
        size = self._size(gradients)
        result = self.method.combine(self._scaled(gradients, size))
        if self.onto == "raw":
            return replace(result, transform=None)
        divisor = torch.from_numpy(size)
        return replace(
            result,
            weights=None if result.weights is None else result.weights / divisor,
            block_weights=None if result.block_weights is None else result.block_weights / divisor,
            transform=None if result.transform is None else result.transform / divisor,
        )

    def _size(self, gradients: TaskGradients) -> np.ndarray:
        """[T] positive numbers of mean one that divide the gradients."""
        size = np.ones(gradients.tasks)
        if self.by != "loss":
            assert gradients.gramian is not None
            norms = np.sqrt(np.diagonal(gradients.gramian))
            size = norms / (norms.max() or 1.0)
        if self.by != "l2":
            losses = positive_losses(self, gradients, "divides by the losses")
            size = size * (losses / losses.max())
        alive = size > 0
        return np.where(alive, size / (size[alive].mean() if alive.any() else 1.0), 1.0)

    def _scaled(self, gradients: TaskGradients, size: np.ndarray) -> TaskGradients:
        products = size[:, None] * size
        gramian, blocks, jacobian = gradients.gramian, gradients.block_gramians, gradients.jacobian
        looked_at = jacobian is not None and "jacobian" in self.method.declares.needs
        return replace(
            gradients,
            gramian=None if gramian is None else gramian / products,
            block_gramians=None if blocks is None else blocks / products,
            jacobian=jacobian / torch.from_numpy(size).to(jacobian)[:, None]
            if jacobian is not None and looked_at
            else None,
            extra=tuple(self._scaled(further, self._size(further)) for further in gradients.extra),
        )


# ---- private


def _weighted(wrapper: Wrapper, weights: np.ndarray, notes: tuple[str, ...]) -> Combination:
    """Weights [T, W] as the wrapped method would give them: of the tasks, or [B, T] of the blocks."""
    if wrapper.declares.simplex:
        total = weights.sum(axis=0)
        weights = np.where(total > 0, weights / np.where(total > 0, total, 1.0), 1 / len(weights))
    if wrapper.declares.gives == "blocks":
        return Combination(block_weights=torch.from_numpy(weights.T.copy()), notes=notes)
    return Combination(weights=torch.from_numpy(weights[:, 0].copy()), notes=notes)


def _fitting(wrapper: Wrapper, kept: torch.Tensor, weights: np.ndarray) -> torch.Tensor:
    """[tasks, W] remembered weights, zeros where there are none yet."""
    if kept.shape[1] == 0:
        return torch.zeros(len(kept), weights.shape[1], dtype=torch.float64)
    if kept.shape[1] != weights.shape[1]:
        raise ValueError(
            f"{wrapper.declares.name} remembers weights of {kept.shape[1]} blocks and was given {weights.shape[1]}. "
            "Name the shared parameters with shared=, so that they stay the same, or create a new method."
        )
    return kept


def _status(results: list[Combination]) -> Literal["ok", "stationary"]:
    return "ok" if any(result.status == "ok" for result in results) else "stationary"


def _sums(sizes: Sequence[int], starts: list[int]) -> list[int]:
    return [int(total) for total in np.add.reduceat(np.array(sizes), starts)]


def _split(gradients: TaskGradients, starts: list[int], with_jacobian: bool) -> list[TaskGradients]:
    """What a method sees of each group of blocks that begins at one of ``starts``."""
    assert gradients.block_gramians is not None
    gramians = np.add.reduceat(gradients.block_gramians, starts, axis=0)
    further = [_split(other, starts, with_jacobian) for other in gradients.extra]
    widths = _sums(gradients.block_sizes, starts)
    jacobian = gradients.jacobian if with_jacobian else None
    pieces = [None] * len(starts) if jacobian is None else torch.split(jacobian, widths, dim=1)
    return [
        TaskGradients(
            names=gradients.names,
            losses=gradients.losses,
            gramian=gramian,
            jacobian=piece,
            extra=tuple(other[position] for other in further),
            space=gradients.space,
        )
        for position, (gramian, piece) in enumerate(zip(gramians, pieces, strict=True))
    ]
