"""Saving and loading, moments, the first length that lowers itself, and what a step may cost."""

from __future__ import annotations

import io
import sys
from collections import Counter
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

import detente
import detente.autograd.host
from detente.linesearch import Backtracking, FastBacktracking, SearchRecord

KINDS = [Backtracking, FastBacktracking]


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("kind", "options", "method"),
    [
        *[(Backtracking, {}, method) for method in ("mgda", "rlw", "moco")],
        (Backtracking, {"lower_ub": "divided", "patience": 3}, "mgda"),
        (Backtracking, {"precondition": "adam"}, "rlw"),
        (Backtracking, {"precondition": "adagrad"}, "moco"),
        *[
            (FastBacktracking, {"check_true": 2, "lower_ub": "divided", "patience": 4}, m)
            for m in ("mgda", "rlw")
        ],
    ],
)
def test_resuming_is_not_stopping(
    kind: Any, options: dict[str, Any], method: str, net: Any, batch: Any
) -> None:
    options = {"on_no_descent": "small-step", "small_step": 1e-3} | options

    def made(model: Any) -> Any:
        return kind(detente.create(method), model.encoder, model.heads, 2.0, max_trials=8, **options)

    def run(search: Any, model: Any, steps: range) -> list[dict[str, Any]]:
        found: list[SearchRecord] = [search.step(model.closure(batch(step))) for step in steps]
        return [{**record.to_dict(), "seconds": None} for record in found]

    torch.manual_seed(0)
    search = made(net)
    run(search, net, range(7))
    saved = through_a_file(
        {"search": search.state_dict(), "net": net.state_dict(), "random": torch.get_rng_state()}
    )
    other = deepcopy(net)
    whole = run(search, net, range(7, 20))
    end = torch.get_rng_state()

    for parameter in other.parameters():
        parameter.data.normal_()
    again = made(other)
    other.load_state_dict(saved["net"])
    again.load_state_dict(saved["search"])
    torch.set_rng_state(saved["random"])
    assert run(again, other, range(7, 20)) == whole
    assert torch.get_rng_state().equal(end)
    for (name, mine), theirs in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert mine.equal(theirs), name
    first, second = search.state_dict(), again.state_dict()
    assert (first["lr_ub"], first["counters"]) == (second["lr_ub"], second["counters"])


def test_a_state_that_does_not_fit_changes_nothing(net: Any, batch: Any) -> None:
    def made(kind: Any = Backtracking, **options: Any) -> Any:
        return kind(detente.create("mgda"), net.encoder, net.heads, 0.1, **options)

    adam, plain, fast = made(precondition="adam"), made(), made(FastBacktracking)
    adam.step(net.closure(batch(0)))
    for search, state, message in (
        (plain, adam.state_dict(), "saved search has precondition='adam', this one has none"),
        (adam, plain.state_dict(), "saved search has precondition=None, this one precondition='adam'"),
        (
            made(precondition="rmsprop"),
            adam.state_dict(),
            "precondition='adam', this one precondition='rmsprop'",
        ),
        (fast, plain.state_dict(), "not the state of a FastBacktracking"),
        (plain, {"lr_ub": 1.0}, "not the state of a Backtracking"),
        (plain, plain.state_dict() | {"lr_ub": -1.0}, "option lr_ub is -1.0"),
    ):
        before = deepcopy(search.state_dict())
        with pytest.raises(ValueError, match=message):
            search.load_state_dict(state)
        after = search.state_dict()
        assert (before["lr_ub"], before["counters"]) == (after["lr_ub"], after["counters"])
    smaller = Backtracking(detente.create("mgda"), net.encoder[0].weight, [], 0.1, precondition="adam")
    with pytest.raises(ValueError, match="moments of parameter"):
        smaller.load_state_dict(adam.state_dict())


@pytest.mark.parametrize(
    ("kind", "peer"),
    [("adam", torch.optim.Adam), ("rmsprop", torch.optim.RMSprop), ("adagrad", torch.optim.Adagrad)],
)
def test_preconditioned_steps_are_torchs_own(kind: Any, peer: Any, batch: Any) -> None:
    """One sum as direction and every first length accepted: then the search is that optimizer at lr = lr_ub."""
    torch.manual_seed(0)
    rate, net = 1e-3, nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 1), nn.Linear(8, 2)]).double()
    twin = deepcopy(net)

    def closure(model: Any, x: torch.Tensor) -> Any:
        z = model[0](x).tanh()
        return None, [(model[1](z) - x[:, :1]).square().mean(), (model[2](z) - x[:, 1:3]).square().mean()]

    search = Backtracking(
        detente.create("uniform"),
        net[0],
        net[1:],
        rate,
        precondition=kind,
        on_no_descent="small-step",
        small_step=rate,
        rounding=1e16,  # accept whatever is finite: the length is not what is compared
    )
    optimizer = peer(twin.parameters(), lr=rate)
    for step in range(50):
        x = batch(step)
        assert search.step(lambda features=None, x=x: closure(net, x)).eta == rate
        optimizer.zero_grad()
        sum(closure(twin, x)[1]).backward()
        optimizer.step()
    for mine, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_preconditioned_slopes_are_derivatives_along_the_step(net: Any, batch: Any) -> None:
    search = Backtracking(
        detente.create("mgda"),
        net.encoder,
        net.heads,
        1e-8,
        precondition="rmsprop",
        on_no_descent="small-step",
        small_step=1e-8,
    )
    found = search.step(net.closure(batch(0)))
    assert found.losses_after is not None and found.slopes is not None
    drop = [(a - b) / found.eta for a, b in zip(found.losses_before, found.losses_after, strict=True)]
    assert drop == pytest.approx(found.slopes, rel=1e-3)


