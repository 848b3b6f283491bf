"""What the numbers say, in words: nothing that was not run, nothing that the seeds do not carry."""

from __future__ import annotations

import math
from dataclasses import dataclass

from detente.reports.groups import Group, Study
from detente.reports.sweeps import headline_and_sentences
from detente.reports.tables import show_metric, show_signed
from detente.statistics import Spread, spread

# Held together at the end of a line.
_PERCENT = "\N{NO-BREAK SPACE}%"


@dataclass(frozen=True)
class Verdict:
    """What the runs of one study say, as plain text.

    Attributes:
        headline: one sentence.
        sentences: those that carry the headline or limit it, in the order to be read.
    """

    headline: str
    sentences: tuple[str, ...]


def verdict(study: Study) -> Verdict:
    """The verdict on one study, from its finished runs.

    From a sweep's own tests where the runs are of one. Otherwise ranked by Δm where single-task baselines exist;
    without them, or without finished runs, it says what is missing instead of naming a winner.
    """
    if study.outcome is not None:
        headline, found = headline_and_sentences(study.outcome)
        return Verdict(headline, tuple(found))
    ranked = _ranked(study)
    done = [group for group in study.compared if group.finished]
    if ranked:
        headline, sentences = _by_delta_m(study, ranked)
    elif done and study.singles:
        headline = "Δm cannot be computed, so there is no single number to compare the methods by."
        sentences = [f"{study.delta_m(done[0])[1].capitalize()}.", *_leaders(study, done)]
    elif done:
        headline = "No single-task baselines were run, so nothing can be said about what sharing costs."
        sentences = _leaders(study, done)
    else:
        headline = "There is nothing to compare yet: no run on several tasks has finished."
        sentences = []
    sentences += _limits(study, done)
    return Verdict(headline, tuple(sentences))


def _ranked(study: Study) -> list[tuple[Group, Spread]]:
    found = [(group, study.delta_m(group)[0]) for group in study.compared]
    ranked = [(group, delta) for group, delta in found if delta is not None]
    return sorted(ranked, key=lambda pair: pair[1].mean)


def _by_delta_m(study: Study, ranked: list[tuple[Group, Spread]]) -> tuple[str, list[str]]:
    best, delta = ranked[0]
    percent = f"Δm {show_signed(delta.mean)}{_PERCENT}"
    # Methods whose Δm is the same as shown share the headline.
    leaders = [group.name for group, other in ranked if show_signed(other.mean) == show_signed(delta.mean)]
    names = " and ".join(leaders) if len(leaders) < 3 else f"{', '.join(leaders[:-1])} and {leaders[-1]}"
    if len(ranked) == 1:
        side = "worse than" if delta.mean > 0 else "no worse than"
        headline = f"{best.name} is on average {side} one network per task: {percent}."
    elif delta.mean > 0:
        come = "come" if len(leaders) > 1 else "comes"
        headline = f"{names} {come} closest to one network per task: {percent}. None reaches it."
    else:
        are = "are" if len(leaders) > 1 else "is"
        headline = f"{names} {are} on average no worse than one network per task: {percent}."
    sentences = [_per_task(study, best, f"{best.name} on test data" if len(leaders) > 1 else "On test data")]
    if len(ranked) > 1 and delta.mean <= 0:
        count = sum(1 for _, other in ranked if other.mean <= 0)
        sentences.append(f"{count} of {len(ranked)} methods get there.")
    uniform = next((pair for pair in ranked if pair[0].method == "uniform"), None)
    if uniform is None:
        sentences.append("Uniform weights, the simplest opponent, were not run or have not finished.")
    elif uniform[0] is best:
        if len(ranked) > 1:
            second, its = ranked[1]
            sentences.append(
                f"No method does better than uniform weights here; the next is {second.name} "
                f"with Δm {show_signed(its.mean)}{_PERCENT}."
            )
    else:
        gain = uniform[1].mean - delta.mean
        sentences.append(
            f"Uniform weights have Δm {show_signed(uniform[1].mean)}{_PERCENT}: a difference of {gain:.2f} points."
            f"{_against_chance(gain, delta, uniform[1])}"
        )
        sentences += _cost(study, best)
    return headline, sentences


