"""Line searches on several processes take the step of one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
from parity import TASKS, Network
from processes import in_processes
from searches import everything

SMALL: dict[str, Any] = {"on_no_descent": "small-step", "small_step": 1e-3}
# kind, method, options, absent tasks, wrapped, and a status that must have occurred
CASES: list[tuple[Any, ...]] = [
    ("classical", "mgda", {"lr_ub": 8.0}, False, False, "accepted"),
    ("classical", "mgda", {"lr_ub": 8.0, "lower_ub": "divided", "patience": 1}, True, True, "accepted"),
    ("classical", "mgda", {"lr_ub": 1.0, "precondition": "adam", **SMALL}, True, False, "accepted"),
    ("classical", "uniform", {"lr_ub": 4.0, **SMALL}, True, False, "accepted"),
    ("classical", "graddrop", {"lr_ub": 2.0, **SMALL}, False, False, "accepted"),
    ("classical", "aligned-mtl", {"lr_ub": 50.0, "max_trials": 2, **SMALL}, False, False, "capped"),
    ("fast", "mgda", {"lr_ub": 40.0, "check_true": 2}, False, False, "accepted"),
    ("fast", "mgda", {"lr_ub": 40.0, "lower_ub": "divided", "patience": 1}, True, True, "accepted"),
    ("fast", "graddrop", {"lr_ub": 1.0, "check_true": True, **SMALL}, True, False, "accepted"),
    ("fast", "uniform", {"lr_ub": 400.0, "max_trials": 2, **SMALL}, False, False, "capped"),
]


FAILURES = {
    ("classical", "pass 1"): "an image cannot be read",
    ("classical", "pass 2"): "an image cannot be read",
    ("classical", "one task less"): "and then of a, c",
    ("classical", "other losses"): "Fetch the batch outside the closure",
    ("classical", "lr_ub"): "differ in lr_ub (rank 0: 0.5; rank 1: 0.25",
    ("classical", "nan"): "the loss of task 'b' is not finite",
    ("fast", "pass 1"): "an image cannot be read",
    ("fast", "pass 2"): "an image cannot be read",
    ("fast", "pass 3"): "an image cannot be read",  # the look at the network, after the step
    ("fast", "lr_ub"): "differ in lr_ub (rank 0: 0.5; rank 1: 0.25",
}


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank reports."""
    folder = tmp_path_factory.mktemp("searches")
    return in_processes(everything, request.param, folder, [case[:-1] for case in CASES], list(FAILURES))


def test_parity_with_one_process(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for case, (*problems, told) in zip(CASES, rank["parity"], strict=True):
            assert problems == [], case
            assert case[-1] in told, (case, told)
        searched = [told for *_, told in rank["parity"] if "trials [1, 1, 1, 1]" not in told]
        assert len(searched) >= 5, searched  # or nothing was divided, and no decision was tested


@pytest.mark.parametrize("kind", ["classical", "fast"])
def test_one_small_message_for_every_trial(found: list[dict[str, Any]], kind: str) -> None:
    network, size = Network(), len(found)
    shared = sum(parameter.numel() for parameter in network.trunk.parameters())
    own = sum(parameter.numel() for parameter in network.heads.parameters())
    tensors, tasks = len(list(network.parameters())), len(TASKS)
    width = -(-shared // size)
    # As in a plain step: the announcement, the sum with the Gramian, the weights, own gradients.
    calls, numbers = 4, (3 + tasks) + (2 * tasks + tensors + tasks**2) + tasks + own
    if kind == "classical":  # rows are scattered, the direction is gathered
        calls, numbers = calls + tasks + 1, numbers + tasks * width * size + width
    else:  # the encoder's gradient
        calls, numbers = calls + 1, numbers + shared
    # Before the trials the settings, epsilons, losses and slopes.
    calls, numbers = calls + 1, numbers + 2 + 3 * tasks
    for rank in found:
        assert any(trials > 1 for trials, _, _ in rank["counted"][kind])
        for trials, called, sent in rank["counted"][kind][1:]:
            assert (called, sent) == (calls + trials, 8 * (numbers + trials * (1 + tasks)))


def test_what_is_wrong_on_one_rank_is_told_on_all_and_nothing_moves(found: list[dict[str, Any]]) -> None:
    for place, (case, said) in enumerate(FAILURES.items()):
        alone = case[1].startswith("pass") or case[1] == "one task less"
        for number, rank in enumerate(found):
            told = rank["failures"][place]
            assert said in told, (case, told)
            passed_on = told.startswith("RankFailed: rank 1 could not take this step")
            assert passed_on == (alone and number != 1), told


def test_a_search_may_stay_local(found: list[dict[str, Any]]) -> None:
    assert all(rank["local"] for rank in found)
