"""A strip of test images with labels and each method's predictions."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detente.records import Run, Samples
from detente.reports.groups import Group, Study
from detente.reports.style import named

_MOST_IMAGES = 12
_MOST_TASKS = 4
_MOST_GROUPS = 60


@dataclass(frozen=True)
class Strip:
    """Groups whose runs stored the same images, each with the run that is shown."""

    samples: Samples
    members: list[tuple[Group, Run, Samples]]


def strips_html(study: Study) -> str:
    """The samples section of one study as HTML; words where nothing is stored."""
    strips = _strips(study)
    if not strips:
        return "<p>No sample images were stored by these runs.</p>"
    lacking = [group.name for group in study.groups if not any(run.samples for run in group.runs)]
    parts = [
        "<p>The same test images for every method, from its first stored seed. A wrong prediction is "
        "underlined and has a cross; the labels are in the row above.</p>"
    ]
    parts += [_strip_html(study, strip) for strip in strips]
    if lacking:
        parts.append(f"<p class='note'>No samples stored: {html.escape(', '.join(lacking))}.</p>")
    return "\n".join(parts)


def image_uri(image: NDArray[np.uint8]) -> str:
    """An image [H, W] or [H, W, 3] of bytes as a PNG inside a data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _strips(study: Study) -> list[Strip]:
    strips: list[Strip] = []
    for group in study.groups:
        shown = next(((run, run.samples) for run in group.runs if run.samples), None)
        if shown is None or shown[1] is None or len(shown[1].images) == 0:
            continue
        run, samples = shown
        for strip in strips:
            if np.array_equal(strip.samples.images, samples.images):
                strip.members.append((group, run, samples))
                break
        else:
            strips.append(Strip(samples, [(group, run, samples)]))
    return strips


def _strip_html(study: Study, strip: Strip) -> str:
    count = min(_MOST_IMAGES, len(strip.samples.images))
    targets: dict[str, NDArray[np.int64]] = {}
    for _, _, samples in strip.members:
        targets = {**samples.targets, **targets}
    tasks = [task for task in study.tasks if task in targets]
    shown = tasks[:_MOST_TASKS]
    rows = [
        _row(
            "",
            [
                f"<img alt='test image {n + 1}' src='{image_uri(strip.samples.images[n])}'>"
                for n in range(count)
            ],
        )
    ]
    rows.append(_row("label", [_labels(shown, targets, n) for n in range(count)], "truth"))
    for group, _, samples in strip.members[:_MOST_GROUPS]:
        cells = [_predictions(shown, targets, samples, n) for n in range(count)]
        rows.append(_row(named(group.style, group.name), cells))
    order = html.escape(", ".join(shown))
    more = f" (of {len(tasks)} tasks)" if len(tasks) > len(shown) else ""
    left = len(strip.members) - _MOST_GROUPS
    others = f" The first {_MOST_GROUPS} of {len(strip.members)} methods are shown." if left > 0 else ""
    caption = f"<caption>In each cell, in this order: {order}{more}.{others}</caption>"
    table = f"<table class='strip'>{caption}<tbody>{''.join(rows)}</tbody></table>"
    return f"<div class='scroll' tabindex='0'>{table}</div>"


def _row(head: str, cells: Sequence[str], kind: str = "") -> str:
    inside = "".join(f"<td>{cell}</td>" for cell in cells)
    return f"<tr class='{kind}'><th scope='row'>{head}</th>{inside}</tr>"


def _labels(tasks: Sequence[str], targets: dict[str, NDArray[np.int64]], number: int) -> str:
    return " ".join(f"<span class='digit'>{int(targets[task][number])}</span>" for task in tasks)


def _predictions(
    tasks: Sequence[str], targets: dict[str, NDArray[np.int64]], samples: Samples, number: int
) -> str:
    parts = []
    for task in tasks:
        if task not in samples.predictions:
            parts.append("<span class='digit none' title='not a task of this run'>·</span>")
            continue
        predicted, label = int(samples.predictions[task][number]), int(targets[task][number])
        if predicted == label:
            parts.append(f"<span class='digit'>{predicted}</span>")
        else:
            title = html.escape(f"{task}: predicted {predicted}, is {label}", quote=True)
            parts.append(f"<span class='digit wrong' title=\"{title}\">{predicted}<i>✗</i></span>")
    return " ".join(parts)
