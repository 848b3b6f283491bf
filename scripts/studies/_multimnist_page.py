"""The page of the MultiMNIST study, from what is stored: every word and number follows from the runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _multimnist_pictures import forest, plane
from _multimnist_protocol import (
    EPOCHS,
    TASKS,
    Row,
    above,
    claims,
    delta_ms,
    published_of,
    published_source,
    rows_of,
)
from _multimnist_protocol import conditions as conditions_of

from detente.records import RecordError, Run, read_run, write_text
from detente.reports.sweeps import conditions as equal_for_all
from detente.reports.sweeps import headline_and_sentences, read_outcomes
from detente.statistics import Range, paired_t_test
from detente.sweeps.watch import told

PLANE = "multimnist-plane.png"
FOREST = "multimnist-forest.png"
_ADAM = "uniform with adam"
_STUDY = "runs/multimnist-study"
_FULL = "runs/multimnist-full"


def write(page: Path, sweep: Path | None, full: Path | None, usual: str) -> None:
    """The page, and its pictures into images/ beside it.

    Args:
        page: what to write.
        sweep: folder of the sweep.
        full: folder of the full runs.
        usual: the sweep's command as the script gives it when nothing else is asked of it.

    Raises:
        SystemExit: a sweep was named that has no outcome yet, or there is nothing at all.
    """
    outcome = None if sweep is None else _outcome(sweep)
    runs = [] if outcome is None or sweep is None else _runs(sweep)
    rows, missing = ({}, []) if full is None else rows_of(full)
    if outcome is None and not rows:
        raise SystemExit(f"{full} holds no finished run of the protocol yet.")
    parts = ["# MultiMNIST", "", _introduction(outcome, rows), "", "## Verdict", ""]
    if outcome is not None:
        parts += _verdict(outcome)
    if rows:
        parts += _verdict_of_protocol(rows)
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    if outcome is not None:
        plane(outcome, images / PLANE)
        forest(outcome, images / FOREST)
        parts += _packaged(outcome)
    if rows:
        parts += _protocol(rows, missing)
    parts += _made(outcome, runs, rows, usual)
    write_text(page, "\n".join([*parts, ""]))


def _outcome(sweep: Path) -> Mapping[str, Any]:
    problems: list[RecordError] = []
    found = read_outcomes([sweep], problems)
    if problems:
        raise SystemExit(str(problems[0]))
    if sweep not in found:
        raise SystemExit(
            f"{sweep} has no outcome yet: go on with the sweep until it ends, or leave --out-sweep out."
        )
    return found[sweep]


def _runs(sweep: Path) -> list[Run]:
    """Every finished run of the sweep."""
    return [read_run(path.parent) for path in sorted(sweep.glob("runs/*/result.json"))]


def _introduction(outcome: Mapping[str, Any] | None, rows: Mapping[str, Row]) -> str:
    parts = []
    if outcome is not None:
        parts.append(
            "every registered method against tuned fixed weights on the digits that come with détente"
        )
    if rows:
        counted = conditions_of(rows)
        parts.append(
            f"{_rows(rows)} of the papers' protocol on {counted['counts']['train']:,} training images"
            if counted["source"] == "files"
            else f"{_rows(rows)} of the papers' protocol, on the packaged digits only"
        )
    return (
        "Two overlapping digits in one image, one LeNet, two tasks (Sener & Koltun 2018): "
        + ", and ".join(parts)
        + "."
    )


def _rows(rows: Mapping[str, Row]) -> str:
    return f"{len(rows)} row{'s'[: len(rows) != 1]}"


# ---- verdicts


def _verdict(outcome: Mapping[str, Any]) -> list[str]:
    """The tests' words, and how far apart everybody is."""
    headline, sentences = headline_and_sentences(outcome)
    lines = [f"**Packaged digits: {headline}**", ""]
    comparison = outcome["comparison"]
    if comparison is None:
        return [*lines, *outcome["conditions"][-1:], ""]
    scores = {name: said["score"]["mean"] for name, said in comparison["methods"].items()}
    best, reference = min(scores, key=scores.__getitem__), comparison["reference"]
    name = "Δm" if comparison["score"] == "delta_m" else "The score"
    spoken = [f"{name} goes from {scores[best]:+.2f} % ({best}) to {max(scores.values()):+.2f} % over"]
    spoken[0] += f" {len(scores)} contenders, lower being better"
    if reference is not None:
        place = sorted(scores.values()).index(scores[reference]) + 1
        spoken[0] += f"; {reference} has {scores[reference]:+.2f} % and place {place}"
    worse = [name for name, said in comparison["methods"].items() if said["verdict"] == "worse"]
    # Who is better has its evidence here, who is worse in the table: there may be many.
    kept = [text for text in sentences if not any(text.startswith(f"{name}: ") for name in worse)]
    if worse:
        kept.append(f"Worse than {reference}: {_listed(worse)}; the differences are in the table.")
    kept += _same_optimizer(outcome)
    lines += [f"- {sentence}" for sentence in (*(f"{text}." for text in spoken), *kept)]
    return [*lines, ""]


