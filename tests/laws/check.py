"""All laws in one place: `check_all(factory, info)` for any method, registered or not, wrapped or not.

    from laws.check import check_all
    check_all(lambda **options: Every(detente.create("mgda"), k=2, **options), info)

A law is a function of a `Subject`; which laws a method must obey is read off what it declares. Nothing here knows
a method's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from laws import learning, mathematics, memory, refusal
from laws.given import Subject, subject

import detente

Law = Callable[[Subject], None]


def _always(one: Subject) -> bool:
    return True


def _gramian_alone(one: Subject) -> bool:
    return "gramian" in one.info.needs and not one.info.needs & {"jacobian", "activations"}


LAWS: dict[Law, Callable[[Subject], bool]] = {
    mathematics.law_finite_on_the_battery: _always,
    mathematics.law_inputs_stay_untouched: _always,
    mathematics.law_same_seed_same_output: _always,
    mathematics.law_public_combine_agrees: _always,
    mathematics.law_one_task: _always,
    mathematics.law_identical_tasks: _always,
    mathematics.law_permutation: lambda one: one.info.permutation == "exact",
    mathematics.law_order_of_presentation: lambda one: one.info.permutation == "exact",
    mathematics.law_permutation_in_distribution: lambda one: one.info.permutation == "distribution",
    mathematics.law_rotation: _gramian_alone,
    mathematics.law_homogeneity: lambda one: one.info.homogeneity is not None,
    mathematics.law_nonconflict: lambda one: one.info.nonconflict,
    mathematics.law_simplex: lambda one: one.info.simplex,
    mathematics.law_stationarity: lambda one: one.info.stationary is not None,
    mathematics.law_preference: lambda one: one.preference is not None,
    memory.law_no_parameters: _always,
    memory.law_stateful_as_declared: _always,
    memory.law_save_and_load: _always,
    memory.law_memory_belongs_to_its_owner: _always,
    memory.law_absent_tasks_keep_their_state: _always,
    memory.law_absent_in_the_first_step: _always,
    memory.law_new_task: _always,
    refusal.law_bad_options: _always,
    refusal.law_bad_preference: lambda one: one.preference is not None,
    refusal.law_bad_calls_change_nothing: _always,
    refusal.law_bad_losses_in_after_step: lambda one: "after_step" in one.info.needs,
    learning.law_every_parameter_of_a_lenet_moves: _always,
    learning.law_every_parameter_of_an_mlp_moves: _always,
    learning.law_the_tasks_get_better: _always,
}

# What holds with every option, not only with the defaults for which laws are declared.
WITH_ANY_OPTION: tuple[Law, ...] = (
    mathematics.law_finite_on_the_battery,
    mathematics.law_inputs_stay_untouched,
    mathematics.law_same_seed_same_output,
    mathematics.law_one_task,
    mathematics.law_identical_tasks,
    memory.law_save_and_load,
    memory.law_memory_belongs_to_its_owner,
    memory.law_absent_tasks_keep_their_state,
    memory.law_new_task,
    learning.law_every_parameter_of_an_mlp_moves,
)


def laws_of(one: Subject) -> list[Law]:
    """The laws a method must obey, by what it declares."""
    return [law for law, applies in LAWS.items() if applies(one)]


def laws_with_any_option(one: Subject) -> list[Law]:
    """The laws of a method with an option changed: the ones that always hold, and what the instance declares anew."""
    declared = {
        mathematics.law_permutation,
        mathematics.law_permutation_in_distribution,
        mathematics.law_rotation,
        mathematics.law_homogeneity,
        mathematics.law_nonconflict,
        mathematics.law_simplex,
        mathematics.law_stationarity,
    }
    return [*WITH_ANY_OPTION, *(law for law in laws_of(one) if law in declared)]


def short(law: Law) -> str:
    """A law's name in a test's id."""
    return law.__name__.removeprefix("law_")


def check_all(
    factory: Callable[..., detente.Method],
    info: detente.MethodInfo,
    *,
    label: str | None = None,
    preference: str | None = None,
    without: Iterable[Law] = (),
) -> list[str]:
    """Hold a method against every law it must obey.

    Args:
        factory: `factory(**options)` makes a fresh one that knows no tasks yet; an unknown option must raise.
        info: what it declares.
        label: how messages call it; its name if None.
        preference: the option that takes one number per task; found by its annotation if None.
        without: laws to leave out, for a reason the caller states.

    Returns:
        The names of the laws that were checked.
    """
    one = subject(factory, info, label=label, preference=preference)
    skipped: set[Any] = set(without)
    checked = [law for law in laws_of(one) if law not in skipped]
    for law in checked:
        law(one)
    return [short(law) for law in checked]
