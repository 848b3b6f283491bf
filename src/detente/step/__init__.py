"""One training step: losses to task gradients, task gradients to a combination, a combination to ``.grad``.

:func:`backward` is what a training loop calls; it composes :func:`task_gradients` (`taking`), the method and
:func:`apply`. :func:`combine` is the mathematics alone, on a matrix (`combining`). `deciding` lets the method decide
and turns a step into plain numbers; `accumulating` makes one step of several micro-batches.
"""

from detente.step.accumulating import accumulate
from detente.step.combining import combine, with_direction
from detente.step.deciding import NUMBERS, decide, record_of, undone_on_failure
from detente.step.taking import task_gradients
from detente.step.training_step import apply, backward, shared_gradients

__all__ = [
    "NUMBERS",
    "accumulate",
    "apply",
    "backward",
    "combine",
    "decide",
    "record_of",
    "shared_gradients",
    "task_gradients",
    "undone_on_failure",
    "with_direction",
]
