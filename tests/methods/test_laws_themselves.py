"""The laws pass methods that ask for much, and each of them catches the fault it is there for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from laws import learning, mathematics, memory, refusal
from laws.check import LAWS, Law, check_all, laws_of, short
from laws.given import subject

from detente import Combination, Declaration, Method, TaskGradients
from detente.methods import describe
from detente.methods.options import Preference, one_of

GRAMIAN = frozenset({"gramian"})


def weights(values: np.ndarray) -> Combination:
    return Combination(weights=torch.from_numpy(np.asarray(values, dtype=np.float64)))


# ---- well-behaved methods that need what the built-in ones may not


class Momentum(Method):
    """A running mean of every task's gradient, as large as the parameters.

    Args:
        keep: share of the past.
    """

    declares = Declaration(
        name="momentum",
        source="these tests",
        needs=frozenset({"jacobian"}),
        spaces=frozenset({"exact", "features"}),
        gives="direction",
        stateful=True,
        native_scale="own",
        homogeneity=1,
        permutation="exact",
        search={"keep": (0.9,)},
    )

    def __init__(self, *, keep: float = 0.5) -> None:
        super().__init__()
        if not 0 <= keep < 1:
            raise ValueError(f"option keep is {keep}; it must be in [0, 1).")
        self.keep = keep

    def allocate(self, tasks: int) -> None:
        self.register_buffer("mean", None)  # the first step tells its size

    def solve(self, gradients: TaskGradients) -> Combination:
        jacobian = gradients.jacobian
        assert jacobian is not None and self.tasks is not None
        if self.mean is None:
            self.mean = jacobian.new_zeros(len(self.tasks), jacobian.shape[1])
        at = self.positions(gradients.names)
        self.mean[at] = self.keep * self.mean[at].to(jacobian.dtype) + (1 - self.keep) * jacobian
        return Combination(direction=self.mean[at].sum(dim=0))


class Acquaintance(Method):
    """Weights from how often pairs of tasks agreed: a buffer with two axes over tasks."""

    declares = Declaration(
        name="acquaintance",
        source="these tests",
        needs=GRAMIAN,
        stateful=True,
        native_scale="simplex",
        homogeneity=1,
        simplex=True,
        permutation="exact",
    )

    def allocate(self, tasks: int) -> None:
        self.register_buffer("agreed", torch.zeros(tasks, tasks, dtype=torch.float64))

    def solve(self, gradients: TaskGradients) -> Combination:
        assert gradients.gramian is not None
        at = self.positions(gradients.names)
        agreed = self.agreed.numpy()
        agreed[np.ix_(at, at)] += gradients.gramian > 0
        counts = 1 + agreed[np.ix_(at, at)].sum(axis=1)
        return weights(counts / counts.sum())


class Lots(Method):
    """Random weights, drawn afresh in every step.

    Args:
        seed: of the draws.
    """

    declares = Declaration(
        name="lots", source="these tests", stateful=True, native_scale="simplex", homogeneity=1, simplex=True,
        permutation="distribution",
    )  # fmt: skip

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__(seed=seed)

    def solve(self, gradients: TaskGradients) -> Combination:
        draw = torch.rand(gradients.tasks, dtype=torch.float64, generator=self.generator) + 0.1
        return Combination(weights=draw / draw.sum())


class Attentive(Method):
    """Weights from losses, from what came of the last step, and from epochs.

    Args:
        form: how quickly.
        preference: one number per task.
    """

    declares = Declaration(
        name="attentive",
        source="these tests",
        needs=frozenset({"losses", "after_step", "epoch", "batches:3", "activations", "gramian"}),
        spaces=frozenset({"exact", "features"}),
        stateful=True,
        homogeneity=1,
        permutation="exact",
    )

    def __init__(self, *, form: Literal["slow", "quick"] = "slow", preference: Preference = None) -> None:
        super().__init__(preference=preference)
        self.form = one_of("form", form, ("slow", "quick"))

    def allocate(self, tasks: int) -> None:
        self.register_buffer("lean", torch.ones(tasks, dtype=torch.float64))
        self.register_buffer("last", torch.ones(tasks, dtype=torch.float64))

    def solve(self, gradients: TaskGradients) -> Combination:
        assert gradients.losses is not None and gradients.gramian is not None
        for further in gradients.extra:
            assert further.names == gradients.names and further.gramian is not None
        if gradients.space == "features":
            assert gradients.activations is not None
        at = self.positions(gradients.names)
        preference = self.preference(gradients.names)
        self.last.numpy()[at] = gradients.losses
        lean = self.lean.numpy()[at] * gradients.losses * (1 if preference is None else preference)
        return weights(lean / lean.sum() * (1 + len(gradients.extra)))

    def after_step(self, losses: Mapping[str, Any] | Sequence[Any]) -> None:
        assert isinstance(losses, Mapping)
        for name, loss in losses.items():
            if not np.isfinite(float(loss)):
                raise ValueError(f"the loss of task {name!r} after the step is not finite.")
        at = self.positions(list(losses))
        self.lean.numpy()[at] *= np.array([float(loss) for loss in losses.values()]) / self.last.numpy()[at]

    def end_epoch(self) -> None:
        self.last.fill_(1.0)


class Blockwise(Method):
    """The weights of the block in which the gradients are longest."""

    declares = Declaration(
        name="blockwise", source="these tests", needs=frozenset({"blocks"}), homogeneity=1, permutation="exact",
        native_scale="sum", spaces=frozenset({"exact", "layer"}),
    )  # fmt: skip

    def solve(self, gradients: TaskGradients) -> Combination:
        blocks = gradients.block_gramians
        assert blocks is not None and len(gradients.block_sizes) == len(blocks) == len(gradients.block_layers)
        largest = np.diagonal(blocks, axis1=1, axis2=2).sum(axis=1).argmax()
        norms = np.sqrt(np.diagonal(blocks[largest]))
        total = norms.sum()
        return weights(norms / total * len(norms) if total > 0 else np.ones(len(norms)))


@pytest.mark.parametrize("cls", [Momentum, Acquaintance, Lots])
def test_demanding_methods_obey_every_law(cls: type[Method]) -> None:
    checked = check_all(_maker(cls), describe(cls))
    assert len(checked) >= 18


@pytest.mark.parametrize("cls", [Attentive, Blockwise])
def test_methods_that_ask_for_hooks_batches_blocks_and_activations_are_given_them(cls: type[Method]) -> None:
    checked = check_all(_maker(cls), describe(cls))
    assert len(checked) >= 18


def _maker(cls: type[Method]) -> Any:
    """What `create` does, for a class that is not registered."""

    def make(**options: Any) -> Method:
        constructor: Any = cls
        return constructor(**options)

    return make


# ---- faults, one per law


class Fine(Method):
    """The mean: the healthy original of the faults below."""

    declares = Declaration(
        name="fine", source="these tests", needs=GRAMIAN, native_scale="mean", homogeneity=1, permutation="exact",
        simplex=True,
    )  # fmt: skip

    def solve(self, gradients: TaskGradients) -> Combination:
        return weights(np.full(gradients.tasks, 1 / gradients.tasks))


class WithPreference(Fine):
    """The mean, with a preference that it forgets.

    Args:
        preference: forgotten.
    """

    def __init__(self, *, preference: Preference = None) -> None:
        super().__init__(preference=preference)


class Careless(Fine):
    """Takes whatever option it is given.

    Args:
        rate: any number it seems.
    """

    def __init__(self, *, rate: float = 0.5) -> None:
        super().__init__()


class Seeded(Fine):
    """Has a seed and a generator, and does not use them.

    Args:
        seed: ignored.
    """

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__(seed=seed)


def _fault(base: type[Fine] = Fine, **changes: Any) -> type[Method]:
    """A subclass with other declarations or another solve."""
    declared = {name: value for name, value in changes.items() if name in Declaration.__dataclass_fields__}
    body = {name: value for name, value in changes.items() if name not in declared}
    return type(
        "Faulty", (base,), {"__doc__": base.__doc__, "declares": replace(base.declares, **declared), **body}
    )


def _numbers(formula: Any) -> Any:
    """A solve whose weights are a formula of Gramian and losses."""
    return lambda self, gradients: weights(formula(gradients.gramian))


def _remember(self: Any, gradients: TaskGradients) -> Combination:
    past = getattr(self, "past", 0.0)
    self.past = past + 1.0  # neither a buffer nor saved
    return weights(np.full(gradients.tasks, (1 + past) / gradients.tasks))


class HoldsOn(Fine):
    """Keeps the Gramian it was lent, not a copy."""

    def solve(self, gradients: TaskGradients) -> Combination:
        last = self.__dict__.setdefault("lent", gradients.gramian)
        return weights(np.full(gradients.tasks, np.trace(last)))


def _in_place(self: Any, gradients: TaskGradients) -> Combination:
    assert gradients.gramian is not None
    np.fill_diagonal(gradients.gramian, 1.0)
    return weights(np.full(gradients.tasks, 1 / gradients.tasks))


def _global_noise(self: Any, gradients: TaskGradients) -> Combination:
    draw = torch.rand(gradients.tasks, dtype=torch.float64) + 0.1
    return Combination(weights=draw / draw.sum())


def _not_zero(self: Any, gradients: TaskGradients) -> Combination:
    return Combination(weights=torch.ones(gradients.tasks, dtype=torch.float64), status="ok")


def _wrong_type(self: Any, gradients: TaskGradients) -> Combination:
    return Combination(weights=torch.full((gradients.tasks,), 1 / gradients.tasks))  # float32


def _own_direction(self: Any, gradients: TaskGradients) -> Combination:
    return Combination(
        weights=torch.full((gradients.tasks,), 0.5, dtype=torch.float64),
        direction=gradients.jacobian.sum(dim=0),
    )


class ByPosition(Fine):
    """Keeps state by position in the step instead of by name."""

    def allocate(self, tasks: int) -> None:
        self.register_buffer("seen", torch.zeros(tasks, dtype=torch.float64))

    def solve(self, gradients: TaskGradients) -> Combination:
        self.seen[: gradients.tasks] += torch.from_numpy(np.diagonal(gradients.gramian).copy())
        seen = self.seen[: gradients.tasks] + 1e-300
        return Combination(weights=seen / seen.sum())


class FirstUpdateThenCheck(ByPosition):
    """Updates its state, then finds fault with the input."""

    def solve(self, gradients: TaskGradients) -> Combination:
        at = self.positions(gradients.names)
        self.seen[at] += 1
        assert gradients.losses is not None
        if not (gradients.losses > 0).all():
            raise ValueError("fine needs positive losses")
        return weights(np.full(gradients.tasks, 1 / gradients.tasks))


class Trainable(Fine):
    """Puts a parameter into the user's optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.lean = torch.nn.Parameter(torch.ones(1))


