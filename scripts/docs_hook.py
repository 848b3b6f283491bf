"""For mkdocs: the pages about the methods, and how cross-references of docstrings are shown.

The pages are made while the docs are built (see method_pages.py) and join the section "Methods" of the navigation;
nothing of them is stored. References such as ``:func:`detente.create``` are shown as plain code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import method_pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROLE = re.compile(r":(?:func|class|meth|data|mod|attr|exc):<code>[~!]?([^<]+)</code>")
SECTION, EVERY = "Methods", "Every method"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Called once: list the pages in the navigation."""
    made = list(method_pages.pages(Path(config.docs_dir)))
    (section,) = (entry[SECTION] for entry in config.nav or [] if SECTION in entry)
    section.append({EVERY: [path for path in made if path not in section]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called for every build: add the pages."""
    for path, text in method_pages.pages(Path(config.docs_dir)).items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return ROLE.sub(r"<code>\1</code>", html)
