"""One self-contained page out of stored runs: no network, no other file, names from outside escaped."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from detente.records import RecordError, Run, UnwritableFolder, find_runs, no_collections, write_bytes
from detente.reports.contributions import balance_section
from detente.reports.cost import cost_section
from detente.reports.figures import Figure, Section, conflict_curves, loss_curves, weight_curves
from detente.reports.groups import Study, collect
from detente.reports.guards import guards_section
from detente.reports.plane import plane_section
from detente.reports.published import PublishedRow
from detente.reports.samples import strips_html
from detente.reports.style import BACKGROUND, PALETTE, PUBLISHED, named
from detente.reports.sweeps import Outcome, conditions, finals, read_outcomes
from detente.reports.tables import Table, table_of
from detente.reports.thinning import thinned
from detente.reports.verdict import verdict

# Nothing is fetched, whatever a record contains: the page may only run and show what is inside it.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)


class NoRuns(ValueError):
    """The folders given to a report hold no run that can be read."""


def build_report(
    folders: Sequence[Path],
    output: Path,
    title: str = "Détente report",
    *,
    published: Mapping[str, Sequence[PublishedRow]] | None = None,
) -> Path:
    """Write one HTML file with everything that the runs in these folders say.

    Args:
        folders: run folders, or folders that contain some.
        output: the file to write; its folder is made.
        title: the heading of the page.
        published: experiment to the rows of the papers' tables that are shown beside its runs.

    Returns:
        The path of the file.

    Raises:
        NoRuns: no folder holds a readable run.
        FileNotFoundError: a folder does not exist.
        UnwritableFolder: the file cannot be written.
    """
    with no_collections():
        studies, problems = read_studies(folders, published)
        return write_report(studies, problems, output, title)


def read_studies(
    folders: Sequence[Path], published: Mapping[str, Sequence[PublishedRow]] | None = None
) -> tuple[list[Study], list[str]]:
    """The studies that the runs in these folders make up, and in words what of them could not be read.

    Args:
        folders: run folders, or folders that contain some.
        published: experiment to the rows of the papers' tables that are shown beside its runs.

    Raises:
        NoRuns: no folder holds a readable run.
        FileNotFoundError: a folder does not exist.
    """
    problems: list[RecordError] = []
    runs: dict[Path, Run] = {}
    for folder in folders:
        for run in find_runs(Path(folder), problems):
            runs.setdefault(run.path.resolve(), run)
    if not runs:
        places = ", ".join(str(folder) for folder in folders) or "no folder"
        detail = f" ({problems[0]})" if problems else ""
        raise NoRuns(
            f"{places}: there is no run to report on{detail}. "
            "A run is a folder with a config.json; `detente run` makes one."
        )
    outcomes = read_outcomes(map(Path, folders), problems)
    with no_collections():
        readable = [_readable(run, problems) for run in finals(runs.values(), outcomes)]
    studies = [_with_outcome(study, outcomes) for study in collect(readable)]
    for group in (group for study in studies for group in study.groups):
        # The page shows those of one run, and a thousand more files would take seconds.
        next((run for run in group.runs if _readable(run, problems, ("samples",)).samples), None)
    if published:
        studies = [replace(study, published=tuple(published.get(study.experiment, ()))) for study in studies]
    return studies, [str(problem) for problem in problems]


def write_report(
    studies: Sequence[Study], problems: Sequence[str], output: Path, title: str = "Détente report"
) -> Path:
    """Write the page of these studies and return its path; `problems` stand at its top.

    Raises:
        UnwritableFolder: the file cannot be written.
    """
    with no_collections():
        page = render(studies, title, problems)
    return written(Path(output), page.encode("utf-8"))


def written(path: Path, data: bytes) -> Path:
    """A file of the report with its folder, in full or not at all; its path.

    Raises:
        UnwritableFolder: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
    except OSError as error:
        raise UnwritableFolder(path, error) from error
    return path


