"""The laws of `tests/laws` on every registered wrapper around every registered method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from laws import learning, mathematics, memory, refusal
from laws.check import Law, laws_of, short
from laws.given import Subject, registered, subject

import detente
from detente.methods.registry import info_of
from detente.methods.wrappers import WrapperInfo

# The laws' epochs are two steps long; a guard may well refuse both.
pytestmark = pytest.mark.filterwarnings("ignore::detente.methods.wrappers.guard.EarlyTerminationWarning")

# What takes a second or more and says nothing that a small model does not say.
SLOW = (learning.law_every_parameter_of_a_lenet_moves, learning.law_the_tasks_get_better)


# Lengths all brought to one value are known only up to rounding, and a method may live on their differences.
OPTIONS = {"normalize": {"by": "loss+"}}


def wrapped(wrapper: WrapperInfo, inner: Subject) -> Subject | None:
    """A wrapper around a method as a subject of the laws; its options go to the one that has them."""
    if inner.info.gives not in wrapper.accepts:
        return None

    def factory(**options: Any) -> detente.Method:
        mine = {name: options.pop(name) for name in list(options) if name in wrapper.options}
        mine = {**OPTIONS.get(wrapper.name, {}), **mine}
        return detente.wrap(wrapper.name, inner.make(**options), **mine)

    return subject(factory, info_of(factory()), preference=inner.preference)


def exempt(wrapper: WrapperInfo, inner: Subject) -> set[Callable[[Subject], None]]:
    """Laws that cannot hold, by what is declared."""
    laws: set[Any] = set()
    if not inner.info.needs and not inner.info.stateful:
        laws.add(memory.law_stateful_as_declared)  # weights that never change, remembered or not
    if wrapper.name == "every":
        laws.add(refusal.law_bad_losses_in_after_step)  # in between there is nobody to look at them
    if wrapper.name == "per-block" and inner.info.homogeneity != 1:
        # Blocks of one gradient differ in length, and only degree 1 keeps their proportion.
        laws |= {mathematics.law_one_task, mathematics.law_identical_tasks}
    if "apply" in wrapper.options and inner.info.gives == "direction":
        laws.add(refusal.law_bad_options)  # one of its choices needs weights
    return laws


PAIRS = [
    pytest.param(one, law, id=f"{one.label}-{short(law)}")
    for wrapper in detente.wrappers.registered().values()
    for inner in registered()
    if (one := wrapped(wrapper, inner)) is not None
    for law in laws_of(one)
    if law not in SLOW and law not in exempt(wrapper, inner)
]


@pytest.mark.parametrize("one, law", PAIRS)
def test_law(one: Subject, law: Law) -> None:
    law(one)


def test_every_wrapper_met_every_method() -> None:
    labels = {parameters.values[0].label for parameters in PAIRS}
    for name, wrapper in detente.wrappers.registered().items():
        for inner in registered():
            assert (f"{name}({inner.label})" in labels) == (inner.info.gives in wrapper.accepts)
    assert len(labels) >= 60


NESTED = [
    lambda **o: detente.wrap("every", detente.wrap("smooth", detente.create("mgda", **o))),
    lambda **o: detente.wrap("smooth", detente.wrap("every", detente.create("pcgrad", **o))),
    lambda **o: detente.wrap("per-block", detente.wrap("smooth", detente.create("mgda", **o))),
    lambda **o: detente.wrap(
        "smooth", detente.wrap("per-block", detente.create("aligned-mtl", **o), by="tensor")
    ),
    lambda **o: detente.wrap(
        "every", detente.wrap("per-block", detente.create("aligned-mtl", **o), by="tensor")
    ),
    lambda **o: detente.wrap("normalize", detente.wrap("every", detente.create("mgda", **o))),
    lambda **o: detente.wrap("every", detente.wrap("normalize", detente.create("gradvac", **o))),
    lambda **o: detente.wrap("per-block", detente.wrap("normalize", detente.create("moco", **o))),
    lambda **o: detente.wrap(
        "normalize", detente.wrap("per-block", detente.create("aligned-mtl", **o), by="tensor")
    ),
    lambda **o: detente.wrap("smooth", detente.create("gradvac", group="layer", **o)),
    lambda **o: detente.wrap(
        "normalize", detente.wrap("normalize", detente.create("db-mtl", **o)), by="loss+"
    ),
]


@pytest.mark.parametrize("make", NESTED, ids=lambda make: make().declares.name)
def test_wrappers_around_wrappers(make: Callable[..., detente.Method]) -> None:
    one = subject(make, info_of(make()))
    for law in laws_of(one):
        if law not in (*SLOW, refusal.law_bad_options):  # its options are fixed here
            law(one)