def _same_optimizer(outcome: Mapping[str, Any]) -> list[str]:
    """MAO and MTAdam against uniform weights with Adam: what is theirs, and not Adam's."""
    said = outcome["comparison"]["methods"]
    if _ADAM not in said:
        return []
    base = dict(zip(said[_ADAM]["seeds"], said[_ADAM]["scores"], strict=True))
    told = []
    for name in ("mao", "mtadam"):
        if name not in said:
            continue
        test = paired_t_test(dict(zip(said[name]["seeds"], said[name]["scores"], strict=True)), base)
        if test.difference is not None and test.p_value is not None:
            told.append(f"{name} {test.difference:+.2f} (p = {test.p_value:.2g})")
    if not told:
        return []
    return [
        "The optimizers with moments for each task are of Adam's kind, the tuned scalarisation moves by SGD; points of Δm "
        f"against {_ADAM}, uncorrected: {', '.join(told)}."
    ]


def _verdict_of_protocol(rows: Mapping[str, Row]) -> list[str]:
    lines = ["**The papers' protocol:**", ""]
    held = conditions_of(rows)
    if held["epochs"] != EPOCHS or held["shortened"] or held["source"] != "files":
        return [*lines, "- Not the whole of it: these runs are shorter or on other digits than the papers', so nothing "
                "published can be held against them.", ""]  # fmt: skip
    found = claims(rows)
    if not found:
        present = _listed([row.entry.title for row in rows.values()])
        return [
            *lines,
            f"- Only {present} finished so far: no published difference can be held against it.",
            "",
        ]
    lines += [f"- {sentence}" for sentence in found]
    seeds = {len(row.runs) for row in rows.values()}
    lines += ["- Each row is one run; how far seeds scatter is not known from it."] if seeds == {1} else []
    return [*lines, ""]


# ---- the packaged digits


def _packaged(outcome: Mapping[str, Any]) -> list[str]:
    percent = {entry["name"]: entry for entry in outcome["contenders"]}
    comparison = outcome["comparison"] or {"methods": {}, "reference": None}
    said = comparison["methods"]
    costs = outcome.get("cost") or {}
    order = sorted(
        percent,
        key=lambda name: (
            percent[name]["kind"] == "single",
            said[name]["score"]["mean"] if name in said else float("inf"),
            name,
        ),
    )
    lines = [
        "## The packaged digits",
        "",
        f"![Test accuracy of every contender on the two digits](images/{PLANE})",
        "",
        "Means over the seeds on test data, bars are standard deviations; the line joins fixed weightings at the tuned "
        "learning rate (weight of the left digit beside each; those that give up a digit lie outside), broken lines are "
        "networks trained for one digit alone.",
        "",
        f"![Δm of every contender with intervals](images/{FOREST})",
        "",
        "Bars are 95 % bootstrap intervals of the mean, small dots the seeds. With so few seeds the intervals are too "
        "narrow: the verdicts follow from the paired tests in the table.",
        "",
        f"| contender | left (%) | right (%) | Δm (%) | against {comparison['reference'] or 'the reference'} (points) | p (Holm) "
        "| verdict | learning rate | options | time of a step |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | --- | ---: |",
    ]
    for name in order:
        entry = percent[name]
        cells = [_mean_and_deviation(entry["test"].get(task), 100) if entry["test"] else "" for task in TASKS]
        cells += _compared(said.get(name))
        choice = entry["choice"]
        cells += (
            ["nothing chosen", ""]
            if choice is None
            else [f"{choice['learning_rate']:g}", _options(choice["options"])]
        )
        cells.append(_cost(costs.get(name)))
        lines.append(f"| {_cell(name)} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Accuracies and Δm are mean ± standard deviation over the seeds; Δm is lower the better, against the single tasks. "
        "The time of a step is relative to that of uniform weights, measured in turns when all runs were done: the median "
        "of the turns, and their range.",
        "",
        *_alike(said),
        *_spaces(outcome),
        "",
        "What was equal for all:",
        "",
        *(f"- {_without_names(sentence)}" for sentence in equal_for_all(outcome)),
        "",
    ]
    return lines


def _without_names(sentence: str) -> str:
    """A family of tests without everybody's name."""
    return re.sub(r"(paired t-tests? of the score against .+?): .*", r"\1, corrected together.", sentence)


def _cost(measured: Mapping[str, Any] | None) -> str:
    """Time of a step and its range; of single tasks nothing was measured."""
    if measured is None:
        return ""
    return f"{measured['relative']:.2f} ({measured['low']:.2f}–{measured['high']:.2f})"


