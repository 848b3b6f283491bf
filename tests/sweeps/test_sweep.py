"""A real sweep of a tiny problem, from the first run to the outcome; undisturbed, and killed at random moments."""

from __future__ import annotations

import csv
import html
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sweeping import HERE, QUICK, TINY, environment

from benchmarks._nursery import Nursery
from benchmarks.sweeps import kill_sweep, left_behind
from detente.cli import main
from detente.metrics import delta_m
from detente.records import read_run
from detente.sweeps.outcome import tables

ASKED = ["sweep", TINY, "--methods", "uniform", "cagrad", "--front", "3", *QUICK]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "sweep"
    with pytest.raises(SystemExit) as stopped:
        main([*ASKED, "--out", str(folder)])
    assert stopped.value.code == 0
    return folder


@pytest.fixture(scope="module")
def outcome(finished: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished / "outcome.json").read_text())
    return found


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery(environment()) as found:
        yield found


# ---- what comes out


def test_every_contender_is_there_with_its_seeds(outcome: dict[str, Any]) -> None:
    names = ["uniform", "cagrad (exact)", "tuned scalarisation", "single task: sum", "single task: sign"]
    assert [one["name"] for one in outcome["contenders"]] == names
    assert all(sorted(one["seeds"]) == ["0", "1"] for one in outcome["contenders"])
    assert all(one["choice"]["tuning_runs"] in (3, 4) for one in outcome["contenders"])
    assert outcome["failures"] == {}
    assert outcome["comparison"]["reference"] == "tuned scalarisation"


def test_only_what_was_chosen_or_lies_on_the_front_was_measured_on_test_data(
    finished: Path, outcome: dict[str, Any]
) -> None:
    tested = {
        path.parent.name
        for path in finished.glob("runs/*/result.json")
        if read_run(path.parent).result["metrics"]
    }  # type: ignore[index]
    chosen = {name for one in outcome["contenders"] for name in one["runs"]}
    assert chosen <= tested
    front = 2 * len(outcome["front"]["points"])
    assert len(tested) <= len(chosen) + front < len(list(finished.glob("runs/*")))


def test_the_numbers_are_those_of_the_runs(finished: Path, outcome: dict[str, Any]) -> None:
    for one in outcome["contenders"]:
        values: dict[str, list[float]] = {}
        for name in one["runs"]:
            run = read_run(finished / "runs" / name)
            for task in run.tasks:
                value = run.main_value(task)
                assert value is not None
                values.setdefault(task, []).append(value)
        for task, listed in values.items():
            assert one["test"][task]["mean"] == pytest.approx(np.mean(listed))
            assert one["test"][task]["deviation"] == pytest.approx(np.std(listed, ddof=1))


def test_delta_m_is_taken_per_task_and_per_metric_over_all_metrics(outcome: dict[str, Any]) -> None:
    by_name = {one["name"]: one for one in outcome["contenders"]}
    base = {
        "sum": by_name["single task: sum"]["all_metrics"]["sum"],
        "sign": by_name["single task: sign"]["all_metrics"]["sign"],
    }
    assert set(base["sign"]) == {"accuracy", "loss"}
    mine = by_name["uniform"]
    directions = {"error": False, "accuracy": True, "loss": False}
    assert mine["delta_m"]["per_task"] == pytest.approx(delta_m(mine["all_metrics"], base, directions))
    assert mine["delta_m"]["per_metric"] == pytest.approx(
        delta_m(mine["all_metrics"], base, directions, per="metric")
    )


def test_the_front_has_its_volume_and_what_methods_add_to_it(outcome: dict[str, Any]) -> None:
    front = outcome["front"]
    assert [point["weights"] for point in front["points"]] == [[1 / 3, 2 / 3], [2 / 3, 1 / 3]]
    assert front["hypervolume"] >= 0
    assert all(gain >= 0 for gain in front["gain"].values())
    assert set(front["reference_point"]) == {"sum", "sign"}


def test_conditions_tell_the_budget_the_rule_and_the_test_data(outcome: dict[str, Any]) -> None:
    told = " ".join(outcome["conditions"])
    assert "3 tuning runs of 2 epochs" in told and "2 seeds" in told
    assert "least Δm" in told
    assert "the weightings of the front alone, once for each run" in told
    assert "native length" in told


