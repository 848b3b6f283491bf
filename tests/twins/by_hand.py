"""What a step on a world must leave behind, from gradients taken task by task with one forward each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from twins.worlds import World

import detente

Gradients = dict[str, torch.Tensor]


@dataclass
class Expected:
    """What a step must leave behind.

    Attributes:
        grads: ``.grad`` by the tensor's name, a tuple where several answers are right; None: the step is refused.
        weights: one per task, None for a task left out; None altogether if nothing is promised.
        left_out: tasks that reach no shared parameter.
        dropped: those, and the ones the method itself dropped; None if nothing is promised.
        status: of the record.
        leaves: some leaf that two tasks reach takes no part.
    """

    grads: dict[str, tuple[torch.Tensor, ...]] | None
    weights: list[float | None] | None = None
    left_out: tuple[str, ...] = ()
    dropped: set[str] | None = None
    status: str = "ok"
    leaves: bool = False


@dataclass
class ByHand:
    """The slow twin of several steps on one world with one method."""

    world: World
    mode: str
    method: detente.Method
    remembered: set[str] = field(default_factory=set)

    def step(self, present: Sequence[int]) -> Expected:
        """One step with some of the tasks."""
        world, tensors = self.world, self.world.tensors()
        losses = {world.names[number]: world.alone(number) for number in present}
        rows = {name: _gradients(loss, tensors) for name, loss in losses.items()}
        reached = {world.names[number]: world.reached(number) for number in present}
        values = {name: loss.item() for name, loss in losses.items()}
        everybody = dict.fromkeys(losses, 1.0)
        if detente.methods()[self.method.declares.name].heads == "weighted":
            combination = detente.combine(self.method, torch.eye(len(losses)), values)
            assert combination.weights is not None
            weights = dict(zip(losses, combination.weights.tolist(), strict=True))
            found = _sum(rows, weights, tensors)
            grads = {name: (gradient,) for name, gradient in found.items()}
            if "x" in grads:  # weighted or plain: the contract tells of methods that take gradients
                grads["x"] = (found["x"], _sum(rows, everybody, tensors)["x"])
            return Expected(grads, list(weights.values()))
        everything = range(len(world.names)) if self.mode.startswith("shared") else present
        self.remembered |= world.shared(everything)
        shared = {name: tensors[name] for name in tensors if name in self.remembered}
        on, matrix = self._problem(present, rows, shared)
        kept = [name for name in losses if reached[name] & on]
        plain = _sum(rows, everybody, tensors)
        if not kept:
            return Expected({name: (gradient,) for name, gradient in plain.items()})
        jacobian = torch.stack([matrix[name] for name in kept])
        combination = detente.combine(self.method, jacobian, {name: values[name] for name in kept})
        if not combination.accepted:
            return Expected(None, status="refused")
        assert combination.weights is not None and combination.direction is not None
        weights = dict(zip(kept, combination.weights.tolist(), strict=True))
        # A task left out reaches nothing that is shared, so the weighted sum of the others is all of it.
        for name, gradient in _sum({name: rows[name] for name in kept}, weights, shared).items():
            plain[name] = gradient
        if self.mode not in ("features", "layer"):
            plain.update(_split(combination.direction, shared))
        elif self.mode == "features":
            plain.update(self._through_the_trunk(combination.direction))
        left_out = tuple(name for name in losses if name not in kept)
        return Expected(
            {name: (gradient,) for name, gradient in plain.items()},
            [weights.get(name) for name in losses],
            left_out,
            {*left_out, *combination.dropped},
            combination.status,
            "x" not in shared and sum("x" in names for names in reached.values()) > 1,
        )

    def _problem(
        self, present: Sequence[int], rows: Mapping[str, Gradients], shared: Gradients
    ) -> tuple[set[str], dict[str, torch.Tensor]]:
        """What a task must reach to take part, and each task's gradient there."""
        world, tensors = self.world, self.world.tensors()
        if self.mode == "features":
            z = world.trunk(world.x).detach().requires_grad_()
            taken = {world.names[n]: _gradients(world.alone(n, z), {"z": z})["z"] for n in present}
            trunk = {name for name in tensors if name.startswith("trunk.")}
            return trunk, {name: gradient.reshape(-1) for name, gradient in taken.items()}
        if self.mode == "layer":
            shared = {name: tensor for name, tensor in tensors.items() if tensor is world.layer}
        flat = {
            name: torch.cat([torch.zeros(0, dtype=torch.float64), *(row[at].reshape(-1) for at in shared)])
            for name, row in rows.items()
        }
        return set(shared), flat

    def _through_the_trunk(self, direction: torch.Tensor) -> Gradients:
        trunk = {n: p for n, p in self.world.tensors().items() if n.startswith("trunk.")}
        z = self.world.trunk(self.world.x)
        return _gradients((z * direction.view_as(z)).sum(), trunk)


def _gradients(loss: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> Gradients:
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(tensors.items(), found, strict=True)
    }


def _sum(
    rows: Mapping[str, Gradients], weights: Mapping[str, float], tensors: Mapping[str, torch.Tensor]
) -> Gradients:
    return {
        name: sum((weights[task] * row[name] for task, row in rows.items()), torch.zeros_like(tensor))
        for name, tensor in tensors.items()
    }


def _split(direction: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> Gradients:
    parts = direction.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view_as(tensor) for part, (name, tensor) in zip(parts, tensors.items(), strict=True)}


def differences(world: World, record: detente.StepRecord, want: Expected) -> list[str]:
    """Where a step and what is expected part, in words; empty if they agree."""
    tensors, found = world.tensors(), []
    if record.status != want.status:
        found.append(f"status {record.status}, not {want.status}")
    if want.grads is None:
        return found + [f"{n}: a refused step wrote .grad" for n, t in tensors.items() if t.grad is not None]
    total = sum(float(right[0].norm() ** 2) for right in want.grads.values()) ** 0.5
    for name, tensor in tensors.items():
        got = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        off = [_off(got, right, total) for right in want.grads[name]]
        if min(off) > 1e-6:
            found.append(f"{name}: off by {min(off):.1e}")
    if want.weights is not None:
        found += _differing_weights(record, want.weights)
    if want.dropped is not None:
        if set(record.dropped) != want.dropped:
            found.append(f"dropped {record.dropped}, not {sorted(want.dropped)}")
        for name in want.left_out:
            if not any(name in note for note in record.notes):
                found.append(f"no note names {name}: {record.notes}")
    if want.leaves and not any("leaf" in note or "leaves" in note for note in record.notes):
        found.append(f"no note tells of the leaf that was left out: {record.notes}")
    return found


def _off(got: torch.Tensor, right: torch.Tensor, total: float) -> float:
    """The relative error, of tensors that are all but zero relative to a thousandth of all gradients."""
    return float((got - right).norm()) / max(float(right.norm()), 1e-3 * total, 1e-30)


def _differing_weights(record: detente.StepRecord, want: Sequence[float | None]) -> list[str]:
    got = record.weights
    if got is None or len(got) != len(want):
        return [f"weights {got}, not {want}"]
    for one, right in zip(got, want, strict=True):
        if (one is None) != (right is None):
            return [f"weights {got}, not {want}"]
        if one is not None and right is not None and abs(one - right) > 1e-6 * max(1.0, abs(right)):
            return [f"weights {got}, not {want}"]
    return []