def _compared(said: Mapping[str, Any] | None) -> list[str]:
    """Δm, difference, p value and verdict."""
    if said is None:
        return ["", "", "", ""]
    against = said["against_reference"]
    cells = [_mean_and_deviation(said["score"], 1)]
    if against is None:
        return [*cells, "", "", "reference" if said["verdict"] is None else said["verdict"]]
    difference, adjusted = against["test"]["difference"], against["adjusted"]
    cells.append("" if difference is None else f"{difference:+.2f}")
    cells.append("" if adjusted is None else f"{adjusted:.2g}")
    return [*cells, said["verdict"]]


def _spaces(outcome: Mapping[str, Any]) -> list[str]:
    """Where the methods were solved."""
    on = {
        space: [e["name"] for e in outcome["contenders"] if e["kind"] == "method" and e["gradients"] == space]
        for space in ("features", "layer")
    }
    listed = [f"{_listed(names)} on the {space}" for space, names in on.items() if names]
    text = "Methods that look at gradients are solved on those of the shared parameters, the problem their papers state"
    if listed:
        text += f"; besides, {' and '.join(listed)}, the cheaper upper bound"
    guards = [e["name"] for e in outcome["contenders"] if e["method"] in ("inexact-mgda", "adaptive-mgda")]
    text += "."
    if guards:
        text += f" Guards, which refuse steps: {_listed(guards)}."
    return [text]


def _alike(said: Mapping[str, Any]) -> list[str]:
    """Who has the same results as somebody else, to the last digit: the same runs by another name."""
    groups: dict[tuple[float, ...], list[str]] = {}
    for name, one in said.items():
        groups.setdefault(tuple(one["scores"]), []).append(name)
    listed = [_listed(names) for names in groups.values() if len(names) > 1]
    return [f"The same in every seed, to the last digit: {'; '.join(listed)}.", ""] if listed else []


# ---- the full protocol


def _protocol(rows: Mapping[str, Row], missing: Sequence[str]) -> list[str]:
    told_of = conditions_of(rows)
    counts = told_of["counts"]
    ours, published = delta_ms(rows)
    source = published_source()
    lines = [
        "## The papers' protocol",
        "",
        f"{counts['train']:,} composites for training, {counts['validation']:,} for validation, {counts['test']:,} for "
        f"test ({'the four MNIST files' if told_of['source'] == 'files' else 'packaged digits'}), "
        f"{told_of['epochs']} epochs ({told_of['steps']:,} steps), batch {told_of['batch_size']}, SGD with momentum "
        f"{told_of['momentum']:g}, the learning rate halved every {told_of['halve_every']} epochs, the epoch with the best "
        "validation mean. "
        + f"The paper searches six learning rates for every row; {_rates_of(rows)} "
        + "Steps have each method's native length: uniform weights add the losses where the paper averages them, which is "
        "twice the rate, and MGDA's weights sum to one.",
        "",
        f"Finished: {_listed([row.entry.title for row in rows.values()])}."
        + (f" Not run yet, and therefore absent: {_listed(missing)}." if missing else ""),
        "",
        "| row | left (%) | published | ours − published | right (%) | published | ours − published | Δm (%) | published Δm "
        "| learning rate | seeds | minutes |",
        "| --- |" + " ---: |" * 11,
    ]
    for name, row in rows.items():
        printed = published_of(row.entry)
        cells: list[str] = []
        for task in TASKS:
            if task not in row.entry.tasks:
                cells += ["", "", ""]
                continue
            accuracy = row.accuracy(task)
            cells.append(_mean_and_deviation({"mean": accuracy.mean, "deviation": accuracy.deviation}, 1))
            cells += (
                [f"{printed[task].value:.2f}", _range(above(row, printed[task], task), 3)]
                if task in printed
                else ["", ""]
            )
        cells.append(f"{ours[name]:+.2f}" if name in ours else "")
        cells.append(_range(published[name], 2) if name in published else "")
        rate = f"{row.rate:g}" + (f" of {len(row.by_rate)}" if len(row.by_rate) > 1 else "")
        cells += [rate, str(len(row.runs))]
        cells += [f"{row.seconds / 60:.1f}"]
        lines.append(f"| {row.entry.title} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Published: {source}, as quoted in the protocol (look them up before leaning on a last digit); the paper trains "
        "on 60,000 composites and names no validation split. Differences and the published Δm are ranges because the published numbers are rounded. Where a cell is "
        "empty the paper has no such row"
        + ("." if ours else ", or a single task that Δm needs is not there yet.")
        + " Minutes are those of one run, whatever ran beside it.",
        "",
    ]
    return lines + _at_every_rate(rows)


