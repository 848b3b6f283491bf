"""`detente run toy`: what it stores of a run, and what it refuses to take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detente.experiments.toy import ToyConfig, read_paths
from detente.problems import Toy


def test_a_run_stores_paths_whose_losses_and_ends_agree(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    folder = tmp_path / "run"
    arguments = (
        "run",
        "toy",
        "--method",
        "mgda",
        "--max-steps",
        "40",
        "--points",
        "10",
        "--out",
        str(folder),
    )
    code, out, _ = call(*arguments, "--json")
    assert code == 0
    result = json.loads((folder / "result.json").read_text())
    paths = read_paths(folder)
    assert paths["steps"][0] == 0 and paths["steps"][-1] == 40
    np.testing.assert_allclose(paths["paths"][:, 0], Toy.starts)
    np.testing.assert_allclose(paths["paths"][:, -1], result["ends"])
    assert json.loads(out)["metrics"]["first"]["loss"] == pytest.approx(paths["losses"][:, -1, 0].mean())
    assert json.loads((folder / "config.json").read_text())["problem"]["scales"] == "cagrad"
    before = (folder / "result.json").read_bytes()
    assert call(*arguments)[0] == 0
    assert (folder / "result.json").read_bytes() == before, "a finished run is not repeated"


@pytest.mark.parametrize(
    "asked",
    [{"momentum": 0.5}, {"search_check": 0, "epochs": 3}, {"optimizer": "sgd"}, {"batch_size": 8}],
)
def test_what_would_have_no_effect_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the toy problem has no use for it"):
        ToyConfig(**asked)
    ToyConfig(learning_rate=0.01, seed=3, max_steps=10)
