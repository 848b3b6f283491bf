"""The cost model beside real processes: collectives of every registered method in every space, and peaks of memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))  # benchmarks/ is beside the tests, not installed

from model_steps import compared
from processes import in_processes

import detente
from benchmarks.ranks import MEMORY_TASKS, Layers, peak_ratios


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_collectives_of_every_method_in_every_space(tmp_path: Path, ranks: int) -> None:
    for told in in_processes(compared, ranks, tmp_path):
        assert {case: counted for case, (counted, _) in told.items()} == {
            case: model for case, (_, model) in told.items()
        }
        spaces = {(name, space) for name, info in detente.methods().items() for space in info.spaces}
        assert {tuple(case.split(", ")) for case in told} >= spaces


@pytest.mark.slow
def test_peak_of_a_step() -> None:
    """Tensors held at once on two ranks, beside the model; gloo's own copies of scattered rows come on top."""
    shared, tasks = Layers(160_000, 1).sizes(1).shared, MEMORY_TASKS
    for step, (on_paper, counted) in peak_ratios(2, 160_000).items():
        copies = 0
        if step.startswith("mgda, exact"):
            copies = 2 * 4 * shared * (tasks if "low" in step else 1)
        assert 0.94 * on_paper <= counted <= 1.06 * on_paper + copies, step
