"""Saving and loading, moments, the first length that lowers itself, and what a step may cost."""

from __future__ import annotations

import io
from collections import Counter
from copy import deepcopy
from itertools import count
from typing import Any

import pytest
import torch
from torch import nn

import detente
import detente.autograd.numbers
from detente.linesearch import Backtracking, FastBacktracking, SearchOptions, SearchRecord
from detente.methods import Method
from detente.values import Combination

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
        return kind(
            detente.create(method),
            model.encoder,
            model.heads,
            2.0,
            max_trials=8,
            options=SearchOptions(**options),
        )

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
    again.lr_ub = 7.0
    other.load_state_dict(saved["net"])
    again.load_state_dict(saved["search"])
    torch.set_rng_state(saved["random"])
    assert run(again, other, range(7, 20)) == whole
    assert torch.get_rng_state().equal(end)
    for (name, mine), theirs in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert mine.equal(theirs), name
    if "lower_ub" in options:
        assert search.lowered > 0
    first, second = search.state_dict(), again.state_dict()
    assert (first["lr_ub"], first["counters"]) == (second["lr_ub"], second["counters"])


def test_a_state_that_does_not_fit_changes_nothing(net: Any, batch: Any) -> None:
    def made(kind: Any = Backtracking, **options: Any) -> Any:
        return kind(detente.create("mgda"), net.encoder, net.heads, 0.1, options=SearchOptions(**options))

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
    for damaged in (None, 3, [], {}, {"lr_ub": 1.0, "counters": None, "method": {}, "moments": None}):
        for search in (plain, adam, fast):
            with pytest.raises(ValueError, match="not the state of a"):
                search.load_state_dict(damaged)
    for moments in (3, {}, {"kind": "adam"}, {"kind": "adam", "states": {0: {}}}):
        with pytest.raises(ValueError, match=r"saved (moments|search has precondition)"):
            adam.load_state_dict(adam.state_dict() | {"moments": moments})
    smaller = Backtracking(
        detente.create("mgda"), net.encoder[0].weight, [], 0.1, options=SearchOptions(precondition="adam")
    )
    with pytest.raises(ValueError, match="moments of parameter"):
        smaller.load_state_dict(adam.state_dict())


def test_states_of_the_first_form_load(net: Any) -> None:
    """Written out as version 0.1 saved them."""
    counters, method = (
        {"steps": 7, "capped": 2, "in_a_row": 1, "lowered": 3},
        detente.create("mgda").state_dict(),
    )
    moments = {
        "kind": "rmsprop",
        "states": {0: {"steps": torch.tensor(7.0, dtype=torch.float64), "square": torch.ones(16, 6)}},
    }
    options = SearchOptions(precondition="rmsprop")
    classical = Backtracking(detente.create("mgda"), net.encoder, net.heads, 0.1, options=options)
    classical.load_state_dict({"lr_ub": 8.0, "counters": counters, "method": method, "moments": moments})
    assert (classical.steps, classical.capped, classical.first_length) == (7, 2, 1.0)
    assert classical.state_dict()["moments"]["states"][0]["square"].equal(torch.ones(16, 6).double())
    counters |= {"true_condition_checks": 4, "true_condition_failures": 1}
    fast = FastBacktracking(detente.create("mgda"), net.encoder, net.heads, 0.1)
    fast.load_state_dict({"lr_ub": 8.0, "counters": counters, "method": method})
    assert (fast.in_a_row, fast.lowered, fast.true_condition_rate) == (1, 3, 0.25)
    assert set(fast.state_dict()) == {"lr_ub", "counters", "method"}


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("saved", ["moco", None])
def test_another_methods_state_changes_nothing(saved: Any, sized: bool, net: Any, batch: Any) -> None:
    def made(name: str, lr_ub: float) -> Any:
        options: dict[str, Any] = {"on_no_descent": "small-step", "small_step": 1e-3}
        return Backtracking(
            detente.create(name), net.encoder, net.heads, lr_ub, options=SearchOptions(**options)
        )

    search, other = made("dwa", 0.7), made("moco", 0.1)
    other.step(net.closure(batch(0)))
    if sized:
        search.step(net.closure(batch(0)))
    before = deepcopy(search.state_dict())
    state = other.state_dict() if saved else search.state_dict() | {"method": None}
    with pytest.raises(ValueError, match="the method's part of the saved search does not fit dwa"):
        search.load_state_dict(state)
    after = search.state_dict()
    assert (before["lr_ub"], before["counters"]) == (after["lr_ub"], after["counters"])
    assert before["method"].keys() == after["method"].keys()
    for name, value in before["method"].items():
        same = value.equal(after["method"][name]) if isinstance(value, torch.Tensor) else True
        assert same, name
    assert search.step(net.closure(batch(1))).accepted


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
        options=SearchOptions(precondition=kind, on_no_descent="small-step", small_step=rate, rounding=1e16),
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
        options=SearchOptions(precondition="rmsprop", on_no_descent="small-step", small_step=1e-8),
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
        options=SearchOptions(precondition="adagrad"),
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
    search = Backtracking(
        detente.create("uniform"), [theta], [], 8.0, options=SearchOptions(lower_ub="divided", patience=2)
    )
    found = []
    for _ in range(8):
        with torch.no_grad():
            theta.fill_(1.0)
        found.append(search.step(closure))
    assert [record.lr_ub for record in found] == [8, 8, 4, 4, 2, 2, 1, 1]
    assert [record.trials for record in found] == [4, 4, 3, 3, 2, 2, 1, 1]
    assert (search.lr_ub, search.lowered, search.first_length) == (8.0, 3, 1.0)
    assert [len(record.notes) for record in found] == [0, 1, 0, 1, 0, 1, 0, 0]
    assert "first length lowered to 4 after 2 searches in a row" in found[1].notes


