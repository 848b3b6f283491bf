"""Several processes give the gradients of one process with the whole batch, for every registered method."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity import compare_all
from processes import in_processes


@pytest.mark.parametrize(
    ("size", "wrapped", "even"),
    [(2, False, True), (2, True, False), pytest.param(4, False, False, marks=pytest.mark.slow)],
)
def test_every_method_in_every_space(tmp_path: Path, size: int, wrapped: bool, even: bool) -> None:
    for problems in in_processes(compare_all, size, tmp_path, wrapped, even):
        assert problems == []
