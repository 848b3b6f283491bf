"""The loop on real digits: resume bit for bit, records, refusals, errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import detente
from detente.data import MultiDigits, load_multimnist
from detente.experiments.multimnist import MultiMNIST, MultiMNISTConfig
from detente.methods.wrappers import EarlyTerminationWarning
from detente.records import ConfigMismatch, UnwritableFolder, read_run
from detente.training import checkpoint, loop, train

CONFIG = MultiMNISTConfig(method="mgda", epochs=3, batch_size=64, learning_rate=0.05, record_steps=6)


@pytest.fixture(scope="module")
def digits() -> MultiDigits:
    return load_multimnist().take(200)  # 4 steps per epoch, the last one short


def run(
    folder: Path, digits: MultiDigits, config: MultiMNISTConfig = CONFIG, **options: Any
) -> dict[str, Any]:
    options = {"experiment": "multimnist", "command": "test", "quiet": True, **options}
    return train(MultiMNIST(config, digits), config, folder, **options)


def without_seconds(rows: Any) -> Any:
    if isinstance(rows, dict):
        return {key: without_seconds(value) for key, value in rows.items() if "seconds" not in key}
    return [without_seconds(row) for row in rows] if isinstance(rows, (list, tuple)) else rows


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / checkpoint.FILE)["model"]


def assert_same_run(one: Path, other: Path) -> None:
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[name]), name
    first, second = read_run(one), read_run(other)
    assert without_seconds(first.epochs) == without_seconds(second.epochs)
    assert without_seconds(first.steps) == without_seconds(second.steps)
    assert first.result is not None and second.result is not None
    assert first.result["metrics"] == second.result["metrics"]
    assert first.result["selected_epochs"] == second.result["selected_epochs"]


class Killed(Exception):
    pass


# What else may move the parameters, in place of a combined gradient and one of torch's optimizers.
STEPS: dict[str, dict[str, Any]] = {
    "mao": {"method": "uniform", "optimizer": "mao", "learning_rate": 1e-3, "balance": True},
    "adam, watched": {"method": "uncertainty", "optimizer": "adam", "learning_rate": 1e-3, "balance": True},
    "mao after pcgrad": {"method": "pcgrad", "optimizer": "mao", "learning_rate": 1e-3},
    "mtadam": {"method": "uniform", "optimizer": "mtadam", "learning_rate": 1e-3},
    "backtracking": {"search": "backtracking", "momentum": 0.0, "learning_rate": 1.0},
    "fast": {"search": "fast", "gradients": "features", "momentum": 0.0, "learning_rate": 1.0},
    "parts": {"tasks": "left", "micro_batches": 4},
}


# Before any checkpoint, at an epoch's end, and for every method and every other kind of step within an epoch.
@pytest.mark.parametrize(
    ("last", "what"),
    [(1, "mgda"), (8, "mgda"), *((6, what) for what in [*sorted(detente.methods()), *STEPS])],
)
def test_an_interrupted_run_ends_like_an_undisturbed_one(
    tmp_path: Path, digits: MultiDigits, monkeypatch: pytest.MonkeyPatch, last: int, what: str
) -> None:
    # A checkpoint after every step.
    config = replace(CONFIG, checkpoint_seconds=0.0, **STEPS.get(what, {"method": what}))
    run(tmp_path / "whole", digits, config)
    step = loop._Run.run_step

    def stop(self: Any, *indices: torch.Tensor) -> None:
        if self.at.step == last:
            raise Killed
        step(self, *indices)

    monkeypatch.setattr(loop._Run, "run_step", stop)
    if last == 1:
        monkeypatch.setattr(loop._Run, "save", lambda self: None)
    with pytest.raises(Killed):
        run(tmp_path / "halves", digits, config)
    monkeypatch.undo()
    run(tmp_path / "halves", digits, config)
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_other_steps_tell_what_they_did(tmp_path: Path, digits: MultiDigits) -> None:
    for name in ("mao", "fast"):
        run(tmp_path / name, digits, replace(CONFIG, record_steps=2, **STEPS[name]))
    mao, fast = (read_run(tmp_path / name) for name in ("mao", "fast"))
    assert [run.config["label"] for run in (mao, fast)] == ["mao", "mgda (features), fast search"]
    balance = mao.steps[0]["balance"]
    assert balance["tasks"] == ["left", "right"] and balance["layers"][0] == "conv1.weight"
    searched = fast.steps[0]["search"]
    assert searched["lr_ub"] == 1.0 and searched["eta"] == 2.0 ** -(searched["trials"] - 1)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "mao"])
def test_the_contribution_of_a_single_task_is_the_whole_update(
    tmp_path: Path, digits: MultiDigits, optimizer: str
) -> None:
    changes = {"tasks": "left", "optimizer": optimizer, "method": "uniform", "learning_rate": 1e-3}
    before = None
    for steps in (2, 3):
        config = replace(CONFIG, balance=True, max_steps=steps, record_steps=100, selection="last", **changes)
        run(tmp_path / str(steps), digits, config)
        (weights,) = (tmp_path / str(steps)).glob("weights*")
        after = checkpoint.load(weights)
        if before is not None:
            recorded = read_run(tmp_path / str(steps)).steps[-1]["balance"]
            moved = [(after[name] - before[name]).abs().mean().item() for name in recorded["layers"]]
            assert [row[0] for row in recorded["contributions"]] == pytest.approx(moved, rel=1e-4)
            assert min(moved) > 1e-5
        before = after


def test_watching_the_balance_changes_nothing_and_a_loss_has_its_factor(
    tmp_path: Path, digits: MultiDigits
) -> None:
    config = replace(CONFIG, optimizer="adam", method="uniform", gradients="features", epochs=2, measure=True)
    plain = run(tmp_path / "plain", digits, config)
    watched = run(tmp_path / "watched", digits, replace(config, balance=True, record_steps=100))
    assert plain["metrics"] == watched["metrics"]
    assert watched["seconds_per_step"] is None and plain["seconds_per_step"] > 0
    run(
        tmp_path / "factor",
        digits,
        replace(config, balance=True, record_steps=100, loss_factor=("left=100",)),
    )
    rows = [read_run(tmp_path / name).steps[0] for name in ("watched", "factor")]
    assert rows[1]["losses"] == pytest.approx([100 * rows[0]["losses"][0], rows[0]["losses"][1]])
    for one, other in zip(*(row["balance"]["gradients"] for row in rows), strict=True):
        assert other == pytest.approx([100 * one[0], one[1]], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"search": "fast", "gradients": "features"}, "momentum 0"),
        ({"search": "fast", "momentum": 0.0}, "needs gradients features"),
        ({"optimizer": "mao", "method": "dwa"}, "leave method dwa out"),
        ({"optimizer": "mtadam", "method": "pcgrad"}, "leave method pcgrad out, or use optimizer mao"),
        ({"optimizer": "mtadam", "method": "dwa"}, "leave method dwa out, or use optimizer mao"),
        ({"optimizer": "mao", "gradients": "features"}, "use gradients exact"),
        ({"optimizer": "mao", "measure": True}, "leave measure out"),
        ({"micro_batches": 2}, "tasks left or right"),
        ({"balance": True}, "use optimizer adam"),
        (
            {"balance": True, "search": "fast", "gradients": "features", "momentum": 0.0},
            "without a search",
        ),
        ({"balance": True, "optimizer": "adam", "method": "graddrop"}, "graddrop gives no weight"),
        ({"balance": True, "optimizer": "adam", "scale": "sum"}, "use scale native"),
        ({"loss_factor": ("middle=2",)}, "unknown task 'middle'"),
        ({"loss_factor": ("left",)}, "task=number"),
        ({"loss_factor": ("left=inf",)}, "finite"),
    ],
)
def test_steps_that_do_not_go_together_are_refused(
    tmp_path: Path, digits: MultiDigits, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        run(tmp_path, digits, replace(CONFIG, **changes))


def test_parts_of_a_batch_play_the_tasks(tmp_path: Path, digits: MultiDigits) -> None:
    run(tmp_path, digits, replace(CONFIG, **STEPS["parts"]))
    stored = read_run(tmp_path)
    assert stored.steps[0]["names"] == ["part 1", "part 2", "part 3", "part 4"]
    assert stored.config["tasks"] == ["left"] and set(stored.epochs[0]["validation"]) == {"left"}


def test_a_guard_tells_each_epoch_what_it_refused(tmp_path: Path, digits: MultiDigits) -> None:
    run(tmp_path, digits, replace(CONFIG, method="adaptive-mgda", option=("scale=0.5",)))
    rows = read_run(tmp_path).epochs
    assert (
        rows[0]["refused"] == 0 and rows[0]["method"]["refused_share"] == 0
    )  # the first epoch is not guarded
    for row in rows:
        assert row["method"]["refused_share"] == row["refused"] / 4
        assert set(row["method"]["epsilon_squared"]) == {"left", "right"}


def test_a_guard_of_the_shared_part_alone_refuses_no_step_and_says_what_it_refused(
    tmp_path: Path, digits: MultiDigits
) -> None:
    option = ("epsilon=1000.0", "refuse=shared")
    with pytest.warns(EarlyTerminationWarning):
        run(tmp_path, digits, replace(CONFIG, epochs=1, method="inexact-mgda", option=option))
    (row,) = read_run(tmp_path).epochs
    assert row["refused"] == 0 and row["method"]["refused_share"] == 1.0


def test_the_seed_decides_everything_and_the_surroundings_nothing(
    tmp_path: Path, digits: MultiDigits
) -> None:
    torch.manual_seed(1)
    run(tmp_path / "a", digits)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    run(tmp_path / "b", digits)
    assert torch.equal(torch.get_rng_state(), state), "training must leave the caller's random state alone"
    assert_same_run(tmp_path / "a", tmp_path / "b")
    run(tmp_path / "c", digits, replace(CONFIG, seed=1))
    assert not torch.equal(weights(tmp_path / "a")["conv1.weight"], weights(tmp_path / "c")["conv1.weight"])


def test_records_tell_the_whole_run(tmp_path: Path, digits: MultiDigits) -> None:
    result = run(tmp_path, digits)
    stored = read_run(tmp_path)
    assert [row["epoch"] for row in stored.epochs] == [1, 2, 3]
    assert [row["step"] for row in stored.epochs] == [4, 8, 12]
    assert [row["step"] for row in stored.steps] == [1, 3, 5, 7, 9, 11]  # every second of twelve
    row = stored.steps[0]
    assert row["names"] == ["left", "right"] and row["space"] == "exact" and len(row["raw"]["norms"]) == 2
    assert result["steps"] == 12 and result["epochs"] == 3
    assert (
        stored.config["versions"]["torch"] == torch.__version__.split("+")[0]
        or stored.config["versions"]["torch"] == torch.__version__
    )
    assert stored.samples is not None and stored.samples.images.shape == (12, 28, 28)
    assert result["peak_memory_bytes"] > 1e8  # torch alone is more
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))


def test_training_loss_is_the_mean_over_examples_not_over_batches(
    tmp_path: Path, digits: MultiDigits
) -> None:
    config = replace(CONFIG, epochs=1, record_steps=100, learning_rate=1e-12, dropout=0.0)
    run(tmp_path, digits, config)
    stored = read_run(tmp_path)
    sizes = [64, 64, 64, 8]
    for position, task in enumerate(("left", "right")):
        expected = sum(n * row["losses"][position] for n, row in zip(sizes, stored.steps, strict=True)) / 200
        assert stored.epochs[0]["train_loss"][task] == pytest.approx(expected, rel=1e-12)


class Halves(MultiMNIST):
    """Every second batch lacks the right digit."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batches = 0

    def losses(self, output: Any, labels: Any) -> dict[str, torch.Tensor]:
        losses = super().losses(output, labels)
        self.batches += 1
        return losses if self.batches % 2 else {"left": losses["left"]}


