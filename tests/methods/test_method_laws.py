"""The laws of `tests/laws` on every registered method, with its defaults and with each option it declares."""

from __future__ import annotations

import pytest
from laws.check import LAWS, WITH_ANY_OPTION, Law, laws_of, laws_with_any_option, short
from laws.given import Subject, registered, variants

import detente

# The laws' epochs are two steps long; a guard may well refuse both.
pytestmark = pytest.mark.filterwarnings("ignore::detente.methods.wrappers.guard.EarlyTerminationWarning")

SUBJECTS = registered()
DEFAULTS = [
    pytest.param(one, law, id=f"{one.label}-{short(law)}") for one in SUBJECTS for law in laws_of(one)
]
VARIANTS = [
    pytest.param(other, law, id=f"{other.label}-{short(law)}")
    for one in SUBJECTS
    for other in variants(one)
    for law in laws_with_any_option(other)
]


@pytest.mark.parametrize("one, law", DEFAULTS)
def test_law(one: Subject, law: Law) -> None:
    law(one)


@pytest.mark.parametrize("one, law", VARIANTS)
def test_law_with_another_option(one: Subject, law: Law) -> None:
    law(one)


def test_every_registered_method_is_held_against_the_laws() -> None:
    assert {one.label for one in SUBJECTS} >= set(detente.methods())
    assert {"uniform", "static", "mgda", "aligned-mtl"} <= {one.label for one in SUBJECTS}
    checked = {law for one in SUBJECTS for law in laws_of(one)}
    assert len(checked) >= 20 and set(WITH_ANY_OPTION) <= set(LAWS)


@pytest.mark.parametrize("one", SUBJECTS, ids=lambda one: one.label)
def test_the_docstring_says_what_a_reader_needs(one: Subject) -> None:
    """A summary of one line, a source, and every option explained."""
    doc = one.info.factory.__doc__ or ""
    assert one.info.summary.endswith(".") and len(one.info.summary) <= 110
    assert one.info.source
    for option in one.info.options:
        assert f"        {option}: " in doc, f"{one.label}: option {option} is not in the docstring"
    assert ">>> " in doc
