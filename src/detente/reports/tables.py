"""The table of results: numbers first, text for the reader beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from detente.records import Metric, Run, find_runs
from detente.reports.groups import Group, Study, collect
from detente.reports.published import by_source, caveat, delta_m_of, heading, number, printed, rows_of
from detente.reports.sweeps import cost_of, said_of
from detente.statistics import Spread, spread

if TYPE_CHECKING:
    import rich.table

MISSING = "–"
# With more tasks a column for each no longer fits a page.
MOST_TASK_COLUMNS = 6


@dataclass(frozen=True)
class Column:
    """One column: its title, whether it holds numbers, and which direction is better (None: neither).

    A ``minor`` column is dropped where there is little room: the row's full name says the same.
    """

    key: str
    title: str
    numeric: bool = True
    higher_is_better: bool | None = None
    minor: bool = False


@dataclass(frozen=True)
class Cell:
    """One entry: text for the reader, the number behind it (None if there is none), and whether it leads."""

    text: str
    value: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Row:
    """One group of runs."""

    group: Group
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class PublishedLine:
    """One row of a paper's table: its method and a cell for each column; ``heading`` names the source."""

    heading: str
    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """The results of one experiment as a table.

    Attributes:
        experiment: its name.
        columns: from left to right.
        rows: one for each method and setting, from top to bottom.
        notes: in words, what is missing or how a number was made.
        published: rows of the papers' tables, which are never sorted among the runs'.
    """

    experiment: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    published: tuple[PublishedLine, ...] = ()

    def records(self) -> list[dict[str, str | float | None]]:
        """One dictionary for every row: column key to number (text for columns of text).

        `pandas.DataFrame(table.records())` makes a data frame of it.
        """
        return [
            {
                column.key: cell.value if column.numeric else cell.text
                for column, cell in zip(self.columns, row.cells, strict=True)
            }
            for row in self.rows
        ]


def results_table(runs: Iterable[Run]) -> list[Table]:
    """One table for each experiment among the runs; an empty list for no runs.

    >>> results_table([])
    []
    """
    return [table_of(study) for study in collect(runs)]


def table_of(study: Study) -> Table:
    """The table of one study: main metric of every task, Δm, time, memory."""
    columns = [
        Column("method", "method", numeric=False),
        Column("gradients", "gradients", numeric=False, minor=True),
    ]
    narrow = len(study.tasks) <= MOST_TASK_COLUMNS
    if narrow:
        for task in study.tasks:
            metric = study.metrics[task]
            unit = " %" if metric.percent else ""
            columns.append(
                Column(f"{task} {metric.name}", f"{task} {metric.name}{unit}", True, metric.higher_is_better)
            )
    common = _common_metric(study)
    if not narrow and common is not None:
        unit = " %" if common.percent else ""
        title = f"mean {common.name}{unit}"
        columns.append(Column("mean", title, True, common.higher_is_better))
    reference = ((study.outcome or {}).get("comparison") or {}).get("reference")
    columns += [
        Column("delta_m", "Δm %", True, False),
        *([Column("verdict", f"against {reference}", numeric=False)] if reference else []),
        Column("relative_seconds", "time × uniform", True, None),
        Column("seconds_per_step", "ms per step", True, None)
        if _benched(study)
        else Column("seconds_per_epoch", "s per epoch", True, None),
        Column("peak_memory_bytes", "peak memory", True, None),
    ]
    # A column that says "1" in every row says it better in a sentence.
    counted = any(len(group.runs) != 1 or not group.finished for group in study.groups)
    if counted:
        columns.append(Column("seeds", "seeds", True, None))
    rows = []
    for group in study.groups:
        cells = [Cell(title_of(group)), Cell(_GRADIENTS.get(group.gradients, group.gradients))]
        if narrow:
            cells += [_metric_cell(group, study.metrics[task]) for task in study.tasks]
        elif common is not None:
            cells.append(_mean_cell(group, common))
        cells += [_delta_cell(study, group), *([_verdict_cell(study, group)] if reference else [])]
        cells += _benched_cells(study, group) if _benched(study) else _spent_cells(study, group)
        cells += [_seeds_cell(group)] if counted else []
        rows.append(Row(group, tuple(cells)))
    lines = tuple(_published(study, columns))
    return Table(
        study.experiment, tuple(columns), _mark_best(columns, rows), tuple(_notes(study, narrow)), lines
    )


def _published(study: Study, columns: Sequence[Column]) -> Iterable[PublishedLine]:
    """The published rows, with what the columns of metrics and of Δm ask for."""
    for source, rows in by_source(rows_of(study)).items():
        for row in rows:
            found = {
                f"{metric.task} {metric.name}": Cell(text, number(row, metric))
                for metric in (study.metrics[task] for task in study.tasks)
                if (text := printed(row, metric)) is not None
            }
            between = delta_m_of(study, row)
            if between is not None:
                found["delta_m"] = Cell(f"{show_signed(between.low)} to {show_signed(between.high)}")
            cells = tuple(found.get(column.key, Cell("")) for column in columns[1:])
            yield PublishedLine(heading(study, source), row.method, (Cell(row.method), *cells))


