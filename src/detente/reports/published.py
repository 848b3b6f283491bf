"""Rows of the papers' tables beside the runs, with their source and what their rounding allows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from detente.statistics import Printed, Range, delta_m_range

if TYPE_CHECKING:
    from detente.records import Metric
    from detente.reports.groups import Study


_UNKNOWN = "not recorded"


class PublishedRow(Protocol):
    """What a report needs of a published row; the rows of `detente.experiments` have it."""

    @property
    def method(self) -> str:
        """As the paper calls it."""

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Task to metric to value, as a run would store it."""

    @property
    def source(self) -> str:
        """Paper and table."""

    @property
    def protocol(self) -> str:
        """The conditions of training in words."""

    @property
    def single(self) -> bool:
        """Whether a network was trained for each task alone: what Δm is held against."""

    @property
    def decimals(self) -> Mapping[str, Mapping[str, int]]:
        """Task to metric to the digits after the point that are known of the stored value; others are exact."""

    @property
    def conditions(self) -> Mapping[str, Any]:
        """Settings of a run that follows the protocol, as ``{"epochs": 100}``; nested ones joined by dots."""


def rows_of(study: Study) -> list[PublishedRow]:
    """The published rows with a main metric of a task of this study, those of single tasks first."""
    told = [
        row
        for row in study.published
        if any(number(row, study.metrics[task]) is not None for task in study.tasks)
    ]
    return sorted(told, key=lambda row: not row.single)


def number(row: PublishedRow, metric: Metric) -> float | None:
    """The row's value of a metric; None where the paper has none."""
    return row.metrics.get(metric.task, {}).get(metric.name)


def printed(row: PublishedRow, metric: Metric) -> str | None:
    """The value with the digits it was printed with; in percent where the metric is."""
    value = number(row, metric)
    if value is None:
        return None
    known = row.decimals.get(metric.task, {}).get(metric.name)
    scaled = 100 * value if metric.percent else value
    if known is None:
        return f"{scaled:.6g}"
    return f"{scaled:.{max(0, known - 2 if metric.percent else known)}f}"


def delta_m_of(study: Study, row: PublishedRow) -> Range | None:
    """Every Δm that the rounding of the row and of its paper's single-task row allows; None without such a row."""
    baseline = next((other for other in study.published if other.single and other.source == row.source), None)
    if row.single or baseline is None:
        return None
    both: list[dict[str, dict[str, Printed | float]]] = [{}, {}]
    for task in study.tasks:
        metric = study.metrics[task]
        for cells, one in zip(both, (row, baseline), strict=True):
            value = number(one, metric)
            if value is None:
                return None
            known = one.decimals.get(task, {}).get(metric.name)
            cells[task] = {metric.name: value if known is None else Printed(value, known)}
    directions = {
        task: {study.metrics[task].name: study.metrics[task].higher_is_better} for task in study.tasks
    }
    try:
        return delta_m_range(both[0], both[1], directions)
    except ValueError:
        return None


def departures(study: Study) -> list[str]:
    """In which settings the runs are not those of the published protocol, as ``"epochs 20 (published: 100)"``."""
    found: dict[str, None] = {}
    for row in rows_of(study):
        for key, value in row.conditions.items():
            groups = study.compared or study.groups
            others = dict.fromkeys(json.dumps(group.settings.get(key, _UNKNOWN)) for group in groups)
            others.pop(json.dumps(value), None)
            if others:
                here = " or ".join(str(json.loads(other)) for other in others)
                found[f"{key.rpartition('.')[2]} {here} (published: {value})"] = None
    return list(found)


def heading(study: Study, source: str) -> str:
    """What stands above the rows of one source."""
    words = next(row.protocol for row in rows_of(study) if row.source == source)
    kind = "Published, full protocol" if departures(study) else "Published"
    return f"{kind}: {source}{f' ({words})' if words else ''}"


def caveat(study: Study) -> str | None:
    """What a reader must know before holding the runs against the published rows; None without such rows."""
    if not rows_of(study):
        return None
    text = (
        "Published rows are other people's runs, as the paper prints them; their Δm is the range that the rounding of "
        "the printed numbers allows."
    )
    differing = departures(study)
    if differing:
        text += f" The runs here are not of that protocol, so they do not compare: {', '.join(differing)}."
    return text


def by_source(rows: Iterable[PublishedRow]) -> dict[str, Sequence[PublishedRow]]:
    """The rows in the order of their sources."""
    found: dict[str, list[PublishedRow]] = {}
    for row in rows:
        found.setdefault(row.source, []).append(row)
    return dict(found)