def test_a_schedule_and_the_lowering_multiply() -> None:
    """Below 2 nothing is divided: from 8 after three divisions, and the schedule halves what is left."""
    theta, closure = parabola(1.0)
    search = Backtracking(
        detente.create("uniform"), [theta], [], 8.0, options=SearchOptions(lower_ub="divided", patience=1)
    )

    def epoch(number: int) -> list[float]:
        search.lr_ub = 8.0 * 0.5**number
        found = []
        for _ in range(4):
            with torch.no_grad():
                theta.fill_(1.0)
            found.append(search.step(closure).lr_ub)
        return found

    assert [epoch(number) for number in range(3)] == [[8, 4, 2, 1], [0.5] * 4, [0.25] * 4]
    search.lowered = 0
    assert epoch(1) == [4, 2, 1, 1]


def test_a_length_that_cannot_be_lowered_stays() -> None:
    """10⁻³²³ is the second smallest number; half of the smallest is zero."""
    theta, passes = nn.Parameter(torch.tensor(1.0, dtype=torch.float64)), count()

    def closure(
        features: Any = None,
    ) -> Any:  # first pass, trial (worse), and the look at whether the batch changed
        return None, [theta**2 / 2 * (1.5 if next(passes) % 3 == 1 else 1.0)]

    options = SearchOptions(lower_ub="cap", patience=1, check_steps=0)
    search = Backtracking(detente.create("uniform"), [theta], [], 1e-323, max_trials=1, options=options)
    found = [search.step(closure) for _ in range(3)]
    assert [record.status for record in found] == ["capped"] * 3
    assert (search.steps, search.capped, search.lowered, search.first_length) == (3, 3, 1, 5e-324)
    assert found[2].notes == ("the first length, 4.94066e-324, cannot be lowered any further",)
    search.lowered = 5000  # 2 ** 5000 is no number either
    with pytest.raises(ValueError, match=r"divided by gamma 5000 times.*search.lowered = 0"):
        search.step(closure)
    assert (search.steps, search.capped, search.lowered) == (3, 3, 5000)


@pytest.mark.parametrize("between", ["refused", "small-step"])
def test_a_row_is_neither_broken_nor_lengthened_by_steps_that_were_not_searched(between: str) -> None:
    theta, closure = parabola(1.0)
    method = Fickle()
    search = Backtracking(
        method,
        [theta],
        [],
        4.0,
        options=SearchOptions(lower_ub="divided", patience=2, on_no_descent="small-step", small_step=1e-3),
    )
    rows = []
    for kind in ("ok", between, "ok"):
        method.kind = kind
        with torch.no_grad():
            theta.fill_(1.0)
        record = search.step(closure)
        assert record.status == ("accepted" if kind == "ok" else kind)
        rows.append(search.in_a_row)
    assert rows == [1, 1, 0]
    assert search.lowered == 1


class Fickle(Method):
    """Down the hill, up the hill, or not at all, as the test says."""

    declares = detente.Declaration(name="fickle", source="this test", needs=frozenset({"gramian"}))
    kind = "ok"

    def solve(self, gradients: Any) -> Combination:
        weights = torch.full((gradients.tasks,), -1.0 if self.kind == "small-step" else 1.0)
        status: Any = "refused" if self.kind == "refused" else "ok"
        return Combination(weights=weights.double(), status=status)


def test_the_first_length_lowers_itself_after_capped_searches() -> None:
    theta, closure = parabola(1.0)
    search = Backtracking(
        detente.create("uniform"),
        [theta],
        [],
        16.0,
        options=SearchOptions(lower_ub="cap", patience=1, check_steps=0),
        max_trials=2,
    )
    statuses = []
    for _ in range(4):
        with torch.no_grad():
            theta.fill_(1.0)
        statuses.append(search.step(closure).status)
    # 16, 8 and 8, 4 and 4, 2: all too long; 2, 1 is taken.
    assert statuses == ["capped", "capped", "capped", "accepted"]
    assert (search.first_length, search.capped) == (2.0, 3)


def test_a_row_is_broken_by_a_search_that_needed_nothing() -> None:
    theta, closure = parabola(1.0)
    search = Backtracking(
        detente.create("uniform"), [theta], [], 3.0, options=SearchOptions(lower_ub="divided", patience=2)
    )
    for lr_ub in (3.0, 1.0, 3.0, 1.0, 3.0):
        search.lr_ub = lr_ub
        with torch.no_grad():
            theta.fill_(1.0)
        assert search.step(closure).notes == ()
    assert (search.lowered, search.first_length) == (0, 3.0)


def test_record_is_plain(net: Any, batch: Any) -> None:
    import json

    search = FastBacktracking(
        detente.create("mgda"), net.encoder, net.heads, 0.1, options=SearchOptions(check_true=True)
    )
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
        options=SearchOptions(check_steps=0, on_no_descent="small-step", small_step=1e-3),
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
