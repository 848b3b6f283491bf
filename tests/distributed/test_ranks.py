"""Absent tasks, errors of one rank, optimizers, drift, traffic and the death of a rank, in real processes."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from parity import (
    TASKS,
    Network,
    a_hundred_steps,
    absent_tasks,
    accumulated,
    named_from_the_first_step,
    optimizers,
    traffic,
    wait_for_a_dead_rank,
    wrong_in_one_place,
)
from processes import in_processes
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

import detente


@pytest.mark.parametrize(
    ("name", "space"),
    [
        ("mgda", "exact"),
        ("aligned-mtl", "features"),
        ("graddrop", "exact"),
        ("dwa", "none"),
        ("uniform", "layer"),
    ],
)
def test_tasks_that_are_absent_on_some_ranks(tmp_path: Path, name: str, space: str) -> None:
    for problems in in_processes(absent_tasks, 2, tmp_path, name, space):
        assert problems == []


def test_each_rank_has_tasks_of_its_own(tmp_path: Path) -> None:
    for differences in in_processes(named_from_the_first_step, 2, tmp_path):
        assert max(differences) < 1e-12


@pytest.mark.parametrize(
    ("what", "here", "there"),
    [
        ("nan", "the loss of task 'b' is not finite", "the loss of task 'b' is not finite"),
        ("own nan", "own parameters of task 'b' is not finite", "own parameters of task 'b' is not finite"),
        (
            "detached",
            "task 'b' has no graph",
            "RankFailed: rank 1 could not take this step (ValueError: the loss of",
        ),
        ("new task", "task 'z' is new in this step", "RankFailed: rank 1"),
        ("samples", "samples= has -1 for task 'a'", "RankFailed: rank 1"),
        ("other model", "the ranks disagree", "the ranks disagree"),
    ],
)
def test_what_is_wrong_on_one_rank_is_told_on_all(tmp_path: Path, what: str, here: str, there: str) -> None:
    first, second = in_processes(wrong_in_one_place, 2, tmp_path, what)
    assert here in second and there in first


@pytest.mark.parametrize("kind", ["mao", "mao after pcgrad", "mtadam"])
def test_optimizers_with_moments_for_every_task(tmp_path: Path, kind: str) -> None:
    for difference in in_processes(optimizers, 2, tmp_path, kind):
        assert difference < 1e-9


@pytest.mark.parametrize("name", ["mgda", "graddrop"])
def test_micro_batches(tmp_path: Path, name: str) -> None:
    for difference in in_processes(accumulated, 2, tmp_path, name):
        assert difference < 1e-9


def test_a_hundred_steps_and_a_rank_that_drifted(tmp_path: Path) -> None:
    for (message,) in in_processes(a_hundred_steps, 2, tmp_path):
        assert message.startswith("network.module.heads.b.bias is not the same on all ranks: rank 1 differs")


def test_collectives_and_bytes(tmp_path: Path) -> None:
    """Counted by hand: float64 everywhere; A announces 3 + T numbers, the last sum holds losses, doubts and flags."""
    network = Network()
    shared = sum(parameter.numel() for parameter in network.trunk.parameters())
    own = sum(parameter.numel() for parameter in network.heads.parameters())
    tensors = len(list(network.parameters()))
    tasks = len(TASKS)
    padded = shared + shared % 2
    announce, fused = 3 + tasks, 2 * tasks + tensors
    for found in in_processes(traffic, 2, tmp_path / "exact", "exact", 12):
        # announce, T reduce-scatters, one sum with the Gramian, weights, all-gather, own.
        assert found["mgda"] == (
            1 + tasks + 1 + 1 + 1 + 1,
            8 * (announce + tasks * padded + fused + tasks**2 + tasks + padded // 2 + own),
        )
        # Whole rows: no all-gather; the Gramian is not sent, and there are no weights.
        assert found["graddrop"] == (1 + tasks + 1 + 1, 8 * (announce + tasks * shared + fused + own))
        # One backward, one sum.
        assert found["uniform"] == (1 + 1 + 1 + 1, 8 * (announce + tasks + (tasks + tensors) + shared + own))
    for found in in_processes(traffic, 2, tmp_path / "features", "features", 12):
        assert found["mgda"] == (1 + 1 + 1 + 1 + 1, 8 * (announce + fused + tasks**2 + tasks + shared + own))


def test_a_dead_rank_ends_the_others(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        in_processes(wait_for_a_dead_rank, 2, tmp_path, 1)
    assert time.monotonic() - started < 60
    assert not multiprocessing.active_children()
    assert not list(tmp_path.glob("rank-*"))


def test_alone_there_is_nothing_to_compare() -> None:
    detente.check_ranks(network=Network(), numbers=[1, 2.0, None], text="x")
    with pytest.raises(TypeError, match="thing is a object"):
        detente.check_ranks(thing=object())
    with pytest.raises(TypeError, match="not initialized"):
        detente.backward(
            {"a": torch.ones((), requires_grad=True)}, detente.create("mgda"), process_group=object()
        )
