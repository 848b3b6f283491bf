"""What loggers are given, read back with TensorBoard's own reader and csv; services by stand-ins."""

from __future__ import annotations

import csv
import json
import random
import warnings

import numpy as np
import pytest
import torch

from detente.records import RunFolder, read_run, versions
from detente.training import loggers as module
from detente.training.loggers import LoggerFailed, LoggerMissing, Loggers, check_loggers

TASKS = ["left", "<right>"]


def config():
    metrics = [
        {"task": task, "name": "accuracy", "higher_is_better": True, "percent": True} for task in TASKS
    ]
    return {
        **{
            "schema": 1,
            "experiment": "mine",
            "label": "mgda (exact)",
            "method": "mgda",
            "options": {"c": 0.4},
        },
        **{"gradients": "exact", "tasks": TASKS, "metrics": metrics, "seed": 3, "versions": versions()},
        **{"main_metric": dict.fromkeys(TASKS, "accuracy"), "config": {"epochs": 2}, "command": "x"},
        "started": "2025-01-01T12:00:00+00:00",
    }


def step(number, epoch, status="ok"):
    raw = {"norms": [1.0, 2.0], "cosines": [[1.0, 0.1], [0.1, 1.0]], "minimal_cosine": 0.1}
    return {
        **{"step": number, "epoch": epoch, "names": TASKS, "losses": [0.5 * number, 2.0]},
        **{
            "weights": [0.25, 0.75],
            "status": status,
            "raw": {**raw, "condition_number": None},
            "altered": None,
        },
    }


def epoch(number):
    return {
        **{"epoch": number, "step": 10 * number, "train_loss": {"left": 1.0 / number, "<right>": 0.5}},
        "validation": {"left": {"accuracy": 0.1 * number, "loss": 0.3}},
        **{"seconds": 1.5, "learning_rate": 0.01, "refused": number, "method": {"radius": 0.2}},
    }


RESULT = {"schema": 1, "epochs": 2, "steps": 20, "metrics": {"left": {"accuracy": 0.9}}}


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def written(folder, names, steps, epochs, recorded=None, end=True):
    loggers = Loggers(names, folder, config())
    loggers.begin(recorded)
    for number in epochs:
        for row in (step(10 * number - 5, number), step(10 * number, number, "refused")):
            if row["step"] in steps:
                loggers.step(row)
        loggers.epoch(epoch(number))
    loggers.finish(RESULT) if end else loggers.close()


EXPECTED = {
    "loss/left": [(5, 2.5), (10, 5.0), (15, 7.5), (20, 10.0)],
    "loss/_right_": [(5, 2.0), (10, 2.0), (15, 2.0), (20, 2.0)],
    "weight/left": [(5, 0.25), (10, 0.25), (15, 0.25), (20, 0.25)],
    "gradients/minimal_cosine": [(n, pytest.approx(0.1)) for n in (5, 10, 15, 20)],
    "gradients/norm/_right_": [(5, 2.0), (10, 2.0), (15, 2.0), (20, 2.0)],
    "refused_step": [(5, 0.0), (10, 1.0), (15, 0.0), (20, 1.0)],
    "refused": [(10, 1.0), (20, 2.0)],
    "learning_rate": [(10, pytest.approx(0.01)), (20, pytest.approx(0.01))],
    "train_loss/left": [(10, 1.0), (20, 0.5)],
    "validation/left/accuracy": [(10, pytest.approx(0.1)), (20, pytest.approx(0.2))],
    "method/radius": [(10, pytest.approx(0.2)), (20, pytest.approx(0.2))],
    "test/left/accuracy": [(20, pytest.approx(0.9))],
}


def test_tensorboard_holds_every_number_of_the_records(tmp_path):
    written(tmp_path, ["tensorboard"], (5, 10, 15, 20), (1, 2))
    found = events(tmp_path / "tensorboard")
    assert {tag: found[tag] for tag in EXPECTED if tag != "test/left/accuracy"} == {
        tag: values for tag, values in EXPECTED.items() if tag != "test/left/accuracy"
    }
    # Once as a curve, once for the table of configurations.
    assert found["test/left/accuracy"][0] == EXPECTED["test/left/accuracy"][0]
    assert "gradients/condition_number" not in found, "null is no number"