@pytest.mark.parametrize("outcome", ["capped", "accepted"])
def test_a_skipped_step_leaves_the_moments(outcome: str) -> None:
    theta = nn.Parameter(torch.tensor([2.0]))
    search = Backtracking(
        detente.create("uniform"),
        [theta],
        [],
        1.0,
        precondition="adagrad",
        max_trials=1 if outcome == "capped" else 20,
    )
    # θ² from 2 along sign(θ): a step of 1 goes to 1, which asks for c <= 3/4; with c = 0.9 it is refused.
    search.c = 0.9
    found = search.step(lambda features=None: (None, [theta.square().sum()]))
    assert found.status == outcome
    states = search.state_dict()["moments"]["states"]
    assert (len(states) == 0) == (outcome == "capped")


def parabola(curvature: float) -> tuple[nn.Parameter, Any]:
    theta = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    return theta, lambda features=None: (None, [curvature * theta**2 / 2])


def test_the_first_length_lowers_itself_after_divided_searches() -> None:
    """The bound on a parabola of curvature 1 is just below 2: 8 needs three divisions, and in the end none."""
    theta, closure = parabola(1.0)
    search = Backtracking(detente.create("uniform"), [theta], [], 8.0, lower_ub="divided", patience=2)
    found = []
    for _ in range(8):
        with torch.no_grad():
            theta.fill_(1.0)
        found.append(search.step(closure))
    assert [record.lr_ub for record in found] == [8, 8, 4, 4, 2, 2, 1, 1]
    assert [record.trials for record in found] == [4, 4, 3, 3, 2, 2, 1, 1]
    assert search.lr_ub == 1.0
    assert [len(record.notes) for record in found] == [0, 1, 0, 1, 0, 1, 0, 0]
    assert "lr_ub lowered to 4 after 2 searches in a row" in found[1].notes


def test_the_first_length_lowers_itself_after_capped_searches() -> None:
    theta, closure = parabola(1.0)
    search = Backtracking(
        detente.create("uniform"), [theta], [], 16.0, lower_ub="cap", patience=1, max_trials=2, check_steps=0
    )
    statuses = []
    for _ in range(4):
        with torch.no_grad():
            theta.fill_(1.0)
        statuses.append(search.step(closure).status)
    # 16, 8 and 8, 4 and 4, 2: all too long; 2, 1 is taken.
    assert statuses == ["capped", "capped", "capped", "accepted"]
    assert (search.lr_ub, search.capped) == (2.0, 3)


def test_a_row_is_broken_by_a_search_that_needed_nothing() -> None:
    theta, closure = parabola(1.0)
    search = Backtracking(detente.create("uniform"), [theta], [], 3.0, lower_ub="divided", patience=2)
    for lr_ub in (3.0, 1.0, 3.0, 1.0, 3.0):
        search.lr_ub = lr_ub
        with torch.no_grad():
            theta.fill_(1.0)
        assert search.step(closure).notes == ()
    assert search.lr_ub == 3.0


def test_record_is_plain(net: Any, batch: Any) -> None:
    import json

    search = FastBacktracking(detente.create("mgda"), net.encoder, net.heads, 0.1, check_true=True)
    found = search.step(net.closure(batch(0)))
    stored = json.loads(json.dumps(found.to_dict()))
    assert stored["names"] == ["a", "b"]
    assert stored["status"] == "accepted"
    assert stored["true_condition"] in (True, False)
    assert "record" not in stored
    assert found.record is not None and found.record.space == "features"
    assert found.seconds >= found.record.seconds > 0
    for name in ("losses_before", "losses_after", "slopes", "shared_slopes", "true_losses"):
        assert len(stored[name]) == 2


@pytest.mark.parametrize(
    ("kind", "method", "extra"),
    [
        (Backtracking, "mgda", 0),
        (Backtracking, "graddrop", 1),  # no weights: the slopes are read before the first trial
        (FastBacktracking, "mgda", 1),  # the gradient behind the representation is looked at
    ],
)
def test_one_copy_to_the_host_for_every_pass(
    monkeypatch: pytest.MonkeyPatch, kind: Any, method: str, extra: int, net: Any, batch: Any
) -> None:
    torch.manual_seed(0)
    search = kind(
        detente.create(method),
        net.encoder,
        net.heads,
        1.0,
        check_steps=0,
        on_no_descent="small-step",
        small_step=1e-3,
    )
    calls: Counter[str] = Counter()
    for slow in ("cpu", "item", "__float__", "__bool__", "__int__"):
        function = getattr(torch.Tensor, slow)

        def called(self: torch.Tensor, *args: Any, slow: str = slow, function: Any = function) -> Any:
            calls[slow] += 1
            return function(self, *args)

        monkeypatch.setattr(torch.Tensor, slow, called)
    found = search.step(net.closure(batch(0)))
    assert found.trials >= 1
    assert calls == {"cpu": 1 + found.trials + extra}
    assert "detente.linesearch.search" in sys.modules
