"""One training step: losses to task gradients, task gradients to a combination, a combination to ``.grad``.

:func:`backward` is what a training loop calls; it composes :func:`task_gradients` (`taking`), the method and
:func:`apply`. :func:`combine` is the mathematics alone, on a matrix (`combining`). `recording` turns a step into plain
numbers; `accumulating` makes one step of several micro-batches.
"""

from detente.step.accumulating import accumulate
from detente.step.backward import apply, backward, shared_gradients
from detente.step.combining import asks_for_rows, combine, decide, with_direction
from detente.step.recording import record_of, undone_on_failure
from detente.step.taking import task_gradients

__all__ = [
    "accumulate",
    "apply",
    "asks_for_rows",
    "backward",
    "combine",
    "decide",
    "record_of",
    "shared_gradients",
    "task_gradients",
    "undone_on_failure",
    "with_direction",
]
