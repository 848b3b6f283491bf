"""What a step costs: known waits and known tensors come out; a sweep measures once, and says what it could not."""

from __future__ import annotations

import csv
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sweeping import HERE, QUICK, TINY

from detente.training import TrainingConfig
from detente.training.cost import measure_cost

SLOW, FAST = 0.012, 0.003
ENTRIES = 1_000_000


def build(config: TrainingConfig) -> Any:
    """The tiny problem, which waits at every step and holds four megabytes for a moment if told so."""
    spec = importlib.util.spec_from_file_location("tiny_for_cost", HERE / "tiny.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Waiting(module.Tiny):  # type: ignore[misc, name-defined]
        def losses(self, output: Any, labels: Any) -> dict[str, torch.Tensor]:
            time.sleep(SLOW if config.seed == 1 else FAST)
            if config.seed == 1:
                torch.zeros(ENTRIES)
            found: dict[str, torch.Tensor] = super().losses(output, labels)
            return found

    return Waiting()


def test_known_waits_and_known_tensors_come_out() -> None:
    slow, fast = (TrainingConfig(batch_size=16, seed=seed, threads=1) for seed in (1, 0))
    random = torch.random.get_rng_state()
    found = measure_cost(build, slow, fast, turns=5, seconds=0.05)
    assert torch.equal(random, torch.random.get_rng_state())
    # A step takes its wait and some work of its own, the same for both.
    assert SLOW < found.seconds_per_step < 3 * SLOW
    assert 1.5 < found.relative < SLOW / FAST
    assert found.low <= found.relative <= found.high
    assert 4 * ENTRIES <= found.peak_memory_bytes < 4.1 * ENTRIES
    assert found.processor_share < 0.9, "who sleeps has no processor"
    other_way = measure_cost(build, fast, slow, turns=3, seconds=0.05)
    assert other_way.peak_memory_bytes < 100_000
    assert other_way.relative < 0.7


def test_a_sweep_measures_once_and_tells_it(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    folder = tmp_path / "sweep"
    asked = ["sweep", TINY, "--methods", "uniform", "mgda", *QUICK[:-1], "--cost", "--out", str(folder)]
    code, out, _ = call(*asked, "--json")
    assert code == 0
    outcome = json.loads((folder / "outcome.json").read_text())
    names = [one["name"] for one in outcome["contenders"]]
    assert (
        names == list(outcome["cost"]) == ["uniform", "mgda (exact)", "single task: sum", "single task: sign"]
    )
    assert outcome["cost"]["uniform"]["low"] < 1.5, "uniform beside uniform"
    assert outcome["cost"]["mgda (exact)"]["relative"] > 1.1, "two backwards beside one"
    assert any("in turns with steps of the method uniform" in told for told in outcome["conditions"])
    with open(folder / "outcome.csv", newline="") as file:
        rows = {row["contender"]: row for row in csv.DictReader(file)}
    assert (
        float(rows["mgda (exact)"]["seconds relative to uniform"])
        == outcome["cost"]["mgda (exact)"]["relative"]
    )

    before = (folder / "cost.json").read_bytes()
    assert call(*asked)[0] == 0
    assert (folder / "cost.json").read_bytes() == before, "what is known is not measured again"
    (folder / "cost.json").unlink()
    code, out, _ = call(*asked)
    assert code == 0 and "cost" in out
    assert (folder / "cost.json").read_bytes() != before
    (folder / "cost.json").write_text("{")
    code, _, err = call(*asked)
    assert code == 1
    assert "cost.json" in err and "delete it" in err


def test_a_training_function_has_no_steps_to_measure(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    file = Path(__file__).parents[2] / "examples" / "training_function.py"
    name = f"{file}:train"
    folder = tmp_path / "sweep"
    code, _, err = call(
        *("sweep", name, "--methods", "uniform", "--no-singles", "--trials", "1", "--lrs", "0.01"),
        *("--extend", "0", "--seeds", "1", "--epochs", "1", "--out", str(folder)),
    )
    assert code == 0, err
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["cost"] == {}
    assert any(told.startswith("No cost of uniform: what trains is not") for told in outcome["conditions"])
