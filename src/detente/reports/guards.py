"""What guards and searches did: estimated errors ε̂², refused and stationary steps, kept ranks, trials of a search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from detente.records import Row, Run
from detente.reports.figures import (
    MOST_PANELS,
    Figure,
    Section,
    axis,
    epoch_lines,
    log_if_wide,
    number_of,
)
from detente.reports.groups import Group, Study

TITLE = "Estimated errors, refused steps and searches"

Values = list[tuple[int, float | None]]


def guards_section(study: Study) -> Section | None:
    """Trajectories over the epochs of what methods and searches told of their steps.

    Estimated errors ε̂², refused shares and trials of line searches come from the rows of epochs, zero directions and
    kept ranks from the recorded steps. None where no run told anything.
    """
    rows, texts = [], []
    for draw in (_errors, _steps, _searches):
        figures, text = draw(study)
        if figures:
            rows.append(tuple(figures))
            texts.append(text)
    if not rows:
        return None
    text = "Lines are means over seeds, bands reach from the lowest to the highest seed; methods without such a record "
    return Section(TITLE, f"{text}are not in the figure. {' '.join(texts)}", tuple(rows))


def _errors(study: Study) -> tuple[list[Figure], str]:
    """The estimates ε̂² of the adaptive guard, task by task."""
    figures: list[Figure] = []
    for task in study.tasks[:MOST_PANELS]:
        pick = partial(_each, pick=partial(_estimate, task=task))
        figures += _figure(study, f"{task}: estimated ε̂²", "ε̂²", pick, log=True)
    text = (
        "ε̂²: the estimated squared error of a task's gradient, its mean squared distance from its mean over the epoch, "
        "before it is scaled (Aygar 2019, Figure 3.5)."
    )
    if len(study.tasks) > MOST_PANELS:
        text += f" The first {MOST_PANELS} of {len(study.tasks)} tasks are shown."
    return figures, text


def _steps(study: Study) -> tuple[list[Figure], str]:
    """Shares of the steps that were refused, that had a zero direction, and that lost a task."""
    refused = _figure(
        study,
        "Refused steps: share of the epoch's",
        "share",
        _refused,
        {"range": [-0.03, 1.03]},
        told=_is_positive,
    )
    stationary = _figure(
        study,
        "Steps with a zero direction: share of the recorded",
        "share",
        lambda run: _of_steps(run, lambda row: float(row.get("status") == "stationary")),
        {"range": [-0.03, 1.03]},
        told=_is_positive,
    )
    lost = _figure(
        study,
        "Kept rank of the gradients: mean of the recorded steps",
        "rank",
        lambda run: _of_steps(run, lambda row: number_of(row.get("kept_rank"))),
        told=lambda values: any(value is not None and value < len(study.tasks) for _, value in values),
    )
    texts = []
    if refused:
        texts.append(
            "Refused steps: a guard, or an equation without solution, kept the parameters where they were; a guard "
            "that holds back only the shared part counts too."
        )
    if stationary:
        texts.append(
            "A zero direction: no direction that helps every task was found, or the guard held it back."
        )
    if lost:
        texts.append(
            f"Kept rank below {len(study.tasks)}: the method took some direction of the gradients for zero."
        )
    return [*refused, *stationary, *lost], " ".join(texts)


def _searches(study: Study) -> tuple[list[Figure], str]:
    """What line searches did."""

    def share(name: str, of: str) -> Callable[[Run], Values]:
        def pick(row: Row) -> float | None:
            told = row.get("search")
            if not isinstance(told, Mapping):
                return None
            part, whole = number_of(told.get(name)), number_of(told.get(of))
            return part / whole if part is not None and whole else None

        return lambda run: _each(run, pick)

    unit = {"range": [-0.03, 1.03]}
    figures = [
        *_figure(study, "Line search: trials per step", "trials", share("trials", "steps"), log=True),
        *_figure(
            study, "Line search: steps that took the first length", "share", share("first", "steps"), unit
        ),
        *_figure(
            study,
            "Line search: steps without a length",
            "share",
            share("capped", "steps"),
            unit,
            told=_is_positive,
        ),
        *_figure(
            study,
            "Line search: failed checks on the network itself",
            "share",
            share("failures", "checks"),
            unit,
        ),
    ]
    return (
        figures,
        "Line search: how many lengths were tried for a step, and how often the first one was taken.",
    )


# ---- from records to values by epoch


def _each(run: Run, pick: Callable[[Row], float | None]) -> Values:
    return [(row["epoch"], pick(row)) for row in run.epochs]


def _estimate(row: Row, task: str) -> float | None:
    """ε̂² of a task; of a guard for each block of parameters the mean over the blocks."""
    told, blocks = _told(row, "epsilon_squared"), _told(row, "blocks")
    if isinstance(told, Mapping):
        return number_of(told.get(task))
    records = [block.get("epsilon_squared") for block in blocks or () if isinstance(block, Mapping)]
    values = [number_of(record.get(task)) for record in records if isinstance(record, Mapping)]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _told(row: Row, key: str) -> Any:
    """What the method said at the end of the epoch."""
    told = row.get("method")
    return told.get(key) if isinstance(told, Mapping) else None


def _refused(run: Run) -> Values:
    """The guard's own share, which counts held-back shared parts too; else the loop's count over the epoch's steps."""
    found: Values = []
    last = 0
    for row in run.epochs:
        share = number_of(_told(row, "refused_share"))
        count, steps = number_of(row.get("refused")), row["step"] - last
        if share is None and count is not None and steps > 0:
            share = count / steps
        found.append((row["epoch"], share))
        last = row["step"]
    return found


def _of_steps(run: Run, pick: Callable[[Row], float | None]) -> Values:
    """The mean over the recorded steps of every epoch."""
    by_epoch: dict[int, list[float]] = {}
    for row in run.steps:
        value = pick(row)
        if value is not None:
            by_epoch.setdefault(row["epoch"], []).append(value)
    return [(epoch, sum(values) / len(values)) for epoch, values in by_epoch.items()]


def _is_positive(values: Values) -> bool:
    return any(value for _, value in values)


def _is_there(values: Values) -> bool:
    return any(value is not None for _, value in values)


def _figure(
    study: Study,
    title: str,
    y: str,
    of: Callable[[Run], Values],
    options: Mapping[str, Any] | None = None,
    *,
    told: Callable[[Values], bool] = _is_there,
    log: bool = False,
) -> Iterable[Figure]:
    """One figure with the groups that have something to tell; none where no group has."""
    data: list[dict[str, Any]] = []
    groups: tuple[Group, ...] = study.compared
    for group in groups:
        values = [pair for run in group.runs for pair in of(run)]
        if told(values):
            data += epoch_lines(group, values)
    if not data:
        return ()
    scale = log_if_wide(data) if log else dict(options or {})
    return (Figure(title, data, {"xaxis": axis("epoch"), "yaxis": axis(y, **scale)}, height=260),)


__all__ = ["guards_section"]