def test_training_loss_is_over_the_examples_of_the_batches_that_had_the_task(
    tmp_path: Path, digits: MultiDigits, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, epochs=1, record_steps=100, checkpoint_seconds=0.0)

    def halves(folder: Path) -> None:
        train(Halves(config, digits), config, folder, experiment="x", command="x", quiet=True)

    halves(tmp_path / "whole")
    stored = read_run(tmp_path / "whole")
    sizes = [64, 64, 64, 8]
    (row,) = stored.epochs
    left = sum(n * step["losses"][0] for n, step in zip(sizes, stored.steps, strict=True)) / 200
    right = sum(64 * step["losses"][1] for step in stored.steps[::2]) / 128
    assert [step["names"] for step in stored.steps] == [["left", "right"], ["left"]] * 2
    assert row["train_loss"] == pytest.approx({"left": left, "right": right}, rel=1e-12)
    # A checkpoint of before counted the examples of all tasks together, and is still read.
    save = checkpoint.save

    def older(path: Path, state: dict[str, Any]) -> None:
        if "position" in state:
            position = state["position"]
            state = {**state, "position": {**position, "examples": max([0, *position["examples"].values()])}}
        save(path, state)

    step = loop._Run.run_step

    def stop(self: Any, *indices: torch.Tensor) -> None:
        if self.at.step == 2:
            raise Killed
        step(self, *indices)

    monkeypatch.setattr(checkpoint, "save", older)
    monkeypatch.setattr(loop._Run, "run_step", stop)
    with pytest.raises(Killed):
        run(tmp_path / "older", digits, config)
    monkeypatch.undo()
    assert isinstance(checkpoint.load(tmp_path / "older" / checkpoint.FILE)["position"]["examples"], int)
    run(tmp_path / "older", digits, config)
    run(tmp_path / "newer", digits, config)
    assert_same_run(tmp_path / "older", tmp_path / "newer")


