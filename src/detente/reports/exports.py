"""Tables and figures of a report as files for papers: Markdown, LaTeX, CSV, PNG, PDF."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from detente.reports.groups import Group, Study
from detente.reports.html import sections_of, written
from detente.reports.paper import Undrawable, drawn
from detente.reports.tables import Cell, Row, Table, table_of
from detente.statistics import Spread, spread

PICTURES = ("png", "pdf")
_LONGEST = 80  # characters of a file's name
_SPELLED = {"Δ": "delta-", "ε": "epsilon-", "²": "-squared"}


def export_report(studies: Sequence[Study], folder: Path) -> Iterator[Path]:
    """Write every table and every figure of these studies, one after the other.

    Each study's table is written as Markdown, LaTeX (for ``booktabs``) and CSV (all metrics, unrounded: mean, standard
    deviation and number of runs), each figure of the page as PNG and PDF. The names start with that of the
    experiment. A file of the same name is replaced as a whole; nothing is removed.

    Args:
        studies: as :func:`detente.reports.read_studies` returns them.
        folder: where to; it is made.

    Yields:
        The path of each file, after it was written.

    Raises:
        Undrawable: figures could not be drawn for print, which are named; everything else was written before.
        UnwritableFolder: the folder cannot be written to.

    Example:
        >>> list(export_report([], Path("tables")))
        []
    """
    folder = Path(folder)
    taken: set[str] = set()
    problems: list[str] = []
    for study in studies:
        table = table_of(study)
        start = _free(slug(study.experiment), taken)
        for suffix, text in (("md", markdown(table)), ("tex", latex(table)), ("csv", results_csv(study))):
            yield written(folder / f"{start}-results.{suffix}", text.encode("utf-8"))
        for section in sections_of(study):
            for figure in (figure for row in section.rows for figure in row):
                name = _free(f"{start}-{slug(figure.title or section.title)}", taken)
                for kind in PICTURES:
                    try:
                        picture = drawn(figure, kind)
                    except Undrawable as error:
                        problems.append(f"{section.title}, {error}")
                        break
                    yield written(folder / f"{name}.{kind}", picture)
    if problems:
        count = f"{len(problems)} figure{'s' * (len(problems) > 1)}"
        raise Undrawable(f"everything but {count} was written to {folder}: {'; '.join(problems)}")


def slug(text: str) -> str:
    """A text as a file's name on any system: small letters, digits and hyphens, not too long.

    >>> slug("Left: share of the weights / 50 %"), slug("../.."), slug("left: estimated ε̂²")
    ('left-share-of-the-weights-50', 'figure', 'left-estimated-epsilon-squared')
    """
    plain = "".join(_SPELLED.get(character, character) for character in text)
    plain = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:_LONGEST].strip("-") or "figure"


def _free(name: str, taken: set[str]) -> str:
    """The name, numbered if another file has it."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    taken.add(found)
    return found


def _published(table: Table) -> Iterator[tuple[str, list[list[str]]]]:
    """The papers' rows as texts, by their source."""
    for heading, lines in groupby(table.published, key=lambda line: line.heading):
        yield heading, [[line.name, *(cell.text for cell in line.cells[1:])] for line in lines]


# ---- Markdown


def markdown(table: Table) -> str:
    """The table of results in Markdown, the leading numbers bold, its notes below.

    >>> from detente.reports.tables import Column
    >>> print(markdown(Table("mine", (Column("method", "a|b", numeric=False),), (), ("a_note",))))
    | a\\|b |
    | :-- |
    <BLANKLINE>
    a\\_note
    <BLANKLINE>
    """
    head = [_in_markdown(column.title) + _ARROWS[column.higher_is_better] for column in table.columns]
    rule = ["--:" if column.numeric else ":--" for column in table.columns]
    rows = [[_cell(cell, _in_markdown, "**{}**") for cell in row.cells] for row in table.rows]
    blank = [""] * (len(table.columns) - 1)
    for heading, lines in _published(table):
        rows += [
            [f"*{_in_markdown(heading)}*", *blank],
            *([_in_markdown(text) for text in line] for line in lines),
        ]
    told = [f"| {' | '.join(entries)} |" for entries in (head, rule, *rows)]
    notes = [_in_markdown(note) for note in table.notes]
    return "\n".join(told) + "\n" + "".join(f"\n{note}\n" for note in notes)


_ARROWS = {True: " ↑", False: " ↓", None: ""}


def _in_markdown(text: str) -> str:
    line = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]#|!~$])", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;"))


def _cell(cell: Cell, escape: Callable[[str], str], bold: str) -> str:
    """Bold is the mean alone, neither its deviation nor its stars."""
    if not cell.best:
        return escape(cell.text)
    found = re.match(r"([^\s*]*)(.*)", cell.text, re.DOTALL)
    assert found is not None
    rest = escape(found[2])
    return bold.format(escape(found[1])) + (f" {rest}" if found[2][:1].isspace() else rest)


# ---- LaTeX


