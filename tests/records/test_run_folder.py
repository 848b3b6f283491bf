"""Run folders: written atomically, resumed exactly, read strictly."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from enum import StrEnum
from pathlib import Path

import numpy as np
import pytest

from detente.records import (
    ConfigMismatch,
    RecordError,
    RunFolder,
    SchemaError,
    UnwritableFolder,
    differences,
    find_runs,
    plain,
    read_run,
    versions,
    write_bytes,
    write_json,
)


def make_config(**changes):
    metrics = [
        {"task": task, "name": name, "higher_is_better": name == "accuracy", "percent": name == "accuracy"}
        for task in ("left", "right")
        for name in ("accuracy", "loss")
    ]
    config = {
        "schema": 1,
        "experiment": "multimnist",
        "label": "mgda (exact)",
        "method": "mgda",
        "options": {"solver": "exact"},
        "gradients": "exact",
        "tasks": ["left", "right"],
        "metrics": metrics,
        "main_metric": {"left": "accuracy", "right": "accuracy"},
        "seed": 0,
        "config": {"epochs": 3, "optimizer": {"lr": 0.01}},
        "command": "detente run multimnist",
        "versions": versions(),
        "started": "2025-01-01T00:00:00+00:00",
    }
    return config | changes


def make_epoch(epoch, step):
    return {
        "epoch": epoch,
        "step": step,
        "train_loss": {"left": 1.0 / epoch, "right": 1.1 / epoch},
        "validation": {"left": {"accuracy": 0.9, "loss": 0.3}, "right": {"accuracy": 0.8, "loss": 0.4}},
        "seconds": 1.5,
        "learning_rate": 0.01,
        "refused": 0,
    }


def make_step(step, epoch, **changes):
    row = {"step": step, "epoch": epoch, "names": ("left", "right"), "losses": [1.0, 2.0], "weights": None}
    return row | {"status": "ok", "space": "exact", "raw": None, "altered": None, "notes": ()} | changes


RESULT = {"schema": 1, "status": "done", "epochs": 3, "metrics": {"left": {"accuracy": 0.9}, "right": {}}}


def test_what_is_written_is_read_back(tmp_path):
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    with RunFolder.create(tmp_path / "a" / "run", make_config()) as folder:
        folder.append_step(make_step(1, 1))
        folder.append_epoch(make_epoch(1, 1))
        folder.write_samples(images, {"left": [1, 2]}, {"left": np.array([1, 3], dtype=np.int32)})
        folder.write_result(
            RESULT | {"metrics": {"left": {"accuracy": np.float32(0.5)}, "right": {"accuracy": np.nan}}}
        )
    run = read_run(tmp_path / "a" / "run")
    assert run.config == make_config()
    assert run.finished
    assert run.method == "mgda"
    assert run.tasks == ("left", "right")
    assert run.seed == 0
    assert run.epochs == (make_epoch(1, 1),)
    assert run.steps[0]["names"] == ["left", "right"]
    assert run.steps[0]["weights"] is None
    assert run.main_metric("left").percent
    assert run.main_metric("left").higher_is_better
    assert run.main_value("left") == 0.5
    assert run.main_value("right") is None, "a metric that is not finite is missing, not a number"
    samples = run.samples
    assert samples is not None
    np.testing.assert_array_equal(samples.images, images)
    assert samples.targets["left"].tolist() == [1, 2]
    assert samples.predictions["left"].tolist() == [1, 3]
    assert samples.predictions["left"].dtype == np.int64
    assert sorted(path.name for path in (tmp_path / "a" / "run").iterdir()) == [
        ".lock", "config.json", "epochs.jsonl", "result.json", "samples.npz", "steps.jsonl",
    ]  # fmt: skip


def test_an_unfinished_run_has_no_result_no_samples_and_maybe_no_rows(tmp_path):
    RunFolder.create(tmp_path, make_config())
    run = read_run(tmp_path)
    assert not run.finished
    assert run.result is None
    assert run.samples is None
    assert run.epochs == ()
    assert run.steps == ()
    assert run.main_value("left") is None


def test_numbers_that_are_not_finite_become_null_and_strict_json_stays(tmp_path):
    with RunFolder.create(tmp_path, make_config()) as folder:
        folder.append_step(
            make_step(1, 1, losses=[float("nan"), float("-inf")], raw={"condition_number": np.inf})
        )

    def refuse(name):
        raise AssertionError(f"{name} in the file")

    row = json.loads((tmp_path / "steps.jsonl").read_text(), parse_constant=refuse)
    assert row["losses"] == [None, None]
    assert row["raw"] == {"condition_number": None}


class Colour(StrEnum):
    RED = "red"


def test_plain_keeps_values_and_names_what_it_cannot_store():
    value = {"a": (np.int64(3), Path("x"), Colour.RED, True, None), "b": np.eye(2)}
    assert plain(value) == {"a": [3, "x", "red", True, None], "b": [[1.0, 0.0], [0.0, 1.0]]}
    assert type(plain(Colour.RED)) is str
    assert plain(True) is True
    with pytest.raises(TypeError, match=r"config\.inner\[1\]: set"):
        plain({"config": {"inner": [1, {2}]}})
    with pytest.raises(TypeError, match="key 3 is not a text"):
        plain({3: "x"})


def test_configuration_is_checked_before_anything_is_written(tmp_path):
    for changes, message in [
        ({"tasks": []}, "'tasks' must be a list of one or more"),
        ({"tasks": ["left", "left"]}, "different names"),
        ({"seed": True}, "'seed' must be a whole number; found True"),
        ({"main_metric": {"left": "accuracy", "right": "f1"}}, "'f1' of task 'right'"),
        ({"metrics": [{"task": "left", "name": "accuracy"}]}, "'higher_is_better' must be true or false"),
        ({"schema": 2}, "newer than the schema 1"),
    ]:
        with pytest.raises(RecordError, match=message):
            RunFolder.create(tmp_path / "run", make_config(**changes))
    broken = make_config()
    del broken["method"]
    with pytest.raises(RecordError, match="'method' must be a text"):
        RunFolder.create(tmp_path / "run", broken)
    assert not (tmp_path / "run").exists()


def test_mis_shaped_rows_and_results_are_refused(tmp_path):
    with RunFolder.create(tmp_path, make_config()) as folder:
        with pytest.raises(RecordError, match="'step' must be a whole number"):
            folder.append_epoch({"epoch": 1})
        with pytest.raises(RecordError, match="'losses' must have one entry for each"):
            folder.append_step(make_step(1, 1, losses=[1.0]))
        with pytest.raises(RecordError, match="metrics of task 'left'"):
            folder.write_result(RESULT | {"metrics": {"left": {"accuracy": "good"}}})
        with pytest.raises(RecordError, match="'seconds' must be a number"):
            folder.write_result(RESULT | {"seconds": "long"})
        with pytest.raises(ValueError, match="uint8"):
            folder.write_samples(np.zeros((2, 4, 4)), {}, {})
        with pytest.raises(ValueError, match="prediction of task 'left'"):
            folder.write_samples(np.zeros((2, 4, 4), np.uint8), {"left": [1, 2]}, {"left": [1]})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.json"]


def test_create_refuses_a_folder_with_records(tmp_path):
    RunFolder.create(tmp_path, make_config())
    with pytest.raises(FileExistsError, match=r"config\.json"):
        RunFolder.create(tmp_path, make_config())


def test_open_or_create_continues_the_same_run_and_lists_what_differs(tmp_path):
    RunFolder.open_or_create(tmp_path, make_config())
    again = make_config(command="detente run --resume", started="later", versions={"torch": "9"})
    RunFolder.open_or_create(tmp_path, again)
    assert read_run(tmp_path).config["command"] == "detente run multimnist", "the first start is kept"

    other = make_config(method="cagrad", config={"epochs": 5, "optimizer": {"lr": 0.01}, "precision": "32"})
    with pytest.raises(ConfigMismatch) as caught:
        RunFolder.open_or_create(tmp_path, other)
    assert set(caught.value.differences) == {
        ("method", "mgda", "cagrad"),
        ("config.epochs", 3, 5),
        ("config.precision", "(absent)", "32"),
    }
    assert "config.epochs is 3 there and 5 here" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert read_run(tmp_path).method == "mgda"
    elsewhere = make_config(config={"epochs": 3, "optimizer": {"lr": 0.01}, "out": "b"})
    RunFolder.open_or_create(tmp_path, elsewhere, ignore={"command", "started", "versions", "config.out"})


def test_differences_tell_true_from_one():
    assert differences({"a": True}, {"a": 1}) == [("a", True, 1)]
    assert differences({"a": [1, 2]}, {"a": [1, 2]}) == []


def test_tuples_and_paths_in_a_configuration_do_not_make_it_another(tmp_path):
    config = make_config(config={"betas": (0.9, 0.99), "data": Path("digits"), "nan": float("nan")})
    RunFolder.open_or_create(tmp_path, config)
    RunFolder.open_or_create(tmp_path, config)


@pytest.mark.parametrize("method", ["create", "open_or_create"])
def test_unwritable_folder(tmp_path, method):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UnwritableFolder, match=r"cannot write to .*file.run: .*directory.*Choose another"):
        getattr(RunFolder, method)(tmp_path / "file" / "run", make_config())


def test_full_disk_names_the_folder(tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path, make_config())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UnwritableFolder, match="No space left") as caught:
        folder.write_result(RESULT)
    assert caught.value.errno == errno.ENOSPC
    assert not folder.finished
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.json"]


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    target = tmp_path / "a.json"
    write_json(target, {"x": 1})

    def fail(*_):
        raise OSError("killed")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="killed"):
        write_bytes(target, b"half")
    assert json.loads(target.read_text()) == {"x": 1}
    assert list(tmp_path.iterdir()) == [target]


def write_uninterrupted(path):
    with RunFolder.create(path, make_config()) as folder:
        for epoch in (1, 2, 3):
            for step in range(epoch * 10 - 9, epoch * 10 + 1):
                folder.append_step(make_step(step, epoch, losses=[1 / step, 2 / step]))
            folder.append_epoch(make_epoch(epoch, epoch * 10))


@pytest.mark.parametrize("checkpoint", [0, 10, 15, 20])
@pytest.mark.parametrize("cut", [0, 1, 17])
def test_resumed_records_equal_uninterrupted_ones(tmp_path, checkpoint, cut):
    write_uninterrupted(tmp_path / "whole")
    write_uninterrupted(tmp_path / "broken")
    for name in ("epochs.jsonl", "steps.jsonl"):
        path = tmp_path / "broken" / name
        path.write_bytes(path.read_bytes()[: -cut or None])
    with RunFolder.open_or_create(tmp_path / "broken", make_config()) as folder:
        folder.truncate_after(checkpoint)
        for epoch in (1, 2, 3):
            for step in range(epoch * 10 - 9, epoch * 10 + 1):
                if step > checkpoint:
                    folder.append_step(make_step(step, epoch, losses=[1 / step, 2 / step]))
            if epoch * 10 > checkpoint:
                folder.append_epoch(make_epoch(epoch, epoch * 10))
    for name in ("epochs.jsonl", "steps.jsonl"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_run_is_not_cut(tmp_path):
    with RunFolder.create(tmp_path, make_config()) as folder:
        folder.write_result(RESULT)
        with pytest.raises(RecordError, match="finished run"):
            folder.truncate_after(1)


def test_a_truncated_last_line_is_left_out_and_cut_off_on_resuming(tmp_path):
    write_uninterrupted(tmp_path)
    path = tmp_path / "steps.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert [row["step"] for row in read_run(tmp_path).steps][-1] == 29
    assert path.read_bytes() == whole[:-20], "reading changes nothing"
    RunFolder.open_or_create(tmp_path, make_config())
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:-1])


def test_only_the_newline_missing_is_no_loss(tmp_path):
    write_uninterrupted(tmp_path)
    path = tmp_path / "steps.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert read_run(tmp_path).steps[-1]["step"] == 30
    RunFolder.open_or_create(tmp_path, make_config())
    assert path.read_bytes() == whole


def test_corrupt_lines_are_named(tmp_path):
    write_uninterrupted(tmp_path)
    path = tmp_path / "steps.jsonl"
    lines = path.read_text().splitlines()
    for line, message in [
        ('{"step": 3, "epo', r"steps\.jsonl, line 3 is not valid JSON"),
        ("[1]", r"steps\.jsonl, line 3 must be an object"),
        ('{"step": 3}', r"steps\.jsonl, line 3: 'epoch' must be a whole number"),
        (lines[1], r"steps\.jsonl, line 3: step 2 follows step 2; two runs are mixed"),
    ]:
        path.write_text("\n".join([*lines[:2], line, *lines[3:]]) + "\n")
        with pytest.raises(RecordError, match=message):
            _ = read_run(tmp_path).steps
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(RecordError, match="line 1 is not valid JSON"):
        _ = read_run(tmp_path).steps


def test_other_schema_versions_are_named(tmp_path):
    for schema, message in [
        (2, "install a newer detente"),
        (0, "older than the schema 1"),
        (None, "no schema number"),
    ]:
        write_json(tmp_path / "config.json", make_config(schema=schema))
        with pytest.raises(SchemaError, match=message):
            read_run(tmp_path)
    write_json(tmp_path / "config.json", make_config())
    write_json(tmp_path / "result.json", RESULT | {"schema": 7})
    with pytest.raises(SchemaError, match=r"result\.json has schema 7"):
        read_run(tmp_path)


def test_keys_of_a_later_version_are_tolerated(tmp_path):
    with RunFolder.create(tmp_path, make_config(colour="green")) as folder:
        folder.append_epoch(make_epoch(1, 1) | {"new": [1]})
    assert read_run(tmp_path).epochs[0]["new"] == [1]


def test_find_runs(tmp_path):
    for name in ("b/two", "a", "c"):
        RunFolder.create(tmp_path / name, make_config(label=name))
    (tmp_path / ".hidden").mkdir()
    write_json(tmp_path / ".hidden" / "config.json", make_config())
    (tmp_path / "foreign").mkdir()
    write_json(tmp_path / "foreign" / "config.json", {"architectures": ["Other"]})
    assert [run.label for run in find_runs(tmp_path)] == ["a", "b/two", "c"]
    assert [run.label for run in find_runs(tmp_path / "c")] == ["c"]
    (tmp_path / "c" / "config.json").write_text("{")
    with pytest.raises(RecordError, match=r"c.config\.json is not valid JSON"):
        find_runs(tmp_path)
    unreadable: list[RecordError] = []
    assert [run.label for run in find_runs(tmp_path, unreadable)] == ["a", "b/two"]
    assert "config.json" in str(unreadable[0])
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_runs(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        read_run(tmp_path)


def test_a_thousand_runs_are_listed_in_a_second(tmp_path):
    import time

    text = json.dumps(make_config())
    for number in range(1000):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "config.json").write_text(text)
    start = time.perf_counter()
    assert len(find_runs(tmp_path)) == 1000
    # One second is the aim on a quiet machine; the rest is room for a loaded one.
    assert time.perf_counter() - start < 4


def test_samples_never_run_code_and_bad_archives_are_named(tmp_path):
    RunFolder.create(tmp_path, make_config())
    np.savez(tmp_path / "samples.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(RecordError, match=r"samples\.npz cannot be read"):
        _ = read_run(tmp_path).samples
    np.savez(
        tmp_path / "samples.npz", images=np.zeros((2, 3, 3), np.uint8), target_left=np.zeros(3, np.int64)
    )
    with pytest.raises(RecordError, match="'target_left' must hold a whole number for each of 2"):
        _ = read_run(tmp_path).samples
    for content in (b"PK", b"no archive", b""):
        (tmp_path / "samples.npz").write_bytes(content)
        with pytest.raises(RecordError, match=r"samples\.npz cannot be read"):
            _ = read_run(tmp_path).samples


def test_task_names_with_slashes_are_only_names(tmp_path):
    with RunFolder.create(tmp_path, make_config()) as folder:
        folder.write_samples(np.zeros((1, 2, 2), np.uint8), {"Doubt/../Confusion": [1]}, {})
    samples = read_run(tmp_path).samples
    assert samples is not None
    assert list(samples.targets) == ["Doubt/../Confusion"]


def test_a_killed_process_leaves_a_folder_that_resumes(tmp_path):
    program = textwrap.dedent(
        """
        import json, os, signal, sys
        from pathlib import Path
        from detente.records import RunFolder
        folder = RunFolder.create(Path(sys.argv[1]), json.loads(sys.argv[2]))
        for epoch in (1, 2):
            for step in (2 * epoch - 1, 2 * epoch):
                folder.append_step({"step": step, "epoch": epoch, "names": ["left"], "losses": [1.0]})
            folder.append_epoch({"epoch": epoch, "step": 2 * epoch})
        folder.append_step({"step": 5, "epoch": 3, "names": ["left"], "losses": [1.0]})
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    target = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", program, str(target), json.dumps(make_config())], check=False
    )
    assert done.returncode == -signal.SIGKILL
    with RunFolder.open_or_create(target, make_config()) as folder:
        folder.truncate_after(2)
        run = folder.read()
        assert [row["epoch"] for row in run.epochs] == [1]
        assert [row["step"] for row in run.steps] == [1, 2]


def test_recording_a_step_is_cheap(tmp_path):
    import time

    with RunFolder.create(tmp_path, make_config()) as folder:
        start = time.perf_counter()
        for step in range(1, 2001):
            folder.append_step(make_step(step, 1))
        each = (time.perf_counter() - start) / 2000
    # About 20 µs when quiet; a flush or an fsync per row would cost far more.
    assert each < 1e-3


def test_versions_import_nothing_heavy():
    # The package itself may import torch; this module alone must not, so it is loaded by its file.
    path = sys.modules["detente.records.software"].__file__
    program = (
        f"import runpy, sys; found = runpy.run_path({path!r})['versions']();"
        "assert 'torch' not in sys.modules; print(found['torch'])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    import torch

    assert torch.__version__.split("+")[0] == out.strip().split("+")[0]
    assert set(versions()) == {"detente", "torch", "numpy", "python", "platform"}
