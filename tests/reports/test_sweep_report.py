"""A sweep on the page: its own tests make the verdict, its tuning runs stay out, its front is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from detente.records import find_runs
from detente.reports import build_report
from detente.reports.groups import collect
from detente.reports.plane import plane_section
from detente.reports.sweeps import conditions, finals, headline_and_sentences, read_outcomes
from detente.statistics import compare

from .conftest import make_run

SCORES = {
    "tuned scalarisation": [0.90, 0.91, 0.92, 0.90, 0.91],
    "mgda (exact)": [0.93, 0.94, 0.95, 0.93, 0.941],
    "uniform": [0.85, 0.86, 0.871, 0.85, 0.86],
    "cagrad (exact)": [0.88, 0.94, 0.91, 0.92, 0.90],
}
METHODS = {
    "tuned scalarisation": "static",
    "mgda (exact)": "mgda",
    "cagrad (exact)": "cagrad",
    "uniform": "uniform",
}


def outcome_of(scores: dict[str, list[float]], folder: Path, seeds: int = 5) -> dict[str, Any]:
    """A sweep's folder with final runs, one tuning run, and the outcome that belongs to them."""
    results = {
        name: {seed: {"left": values[seed], "right": values[seed] - 0.1} for seed in range(seeds)}
        for name, values in scores.items()
    }
    contenders = []
    for name, by_seed in results.items():
        runs = [f"{name.split()[0]}-{seed}" for seed in by_seed]
        for run, (seed, values) in zip(runs, by_seed.items(), strict=True):
            make_run(
                folder / "runs" / run,
                METHODS[name],
                seed=seed,
                final=values,
                label=name,
                epochs=2,
                steps_per_epoch=2,
            )
        contenders.append({"name": name, "runs": runs})
    make_run(
        folder / "runs" / "tuning", "mgda", final={"left": 0.1, "right": 0.1}, epochs=2, steps_per_epoch=2
    )
    comparison = compare(
        results,
        higher_is_better={"left": True, "right": True},
        reference="tuned scalarisation" if "tuned scalarisation" in scores else None,
        generator=np.random.default_rng(0),
        resamples=200,
    )
    points = [
        {
            "weights": [w, 1 - w],
            "test": {"left": 0.8 + 0.1 * w, "right": 0.9 - 0.1 * w},
            "seeds": 5,
            "dominated": w == 0.5,
        }
        for w in (0.25, 0.5, 0.75)
    ]
    found = {
        "schema": 1,
        "experiment": "multimnist",
        "contenders": contenders,
        "comparison": comparison.to_dict(),
        "conditions": ["Every contender had 3 tuning runs."],
        "front": {
            "points": points,
            "gain": {"mgda (exact)": 0.01, "uniform": 0.0, "tuned scalarisation": 0.02},
        },
        "failures": {"broken": "ValueError: no"},
    }
    (folder / "outcome.json").write_text(json.dumps(found))
    return found


def test_the_verdict_is_that_of_the_tests(tmp_path: Path) -> None:
    outcome = outcome_of(SCORES, tmp_path)
    headline, sentences = headline_and_sentences(outcome)
    assert headline == "mgda (exact) is better than tuned scalarisation."
    told = " ".join(sentences)
    # From scipy, on the scores themselves: percent of the reference's means, averaged over the tasks.
    ours, theirs = (np.array(SCORES[name]) for name in ("mgda (exact)", "tuned scalarisation"))
    scale = (100 / theirs.mean() + 100 / (theirs - 0.1).mean()) / 2
    assert f"mgda (exact): {(ours - theirs).mean() * scale:.2f} points better" in told
    assert "uniform: " in told and "points worse than tuned scalarisation" in told
    reach = (
        stats.t.ppf(0.975, 4) * (np.array(SCORES["cagrad (exact)"]) - theirs).std(ddof=1) * scale / np.sqrt(5)
    )
    assert "No difference from tuned scalarisation is shown for cagrad (exact). That does not say" in told
    assert f"differences from about {reach:.3g} points on" in told
    assert (
        "no fixed weighting that was run is at least as good in every task as mgda (exact); weightings"
        in told
    )
    assert "1 runs failed" in told
    assert conditions(outcome)[0] == "Every contender had 3 tuning runs."


def test_what_is_better_is_told_with_its_cost_and_what_hinders_a_comparison_by_name(tmp_path: Path) -> None:
    outcome = outcome_of(SCORES, tmp_path)
    told = " ".join(headline_and_sentences({**outcome, "cost": {"mgda (exact)": {"relative": 1.84}}})[1])
    assert "A step takes 1.8 times the seconds of plain fixed weights." in told
    assert told.count("A step takes") == 1
    reason = "Nothing was compared: the baseline of left is not above zero."
    without = {**outcome, "comparison": None, "conditions": [*outcome["conditions"], reason]}
    assert headline_and_sentences(without) == (reason, [])


@pytest.mark.parametrize(
    ("names", "seeds", "headline"),
    [
        (["tuned scalarisation", "uniform"], 5, "No method is shown to be better than tuned scalarisation."),
        (
            ["tuned scalarisation", "mgda (exact)"],
            1,
            "There are too few seeds to say whether any method is better",
        ),
        (["tuned scalarisation"], 5, "Only tuned scalarisation was run"),
        (
            ["uniform", "mgda (exact)"],
            5,
            "mgda (exact) has the best mean score, but no fixed weighting was run",
        ),
    ],
)
def test_headlines(tmp_path: Path, names: list[str], seeds: int, headline: str) -> None:
    outcome = outcome_of({name: SCORES[name] for name in names}, tmp_path, seeds)
    assert headline_and_sentences(outcome)[0].startswith(headline)


def test_tuning_runs_stay_out_and_the_front_is_drawn(tmp_path: Path) -> None:
    outcome_of(SCORES, tmp_path)
    outcomes = read_outcomes([tmp_path], [])
    runs = finals(find_runs(tmp_path), outcomes)
    assert len(runs) == 20 and "tuning" not in {run.path.name for run in runs}
    from dataclasses import replace

    (study,) = collect(runs)
    study = replace(study, outcome=outcomes[tmp_path])
    trace = plane_section(study).rows[0][0].data[0]
    assert trace["x"] == [82.5, 87.5] and trace["text"] == ["0.25, 0.75", "0.75, 0.25"]
    page = build_report([tmp_path], tmp_path / "report.html").read_text()
    assert "mgda (exact) is better than tuned scalarisation." in page
    assert "How this was compared" in page and "against tuned scalarisation" in page and "better (p " in page


def test_an_outcome_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "one", epochs=2, steps_per_epoch=2)
    for text in ("{", '{"schema": 99}', "[]"):
        (tmp_path / "outcome.json").write_text(text)
        page = build_report([tmp_path], tmp_path / "report.html").read_text()
        assert "outcome.json cannot be read as the outcome of a sweep" in page
