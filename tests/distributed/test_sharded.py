"""Sharded parameters are refused by name on every rank: their gradients cannot be taken apart from their wrapper."""

from __future__ import annotations

from pathlib import Path

from processes import in_processes
from sharded import FULLY_SHARD_RUNS, refusals


def test_every_way_of_sharding_is_refused_by_name(tmp_path: Path) -> None:
    kinds = ("is a DTensor", "flat parameter of FullyShardedDataParallel", "that fully_shard keeps in shards")
    for found in in_processes(refusals, 2, tmp_path):
        assert len(found) == (30 if FULLY_SHARD_RUNS else 18)
        for case, told in found.items():
            assert told.startswith("ValueError: a parameter of shape ("), (case, told)
            assert any(kind in told for kind in kinds), (case, told)
            assert "Use DistributedDataParallel" in told and "features= does not help" in told
            if case.startswith("flat"):
                assert kinds[1] in told, (case, told)
