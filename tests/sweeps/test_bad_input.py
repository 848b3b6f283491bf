"""Mistakes are told before anything starts, all at once; what breaks in between is named, and nothing is lost."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweeping import HERE, QUICK, TINY, environment, start

from benchmarks.sweeps import left_behind
from detente.cli import main

BASE = ["sweep", TINY, "--methods", "uniform", "mgda", *QUICK, "--no-singles"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "sweep"
    with pytest.raises(SystemExit) as stopped:
        main([*BASE, "--out", str(folder), "--json"])
    assert stopped.value.code == 0
    return folder


@pytest.fixture
def sweep(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "sweep"))


def runs_of(folder: Path, start: str = "") -> list[Path]:
    return sorted(path for path in (folder / "runs").iterdir() if path.name.startswith(start))


# ---- before anything starts


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--methods", "mgdaa"], ["unknown method 'mgdaa'", "did you mean 'mgda'"]),
        (
            ["--methods", "uniform", "mgda@sideways"],
            ["cannot be solved on 'sideways'", "exact, features, layer"],
        ),
        (["--methods", "uniform@features"], ["uniform looks at losses only"]),
        (["--methods", "nowhere.py:Mine"], ["nowhere.py"]),
        (["--grid", "cagrad.c=0.4"], ["'cagrad' is not among the contenders"]),
        (["--grid", "mgda.solver=newton"], ["newton", "frank-wolfe"]),
        (["--grid", "mgda.solvr=exact"], ["solvr"]),
        (["--grid", "mgda=exact"], ["METHOD.OPTION=VALUE"]),
        (["--grid", "mgda.normalize=l2,l2"], ["twice"]),
        (["--grid", "mgda.normalize=l2", "mgda.normalize=loss"], ["two grids"]),
        (["--methods", "uniform", "--also", "uniform: --weight-decay 0.1"], ["two contenders", "'uniform'"]),
        (["--also", "mao"], ["LABEL: FLAGS"]),
        (["--also", "mao: --optimiser mao"], ["--optimiser"]),
        (["--also", "x: --learning-rate 0.1"], ["--learning-rate", "equal for all"]),
        (["--also", "x: --task sum"], ["trains sum alone"]),
        (["--trials", "1"], ["--trials is 1", "2 learning rates"]),
        (["--lrs", "0.1", "0.1"], ["0.1 twice"]),
        (["--lrs", "0.1", "-1"], ["-1"]),
        (["--lrs", "nan"], ["nan"]),
        (["--seeds", "0"], ["--seeds is 0"]),
        (["--tune-epochs", "0"], ["--tune-epochs is 0"]),
        (["--front", "1"], ["at least 2 parts"]),
        (["--front", "2000"], ["1999 weightings"]),
        (["--choose", "delta-m"], ["--no-singles"]),
        (["--method", "mgda"], ["--method is decided by the sweep"]),
        (["--learning-rate", "0.01"], ["--learning-rate is decided by the sweep"]),
        (["--seed=0"], ["--seed is decided by the sweep"]),
        (["--devices", "2"], ["--devices is decided by the sweep"]),
        (["--epochs", "0"], ["epochs is 0"]),
        (["--trails", "3"], ["--trails"]),
        (["--task", "nothing"], ["there is no task 'nothing'"]),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., tuple[int, str, str]],
    arguments: Any,
    told: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*BASE, *arguments, "--out", "sweep")
    assert (code, out) == (2, "")
    for words in told:
        assert words in err
    assert not list(tmp_path.iterdir())


def test_all_mistakes_are_listed_at_once(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    wrong = ["--methods", "mgdaa", "uniform", "cagrad@nowhere", "--also", "x: --nope 1", "y", "--seeds", "0"]
    wrong += [
        "--grid",
        "famo.lr=0.1",
        "uniform.reduce=average",
        "--trials",
        "1",
        "--front",
        "1",
        "--seed",
        "3",
    ]
    code, _, err = call("sweep", TINY, *wrong, "--out", str(tmp_path / "sweep"))
    assert code == 2
    assert "10 mistakes" in err
    for words in (
        *("mgdaa", "nowhere", "--nope", "LABEL", "--seeds is 0", "famo", "average"),
        *("--trials is 1", "--front 1", "--seed is decided"),
    ):
        assert words in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["sweep"], 2, ""),
        (["sweep", "multimnst"], 2, "did you mean 'multimnist'"),
        (["sweep", "nowhere.py:Mine"], 2, "nowhere.py"),
        (["sweep", f"{HERE / 'tiny.py'}:Huge"], 2, "no problem 'Huge'"),
        (["sweep", "multimnist", "--data-dir", "nowhere"], 1, "nowhere"),
        (["sweep", "toy", "--methods", "uniform"], 2, "--no-singles"),
    ],
)
def test_an_experiment_that_is_none(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., tuple[int, str, str]],
    arguments: list[str],
    code: int,
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, _, err = call(*arguments)
    assert found == code
    assert told in err
    assert not list(tmp_path.iterdir())


def test_the_plan_is_shown_without_running_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(*BASE, "--plan", "--json")
    shown = json.loads(out)
    assert code == 0
    assert [(one["name"], one["tuning_runs"]) for one in shown["contenders"]] == [
        ("uniform", 3),
        ("mgda (exact)", 3),
    ]
    assert not list(tmp_path.iterdir())


# ---- the folder


def test_another_sweep_in_the_folder_is_told_and_kept(
    sweep: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    before = left_behind(sweep)
    code, _, err = call(*BASE, "--trials", "4", "--weight-decay", "0.1", "--out", str(sweep))
    assert code == 2
    assert "asked.trials is 3 there and 4 here" in err
    assert "contenders.uniform.config.weight_decay is 0.0 there and 0.1 here" in err
    assert "detente sweep" in err, "the command that goes on"
    assert left_behind(sweep) == before


def test_a_sweep_may_grow_and_not_shrink(sweep: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    before = {path.parent.name: path.read_bytes() for path in sweep.glob("runs/*/result.json")}
    more = [
        *BASE[:2],
        "--methods",
        "uniform",
        "cagrad",
        "mgda",
        *BASE[5:],
        "--seeds",
        "3",
        "--out",
        str(sweep),
    ]
    assert call(*more)[0] == 0
    after = {path.parent.name: path.read_bytes() for path in sweep.glob("runs/*/result.json")}
    assert before.items() <= after.items(), "what was there is neither repeated nor lost"
    outcome = json.loads((sweep / "outcome.json").read_text())
    assert [sorted(one["seeds"]) for one in outcome["contenders"]] == [["0", "1", "2"]] * 3
    stored = json.loads((sweep / "sweep.json").read_text())
    assert sorted(stored["contenders"]) == ["cagrad (exact)", "mgda (exact)", "uniform"]
    code, _, err = call(*BASE, "--out", str(sweep))
    assert code == 2
    assert "asked.seeds is 3 there and 2 here" in err
    assert "contenders.cagrad (exact)" in err
    assert "further methods and more seeds may be added" in err


def test_what_changes_no_number_may_differ(sweep: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = call(*BASE, "--out", str(sweep), "--retries", "3", "--checkpoint-seconds", "1", "--json")
    assert code == 0
    assert json.loads(out)["failures"] == {}


def test_another_content_of_the_problem_file_is_another_sweep(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    file = tmp_path / "mine.py"
    shutil.copy(HERE / "tiny.py", file)
    arguments = ["sweep", f"{file}:Tiny", *BASE[2:], "--out", str(tmp_path / "sweep")]
    assert call(*arguments)[0] == 0
    file.write_text(file.read_text().replace("0.3 *", "0.4 *"))
    code, _, err = call(*arguments)
    assert code == 2
    assert f"files.{file}" in err


@pytest.mark.parametrize(
    ("content", "told"),
    [("{", "cannot be read"), ('{"schema": 0, "command": "old"}', "schema 0"), ("[]", "cannot be read")],
)
def test_the_record_of_the_sweep_is_damaged_or_older(
    sweep: Path, call: Callable[..., tuple[int, str, str]], content: str, told: str
) -> None:
    (sweep / "sweep.json").write_text(content)
    code, _, err = call(*BASE, "--out", str(sweep))
    assert code == 1
    assert told in err and "sweep.json" in err
    assert (sweep / "sweep.json").read_text() == content


def test_a_folder_that_another_process_sweeps_in(
    sweep: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from detente.records.lock import locked\n"
            "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)",
            str(sweep),
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        code, _, err = call(*BASE, "--out", str(sweep))
        assert code == 1
        assert f"process {holder.pid}" in err and str(sweep) in err
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    assert call(*BASE, "--out", str(sweep))[0] == 0, "the system let go of it with the process"


def test_a_folder_that_cannot_be_written(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    (tmp_path / "file").write_text("not a folder")
    code, _, err = call(*BASE, "--out", str(tmp_path / "file" / "sweep"))
    assert code == 1
    assert str(tmp_path / "file") in err and "Traceback" not in err


# ---- single runs


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", "{"),
        ("result.json", '{"schema": 0}'),
        ("result.json", None),  # an older version, that kept no validation metrics
        ("config.json", "not json"),
    ],
)
def test_a_record_that_cannot_be_used_is_named_and_kept_and_the_others_go_on(
    sweep: Path, call: Callable[..., tuple[int, str, str]], name: str, content: str | None
) -> None:
    broken = runs_of(sweep, "mgda")[0] / name
    if content is None:
        stored = json.loads(broken.read_text())
        del stored["validation"]
        content = json.dumps(stored)
    broken.write_text(content)
    lost = runs_of(sweep, "uniform")[0]
    shutil.rmtree(lost)
    code, out, err = call(*BASE, "--out", str(sweep), "--json")
    found = json.loads(out)
    assert code == 1
    assert list(found["failures"]) == [broken.parent.name]
    assert f"failed: {broken.parent.name}" in err
    assert broken.read_text() == content, "it is not written over"
    assert (lost / "result.json").exists(), "the others go on"
    assert any("1" in line and "failed or diverged" in line for line in found["conditions"])


def test_a_damaged_checkpoint_is_the_failure_of_its_run_alone(
    sweep: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    run = runs_of(sweep, "mgda")[0]
    (run / "result.json").unlink()
    (run / "checkpoint.pt").write_bytes(b"cdetente\nnothing\n.")
    code, out, _ = call(*BASE, "--out", str(sweep), "--json")
    reasons = json.loads(out)["failures"]
    assert code == 1
    assert list(reasons) == [run.name]
    assert "checkpoint.pt" in reasons[run.name]


def test_a_run_that_fails_is_listed_and_does_not_stop_the_others(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(
        (HERE / "tiny.py").read_text()
        + """

