"""What a method is given in a test: the one place that turns declared needs into task gradients and hook calls."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

import detente
from detente.methods.base import Preference
from detente.step import with_direction

KNOWN_NEEDS = {"losses", "gramian", "jacobian", "blocks", "activations", "after_step", "epoch"}
SPACES = ("exact", "features", "layer")
DECLARED = (
    *("needs", "spaces", "stateful", "native_scale"),
    *("homogeneity", "nonconflict", "stationary", "simplex", "permutation"),
)


@dataclass(frozen=True)
class Subject:
    """A method (or a method around a method) under test: how to make one, and what it declares.

    `factory(**options)` makes a fresh one that knows no tasks yet. `preference` is the name of the option that takes
    one number per task, None if there is none.
    """

    label: str
    factory: Callable[..., detente.Method]
    info: detente.MethodInfo
    preference: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self, **options: Any) -> detente.Method:
        return self.factory(**{**self.options, **options})

    @property
    def space(self) -> str:
        """A space the method declares; the one with activations if it looks at them."""
        if "activations" in self.info.needs and "features" in self.info.spaces:
            return "features"
        return next(space for space in SPACES if space in self.info.spaces)

    @property
    def batches(self) -> int:
        """How many independent batches the method asks for."""
        return self.info.batches


def subject(
    factory: Callable[..., detente.Method],
    info: detente.MethodInfo,
    *,
    label: str | None = None,
    preference: str | None = None,
) -> Subject:
    """Everything the laws need to know; the preference's option is found by its annotation unless it is named."""
    if preference is None:
        preference = next((name for name in per_task_options(type(factory())) if name in info.options), None)
    return Subject(label or info.name, factory, info, preference)


def per_task_options(cls: type[detente.Method]) -> list[str]:
    """Options that take one number per task, told by their annotation."""
    hints = typing.get_type_hints(cls.__init__)
    parameters = inspect.signature(cls.__init__).parameters
    return [name for name in parameters if hints.get(name) == Preference]


def takes_one_for_each_task(cls: type[detente.Method]) -> set[str]:
    """Options that take one number for all tasks or a sequence of one for each, told by their annotation."""
    hints = typing.get_type_hints(cls.__init__)
    return {name for name, hint in hints.items() if Sequence[float] in typing.get_args(hint)}


def registered() -> list[Subject]:
    """Every registered method with its default options."""

    def factory(name: str) -> Callable[..., detente.Method]:
        return lambda **options: detente.create(name, **options)

    return [subject(factory(name), info) for name, info in detente.methods().items()]


def variants(one: Subject) -> Iterator[Subject]:
    """The same method with one option changed to each declared choice and search value.

    Laws are declared for the defaults: none holds then, unless the instance declares anew what its options change.
    """
    undeclared = replace(one.info, homogeneity=None, nonconflict=False, stationary=None, simplex=False)
    undeclared = replace(undeclared, permutation=None, native_scale="own")
    for name, option in one.info.options.items():
        for value in dict.fromkeys((*option.choices, *option.search)):
            if value == option.default or name == one.preference:
                continue
            options = {**one.options, name: value}
            method = one.factory(**options)
            anew = method.declares != one.make().declares
            known = {field: getattr(method.declares, field) for field in DECLARED} if anew else {}
            info = replace(one.info, **known) if anew else undeclared
            yield replace(one, label=f"{one.label}({name}={value})", info=info, options=options)


# ---- task gradients


@dataclass(frozen=True)
class Case:
    """T gradients in P dimensions with what may come along: losses [T], activations [P], names."""

    jacobian: torch.Tensor
    losses: np.ndarray
    names: tuple[str, ...]
    activations: torch.Tensor
    label: str = ""

    @property
    def tasks(self) -> int:
        return len(self.names)

    def only(self, names: Sequence[str]) -> Case:
        """The rows of these tasks, in this order."""
        rows = [self.names.index(name) for name in names]
        return replace(self, jacobian=self.jacobian[rows], losses=self.losses[rows], names=tuple(names))

    def scaled(self, factor: float) -> Case:
        """All gradients times a number."""
        return replace(self, jacobian=self.jacobian * factor)

    def rotated(self, rotation: torch.Tensor) -> Case:
        """The gradients in another basis of the parameters."""
        return replace(self, jacobian=self.jacobian @ rotation)


