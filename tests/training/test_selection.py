"""Selection rules against histories worked out by hand."""

from __future__ import annotations

import pytest

from detente.training.selection import RULES, chosen, kept

HISTORY = [
    {"a": 0.1, "b": 0.9},  # best b
    {"a": 0.6, "b": 0.6},  # best mean, first of two
    {"a": 0.5, "b": 0.5},  # dominated
    {"a": 0.9, "b": 0.2},  # best a
    {"a": 0.6, "b": 0.6},  # equal to the second: neither dominates the other
    {"a": 0.2, "b": 0.2},
]


@pytest.mark.parametrize(
    ("rule", "k", "expected"),
    [
        ("mean", 1, [1]),
        ("last", 1, [5]),
        ("last-k", 2, [4, 5]),
        ("last-k", 99, [0, 1, 2, 3, 4, 5]),
        ("non-dominated", 1, [4]),
    ],
)
def test_rules_choose_the_epochs_found_by_hand(rule: str, k: int, expected: list[int]) -> None:
    assert chosen(rule, HISTORY, k) == expected


@pytest.mark.parametrize("rule", RULES)
def test_an_epoch_let_go_is_never_asked_for_again(rule: str) -> None:
    alive: set[int] = set()
    for length in range(1, len(HISTORY) + 1):
        alive = (alive | {length - 1}) & set(kept(rule, HISTORY[:length], 2, {"a": 0.5, "b": 0.5}))
        assert set(kept(rule, HISTORY[:length], 2, {"a": 0.5, "b": 0.5})) == alive
    assert set(chosen(rule, HISTORY, 2, {"a": 0.5, "b": 0.5})) <= alive


def test_delta_m_weighs_each_task_by_its_baseline() -> None:
    # Against 0.2 the gain of b in the first epoch counts 3.5, against 0.9 it would count 0.
    assert chosen("delta-m", HISTORY, 1, {"a": 0.9, "b": 0.2}) == [0]
    assert chosen("delta-m", HISTORY, 1, {"a": 0.2, "b": 0.9}) == [3]
    losses = [{"a": -0.5, "b": -1.0}, {"a": -0.4, "b": -1.3}]  # lower is better, signed: -20 % against +30 %
    assert chosen("delta-m", losses, 1, {"a": -0.5, "b": -1.0}) == [0]


def test_a_diverged_epoch_is_never_the_best() -> None:
    history = [{"a": 0.2, "b": 0.2}, {"a": float("nan"), "b": 0.9}]
    assert chosen("mean", history, 1) == [0]
    assert chosen("mean", history[::-1], 1) == [1]