def _with_outcome(study: Study, outcomes: Mapping[Path, Outcome]) -> Study:
    """A study with what the sweep says, where all its runs are of one sweep."""
    mine = [outcome for outcome in outcomes.values() if outcome["experiment"] == study.experiment]
    if len(mine) != 1:
        return study
    inside = {name for entry in mine[0]["contenders"] for name in entry["runs"]}
    return replace(study, outcome=mine[0]) if all(run.path.name in inside for run in study.runs) else study


def render(studies: Sequence[Study], title: str, problems: Sequence[str] = ()) -> str:
    """The page as text."""
    import plotly.offline

    figures: list[Figure] = []
    body = "\n".join(_study_html(study, figures, len(studies) > 1) for study in studies)
    palette = {mode: {**PALETTE[mode], "card": BACKGROUND[mode]} for mode in PALETTE}
    data = {
        "palette": palette,
        "figures": [{"data": figure.data, "layout": figure.layout} for figure in figures],
    }
    # Inside a script element "<" could end it, whatever the quotes around it.
    stored = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    name = html.escape(title)
    warning = ""
    if problems:
        items = "".join(f"<li>{html.escape(problem)}</li>" for problem in problems)
        warning = f"<section class='warning'><h2>Not everything could be read</h2><ul>{items}</ul></section>"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{name}</title>