NAMES = ("seg", "depth", "normals", "edges", "parts", "keys", "boxes", "flow")


def case(
    jacobian: torch.Tensor, *, seed: int = 0, losses: Any = None, label: str = "", names: Any = None
) -> Case:
    """A case around a matrix; losses drawn between 0.2 and 2 unless given."""
    tasks, columns = jacobian.shape
    random = np.random.default_rng([seed, tasks, columns])
    drawn = random.uniform(0.2, 2.0, tasks)
    names = names or (NAMES[:tasks] if tasks <= len(NAMES) else tuple(f"task {i}" for i in range(tasks)))
    return Case(
        jacobian=jacobian,
        losses=drawn if losses is None else np.asarray(losses, dtype=np.float64),
        names=tuple(names),
        activations=torch.from_numpy(random.normal(size=columns)).to(jacobian.dtype),
        label=label,
    )


def drawn(tasks: int, columns: int, seed: int, dtype: torch.dtype = torch.float64) -> Case:
    """Independent normal gradients of unequal length; some conflict."""
    random = np.random.default_rng([seed, 17])
    rows = random.normal(size=(tasks, columns)) * random.uniform(0.3, 3.0, (tasks, 1))
    return case(torch.from_numpy(rows).to(dtype), seed=seed, label=f"drawn {tasks}x{columns}")


