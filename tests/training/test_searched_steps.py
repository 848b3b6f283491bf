"""A run whose steps a line search takes: options before anything is written, tallies, the one warning."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import detente
from detente.cli import main
from detente.data import load_multimnist
from detente.experiments.multimnist import MultiMNIST, MultiMNISTConfig
from detente.linesearch import NoDescent, SearchFailed
from detente.records import read_run
from detente.training import train
from detente.training.config import TrainingConfig
from detente.training.steps import Batch, SearchedSteps, Tally, TooLongWarning

FAST: dict[str, Any] = {"search": "fast", "gradients": "features"}
CLASSICAL: dict[str, Any] = {"search": "backtracking"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        *[
            (FAST | {"search_gamma": value}, "search_gamma is")
            for value in (1.0, 0.5, float("inf"), float("nan"))
        ],
        *[(CLASSICAL | {"search_c": value}, "search_c is") for value in (0.0, 1.0, -1.0, float("nan"))],
        (CLASSICAL | {"search_trials": 0}, "search_trials is 0"),
        (FAST | {"search_check": -1}, "search_check is -1"),
        (CLASSICAL | {"search_check": 3}, "search_check is 3; .*network itself.*--search fast"),
        *[
            (FAST | {"search_small_step": value}, "search_small_step is")
            for value in (0.0, -1.0, float("inf"))
        ],
        (FAST | {"search_precondition": "adam"}, "search_precondition is adam.*--search backtracking"),
        (FAST | {"momentum": 0.9}, "momentum is 0.9; search fast takes plain steps.*momentum 0"),
        (CLASSICAL | {"nesterov": True}, "nesterov is True; search backtracking takes plain steps"),
        (CLASSICAL | {"weight_decay": 0.1}, "weight_decay is 0.1; search backtracking takes plain steps"),
        (CLASSICAL | {"scale": "sum"}, "scale is sum; search backtracking takes plain steps"),
        (CLASSICAL | {"optimizer": "adam"}, "optimizer is adam; search backtracking takes plain steps"),
        ({"search": "fast"}, "gradients is exact; search fast needs gradients features"),
        (FAST | CLASSICAL, "gradients is features; search backtracking needs gradients exact"),
        (FAST | {"balance": True}, "without a search"),
        (FAST | {"learning_rate": float("inf")}, "learning_rate is inf"),
        *[
            ({name: value}, f"{name} is .*needs a search")
            for name, value in {
                "search_gamma": 3.0,
                "search_trials": 3,
                "search_check": 7,
                "search_small_step": 0.1,
                "search_lower": "cap",
                "search_precondition": "adam",
            }.items()
        ],
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TrainingConfig(**options)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--search", "fast", "--gradients", "features", "--search-gamma", "1"], "search_gamma is 1.0"),
        (["--search", "backtracking", "--momentum", "0.9"], "momentum is 0.9"),
        (["--search", "fast"], "needs gradients features"),
        (["--search-check", "3"], "search_check is 3"),
    ],
)
def test_bad_search_options_exit_with_2_and_leave_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, flags: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["run", "multimnist", *flags])
    assert ended.value.code == 2
    assert told in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_what_is_left_out_is_filled_in() -> None:
    filled = [(c.momentum, c.search_check) for c in (TrainingConfig(), TrainingConfig(**CLASSICAL))]
    assert filled == [(0.9, 0), (0.0, 0)]
    assert (TrainingConfig(**FAST).momentum, TrainingConfig(**FAST).search_check) == (0.0, 7)
    chosen = TrainingConfig(momentum=0.5), TrainingConfig(search_check=0, momentum=0.0, **FAST)
    assert [(c.momentum, c.search_check) for c in chosen] == [(0.5, 0), (0.0, 0)]
    # What a run of before stored: the numbers themselves.
    for config in (TrainingConfig(), TrainingConfig(**CLASSICAL), TrainingConfig(**FAST)):
        assert TrainingConfig(**asdict(config)) == config


# ---- the steps alone, on problems for pencil and paper


class Trunk(nn.Module):
    """z = Wx with the one weight W that the tasks share."""

    def __init__(self, start: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 1), start, dtype=torch.float64))

    def shared_parameters(self) -> list[nn.Parameter]:
        return [self.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Pencil:
    """Losses of z alone."""

    tasks = ("a", "b")

    def __init__(self, losses: Any) -> None:
        self._losses = losses

    def features(self, output: torch.Tensor) -> torch.Tensor:
        return output

    def from_features(self, model: nn.Module, features: torch.Tensor) -> torch.Tensor:
        return features

    def losses(self, output: torch.Tensor, labels: Any) -> dict[str, torch.Tensor]:
        return dict(zip("ab", self._losses(output), strict=True))


def steps_of(losses: Any, module: nn.Module | None = None, **options: Any) -> SearchedSteps:
    module = Trunk() if module is None else module
    config = TrainingConfig(**options)
    method = detente.create(config.method)
    return SearchedSteps(Pencil(losses), config, method, module, module)  # type: ignore[arg-type]


def parabolas(z: torch.Tensor) -> list[torch.Tensor]:
    return [z.square().sum() / 2, z.square().sum() / 2]


def take(steps: SearchedSteps, x: float = 1.0) -> tuple[Any, Any]:
    inputs = torch.full((1, 1), x, dtype=torch.float64)
    record, further = steps.step([Batch(inputs, None)], measure=False, balance=False)
    return record, further["search"]


def test_options_arrive() -> None:
    steps = steps_of(
        parabolas,
        search="backtracking",
        search_gamma=3.0,
        search_c=0.2,
        search_trials=5,
        search_small_step=0.01,
        search_lower="divided",
        search_precondition="rmsprop",
        learning_rate=0.5,
    )
    search = steps.search
    assert (search.gamma, search.c, search.max_trials, search.lr_ub) == (3.0, 0.2, 5, 0.5)
    options = search.options
    assert (options.on_no_descent, options.small_step, options.lower_ub) == ("small-step", 0.01, "divided")
    assert options.precondition == "rmsprop"
    plain = steps_of(parabolas, search="backtracking").search.options
    assert (plain.on_no_descent, plain.lower_ub, plain.precondition) == ("error", None, None)


@pytest.mark.parametrize(("given", "expected"), [(None, [7]), (0, []), (3, [3, 6])])
def test_the_network_is_looked_at_every_so_many_steps(given: int | None, expected: list[int]) -> None:
    steps = steps_of(parabolas, **FAST, search_check=given, learning_rate=1e-3)
    seen = [take(steps)[1]["true_condition"] for _ in range(8)]
    assert [place for place, found in enumerate(seen, start=1) if found is not None] == expected


def test_a_search_without_a_length_is_a_refused_step() -> None:
    """Both parabolas together have curvature 2, so that lengths below 1 fall as promised; 8 and 4 do not."""
    module = Trunk()
    steps = steps_of(parabolas, module, **CLASSICAL, learning_rate=8.0, search_trials=2)
    record, found = take(steps)
    assert (found["status"], record.status, record.accepted) == ("capped", "refused", False)
    assert record.notes == ("no length of the search was accepted",)
    assert module.weight.item() == 1.0
    assert (steps.tally.steps, steps.tally.capped, steps.tally.trials, steps.tally.first) == (1, 1, 2, 0)
    steps = steps_of(parabolas, **CLASSICAL, learning_rate=0.5)
    record, found = take(steps)
    assert (found["status"], record.status, record.notes) == ("accepted", "ok", ())
    assert (steps.tally.capped, steps.tally.first) == (0, 1)


@pytest.mark.parametrize("options", [CLASSICAL, FAST])
def test_no_descent_advises_flags(options: dict[str, Any]) -> None:
    """Gradients 1 and -2: their sum raises the first loss."""

    def opposed(z: torch.Tensor) -> list[torch.Tensor]:
        return [z.sum(), -2 * z.sum()]

    with pytest.raises(NoDescent, match=r"task 'a' \(-1\).*--method.*--search-small-step LENGTH") as raised:
        take(steps_of(opposed, **options))
    assert raised.value.tasks == ("a",)
    assert "on_no_descent" not in str(raised.value)
    record, found = take(steps_of(opposed, **options, search_small_step=0.25))
    assert (found["status"], found["eta"], record.accepted) == ("small-step", 0.25, True)


def test_no_descent_of_a_preconditioner_and_failures_advise_flags() -> None:
    steps = steps_of(
        lambda z: [steps.sign * z.sum(), z.sum() * steps.sign], **CLASSICAL, search_precondition="adam"
    )  # type: ignore[attr-defined]
    steps.sign = 1.0  # type: ignore[attr-defined]
    take(steps)
    steps.sign = -0.1  # type: ignore[attr-defined]
    with pytest.raises(NoDescent, match="no --search-precondition adam"):
        take(steps)
    # A step of 1 leads to z = 1 - (1 + 1) = -1, whose logarithm is none.
    failing = steps_of(lambda z: [z.sum(), z.log().sum()], **CLASSICAL, learning_rate=1.0, search_trials=1)
    with pytest.raises(SearchFailed, match=r"not finite.*Lower --learning-rate, or raise --search-trials\.$"):
        take(failing)


def test_the_schedule_and_the_lowering_multiply() -> None:
    """As for the search alone; and an epoch that is resumed begins with the length it began with."""
    steps = steps_of(
        parabolas,
        **CLASSICAL,
        learning_rate=8.0,
        halve_every=1,
        search_lower="divided",
    )
    steps.search.options = replace(steps.search.options, patience=1)
    assert steps.rate(0) == 8.0
    take(steps)
    assert (steps.search.lowered, steps.search.first_length) == (1, 4.0)
    again = steps_of(parabolas, **CLASSICAL, learning_rate=8.0, halve_every=1, search_lower="divided")
    again.load_state_dict(steps.state_dict())
    assert again.rate(0) == steps.rate(0) == 8.0
    assert again.search.first_length == 4.0
    told = steps.end_epoch(0)
    assert again.end_epoch(0) == told and told["length"] == 8.0
    assert steps.rate(1) == again.rate(1) == 2.0


def test_one_warning_a_run_where_the_encoder_is_moved_too_far() -> None:
    """z = 10 W: a length of ½ is right for z (both parabolas have curvature 2) and 100 times too much for W."""
    module = Trunk()
    steps = steps_of(parabolas, module, **FAST, search_check=2, learning_rate=0.4)
    for epoch, warned in ((0, True), (1, False)):
        steps.rate(epoch)
        for _ in range(5):
            with torch.no_grad():
                module.weight.fill_(1.0)
            take(steps, 10.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            told = steps.end_epoch(epoch)
        counts = {"steps": 5, "trials": 5, "first": 5, "capped": 0, "checks": [2, 3][epoch]}
        assert told == {"length": 0.4, **counts, "failures": counts["checks"]}
        assert [(str(w.message), w.category) for w in caught] == (
            [
                (
                    "the fast search took its first length 0.4 in 5 of 5 steps of epoch 1, but after 2 of 2 steps that "
                    "were checked some loss of the network itself had not fallen as promised. This search moves the "
                    "representation and does not bound the step of the encoder, so the first length acts like a "
                    "learning rate, here most likely too high a one: training can end at chance. Lower "
                    "--learning-rate, or use --search backtracking --gradients exact, which tries every length on the "
                    "network itself.",
                    TooLongWarning,
                )
            ]
            if warned
            else []
        )
        saved = steps.state_dict()
        steps = steps_of(parabolas, module, **FAST, search_check=2, learning_rate=0.4)
        steps.load_state_dict(saved)


@pytest.mark.parametrize(
    ("checks", "failures", "warned"), [(10, 1, False), (9, 1, True), (3, 0, False), (0, 0, False)]
)
def test_more_than_a_tenth_of_the_checks_must_fail(checks: int, failures: int, warned: bool) -> None:
    steps = steps_of(parabolas, **FAST)
    steps.tally = Tally(length=0.1, steps=70, checks=checks, failures=failures)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps.end_epoch(0)
    assert bool(caught) == warned


def test_every_epoch_tells_what_its_searches_did(tmp_path: Path) -> None:
    """The tallies, from the records of all steps."""
    digits = load_multimnist().take(200)  # 4 steps an epoch
    base = MultiMNISTConfig(method="mgda", epochs=3, batch_size=64, record_steps=100)
    config = replace(base, **FAST, momentum=0.0, search_check=2, learning_rate=0.3)
    for name, this in (("fast", config), ("plain", base)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TooLongWarning)
            train(MultiMNIST(this, digits), this, tmp_path / name, experiment="x", command="x", quiet=True)
    run = read_run(tmp_path / "fast")
    assert run.config["config"]["momentum"] == 0.0 and run.config["config"]["search_check"] == 2
    for row in run.epochs:
        steps = [step["search"] for step in run.steps if step["epoch"] == row["epoch"]]
        seen = [step["true_condition"] for step in steps if step["true_condition"] is not None]
        assert row["search"] == {
            "length": row["learning_rate"],
            "steps": 4,
            "trials": sum(step["trials"] for step in steps),
            "first": sum(step["trials"] == 1 for step in steps),
            "capped": 0,
            "checks": 2,
            "failures": seen.count(False),
        }
        assert len(seen) == 2
    assert all("search" not in row for row in read_run(tmp_path / "plain").epochs)
    assert json.dumps(run.epochs[0]["search"])