def title_of(group: Group) -> str:
    """The group's name without the gradients, which have a column of their own."""
    return group.name.replace(f" ({group.gradients})", "", 1)


def show_metric(value: float, metric: Metric) -> str:
    """A metric as the reader sees it: percent with two digits, else four significant digits.

    >>> show_metric(0.96418, Metric("left", "accuracy", True, True))
    '96.42'
    """
    return f"{100 * value:.2f}" if metric.percent else f"{value:.4g}"


def show_signed(value: float, digits: int = 2) -> str:
    """A number with its sign, a true minus, and no negative zero.

    >>> show_signed(-0.304), show_signed(-0.001), show_signed(1.5)
    ('−0.30', '0.00', '+1.50')
    """
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def show_spread(text: str, found: Spread, scale: float, digits: str) -> str:
    """A mean with its standard deviation, when there is more than one value."""
    return text if found.deviation is None else f"{text} ± {scale * found.deviation:{digits}}"


def rich_table(table: Table, width: int = 10**6) -> rich.table.Table:
    """The table for a terminal of this many characters, for `rich.print`.

    Numbers are never cut: where there is too little room, memory and seconds are left out, then seeds and
    relative time.
    """
    import rich.box
    import rich.table
    from rich.text import Text

    keep = [index for index, column in enumerate(table.columns) if not column.minor]
    texts = [[row.group.name, *(cell.text for cell in row.cells[1:])] for row in table.rows]
    headings = [column.title.replace(" ", "\n") for column in table.columns]

    words = [
        max(len(word) for text in (heading, *column) for word in text.split() or [""])
        for heading, *column in zip(headings, *texts, strict=True)
    ]

    whole = [
        max(len(line) for text in (heading, *column) for line in text.split("\n"))
        for heading, *column in zip(headings, *texts, strict=True)
    ]

    def room(widths: list[int]) -> int:
        # Between two columns rich leaves three characters, at the edges one.
        return sum(widths[index] for index in keep) + 3 * (len(keep) - 1) + 2

    # The names wrap first; means and deviations only where nothing else is left.
    unbroken = [words[0], *whole[1:]]
    for key, widths in (
        ("peak_memory_bytes", unbroken),
        ("seconds_per_epoch", unbroken),
        ("seeds", words),
        ("relative_seconds", words),
    ):
        if room(widths) > width:
            keep = [index for index in keep if table.columns[index].key != key]
    title = f"{table.experiment}: results on test data"
    shown = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    fits = room(unbroken) <= width
    for index in keep:
        numeric = table.columns[index].numeric
        justify: Literal["left", "right"] = "right" if numeric else "left"
        shown.add_column(
            Text(headings[index]), justify=justify, no_wrap=numeric and fits, min_width=words[index]
        )
    for row, entries in zip(table.rows, texts, strict=True):
        shown.add_row(*(Text(entries[i], style="bold" if row.cells[i].best else "") for i in keep))
    return shown


def print_table(folders: Sequence[Path]) -> None:
    """Print the tables of the runs in these folders, with their notes, to the terminal.

    Folders are searched at every depth; the table is as wide as the terminal.

    Raises:
        FileNotFoundError: a folder does not exist.
    """
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    for table in results_table(run for folder in folders for run in find_runs(Path(folder))):
        console.print(rich_table(table, console.width))
        for note in table.notes:
            console.print(Padding(Text(note, style="dim"), (0, 1)))


_GRADIENTS = {"none": "not needed"}


def _common_metric(study: Study) -> Metric | None:
    """The main metric if all tasks share one (by name, direction and unit)."""
    first = study.metrics[study.tasks[0]]
    same = all(replace(study.metrics[task], task=first.task) == first for task in study.tasks)
    return first if same else None


def _metric_cell(group: Group, metric: Metric) -> Cell:
    if metric.task not in group.tasks:
        return Cell("")
    found = spread(group.values(metric.task))
    if found is None:
        return Cell(MISSING)
    scale, digits = (100.0, ".2f") if metric.percent else (1.0, ".2g")
    return Cell(show_spread(show_metric(found.mean, metric), found, scale, digits), found.mean)


def _mean_cell(group: Group, metric: Metric) -> Cell:
    if group.single:
        return _metric_cell(group, replace(metric, task=group.tasks[0]))
    means = []
    for run in group.finished:
        values = [run.main_value(task) for task in group.tasks]
        numbers = [value for value in values if value is not None]
        if len(numbers) == len(values):
            means.append(sum(numbers) / len(numbers))
    found = spread(means)
    if found is None:
        return Cell(MISSING)
    scale, digits = (100.0, ".2f") if metric.percent else (1.0, ".2g")
    return Cell(show_spread(show_metric(found.mean, metric), found, scale, digits), found.mean)