def test_the_selected_weights_are_tested(tmp_path: Path, digits: MultiDigits) -> None:
    config = replace(CONFIG, epochs=4, selection="last-k", selection_k=2)
    result = run(tmp_path, digits, config)
    assert result["selected_epochs"] == [3, 4]
    problem = MultiMNIST(config, digits)
    by_hand = []
    for epoch in (3, 4):
        model = problem.model()
        model.load_state_dict(checkpoint.load(checkpoint.weights_file(tmp_path, epoch)))
        model.eval()
        images, labels = digits.test.batch(slice(None))
        with torch.no_grad():
            guess = model(images).predictions["left"].argmax(dim=1)
        by_hand.append((guess == labels["left"]).double().mean().item())
    assert result["metrics"]["left"]["accuracy"] == pytest.approx(sum(by_hand) / 2, abs=1e-12)
    assert sorted(p.name for p in tmp_path.glob("weights*")) == [
        "weights-epoch-0003.pt",
        "weights-epoch-0004.pt",
    ]


def test_delta_m_needs_its_baselines_before_anything_is_written(tmp_path: Path, digits: MultiDigits) -> None:
    config = replace(CONFIG, selection="delta-m", baseline=("left=0.9",))
    with pytest.raises(ValueError, match="--baseline right=VALUE"):
        run(tmp_path / "run", digits, config)
    assert not (tmp_path / "run").exists()
    result = run(tmp_path / "run", digits, replace(config, baseline=("left=0.9", "right=0.8")))
    values = [row["validation"] for row in read_run(tmp_path / "run").epochs]
    lost = [v["left"]["accuracy"] / 0.9 + v["right"]["accuracy"] / 0.8 for v in values]
    assert result["selected_epochs"] == [lost.index(max(lost)) + 1]


