"""What a sweep found, for the page: the verdict from its tests, the front of fixed weightings, its conditions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detente.records import RecordError, Run
from detente.records.schema import OUTCOME, OUTCOME_SCHEMA
from detente.reports.groups import Study

Outcome = Mapping[str, Any]


def read_outcomes(folders: Iterable[Path], problems: list[RecordError]) -> dict[Path, Outcome]:
    """The outcomes of the sweeps among these folders, by folder; one that cannot be read joins the problems."""
    found: dict[Path, Outcome] = {}
    for folder in folders:
        path = Path(folder) / OUTCOME
        if not path.is_file():
            continue
        try:
            outcome = json.loads(path.read_text(encoding="utf-8"))
            if outcome["schema"] != OUTCOME_SCHEMA:
                raise ValueError(f"it has schema {outcome['schema']}, this version reads {OUTCOME_SCHEMA}")
            found[Path(folder)] = outcome
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(RecordError(f"{path} cannot be read as the outcome of a sweep ({error})."))
    return found


def finals(runs: Iterable[Run], outcomes: Mapping[Path, Outcome]) -> list[Run]:
    """The runs without those of a sweep that only chose a configuration, or that belong to its front."""
    chosen = {
        (folder / "runs" / name).resolve()
        for folder, outcome in outcomes.items()
        for entry in outcome["contenders"]
        for name in entry["runs"]
    }
    inside = [folder.resolve() for folder in outcomes]
    return [
        run
        for run in runs
        if run.path.resolve() in chosen or not any(folder in run.path.resolve().parents for folder in inside)
    ]


def said_of(study: Study, name: str) -> Mapping[str, Any] | None:
    """What the comparison says of a contender; None without a sweep, or where it was not compared."""
    comparison = study.outcome["comparison"] if study.outcome else None
    return None if comparison is None else comparison["methods"].get(name)


def cost_of(study: Study, name: str) -> Mapping[str, Any] | None:
    """What a step of a contender costs, measured after the sweep; None where it was not."""
    return ((study.outcome or {}).get("cost") or {}).get(name)


def conditions(outcome: Outcome) -> list[str]:
    """How the contenders were compared: the score, which tests were corrected together, and what was equal for all."""
    comparison = outcome["comparison"]
    if comparison is None:
        return list(outcome["conditions"])
    families = [f"{family.rstrip('.')}." for family in comparison["families"]]
    return [*outcome["conditions"], _score(comparison), *families]


def headline_and_sentences(outcome: Outcome) -> tuple[str, list[str]]:
    """The verdict in words, with what carries and what limits it."""
    comparison = outcome["comparison"]
    if comparison is None:
        reasons = [told for told in outcome["conditions"] if told.startswith("Nothing was compared")]
        return next(iter(reasons), "Nothing was compared."), []
    reference = comparison["reference"]
    if reference is None:
        best = comparison["best"]["best"]
        headline = (
            f"{best} has the best mean score, but no fixed weighting was run to hold it against."
            if best
            else "No fixed weighting was run to hold the methods against."
        )
        return headline, []
    by_verdict: dict[str, list[str]] = {}
    for name, said in comparison["methods"].items():
        if said["verdict"] is not None:
            by_verdict.setdefault(said["verdict"], []).append(name)
    better, worse = by_verdict.get("better", []), by_verdict.get("worse", [])
    count = sum(len(names) for names in by_verdict.values())
    if not count:
        headline = f"Only {reference} was run, so there is nothing to compare it with."
    elif len(by_verdict.get("too few seeds", [])) == count:
        headline = f"There are too few seeds to say whether any method is better than {reference}."
    elif not better:
        headline = f"No method is shown to be better than {reference}."
    else:
        headline = f"{_listed(better)} {'is' if len(better) == 1 else 'are'} better than {reference}."
    sentences = [_evidence(outcome, name) for name in (*better, *worse)]
    open_ones = by_verdict.get("no difference shown", [])
    if open_ones:
        sentences.append(
            f"No difference from {reference} is shown for {_listed(open_ones)}. That does not say that there is none"
            f"{_visible(comparison, open_ones)}."
        )
    few = by_verdict.get("too few seeds", [])
    if few and len(few) < count:
        sentences.append(f"Too few seeds to test: {_listed(few)}.")
    front = outcome["front"]
    if front:
        gains = {name: gain for name, gain in front["gain"].items() if gain > 0 and name != reference}
        names = sorted(gains, key=lambda name: -gains[name])
        if names:
            sentences.append(
                "In the mean over the seeds no fixed weighting that was run is at least as good in every task as "
                f"{_listed(names, 'or')}; weightings between those that were run may be."
            )
        else:
            sentences.append(
                "In the mean over the seeds some fixed weighting is at least as good in every task as each method."
            )
    if outcome["failures"]:
        sentences.append(
            f"{len(outcome['failures'])} runs failed and are left out; their reasons are in {OUTCOME}."
        )
    return headline, sentences


def front_points(study: Study) -> list[Mapping[str, Any]]:
    """The fixed weightings with their means on test data, as the outcome has them; empty without a front."""
    front = study.outcome["front"] if study.outcome else None
    return [] if front is None else list(front["points"])


def _evidence(outcome: Outcome, name: str) -> str:
    comparison = outcome["comparison"]
    said = comparison["methods"][name]
    cost = outcome.get("cost", {}).get(name)
    against = said["against_reference"]
    test = against["test"]
    size = abs(test["difference"])
    p = "" if against["adjusted"] is None else f", p = {against['adjusted']:.2g} after Holm's correction"
    side = "better" if test["difference"] < 0 else "worse"
    spent = f" A step takes {cost['relative']:.2g} times the seconds of plain fixed weights." if cost else ""
    return (
        f"{name}: {size:.2f} points {side} than {comparison['reference']} in the mean over {test['pairs']} seeds{p}."
        f"{spent}"
    )


def _visible(comparison: Mapping[str, Any], names: Sequence[str]) -> str:
    """How small a difference these seeds could have shown, by the deviations of the paired differences."""
    reaches = []
    for name in names:
        test = comparison["methods"][name]["against_reference"]["test"]
        # Whoever took the same steps as the reference differs from it by nothing with every seed.
        if test["deviation"] and test["pairs"] > 1:
            reaches.append(_critical(test["pairs"]) * test["deviation"] / test["pairs"] ** 0.5)
    if not reaches:
        return ""
    low, high = min(reaches), max(reaches)
    span = f"{high:.3g}" if len(reaches) == 1 else f"{low:.3g} to {high:.3g}"
    return f": with these seeds a single test could have shown differences from about {span} points on"


def _critical(pairs: int) -> float:
    """Student's t that a two-sided test at 5 % asks for."""
    from scipy.special import stdtrit

    return float(stdtrit(pairs - 1, 0.975))


def _score(comparison: Mapping[str, Any]) -> str:
    meaning = str(comparison["score_meaning"])
    return f"The score, lower being better: {meaning.rstrip('.')}."


def _listed(names: Sequence[str], last: str = "and") -> str:
    return f" {last} ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} {last} {names[-1]}"