def _delta_cell(study: Study, group: Group) -> Cell:
    if group.single:
        return Cell("")
    found, _ = study.delta_m(group)
    if found is None:
        return Cell(MISSING)
    return Cell(show_spread(show_signed(found.mean), found, 1.0, ".2f"), found.mean)


def _verdict_cell(study: Study, group: Group) -> Cell:
    """What the sweep's test against its reference says."""
    said = said_of(study, group.name)
    if said is None:
        return Cell(MISSING)
    if said["verdict"] is None:
        return Cell("the reference")
    adjusted = said["against_reference"]["adjusted"]
    return Cell(f"{said['verdict']} (p {adjusted:.2g})" if adjusted is not None else said["verdict"])


def _benched(study: Study) -> bool:
    """Whether costs were measured after a sweep: the times of its runs then say less."""
    return any(cost_of(study, group.name) for group in study.groups)


def _benched_cells(study: Study, group: Group) -> list[Cell]:
    cost = cost_of(study, group.name)
    if cost is None:
        return [Cell(MISSING)] * 3
    seconds, relative, peak = (cost[key] for key in ("seconds_per_step", "relative", "peak_memory_bytes"))
    return [
        Cell(f"{relative:.2f}", relative),
        Cell(f"{1000 * seconds:.3g}", seconds),
        _memory_cell(peak),
    ]


def _spent_cells(study: Study, group: Group) -> list[Cell]:
    seconds, relative = group.median("seconds_per_epoch"), study.relative_seconds(group)
    return [
        Cell(MISSING if relative is None else f"{relative:.2f}", relative),
        Cell(MISSING if seconds is None else f"{seconds:.3g}", seconds),
        _memory_cell(group.median("peak_memory_bytes")),
    ]


def _memory_cell(found: float | None) -> Cell:
    if found is None:
        return Cell(MISSING)
    size = f"{found / 2**30:.2f} GiB" if found >= 2**30 else f"{found / 2**20:.0f} MiB"
    return Cell(size, found)


def _seeds_cell(group: Group) -> Cell:
    open_runs = len(group.runs) - len(group.finished)
    text = str(len(group.seeds)) if group.finished else ""
    if open_runs:
        text = f"{text or 0} + {open_runs} unfinished"
    return Cell(text, float(len(group.seeds)))


def _mark_best(columns: list[Column], rows: list[Row]) -> tuple[Row, ...]:
    """Mark the leading numbers among the rows that learned several tasks; equal texts lead together."""
    cells = [list(row.cells) for row in rows]
    for index, column in enumerate(columns):
        if column.higher_is_better is None:
            continue
        numbers = {
            number: value
            for number, row in enumerate(rows)
            if not row.group.single and (value := row.cells[index].value) is not None
        }
        if len(numbers) < 2:
            continue
        pick = max if column.higher_is_better else min
        text = rows[pick(numbers, key=lambda number: numbers[number])].cells[index].text
        # "96.42 ± 0.10" and "96.42 ± 0.20" lead together: what is compared is the mean as shown.
        lead = text.split(" ± ")[0]
        leading = [n for n in numbers if rows[n].cells[index].text.split(" ± ")[0] == lead]
        if len(leading) < len(numbers):
            for number in leading:
                cells[number][index] = replace(cells[number][index], best=True)
    return tuple(Row(row.group, tuple(entries)) for row, entries in zip(rows, cells, strict=True))


def _notes(study: Study, narrow: bool) -> Iterable[str]:
    if any(len(group.seeds) > 1 for group in study.groups):
        yield "Numbers are means over seeds ± their standard deviation; time and memory are medians."
    reasons = {
        reason for group in study.compared for found, reason in [study.delta_m(group)] if found is None
    }
    done = [group for group in study.compared if group.finished]
    if study.singles and any(study.delta_m(group)[0] for group in study.compared):
        yield (
            "Δm: mean relative change of the main metrics against networks trained for one task alone, "
            "in percent. Positive is worse than those, negative better."
        )
    for reason in sorted(reasons) if done else ():
        yield f"Δm is missing where it cannot be computed: {reason}."
    if _benched(study):
        yield (
            "Time and memory were measured when the sweep was done: a step in turns with one of uniform weights, and "
            "what tensors hold at most within a step, beside parameters and the optimizer's state."
        )
    elif all(study.relative_seconds(group) is None for group in study.groups):
        yield "No finished run with uniform weights has a time to compare with."
    else:
        yield "Time: seconds of training per epoch, and as a multiple of those with uniform weights."
    if not _benched(study) and any(group.median("peak_memory_bytes") for group in study.groups):
        yield "Peak memory is that of the whole process."
    papers = caveat(study)
    if papers:
        yield papers
    if not narrow:
        yield f"{len(study.tasks)} tasks: the mean over tasks is shown; the figure has each of them."
    for group in study.groups:
        if len(group.seeds) < len(group.finished):
            yield f"{group.name}: two runs have the same seed, so the spread looks smaller than it is."
