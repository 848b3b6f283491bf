"""Docstrings in Google's style as Markdown, in which formulas are no markup."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Docstring:
    """A method's docstring in its parts, each as Markdown."""

    summary: str
    text: str
    when: str = ""
    cost: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    errors: tuple[tuple[str, str], ...] = ()
    example: str = ""


def read_docstring(cls: Callable[..., Any], names: Iterable[str] = ()) -> Docstring:
    """Take a class docstring in Google's style apart; ``names`` of methods in it become links to their pages.

    Sentences that begin with "When to use it:" and "Cost:" are taken out of the text.
    """
    import griffe

    names = frozenset(names)
    # Types stand in the signature, and one entry may describe two options: that is no reason to warn.
    logging.getLogger("griffe").setLevel(logging.ERROR)
    sections = griffe.Docstring(inspect.getdoc(cls) or "").parse("google", warn_unknown_params=False)
    text: list[str] = []
    options: dict[str, str] = {}
    errors: list[tuple[str, str]] = []
    example = ""
    for section in sections:
        kind, value = section.kind.value, section.value
        if kind == "text":
            text.append(value)
        elif kind == "parameters":
            for parameter in value:
                for name in re.split(r",\s*", parameter.name):
                    options[name] = prose(one_line(parameter.description), names)
        elif kind == "raises":
            errors += [(str(error.annotation), prose(one_line(error.description), names)) for error in value]
        elif kind == "admonition" and value.kind == "example":
            example = value.description
        elif kind == "admonition":
            text.append(f"{section.title or value.kind}: {value.description}")
        else:
            raise ValueError(f"{cls.__name__}: the docs have no place for a docstring section {kind!r}.")
    summary, _, rest = "\n\n".join(text).partition("\n\n")
    rest, when = taken_out(rest, "When to use it", "Cost")
    rest, cost = taken_out(rest, "Cost", "When to use it")
    if "torch." in example and "import torch" not in example:
        example = f">>> import torch\n{example}"  # the module that holds the example has imported it
    return Docstring(
        summary=prose(one_line(summary), names),
        text=prose(rest, names),
        when=prose(one_line(when), names),
        cost=prose(one_line(cost), names),
        options=options,
        errors=tuple(errors),
        example=example.rstrip(),
    )


def taken_out(text: str, heading: str, other: str) -> tuple[str, str]:
    """The text without what follows "heading:" up to "other:" or the paragraph's end, and that piece."""
    found = re.search(rf"(?:^|(?<=\s)){heading}:\s*(.*?)(?=\s{other}:|\n\s*\n|\Z)", text, re.DOTALL)
    if found is None:
        return text, ""
    left = (text[: found.start()].rstrip(" ") + text[found.end() :]).strip()
    piece = found[1].strip()
    return re.sub(r"\n{3,}", "\n\n", left), capital(piece)


def one_line(text: str) -> str:
    """Wrapped lines joined."""
    return re.sub(r"\s*\n\s*", " ", text.strip())


ROLE = re.compile(r":(?:func|class|meth|data|mod|attr|exc):`[~!]?([^`]+)`")
CODE = re.compile(r"(`+)(.+?)\1", re.DOTALL)


def prose(text: str, names: frozenset[str] = frozenset()) -> str:
    """Docstring text as Markdown: formulas such as ``<g_i, g_j>`` or ``w*g`` are no markup, code spans stay."""
    pieces, end = [], 0
    text = ROLE.sub(r"`\1`", text)
    for span in CODE.finditer(text):
        pieces += [escaped(text[end : span.start()]), code(one_line(span[2]), names)]
        end = span.end()
    return "".join([*pieces, escaped(text[end:])])


def escaped(text: str) -> str:
    """Text in which no character means anything to Markdown, except the bullets of a list."""
    text = text.replace(">=", "≥").replace("<=", "≤")
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")
    text = re.sub(r"(?m)^(\s*)\* ", r"\1- ", text)
    return re.sub(r"([\\*_\[\]#])", r"\\\1", text)


def code(text: str, names: frozenset[str] = frozenset()) -> str:
    """A code span; the name of a method is a link to its page."""
    span = f"`{text}`"
    return f"[{span}]({text}.md)" if text in names else span


def cell(text: str) -> str:
    """Text for a table: one line, and no bar inside a code span, where it cannot be escaped."""
    return CODE.sub(lambda span: span[0].replace("|", "∣"), one_line(text))


def table(rows: Iterable[Iterable[str]]) -> str:
    """The first row is the head."""
    head, *body = [[cell(entry) for entry in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def capital(text: str) -> str:
    """The first letter as a capital."""
    return text[:1].upper() + text[1:]