def test_a_finished_run_is_not_repeated(
    tmp_path: Path, digits: MultiDigits, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path, digits)
    monkeypatch.setattr(loop._Run, "run_step", lambda *_: pytest.fail("trained again"))
    assert run(tmp_path, digits) == first


def test_learning_rate_halves(tmp_path: Path, digits: MultiDigits) -> None:
    run(tmp_path, digits, replace(CONFIG, epochs=5, halve_every=2))
    rates = [row["learning_rate"] for row in read_run(tmp_path).epochs]
    assert rates == [0.05, 0.05, 0.025, 0.025, 0.0125]


def test_max_steps_ends_within_an_epoch(tmp_path: Path, digits: MultiDigits) -> None:
    result = run(tmp_path, digits, replace(CONFIG, max_steps=6))
    assert result["steps"] == 6 and result["epochs"] == 2
    assert read_run(tmp_path).epochs[-1]["step"] == 6


@pytest.mark.parametrize("space", ["exact", "features", "layer"])
def test_every_space_learns(tmp_path: Path, digits: MultiDigits, space: Any) -> None:
    config = replace(CONFIG, gradients=space, epochs=30, dropout=0.0)
    run(tmp_path, digits, config)
    epochs = read_run(tmp_path).epochs
    assert epochs[-1]["train_loss"]["left"] < 0.6 * epochs[0]["train_loss"]["left"]
    assert read_run(tmp_path).steps[0]["space"] == space


