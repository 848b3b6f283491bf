"""Problems of the user's own: a class or a training function in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detente.experiments import UnknownExperiment, find
from detente.records import Metric, read_run
from detente.training.tensors import OneTask, TensorProblem

FUNCTION = '''
"""A training function."""
import random
import numpy as np
import torch
from detente.experiments import training_function
from detente.records import Metric

@training_function([Metric("a", "error", False, False), Metric("b", "error", False, False)], (0.5, 0.1))
def train(method, config):
    """Draw some numbers."""
    values = [config.learning_rate, random.random(), float(np.random.rand()), float(torch.rand(()))]
    tasks = ("a", "b") if config.task == "all" else (config.task,)
    # With an own learning rate of 0.5 nothing is learned.
    error = float("nan") if config.learning_rate == 0.5 else sum(values) + torch.get_num_threads()
    return {split: {task: {"error": error} for task in tasks} for split in ("validation", "test")}

@training_function([Metric("a", "error", False, False)])
def forgets(method, config):
    return {"validation": {"a": {"error": 1.0}}}

@training_function([Metric("a", "error", False, False)])
def nothing(method, config):
    pass
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FUNCTION)
    return path


class Pair(TensorProblem):
    """Two targets."""

    metrics = (
        Metric("x", "error", False, False),
        Metric("y", "right", True, True),
        Metric("y", "loss", False, False),
    )

    def data(self, name):  # type: ignore[no-untyped-def]
        rows = {"train": 7, "validation": 5, "test": 3}[name]
        x = torch.arange(2.0 * rows).reshape(rows, 2)
        return x, {"x": x[:, 0], "y": (x[:, 1] > 4).long()}

    def model(self):  # type: ignore[no-untyped-def]
        return torch.nn.Linear(2, 3)

    def losses(self, output, labels):  # type: ignore[no-untyped-def]
        return {
            "x": (output[:, 0] - labels["x"]).square().mean(),
            "y": torch.nn.functional.cross_entropy(output[:, 1:], labels["y"]),
        }

    def scores(self, output, labels):  # type: ignore[no-untyped-def]
        return {
            "x": {"error": (output[:, 0] - labels["x"]).abs()},
            "y": {"right": (output[:, 1:].argmax(1) == labels["y"]).float(), "loss": output[:, 1]},
        }


# ---- tensors


def test_metrics_are_means_over_all_examples_whatever_the_batches() -> None:
    problem = Pair()
    network = problem.model()
    rows = problem.split("train")
    whole, parts = problem.meter(), problem.meter()
    with torch.no_grad():
        for meter, sizes in ((whole, [7]), (parts, [3, 3, 1])):
            for indices in torch.arange(7).split(sizes):
                inputs, labels = rows.batch(indices)
                meter.update(network(inputs), labels)
    assert whole.compute()["y"].keys() == {"right", "loss"}
    for task, values in whole.compute().items():
        assert parts.compute()[task] == pytest.approx(values, rel=1e-6)
    inputs, labels = rows.batch(torch.arange(7))
    error = (network(inputs)[:, 0] - labels["x"]).abs().mean().detach()
    assert whole.compute()["x"]["error"] == pytest.approx(float(error), rel=1e-6)


def test_one_task_of_a_problem_keeps_data_and_network() -> None:
    one = OneTask(Pair(), "y")
    assert one.tasks == ("y",) and one.main_metric == {"y": "right"}
    assert [metric.name for metric in one.metrics] == ["right", "loss"]
    inputs, labels = one.split("test").batch(torch.arange(3))
    output = one.model()(inputs)
    assert set(one.losses(output, labels)) == {"y"}
    meter = one.meter()
    meter.update(output.detach(), labels)
    assert set(meter.compute()) == {"y"}
    with pytest.raises(ValueError, match="'z'; the tasks are x, y"):
        OneTask(Pair(), "z")


def test_mistakes_in_a_problem_are_named() -> None:
    class Short(Pair):
        def data(self, name):  # type: ignore[no-untyped-def]
            x, labels = super().data(name)
            return x, {**labels, "y": labels["y"][:2]}

    class Mean(Pair):
        def scores(self, output, labels):  # type: ignore[no-untyped-def]
            return {"x": {"error": torch.tensor(1.0)}}

    with pytest.raises(ValueError, match="task 'y' has 2 labels for 7 inputs"):
        Short().split("train")
    inputs, labels = Pair().split("test").batch(torch.arange(3))
    with pytest.raises(ValueError, match=r"'error' of task 'x'.*3 examples; found shape \(\)"):
        Mean().meter().update(Pair().model()(inputs), labels)
    with pytest.raises(ValueError, match=r"define features\(output\)"):
        Pair().features(torch.zeros(3))


# ---- files


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere.py:Mine", "does not exist"),
        ("{file}:Mine", "no problem 'Mine'"),
        ("{file}:FUNCTION", "no problem 'FUNCTION'"),
        ("{file}:random", "no problem 'random'"),
    ],
)
def test_what_is_no_problem_is_told(file: Path, name: str, told: str) -> None:
    with pytest.raises(UnknownExperiment, match=told):
        find(name.format(file=file))


def test_a_class_gets_the_configuration_only_if_it_asks_for_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "class Plain:\n    tasks = ('a',)\n    model = split = losses = meter = None\n"
        "    def __init__(self, size=3): self.size = size\n"
        "class Told(Plain):\n    def __init__(self, config): self.size = config.batch_size\n"
    )
    for name, size in (("Plain", 3), ("Told", 77)):
        experiment = find(f"{path}:{name}")
        assert experiment.build(experiment.config(batch_size=77)).size == size


# ---- training functions


def test_a_run_of_a_function_is_recorded_and_depends_on_its_seed_alone(
    file: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    found = {}
    for name, seed in (("one", 1), ("two", 2), ("again", 1)):
        torch.rand(3)  # what ran before must not matter
        arguments = ["run", f"{file}:train", "--seed", str(seed), "--out", str(tmp_path / name), "--json"]
        code, out, _ = call(*arguments, "--threads", "1")
        assert code == 0
        found[name] = json.loads(out)["metrics"]["a"]["error"]
    assert found["one"] == found["again"] != found["two"]
    run = read_run(tmp_path / "one")
    assert run.config["problem"]["function"] == "train"
    assert "kept back" in run.config["problem"]["test data"]
    assert run.finished


def test_test_data_are_kept_back_until_they_are_asked_for(
    file: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    arguments = ["run", f"{file}:train", "--out", str(tmp_path / "run"), "--json"]
    _, out, _ = call(*arguments, "--no-test")
    assert json.loads(out)["metrics"] == {}
    times = (tmp_path / "run" / "withheld.json").stat().st_mtime_ns
    _, out, _ = call(*arguments)
    assert json.loads(out)["metrics"]["b"]["error"] > 0
    assert (tmp_path / "run" / "withheld.json").stat().st_mtime_ns == times, "it is not trained again"


@pytest.mark.parametrize(
    ("name", "told"),
    [("forgets", "returned no 'error' of task 'a' for test data"), ("nothing", "returned NoneType")],
)
def test_what_a_function_must_return_is_told(
    file: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]], name: str, told: str
) -> None:
    code, _, err = call("run", f"{file}:{name}", "--out", str(tmp_path / "run"))
    assert code == 1
    assert told in err and "return {'validation'" in err
    assert not (tmp_path / "run" / "result.json").exists()


def test_one_task_of_a_function(
    file: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    arguments = ["run", f"{file}:train", "--out", str(tmp_path / "run"), "--json", "--task"]
    _, out, _ = call(*arguments, "b")
    assert set(json.loads(out)["metrics"]) == {"b"}
    code, _, err = call(*arguments, "c")
    assert code != 0 and "'c'; the tasks are a, b" in err


def test_a_function_that_diverges_is_left_out_of_the_choice(
    file: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    arguments: list[Any] = ["sweep", f"{file}:train", "--methods", "uniform", "--trials", "2", "--seeds", "2"]
    code, out, _ = call(*arguments, "--extend", "0", "--out", str(tmp_path / "s"), "--json")
    found = json.loads(out)
    assert code == 0
    assert {one["choice"]["learning_rate"] for one in found["contenders"]} == {0.1}
    assert {one["choice"]["failed"] for one in found["contenders"]} == {1}
    assert any("kept back" in sentence for sentence in found["conditions"])
