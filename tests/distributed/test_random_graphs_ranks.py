"""Random graphs of modules on two processes: every mode against the sequential reference, tasks absent and not."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import in_processes
from random_graphs import many


@pytest.mark.parametrize("count", [20, pytest.param(60, marks=pytest.mark.slow)])
def test_every_mode_on_two_processes(tmp_path: Path, count: int) -> None:
    for rank in in_processes(many, 2, tmp_path, count):
        for mode, done in rank.items():
            assert done["all tasks"] >= count // 10, (mode, done)
            assert mode == "features" or done["absent tasks"] >= count // 10, (mode, done)
