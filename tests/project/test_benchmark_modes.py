"""The benchmark of the modes compares like with like, and its memory is counted to the byte."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import modes
from benchmarks._networks import Case, lenet, many_heads, recurrent, resnet, transformer
from benchmarks._timing import by_round, interleaved, ratios
from detente.training.memory import peak_allocated as peak


def test_peaks_are_bytes_at_the_highest_moment() -> None:
    def run() -> None:
        first = torch.empty(1000, 256)
        del first
        kept = torch.empty(3, 1024)
        kept.exp_()
        both = torch.empty(500, 1024)
        del kept, both

    assert peak(run) == 4 * (3 + 500) * 1024
    assert peak(run) == peak(run)


def test_a_peak_inside_an_operation_and_in_a_backward() -> None:
    x = torch.ones(256, 1024, requires_grad=True)

    def run() -> None:
        (x.exp() * 2).sum().backward()
        x.grad = None

    assert peak(run) >= 2 * 4 * 256 * 1024


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "case",
    [
        lambda: lenet(3, 4),
        lambda: resnet(2, 2, 32),
        lambda: transformer(3, 2, 16, 5),
        lambda: recurrent(3, 4, 8, 6),
        lambda: many_heads(5, 8, 16),
    ],
    ids=["LeNet", "ResNet", "transformer", "GRU", "heads"],
)
def test_all_ways_of_the_exact_step_give_the_same_gradients(case: object) -> None:
    """IMTL-G by hand, here, and by TorchJD where it is installed."""
    pytest.importorskip("torchjd", reason="the peers of the benchmark")
    made: Case = case()  # type: ignore[operator]
    found = {}
    for name, make in modes.runs(made, peers=True).items():
        torch.manual_seed(5)  # dropout
        make()()
        found[name] = [p.grad.clone() for p in (*made.shared, *(q for head in made.own for q in head))]
        made.clear()
    for name in ("batched", "low", "by hand", "TorchJD", "TorchJD vmap"):
        for got, want in zip(found[name], found["exact"], strict=True):
            assert torch.allclose(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max())), name
    own = len(made.shared)
    for name in ("features", "plain"):
        for got, want in zip(found[name][own:], found["exact"][own:], strict=True):
            assert torch.allclose(got, want, rtol=1e-3, atol=1e-5), name


def test_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(modes, "CHEAP_BUDGET", 0.0)
    monkeypatch.setattr(modes, "COSTLY_BUDGET", 0.0)
    case = many_heads(5, 8, 16)
    table = modes.measure(case, 1.15, peers=False)
    assert [row.mode for row in table.rows] == [
        "plain",
        "weighting",
        "features",
        "exact",
        "batched",
        "low",
        "by hand",
    ]
    by_mode = {row.mode: row for row in table.rows}
    shared = sum(parameter.numel() for parameter in case.shared)
    assert by_mode["exact"].peak >= by_mode["plain"].peak + 4 * 4 * shared
    assert by_mode["by hand"].peak >= 2 * 4 * 5 * shared > by_mode["plain"].peak
    assert [row.rounds for row in table.rows] == [7, 7, 7, 3, 3, 3, 3]
    assert [what for what, _ in table.promises()] == ["features", "exact", "low"]
    limit = dict(table.promises())["exact"].limit * modes.MIB
    assert limit == pytest.approx(1.05 * (by_mode["plain"].peak + 4 * 5 * shared))
    modes.show(table)
    assert "T = 5, batch 8" in capsys.readouterr().out


def test_what_does_not_fit_or_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "CHEAP_BUDGET", 0.0)
    monkeypatch.setattr(modes, "COSTLY_BUDGET", 0.0)
    monkeypatch.setattr(modes, "_available", lambda: 2.0 * 4 * 3 * 131584)
    table = modes.measure(many_heads(3, 8, 256), None, peers=False)
    assert [row.mode for row in table.rows][-1] == "low"
    assert table.left_out == [f"{name}: may take 0 GiB" for name in ("batched", "by hand")]


@pytest.mark.parametrize(
    ("measured", "lower", "verdict"),
    [(0.9, 0.8, "kept"), (1.1, 0.9, "kept within the spread"), (1.1, 1.01, "NOT KEPT")],
)
def test_verdicts(measured: float, lower: float, verdict: str) -> None:
    assert modes.Promise("time", measured, 1.0, lower).verdict == verdict


def test_rounds_end_with_the_budget_but_there_are_a_few() -> None:
    calls: list[str] = []
    seconds = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 9, budget=0.0, least=2
    )
    assert calls == ["a", "b", "b", "a", "a", "b"]  # the first two to warm up
    assert len(seconds["a"]) == 2
    told = {"a": [2.0, 3.0, 9.0], "b": [1.0, 3.0, 3.0]}
    assert by_round(told, "a", "b") == [1.0, 2.0, 3.0]
    assert ratios(told, "a", "b") == (2.0, 1.0, 3.0)
