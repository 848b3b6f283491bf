"""Weights for use outside: a plain state_dict in a safetensors file, the same network as the run's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from detente.cli.export import best_epoch
from detente.experiments import find
from detente.records import Run, read_run
from detente.training import evaluate
from detente.training.checkpoint import load, weights_file

TINY = f"{Path(__file__).resolve().parents[1] / 'sweeps' / 'tiny.py'}:Tiny"
QUICK = ["--epochs", "4", "--batch-size", "16", "--learning-rate", "0.1"]


@pytest.mark.parametrize("later", [False, True])
def test_a_fresh_network_with_the_exported_weights_measures_the_same(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]], later: bool
) -> None:
    file = tmp_path / "weights.safetensors"
    arguments = ["run", TINY, *QUICK, "--out", str(tmp_path / "run"), "--json"]
    code, out, _ = call(*arguments, *([] if later else ["--export", str(file)]))
    assert code == 0
    metrics = json.loads(out)["metrics"]
    if later:
        assert not file.exists()
        assert call("evaluate", str(tmp_path / "run"), "--export", str(file))[0] == 0
    problem = find(TINY).build(find(TINY).config())
    network = problem.model()
    before = evaluate(problem, network, "test")
    network.load_state_dict(load_file(file))
    assert evaluate(problem, network, "test") == metrics != before
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    assert about["method"] == "uniform" and "validation data" in about["rule"]
    assert int(about["epoch"]) in read_run(tmp_path / "run").result["selected_epochs"]  # type: ignore[index]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_of_several_selected_epochs_the_best_on_validation_data_is_exported(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    file = tmp_path / "weights.safetensors"
    arguments = ["--selection", "last-k", "--selection-k", "3", "--out", str(tmp_path / "run")]
    assert call("run", TINY, *QUICK, *arguments, "--export", str(file))[0] == 0
    run = read_run(tmp_path / "run")
    goodness = {
        row["epoch"]: row["validation"]["sign"]["accuracy"] - row["validation"]["sum"]["error"]
        for row in run.epochs[1:]
    }
    best = max(goodness, key=lambda epoch: goodness[epoch])
    for name, tensor in load(weights_file(run.path, best)).items():
        assert torch.equal(load_file(file)[name], tensor)


def test_an_epoch_that_diverged_is_not_the_best(tmp_path: Path) -> None:
    config = {
        "tasks": ["a"],
        "main_metric": {"a": "loss"},
        "metrics": [{"task": "a", "name": "loss", "higher_is_better": False, "percent": False}],
    }
    run = Run(tmp_path, config, {"selected_epochs": [2, 3, 4]})
    values: list[Any] = [0.1, None, 2.0, 1.0]
    run.__dict__["epochs"] = tuple(
        {"epoch": number, "validation": {"a": {"loss": value}}} for number, value in enumerate(values, 1)
    )
    assert best_epoch(run) == 4


@pytest.mark.parametrize(
    ("experiment", "file", "told"),
    [
        (TINY, "weights.pt", "weights.safetensors"),
        (TINY, "nowhere/weights.safetensors", "nowhere"),
        ("toy", "weights.safetensors", "keeps no weights"),
    ],
)
def test_what_cannot_be_exported_is_told_before_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., tuple[int, str, str]],
    experiment: str,
    file: str,
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = call("run", experiment, "--export", file)
    assert code == 2
    assert told in err
    assert not list(tmp_path.iterdir())
