"""Embeddings with sparse gradients on several processes: no rank loses another rank's rows."""

from __future__ import annotations

from pathlib import Path

from processes import in_processes
from sparse_tables import looked_up


def test_every_rank_has_the_rows_of_all(tmp_path: Path) -> None:
    for rank in in_processes(looked_up, 2, tmp_path / "sparse"):
        assert max(rank.values()) < 1e-6, rank
