"""For mkdocs: cross-references of docstrings (``:func:`detente.create```) are shown as plain code on the pages."""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:func|class|meth|data|mod|attr|exc):<code>[~!]?([^<]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return ROLE.sub(r"<code>\1</code>", html)