def block_sizes(columns: int) -> tuple[int, ...]:
    """Three blocks where there are columns enough, as a weight, its bias and another weight would be."""
    if columns < 3:
        return (columns,)
    first = max(1, columns // 2)
    return (first, 1, columns - first - 1) if columns - first - 1 > 0 else (first, columns - first)


def given(
    one: Subject, now: Case, *, space: str | None = None, everything: bool = False, without: str | None = None
) -> detente.TaskGradients:
    """The task gradients of a step: what the method declares (or everything), except one thing left out on purpose."""
    needs = one.info.needs
    unknown = {need for need in needs if need not in KNOWN_NEEDS and not need.startswith("batches:")}
    assert not unknown, (
        f"{one.label} declares needs {unknown}, which tests/laws/given.py does not know how to meet"
    )
    space = space or one.space
    # An option may look at the losses that the default leaves alone; the engine always has them.
    everything = everything or bool(one.options)
    wanted = {"losses", "gramian", "jacobian", *needs} if everything else set(needs)
    if "batches" not in (without or "") and one.batches > 1:
        wanted.add("extra")
    wanted.discard(without or "")
    if "activations" in wanted and space != "features":
        wanted.discard("activations")
    double = now.jacobian.to(torch.float64)
    sizes = block_sizes(now.jacobian.shape[1])
    blocks = [block @ block.T for block in double.split(sizes, dim=1)] if "blocks" in wanted else []
    layers = tuple(np.cumsum([0, *(position != 1 for position in range(1, len(sizes)))]).tolist())
    further: tuple[detente.TaskGradients, ...] = ()
    if "extra" in wanted:
        # Scaled copies of this batch are other gradients with the same symmetries, hulls and ranks.
        plain = replace(
            one, info=replace(one.info, needs=frozenset(n for n in needs if not n.startswith("batches")))
        )
        others = [now.scaled(1 + batch / 8) for batch in range(1, one.batches)]
        further = tuple(given(plain, other, space=space, everything=everything) for other in others)
    return detente.TaskGradients(
        names=now.names,
        losses=now.losses.copy() if "losses" in wanted else None,
        gramian=(double @ double.T).numpy() if "gramian" in wanted else None,
        jacobian=now.jacobian if "jacobian" in wanted else None,
        block_gramians=torch.stack(blocks).numpy() if blocks else None,
        block_names=tuple(f"block {i}" for i in range(len(sizes))) if blocks else (),
        block_sizes=sizes if blocks else (),
        block_layers=layers if blocks else (),
        activations=now.activations if "activations" in wanted else None,
        extra=further,
        space=space,  # type: ignore[arg-type]
    )


def step(one: Subject, method: detente.Method, now: Case, **how: Any) -> detente.Combination:
    """One training step of the method on a case, with its direction filled in."""
    gradients = given(one, now, **how)
    return filled(method.combine(gradients), gradients, now)


def filled(
    combination: detente.Combination, gradients: detente.TaskGradients, now: Case
) -> detente.Combination:
    """The combination with its direction: the engine's own function, except where weights differ between blocks."""
    if combination.block_weights is not None and combination.status != "stationary":
        columns = now.jacobian.to(torch.float64).split(gradients.block_sizes, dim=1)
        parts = [w @ block for w, block in zip(combination.block_weights, columns, strict=True)]
        return replace(combination, direction=torch.cat(parts).to(now.jacobian.dtype))
    takes_gradients = "gradients" in inspect.signature(with_direction).parameters
    second: Any = replace(gradients, jacobian=now.jacobian) if takes_gradients else now.jacobian
    return with_direction(combination, second)


def after(one: Subject, method: detente.Method, now: Case, count: int) -> None:
    """The hooks a training loop calls after step number `count` (from 1): new losses, an epoch's end."""
    if "after_step" in one.info.needs:
        shrunk = now.losses * (0.9 + 0.09 * np.cos(20 * now.losses))  # by task, whatever its position
        method.after_step({name: torch.tensor(loss) for name, loss in zip(now.names, shrunk, strict=True)})
    if "epoch" in one.info.needs and count % 2 == 0:
        method.end_epoch()


def run(
    one: Subject, method: detente.Method, cases: Sequence[Case], *, start: int = 0
) -> list[detente.Combination]:
    """Steps with their hooks; `start` steps went before."""
    outcomes = []
    for count, now in enumerate(cases, start=start + 1):
        outcomes.append(step(one, method, now))
        after(one, method, now, count)
    return outcomes


# ---- comparing


def length(vector: torch.Tensor) -> float:
    """Euclidean length in float64, safe from overflow."""
    vector = vector.to(torch.float64)
    largest = float(vector.abs().max()) if vector.numel() else 0.0
    return largest * float(torch.linalg.vector_norm(vector / largest)) if largest > 0 else 0.0


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of two vectors, each taken to unit length first."""
    return float((a.to(torch.float64) / length(a)) @ (b.to(torch.float64) / length(b)))


def reach(outcome: detente.Combination, now: Case) -> float:
    """The length the direction would have without any cancellation: what rounding is measured against."""
    assert outcome.direction is not None
    if outcome.weights is None:
        return max(length(outcome.direction), max(length(row) for row in now.jacobian))
    terms = [abs(w) * length(g) for w, g in zip(outcome.weights.tolist(), now.jacobian, strict=True)]
    return max(length(outcome.direction), sum(terms))


def same_bits(a: Any, b: Any) -> bool:
    """Equal in every bit (NaN equals itself), through tensors, arrays, mappings and sequences."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return bool(np.array_equal(a.numpy(), b.numpy(), equal_nan=a.is_floating_point()))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    if isinstance(a, detente.Combination) and isinstance(b, detente.Combination):
        return all(same_bits(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)
    return type(a) is type(b) and a == b


def state(method: detente.Method) -> dict[str, Any]:
    """A copy of everything `state_dict` saves."""
    return {
        key: value.clone() if isinstance(value, torch.Tensor) else dict(value)
        for key, value in method.state_dict().items()
    }
