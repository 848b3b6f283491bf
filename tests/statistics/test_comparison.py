"""A whole comparison against scipy and statsmodels, from the raw numbers, and its laws."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from detente.statistics import (
    bootstrap_difference,
    bootstrap_mean,
    compare,
    delta_m_spread,
    spread,
)

HIGHER = {"accuracy": True, "error": False, "angle": False}
SEEDS = range(5)
# How much better each method is than `fixed`, in percent; the noise of a run is about one percent.
TRUE_GAINS = {"fixed": 0.0, "good": 6.0, "bad": -6.0, "same": 0.0}


def runs(seed: int = 0, gains=TRUE_GAINS, seeds=SEEDS):
    """Every seed moves all methods together, and each run by itself."""
    rng = np.random.default_rng(seed)
    scale = {"accuracy": 0.8, "error": 2.0, "angle": 25.0}
    together = {s: rng.normal(0.0, 3.0) for s in seeds}
    return {
        name: {
            s: {
                task: scale[task] * (1 + (1 if higher else -1) * (gain + together[s] + rng.normal()) / 100)
                for task, higher in HIGHER.items()
            }
            for s in seeds
        }
        for name, gain in gains.items()
    }


SINGLE = {
    "accuracy": {0: 0.82, 1: 0.81, 7: 0.83},
    "error": {0: 1.95, 1: 2.05},
    "angle": {0: 24.0},
}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def compared(results, **options):
    settings_ = {
        "higher_is_better": HIGHER,
        "reference": "fixed",
        "baselines": SINGLE,
        "generator": rng(),
        "resamples": 500,
    }
    return compare(results, **(settings_ | options))


def by_hand(results, baseline):
    """The score from its definition: the mean over tasks of the relative change, positive is worse."""
    return {
        name: [
            100
            * np.mean(
                [
                    (-1 if HIGHER[task] else 1) * (run[task] - baseline[task]) / baseline[task]
                    for task in HIGHER
                ]
            )
            for run in by_seed.values()
        ]
        for name, by_seed in results.items()
    }


@pytest.mark.parametrize("seed", range(5))
def test_every_number_from_the_raw_results(seed):
    results = runs(seed)
    found = compared(results)
    scores = by_hand(results, {task: np.mean(list(of.values())) for task, of in SINGLE.items()})
    means = {name: np.mean(values) for name, values in scores.items()}
    best = min(means, key=means.get)
    assert found.best.best == best
    assert found.score == "delta_m"

    for name, method in found.methods.items():
        assert method.seeds == tuple(SEEDS)
        assert method.scores == pytest.approx(scores[name])
        # The same Δm as the tables that exist already.
        assert method.score == delta_m_spread(
            list(results[name].values()), {t: list(of.values()) for t, of in SINGLE.items()}, HIGHER
        )
        for task in HIGHER:
            assert method.tasks[task] == spread([run[task] for run in results[name].values()])
        values = dict(zip(method.seeds, method.scores, strict=True))
        common = np.random.default_rng(int(rng().integers(2**63)))
        assert method.interval == bootstrap_mean(list(values.values()), generator=common, resamples=500)

    for opponent, attribute in (("fixed", "against_reference"), (best, "against_best")):
        others = [name for name in results if name != opponent]
        raw = [stats.ttest_rel(scores[name], scores[opponent]).pvalue for name in others]
        adjusted = multipletests(raw, method="holm")[1]
        for name, p_value, corrected in zip(others, raw, adjusted, strict=True):
            against = getattr(found.methods[name], attribute)
            assert against.other == opponent
            assert against.test.p_value == pytest.approx(p_value)
            assert against.adjusted == pytest.approx(corrected)
            assert against.test.difference == pytest.approx(means[name] - means[opponent])
            common = np.random.default_rng(int(rng().integers(2**63)))
            ours, theirs = (dict(enumerate(found.methods[of].scores)) for of in (name, opponent))
            assert against.interval == bootstrap_difference(ours, theirs, generator=common, resamples=500)
        assert getattr(found.methods[opponent], attribute) is None

    # Columns of the papers' tables: the best of each task, the largest p value.
    for task, higher in HIGHER.items():
        values = {name: [run[task] for run in by_seed.values()] for name, by_seed in results.items()}
        winner = (max if higher else min)(values, key=lambda name, v=values: np.mean(v[name]))
        largest = max(
            stats.ttest_rel(values[winner], values[name]).pvalue for name in values if name != winner
        )
        assert found.columns[task].best == winner
        assert found.columns[task].p_value == pytest.approx(largest)
        assert found.columns[task].stars == ("**" if largest < 0.01 else "*" if largest < 0.05 else "")

    ranks = np.mean(
        [
            stats.rankdata(
                [
                    (-1 if higher else 1) * np.mean([run[task] for run in by_seed.values()])
                    for by_seed in results.values()
                ]
            )
            for task, higher in HIGHER.items()
        ],
        axis=0,
    )
    assert [method.mean_rank for method in found.methods.values()] == pytest.approx(list(ranks))


@pytest.mark.parametrize("baselines", [SINGLE, None])
def test_verdicts(baselines):
    found = compared(runs(), baselines=baselines)
    assert {name: method.verdict for name, method in found.methods.items()} == {
        "fixed": None,
        "good": "better",
        "bad": "worse",
        "same": "no difference shown",
    }
    assert found.families[0] == "3 paired t-tests of the score against the reference fixed: good, bad, same"
    assert found.families[1] == "3 paired t-tests of the score against the best, good: fixed, bad, same"


def test_a_verdict_needs_the_adjusted_p_value():
    """A raw p value of 0.03 among 20 methods is what chance brings."""
    seeds = range(6)
    for draw in range(200):
        results = runs(draw, {"fixed": 0.0, **{f"m{k}": 0.0 for k in range(20)}}, seeds)
        found = compared(results, resamples=40)
        tests = {name: m.against_reference for name, m in found.methods.items() if m.against_reference}
        if any(a.test.p_value < 0.05 <= a.adjusted for a in tests.values()):
            break
    for name, against in tests.items():
        assert (found.methods[name].verdict == "no difference shown") == (against.adjusted >= 0.05)
    assert any(against.test.p_value < 0.05 for against in tests.values())


def test_the_score_without_single_task_networks():
    results = runs()
    means = {
        name: {task: np.mean([run[task] for run in by_seed.values()]) for task in HIGHER}
        for name, by_seed in results.items()
    }
    relative = compared(results, baselines=None)
    assert relative.score == "change_from_reference"
    assert "mean result of fixed" in relative.score_meaning
    assert relative.baseline == pytest.approx(means["fixed"])
    assert relative.methods["good"].scores == pytest.approx(by_hand(results, means["fixed"])["good"])
    assert relative.methods["fixed"].score.mean == pytest.approx(0.0, abs=1e-9)

    free = compared(results, baselines=None, reference=None)
    centre = {task: np.mean([of[task] for of in means.values()]) for task in HIGHER}
    assert free.score == "change_from_mean"
    assert free.methods["bad"].scores == pytest.approx(by_hand(results, centre)["bad"])
    assert {method.verdict for method in free.methods.values()} == {None}
    assert {method.against_reference for method in free.methods.values()} == {None}
    assert len(free.families) == 1 and free.best.best == "good"


def test_missing_seeds_are_left_out_of_pairs_only_and_told():
    results = runs()
    results["good"] = {s: results["good"][s] for s in (0, 2, 4)} | {9: results["good"][1]}
    results["bad"] = {3: results["bad"][3]}
    results["same"] = {11: results["same"][1], 12: results["same"][2]}
    found = compared(results)
    good = found.methods["good"].against_reference.test
    assert (good.pairs, good.seeds, good.unpaired) == (3, (0, 2, 4), (1, 3, 9))
    assert found.methods["good"].score.count == 4
    scores = by_hand(results, found.baseline)
    assert good.p_value == pytest.approx(
        stats.ttest_rel(scores["good"][:3], [scores["fixed"][s] for s in (0, 2, 4)]).pvalue
    )
    assert found.methods["good"].against_reference.interval.count == 3
    for name, pairs in (("bad", 1), ("same", 0)):
        method = found.methods[name]
        assert method.verdict == "too few seeds"
        assert method.against_reference.adjusted is None
        assert method.against_reference.test.pairs == pairs
    # Tests that could not be made do not count in the family.
    assert found.methods["good"].against_reference.adjusted == good.p_value
    assert found.families[0] == "1 paired t-test of the score against the reference fixed: good"
    assert found.methods["bad"].interval.low is None
    assert found.best.stars == ""


def test_one_seed_says_too_few():
    found = compared({name: {0: by_seed[0]} for name, by_seed in runs().items()})
    assert {m.verdict for name, m in found.methods.items() if name != "fixed"} == {"too few seeds"}
    assert found.families == ()
    json.dumps(found.to_dict(), allow_nan=False)


def test_methods_that_are_the_same_to_the_last_bit():
    """A method without effect, and one whose tasks changed places: rounding must not become a verdict."""
    seeds = {0: (0.91, 0.83), 1: (0.92, 0.85), 2: (0.90, 0.84)}
    results = {
        "fixed": {s: {"a": a, "b": b} for s, (a, b) in seeds.items()},
        "twin": {s: {"a": a, "b": b} for s, (a, b) in seeds.items()},
        "swapped": {s: {"a": b, "b": a} for s, (a, b) in seeds.items()},
        "shifted": {s: {"a": a + 0.01, "b": b - 0.01} for s, (a, b) in seeds.items()},
    }
    found = compare(
        results,
        higher_is_better={"a": True, "b": True},
        reference="fixed",
        baselines={"a": {0: 0.7}, "b": {0: 0.7}},
        generator=rng(),
    )
    for name in ("twin", "swapped", "shifted"):
        assert found.methods[name].against_reference.test.p_value == 1.0
        assert found.methods[name].verdict == "no difference shown"
    assert found.methods["twin"].interval == found.methods["fixed"].interval


@pytest.mark.parametrize("draw", range(10))
def test_a_constant_difference_is_no_proof(draw):
    """The score's last bits vary, the difference does not. Percent of single-task results near the methods' own."""
    values = np.round(rng(draw).uniform(0.5, 0.9, size=3), 2)
    results = {
        "fixed": {s: {"a": value, "b": value} for s, value in enumerate(values)},
        "equal": {s: {"a": value + 0.01, "b": value - 0.01} for s, value in enumerate(values)},
        "apart": {s: {"a": value + 0.02, "b": value + 0.01} for s, value in enumerate(values)},
    }
    found = compare(
        results,
        higher_is_better={"a": True, "b": True},
        reference="fixed",
        baselines={"a": {0: 0.7}, "b": {0: 0.7}},
        generator=rng(),
    )
    p_values = {name: m.against_reference.test.p_value for name, m in found.methods.items() if m.verdict}
    assert p_values == {"equal": 1.0, "apart": 0.25}
    assert {m.verdict for m in found.methods.values()} == {None, "no difference shown"}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.permutations(list(TRUE_GAINS)), st.sampled_from([SINGLE, None]))
def test_the_order_of_methods_does_not_matter(seed, order, baselines):
    results = runs(seed)
    found = compared(results, baselines=baselines)
    again = compared({name: results[name] for name in order}, baselines=baselines)
    assert list(again.methods) == order
    assert again.methods == found.methods
    assert (again.best.best, again.best.p_value, again.best.stars) == (
        found.best.best,
        found.best.p_value,
        found.best.stars,
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.01, 100.0]))
def test_units_do_not_matter(seed, factor):
    results = runs(seed)
    scaled = {
        name: {s: run | {"angle": run["angle"] * factor} for s, run in by_seed.items()}
        for name, by_seed in results.items()
    }
    single = SINGLE | {"angle": {0: SINGLE["angle"][0] * factor}}
    found, again = compared(results), compared(scaled, baselines=single)
    for name, method in found.methods.items():
        other = again.methods[name]
        assert other.scores == pytest.approx(method.scores, abs=1e-9)
        assert (other.verdict, other.mean_rank) == (method.verdict, method.mean_rank)


def test_false_verdicts_are_rare():
    """Twelve methods that are all the same, six seeds: at most about 5 % of comparisons name any."""
    wrong = 0
    for draw in range(150):
        results = runs(1000 + draw, {"fixed": 0.0, **{f"m{k}": 0.0 for k in range(12)}}, range(6))
        found = compared(results, resamples=40)
        wrong += any(method.verdict in ("better", "worse") for method in found.methods.values())
    assert wrong <= 15  # 150 · 0.05 = 7.5; more than 15 has a probability below 0.5 %


def test_to_dict_is_plain():
    plain = compared(runs()).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    good = plain["methods"]["good"]
    assert good["verdict"] == "better"
    assert good["seeds"] == [0, 1, 2, 3, 4]
    assert good["against_reference"]["test"]["pairs"] == 5
    assert set(good["tasks"]["error"]) == {"mean", "deviation", "count"}
    assert plain["best"]["best"] == "good" and plain["columns"]["error"]["stars"] in ("", "*", "**")
    narrow = {
        name: {s: {t: np.float32(v) for t, v in run.items()} for s, run in by_seed.items()}
        for name, by_seed in runs().items()
    }
    json.dumps(compared(narrow).to_dict(), allow_nan=False)


GOOD = {"m": {0: {"a": 1.0, "b": 2.0}}, "n": {0: {"a": 1.0, "b": 2.0}}}


@pytest.mark.parametrize(
    ("results", "options", "message"),
    [
        ({}, {}, "results is empty"),
        ({"m": {}}, {}, "method 'm' has no seeds"),
        ({"m": {3: {}}}, {}, "method 'm', seed 3 has no tasks"),
        (GOOD | {"n": {4: {"a": 1.0}}}, {}, "method 'n', seed 4: task 'b' is missing"),
        (
            GOOD | {"n": {4: {"a": 1.0, "b": 1.0, "c": 1.0}}},
            {},
            "method 'n', seed 4: task 'c' is in no run before",
        ),
        (GOOD | {"n": {4: {"a": 1.0, "b": math.nan}}}, {}, "method 'n', seed 4, task 'b': nan"),
        (GOOD | {"n": {4: {"a": None, "b": 1.0}}}, {}, "method 'n', seed 4, task 'a': None"),
        (GOOD, {"higher_is_better": {"a": True}}, "higher_is_better of task 'b' is None"),
        (GOOD, {"higher_is_better": {"a": True, "b": 1}}, "higher_is_better of task 'b' is 1"),
        (GOOD, {"reference": "static"}, "the reference 'static' is none of the methods m, n"),
        (GOOD, {"baselines": {"a": {0: 1.0}}}, "task 'b' has no single-task run"),
        (GOOD, {"baselines": {"a": {0: 1.0}, "b": {}}}, "task 'b' has no single-task run"),
        (
            GOOD,
            {"baselines": {"a": {0: 1.0}, "b": {5: math.inf}}},
            "baseline of task 'b', seed 5: inf",
        ),
        (
            GOOD,
            {"baselines": {"a": {0: 1.0}, "b": {0: 1.0}, "c": {0: 1.0}}},
            "baselines contain task 'c'",
        ),
        (
            GOOD,
            {"baselines": {"a": {0: 1.0}, "b": {0: -1.0}}},
            r"baseline of task 'b', metric 'main' is -1\.0",
        ),
        (GOOD, {"alpha": 1.5}, r"alpha is 1\.5"),
        (GOOD, {"resamples": 3}, "resamples is 3"),
    ],
)
def test_bad_input_is_named(results, options, message):
    settings_ = {"higher_is_better": {"a": True, "b": False}, "generator": rng()}
    with pytest.raises(ValueError, match=message):
        compare(results, **(settings_ | options))