class Broken(Tiny):
    learning_rates = (0.1, 1e30)

    def losses(self, output, labels):
        return {name: loss.square() for name, loss in super().losses(output, labels).items()}
"""
    )
    arguments = [f"{file}:Broken", *BASE[2:], "--trials", "2", "--out", str(tmp_path / "sweep"), "--json"]
    code, out, err = call("sweep", *arguments)
    found = json.loads(out)
    assert code == 1
    assert len(found["failures"]) == 2 and all("1e+30" in name for name in found["failures"])
    assert all("ValueError: step" in reason for reason in found["failures"].values())
    assert all(line.startswith("failed: ") for line in err.splitlines() if "1e+30" in line)
    assert [one["choice"]["learning_rate"] for one in found["contenders"]] == [0.1, 0.1]
    assert all(len(one["seeds"]) == 2 for one in found["contenders"])


def test_a_full_disk_stops_the_sweep_and_loses_nothing(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    whole = left_behind(sweep)
    for run in [*runs_of(sweep, "mgda")[1:], runs_of(sweep, "uniform")[0]]:
        shutil.rmtree(run)
    (sweep / "outcome.json").unlink()
    from detente.records import writing

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(writing, "write_json", full)
        code, _, err = call(*BASE, "--out", str(sweep))
    assert code == 1
    assert "No space left" in err and str(sweep) in err and "the same command goes on" in err
    assert err.count("No space left") == 1, "it does not try the other runs"
    assert call(*BASE, "--out", str(sweep))[0] == 0
    assert left_behind(sweep) == whole


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on the size of files")
def test_files_that_may_not_grow_are_a_failure_with_a_reason(tmp_path: Path) -> None:
    # What the system refuses in the middle of a checkpoint: no run ends, all are listed.
    import resource

    limit = 2_000
    process = start(
        *BASE,
        "--out",
        str(tmp_path / "sweep"),
        preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        ),
    )
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert "File too large" in err or "failed" in err


def test_the_problem_file_changes_while_the_sweep_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    file = tmp_path / "mine.py"
    shutil.copy(HERE / "tiny.py", file)
    from detente.sweeps.workers import InProcess

    module = importlib.import_module("detente.sweeps.sweep")

    class Disturbed(InProcess):
        def start(self, job: Any) -> None:
            super().start(job)
            if "uniform" not in job.name:
                file.write_text(file.read_text() + "\n# another day\n")

    monkeypatch.setattr(module, "InProcess", Disturbed)
    arguments = ["sweep", f"{file}:Tiny", *BASE[2:], "--out", str(tmp_path / "sweep"), "--json"]
    code, out, _ = call(*arguments)
    found = json.loads(out)
    assert code == 1
    assert {name.split("-lr")[0] for name in found["failures"]} >= {"mgda-exact"}
    assert all("changed since the sweep was started" in reason for reason in found["failures"].values())
