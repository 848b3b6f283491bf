"""Loaded states with absent tasks, accumulations left by an error, options that differ between the ranks."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from corners import ended_by_an_error, everything
from processes import in_processes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks report."""
    return in_processes(everything, 2, tmp_path_factory.mktemp("corners"))


def test_a_rank_that_lacks_a_task_right_after_loading(found: list[dict[str, Any]]) -> None:
    first, second = (rank["loading"] for rank in found)
    assert "goes on from a saved state, and task 'b' is absent" in first["told"]
    assert second["told"].startswith(
        "RankFailed: rank 0 could not take this step (ValueError: this method goes on"
    )
    for rank in (first, second):
        assert rank["untouched"]
        assert rank["difference"] < 1e-9  # with the parameters named


def test_an_accumulation_left_by_an_error_on_one_rank(found: list[dict[str, Any]]) -> None:
    first, second = (rank["left"] for rank in found)
    assert second["own"] == "OSError: an image cannot be read"
    for rank in (first, second):
        assert rank["next"].startswith("ValueError: the ranks are not at the same step")
        assert "differ in micro-batch (rank 0: 2 of 2; rank 1: 1 of 2)" in rank["next"]
        assert rank["untouched"] and rank["afterwards"] == "no error"


def test_a_process_that_ends_within_an_accumulation(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):  # the harness waits for a report that such processes do not write
        in_processes(ended_by_an_error, 2, tmp_path, str(tmp_path))
    first, second = (pickle.loads((tmp_path / f"end-{rank}").read_bytes()) for rank in range(2))
    assert second[0] == "OSError: an image cannot be read"
    message, seconds, untouched, open_still = first
    assert message != "no error" and seconds < 30, first
    assert untouched and not open_still


def test_tasks_beside_what_is_shared(found: list[dict[str, Any]]) -> None:
    for rank in (rank["beside"] for rank in found):
        assert rank["difference"] < 1e-12
        assert rank["nowhere"].startswith(
            "ValueError: no loss reaches any of the 4 parameters named in shared="
        )
        assert rank["untouched"]


def test_options_that_differ_between_the_ranks(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for case, told in rank["options"].items():
            assert told.startswith(
                "ValueError: the ranks are not at the same step, or ask for different ones"
            ), told
            assert f"differ in {'method' if case == 'method' else 'options'} (rank 0: " in told
            assert ".grad was written" not in told
