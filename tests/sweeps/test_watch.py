"""What a person sees while a sweep works: how far its runs are, and how long the rest will take."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from sweeping import HERE, environment

from detente.cli import main
from detente.sweeps import watch
from detente.sweeps.contenders import Contender
from detente.sweeps.plan import Planned
from detente.sweeps.watch import State, behind, summary
from detente.training import TrainingConfig

SLOW = [f"{HERE / 'slow.py'}:Slow", "--methods", "uniform", "--no-singles", "--trials", "1", "--lrs", "0.1"]
SLOW += ["--seeds", "1", "--front", "0", "--extend", "0", "--no-cost", "--epochs", "8", "--batch-size", "16"]


def stored(folder: Path, epochs: int, seconds: float) -> Path:
    """A run of which so many epochs of ten steps are stored."""
    folder.mkdir(parents=True)
    rows = [{"epoch": n, "step": 10 * n, "seconds": seconds} for n in range(1, epochs + 1)]
    (folder / "epochs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_part_of_a_run_that_is_behind_it(tmp_path: Path) -> None:
    folder = stored(tmp_path / "run", epochs=3, seconds=2.0)
    assert behind(folder, TrainingConfig(epochs=10)) == (0.3, 6.0)
    assert behind(folder, TrainingConfig(epochs=10, max_steps=40)) == (0.75, 6.0)
    assert behind(folder, TrainingConfig(epochs=10, max_steps=25)) == (1.0, 6.0)
    with open(folder / "epochs.jsonl", "a") as file:
        file.write('{"epoch": 4, "st')
    assert behind(folder, TrainingConfig(epochs=10)) == (0.3, 6.0)
    (folder / "epochs.jsonl").write_text("nonsense\n")
    assert behind(folder, TrainingConfig(epochs=10)) == (0.0, 0.0)


def planned(name: str, epochs: int) -> Planned:
    config = TrainingConfig(epochs=epochs)
    return Planned(name, Contender("mgda", config, {}), "tune", config)


def test_time_left_counts_what_running_runs_have_behind_them(tmp_path: Path) -> None:
    state = State(tmp_path, total=5, workers=2)
    assert state.seconds_left(state.at_work()) is None
    assert summary(state) == "0 of 5 runs, 0 running"
    stored(tmp_path / "a", epochs=1, seconds=5.0)
    state.running = {"a": planned("a", 4)}
    # A quarter of the first took 5 s: 4.75 runs of 20 s on two workers.
    assert state.seconds_left(state.at_work()) == pytest.approx(47.5)
    state.running["b"] = planned("b", 4)
    assert summary(state) == "0 of 5 runs, 2 running (0% to 25% done), about 48 s left"
    # Runs that ended tell more than one that is on its way: 2.75 runs of 15 s on two workers.
    state.seconds = {"c": 10.0, "d": 20.0}
    state.done["mgda"] = 2
    assert state.seconds_left(state.at_work()) == pytest.approx(20.625)
    # One that ended and is measured on test data now is behind us already.
    stored(tmp_path / "c", epochs=4, seconds=2.5)
    state.running["c"] = planned("c", 4)
    assert state.seconds_left(state.at_work()) == pytest.approx(20.625)
    assert summary(state) == "2 of 5 runs, 3 running (0% to 25% done), about 21 s left"
    # The last run is not done sooner by workers that have nothing to do.
    state = State(tmp_path, total=1, workers=4, seconds={"d": 20.0}, running={"b": planned("b", 4)})
    assert state.seconds_left(state.at_work()) == pytest.approx(20.0)


def test_a_run_in_this_process_is_seen_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "_SECONDS_BETWEEN_LINES", 0.05)
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", *SLOW, "--out", str(tmp_path / "sweep")])
    assert stopped.value.code == 0
    lines = re.findall(r"0 of 1 runs, 1 running \((\d+)% done\), about [^\n]+ left", capsys.readouterr().err)
    seen = [int(part) for part in lines]
    assert seen == sorted(seen)
    assert len(set(seen)) > 3


def test_the_table_of_a_terminal_moves_while_a_run_is_at_work(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    # A run of some seconds, in which the table is drawn every second.
    words = ["sweep", *SLOW, "--epochs", "40", "--out", str(tmp_path / "sweep")]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "detente", *words],
        env={**environment(), "TERM": "xterm", "COLUMNS": "120"},
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    text = b""
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        while chunk := os.read(ours, 65536):
            text += chunk
    except OSError:  # how a terminal ends whose other side is closed
        pass
    finally:
        watchdog.cancel()
        os.close(ours)
    assert process.wait(60) == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode())
    assert len(set(re.findall(r"1 running \((\d+)% done\)", plain))) > 1
    assert "learning rate 0.1" in plain, "what was chosen"