class Sinking(Fine):
    """Goes uphill."""

    def solve(self, gradients: TaskGradients) -> Combination:
        return weights(np.full(gradients.tasks, -1 / gradients.tasks))


class Idle(Fine):
    """Stays where it is."""

    def solve(self, gradients: TaskGradients) -> Combination:
        return weights(np.zeros(gradients.tasks))


class SinceTheStart(Fine):
    """Divides by what the first step saw, and by nothing for who was not there."""

    def allocate(self, tasks: int) -> None:
        self.register_buffer("start", torch.zeros(tasks, dtype=torch.float64))
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))

    def solve(self, gradients: TaskGradients) -> Combination:
        at = self.positions(gradients.names)
        assert gradients.gramian is not None
        if not self.begun:
            self.start.numpy()[at] = np.diagonal(gradients.gramian)
            self.begun.fill_(True)
        with np.errstate(divide="ignore", invalid="ignore"):
            return weights(np.diagonal(gradients.gramian) / self.start.numpy()[at])


class Unchecked(Fine):
    """Takes any preference.

    Args:
        preference: unchecked.
    """

    def __init__(self, *, preference: Preference = None) -> None:
        super().__init__()


class Deaf(Fine):
    """Does not look at what it is told after a step."""

    def after_step(self, losses: Mapping[str, Any] | Sequence[Any]) -> None:
        self.heard = losses