def _rates_of(rows: Mapping[str, Row]) -> str:
    tried = {tuple(row.by_rate) for row in rows.values()}
    if len(tried) > 1:
        return "here there were those of the second table, and the best on validation data of the first seed was taken."
    (rates,) = tried
    if len(rates) == 1:
        return "here there was one, the same for all."
    listed = _listed([f"{rate:g}" for rate in rates])
    told = f"here there were {listed} for all, and the best on validation data of the first seed was taken."
    highest = [row.entry.title for row in rows.values() if row.rate == max(rates)]
    if not highest:
        return told
    which = "every row" if len(highest) == len(rows) else _listed(highest)
    return f"{told} In {which} that is the highest, so that a higher one may be better still."


def _at_every_rate(rows: Mapping[str, Row]) -> list[str]:
    """A table of what was and was not chosen; nothing where there was nothing to choose."""
    if all(len(row.by_rate) == 1 for row in rows.values()):
        return []
    lines = [
        "At every learning rate that was run; the validation mean, of the first seed, is what chooses:",
        "",
        "| row | learning rate | validation mean (%) | left (%) | right (%) |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows.values():
        for rate in row.by_rate:
            cells = [f"{rate:g}", f"{row.validation(rate):.2f}"]
            for task in TASKS:
                accuracy = row.accuracy(task, rate) if task in row.entry.tasks else None
                found = accuracy and {"mean": accuracy.mean, "deviation": accuracy.deviation}
                cells.append(_mean_and_deviation(found, 1))
            lines.append(f"| {row.entry.title} | " + " | ".join(cells) + " |")
    return [*lines, ""]


# ---- how it was made


def _made(
    outcome: Mapping[str, Any] | None, runs: Sequence[Run], rows: Mapping[str, Row], usual: str
) -> list[str]:
    """The commands as the records have them, the seconds, the versions."""
    lines = ["## Made by", ""]
    script = []
    places = []
    if outcome is not None:
        command = _command(outcome["command"], _STUDY)
        seconds = [run.result["seconds"] for run in runs if run.result is not None]
        lines += ["```text", *_wrapped(command), "```", ""]
        lines += [f"{len(seconds)} runs, {told(sum(seconds))} of training and measuring added up.", ""]
        if command == _command(usual, _STUDY):
            script.append(f"python scripts/studies/multimnist.py sweep --out {_STUDY} --minutes 60")
        places.append(f"--out-sweep {_STUDY}")
    if rows:
        made = [run for row in rows.values() for runs in row.by_rate.values() for run in runs]
        lines += [
            "```text",
            *(_command(run.config["command"], f"{_FULL}/{run.path.name}") for run in made),
            "```",
            "",
        ]
        total = sum(run.result["seconds"] for run in made if run.result)
        lines += [f"{told(total)} of training and measuring added up.", ""]
        rates = " ".join(
            f"{rate:g}" for rate in sorted({rate for row in rows.values() for rate in row.by_rate})
        )
        script.append(
            f"python scripts/studies/multimnist.py full --out {_FULL} --data-dir DIR --lrs {rates} --minutes 80"
        )
        places.append(f"--out-full {_FULL}")
    script.append(
        f"python scripts/studies/multimnist.py page {' '.join(places)} --page docs/results/multimnist.md"
    )
    known = outcome["versions"] if outcome is not None else conditions_of(rows)["versions"]
    named = ", ".join(f"{name} {version}" for name, version in known.items() if name != "platform")
    return [
        *lines,
        "One thread for each run. These commands, in pieces that end after some minutes, and this page:",
        "",
        "```text",
        *script,
        "```",
        "",
        f"Versions: {named}.",
    ]


def _command(command: str, out: str) -> str:
    """A command with the folders that the page speaks of, wherever they were."""
    words = [word for word in shlex.split(command) if word != "--json"]
    for place, word in enumerate(words[:-1]):
        if word in ("--out", "--data-dir"):
            words[place + 1] = out if word == "--out" else "DIR"
    return shlex.join(words)


def _wrapped(command: str, width: int = 110) -> list[str]:
    """A command over several lines, broken between words as a shell takes it."""
    lines = [""]
    for word in map(shlex.quote, shlex.split(command)):
        if lines[-1] and len(lines[-1]) + len(word) + 3 > width:
            lines[-1] += " \\"
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _mean_and_deviation(found: Mapping[str, Any] | None, factor: float) -> str:
    if found is None:
        return ""
    text = f"{factor * found['mean']:.2f}"
    return text if found["deviation"] is None else f"{text} ± {factor * found['deviation']:.2f}"


def _range(found: Range, decimals: int) -> str:
    return f"{found.low:+.{decimals}f} to {found.high:+.{decimals}f}"


def _options(options: Sequence[str]) -> str:
    return ", ".join(f"`{option}`" for option in options) or "defaults"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"