def latex(table: Table) -> str:
    """The table of results in LaTeX, a float for the package ``booktabs``; the leading numbers bold, its notes below.

    A table that is wider than the line is made as small as it must be, by the package ``graphicx``.

    >>> from detente.reports.tables import Column
    >>> print(latex(Table("50%", (Column("method", "method", numeric=False),), (), ())))
    % \\usepackage{booktabs, graphicx}
    \\begin{table}
      \\centering
      \\caption{50\\%: results on test data.}
      \\label{tab:50-results}
      \\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%
      \\begin{tabular}{l}
        \\toprule
        method \\\\
        \\midrule
        \\bottomrule
      \\end{tabular}}
    \\end{table}
    <BLANKLINE>
    """
    head = [_in_latex(column.title) + _LATEX_ARROWS[column.higher_is_better] for column in table.columns]
    lines = [" & ".join(head), *_latex_rows(table.rows)]
    for heading, published in _published(table):
        lines += ["\\midrule", f"\\multicolumn{{{len(table.columns)}}}{{l}}{{{_in_latex(heading)}}}"]
        lines += [" & ".join(map(_in_latex, line)) for line in published]
    body = [f"    {line} \\\\" if not line.startswith("\\midrule") else f"    {line}" for line in lines]
    notes = [f"  \\par\\smallskip\\footnotesize {_in_latex(' '.join(table.notes))}"] if table.notes else []
    return "\n".join(
        [
            "% \\usepackage{booktabs, graphicx}",
            "\\begin{table}",
            "  \\centering",
            f"  \\caption{{{_in_latex(table.experiment)}: results on test data.}}",
            f"  \\label{{tab:{slug(table.experiment)}-results}}",
            "  \\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
            f"  \\begin{{tabular}}{{{''.join('r' if column.numeric else 'l' for column in table.columns)}}}",
            "    \\toprule",
            body[0],
            "    \\midrule",
            *body[1:],
            "    \\bottomrule",
            "  \\end{tabular}}",
            *notes,
            "\\end{table}",
            "",
        ]
    )


def _latex_rows(rows: Sequence[Row]) -> Iterator[str]:
    for before, row in zip((None, *rows), rows, strict=False):
        if before is not None and before.group.single and not row.group.single:
            yield "\\midrule"
        yield " & ".join(_cell(cell, _in_latex, "\\textbf{{{}}}") for cell in row.cells)


_LATEX_ARROWS = {True: " $\\uparrow$", False: " $\\downarrow$", None: ""}
_LATEX = {
    **{"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"},
    **{"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}", "`": "\\textasciigrave{}"},
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"±": "$\\pm$", "×": "$\\times$", "−": "$-$", "–": "--", "—": "---", "≤": "$\\leq$", "≥": "$\\geq$"},
    **{
        "Δ": "$\\Delta$",
        "ε": "$\\varepsilon$",
        "̂": "",
        "²": "$^2$",
        "↑": "$\\uparrow$",
        "↓": "$\\downarrow$",
    },
    **{"“": "``", "”": "''", "…": "\\ldots{}", "\N{NARROW NO-BREAK SPACE}": "\\,", "·": "$\\cdot$"},
    **{"*": "$^{*}$", "[": "{[}", "]": "{]}"},
}


def _in_latex(text: str) -> str:
    # A bracket at the start of a row would be read as the length of the line break before it.
    line = "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
    return line.replace("$^{*}$$^{*}$", "$^{**}$")


# ---- CSV


def results_csv(study: Study) -> str:
    """Everything measured on test data, a line for each group of runs: unrounded, fractions instead of percent.

    Published rows follow, with their source in the last column.

    Texts that a spreadsheet would take for a formula start with an apostrophe.
    """
    metrics = list(
        dict.fromkeys(
            (metric["task"], metric["name"])
            for group in study.groups
            for metric in group.runs[0].config["metrics"]
            if metric["task"] in study.tasks
        )
    )
    columns = ["experiment", "name", "method", "gradients", "options", "tasks", "runs", "finished", "seeds"]
    for title in (*(f"{task} {name}" for task, name in metrics), "delta_m_percent"):
        columns += [f"{title} mean", f"{title} std", f"{title} n"]
    columns += ["relative_seconds", "seconds_per_epoch", "peak_memory_bytes", "published_in"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(_in_csv, columns))
    for group in study.groups:
        writer.writerow(map(_in_csv, _numbers(study, group, metrics)))
    for row in study.published:
        values = [row.metrics.get(task, {}).get(name) for task, name in metrics]
        told = [
            study.experiment,
            row.method,
            *[None] * 7,
            *(entry for v in values for entry in (v, None, None)),
        ]
        writer.writerow(map(_in_csv, [*told, *[None] * 6, row.source]))
    return file.getvalue()


def _numbers(study: Study, group: Group, metrics: Sequence[tuple[str, str]]) -> list[Any]:
    options = json.dumps(group.runs[0].config["options"], ensure_ascii=False)
    found: list[Any] = [study.experiment, group.name, group.method, group.gradients, options]
    found += [" ".join(group.tasks), len(group.runs), len(group.finished), " ".join(map(str, group.seeds))]
    for task, name in metrics:
        found += _three(spread(_measured(run.result or {}, task, name) for run in group.finished))
    found += _three(study.delta_m(group)[0])
    return [
        *found,
        study.relative_seconds(group),
        group.median("seconds_per_epoch"),
        group.median("peak_memory_bytes"),
        None,
    ]


def _measured(result: Mapping[str, Any], task: str, name: str) -> float | None:
    value = result["metrics"].get(task, {}).get(name)
    return None if value is None else float(value)


def _three(found: Spread | None) -> list[Any]:
    return [None, None, 0] if found is None else [found.mean, found.deviation, found.count]


def _in_csv(value: Any) -> Any:
    # csv writes the shortest decimal that gives the same float again.
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return value
