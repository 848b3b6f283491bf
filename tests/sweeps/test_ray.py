"""Sweeps on a real Ray cluster of two workers: the same records as in one process, whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sweeping import HERE, QUICK, environment, start

from benchmarks.sweeps import left_behind

pytest.importorskip("ray", reason="needs Ray: pip install 'detente[sweep]'")
pytestmark = pytest.mark.slow

SLOW = f"{HERE / 'slow.py'}:Slow"
ASKED = ["sweep", SLOW, "--methods", "uniform", "cagrad", "--no-singles", *QUICK, "--epochs", "12"]
ASKED += ["--checkpoint-seconds", "0.1"]


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"no {what} after {seconds} s")


def writers(folder: Path) -> dict[int, Path]:
    """Processes that are in the middle of a run, and their runs."""
    found = {}
    for lock in folder.glob("runs/*/.lock"):
        run = lock.parent
        text = lock.read_text()
        # A checkpoint, so that there is something to go on from; and steps left to do.
        if text and (run / "checkpoint.pt").exists() and not (run / "result.json").exists():
            found[json.loads(text)["process"]] = run
    return {process: run for process, run in found.items() if alive(process)}


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In one process, without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed") / "sweep"
    finish(start(*ASKED, "--out", str(folder)))
    return folder


def test_a_killed_worker_is_retried_and_a_killed_sweep_goes_on_as_if_nothing_had_happened(
    undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    arguments = [*ASKED, "--out", str(folder), "--workers", "2"]
    sweep = start(*arguments)
    try:
        first = until(lambda: writers(folder), 300, "run with a checkpoint")
        process, run = next(iter(first.items()))
        os.kill(process, signal.SIGKILL)
        until(lambda: (run / "result.json").exists(), 120, "end of the run whose worker was killed")
        assert sweep.poll() is None
        busy = until(lambda: writers(folder), 120, "further run")
    finally:
        sweep.kill()
        sweep.communicate()
    # Nobody goes on writing to the folder for long.
    until(lambda: not any(map(alive, busy)), 60, "end of the workers of a killed sweep")
    done = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/result.json")}
    _, err = finish(start(*arguments))
    assert "Traceback" not in err and "Warning" not in err
    # Of finished runs only those are touched that are measured on test data.
    again = [path.parent.name for path, before in done.items() if path.stat().st_mtime_ns != before]
    tested = [path.parent.name for path in done if json.loads(path.read_text())["metrics"]]
    assert set(again) <= set(tested)
    assert left_behind(folder) == left_behind(undisturbed)


def test_a_worker_that_dies_again_and_again_is_a_failure_with_a_reason(tmp_path: Path) -> None:
    file = tmp_path / "deadly.py"
    file.write_text(
        (HERE / "tiny.py").read_text()
        + """

import os, signal

class Deadly(Tiny):
    def __init__(self, config):
        self.deadly = config.learning_rate == 0.1

    def losses(self, output, labels):
        if self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().losses(output, labels)
"""
    )
    # Named by a relative path, from where the command is given.
    arguments = ["sweep", "deadly.py:Deadly", *ASKED[2:], "--epochs", "2", "--trials", "2", "--extend", "0"]
    arguments += ["--methods", "uniform", "--out", "sweep", "--workers", "2", "--json"]
    process = start(*arguments, cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    found = json.loads(out)
    assert len(found["failures"]) == 1
    assert all("its worker died 2 times" in reason for reason in found["failures"].values())
    (one,) = found["contenders"]
    assert one["choice"]["learning_rate"] == 0.01 and one["choice"]["failed"] == 1


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """The address of a cluster of this machine that was there before; its workers live in another folder."""
    port, client = free_port(), free_port()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    head = subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"),
            *(f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"),
            *("--disable-usage-stats", f"--ray-client-server-port={client}"),
        ],
        cwd=elsewhere,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert head.stdout is not None
        told = []
        for line in head.stdout:
            told.append(line)
            if "Ray runtime started" in line:
                break
        assert told and "Ray runtime started" in told[-1], "".join(told)
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.communicate(timeout=60)


def test_a_cluster_that_is_there_is_joined(undisturbed: Path, tmp_path: Path, cluster: str) -> None:
    folder = tmp_path / "sweep"
    finish(start(*ASKED, "--out", str(folder), "--workers", "2", "--address", cluster))
    assert left_behind(folder) == left_behind(undisturbed)
    # A folder that its machines do not see: theirs is another working directory.
    probe = (
        "import sys; from pathlib import Path; from detente.sweeps.workers import OnRay\n"
        "Path('here').mkdir(); OnRay(1, 1, sys.argv[1], 0, Path('here'))"
    )
    found = subprocess.run(
        [sys.executable, "-c", probe, cluster],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1
    assert "does not see here: give --out a folder on storage that all machines share" in found.stderr
    assert not list((tmp_path / "here").iterdir())


def test_a_cluster_that_is_there_is_left_alone_without_its_address(
    undisturbed: Path, tmp_path: Path, cluster: str
) -> None:
    folder = tmp_path / "sweep"
    _, err = finish(start(*ASKED, "--out", str(folder), "--workers", "2"))
    assert cluster not in err
    assert left_behind(folder) == left_behind(undisturbed)


def test_no_cluster_at_that_address(tmp_path: Path) -> None:
    process = start(*ASKED, "--out", str(tmp_path / "sweep"), "--address", "127.0.0.1:1")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "127.0.0.1:1" in err and "Traceback" not in err
