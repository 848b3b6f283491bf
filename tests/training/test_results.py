"""What a run measures at its end, and what it leaves as it found it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from detente.data import MultiDigits, load_multimnist
from detente.experiments.multimnist import MultiMNIST, MultiMNISTConfig
from detente.records import read_run
from detente.training import train

CONFIG = MultiMNISTConfig(method="mgda", epochs=3, batch_size=64, learning_rate=0.05, record_steps=6)


@pytest.fixture(scope="module")
def digits() -> MultiDigits:
    return load_multimnist().take(200)


def run(folder: Path, digits: MultiDigits, config: MultiMNISTConfig = CONFIG) -> dict[str, Any]:
    return train(
        MultiMNIST(config, digits), config, folder, experiment="multimnist", command="test", quiet=True
    )


def test_test_data_are_read_once_and_not_before_they_are_asked_for(
    tmp_path: Path, digits: MultiDigits, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    split = MultiMNIST.split

    def watched(self: MultiMNIST, name: Any) -> Any:
        read.append(name)
        return split(self, name)

    monkeypatch.setattr(MultiMNIST, "split", watched)
    without = replace(CONFIG, test=False)
    first = run(tmp_path / "run", digits, without)
    assert first["metrics"] == {} and first["validation"] and "test" not in read
    assert read_run(tmp_path / "run").samples is None
    assert run(tmp_path / "run", digits, without) == first

    whole = run(tmp_path / "run", digits)
    assert read.count("test") == 1
    assert run(tmp_path / "run", digits) == whole and read.count("test") == 1
    assert whole == {**first, "metrics": whole["metrics"]}
    assert whole["metrics"] == run(tmp_path / "at once", digits)["metrics"]
    assert read_run(tmp_path / "run").samples is not None


def test_threads_are_set_for_the_run_alone(tmp_path: Path, digits: MultiDigits) -> None:
    before, seen = torch.get_num_threads(), []

    class Watched(MultiMNIST):
        def model(self) -> Any:
            seen.append(torch.get_num_threads())
            return super().model()

    config = replace(CONFIG, threads=before + 1, epochs=1)
    train(
        Watched(config, digits), config, tmp_path / "run", experiment="multimnist", command="test", quiet=True
    )
    assert seen == [before + 1] and torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads is 0"):
        replace(CONFIG, threads=0)
