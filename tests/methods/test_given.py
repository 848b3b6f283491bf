"""What the laws give to a method: what it declares and no more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from laws.given import Subject, block_sizes, case, drawn, given, registered, same_bits, variants

import detente


def asking(*needs: str) -> Subject:
    """A subject with these needs, around a method that is never called."""
    info = replace(detente.methods()["uniform"], needs=frozenset(needs))
    return Subject("asking", lambda **options: detente.create("uniform", **options), info)


FIELDS = {"losses", "gramian", "jacobian", "block_gramians", "activations"}


def filled_fields(gradients: detente.TaskGradients) -> Iterator[str]:
    return (name for name in FIELDS if getattr(gradients, name) is not None)


@pytest.mark.parametrize(
    "needs, fields, further",
    [
        ((), set(), 0),
        (("gramian",), {"gramian"}, 0),
        (("jacobian",), {"jacobian"}, 0),
        (("blocks",), {"block_gramians"}, 0),
        (("losses", "activations", "gramian", "batches:3"), {"losses", "gramian", "activations"}, 2),
        (("losses", "after_step", "epoch"), {"losses"}, 0),
    ],
)
def test_a_method_is_given_what_it_declares_and_no_more(
    needs: tuple[str, ...], fields: set[str], further: int
) -> None:
    gradients = given(asking(*needs), drawn(3, 7, 0))
    assert set(filled_fields(gradients)) == fields and len(gradients.extra) == further
    assert all(set(filled_fields(other)) == fields for other in gradients.extra)
    assert gradients.space == ("features" if "activations" in needs else "exact")


def test_one_thing_can_be_left_out() -> None:
    gradients = given(asking("losses", "gramian"), drawn(3, 7, 0), everything=True, without="losses")
    assert set(filled_fields(gradients)) == {"gramian", "jacobian"}


def test_blocks_add_up_to_the_gramian() -> None:
    for columns in (1, 2, 3, 8):
        gradients = given(asking("blocks"), drawn(3, columns, 1), everything=True)
        assert gradients.block_gramians is not None and gradients.gramian is not None
        assert np.allclose(gradients.block_gramians.sum(axis=0), gradients.gramian)
        assert sum(block_sizes(columns)) == columns
        assert len(gradients.block_layers) == len(gradients.block_sizes) == len(gradients.block_gramians)


def test_further_batches_are_other_gradients_of_the_same_tasks() -> None:
    gradients = given(asking("gramian", "batches:2"), drawn(3, 5, 1))
    (other,) = gradients.extra
    assert other.names == gradients.names and other.gramian is not None and gradients.gramian is not None
    assert np.allclose(other.gramian, gradients.gramian * 1.125**2)


def test_an_unknown_need_stops_the_tests_instead_of_passing_unmet(monkeypatch: pytest.MonkeyPatch) -> None:
    given(asking("epoch"), drawn(2, 3, 0))
    monkeypatch.setattr("laws.given.KNOWN_NEEDS", {"gramian", "losses"})
    with pytest.raises(AssertionError, match="epoch"):
        given(asking("epoch"), drawn(2, 3, 0))


def test_variants_change_one_option_and_keep_only_what_the_instance_declares() -> None:
    mgda = next(one for one in registered() if one.label == "mgda")
    found = {one.label: one for one in variants(mgda)}
    assert set(found) == {
        "mgda(solver=frank-wolfe)",
        *(f"mgda(normalize={form})" for form in ("l2", "loss", "loss+")),
    }
    for one in found.values():
        assert len(one.options) == 1
        anew = one.make().declares is not type(one.make()).declares
        assert anew or (one.info.stationary is None and one.info.homogeneity is None)


def test_a_case_picks_rows_by_name() -> None:
    now = case(torch.eye(3), names=("a", "b", "c"), losses=[1, 2, 3])
    picked = now.only(["c", "a"])
    assert picked.jacobian.tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]] and picked.losses.tolist() == [3, 1]


def test_same_bits_tells_apart_what_differs_in_one_bit() -> None:
    one = torch.tensor([1.0, torch.nan])
    assert same_bits({"a": [one]}, {"a": [one.clone()]})
    assert not same_bits(one, torch.tensor([1.0 + 2**-23, torch.nan]))
    assert not same_bits(one, one.double()) and not same_bits([one], [one, one]) and not same_bits(1, 1.0)
