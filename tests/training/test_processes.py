"""One run in several processes and in micro-batches, in half precision, with little memory; a process is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from detente.autograd.ranks import RankFailed
from detente.data import MultiDigits, load_multimnist
from detente.experiments.multimnist import MultiMNIST, MultiMNISTConfig
from detente.records import read_run
from detente.training import checkpoint, train
from detente.training.processes import Processes

SEVERAL = Path(__file__).with_name("several.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
BASE: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 50,
    "dropout": 0.0,
    "learning_rate": 0.05,
    "record_steps": 8,
}
# 130 examples: batches of 50, 50 and 30, so that the parts of the last are smaller.
EXAMPLES = 130

KINDS: dict[str, dict[str, Any]] = {
    "exact": {"method": "mgda"},
    "features": {"method": "aligned-mtl", "gradients": "features"},
    "layer": {"method": "gradnorm", "gradients": "layer"},
    "a random method that looks at gradients": {"method": "graddrop", "gradients": "features"},
    "further batches": {"method": "modo"},
    "losses after the step": {"method": "famo"},
    "losses": {"method": "uncertainty", "measure": True},
    "moments of every task": {"optimizer": "mao", "learning_rate": 1e-3, "balance": True},
    "search": {"method": "mgda", "search": "backtracking", "learning_rate": 1.0},
    "search in the representation": {"gradients": "features", "method": "mgda", "search": "fast"},
    "clipped": {"method": "imtl-g", "clip_norm": 0.1},
    "micro-batches": {"method": "famo", "accumulate": 3},
    "micro-batches of gradients": {"method": "mgda", "accumulate": 2},
}
# Of the run that is killed, and of its twin that is not.
DISTURBED: dict[str, Any] = {"method": "mgda", "devices": 2, "epochs": 1, "max_steps": 160, "batch_size": 50}
DISTURBED |= {"record_steps": 1000, "checkpoint_seconds": 0.0}


@pytest.fixture(scope="module")
def digits() -> MultiDigits:
    return load_multimnist().take(EXAMPLES)


def run(folder: Path, digits: MultiDigits, **given: Any) -> dict[str, Any]:
    config = MultiMNISTConfig(**{**BASE, **given})
    return train(
        MultiMNIST(config, digits), config, folder, experiment="multimnist", command="test", quiet=True
    )


@pytest.fixture(scope="module")
def in_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of run, by two processes that torchrun starts."""
    place = tmp_path_factory.mktemp("two")
    asked = [
        [
            str(place / name),
            EXAMPLES,
            {**BASE, **given, "devices": 2, "accumulate": given.get("accumulate", 1)},
        ]
        for name, given in KINDS.items()
    ]
    asked.append([str(place / "undisturbed"), 10_000, DISTURBED])
    (place / "asked.json").write_text(json.dumps(asked))
    torchrun(2, str(place / "asked.json"))
    return place


def torchrun(processes: int, *arguments: str) -> None:
    starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, *starter, str(SEVERAL), *arguments], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr


def assert_close(one: Any, other: Any) -> None:
    """Two runs that differ by rounding."""
    assert len(one.epochs) == len(other.epochs) > 0
    assert len(one.steps) == len(other.steps) > 0
    for mine, theirs in zip(one.epochs, other.epochs, strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        for task, values in mine["validation"].items():
            assert values["loss"] == pytest.approx(theirs["validation"][task]["loss"], rel=1e-4)
    for mine, theirs in zip(one.steps, other.steps, strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
        if any(mine["weights"]):
            assert mine["weights"] == pytest.approx(theirs["weights"], rel=1e-3, abs=1e-4)
        assert mine.get("balance", {}).keys() == theirs.get("balance", {}).keys()
        assert mine.get("search", {}).get("length") == theirs.get("search", {}).get("length")


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one_with_the_whole_batch(
    tmp_path: Path, digits: MultiDigits, in_two: Path, kind: str
) -> None:
    run(tmp_path / "one", digits, **{**KINDS[kind], "accumulate": 1})
    assert_close(read_run(tmp_path / "one"), read_run(in_two / kind))


@pytest.mark.parametrize("method", ["mgda", "famo", "uncertainty", "db-mtl"])
def test_micro_batches_train_as_the_whole_batch(tmp_path: Path, digits: MultiDigits, method: str) -> None:
    for parts in (1, 4):
        run(tmp_path / str(parts), digits, method=method, accumulate=parts)
    one, four = read_run(tmp_path / "1"), read_run(tmp_path / "4")
    assert_close(one, four)
    assert [row["step"] for row in one.epochs] == [row["step"] for row in four.epochs]


def test_low_memory_trains_as_an_exact_step_and_says_so(tmp_path: Path, digits: MultiDigits) -> None:
    run(tmp_path / "fast", digits, method="mgda")
    run(tmp_path / "low", digits, method="mgda", memory="low")
    low = read_run(tmp_path / "low")
    assert_close(read_run(tmp_path / "fast"), low)
    assert "memory='low'" in low.steps[0]["notes"][0]


@pytest.mark.parametrize(
    ("precision", "space"),
    [("bf16-mixed", "exact"), ("bf16-mixed", "features"), ("bf16-mixed", "layer"), ("16-mixed", "features")],
)
def test_half_precision_learns_nearly_the_same_and_resumes(
    tmp_path: Path, digits: MultiDigits, monkeypatch: pytest.MonkeyPatch, precision: str, space: str
) -> None:
    from detente.training import loop

    options = {"method": "mgda", "gradients": space, "precision": precision}
    run(tmp_path / "full", digits, **{**options, "precision": "32-true"})
    run(tmp_path / "half", digits, **options)
    full, half = read_run(tmp_path / "full"), read_run(tmp_path / "half")
    assert half.epochs[-1]["train_loss"] == pytest.approx(full.epochs[-1]["train_loss"], rel=0.02)
    assert half.steps[0]["losses"] != full.steps[0]["losses"]

    step, taken = loop._Run.run_step, []

    def stop(self: Any, *indices: torch.Tensor) -> None:
        step(self, *indices)
        taken.append(1)
        self.save()
        if len(taken) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop._Run, "run_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", digits, **options)
    run(tmp_path / "cut", digits, **options)
    weights = [checkpoint.load(tmp_path / name / checkpoint.FILE)["model"] for name in ("half", "cut")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_step_that_overflows_is_skipped(tmp_path: Path, digits: MultiDigits) -> None:
    """The scaler's factor starts at 65536: a gradient of a thousandfold loss overflows float16."""
    options = {"precision": "16-mixed", "loss_factor": ["left=1000", "right=1"], "epochs": 1, "measure": True}
    run(tmp_path / "run", digits, **options, max_steps=1)
    (row,) = read_run(tmp_path / "run").steps
    assert "scaler skips this step" in row["notes"][0]
    torch.manual_seed(0)
    untouched = MultiMNIST(MultiMNISTConfig(dropout=0.0), digits).model().state_dict()
    state = checkpoint.load(tmp_path / "run" / checkpoint.FILE)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in state["model"].items())
    assert state["optimizer"]["scaler"]["scale"] == 32768


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"devices": 0}, "devices is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"batch_size": 5, "devices": 2, "accumulate": 3}, "cannot be cut"),
        ({"accumulate": 2, "gradients": "features"}, "accumulate is 2"),
        ({"memory": "low", "gradients": "layer"}, "memory is low"),
        ({"memory": "low", "accumulate": 2}, "memory is low"),
        ({"accumulate": 2, "optimizer": "mao"}, "optimizer mao does not go with it"),
        ({"precision": "16-mixed", "optimizer": "mtadam"}, "knows no scaler"),
        ({"precision": "bf16-mixed", "search": "backtracking"}, "last digits"),
        ({"memory": "batched", "search": "backtracking"}, "search backtracking does not go with it"),
        ({"balance": True, "optimizer": "adam", "devices": 2}, "devices is 2"),
    ],
)
def test_what_does_not_go_together_is_told_before_anything_is_done(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        MultiMNISTConfig(**given)


def test_processes_must_have_been_started(tmp_path: Path, digits: MultiDigits) -> None:
    with pytest.raises(ValueError, match=r"devices is 2, and one process was started.*--devices"):
        run(tmp_path / "run", digits, devices=2)
    assert not (tmp_path / "run").exists()


def test_parts_of_a_batch_are_the_batch() -> None:
    class Two(Processes):
        def __init__(self, rank: int) -> None:
            self.rank, self.size = rank, 2

    indices = torch.arange(7)
    assert torch.cat([Two(0).part(indices), Two(1).part(indices)]).equal(indices)
    with pytest.raises(ValueError, match="1 examples cannot be spread over 2 processes"):
        Two(1).part(indices[:1])


def children(process: int) -> dict[int, int]:
    """Rank to process of those that a starter has started."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                settings = dict(
                    line.partition("=")[::2] for line in (entry / "environ").read_text().split("\0") if line
                )
            except (OSError, ValueError):
                continue
            if parent == process and "RANK" in settings:
                found[int(settings["RANK"])] = int(entry.name)
    return found


def test_a_killed_process_ends_the_run_which_resumes_bit_for_bit(tmp_path: Path, in_two: Path) -> None:
    command = [sys.executable, "-m", "detente", "run", "multimnist", "--json"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in DISTURBED.items()]
    whole, killed = in_two / "undisturbed", tmp_path / "killed"
    process = subprocess.Popen(
        [*command, "--out", str(killed)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    deadline = time.monotonic() + 120
    while not (killed / checkpoint.FILE).exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    ranks = children(process.pid)
    os.kill(ranks[1], signal.SIGKILL)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "detente:" in told
    assert not Path(f"/proc/{ranks[0]}").exists()
    assert not (killed / "result.json").exists()
    at = checkpoint.load(killed / checkpoint.FILE)
    assert 0 < at["position"]["step"] < 160 and len(at["random"]) == 2

    done = subprocess.run([*command, "--out", str(killed)], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 160  # one process prints
    one, other = (checkpoint.load(folder / checkpoint.FILE) for folder in (whole, killed))
    assert all(torch.equal(tensor, other["model"][name]) for name, tensor in one["model"].items())
    rows = [
        [{k: v for k, v in row.items() if "seconds" not in k} for row in read_run(folder).steps]
        for folder in (whole, killed)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 160


def test_processes_end_with_the_command_that_started_them(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "detente",
        "run",
        "multimnist",
        "--devices",
        "2",
        "--out",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "config.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    ranks = children(process.pid)
    process.kill()
    process.wait()
    assert len(ranks) == 2
    while any(Path(f"/proc/{pid}").exists() for pid in ranks.values()):
        assert time.monotonic() < deadline, "a process outlived the command"
        time.sleep(0.05)


def test_another_process_repeats_what_the_first_could_not_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "detente", "run", "multimnist", "--devices", "2", "--out"]
    done = subprocess.run(
        [*command, str(tmp_path / "file" / "run")], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("detente:")]
    assert len(told) == 1 and str(tmp_path / "file") in told[0]
    assert issubclass(RankFailed, RuntimeError)
