"""A wrapper that solves one problem for each block of parameters."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from detente.methods.base import Method
from detente.methods.options import one_of
from detente.methods.wrappers.base import Wrapper, register_wrapper
from detente.methods.wrappers.guard import Guard
from detente.values import Combination, TaskGradients


@register_wrapper
class PerBlock(Wrapper):
    """Per block: let the wrapped method solve one problem for each layer or tensor instead of one for the model.

    Tasks that agree in one layer and conflict in another are then weighed differently in each. The blocks' directions
    are put together to one. A layer is a tensor of two or more dimensions with the smaller ones after it (biases,
    scales of a normalisation).

    A method without memory solves the blocks together, as one batch where its mathematics allows. One with memory is
    copied for each block: every copy has its own state, saved under ``blocks.``. A block that the method refuses does
    not move, and the step is refused only if every block is; the record counts them. Heads take the plain gradient
    of their loss. On ``detente.combine`` a matrix is one block. What is stored with an epoch is the mean over the
    copies, and each one's own under ``blocks``.

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
        self._named: list[str] = []  # the blocks that the guards among the copies were told
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
        """Return always the Gramian of each block."""
        return self.declares.needs

    def end_epoch(self) -> None:
        """Tell the wrapped method, or every copy of it."""
        failed = None
        for method in self._copies() or [self.method]:
            try:
                method.end_epoch()
            except Warning as error:  # the epoch of the other copies ends too
                failed = failed or error
        if failed is not None:
            raise failed

    def epoch_record(self) -> dict[str, Any]:
        """Return the wrapped method's record; of copies the mean of each number, and under ``blocks`` each one's own.

        The blocks are in the order of the shared parameters. What is no number in every copy, or None, has no mean.
        """
        told = [method.epoch_record() for method in self._copies()]
        if not any(told):
            return {} if told else self.method.epoch_record()
        return {**_means(told), "blocks": told}

    def after_step(self, losses: Mapping[str, Any] | Sequence[Any]) -> None:
        """Hand the losses to the wrapped method, or to every copy of it."""
        for method in self._copies() or [self.method]:
            method.after_step(losses)

    def solve(self, gradients: TaskGradients) -> Combination:
        """Solve one problem for each block, and put the results together."""
        layers = gradients.block_layers if self.by == "layer" else tuple(range(len(gradients.block_sizes)))
        starts = [i for i, layer in enumerate(layers) if i == 0 or layer != layers[i - 1]]
        blocks = _split(gradients, starts, "jacobian" in self.method.declares.needs)
        names = gradients.block_names or tuple(map(str, range(len(layers))))
        results = self._results(blocks, [names[start] for start in starts])
        statuses = [result.status for result in results]
        refused = statuses.count("refused")
        notes = [note for result in results for note in result.notes]
        if refused:
            notes.append(f"refused in {refused} of {len(results)} blocks")
        moves = "refused" if refused == len(results) else "ok"
        whole = Combination(
            status=moves if moves in statuses else "stationary",
            dropped=tuple(dict.fromkeys(name for result in results for name in result.dropped)),
            notes=tuple(dict.fromkeys(notes)),
            residual=max((r.residual for r in results if r.residual is not None), default=None),
        )
        if self.declares.gives == "direction":
            assert gradients.jacobian is not None
            pieces = [
                result.direction
                if result.direction is not None and result.status == moves
                else gradients.jacobian.new_zeros(width)
                for result, width in zip(results, _sums(gradients.block_sizes, starts), strict=True)
            ]
            return replace(whole, direction=torch.cat(pieces))
        weights = np.stack([self.weights_of(result, gradients)[:, 0] for result in results])
        weights[[status != moves for status in statuses]] = 0.0
        repeats = np.diff([*starts, len(layers)])
        return replace(whole, block_weights=torch.from_numpy(np.repeat(weights, repeats, axis=0)))

    def _results(self, blocks: list[TaskGradients], names: list[str]) -> list[Combination]:
        if not any(True for _ in self.method.buffers()):
            return self.method.combine_blocks(blocks)
        copies = self._copies() or [copy.deepcopy(self.method) for _ in blocks]
        if len(copies) != len(blocks):
            raise ValueError(
                f"{self.declares.name} has one {self.method.declares.name} for each of {len(copies)} blocks and was "
                f"given {len(blocks)}. Name the shared parameters with shared=, so that they stay the same, or "
                "create a new method."
            )
        if names != self._named:
            what = "in the layer of shared tensor" if self.by == "layer" else "in shared tensor"
            for method, name in zip(copies, names, strict=True):
                for guard in method.modules():
                    if isinstance(guard, Guard):
                        guard.locate(f" {what} {name}")
            self._named = names
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
        numbered = {key[len(start) :].partition(".")[0] for key in state_dict if key.startswith(start)}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # Fresh copies of the wrapped method; what each remembers is loaded after this.
        self.blocks = nn.ModuleList(copy.deepcopy(self.method) for _ in numbered)
        self._named = []


# ---- private


def _means(told: list[dict[str, Any]]) -> dict[str, float | None]:
    """Take key by key the mean of what is a number in every record, or None; None where it is nowhere a number."""
    means: dict[str, float | None] = {}
    for key in told[0]:
        values = [record.get(key) for record in told]
        known = [value for value in values if isinstance(value, numbers.Real) and not isinstance(value, bool)]
        if len(known) + values.count(None) == len(values):
            means[key] = sum(map(float, known)) / len(known) if known else None
    return means


def _sums(sizes: Sequence[int], starts: list[int]) -> list[int]:
    return [int(total) for total in np.add.reduceat(np.array(sizes), starts)]


def _split(gradients: TaskGradients, starts: list[int], with_jacobian: bool) -> list[TaskGradients]:
    """Return what a method sees of each group of blocks that begins at one of ``starts``."""
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
