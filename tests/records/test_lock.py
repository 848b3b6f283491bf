"""One writer for each folder, across processes."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from detente.records import RunFolder, read_run, versions
from detente.records.lock import FolderInUse, Lock, locked

CONFIG = {
    "schema": 1,
    "experiment": "mine",
    "label": "mgda (exact)",
    "method": "mgda",
    "options": {},
    "gradients": "exact",
    "tasks": ["seg"],
    "main_metric": {"seg": "loss"},
    "seed": 0,
    "config": {},
    "metrics": [{"task": "seg", "name": "loss", "higher_is_better": False, "percent": False}],
    "command": "python train.py",
    "versions": versions(),
    "started": "2025-01-01T12:00:00+00:00",
}
STEP = {"step": 1, "epoch": 1, "names": ["seg"], "losses": [1.0], "weights": None}

HOLD = """
import sys, time
from pathlib import Path
from detente.records.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_second_process_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path) as other:
        with pytest.raises(FolderInUse, match=f"process {other.pid} on ") as told, locked(tmp_path):
            pass
        assert str(tmp_path) in str(told.value)
        other.send_signal(signal.SIGKILL)
        other.wait()
        with locked(tmp_path):  # the system let go of it
            assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_within_one_process_too_and_released_once_and_for_all(tmp_path: Path) -> None:
    first = Lock(tmp_path)
    with pytest.raises(FolderInUse):
        Lock(tmp_path)
    first.release()
    first.release()
    second = Lock(tmp_path)
    del second
    gc.collect()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"process": 3}'])
def test_a_holder_that_left_no_name(tmp_path: Path, text: str) -> None:
    with locked(tmp_path):
        (tmp_path / ".lock").write_text(text)
        with pytest.raises(FolderInUse, match="did not leave its name"), locked(tmp_path):
            pass


def test_a_folder_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "new" / "folder"):
        raise KeyError
    with locked(tmp_path / "new" / "folder"):
        pass


def test_a_run_has_one_writer(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, CONFIG) as folder:
        folder.append_step(STEP)
        with pytest.raises(FolderInUse):
            RunFolder.open_or_create(tmp_path, CONFIG)
        folder.truncate_after(0)  # lets go of the files, and not of the folder
        with pytest.raises(FolderInUse):
            RunFolder.open_or_create(tmp_path, CONFIG)
    with RunFolder.open_or_create(tmp_path, CONFIG) as again:
        folder.close()
        with pytest.raises(FolderInUse):
            folder.append_step(STEP)  # it would be the second writer
        again.append_step(STEP)
    assert len(read_run(tmp_path).steps) == 1


def test_a_run_that_another_process_writes_is_refused_and_not_touched(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG).close()
    (tmp_path / "steps.jsonl").write_text('{"half')
    with held_elsewhere(tmp_path), pytest.raises(FolderInUse):
        RunFolder.open_or_create(tmp_path, CONFIG)
    assert (tmp_path / "steps.jsonl").read_text() == '{"half'


def test_what_a_killed_writer_left_half_written_is_removed_by_the_next(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG).close()
    (tmp_path / ".checkpoint.pt.123.tmp").write_bytes(b"half")
    RunFolder.open_or_create(tmp_path, CONFIG).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.json"]