def test_a_folder_with_another_configuration_is_refused(tmp_path: Path, digits: MultiDigits) -> None:
    run(tmp_path, digits)
    with pytest.raises(ConfigMismatch, match="learning_rate"):
        run(tmp_path, digits, replace(CONFIG, learning_rate=0.01))


def test_a_damaged_checkpoint_is_named(tmp_path: Path, digits: MultiDigits) -> None:
    run(tmp_path, digits)
    (tmp_path / "result.json").unlink()
    file = tmp_path / checkpoint.FILE
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint\.pt"):
        run(tmp_path, digits)


def test_a_loss_that_becomes_nan_names_task_and_step(tmp_path: Path, digits: MultiDigits) -> None:
    class Broken(MultiMNIST):
        def losses(self, output: Any, labels: Any) -> dict[str, torch.Tensor]:
            losses = super().losses(output, labels)
            return {**losses, "right": losses["right"] * float("nan")}

    with pytest.raises(ValueError, match=r"step 1 .*'right'"):
        train(Broken(CONFIG, digits), CONFIG, tmp_path, experiment="x", command="x", quiet=True)


def test_a_folder_below_a_file_is_named(tmp_path: Path, digits: MultiDigits) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnwritableFolder, match="file"):
        run(tmp_path / "file" / "inside", digits)


@pytest.mark.slow
def test_a_killed_process_resumes(tmp_path: Path) -> None:
    """A real process, a real SIGKILL at an arbitrary moment."""
    command = [
        sys.executable,
        "-m",
        "detente",
        "run",
        "multimnist",
        "--method",
        "mgda",
        "--epochs",
        "2",
        "--json",
    ]
    command += ["--batch-size", "500", "--checkpoint-seconds", "0.2", "--record-steps", "1000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run(
        [*command, "--out", str(whole)], capture_output=True, text=True, env=environment, check=True
    )
    assert json.loads(done.stdout)["epochs"] == 2
    process = subprocess.Popen(
        [*command, "--out", str(killed)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    deadline = time.monotonic() + 120
    while not (killed / checkpoint.FILE).exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "result.json").exists()
    subprocess.run([*command, "--out", str(killed)], capture_output=True, env=environment, check=True)
    assert_same_run(whole, killed)


def test_the_balance_under_a_guard_that_refuses_the_shared_part(tmp_path: Path, digits: MultiDigits) -> None:
    config = replace(
        CONFIG,
        method="inexact-mgda",
        option=("epsilon=1e9", "refuse=shared"),
        optimizer="adam",
        learning_rate=1e-3,
        balance=True,
        record_steps=100,
        epochs=1,
    )
    with pytest.warns(EarlyTerminationWarning):
        run(tmp_path, digits, config)
    rows = read_run(tmp_path).steps
    assert {row["status"] for row in rows} == {"stationary"}
    assert all(value == 0 for row in rows for layer in row["balance"]["contributions"] for value in layer)


def test_a_run_of_an_earlier_version_stands_for_the_defaults(tmp_path: Path, digits: MultiDigits) -> None:
    done = run(tmp_path, digits)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    del stored["config"]["balance"], stored["config"]["loss_factor"]
    file.write_text(json.dumps(stored))
    assert run(tmp_path, digits) == done
    with pytest.raises(ConfigMismatch, match="loss_factor"):
        run(tmp_path, digits, replace(CONFIG, loss_factor=("left=2",)))
