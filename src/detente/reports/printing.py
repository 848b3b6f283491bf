"""What every matplotlib figure shares: the fonts of a paper, and names that are no formulas."""

from __future__ import annotations

from typing import Any


def paper_fonts() -> Any:
    """A context in which figures are drawn with the sizes of a paper; text stays text in SVG files.

    Example:
        >>> import matplotlib as mpl
        >>> with paper_fonts():
        ...     mpl.rcParams["font.size"]
        10.0
    """
    import matplotlib as mpl

    return mpl.rc_context(
        {"font.size": 10, "axes.labelsize": 10, "axes.edgecolor": "#888888", "svg.fonttype": "none"}
    )


def plain_math(text: str) -> str:
    """A dollar sign in a name is no formula.

    Example:
        >>> print(plain_math("a $ b"))
        a \\$ b
    """
    return text.replace("$", r"\$")


__all__ = ["paper_fonts", "plain_math"]