def _per_task(study: Study, group: Group, start: str) -> str:
    if len(group.tasks) > 4:
        better = sum(1 for task in group.tasks if _not_worse(study, group, task))
        return f"{start}: no worse than the single-task network in {better} of {len(group.tasks)} tasks."
    parts = []
    for task in group.tasks:
        metric = study.metrics[task]
        ours, theirs = spread(group.values(task)), study.baseline(task, group)
        alone = spread(theirs.values(task)) if theirs else None
        if ours is None or alone is None:
            continue
        unit = _PERCENT if metric.percent else ""
        shown, other = show_metric(ours.mean, metric), show_metric(alone.mean, metric)
        parts.append(f"{task} {metric.name} {shown}{unit} (single task {other}{unit})")
    return f"{start}: {', '.join(parts)}."


def _not_worse(study: Study, group: Group, task: str) -> bool:
    ours, baseline = spread(group.values(task)), study.baseline(task, group)
    alone = spread(baseline.values(task)) if baseline else None
    if ours is None or alone is None:
        return False
    return ours.mean >= alone.mean if study.metrics[task].higher_is_better else ours.mean <= alone.mean


def _against_chance(gain: float, first: Spread, second: Spread) -> str:
    """A sentence on the spread between seeds: a description, not a test."""
    if first.deviation is None or second.deviation is None:
        return ""
    error = math.sqrt(first.deviation**2 / first.count + second.deviation**2 / second.count)
    size = "more than" if gain > 2 * error else "less than"
    return f" That is {size} twice the standard error of the difference between seeds ({error:.2f} points)."


def _cost(study: Study, group: Group) -> list[str]:
    relative = study.relative_seconds(group)
    if relative is None:
        return []
    return [f"{group.name} needs {relative:.2f} times the time per epoch of uniform weights."]


def _leaders(study: Study, done: list[Group]) -> list[str]:
    """Who leads in each task, where there is no common scale."""
    if len(done) < 2 or len(study.tasks) > 6:
        return []
    sentences = []
    for task in study.tasks:
        metric = study.metrics[task]
        found = [(group, mean) for group in done if (mean := spread(group.values(task))) is not None]
        if not found:
            continue
        pick = max if metric.higher_is_better else min
        group, mean = pick(found, key=lambda pair: pair[1].mean)
        unit = _PERCENT if metric.percent else ""
        sentences.append(
            f"Best {metric.name} on {task}: {group.name} with {show_metric(mean.mean, metric)}{unit}."
        )
    return sentences


def _limits(study: Study, done: list[Group]) -> list[str]:
    """What these runs cannot show."""
    sentences = []
    counts = {len(group.seeds) for group in (*done, *study.singles) if group.finished}
    if counts == {1}:
        sentences.append(
            "There is one seed for each method. One seed proves little: such differences may be chance."
        )
    elif 1 in counts:
        sentences.append("Some methods have only one seed: differences from them may be chance.")
    if len(done) > 1 and not any(group.method == "static" for group in done):
        sentences.append(
            "No tuned fixed weighting was run, so whether one would do as well is not answered here."
        )
    last, chosen = _chosen_last(study)
    if last and 2 * last >= chosen:
        sentences.append(
            f"In {last} of {chosen} runs the last epoch was the best on validation data: they were still "
            "improving, and longer training may change the order."
        )
    differing = study.differing_settings()
    if differing:
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        sentences.append(
            f"The runs differ in more than the method ({', '.join(differing[:4])}{more}): compare with care."
        )
    unfinished = sum(1 for run in study.runs if not run.finished)
    if unfinished:
        are = "is not finished and is" if unfinished == 1 else "are not finished and are"
        sentences.append(f"{unfinished} of {len(study.runs)} runs {are} left out of the numbers.")
    return sentences


def _chosen_last(study: Study) -> tuple[int, int]:
    """How many finished runs chose their last epoch, and how many chose one epoch on validation data."""
    last = chosen = 0
    for run in study.runs:
        if run.result is None or run.result.get("selection") == "last":
            continue
        epochs = run.result.get("selected_epochs")
        if isinstance(epochs, list) and len(epochs) == 1:
            chosen += 1
            last += epochs[0] == run.result["epochs"]
    return last, chosen
