"""Line search for several tasks: how long a step may be so that every loss falls.

The direction comes from any method; the search finds the length and moves the parameters. What belongs here: the
condition as pure functions on small arrays (`armijo`), and the searches. How a direction is made belongs in `methods`.
"""

from detente.linesearch.backtracking import Backtracking
from detente.linesearch.closure import Closure
from detente.linesearch.fast import FastBacktracking
from detente.linesearch.options import SearchOptions
from detente.linesearch.record import ClosureChanged, NoDescent, SearchFailed, SearchRecord

__all__ = [
    "Backtracking",
    "FastBacktracking",
    "SearchOptions",
    "SearchRecord",
    "Closure",
    "ClosureChanged",
    "NoDescent",
    "SearchFailed",
]