@pytest.fixture
def halfway(tmp_path):
    """A run that was killed in its second epoch and goes on from the end of the first."""
    with RunFolder.create(tmp_path / "run", config()) as folder:
        folder.append_step(step(5, 1))
        folder.append_step(step(10, 1, "refused"))
        folder.append_epoch(epoch(1))
    return tmp_path / "run"


def test_a_resumed_run_has_no_step_twice(halfway):
    killed = Loggers(["tensorboard", "csv"], halfway, config())
    killed.begin()
    killed.step(step(5, 1))
    killed.step(step(10, 1, "refused"))
    killed.epoch(epoch(1))
    killed.step(step(15, 2))
    killed.close()
    written(halfway, ["tensorboard", "csv"], (15, 20), (2,), read_run(halfway))
    found = events(halfway / "tensorboard")
    assert found["loss/left"] == EXPECTED["loss/left"]
    assert found["train_loss/left"] == EXPECTED["train_loss/left"]
    with open(halfway / "csv" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["step"]), float(r["loss/left"])) for r in rows if r["loss/left"]] == EXPECTED["loss/left"]
    assert [float(r["validation/left/accuracy"]) for r in rows if r["validation/left/accuracy"]] == [0.1, 0.2]


class Service:
    """What keeps what it was sent."""

    sent: list
    told: list

    def __init__(self, experiment=None):
        self.experiment = experiment

    def log_metrics(self, metrics, step):
        Service.sent.append((step, metrics))

    def log_hyperparams(self, params):
        Service.told.append(params)

    def save(self):
        pass

    def finalize(self, status):
        Service.sent.append(status)


@pytest.fixture
def service(monkeypatch):
    Service.sent, Service.told = [], []
    kind = module._Kind((), "", False, lambda folder, config, book: Service())
    monkeypatch.setitem(module._KINDS, "mlflow", kind)
    return Service


def test_a_service_is_sent_every_row_once_whatever_is_killed(halfway, service):
    killed = Loggers(["mlflow"], halfway, config())
    killed.begin()
    for row in (step(5, 1), step(10, 1)):
        killed.step(row)
    killed.epoch(epoch(1))
    killed.step(step(15, 2))
    # Nothing was closed: the process was killed. The next one takes step 15 again.
    written(halfway, ["mlflow"], (15, 20), (2,), read_run(halfway))
    assert [entry if isinstance(entry, str) else entry[0] for entry in service.sent] == [
        *(5, 10, 10, 15, 20, 20, 20),
        "success",
    ]
    assert len(service.told) == 1 and service.told[0]["options/c"] == 0.4
    assert json.loads((halfway / "loggers.json").read_text()) == {
        "mlflow": {"step": 20, "epoch": 20, "result": 20}
    }


def test_a_logger_that_is_added_later_gets_everything(halfway, service):
    written(halfway, ["mlflow"], (15, 20), (2,), read_run(halfway))
    losses = [values["loss/left"] for step, values in service.sent[:-1] if "loss/left" in values]
    assert losses == [2.5, 5.0, 7.5, 10.0]


def test_a_logger_that_fails_is_told_and_left_out(tmp_path, service, monkeypatch):
    def broken(self, metrics, step):
        raise OSError("no network")

    monkeypatch.setattr(Service, "log_metrics", broken)
    loggers = Loggers(["mlflow", "csv"], tmp_path, config())
    loggers.begin()
    with pytest.warns(RuntimeWarning, match="logger mlflow failed and is left out from now on .no network."):
        loggers.step(step(5, 1))
    loggers.step(step(10, 1))
    loggers.finish(RESULT)
    assert "loss/left" in (tmp_path / "csv" / "metrics.csv").read_text()


