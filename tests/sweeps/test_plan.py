"""The pure plan: which runs are needed next, from what was asked and the results there are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detente.experiments.own import OwnConfig
from detente.metrics import delta_m
from detente.records import Metric
from detente.sweeps.asked import Failure, SweepConfig
from detente.sweeps.contenders import Contender, Point, beyond, contenders, lattice, points
from detente.sweeps.plan import Plan, Planned

TASKS = ("a", "b")
METRICS = (Metric("a", "error", False, False), Metric("b", "accuracy", True, True))
MAIN = {"a": "error", "b": "accuracy"}
RATES = (0.01, 0.1)


def alone(config: Any, task: str) -> Any:
    return replace(config, task=task)


def parse(flags: Any) -> OwnConfig:
    """As the command line reads them, for the few flags that occur here."""
    given: dict[str, Any] = {"epochs": 5, "threads": 1}
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        name = flag.removeprefix("--")
        given[name] = (value,) if name == "option" else value
    return OwnConfig(**given)


def make(rates: tuple[float, ...] = RATES, **asked: Any) -> Plan:
    config = SweepConfig(**{"methods": ("uniform", "cagrad", "famo"), "trials": 6, "seeds": 3} | asked)
    found, mistakes = contenders(config, parse, TASKS, alone)
    assert mistakes == []
    return Plan(config, found, rates, "mine", TASKS, METRICS, MAIN)


def result(a: float | None, b: float | None, tested: bool) -> dict[str, Any]:
    values = {"a": {"error": a}, "b": {"accuracy": b}}
    return {"validation": values, "metrics": values if tested else {}, "seconds": 1.0}


def of(planned: Planned, a: float | None, b: float | None) -> dict[str, Any]:
    """A result with the tasks that this run has."""
    found = result(a, b, planned.config.test)
    task = getattr(planned.config, "task", "all")
    if task != "all":
        for split in ("validation", "metrics"):
            found[split] = {name: values for name, values in found[split].items() if name == task}
    return found


def carry_out(
    plan: Plan, judge: Callable[[Planned], Any], seen: list[Planned] | None = None
) -> dict[str, Any]:
    """A sweep without training: every run ends at once with what the judge says."""
    results: dict[str, Any] = {}
    for _ in range(10_000):
        wanted = plan.next(results)
        if not wanted:
            return results
        planned = wanted[0]
        if seen is not None:
            seen.append(planned)
        before, found = results.get(planned.name), judge(planned)
        if isinstance(before, Mapping) and isinstance(found, Failure):
            results[planned.name] = {**before, "untested": found.reason}
        else:
            results[planned.name] = found
    raise AssertionError("the plan does not end")


def best_at(rate: float) -> Callable[[Planned], dict[str, Any]]:
    """Results that are the better, the closer the learning rate."""

    def judge(planned: Planned) -> dict[str, Any]:
        off = abs(math.log10(planned.config.learning_rate / rate))
        return of(planned, 1.0 + off, 0.9 - 0.1 * off)

    return judge


def tuning(plan: Plan, results: Mapping[str, Any], name: str) -> list[Planned]:
    return [run for run in plan.known(results) if run.contender.name == name and run.purpose == "tune"]


# ---- how many, and which


@pytest.mark.parametrize("trials", [2, 3, 5, 6, 12])
def test_every_contender_has_the_same_number_of_different_tuning_runs(trials: int) -> None:
    plan = make(trials=trials, front=4)
    assert {one.kind for one in plan.contenders} == {"method", "scalarisation", "single"}
    for one in plan.contenders:
        runs = tuning(plan, {}, one.name)
        assert len({run.name for run in runs}) == trials, one.name
        assert [run.config.learning_rate for run in runs[:2]] == [0.01, 0.1]
        assert [run.config.option for run in runs[:2]] == [(), ()], (
            "every learning rate with the defaults first"
        )


def test_options_are_spread_evenly_over_the_learning_rates_and_never_repeat_the_default() -> None:
    plan = make(trials=8, methods=("cagrad",), front=0)
    rates = [point.learning_rate for point in plan.points["cagrad (exact)"]]
    assert {rate: rates.count(rate) for rate in rates} == {0.01: 4, 0.1: 4}
    options = {point.options for point in plan.points["cagrad (exact)"]}
    assert options <= {(), *((f"c={c}",) for c in (0.1, 0.2, 0.4, 0.6, 0.8, 0.9))}


def test_the_draws_of_a_contender_do_not_depend_on_who_else_takes_part() -> None:
    few, many = make(methods=("cagrad",)), make(methods=("famo", "cagrad", "stch"), singles=False)
    assert few.points["cagrad (exact)"] == many.points["cagrad (exact)"]


def test_a_grid_of_the_user_replaces_the_declared_one() -> None:
    plan = make(methods=("cagrad",), grid=("cagrad.c=0.3,0.7",), trials=6)
    options = {point.options for point in plan.points["cagrad (exact)"]}
    assert options == {(), ("c=0.3",), ("c=0.7",)}


def test_options_that_are_given_are_not_tuned() -> None:
    plan = make(methods=(), also=("c4: --method cagrad --option c=0.4",), trials=4)
    assert {point.options for point in plan.points["c4"]} == {()}
    assert all(run.config.option == ("c=0.4",) for run in tuning(plan, {}, "c4"))


def test_with_one_learning_rate_and_no_options_there_is_one_run() -> None:
    assert points(Contender("x", OwnConfig(), {}), (0.1,), 5, np.random.default_rng(0)) == [Point(0.1)]


def test_fewer_trials_than_learning_rates_are_refused() -> None:
    with pytest.raises(ValueError, match="3 learning rates"):
        make(rates=(0.1, 0.2, 0.3), trials=2)


# ---- edges


@pytest.mark.parametrize(
    ("best", "further"),
    [(0.03, []), (1.0, [1.0, 10.0]), (100.0, [1.0, 10.0]), (1e-5, [1e-3, 1e-4])],
)
def test_learning_rates_go_on_where_the_best_is_at_the_edge(best: float, further: list[float]) -> None:
    plan = make(methods=("uniform",), singles=False, extend=2, trials=3)
    results = carry_out(plan, best_at(best))
    runs = [run.config.learning_rate for run in tuning(plan, results, "uniform")]
    assert runs == [0.01, 0.1, 0.03162, *further]
    choice = plan.choices(results)["uniform"]
    assert choice.runs == len(runs)
    assert choice.edge == (best in (100.0, 1e-5))


def test_all_contenders_go_on_by_the_same_factor() -> None:
    # The first has learning rates between those of the grid, the second options instead.
    dense = [Point(0.01), Point(0.1), Point(0.03162)]
    sparse = [Point(0.01), Point(0.1), Point(0.1, ("c=0.2",))]
    assert beyond(Point(0.1), dense, RATES) == Point(1.0)
    assert beyond(Point(0.1, ("c=0.2",)), sparse, RATES) == Point(1.0, ("c=0.2",))
    assert beyond(Point(0.03162), dense, RATES) is None


def test_nothing_is_extended_past_a_learning_rate_that_diverged() -> None:
    plan = make(methods=("uniform",), singles=False, extend=2, trials=2)

    def judge(planned: Planned) -> Any:
        return Failure("NaN") if planned.config.learning_rate > 0.5 else best_at(100.0)(planned)

    results = carry_out(plan, judge)
    choice = plan.choices(results)["uniform"]
    assert (choice.point.learning_rate, choice.runs, choice.failed, choice.edge) == (0.1, 3, 1, False)


# ---- the choice


def test_each_rule_chooses_by_its_own_formula() -> None:
    # At 0.01 the first task is much better, at 0.1 the second, at 0.03162 both are fair.
    table = {0.01: (1.0, 0.50), 0.1: (2.0, 0.90), 0.03162: (1.3, 0.80), 0.0562: (1.4, 0.79)}

    def judge(planned: Planned) -> Any:
        if planned.contender.kind == "single":
            return of(planned, 1.0, 0.9)
        return of(planned, *table[planned.config.learning_rate])

    chosen = {}
    for rule in ("delta-m", "mean", "rank"):
        plan = make(methods=("uniform",), choose=rule, extend=0, trials=3)
        chosen[rule] = plan.choices(carry_out(plan, judge))["uniform"]
    directions = {"error": False, "accuracy": True}
    base = {"a": {"error": 1.0}, "b": {"accuracy": 0.9}}
    changes = {
        rate: delta_m({"a": {"error": a}, "b": {"accuracy": b}}, base, directions)
        for rate, (a, b) in table.items()
        if rate != 0.0562
    }
    assert chosen["delta-m"].point.learning_rate == min(changes, key=lambda rate: changes[rate]) == 0.03162
    assert chosen["delta-m"].score == pytest.approx(min(changes.values()))
    # Means of -error and accuracy: -0.25, -0.55, -0.25 (the first of equals).
    assert chosen["mean"].point.learning_rate == 0.01
    assert chosen["mean"].score == pytest.approx(0.25)
    # Ranks by task: (1, 3), (3, 1), (2, 2): all 2, and the first of equals.
    assert (chosen["rank"].point.learning_rate, chosen["rank"].score) == (0.01, 2.0)


def test_single_tasks_are_chosen_by_their_own_metric_in_its_direction() -> None:
    plan = make(methods=("uniform",), trials=2, extend=0)

    def judge(planned: Planned) -> Any:
        large = planned.config.learning_rate == 0.1
        return of(planned, 2.0 if large else 1.0, 0.9 if large else 0.8)

    choices = plan.choices(carry_out(plan, judge))
    assert choices["single task: a"].point.learning_rate == 0.01, "an error: lower is better"
    assert choices["single task: b"].point.learning_rate == 0.1, "an accuracy: higher is better"


def test_methods_wait_for_the_single_tasks_that_their_choice_needs() -> None:
    plan = make(methods=("uniform",), trials=2, extend=0)
    results = {run.name: best_at(0.1)(run) for run in plan.next({}) if run.contender.kind == "method"}
    assert "uniform" not in plan.choices(results)
    assert {run.contender.kind for run in plan.next(results)} == {"single"}


def test_what_diverged_or_failed_is_never_chosen() -> None:
    plan = make(methods=("uniform",), singles=False, trials=3, extend=0)
    bad = {0.01: Failure("no"), 0.1: result(None, 0.99, False), 0.03162: result(9.0, 0.1, False)}
    results = {run.name: bad[run.config.learning_rate] for run in plan.next({})}
    choice = plan.choices(results)["uniform"]
    assert (choice.point.learning_rate, choice.failed) == (0.03162, 2)
    nan = {0.01: result(math.nan, 0.5, False), 0.1: result(math.inf, 0.5, False), 0.03162: Failure("no")}
    results = {run.name: nan[run.config.learning_rate] for run in plan.next({})}
    assert plan.choices(results) == {}
    assert plan.hindered(results) == {"uniform": "all its tuning runs failed or diverged"}
    assert plan.next(results) == []


@pytest.mark.parametrize(
    ("single", "told"),
    [(Failure("no data"), "Δm needs single task: a"), ("zero", "not above zero")],
)
def test_without_baselines_nothing_is_chosen_by_delta_m_and_the_reason_is_told(
    single: Any, told: str
) -> None:
    plan = make(methods=("uniform",), trials=2)

    def judge(planned: Planned) -> Any:
        if planned.contender.name == "single task: a":
            return single if isinstance(single, Failure) else of(planned, 0.0, 1.0)
        return best_at(0.03)(planned)

    results = carry_out(plan, judge)
    assert "uniform" not in plan.choices(results)
    assert told in plan.hindered(results)["uniform"]


def test_one_task_has_no_delta_m() -> None:
    config = SweepConfig(methods=("uniform",), trials=2)
    found, _ = contenders(config, parse, ("a",), alone)
    assert [one.kind for one in found] == ["method"]
    assert Plan(config, found, RATES, "mine", ("a",), METRICS[:1], {"a": "error"}).rule == "mean"


# ---- final runs, the front, test data


def test_the_first_final_run_is_the_tuning_run_measured_later() -> None:
    plan = make(methods=("uniform",), singles=False, trials=2, extend=0, seeds=3)
    seen: list[Planned] = []
    results = carry_out(plan, best_at(0.1), seen)
    choice = plan.choices(results)["uniform"]
    finals = plan.finals(plan.contenders[0], choice)
    assert [run.config.seed for run in finals] == [0, 1, 2]
    assert finals[0].name == choice.name, "the same folder"
    assert len({run.name for run in finals}) == 3
    assert plan.size() == len(results) == 4
    # Tuning never looks at test data; what was chosen does, and nothing else.
    assert all(run.config.test == (run.purpose != "tune") for run in seen)
    tested = {name for name, found in results.items() if found["metrics"]}
    assert tested == {run.name for run in finals}


def test_shorter_tuning_shares_no_run_with_the_finals() -> None:
    plan = make(methods=("uniform",), singles=False, trials=2, extend=0, seeds=3, tune_epochs=1)
    results = carry_out(plan, best_at(0.1))
    runs = plan.known(results)
    assert {run.config.epochs for run in runs if run.purpose == "tune"} == {1}
    assert {run.config.epochs for run in runs if run.purpose == "final"} == {5}
    assert plan.size() == len(results) == 5


def test_the_front_holds_every_weighting_at_the_tuned_learning_rate() -> None:
    plan = make(methods=("uniform",), singles=False, trials=4, extend=0, seeds=2, front=4)
    one = next(one for one in plan.contenders if one.kind == "scalarisation")
    results = carry_out(plan, best_at(0.01))
    front = plan.front(one, plan.choices(results)[one.name])
    assert [shares for shares, _ in front] == [(0.25, 0.75), (0.5, 0.5), (0.75, 0.25)]
    weights = [runs[0].config.method_options().get("weights", {"a": 1.0, "b": 1.0}) for _, runs in front]
    # Their sum is that of the plain sum of losses, so that learning rates mean the same.
    assert weights == [{"a": 0.5, "b": 1.5}, {"a": 1.0, "b": 1.0}, {"a": 1.5, "b": 0.5}]
    assert {run.config.learning_rate for _, runs in front for run in runs} == {0.01}
    assert all(results[run.name]["metrics"] for _, runs in front for run in runs)
    # What was chosen is one of them.
    finals = {run.name for run in plan.finals(one, plan.choices(results)[one.name])}
    assert any(finals == {run.name for run in runs} for _, runs in front)


def test_the_lattice_is_the_whole_simplex_without_its_edges() -> None:
    for tasks, parts in itertools.product((1, 2, 3, 4), (4, 5, 6)):
        naive = {
            tuple(n / parts for n in numbers)
            for numbers in itertools.product(range(1, parts + 1), repeat=tasks)
            if sum(numbers) == parts
        }
        assert set(lattice(tasks, parts)) == naive
        assert len(lattice(tasks, parts)) == len(naive)
    with pytest.raises(ValueError, match="weightings"):
        lattice(40, 60)


def test_a_run_that_cannot_be_measured_on_test_data_keeps_what_tuning_said() -> None:
    plan = make(methods=("uniform",), singles=False, trials=2, extend=0)

    def judge(planned: Planned) -> Any:
        return best_at(0.1)(planned) if planned.purpose == "tune" else Failure("no test data")

    results = carry_out(plan, judge)
    choice = plan.choices(results)["uniform"]
    assert choice.point.learning_rate == 0.1 and choice.failed == 0
    assert not any(found["metrics"] for found in results.values() if not isinstance(found, Failure))


# ---- determinism and cost


def test_folders_are_named_by_everything_that_changes_a_number() -> None:
    plan = make(front=3)
    one = plan.contenders[0]
    name = plan.planned(one, Point(0.1), 0, "tune").name
    assert plan.planned(one, Point(0.1), 0, "final").name == name, "test data change no training"
    others = [
        plan.planned(one, Point(0.2), 0, "tune").name,
        plan.planned(one, Point(0.1, ("reduce=mean",)), 0, "tune").name,
        plan.planned(one, Point(0.1), 1, "tune").name,
        make(front=3)
        .planned(replace(one, config=replace(one.config, batch_size=7)), Point(0.1), 0, "tune")
        .name,
    ]
    assert len({name, *others}) == 5
    again = make(front=3).planned(one, Point(0.1), 0, "tune").name
    assert again == name


def test_another_content_of_the_users_file_is_another_run() -> None:
    config = SweepConfig(methods=("uniform",), trials=2, singles=False)
    found, _ = contenders(config, parse, TASKS, alone)
    names = {
        Plan(config, found, RATES, "my.py:Mine", TASKS, METRICS, MAIN, {"my.py": mark}).next({})[0].name
        for mark in ("one", "two")
    }
    assert len(names) == 2


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    share=st.sampled_from([0.0, 0.2, 0.9]),
    rule=st.sampled_from(["delta-m", "mean", "rank"]),
    front=st.sampled_from([0, 3]),
    extend=st.integers(0, 3),
    trials=st.integers(2, 7),
    tune_epochs=st.sampled_from([None, 2]),
)
def test_whatever_comes_out_a_sweep_ends_in_the_same_state_in_any_order(
    seed: int, share: float, rule: Any, front: int, extend: int, trials: int, tune_epochs: int | None
) -> None:
    def fresh() -> Plan:
        return make(choose=rule, front=front, extend=extend, trials=trials, seeds=2, tune_epochs=tune_epochs)

    def judge(planned: Planned) -> Any:
        draw = np.random.default_rng([seed, *planned.name.encode()])
        kind, a, b = draw.random(), *draw.random(2)
        if kind < share / 2:
            return Failure("bad luck")
        # Coarse values, so that equal scores occur.
        return of(planned, None if kind < share else round(a, 1), round(b, 1))

    def shuffled(plan: Plan) -> dict[str, Any]:
        """Several at a time, ending in any order, some of them lost and started again by a fresh plan."""
        draw = np.random.default_rng(seed)
        results: dict[str, Any] = {}
        while wanted := plan.next(results):
            planned = wanted[draw.integers(len(wanted))]
            before, found = results.get(planned.name), judge(planned)
            if isinstance(before, Mapping) and isinstance(found, Failure):
                found = {**before, "untested": found.reason}
            results[planned.name] = found
            if draw.random() < 0.1:
                plan = fresh()
        return results

    plan = fresh()
    seen: list[Planned] = []
    results = carry_out(plan, judge, seen)
    assert len(seen) == len({(run.name, run.config.test) for run in seen}), "nothing is run twice"
    assert shuffled(fresh()) == results
    choices = plan.choices(results)
    assert fresh().choices(results) == choices
    for one in plan.contenders:
        tuned = tuning(plan, results, one.name)
        assert len(tuned) <= trials + extend
        assert one.name in choices or one.name in plan.hindered(results)


def test_asking_for_the_next_run_computes_no_choice_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make(trials=6, front=3)
    counted: list[str] = []
    scores = Plan.scores

    def counting(self: Plan, contender: Contender, *rest: Any) -> Any:
        counted.append(contender.name)
        return scores(self, contender, *rest)

    monkeypatch.setattr(Plan, "scores", counting)
    seen: list[Planned] = []
    carry_out(plan, best_at(0.03), seen)
    # When its tuning ends, for each extension, and when a tuning run has got its test metrics; not for every run.
    assert len(seen) > 50
    assert max(counted.count(one.name) for one in plan.contenders) <= 12