def test_the_csv_has_a_line_for_every_contender(finished: Path, outcome: dict[str, Any]) -> None:
    with open(finished / "outcome.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["contender"] for row in rows] == [one["name"] for one in outcome["contenders"]]
    assert float(rows[0]["sum mean"]) == outcome["contenders"][0]["test"]["sum"]["mean"]


def test_printed_tables_fit_and_lose_nothing(outcome: dict[str, Any]) -> None:
    for width in (40, 80, 140):
        (_, summary), *metrics = tables(outcome, width)
        names = [row[0] for row in summary]
        assert names[-2:] == ["single task: sum", "single task: sign"], "the best first, single tasks last"
        scores = [float(row[1].split()[0]) for row in summary[:3]]
        assert scores == sorted(scores)
        for header, rows in metrics:
            assert [row[0] for row in rows] == names
            lengths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
            assert sum(lengths) + 2 * (len(lengths) - 1) <= width or len(lengths) == 2
        shown = [column for header, _ in metrics for column in header[1:]]
        assert shown == ["sum error ↓", "sign accuracy % ↑"]
    assert len(tables(outcome, 40)) == 3 and len(tables(outcome, 140)) == 2


def test_a_run_is_repeated_by_the_command_in_its_record(
    finished: Path, outcome: dict[str, Any], tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    import shlex

    run = read_run(finished / "runs" / outcome["contenders"][1]["runs"][0])
    detente, *arguments = shlex.split(run.config["command"])
    place = arguments.index("--out") + 1
    arguments[place] = str(tmp_path / "again")
    assert detente == "detente"
    # What was chosen was measured on test data later.
    assert call(*arguments, "--test")[0] == 0
    again = read_run(tmp_path / "again")
    assert run.result is not None and again.result is not None
    assert again.result["metrics"] == run.result["metrics"]


def test_the_same_command_on_a_finished_sweep_repeats_nothing(
    finished: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    before = left_behind(finished)
    times = {path: path.stat().st_mtime_ns for path in finished.glob("runs/*/*")}
    code, out, _ = call(*ASKED, "--out", str(finished))
    assert code == 0
    assert "tuned scalarisation" in out
    assert {path: path.stat().st_mtime_ns for path in finished.glob("runs/*/*")} == times
    assert left_behind(finished) == before


def test_a_sweep_of_a_version_that_knew_fewer_options_goes_on(
    finished: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    folder = tmp_path / "sweep"
    shutil.copytree(finished, folder)
    for path in (folder / "sweep.json", *folder.glob("runs/*/config.json")):
        stored = json.loads(path.read_text())
        for one in stored["contenders"].values() if "contenders" in stored else [stored]:
            del one["config"]["nesterov"]
        path.write_text(json.dumps(stored))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*")}
    code, _, err = call(*ASKED, "--out", str(folder))
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*")} == before
    code, _, err = call(*ASKED, "--nesterov", "--out", str(folder))
    assert code != 0
    assert "nesterov is '(absent)'" not in err


def test_what_a_method_compares_is_asked_for_before_anything_runs(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = call(
        "sweep", TINY, "--methods", "modo", "--accumulate", "2", "--out", str(tmp_path / "no")
    )
    assert code == 2
    assert "modo (exact): method modo compares the gradients of 3 independent batches" in err
    assert not (tmp_path / "no").exists()


def test_one_seed_gives_no_tests_and_no_spreads(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    arguments = [*ASKED, "--seeds", "1", "--no-singles", "--out", str(tmp_path / "sweep")]
    code, out, _ = call(*arguments)
    assert code == 0
    assert "too few seeds" in out
    assert "±" not in out
    assert "change %" in out, "without single tasks there is no Δm"


def test_who_learned_from_several_batches_in_a_step_is_told(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    few = ["--trials", "2", "--seeds", "1", "--front", "0", "--no-singles", "--no-cost", "--epochs", "1"]
    words = ["sweep", TINY, "--methods", "uniform", "modo", *few, "--out"]
    for further, told in ((), True), (("--further-batches", "same"), False):
        code, _, err = call(*words, str(tmp_path / str(told)), *further)
        assert code == 0, err
        conditions = " ".join(json.loads((tmp_path / str(told) / "outcome.json").read_text())["conditions"])
        assert ("drew all of them anew for every step: modo (exact) 3." in conditions) == told


# ---- interruptions


def test_a_sweep_killed_at_random_moments_ends_like_an_undisturbed_one(
    finished: Path, tmp_path: Path, nursery: Nursery
) -> None:
    folder = tmp_path / "sweep"
    assert kill_sweep(nursery, ASKED, folder, kills=12) >= 2
    assert left_behind(folder) == left_behind(finished)


def test_nothing_that_finished_is_run_again_after_a_kill(tmp_path: Path, nursery: Nursery) -> None:
    folder = tmp_path / "sweep"
    arguments = [*ASKED, "--out", str(folder)]
    seconds = 1.0
    while not list(folder.glob("runs/*/result.json")):
        assert nursery.run(arguments, seconds) in (-9, 0)
        seconds += 0.5
    epochs = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/epochs.jsonl")
              if (path.parent / "result.json").exists()}  # fmt: skip
    assert nursery.run(arguments, None) == 0
    assert {path: path.stat().st_mtime_ns for path in epochs} == epochs


def test_a_run_that_an_orphan_still_writes_is_waited_for(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "sweep"))
    run = min(folder.glob("runs/cagrad*"))
    (run / "result.json").unlink()
    hold = "import sys, time; from pathlib import Path; from detente.records.lock import locked\n"
    hold += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(1.5)"
    orphan = subprocess.Popen(
        [sys.executable, "-c", hold, str(run)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert orphan.stdout is not None and orphan.stdout.readline() == "held\n"
    started = time.monotonic()
    code, _, _ = call(*ASKED, "--out", str(folder))
    assert code == 0
    assert time.monotonic() - started > 1.0
    orphan.wait()
    orphan.stdout.close()
    assert left_behind(folder) == left_behind(finished)


def test_an_orphan_that_does_not_end_is_a_failure_of_that_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    from detente.records.lock import locked
    from detente.sweeps import workers

    monkeypatch.setattr(workers, "_SECONDS_FOR_AN_ORPHAN", 0.1)
    folder = Path(shutil.copytree(finished, tmp_path / "sweep"))
    run = min(folder.glob("runs/cagrad*"))
    (run / "result.json").unlink()
    with locked(run):
        code, out, _ = call(*ASKED, "--out", str(folder), "--json")
    assert code == 1
    assert "written to by another process" in json.loads(out)["failures"][run.name]


# ---- the examples


@pytest.mark.parametrize("name", ["training_function.py:train", "diabetes.py:Diabetes"])
def test_examples_sweep(name: str, tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    place = HERE.parents[1] / "examples"
    arguments = ["sweep", f"{place / name}", "--methods", "uniform", f"{place / 'my_method.py'}:Loudest"]
    arguments += [
        "--lrs",
        "0.01",
        "--trials",
        "1",
        "--epochs",
        "1",
        "--seeds",
        "2",
        "--no-cost",
        "--out",
        str(tmp_path / "s"),
    ]
    code, out, _ = call(*arguments, "--json")
    found = json.loads(out)
    assert code == 0
    assert {"uniform", "loudest"} <= {one["name"] for one in found["contenders"]}
    assert found["failures"] == {}
    stored = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert len(stored["files"]) == 2 and all(len(mark) == 64 for mark in stored["files"].values())


def test_the_report_of_a_sweep_tells_its_outcome(
    finished: Path, outcome: dict[str, Any], tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    page = tmp_path / "report.html"
    code, _, err = call("report", str(finished), "--output", str(page))
    assert code == 0, err
    text = page.read_text(encoding="utf-8")
    for one in outcome["contenders"]:
        assert one["name"] in text
    for told in outcome["conditions"]:
        assert html.escape(told) in text
    said = outcome["comparison"]["methods"]["cagrad (exact)"]
    assert f"{said['score']['mean']:+.2f}".replace("-", "−") in text
    # Runs that only tuned are no contenders' runs.
    chosen = {name for one in outcome["contenders"] for name in one["runs"]}
    tuning = {path.name for path in (finished / "runs").iterdir()} - chosen
    assert tuning and not any(f"{name}<" in text for name in tuning)