def _over_the_trace(gram: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.asarray(np.diagonal(gram) / np.trace(gram))


def _amplified_rounding(gram: np.ndarray) -> np.ndarray:
    return np.asarray(2 + np.sin(1e14 * np.diagonal(gram)))


FIRST = _numbers(lambda gram: np.eye(len(gram))[0])
FAULTS: list[tuple[Law, type[Method]]] = [
    (mathematics.law_finite_on_the_battery, _fault(solve=_numbers(_over_the_trace))),
    (mathematics.law_finite_on_the_battery, _fault(solve=_wrong_type)),
    (mathematics.law_finite_on_the_battery, _fault(solve=_own_direction, needs=frozenset({"jacobian"}))),
    (mathematics.law_inputs_stay_untouched, _fault(solve=_in_place)),
    (mathematics.law_inputs_stay_untouched, _fault(solve=_global_noise)),
    (mathematics.law_same_seed_same_output, _fault(solve=_global_noise)),
    (mathematics.law_same_seed_same_output, _fault(Seeded, permutation="distribution")),
    (mathematics.law_public_combine_agrees, _fault(solve=_global_noise)),
    (mathematics.law_one_task, Sinking),
    (mathematics.law_one_task, _fault(native_scale="unit")),
    (mathematics.law_identical_tasks, _fault(native_scale="sum")),
    (mathematics.law_identical_tasks, Sinking),
    (mathematics.law_permutation, _fault(solve=FIRST)),
    (mathematics.law_order_of_presentation, ByPosition),
    (mathematics.law_permutation_in_distribution, _fault(Seeded, solve=FIRST)),
    (mathematics.law_rotation, _fault(solve=_numbers(_amplified_rounding))),
    (mathematics.law_homogeneity, _fault(solve=_numbers(lambda gram: np.diagonal(gram) + 1e-8))),
    (mathematics.law_homogeneity, _fault(homogeneity=0)),
    (mathematics.law_nonconflict, _fault(nonconflict=True)),
    (mathematics.law_simplex, _fault(solve=_numbers(lambda gram: np.ones(len(gram))))),
    (mathematics.law_stationarity, _fault(solve=_not_zero, stationary="hull")),
    (mathematics.law_stationarity, _fault(solve=_not_zero, stationary="affine")),
    (mathematics.law_stationarity, _fault(solve=_not_zero, stationary="cone")),
    (mathematics.law_preference, WithPreference),
    (memory.law_no_parameters, Trainable),
    (memory.law_stateful_as_declared, _fault(solve=_remember)),
    (memory.law_stateful_as_declared, _fault(stateful=True)),
    (memory.law_save_and_load, _fault(solve=_remember)),
    (memory.law_memory_belongs_to_its_owner, HoldsOn),
    (memory.law_absent_tasks_keep_their_state, _fault(ByPosition, stateful=True)),
    (memory.law_absent_in_the_first_step, SinceTheStart),
    (memory.law_new_task, SinceTheStart),
    (refusal.law_bad_options, Careless),
    (refusal.law_bad_preference, Unchecked),
    (refusal.law_bad_losses_in_after_step, _fault(Deaf, needs=frozenset({"gramian", "after_step"}))),
    (refusal.law_bad_calls_change_nothing, _fault(FirstUpdateThenCheck, needs=frozenset({"losses"}))),
    (learning.law_every_parameter_of_an_mlp_moves, Idle),
    (learning.law_every_parameter_of_a_lenet_moves, Idle),
    (learning.law_the_tasks_get_better, Sinking),
]


@pytest.mark.parametrize("law, cls", FAULTS, ids=lambda value: short(value) if callable(value) else "")
def test_a_law_catches_the_fault_it_is_there_for(law: Law, cls: type[Method]) -> None:
    one = subject(_maker(cls), describe(cls))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        law(one)


def test_every_law_has_a_fault_it_catches() -> None:
    assert {law for law, _ in FAULTS} == set(LAWS)


def test_the_healthy_original_passes_what_its_faults_fail() -> None:
    one = subject(_maker(Fine), describe(Fine))
    for law in laws_of(one):
        law(one)
