"""The command line, from outside: what it prints, where, and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import detente
from detente.experiments import experiments

QUICK = ["--epochs", "1", "--max-steps", "2", "--batch-size", "64"]


def test_help_names_every_command(call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = call("--help")
    assert code == 0
    for command in ("demo", "run", "evaluate", "report", "methods", "experiments"):
        assert command in out


@pytest.mark.parametrize("command", ["demo", "evaluate", "report", "methods", "experiments"])
def test_every_command_has_help_and_json(call: Callable[..., tuple[int, str, str]], command: str) -> None:
    code, out, _ = call(command, "--help")
    assert code == 0
    assert "--json" in out


def test_the_pinned_flags_of_run_exist(call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = call("run", "multimnist", "--help")
    assert code == 0
    for flag in (
        "--method",
        "--gradients",
        "--data-dir",
        "--epochs",
        "--max-steps",
        "--seed",
        "--out",
        "--json",
    ):
        assert flag in out


def test_methods_and_experiments_as_json_name_what_is_registered(
    call: Callable[..., tuple[int, str, str]],
) -> None:
    _, out, _ = call("methods", "--json")
    found = json.loads(out)
    assert set(found) == set(detente.methods())
    assert found["mgda"]["options"]["solver"] == {
        "default": "exact",
        "choices": ["exact", "frank-wolfe"],
        "search": [],
    }
    _, out, _ = call("experiments", "--json")
    assert set(json.loads(out)) == set(experiments())


def test_lists_for_people_hold_every_name(call: Callable[..., tuple[int, str, str]]) -> None:
    _, out, _ = call("methods")
    for name in detente.methods():
        assert name in out


def test_run_prints_one_json_object_and_evaluate_repeats_it(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    out_folder = str(tmp_path / "run")
    arguments = [
        "run",
        "multimnist",
        "--method",
        "mgda",
        "--gradients",
        "features",
        "--out",
        out_folder,
        "--json",
    ]
    code, out, _ = call(*arguments, *QUICK, "--option", "solver=frank-wolfe")
    assert code == 0
    result = json.loads(out)
    assert (result["experiment"], result["method"], result["seed"], result["epochs"]) == (
        "multimnist",
        "mgda",
        0,
        1,
    )
    assert result["options"] == {"solver": "frank-wolfe"}
    assert set(result["metrics"]) == {"left", "right"}
    assert result["seconds"] > 0
    code, out, _ = call("evaluate", out_folder, "--json")
    assert code == 0
    again = json.loads(out)["metrics"]
    for task, values in result["metrics"].items():
        assert again[task] == pytest.approx(values, abs=1e-12)


def test_a_single_task_run_learns_one_digit(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = call(
        "run", "multimnist", "--tasks", "left", "--out", str(tmp_path / "r"), "--json", *QUICK
    )
    assert code == 0
    assert set(json.loads(out)["metrics"]) == {"left"}


def test_a_method_of_ones_own_from_a_file(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    (tmp_path / "mine.py").write_text(
        '"""Mine."""\n'
        "import torch\nimport detente\n\n"
        "class First(detente.Method):\n"
        '    """First: follow the first task alone."""\n'
        '    declares = detente.Declaration(name="first-only", source="here", needs=frozenset({"gramian"}))\n'
        "    def solve(self, gradients):\n"
        "        weights = torch.zeros(gradients.tasks, dtype=torch.float64)\n"
        "        weights[0] = 1\n"
        "        return detente.Combination(weights=weights)\n"
    )
    method = f"{tmp_path / 'mine.py'}:First"
    code, *_ = call("run", "multimnist", "--method", method, "--out", str(tmp_path / "r"), "--json", *QUICK)
    assert code == 0
    step = json.loads((tmp_path / "r" / "steps.jsonl").read_text().splitlines()[0])
    assert step["weights"] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["frobnicate"], "frobnicate"),
        (["run", "multimnst"], "did you mean 'multimnist'"),
        (["run", "multimnist", "--method", "mgdaa"], "did you mean 'mgda'"),
        (["run", "multimnist", "--method", "mgda", "--option", "solvr=exact"], "solver"),
        (["run", "multimnist", "--method", "mgda", "--option", "exact"], "name=value"),
        (["run", "multimnist", "--epochs", "many"], "many"),
        (["run", "multimnist", "--epochs", "0"], "epochs"),
        (["run", "multimnist", "--method", "mgda", "--option", "solver=newton"], "newton"),
    ],
)
def test_bad_usage_exits_with_2_and_says_what(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., tuple[int, str, str]],
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*arguments)
    assert code == 2
    assert told in err
    assert out == ""
    assert not list(tmp_path.iterdir()), "nothing may be written before the arguments are right"


def test_another_configuration_in_the_folder_exits_with_2(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    arguments = ["run", "multimnist", "--out", str(tmp_path / "r"), *QUICK]
    assert call(*arguments)[0] == 0
    code, _, err = call(*arguments, "--learning-rate", "0.5")
    assert code == 2
    assert "learning_rate" in err and str(tmp_path / "r") in err


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: ["run", "multimnist", "--data-dir", str(folder / "nowhere")], "nowhere"),
        (lambda folder: ["evaluate", str(folder / "nowhere")], "nowhere"),
        (lambda folder: ["report", str(folder / "nowhere")], "nowhere"),
        (lambda folder: ["run", "multimnist", "--out", str(folder / "file" / "run"), *QUICK], "file"),
    ],
)
def test_what_fails_exits_with_1_and_names_the_file(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]], make, told: str
) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "file").write_text("not a folder")
    code, _, err = call(*make(tmp_path))
    assert code == 1
    assert told in err
    assert "Traceback" not in err
