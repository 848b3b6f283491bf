"""For mkdocstrings: a docstring's section "Example:" is shown as code.

Griffe knows the section as "Examples:" and would take ours for a remark, with every ``>>>`` a quotation.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Reads "Example:" as "Examples:"."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for everything that was read from the sources."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