def test_a_logger_that_does_not_start_says_so_and_the_others_are_closed(tmp_path, monkeypatch):
    def unreachable(folder, config, book):
        raise OSError("no such server")

    monkeypatch.setitem(module._KINDS, "mlflow", module._Kind((), "", False, unreachable))
    loggers = Loggers(["csv", "mlflow"], tmp_path, config())
    with pytest.raises(
        LoggerFailed, match=r"logger mlflow did not start .OSError: no such server.*--logger mlflow"
    ):
        loggers.begin()
    assert loggers._open == {}


def test_a_service_that_is_first_reached_by_the_configuration_does_not_start_either(
    tmp_path, service, monkeypatch
):
    def refused(self, values):
        raise PermissionError("wrong key")

    monkeypatch.setattr(Service, "log_hyperparams", refused)
    with pytest.raises(LoggerFailed, match=r"logger mlflow did not start .PermissionError: wrong key"):
        Loggers(["mlflow"], tmp_path, config()).begin()


def test_random_numbers_are_those_without_a_logger(tmp_path, monkeypatch):
    class Greedy(Service):
        def log_metrics(self, metrics, step):
            return random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002

    monkeypatch.setitem(module._KINDS, "mlflow", module._Kind((), "", False, lambda *_: Greedy()))
    Service.told = []
    drawn = []
    for names in ([], ["mlflow"]):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
        loggers = Loggers(names, tmp_path, config())
        loggers.begin()
        loggers.step(step(5, 1))
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))  # noqa: NPY002
    assert drawn[0] == drawn[1]


def test_names_that_become_equal_stay_apart(tmp_path):
    loggers = Loggers([], tmp_path, config())
    assert loggers._tagged({"loss/a<": 1.0, "loss/a>": 2.0, "loss/b": float("inf")}) == {
        "loss/a_": 1.0,
        "loss/a_-2": 2.0,
    }
    assert not loggers and list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name: None if name == "wandb" else object()
    )
    check_loggers(["tensorboard", "csv"])
    with pytest.raises(
        LoggerMissing, match="logger wandb needs the package wandb: pip install wandb lightning"
    ):
        check_loggers(["csv", "wandb"])


def test_a_real_run_logs_what_it_records_and_learns_the_same(tmp_path, call):
    asked = [
        "run",
        "multimnist",
        "--method",
        "mgda",
        "--gradients",
        "features",
        "--epochs",
        "2",
        "--max-steps",
        "6",
    ]
    asked += ["--batch-size", "64", "--record-steps", "3", "--threads", "1"]
    logged, plain = tmp_path / "logged", tmp_path / "plain"
    assert call(*asked, "--logger", "tensorboard", "--logger", "csv", "--out", str(logged))[0] == 0
    assert call(*asked, "--out", str(plain))[0] == 0
    run = read_run(logged)
    assert run.result["metrics"] == read_run(plain).result["metrics"]
    found = events(logged / "tensorboard")
    for task in ("left", "right"):
        accuracies = [(row["step"], row["validation"][task]["accuracy"]) for row in run.epochs]
        assert found[f"validation/{task}/accuracy"] == [
            (at, pytest.approx(value)) for at, value in accuracies
        ]
        place = run.steps[0]["names"].index(task)
        assert found[f"loss/{task}"] == [
            (row["step"], pytest.approx(row["losses"][place])) for row in run.steps
        ]
    # Once by itself and once beside the table of configurations.
    for _, value in found["test/left/accuracy"]:
        assert value == pytest.approx(run.result["metrics"]["left"]["accuracy"])
    with open(logged / "csv" / "metrics.csv", newline="") as file:
        assert {int(row["step"]) for row in csv.DictReader(file)} >= {row["step"] for row in run.steps}
    # Another choice of loggers is the same run.
    assert call(*asked, "--out", str(logged))[0] == 0


def test_a_logger_without_its_package_ends_the_command_before_anything_starts(tmp_path, call, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    code, _, err = call("run", "multimnist", "--logger", "wandb", "--out", str(tmp_path / "run"))
    assert code == 1
    assert "pip install wandb lightning" in err
    assert not (tmp_path / "run").exists()