<style>
{_css()}
</style>
</head>
<body>
<header class="top"><h1>{name}</h1><p class="muted">{_summary(studies)}</p></header>
<main>
{warning}
<noscript><p>The figures need JavaScript; the verdict and the table do not.</p></noscript>
{body}
</main>
<footer><p>{_versions(studies)}</p></footer>
<script type="application/json" id="report-data">{stored}</script>
<script type="text/plain" id="plotly">{plotly.offline.get_plotlyjs()}</script>
<script>
{_asset("page.js")}
</script>
</body>
</html>
"""


def _readable(run: Run, problems: list[RecordError], names: Sequence[str] = ("epochs", "steps")) -> Run:
    """The run, with files that are damaged left out and named among the problems."""
    for name in names:
        try:
            getattr(run, name)
        except RecordError as error:
            problems.append(error)
            # A cached property keeps its value in the instance's dictionary.
            run.__dict__[name] = None if name == "samples" else ()
    return run


def _study_html(study: Study, figures: list[Figure], several: bool) -> str:
    parts = []
    if several:
        parts.append(f"<h2 class='experiment'>{html.escape(study.experiment)}</h2>")
    found = verdict(study)
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in found.sentences)
    limits = f"<ul>{items}</ul>" if items else ""
    headline = html.escape(found.headline)
    parts.append(f"<section class='verdict'><p class='headline'>{headline}</p>{limits}</section>")
    parts.append(f"<section><h2>Results on test data</h2>{_table_html(study)}</section>")
    if study.outcome is not None:
        told = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in conditions(study.outcome))
        parts.append(f"<section><h2>How this was compared</h2><ul>{told}</ul></section>")
    parts.append(_legend(study))
    for section in map(thinned, sections_of(study)):
        parts.append(_section_html(section, figures, study))
    parts.append(f"<section><h2>Sample images</h2>{strips_html(study)}</section>")
    parts.append(f"<section><h2>Every run</h2>{_runs_html(study)}</section>")
    return "\n".join(parts)


def sections_of(study: Study) -> list[Section]:
    """All figures of a study, in the order of the page."""
    found = [
        *(plane_section(study), cost_section(study), loss_curves(study), weight_curves(study)),
        *(conflict_curves(study), guards_section(study), balance_section(study)),
    ]
    return [section for section in found if section is not None]


def _section_html(section: Section, figures: list[Figure], study: Study) -> str:
    grids = []
    for row in section.rows:
        drawn = "".join(_figure_html(figure, section.title, figures, study) for figure in row)
        grids.append(f"<div class='figures{' three' if len(row) == 3 else ''}'>{drawn}</div>")
    text = html.escape(section.text)
    return f"<section><h2>{html.escape(section.title)}</h2><p>{text}</p>{''.join(grids)}</section>"


def _figure_html(figure: Figure, fallback: str, figures: list[Figure], study: Study) -> str:
    figures.append(figure)
    label = html.escape(figure.title or fallback, quote=True)
    heading = f"<h3>{html.escape(figure.title)}</h3>" if figure.title else ""
    return (
        f"<figure>{heading}{_own_legend(figure, len(figures) - 1, study)}"
        f"<div class='drawing{' polar' if 'polar' in figure.layout else ''}' role='img' aria-label=\"{label}\" "
        f"data-figure='{len(figures) - 1}' style='height:{figure.height}px'></div></figure>"
    )


def _own_legend(figure: Figure, number: int, study: Study) -> str:
    """Buttons for the groups of one figure, where it does not draw all of them at first."""
    if figure.shown is None:
        return ""
    drawn = {trace.get("meta") for trace in figure.data}
    buttons = "".join(
        f"<button type='button' aria-pressed='{'true' if group.key in figure.shown else 'false'}' "
        f"data-group='{group.key}'>{named(group.style, group.name)}</button>"
        for group in study.groups
        if group.key in drawn
    )
    label = html.escape(figure.title, quote=True)
    return f"<div class='own-legend' role='group' aria-label=\"Methods in: {label}\" data-of='{number}'>{buttons}</div>"


def _table_html(study: Study) -> str:
    table = table_of(study)
    number = [
        " class='number'" if column.numeric else " class='wide'" if column.minor else ""
        for column in table.columns
    ]
    head = "".join(
        f"<th scope='col'{kind}{_FIRST[column.higher_is_better]}><button type='button' title='Sort by this column'>"
        f"{html.escape(column.title)}{_ARROW[column.higher_is_better]}</button></th>"
        for column, kind in zip(table.columns, number, strict=True)
    )
    rows = []
    for row in table.rows:
        first, *others = row.cells
        # On a phone the column of gradients gives its place to the numbers.
        name = named(row.group.style, first.text)
        also = named(row.group.style, row.group.name)
        cells = [f"<th scope='row'><span class='wide'>{name}</span><span class='narrow'>{also}</span></th>"]
        for cell, column in zip(others, table.columns[1:], strict=True):
            kinds = [
                name
                for name, here in (("number", column.numeric), ("best", cell.best), ("wide", column.minor))
                if here
            ]
            kind = f" class='{' '.join(kinds)}'" if kinds else ""
            value = "" if cell.value is None else f" data-value='{cell.value!r}'"
            cells.append(f"<td{kind}{value}>{html.escape(cell.text)}</td>")
        rows.append(f"<tr{' class=single' if row.group.single else ''}>{''.join(cells)}</tr>")
    notes = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in table.notes)
    return (
        f"<div class='scroll' tabindex='0'><table class='results'><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody>{_published_html(table)}</table></div>{notes}"
    )


def _published_html(table: Table) -> str:
    """The papers' rows in a body of their own, below a line with their source."""
    rows, last = [], None
    for line in table.published:
        if line.heading != last:
            last = line.heading
            rows.append(
                f"<tr class='source'><th scope='rowgroup' colspan='{len(table.columns)}'>"
                f"<span>{html.escape(last)}</span></th></tr>"
            )
        cells = [f"<th scope='row'>{named(PUBLISHED, line.name)}</th>"]
        for cell, column in zip(line.cells[1:], table.columns[1:], strict=True):
            kind = " class='number'" if column.numeric else " class='wide'" if column.minor else ""
            cells.append(f"<td{kind}>{html.escape(cell.text)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<tbody class='published'>{''.join(rows)}</tbody>" if rows else ""


# Which order a first press on a heading gives: the best above.
_FIRST = {True: " data-first='descending'", False: "", None: ""}
_ARROW = {True: "&nbsp;↑", False: "&nbsp;↓", None: ""}


def _legend(study: Study) -> str:
    buttons = "".join(
        f"<button type='button' aria-pressed='true' data-group='{group.key}'>"
        f"{named(group.style, group.name)}</button>"
        for group in study.groups
    )
    hint = (
        "Press a method to hide or show it in all figures. Drag in a figure to zoom; double-click to go back."
    )
    return (
        f"<nav class='legend' aria-label='Methods' title='{hint}'>{buttons}</nav><p class='note'>{hint}</p>"
    )


def _runs_html(study: Study) -> str:
    parts = []
    for group in study.groups:
        for run in group.runs:
            # Quotation marks are harmless in a text, and most of what hundreds of configurations would take.
            command = html.escape(str(run.config["command"]), quote=False)
            config = html.escape(json.dumps(run.config, indent=1, ensure_ascii=False), quote=False)
            parts.append(
                f"<details><summary>{html.escape(group.name)}, seed {run.seed} "
                f"<span class='state'>{html.escape(_state(run))}</span></summary>"
                f"<pre><code>{command}</code></pre><pre><code>{config}</code></pre></details>"
            )
    return "".join(parts)


def _state(run: Run) -> str:
    """In words: finished or not, how long, and what its steps reported."""
    parts = []
    if run.result is None:
        parts.append(f"not finished, {len(run.epochs)} epochs recorded")
    else:
        parts.append(f"{run.result['epochs']} epochs")
        if run.result.get("seconds") is not None:
            parts.append(f"{run.result['seconds']:.0f} s")
        if run.result.get("parameters") is not None:
            parts.append(f"{run.result['parameters']:,} parameters".replace(",", "\N{NARROW NO-BREAK SPACE}"))
    if run.steps:
        parts.append(f"{len(run.steps)} steps recorded")
    status = Counter(str(row["status"]) for row in run.steps if row.get("status", "ok") != "ok")
    parts += [f"{count} {name}" for name, count in sorted(status.items())]
    refused = sum(row["refused"] for row in run.epochs if isinstance(row.get("refused"), int))
    if refused:
        parts.append(f"{refused} steps refused in all")
    share = _guarded_share(run)
    if share:
        parts.append(f"refused by the guard: {100 * share:.3g} % of the steps, or of their shared parts")
    parts.append(f"folder {run.path.name}")
    return ", ".join(parts)


def _guarded_share(run: Run) -> float | None:
    """The mean over the epochs, each by its steps, of the share that a guard says it refused; None without a guard."""
    refused = steps = last = 0.0
    for row in run.epochs:
        told = row.get("method")
        share = told.get("refused_share") if isinstance(told, dict) else None
        if isinstance(share, int | float):
            refused, steps = refused + share * (row["step"] - last), steps + row["step"] - last
        last = row["step"]
    return refused / steps if steps else None


def _summary(studies: Sequence[Study]) -> str:
    runs = [run for study in studies for run in study.runs]
    names = ", ".join(study.experiment for study in studies)
    started = sorted(str(run.config["started"])[:10] for run in runs)
    days = started[0] if started[0] == started[-1] else f"{started[0]} to {started[-1]}"
    done = sum(1 for run in runs if run.finished)
    count = f"{len(runs)} run{'' if len(runs) == 1 else 's'}"
    state = "" if done == len(runs) else f", {done} finished"
    return html.escape(f"{names}: {count}{state}, started {days}")


def _versions(studies: Sequence[Study]) -> str:
    """The versions the runs were made with, all of them where they differ."""
    found: dict[str, dict[str, None]] = {}
    for study in studies:
        for run in study.runs:
            for name, version in run.config["versions"].items():
                found.setdefault(name, {})[str(version)] = None
    listed = (f"{name} {' / '.join(versions)}" for name, versions in found.items())
    return html.escape(f"Made from the runs' own records. {', '.join(listed)}.")


def _css() -> str:
    rules = _asset("page.css")
    for mode, colour in BACKGROUND.items():
        rules = rules.replace(f"BACKGROUND-{mode.upper()}", colour)
    light, dark = (_variables(PALETTE[mode]) for mode in ("light", "dark"))
    return f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{rules}"


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


def _asset(name: str) -> str:
    return (resources.files("detente.reports") / "assets" / name).read_text(encoding="utf-8")
