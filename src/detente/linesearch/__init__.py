"""Line search for several tasks: how long a step may be so that every loss falls.

A search composes three objects: the direction (`direction`: where the problem is solved and what is moved, for any
method), the condition (`armijo`, pure functions on small arrays) and the trials (`trials`: lengths, cap, lowering).
`search` runs them, `searches` declares the public ones, `engine` is all that they use of the engine. How a direction is
chosen belongs in `methods`.
"""

from detente.linesearch.closure import Closure
from detente.linesearch.options import SearchOptions
from detente.linesearch.record import ClosureChanged, NoDescent, SearchFailed, SearchRecord
from detente.linesearch.searches import (
    Backtracking,
    FastBacktracking,
    SearchInfo,
    SearchName,
    UnknownSearch,
    create,
    searches,
)

__all__ = [
    "Backtracking",
    "FastBacktracking",
    "SearchOptions",
    "SearchRecord",
    "Closure",
    "ClosureChanged",
    "NoDescent",
    "SearchFailed",
    "SearchInfo",
    "SearchName",
    "UnknownSearch",
    "create",
    "searches",
]
